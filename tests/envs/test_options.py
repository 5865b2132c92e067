"""``--option NAME=VALUE``, as every command reads it."""

import pytest

from atod_envs.errors import AtodError
from atod_envs.options import read_options


def test_values_are_what_they_look_like():
    said = [
        "a=3",
        "b=true",
        "c=x=y",
        "d=None",
        "e=0.5",
        "f=nq,hotpotqa",
        "g=http://x:1",
        "h='3'",
        "i=",
        "j=nq:2",
        "k=1,2",
    ]
    expected = {"a": 3, "b": True, "c": "x=y", "d": None, "e": 0.5, "f": "nq,hotpotqa", "g": "http://x:1", "h": "3"}
    assert read_options(said) == expected | {"i": "", "j": "nq:2", "k": (1, 2)}


def test_a_splits_own_options_are_for_it_alone_and_the_last_word_counts():
    said = ["topk=1", "train.dataset=nq", "topk=3", "test.topk=5"]
    assert read_options(said) == read_options(said, "train") == {"topk": 3, "dataset": "nq"}
    assert read_options(said, "test") == {"topk": 5}


@pytest.mark.parametrize("slip", ["data", "=3", "two words=3", "train.=3", "-x=3"])
def test_slips_are_named(slip):
    with pytest.raises(AtodError, match=r"expected NAME=VALUE, such as --option task_types="):
        read_options([slip])
