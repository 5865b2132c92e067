import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "algos"))
from tinymodel import tiny_qwen3


@pytest.fixture(scope="session")
def tiny_model():
    return tiny_qwen3(97, 0, spread=0.25)
