"""Write a run's model as a folder that transformers and other programs read, checked against what was trained.

atod export RUN --to FOLDER [--checkpoint best] [--merge] [--card] [--evaluation EVALUATION ...]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from atod_envs.errors import AtodError
from atod_envs.options import program


@dataclass(frozen=True)
class ExportCommand:
    """What ``atod export`` is asked for."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run, OUT of atod train sft, or a checkpoint's own folder."""
    to: Path
    """Folder to write; must not exist, or be empty."""
    checkpoint: str = "last"
    """Which checkpoint: last, best, or a folder's name in RUN/checkpoints."""
    merge: bool = False
    """Add adapters into the model. Without it a checkpoint of adapters is written as adapters."""
    card: bool = False
    """Write README.md: panel numbers with intervals, settings, data version."""
    evaluation: tuple[Path, ...] = ()
    """Finished evaluations (atod eval --out) of these weights, for the card."""


def export(command: ExportCommand, say: Callable[[str], None]) -> None:
    """Export as asked.

    Args:
        command: what was asked for.
        say: gets what a user is told.

    Raises:
        AtodError: no run, no checkpoint, a target in use or that cannot be written, or a result that is not the trained
            model.
    """
    from atod_algos.export.card import card
    from atod_algos.export.folder import TOLERANCE, refuse_target, write_folder
    from atod_algos.export.source import open_source, panel_rows

    to = command.to.expanduser()
    refuse_target(to)
    if command.evaluation and not command.card:
        raise AtodError("--evaluation is for the card; add --card, or leave it out")
    source = open_source(command.run, command.checkpoint)
    rows = panel_rows(source, command.evaluation) if command.card else []
    done = write_folder(
        source, to, merge=command.merge, card=(lambda found: card(source, found, rows)) if command.card else None
    )
    kind = (
        f"adapters for {done.base}"
        if done.base
        else f"{done.architecture}, {done.parameters:,} weights in {done.dtype}"
    )
    say(f"{to}: {kind}; {source.algorithm}, step {source.step} of {source.run}")
    rows_of = "episodes of the run" if done.own_rows else "a random row"
    say(
        f"log-probs of the trained model to {done.difference:.2g} nats on {done.positions} places of {rows_of} "
        f"(float32; up to {TOLERANCE:g} is accepted)"
    )
    say(_readers(done.architecture, done.base))


def _readers(architecture: str, base: str | None) -> str:
    if base is not None:
        return "transformers and vLLM read it with its base model (PEFT); with --merge the model stands alone"
    return (
        f"transformers reads it (checked just now); vLLM and llama.cpp's converter do where they know {architecture}, the converter only "
        "with a published tokenizer (docs/training.md)"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from atod_algos.guard import guarded

    command = tyro.cli(ExportCommand, args=arguments, prog=program("atod_algos.export"), description=__doc__)
    guarded(lambda: export(command, lambda line: print(line, flush=True)))
