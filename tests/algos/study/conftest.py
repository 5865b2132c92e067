"""A study of the toy world."""

import pytest
from toyworld import TOY

from atod_algos.study import Preset, World


@pytest.fixture
def preset(models, monkeypatch):
    train = {
        "env": TOY, "student": str(models["student"]), "teacher": str(models["teacher"]), "style": "compact", "steps": 2,
        "max_turns": 3, "max_response": 8, "max_context": 128, "lr": 2e-3, "tasks_per_step": 2, "group_size": 4, "eval_every": 1,
        "eval_tasks": 4, "checkpoint_every": 1, "minibatches": 2, "threads": 1, "eval_temperature": 1.0,
    }  # fmt: skip
    found = Preset((World("toy", train, 4, {"atod": {"coef_anneal_steps": 1}}),), (1e-3, 2e-3), (0, 1))
    monkeypatch.setattr("atod_algos.study.command.PRESETS", {"toy": found})
    return found
