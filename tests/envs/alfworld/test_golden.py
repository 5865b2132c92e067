"""Every recorded answer of the reference is given again: text, admissible commands in order, reward, done, won."""

import gzip
import json
import tarfile

import pytest

from atod_envs.alfworld.engine.game import Game
from atod_envs.alfworld.engine.session import GameSession

RECORDINGS = {
    "golden_walkthrough.jsonl.gz": "alfworld_valid_full.tar.xz",
    "golden_random.jsonl.gz": "alfworld_valid_full.tar.xz",
    "golden_walkthrough_oldgrammar.jsonl.gz": "alfworld_oldgrammar_valid_382.tar.xz",
}


@pytest.fixture(scope="module")
def recorded(realdata):
    """Rows and games by recording; an archive is read once for all its recordings."""
    rows = {}
    for name in RECORDINGS:
        with gzip.open(realdata / "alfworld" / name, "rt", encoding="utf-8") as lines:
            rows[name] = [json.loads(line) for line in lines]
    games = {}
    for archive in sorted(set(RECORDINGS.values())):
        wanted = {row["game"] for name in rows if RECORDINGS[name] == archive for row in rows[name]}
        with tarfile.open(realdata / "alfworld" / archive) as files:
            for member in files:
                if member.name in wanted:
                    games[archive, member.name] = Game.parse(json.load(files.extractfile(member)), name=member.name)
    return rows, games


@pytest.mark.parametrize("recording", RECORDINGS)
def test_recording(recorded, recording):
    rows, games = recorded
    assert rows[recording]
    for row in rows[recording]:
        session = GameSession(games[RECORDINGS[recording], row["game"]])
        step = session.reset()
        assert (step.observation, list(step.admissible)) == (row["reset"]["obs"], row["reset"]["admissible"]), row[
            "game"
        ]
        for number, theirs in enumerate(row["steps"]):
            step = session.step(theirs["action"])
            ours = (step.observation, list(step.admissible), step.reward, step.done, step.won)
            expected = (theirs["obs"], theirs["admissible"], theirs["reward"], theirs["done"], theirs["won"])
            assert ours == expected, f"{row['game']}, step {number}: {theirs['action']!r}"
            assert (step.progress == 1.0) == step.won
