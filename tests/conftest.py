"""Fixtures shared by the whole suite."""

import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Java's first compiler alone: in plays this short, the second one is half of what a Java process costs.
os.environ.setdefault("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1")

# What a user has set for work of their own is not the tests': data folders, servers, a cluster, a launcher's ranks, a
# terminal.
for name in (
    "ALFWORLD_DATA", "WEBSHOP_DATA", "SEARCHQA_DATA", "TEXTCRAFT_DATA", "ATOD_CACHE", "ATOD_TOKEN", "OPENAI_API_KEY", "OPENAI_BASE_URL", "RAY_ADDRESS",
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
    "FORCE_COLOR", "COLUMNS", "LINES",
):  # fmt: skip
    os.environ.pop(name, None)
for name in ("no_proxy", "NO_PROXY"):  # the tests' servers are on this machine
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
# What a script starts in the background ignores Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from paths import REPOSITORY


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Folder of the real games, products and passages; skips where it is absent."""
    root = Path(os.environ.get("ATOD_REALDATA", REPOSITORY.parent / "shared" / "realdata"))
    if not (root / "alfworld").is_dir():
        pytest.skip(f"no real data at {root}; set ATOD_REALDATA to its folder")
    return root
