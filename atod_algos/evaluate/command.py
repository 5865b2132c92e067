"""The command of ``atod_algos.evaluate``: who plays, on which panels, with which sampling, and what is stored.

    OUT/config.json                   all that defines the numbers: agent, sampling, panels with a digest of their tasks
    OUT/episodes/SPLIT-N-seedS.jsonl.gz    the episodes
    OUT/result.json                   the numbers
    OUT/usage.json                    tokens that a server has counted, over all starts of the command

The invariant: a folder holds one evaluation. The same command goes on where it stopped; another one is refused.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from atod_algos.evaluate import Evaluation
from atod_algos.evaluate.journal import EpisodeJournal
from atod_algos.evaluate.paired_command import show_comparison
from atod_algos.evaluate.settings import (
    EvaluateConfig,
    Panel,
    Sampling,
    agent_digest,
    episodes_path,
    sampling_of,
    settings_of,
)
from atod_algos.evaluate.worker import EvaluationWorker
from atod_algos.guard import guarded, parse
from atod_algos.training.console import result_table
from atod_algos.training.run_dir import held, read_object, read_settings, replace_text, versions
from atod_envs.errors import AtodError, DataError
from atod_envs.trajectory import read_jsonl, write_jsonl

_USAGE = "usage.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    config = parse(EvaluateConfig, arguments, "atod_algos.evaluate", __doc__)
    logging.basicConfig(level=logging.INFO if config.verbose else logging.WARNING, format="%(levelname)s %(message)s")
    if config.compare:
        guarded(lambda: _compare(config))
    else:
        guarded(lambda: run(config), lambda: _kept(_folder(config)))


def _compare(config: EvaluateConfig) -> None:
    usual = EvaluateConfig()
    given = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(usual, f.name)]
    if others := sorted({*given} - {"compare", "verbose"}):
        raise AtodError(f"--compare takes two finished evaluations alone; leave --{others[0].replace('_', '-')} out")
    assert config.compare is not None
    show_comparison(*config.compare)


def _folder(config: EvaluateConfig) -> Path:
    return config.out or Path("evaluations") / f"{_file_name(config.agent)}-{config.env.split('/')[-1]}"


def _kept(out: Path) -> str:
    done = len([*(out / "episodes").glob("*-seed*[0-9].jsonl.gz")])
    begun = sum(path.read_bytes().count(b"\n") for path in (out / "episodes").glob("*.journal.jsonl"))
    others = f", episodes of others {begun}" if begun else ""
    return f"kept in {out}: finished panels {done}{others}; run the same command again to go on"


def run(config: EvaluateConfig, *, show: bool = True) -> dict[str, Any]:
    """Evaluate as asked, and store everything.

    Args:
        config: what was asked for.
        show: show progress and the table.

    Returns:
        What ``result.json`` holds.

    Raises:
        AtodError: names, data, the model or the server are not right; the message says what to do.
    """
    if not config.seeds or len(set(config.seeds)) != len(config.seeds):
        raise AtodError(f"--seeds {config.seeds}: expected one or more different seeds")
    if config.concurrency < 1:
        raise AtodError(f"--concurrency {config.concurrency}: expected 1 or more episodes at the same time")
    sampling = sampling_of(config)
    _require_ranges(config, sampling)
    settings, panels = settings_of(config, sampling)
    out = _folder(config)
    most = max(len(panel.tasks) for panel in panels)
    with held(out, "--out"), closing(EvaluationWorker(config, sampling, panels[0].env_key, most)) as worker:
        _open(out, settings | {"model": agent_digest(config.agent, panels[0].env_key)})
        return _played(config, sampling, panels, worker, out, show)


def _require_ranges(config: EvaluateConfig, sampling: Sampling) -> None:
    """Refuse what nothing can be played with, before anything is stored.

    Raises:
        AtodError: names the option.
    """
    for name in ("max_response", "max_context", "max_turns"):
        value = getattr(sampling, name)
        if value is not None and value < 1:
            raise AtodError(f"--{name.replace('_', '-')} {value}: expected a whole number from 1")
    if sampling.temperature is not None and not 0 <= sampling.temperature < math.inf:
        raise AtodError(
            f"--temperature {sampling.temperature}: expected a number from 0; 0 takes the most probable token"
        )
    if not 0 < config.api_timeout < math.inf:
        raise AtodError(f"--api-timeout {config.api_timeout}: expected seconds above 0")
    if config.api_retries < 0:
        raise AtodError(f"--api-retries {config.api_retries}: expected a whole number from 0")
    if config.out is not None and config.out == Path():
        raise AtodError("--out is empty or the current folder; give a folder of its own")


def _played(
    config: EvaluateConfig, sampling: Sampling, panels: Sequence[Panel], worker: EvaluationWorker, out: Path, show: bool
) -> dict[str, Any]:
    """Play what is not stored yet, store it, and show the table."""
    rows: dict[str, Any] = {}
    before = _usage(out)

    def used() -> dict[str, int]:
        return {name: before.get(name, 0) + count for name, count in worker.usage.items()}

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as bar:
        for panel in panels:
            seeds: dict[int, Evaluation] = {}
            for seed in config.seeds:
                done = bar.add_task(f"{panel.name}, seed {seed}", total=len(panel.tasks))
                path = episodes_path(out, panel.name, seed)
                if not path.exists():
                    try:
                        played = worker.play(panel, seed, _journal(path), _counter(bar, done))
                    finally:  # what was asked before an error was asked, too
                        if worker.usage:
                            replace_text(out / _USAGE, json.dumps(used()) + "\n")
                    part = path.with_name(path.name + ".part.gz")
                    write_jsonl(part, played)
                    part.replace(path)
                    EpisodeJournal(_journal(path)).drop()
                try:
                    seeds[seed] = Evaluation(tuple(read_jsonl(path)))
                except DataError as error:
                    raise DataError(f"{error}; or delete it to play them again") from None
                if sorted(t.task_id for t in seeds[seed].trajectories) != sorted(panel.tasks):
                    raise DataError(
                        f"{path}: expected one episode of each of the panel's {len(panel.tasks)} tasks, found "
                        f"{len(seeds[seed].trajectories)} of these or others; delete it to play them again"
                    )
                bar.update(done, completed=len(panel.tasks))
            whole = Evaluation(tuple(t for part in seeds.values() for t in part.trajectories))
            rows[panel.name] = whole.summary() | {"by_seed": {str(s): e.success for s, e in seeds.items()}}
    result = {"panels": rows} | ({"usage": used()} if worker.usage else {})
    replace_text(out / "result.json", json.dumps(result, indent=1) + "\n")
    title = f"{config.agent} on {config.env}, seeds {', '.join(map(str, config.seeds))}; " + ", ".join(
        f"{name} {value}" for name, value in dataclasses.asdict(sampling).items() if value not in (None, ())
    )
    if show:
        console = Console()
        console.print(result_table(list(rows.items()), title))
        console.print(f"stored in {out}", highlight=False)
    return result


def _usage(out: Path) -> dict[str, int]:
    """Tokens that a server counted for this folder before, by kind."""
    if not (out / _USAGE).exists():
        return {}
    found = read_object(out / _USAGE, "delete it to count from 0")
    if not all(type(count) is int and count >= 0 for count in found.values()):
        raise DataError(f"{out / _USAGE}: expected whole numbers; delete it to count from 0")
    return found


def _counter(bar: Progress, task: TaskID) -> Callable[[int], None]:
    return lambda count: bar.update(task, completed=count)


def _open(out: Path, settings: Mapping[str, Any]) -> None:
    path = out / "config.json"
    known = read_settings(out) if path.exists() else None
    if known is not None and "panels" not in known:
        raise AtodError(f"{out} holds a training run; choose another folder with --out")
    try:
        (out / "episodes").mkdir(parents=True, exist_ok=True)
        if known is not None:
            if known.get("model") is None:  # earlier versions looked at the weights alone, or at no model of a hub
                known["model"] = settings["model"]
            known.setdefault("api_base", settings["api_base"])  # nor did they at the server's address
            changed = next((name for name in settings if known.get(name) != settings[name]), None)
            if changed:
                raise AtodError(
                    f"{out} holds an evaluation with {changed}={known.get(changed)!r}, but now it is {settings[changed]!r}; "
                    "choose another folder with --out, or delete this one"
                )
        else:
            replace_text(path, json.dumps({"settings": settings, "versions": versions()}, indent=1) + "\n")
    except OSError as error:
        raise AtodError(f"{out} cannot be written: {error.strerror}; choose another folder with --out") from error


def _journal(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".jsonl.gz") + ".journal.jsonl")


def _file_name(agent: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in agent).strip("-.") or "agent"
