import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_envs.errors import DataError
from atod_envs.stored import episode_files
from atod_envs.trajectory import (
    Group,
    StopReason,
    Trajectory,
    Turn,
    read_jsonl,
    read_parquet,
    to_record,
    write_jsonl,
    write_parquet,
)

text = st.text(st.characters(), max_size=20) | st.just("half a character \ud83d")
ids = st.lists(st.integers(0, 2**20), max_size=5).map(tuple)


@st.composite
def turns(draw):
    made, before = [], ()
    for index in range(draw(st.integers(0, 4))):
        prompt = (draw(st.booleans()) and before + draw(ids)) or draw(ids)
        response = draw(ids)
        logprobs = tuple(draw(st.floats(-50, 0, width=32)) for _ in response)
        made.append(
            Turn(
                index,
                draw(text),
                tuple(draw(st.lists(text, max_size=3))),
                prompt,
                response,
                logprobs,
                draw(text),
                draw(text),
                draw(st.booleans()),
                draw(st.booleans()),
                draw(st.floats(0, 1)),
                draw(st.floats(0, 9)),
                0.25,
            )
        )
        before = prompt + response
    return tuple(made)


trajectories = st.builds(
    Trajectory,
    text,
    text,
    text,
    text,
    text,
    st.integers(-1, 2**62),
    turns(),
    text,
    st.booleans(),
    st.floats(0, 1),
    st.sampled_from(StopReason),
    st.integers(-1, 9),
    st.dictionaries(text, text, max_size=2),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(trajectories, max_size=3))
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_round_trip_is_exact(tmp_path_factory, name, batch):
    path = tmp_path_factory.mktemp("t") / name
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
        write_parquet(path, batch)
        assert list(read_parquet(path)) == batch
    else:
        write_jsonl(path, batch)
        assert list(read_jsonl(path)) == batch


def make(n_turns: int = 3) -> Trajectory:
    made, prompt = [], tuple(range(100))
    for k in range(n_turns):
        made.append(Turn(k, "o", (), prompt, (7, 8), (-0.1, -0.2), "r", "a", True, True, 0.0))
        prompt = (*prompt, 7, 8, 9)
    return Trajectory("e", "t", "train", "task", "g", 0, tuple(made), "", True, 1.0, StopReason.SUCCESS)


ONE = Trajectory("e", "t", "s", "say", "g", 7, (), "end", True, 1.0, StopReason.SUCCESS, 3, {"toy/kind": "fruit"}, "v")


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score": float("nan")}, "'score' is nan"),
        ({"success": np.True_}, "'success'"),
        ({"labels": {"kind": 3}}, "'labels'"),
        ({"seed": np.int64(3)}, "'seed'"),
    ],
)
def test_what_no_reader_takes_is_not_written(write, change, words, tmp_path):
    """And what lay there before stays."""
    path = tmp_path / "t.jsonl"
    write(path, [ONE])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=words):
        write(path, [ONE, replace(ONE, **change)])
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["t.jsonl"]


def test_parquet_says_which_numbers_it_holds(tmp_path):
    with pytest.raises(ValueError, match=r"write \.jsonl"):
        write_parquet(tmp_path / "t.parquet", [replace(ONE, seed=2**70)])
    write_jsonl(tmp_path / "t.jsonl", [replace(ONE, seed=2**70)])
    assert next(read_jsonl(tmp_path / "t.jsonl")).seed == 2**70


def test_a_conversation_is_stored_in_linear_space():
    record = to_record(make(20))
    assert sum(len(turn["prompt_ids"]) for turn in record["turns"]) == 100 + 19


def test_a_file_of_another_version_or_a_torn_line_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({**to_record(make()), "schema": 99}) + "\n")
    with pytest.raises(DataError, match="schema 99"):
        list(read_jsonl(path))
    write_jsonl(path, [make(), make()])
    path.write_text(path.read_text()[:-40])
    with pytest.raises(DataError, match="line 2"):
        list(read_jsonl(path))
    record = to_record(make())
    del record["turns"][0]["action"]
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match="action"):
        list(read_jsonl(path))


def test_compressed_files_are_the_same_bytes_each_time(tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_jsonl(tmp_path / name, [make()])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).startswith(b'{"env_id":"e"')


def test_misaligned_logprobs_and_mixed_groups_are_refused():
    with pytest.raises(ValueError, match="1 log-probs for 2 tokens"):
        Turn(0, "", (), (), (1, 2), (-0.1,), "", "", True, True, 0.0)
    with pytest.raises(ValueError, match="other"):
        Group("t", (make(), replace(make(), task_id="other")))


def test_a_folder_of_files_of_several_kinds_is_read_whole(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz"):
        write_jsonl(tmp_path / name, [make()])
    write_parquet(tmp_path / "c.parquet", [make()])
    assert [file.name for file in episode_files(tmp_path, "--source")] == ["a.jsonl.gz", "b.jsonl", "c.parquet"]
    for name in ("trajectories", "episodes"):  # a run's own lines are none of them
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "d.jsonl.gz", [make()])
    found = [str(file.relative_to(tmp_path)) for file in episode_files(tmp_path, "--source")]
    assert found == ["episodes/d.jsonl.gz", "trajectories/d.jsonl.gz"]
