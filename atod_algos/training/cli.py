"""The command line of every algorithm: ``python -m atod_algos.<name> [options]``.

Options are the fields of ``TrainConfig``, in groups, and of the algorithm's own dataclass; their help is the text under
each field. Errors that a user can fix are answered in one line; a traceback means a bug. Only training itself loads
torch.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from atod_algos.guard import fail, guarded, parse
from atod_algos.training.config import BUILTIN_WORLDS, GROUPS, RunConfig, TrainConfig, resolve
from atod_algos.training.options import RunOptions
from atod_algos.training.presets import (
    builtin_run,
    fit_algorithm,
    override,
    preset_config,
    refuse_settings,
    require_teacher,
)
from atod_algos.training.worlds import ALL, key_of, read_worlds
from atod_envs.errors import AtodError, UnknownName
from atod_envs.stopping import Terminated, exit_code

if TYPE_CHECKING:
    from atod_algos.algorithm import Algorithm
    from atod_algos.training.console import Progress
    from atod_algos.training.run_dir import RunFolder

log = logging.getLogger(__name__)

GONE: Mapping[str, str] = MappingProxyType(
    {
        "--keep-trajectories": "use --store trajectories/N, or --store nothing",
        "--keep-tokens": "use --store tokens",
        "--worker-cpus": "use --cluster ray:cpus=N",
        "--worker-gpus": "use --cluster ray:gpus=N",
        "--importance-cap": "importance weights are cut at 2",
    }
)
"""Options of earlier versions, and what to do instead."""


_BUILTIN = ("student", "teacher", "data")
"""Options that all say 'builtin', or nothing, in the built-in run."""


@dataclass(frozen=True)
class _RunOptions(RunOptions):
    rules: str = "paper"
    """Presets where sources differ: 'paper' follows the equations, 'released' the authors' code; some algorithms know
    more."""
    preset: str | None = None
    """Published settings of a model size: paper-0.6b, paper-1.7b or paper-4b (docs/presets.md). Other options given win
    over it."""
    dry_run: bool = False
    """Print the effective settings, the memory that they need and the tokens of a step, and stop; needs no GPU and no
    weights."""
    verbose: bool = False
    """Log more."""


def with_rules(algorithm: type[Any], rules: str) -> Any:
    """An algorithm with the presets of one rule set.

    Args:
        algorithm: its class.
        rules: one of the algorithm's ``rules``.
    """
    return override(algorithm(), algorithm.rules[rules])


def main(algorithm: type[Algorithm], arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, train, and print the final table. Exits with 2 on wrong usage, 1 on other errors."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--"]:  # torchrun would take --run for one of its own options; behind -- it leaves them alone
        given = given[1:]
    guarded(lambda: _run(algorithm, given), _kept(given))


def main_by_name(name: str, arguments: Sequence[str]) -> None:
    """:func:`main` of an algorithm that some installed package offers under its name."""
    from atod_algos.algorithm import find_algorithm

    guarded(lambda: _run(find_algorithm(name), list(arguments)), _kept(arguments))


def _kept(arguments: Sequence[str]) -> str:
    return "" if "--dry-run" in arguments else "run the same command again to go on from the last checkpoint"


def _run(algorithm: type[Algorithm], arguments: list[str]) -> None:
    # Rules, preset and models must be known before the other defaults are: these depend on them.
    asked = _ahead(arguments, "--rules")
    rules = "paper" if asked is None else asked
    if rules not in algorithm.rules:
        raise UnknownName("rule set", rules, algorithm.rules)
    config_default, options_default = TrainConfig(), with_rules(algorithm, rules)
    preset = _ahead(arguments, "--preset")
    envs = [word.partition("=")[0] for word in _words(arguments, "--env")]
    env = "all" if sorted(envs) == sorted(ALL) else " ".join(envs) or str(config_default.env)
    if preset is not None:
        config_default = preset_config(preset, env)
        options_default = fit_algorithm(options_default, preset, env)
    elif rules == "paper" and _is_builtin(arguments, read_worlds(tuple(env.split()))):
        config_default, options_default = builtin_run(options_default, env)

    _refuse_gone(arguments)
    run, config, options = _parse(algorithm, arguments, config_default, options_default)
    _refuse_idle(options, options_default)
    logging.basicConfig(level=logging.INFO if run.verbose else logging.WARNING, format="%(levelname)s %(message)s")
    command = shlex.join(["atod", "train", algorithm.name, *arguments])
    train(resolve(config), options, run.rules, dry_run=run.dry_run, command=command)


def _is_builtin(arguments: Sequence[str], envs: Iterable[str]) -> bool:
    """Whether the built-in models learn on built-in data: nothing else is named, here or by a variable."""
    named = {name: _words(arguments, f"--{name}") for name in _BUILTIN}
    if {word.rpartition("=")[2] for words in named.values() for word in words} - {"builtin"}:
        return False
    said = {word.partition("=")[0] for word in named["data"]}
    return "builtin" in said or not any(_found(env) for env in envs if key_of(env) not in said)


def _found(env: str) -> bool:
    """Whether an environment with models of its own finds data without being told where, such as ``$ALFWORLD_DATA``."""
    from atod_envs.datasets.command import data_folder

    return env in BUILTIN_WORLDS and data_folder(key_of(env)) is not None


def _refuse_gone(arguments: Sequence[str]) -> None:
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if name in GONE:
            raise AtodError(f"{name} is no option any more: {GONE[name]}")


def _refuse_idle(asked: Algorithm, plain: Algorithm) -> None:
    """Refuse an option of the algorithm that was changed, but does not act under the others."""
    for name, (other, values) in asked.acts_with.items():
        value, chosen = getattr(asked, name), getattr(asked, other)
        if value != getattr(plain, name) and chosen not in values:
            said, other = name.replace("_", "-"), other.replace("_", "-")
            raise AtodError(
                f"--{said} {value}: it acts with --{other} {' or '.join(values)} alone, and here --{other} is {chosen}; leave it out"
            )


def _parse(
    algorithm: type[Algorithm], arguments: Sequence[str], config: TrainConfig, options: Any
) -> tuple[_RunOptions, TrainConfig, Algorithm]:
    """Parse the command line; the help shows one box a group, the algorithm's under its own name."""
    groups: dict[str, type] = {**GROUPS, "run": _RunOptions}
    own = algorithm.name if algorithm.name.isidentifier() and algorithm.name not in groups else "method"
    defaults = {name: _part(kind, config) for name, kind in groups.items()} | {own: options}
    kinds = {**groups, own: algorithm}

    def entry(**parts: Any) -> dict[str, Any]:
        return parts

    entry.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=kind)
            for name, kind in kinds.items()
        ]
    )
    entry.__annotations__ = dict(kinds)
    parsed = parse(entry, arguments, f"atod_algos.{algorithm.name}", sys.modules[algorithm.__module__].__doc__)
    values = {
        field.name: getattr(parsed[name], field.name) for name in GROUPS for field in dataclasses.fields(GROUPS[name])
    }
    return parsed["run"], TrainConfig(**values), cast("Algorithm", parsed[own])


