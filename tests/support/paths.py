"""Where the repository and this folder are, for tests that start processes of their own."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
REPOSITORY = SUPPORT.parents[1]
