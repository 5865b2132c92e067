import pytest
from tinymodel import tiny_qwen3


@pytest.fixture(scope="session")
def tiny_model():
    return tiny_qwen3(97, 0, spread=0.25)
