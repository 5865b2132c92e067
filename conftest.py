"""Runs the code blocks of README.md and docs/ as tests: Python in one namespace a page, shell in a scratch folder.

A block that cannot run here (a GPU, a hub, data of the reader's) is marked with its reason:
``<!-- skip: next "reason" -->``. Training commands get ``SHORT`` appended, so that what is shown is what runs, only
smaller.
"""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

try:
    from sybil import Example, Sybil
    from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
except ImportError:  # without it the pages are not tested, everything else is
    Sybil = None

ROOT = Path(__file__).parent
SHORT = (
    "--steps 1 --tasks-per-step 1 --group-size 2 --max-turns 2 --minibatches 1 "
    "--eval-every 0 --eval-tasks 2 --report-tasks 2"
)
SHORT_LESSON = "--rounds 1 --episodes 8"
TRAINING = ("python -m atod_algos.", "atod train ")
NOT_TRAINING = ("evaluate", "report", "study", "sft", "imitation", "--help", "--dry-run")


def shortened(line: str) -> str:
    """A shell line as it is tested."""
    command, _, _comment = line.partition("  #")
    command = re.sub(r"python (benchmarks/\S+)", lambda found: f"python {shlex.quote(str(ROOT / found[1]))}", command)
    if command.startswith(TRAINING) and not any(word in command for word in NOT_TRAINING):
        run = "" if " --run " in command else f" --run runs/{abs(hash(line)):x}"
        return f"{command.rstrip()} {SHORT}{run}"
    if command.startswith("atod train sft ") and not command.endswith("\\"):
        return f"{command.rstrip()} {SHORT_LESSON}"
    return command


def run_shell(example: "Example") -> str | None:
    """Run a block; what goes wrong is the test's failure message."""
    script = "set -euo pipefail\n" + "\n".join(map(shortened, example.parsed.splitlines()))
    for port in set(re.findall(r"127\.0\.0\.1:(\d+)", script)):  # the page's own may be taken on this machine
        with socket.create_server(("127.0.0.1", 0)) as free:
            script = script.replace(port, str(free.getsockname()[1]))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "COLUMNS": "120",
    }
    with TemporaryFile("w+") as said:
        process = subprocess.Popen(
            ["bash", "-c", script], stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status: int | str = process.wait(240)
        except subprocess.TimeoutExpired:
            status = "none after 240 s"
        with contextlib.suppress(ProcessLookupError):  # whatever the block started in the background ends with it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        said.seek(0)
        return None if status == 0 else f"status {status}\n{script}\n{said.read()[-6000:]}"


def enter(namespace: dict) -> None:
    """Every page has a scratch folder of its own, and no data of the machine's user."""
    namespace["_scratch"], namespace["_back"] = TemporaryDirectory(), os.getcwd()
    os.chdir(namespace["_scratch"].name)


def leave(namespace: dict) -> None:
    """Go back, and delete the scratch folder."""
    os.chdir(namespace["_back"])
    namespace["_scratch"].cleanup()


def pytest_collection_modifyitems(items: list) -> None:
    """Code blocks of pages count as slow: many of them train."""
    for item in items:
        if item.path.suffix == ".md":
            item.add_marker("slow")


if Sybil is not None:
    pytest_collect_file = Sybil(
        parsers=[SkipParser(), PythonCodeBlockParser(), CodeBlockParser(language="bash", evaluator=run_shell)],
        patterns=["README.md", "docs/*.md", "docs/**/*.md"],
        setup=enter,
        teardown=leave,
    ).pytest()
