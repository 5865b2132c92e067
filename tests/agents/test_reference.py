"""The models that come with the project load by name, fit each other, and differ as student and teacher should."""

import pytest
from reference import play_panel

from agents.chat import first_difference
from agents.models import REFERENCE, load_model, require_same_tokenizer
from atod_envs.errors import AtodError

pytestmark = pytest.mark.slow

ENV = "atod/ALFWorld-v0"


@pytest.fixture(scope="module")
def student():
    return load_model("builtin", "student", world="alfworld")


@pytest.fixture(scope="module")
def teacher():
    return load_model("builtin", "teacher", world="alfworld")


def test_the_teacher_has_the_same_size_and_is_better(student, teacher):
    require_same_tokenizer(student, teacher, "teacher")
    assert first_difference(student.tokenizer, teacher.tokenizer) is None
    assert student.n_parameters == teacher.n_parameters < 1_000_000
    weak, strong = (play_panel(loaded, ENV, 96).success for loaded in (student, teacher))
    assert 0.3 < weak < 0.6 and strong > weak + 0.1


def test_the_files_stay_small():
    assert sum(path.stat().st_size for path in REFERENCE.rglob("*") if path.is_file()) < 24 * 2**20


def test_a_world_without_reference_models_says_so():
    with pytest.raises(AtodError, match=r"no reference student comes with the project for 'toy'.*alfworld"):
        load_model("builtin", "student", world="toy")


@pytest.mark.parametrize(
    "text", ["You arrive at countertop 1. On the countertop 1, you see a apple 1.", "größer 12 🦊", "go to drawer 31"]
)
def test_the_shipped_tokenizer_is_lossless(student, text):
    tokenizer = student.tokenizer
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False) == text


def test_the_built_in_conversation_costs_few_tokens(student):
    """Things and stock phrases are single tokens, so an observation costs about as many as it has parts."""
    text = "You arrive at countertop 1. On the countertop 1, you see a apple 1, a knife 1, and a plate 1."
    assert len(student.tokenizer.encode(text, add_special_tokens=False)) <= 11
