"""Runs to report on."""

import pytest
from reports import options_of

from atod_algos.atod import ATOD
from atod_algos.grpo import GRPO
from atod_algos.training.cli import main as train


@pytest.fixture(scope="session")
def folders(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    train(ATOD, options_of(models, root / "atod"))
    train(ATOD, options_of(models, root / "kept", "--store", "tokens"))
    train(GRPO, options_of(models, root / "grpo"))
    return root