def _part(kind: type[Any], config: TrainConfig) -> Any:
    """A group of options with a configuration's values."""
    values = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(kind) if hasattr(config, field.name)
    }
    return kind(**values)


def _words(arguments: Sequence[str], option: str) -> list[str]:
    """The words that the command line gives for an option, before it is parsed."""
    words: list[str] = []
    for place, argument in enumerate(arguments):
        if argument == option:
            words = list(takewhile(lambda word: not word.startswith("-"), arguments[place + 1 :]))
        elif argument.startswith(f"{option}="):
            words = [argument.partition("=")[2]]
    return words


def _ahead(arguments: Sequence[str], option: str) -> str | None:
    """The first word that the command line gives for an option, before it is parsed."""
    return next(iter(_words(arguments, option)), None)


def train(
    config: RunConfig, algorithm: Algorithm, rules: str, *, dry_run: bool = False, command: str = ""
) -> dict[str, Any] | None:
    """Train with resolved settings; return the final table (None for a dry run).

    The run folder's unfinished run is resumed; a finished one is shown again.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if config.threads or config.student == "builtin":
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from atod_algos.learner import distributed
    from atod_algos.training.console import Progress, result_tables
    from atod_algos.training.run_dir import Onlooker, RunFolder, held, settings_of

    if config.threads or (config.student == "builtin" and not torch.cuda.is_available()):
        torch.set_num_threads(config.threads or 1)
    settings = settings_of(config, algorithm, rules)
    refuse_settings(config, algorithm)
    if not dry_run:
        distributed.start(config.device)
    quiet = distributed.rank() > 0
    progress = Progress(config.steps, f"{algorithm.name} on {config.title}", quiet=quiet)
    progress.console.print(f"rules: {rules}   " + _effective(settings["algorithm"]), highlight=False, soft_wrap=True)
    if departures := _departures(config, algorithm, rules):
        progress.console.print(f"not as the rules have it: {departures}", highlight=False, soft_wrap=True)
    if dry_run:
        from atod_algos.training.memory_estimate import report

        progress.console.print_json(json.dumps(settings))
        progress.console.print("\n" + report(config, algorithm), highlight=False, soft_wrap=True)
        return None
    require_teacher(config, algorithm.scores)
    envs = "+".join(world.env.split("/")[-1] for world in config.worlds)
    folder = Path(config.run or f"runs/{algorithm.name}-{envs}-seed{config.seed}")
    with nullcontext() if quiet else held(folder):
        run = Onlooker(folder) if quiet else RunFolder(folder, settings, command)
        result = _finish(config, algorithm, run, progress)
    if quiet:
        distributed.barrier()  # see its docstring
        return result
    for table in result_tables(result["table"], result["panel"]):
        progress.console.print(table)
    with distributed.alone():  # the other ranks have nothing more to do
        page = _report(folder, config)
    progress.console.print(f"run folder: {folder}", highlight=False)
    progress.console.print(f"every turn and why it was weighted: {page}", highlight=False, soft_wrap=True)
    distributed.barrier()
    return result


def _finish(config: RunConfig, algorithm: Algorithm, run: RunFolder, progress: Progress) -> dict[str, Any]:
    """Train to the end of the run, from its last checkpoint if there is one; return the final table."""
    from atod_algos.learner import distributed
    from atod_algos.training.console import Progress
    from atod_algos.training.trainer import Trainer

    quiet = distributed.rank() > 0
    result: dict[str, Any] | None = distributed.from_first(run.result() if not quiet else None)
    if result is not None and result["step"] >= config.steps:
        return result
    trainer = None
    try:
        trainer = Trainer(config, algorithm, run)
        done = trainer.resume()
        if done:
            progress.console.print(f"resuming {run.path} after step {done}", highlight=False)
        title = f"{algorithm.name} on {config.title}, run folder {run.path}"
        with Progress(config.steps, title, done + 1, quiet=quiet) as shown:
            trainer.fit(shown)
            table = trainer.report(shown)
        result = {"step": trainer.step, "best": trainer.best, "panel": _panel_name(trainer), "table": table}
        run.finish(result)
    except KeyboardInterrupt as stop:
        step = trainer.step if trainer is not None else 0
        how = "ended by SIGTERM" if isinstance(stop, Terminated) else "interrupted"
        fail(
            f"{how} after step {step}; run the same command again to go on from {_last(run.path)}",
            exit_code(stop),
        )
    finally:
        if trainer is not None:
            trainer.close()
    return result


def _last(run: Path) -> str:
    from atod_algos.training.checkpoint import latest_checkpoint, step_of

    path = latest_checkpoint(run / "checkpoints")
    return f"the checkpoint of step {step_of(path)} in {run}" if path is not None else f"the start, in {run}"


def _report(folder: Path, config: RunConfig) -> Path:
    """Write the run's page; it scores single tokens where that costs seconds, and else takes what is stored."""
    from atod_algos.report.command import report

    return report([folder], compute=config.student == "builtin", figures=False)


