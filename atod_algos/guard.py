"""What every command does alike: its help, and what it answers to errors and signals.

An error that a user can fix is one line; a traceback means a bug.
"""

from __future__ import annotations

import ast
import atexit
import dataclasses
import gc
import inspect
import io
import os
import sys
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, NoReturn, cast, get_type_hints

import tyro

from atod_envs.errors import AtodError, file_trouble
from atod_envs.options import program
from atod_envs.stopping import stoppable

_MEMORY = "out of memory; lower --token-budget, --slots or --tasks-per-step"


def parse(kind: Callable[..., Any], arguments: Sequence[str] | None, module: str, description: str | None) -> Any:
    """Read a command line into a dataclass, or a function's arguments; the help is the text under each field.

    Args:
        kind: the dataclass; nested ones are groups of options, without a prefix.
        arguments: by default those of the process.
        module: name of the command's module, for the usage line.
        description: shown above the options.
    """
    if {"-h", "--help"} & set(sys.argv[1:] if arguments is None else arguments):
        _put_help(kind)
    omit = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(kind, args=arguments, prog=program(module), description=_paragraphs(description), config=omit)


def _paragraphs(text: str | None) -> str:
    """A docstring with its prose in one line a paragraph: tyro would join prose to the formula above it."""
    lines: list[str] = []
    prose = False
    for line in (text or "").strip().splitlines():
        before, prose = prose, bool(line) and not line[0].isspace()
        if prose and before:
            lines[-1] += f" {line}"
        else:
            lines += ["", line] if prose and lines and lines[-1] else [line]
    return "\n".join(lines)


def _put_help(kind: Any) -> None:
    """Give tyro each field's text in one line; on its own it keeps the line breaks of the source."""
    for part in get_type_hints(kind).values():
        if dataclasses.is_dataclass(part):
            _put_help(part)
    if dataclasses.is_dataclass(kind):
        texts = explanations(kind)
        for field in dataclasses.fields(kind):
            field.metadata = MappingProxyType({"help": texts.get(field.name)})


def explanations(kind: Any) -> dict[str, str]:
    """The text under each field of a dataclass, in one line."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        body = ast.parse(inspect.cleandoc(inspect.getsource(cast("type", owner)))).body[0]
        assert isinstance(body, ast.ClassDef)
        for here, below in zip(body.body, body.body[1:], strict=False):
            match here, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def guarded(command: Callable[[], object], kept: str | Callable[[], str] = "") -> None:
    """Run a command; answer what a user can fix in one line and exit with 1.

    Ctrl-C and SIGTERM end it in one line, too; a reader that has closed our output ends it without a word.

    Args:
        command: does the work.
        kept: said when a signal ends it; see :func:`atod_envs.stopping.stoppable`.
    """
    for stream in (sys.stdout, sys.stderr):  # what a terminal or a locale has no character for is no reason to end
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    atexit.register(gc.freeze)  # or two seconds of every end go to a search for cycles in all that PyTorch has imported
    try:
        with stoppable(kept):
            command()
    except AtodError as error:
        fail(str(error))
    except MemoryError:
        fail(_MEMORY)
    except RuntimeError as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            fail(f"{_MEMORY}, then run the same command to go on")
        if str(error).startswith("Symlink loop"):  # Path.resolve, before Python 3.13
            fail(f"{error}; give another path, or change this one")
        raise
    except ImportError as error:
        fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(1) from None
    except OSError as error:
        if (trouble := file_trouble(error)) is None:
            raise
        fail(trouble)


def fail(message: str, code: int = 1) -> NoReturn:
    """Say an error on standard error, and exit."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
