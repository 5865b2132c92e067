"""``benchmarks/train.py``: the model that it is given, and a step of this trainer."""

import os
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from paths import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))  # at the end: a file there is called alfworld
from train import write_model

from agents.models import REFERENCE, load_model


def test_a_folder_is_a_model_too(tmp_path):
    folder = REFERENCE / "alfworld" / "student"
    write_model(tmp_path, Namespace(model=str(folder)))
    ours, theirs = (load_model(str(path), "student").model.state_dict() for path in (folder, tmp_path))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.slow
def test_a_step_without_a_warm_up(tmp_path):
    options = (
        "--model builtin --contenders ours --tasks 1 --group 2 --turns 2 --response 8 --rounds 1 --steps 1 --warmup 0"
    )
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "train.py"), *options.split(" ")]
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    table = done.stdout.splitlines()
    assert table[0].startswith("builtin model, 1 tasks x 2") and table[2].startswith("this trainer")
