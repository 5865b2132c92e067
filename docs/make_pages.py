"""Write each algorithm's page from its module: ``python docs/make_pages.py``; ``--check`` compares."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from atod_algos.guard import explanations

FOLDER = Path(__file__).parent / "algorithms"


def page(name: str, algorithm: type[Any]) -> str:
    """An algorithm's page: what its module says, and its options."""
    module = sys.modules[algorithm.__module__]
    said = (module.__doc__ or "").strip().splitlines()
    lines = [f"# {algorithm.__name__}", "", said[0], "", f"`atod train {name}` is `python -m {module.__name__}`.", ""]
    lines += ["```text", *said[2:], "```", "", "## Options", "", "| option | default | |", "|---|---|---|"]
    for option, default, text in options(algorithm()):
        lines.append(f"| `--{option.replace('_', '-')}` | `{default}` | {text.replace('|', chr(92) + '|')} |")
    lines += ["", "The settings of a run (models, steps, learning rate, ...) are [TrainConfig](../api/algos.md)'s.", ""]
    return "\n".join(lines)


def options(settings: Any) -> Iterator[tuple[str, Any, str]]:
    """Name, default and explanation of each field, those of nested groups in their place."""
    texts = explanations(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from options(value)
        else:
            yield field.name, value, texts.get(field.name, "")


def main() -> int:
    """Write or check; returns the exit status."""
    wanted = {
        point.name: page(point.name, point.load())
        for point in entry_points(group="atod.algorithms")
        if point.module.startswith("atod_algos.")
    }
    if "--check" in sys.argv:
        stale = [name for name, text in wanted.items() if (FOLDER / f"{name}.md").read_text() != text]
        print(f"out of date: {', '.join(stale)}; run python docs/make_pages.py" if stale else "up to date")
        return 1 if stale else 0
    FOLDER.mkdir(exist_ok=True)
    for name, text in wanted.items():
        (FOLDER / f"{name}.md").write_text(text)
    print(f"wrote {len(wanted)} pages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
