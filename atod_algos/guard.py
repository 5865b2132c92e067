"""What every command answers to errors: one line for what a user can fix; a traceback means a bug."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from atod_envs.errors import AtodError


def guarded(command: Callable[[], object]) -> None:
    """Run a command; answer what a user can fix in one line and exit with 1."""
    try:
        command()
    except AtodError as error:
        fail(str(error))
    except MemoryError:
        fail("out of memory; lower --token-budget, --slots or --tasks-per-step")
    except RuntimeError as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            fail("out of memory; lower --token-budget, --slots or --tasks-per-step, then run the same command to go on")
        raise
    except ImportError as error:
        fail(str(error))


def fail(message: str, code: int = 1) -> NoReturn:
    """Say an error on standard error, and exit."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
