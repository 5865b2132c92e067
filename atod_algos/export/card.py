"""The model card: what the model is, how well it plays, and how it was made. Numbers come with their intervals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atod_algos.algorithm import find_algorithm
from atod_algos.export.folder import Exported
from atod_algos.export.source import PanelRow, Source
from atod_algos.training.sft import SftCommand
from atod_envs.errors import AtodError

_PLACES = ("run", "data", "wandb", "log", "device", "threads", "cluster", "workers")
"""Settings of a machine rather than of a model."""
_TAUGHT = {field.name for field in dataclasses.fields(SftCommand)} | {"seed", "lora_alpha"}


def card(source: Source, exported: Exported, rows: Sequence[PanelRow]) -> str:
    """The card's text.

    Args:
        source: the checkpoint.
        exported: what was written.
        rows: the panel numbers that belong to it.
    """
    train = source.train
    unit = "round" if source.algorithm == "sft" else "step"
    kind = f"Adapters for `{_named(exported.base)}`" if exported.base else f"`{exported.architecture}`"
    head = [
        "---",
        "library_name: " + ("peft" if exported.base else "transformers"),
        "pipeline_tag: text-generation",
        "tags: [atod, agent]",
        "---",
    ]
    lines = [
        *head,
        "",
        f"# {source.algorithm} on {', '.join(world['env'] for world in source.worlds)}",
        "",
        f"{kind}, {exported.parameters:,} weights in {exported.dtype}. Trained from `{_named(train['student'])}` with {source.algorithm} for "
        f"{source.step} {unit}{'s' if source.step != 1 else ''}"
        + _teacher(source)
        + f". Tasks: data `{source.data_version}`.",
        "",
        f"The exported files gave the trained model's log-probs to {exported.difference:.2g} nats in float32 on {exported.positions} places "
        + ("of episodes that the run played." if exported.own_rows else "of a random row."),
        "",
        "## Panels",
        "",
        *_panels(rows),
        "## How it is prompted",
        "",
        *_prompts(source),
        f"Thoughts `{train.get('thinking')}`, layout `{train.get('layout')}`. The chat template is part of the tokenizer.",
        "",
        "## Settings",
        "",
        "```json",
        json.dumps(
            {"train": _settings(source), "algorithm": source.settings["algorithm"], "versions": source.versions},
            indent=1,
        ),
        "```",
        "",
    ]
    return "\n".join(lines)


def _prompts(source: Source) -> list[str]:
    """A line for each environment."""
    return [
        f"{world['env']}: prompt style `{world.get('style')}`; responses up to {world.get('max_response')} tokens, prompt and response "
        f"up to {world.get('max_context')}.  "
        for world in source.worlds
    ]


def _teacher(source: Source) -> str:
    if source.algorithm == "sft" or not _asks_a_teacher(source.settings["algorithm"]):
        return ""
    own = [name for w in source.worlds for name in (w.get("teacher"), *(n for _, n in w.get("label_teachers", ())))]
    names = [f"`{_named(name)}`" for name in dict.fromkeys(own)]
    return f"; teacher{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _asks_a_teacher(stored: Mapping[str, Any]) -> bool:
    """Whether the algorithm with these options does; one whose package is not installed is taken to."""
    try:
        kind = find_algorithm(str(stored.get("name")))
    except AtodError:
        return True
    known = {field.name for field in dataclasses.fields(kind)}
    algorithm = kind(**{name: value for name, value in stored.items() if name in known})
    return "teacher" in algorithm.scores


def _panels(rows: Sequence[PanelRow]) -> list[str]:
    if not rows:
        return ["None was played with these weights: `atod eval --agent FOLDER`, then `atod export --evaluation`.", ""]
    lines: list[str] = []
    for panel in dict.fromkeys(row.panel for row in rows):
        here = [row for row in rows if row.panel == panel]
        lines += [
            f"{panel}:",
            "",
            "| policy | success | 95 % interval | episodes | turns |",
            "|---|---:|---:|---:|---:|",
        ]
        for row in here:
            s = row.summary
            lines.append(
                f"| {row.policy} | {s['success']:.1%} | {100 * s['low']:.1f} - {100 * s['high']:.1f} | {s['n']} | {s['length']:.1f} |"
            )
        lines.append("")
    return lines


def _settings(source: Source) -> dict[str, Any]:
    """The run's settings; of demonstrations those that they have."""
    kept = {name: value for name, value in source.train.items() if name not in _PLACES}
    if source.algorithm == "sft":
        kept = {name: value for name, value in kept.items() if name in _TAUGHT}
    kept |= {name: _named(kept[name]) for name in ("student", "teacher") if name in kept}
    worlds = [{name: value for name, value in world.items() if name not in _PLACES} for world in source.worlds]
    for world in worlds:
        world["teacher"] = _named(world.get("teacher"))
        world["label_teachers"] = [(label, _named(name)) for label, name in world.get("label_teachers", ())]
    return kept | ({"worlds": worlds} if len(worlds) > 1 else {})


def _named(model: Any) -> str:
    """A model's name; of a folder on this machine its own name alone."""
    name = str(model)
    return Path(name).name if Path(name).is_absolute() or name.startswith((".", "~")) else name