def _panel_name(trainer: Any) -> str:
    config = trainer.config
    splits = ", ".join(
        f"{world.env}, {facts.splits[2]}" for world, facts in zip(config.worlds, trainer.facts, strict=True)
    )
    return f"{splits}, fixed panel of up to {config.report_tasks} tasks, temperature {config.eval_temperature}"


def _departures(config: RunConfig, algorithm: Algorithm, rules: str) -> str:
    """Settings under which the run learns from another objective than its rule set's."""
    own, plain = (_flat(dataclasses.asdict(cast("Any", a))) for a in (algorithm, with_rules(type(algorithm), rules)))
    changed: dict[str, Any] = {name: value for name, value in own.items() if value != plain[name]}
    if config.gap == "exact" and algorithm.takes_exact_gap:
        changed["gap"] = "exact"
    clips = [world.gap_clip for world in config.worlds if world.gap_clip]
    if clips and "teacher" in algorithm.scores:
        changed["gap_clip"] = clips[0]
    if config.staleness:
        changed["staleness"] = config.staleness
    return "  ".join(f"{name}={value}" for name, value in changed.items())


def _effective(options: Mapping[str, Any]) -> str:
    return "  ".join(f"{name}={value}" for name, value in _flat(options).items() if name != "name")


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat.update(value if isinstance(value, Mapping) else {name: value})
    return flat
