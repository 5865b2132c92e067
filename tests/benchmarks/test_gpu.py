"""``benchmarks/gpu.sh``: its parts run at toy size, and one that goes wrong does not take the others along."""

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile

import pytest
from paths import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))  # at the end: a file there is called alfworld
from gpu import main, markdown, parts, run_part
from gpu_setting import Setting


def brought(folder):
    """What the other machine was given: a wheel in two pieces, and the checksums of what was packed."""
    folder.mkdir()
    wheel = folder / "carried-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("carried.py", "HERE = True\n")
        file.writestr("carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        file.writestr("carried-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("carried-1.0.dist-info/RECORD", "")
    whole = wheel.read_bytes()
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(whole).hexdigest()}  {wheel.name}\n")
    for number, piece in enumerate((whole[:300], whole[300:])):
        (folder / f"{wheel.name}.piece-{number:02d}").write_bytes(piece)
    wheel.unlink()
    return folder


def start(*arguments):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(REPOSITORY / "benchmarks" / "gpu.sh"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # seconds of the CPU are few; a busy machine takes many of the clock
def test_all_parts_at_toy_size(tmp_path):
    done = start("--rehearse", "--brought", brought(tmp_path / "brought"), "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert list(result["parts"]) == list(parts())
    assert {name: part["status"] for name, part in result["parts"].items()} == dict.fromkeys(parts(), "done")
    numbers = {name: part["numbers"] for name, part in result["parts"].items()}
    within = [value for name, value in numbers["log-probs"].items() if name.endswith("rounding may make")]
    assert len(within) == 4 and all(value.startswith("yes") for value in within)
    with_graphs = [numbers["log-probs"][name] for name in numbers["log-probs"] if name.endswith("recorded steps")]
    assert len(with_graphs) == 4 and all(count > 0 for count in with_graphs)
    same = [value for name, value in numbers["log-probs"].items() if name.endswith("with and without graphs")]
    assert same[0] == "3 of 3", "in float32 both ways sample the same"
    assert [value for name, value in numbers["weights"].items() if "other weights" in name] == ["noticed"] * 2
    assert numbers["packing"]["float32: largest difference of a log-prob (nats)"] < 1e-4
    steps = [name for name in numbers["algorithms"] if "step on the device" in name]
    same = [value for name, value in numbers["algorithms"].items() if "largest relative" in name]
    assert len(steps) == 10 and same == ["0 (none)"] * 10, "the CPU's numbers equal its own"
    assert numbers["adamw8bit"] == {"adamw8bit": "not available: it runs on a GPU only"}
    assert numbers["engine"]["1.7B: engine without graphs, a step of 4 tokens (ms)"] > 0
    assert numbers["engine"]["1.7B: engine, a step's share of the card's copy (%)"] > 0
    assert numbers["engine"]["1.7B: engine / generate()"] > 0 and numbers["train"]["ATOD, last step (s)"] > 0
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert "| **train** | done" in text and "the numbers mean nothing" in text


def test_a_part_that_goes_wrong_is_recorded(tmp_path):
    setting = Setting("cpu", True, tmp_path)

    def fails(setting):
        print("on the way")
        raise ValueError("the card said no\nand more")

    def dies(setting):
        os._exit(3)

    def hangs(setting):
        setting.keep({"so far": 2})
        time.sleep(600)

    assert run_part(lambda setting: {"x": 1.5}, setting, "fine", 20)["numbers"] == {"x": 1.5}
    found = run_part(fails, setting, "fails", 20)
    assert found["status"] == "failed" and found["error"] == "ValueError: the card said no"
    assert "on the way" in (tmp_path / "fails.log").read_text() and "Traceback" in (tmp_path / "fails.log").read_text()
    assert run_part(dies, setting, "dies", 20)["error"] == "died without a word; see dies.log"
    found = run_part(hangs, setting, "hangs", 1)
    assert (
        found["status"] == "stopped" and "was not done in 1 s" in found["error"] and found["numbers"] == {"so far": 2}
    )
    text = markdown({"title": "t", "when": "now", "seconds": 3.0, "toy": False, "parts": {"fails": found}})
    assert "| **fails** | stopped" in text and "| | so far | 2 |" in text


def test_time_that_is_not_there_is_not_begun_with(tmp_path, monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(gpu, "parts", lambda: {"a": (20.0, lambda setting: {"x": 1}), "b": (20.0, lambda setting: {})})
    assert main(["--rehearse", "--out", str(tmp_path), "--seconds", "5"]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["status"] for part in result["parts"].values()] == ["skipped", "skipped"]
    assert "5 s were left of 5" in capsys.readouterr().out


def test_wrong_use_is_said(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["--rehearse", "--parts", "nothing", "--out", str(tmp_path)])
    assert "--parts nothing: expected some of device, log-probs" in capsys.readouterr().err
    done = start("--brought", tmp_path)
    assert done.returncode != 0 and "holds no SHA256SUMS; make it with --pack" in done.stderr
