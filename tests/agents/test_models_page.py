"""The table of docs/models.md says what happens to a model today."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("architecture", ["qwen3", "granite", "gemma2", "bloom", "mamba", "mixtral"])
def test_the_page_tells_what_the_checks_find(architecture):
    import transformers

    found = importlib.util.spec_from_file_location("make_models", DOCS / "make_models.py")
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    page = (DOCS / "models.md").read_text()
    if f"transformers {transformers.__version__}:" not in page:
        pytest.skip("the table was made with another transformers")
    kind = next(k for k in transformers.MODEL_FOR_CAUSAL_LM_MAPPING if k.model_type == architecture)
    _, head, learner, engine = script.try_one(kind)
    assert f"| {architecture} | {head} | {learner} | {engine} |" in page
