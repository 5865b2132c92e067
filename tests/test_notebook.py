"""examples/quickstart.ipynb: its cells run in order, as they stand, and the last one shows the turns of a step."""

import json
import re

import pytest
from paths import REPOSITORY


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch", reason="torch is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = json.loads((REPOSITORY / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "clear the outputs before committing"
    names: dict = {"__name__": "quickstart"}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"quickstart.ipynb, code cell {number}", "exec"), names)
    shown = capsys.readouterr().out
    assert "solved: True" in shown and len(re.findall(r"^step \d: kappa", shown, re.MULTILINE)) == 2
    assert re.search(r"^d \d\.\d\d  h \d\.\d\d  w [01]\.\d\d", shown, re.MULTILINE)
