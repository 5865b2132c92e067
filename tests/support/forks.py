"""Runs in forks of one process that has imported PyTorch and the trainer: a start costs nothing, five seconds else."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
from paths import SUPPORT


@contextlib.contextmanager
def forked_runs(*models):
    """What carries out an order (see ``faults_runner.py``) and tells how it ended: ``killed``, ``code``.

    Args:
        *models: folders of models that are loaded once, for what is imported only then.
    """
    if not hasattr(os, "fork"):
        pytest.skip("runs are forked")
    process = subprocess.Popen(
        [sys.executable, str(SUPPORT / "faults_runner.py"), *map(str, models)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"

    def run(**order):
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()
    process.wait(20)
