"""One cell of the study: a method in a world with a seed, trained and evaluated. Resumable at any point.

    STUDY/WORLD/METHOD/seedS/           a training run's folder (see ``atod_algos.training.run_dir``)
    STUDY/WORLD/METHOD/seedS/evaluation-last, evaluation-best    its evaluations on the final panel, episodes included
    STUDY/WORLD/METHOD/seedS/cell.json  the numbers; a cell without it is not finished

The invariant: a cell is computed from its settings alone, whatever was interrupted; two processes may share a study,
each takes cells that the other does not hold.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agents.weights import DONE
from atod_algos.algorithm import find_algorithm
from atod_algos.evaluate.settings import EvaluateConfig, agent_digest, make_env, sampling_of
from atod_algos.evaluate.settings import settings_of as evaluated
from atod_algos.study import Method, World, method_of, place
from atod_algos.study.checks import Tuned, require_whole_cell
from atod_algos.training.cli import with_rules
from atod_algos.training.config import RunConfig, TrainConfig, resolve
from atod_algos.training.presets import builtin_run, fit_algorithm, preset_config, require_teacher
from atod_algos.training.run_dir import (
    RunFolder,
    held,
    read_metrics,
    read_object,
    read_settings,
    replace_text,
    require_settings,
    settings_of,
    versions,
)
from atod_algos.training.worlds import key_of
from atod_envs.errors import AtodError, DataError, UnknownName


def algorithm_of(method: Method, world: World, rules: str) -> Any:
    """The method's algorithm with its options for this world.

    Raises:
        UnknownName: no installed package offers it.
    """
    algorithm = with_rules(find_algorithm(method.algorithm), rules)
    if world.preset:
        algorithm = fit_algorithm(algorithm, world.preset, world.train["env"])
    options = {**world.options.get(method.name, {}), **method.options}
    known = {f.name for f in dataclasses.fields(algorithm)}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise AtodError(f"{method.label} has no option {unknown[0]!r}; expected one of: {', '.join(sorted(known))}")
    return dataclasses.replace(algorithm, **options)


def config_of(world: World, seed: int, tuned: Tuned, run: Path) -> RunConfig:
    """Settings of a run."""
    return resolve(_asked(world, seed, tuned, run))


def _asked(world: World, seed: int, tuned: Tuned, run: Path) -> TrainConfig:
    base = preset_config(world.preset, world.train["env"]) if world.preset else TrainConfig()
    chosen = {"seed": seed, "lr": tuned.lr, "run": str(run)} | ({"minibatches": tuned.updates} if tuned.updates else {})
    return dataclasses.replace(base, **{**world.train, **chosen})


def command_of(method: Method, world: World, rules: str, seed: int, tuned: Tuned, run: Path) -> str:
    """The command line that trains a cell's run by itself: whatever differs from what ``atod train`` would take."""
    env, kind = world.train["env"], find_algorithm(method.algorithm)
    plain, options = TrainConfig(), with_rules(kind, rules)
    asked, algorithm = _asked(world, seed, tuned, run), algorithm_of(method, world, rules)
    words = ["atod", "train", method.algorithm, "--env", env]
    if rules != "paper":
        words += ["--rules", rules]
    if world.preset:
        plain, options = preset_config(world.preset, env), fit_algorithm(options, world.preset, env)
        words += ["--preset", world.preset]
    elif rules == "paper" and _is_builtin(asked.student, asked.teacher, asked.data or "builtin"):
        plain, options = builtin_run(options, env)
    return shlex.join([*words, *_flags(dataclasses.replace(plain, env=env), asked), *_flags(options, algorithm)])


def _is_builtin(*values: str | tuple[str, ...]) -> bool:
    """Whether the command line takes the settings of the built-in run: nothing else is named for any environment."""
    words = [word for value in values for word in ([value] if isinstance(value, str) else value)]
    return all(word.rpartition("=")[2] == "builtin" for word in words)


def _flags(plain: Any, changed: Any) -> Iterator[str]:
    """Options that make one configuration the other."""
    for field in dataclasses.fields(changed):
        value, flag = getattr(changed, field.name), field.name.replace("_", "-")
        if value == getattr(plain, field.name):
            continue
        if dataclasses.is_dataclass(value):
            yield from _flags(getattr(plain, field.name), value)
        elif isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield from (f"--{flag}", *map(str, value if isinstance(value, (tuple, list)) else [value]))


def without(command: str, *options: str) -> str:
    """A command line without some options and their values."""
    kept: list[str] = []
    dropping = False
    for word in shlex.split(command):
        if word.startswith("--"):
            dropping = word.partition("=")[0] in options
        if not dropping:
            kept.append(word)
    return shlex.join(kept)


def train_cell(folder: Path, method: Method, world: World, rules: str, seed: int, tuned: Tuned) -> None:
    """Train one run to its end, from its last checkpoint if there is one."""
    import torch

    from atod_algos.training.console import Progress
    from atod_algos.training.trainer import Trainer

    config = config_of(world, seed, tuned, folder)
    if config.threads or (config.student == "builtin" and not torch.cuda.is_available()):
        torch.set_num_threads(config.threads or 1)
    algorithm = algorithm_of(method, world, rules)
    require_teacher(config, algorithm.scores)
    command = command_of(method, world, rules, seed, tuned, folder)
    run = RunFolder(folder, settings_of(config, algorithm, rules), command)
    trainer = Trainer(config, algorithm, run)
    try:
        done = trainer.resume()
        progress = Progress(config.steps, f"{method.label} on {world.name}, seed {seed}, {tuned}", done + 1)
        # Through a pipe a study says a line a cell; a terminal shows the panel.
        progress.console.quiet = not progress.console.is_terminal
        with progress:
            if done < config.steps:
                trainer.fit(progress)
    finally:
        trainer.close()


def finish_cell(
    study: Path, method: Method, world: World, rules: str, seed: int, tuned: Tuned, split: str
) -> dict[str, Any]:
    """Train and evaluate a cell; return its numbers.

    Args:
        study: the study's folder.
        method: the row.
        world: the column.
        rules: rule set of all algorithms.
        seed: training seed; the final panel is played with the same one, so all methods meet the same episodes.
        tuned: learning rate and updates.
        split: the split to report on.

    Raises:
        Busy: another process is at it.
        AtodError: the cell was trained with other settings, or played with another model.
        DataError: what tells its settings is gone or broken.
    """
    folder = study / world.name / method.name / f"seed{seed}"
    known = read_cell(folder)
    if known is not None:
        require_whole_cell(known)
        before = Tuned(known.get("lr", tuned.lr), known.get("updates", tuned.updates))
        if before != tuned:
            raise AtodError(
                f"{folder} was trained with {before}, but now it is {tuned}; give the same --lrs and --updates, or another --out"
            )
        _require_same_cell(folder, method, world, rules, seed, tuned, split)
        return known
    with held(folder):
        if (known := read_cell(folder)) is not None:  # another process has finished it meanwhile
            return known
        cell: dict[str, Any] = {"world": world.name, "method": method.name, "seed": seed, "versions": versions()}
        if method.algorithm:
            train_cell(folder, method, world, rules, seed, tuned)
            rows = _whole_metrics(folder, config_of(world, seed, tuned, folder).steps)
            validations = {int(row["step"]): row["val/success_rate"] for row in rows if "val/success_rate" in row}
            cell |= {"lr": tuned.lr, **({"updates": tuned.updates} if tuned.updates else {})}
            cell |= {"validation": validations, "seconds_training": sum(r["time/step"] for r in rows)}
            steps = config_of(world, seed, tuned, folder).steps
            checkpoints = {
                "last": folder / "checkpoints" / f"step_{steps:06d}",
                "best": folder / "checkpoints" / "best",
            }
        else:
            checkpoints = {"last": Path(_untrained(method, world, seed, folder))}
        started = time.monotonic()
        for which, checkpoint in checkpoints.items():
            cell[which] = _evaluate(folder / f"evaluation-{which}", str(checkpoint), world, seed, split)
        cell["seconds"] = cell.get("seconds_training", 0.0) + time.monotonic() - started
        replace_text(folder / "cell.json", json.dumps(cell, indent=1) + "\n")
    found = read_cell(folder)
    assert found is not None
    return found


def _untrained(method: Method, world: World, seed: int, folder: Path) -> str:
    """The model of a row that is not trained."""
    role = "student" if method.name == "vanilla" else "teacher"
    config = config_of(world, seed, Tuned(1.0), folder)
    if role == "teacher":
        require_teacher(config, frozenset({"teacher"}))
    name = config.student if role == "student" else config.teacher
    return f"builtin:{role}" if name == "builtin" else str(Path(name))


def _whole_metrics(folder: Path, steps: int) -> list[dict[str, float]]:
    """The metrics of a finished run.

    Raises:
        DataError: steps are missing.
    """
    rows = read_metrics(folder)
    if [row["step"] for row in rows] != list(range(1, steps + 1)) or not all("time/step" in row for row in rows):
        raise DataError(
            f"{folder / 'metrics.jsonl'}: expected the steps 1 to {steps} of a finished run; restore the file, or delete the folder to "
            "train again"
        )
    return rows


def _require_same_cell(
    folder: Path, method: Method, world: World, rules: str, seed: int, tuned: Tuned, split: str
) -> None:
    """Refuse a finished cell of another study: other models, data, options or rules in the same folder."""
    if method.algorithm:
        from atod_algos.training.checkpoint import model_digests, require_same_models

        config, algorithm = config_of(world, seed, tuned, folder), algorithm_of(method, world, rules)
        require_settings(folder, settings_of(config, algorithm, rules), "--out")
        last = folder / "checkpoints" / f"step_{config.steps:06d}"
        if (last / DONE).is_file():
            extra = read_object(last / DONE, "delete the cell's folder to train again")
            require_same_models(last, extra, model_digests(config, algorithm))
        return
    asked = _evaluation(folder / "evaluation-last", _untrained(method, world, seed, folder), world, seed, split)
    its, now = read_settings(folder / "evaluation-last"), evaluated(asked, sampling_of(asked))[0]
    now["model"] = agent_digest(asked.agent, key_of(asked.env))
    for name in now:
        if its.get(name) != json.loads(json.dumps(now[name])):
            raise AtodError(
                f"{folder} was evaluated with {name}={its.get(name)!r:.200}, but now it is {now[name]!r:.200}; give the old value, or "
                "another --out"
            )


def _evaluate(out: Path, agent: str, world: World, seed: int, split: str) -> dict[str, Any]:
    from atod_algos.evaluate.command import run

    result = run(_evaluation(out, agent, world, seed, split), show=False)
    (summary,) = result["panels"].values()
    return dict(summary)


def _evaluation(out: Path, agent: str, world: World, seed: int, split: str) -> EvaluateConfig:
    config = config_of(world, seed, Tuned(1.0), out)
    asked = EvaluateConfig(
        env=config.env,
        agent=agent,
        data=config.data,
        seeds=(seed,),
        out=out,
        style=config.style,
        layout=config.layout,
        max_turns=config.max_turns,
        max_response=config.max_response,
        max_context=config.max_context,
        temperature=config.eval_temperature,
        thinking=config.thinking,
        chat_date=config.chat_date,
        option=config.option,
        device=config.device,
    )
    env: Any = make_env(asked, sampling_of(asked), split).unwrapped
    size = min(world.report_tasks, len(env.tasks))
    return dataclasses.replace(asked, panels=(f"{split}/{size}",))


def read_cell(folder: Path) -> dict[str, Any] | None:
    """The numbers of a finished cell, or None.

    Raises:
        DataError: the file is broken.
    """
    path = folder / "cell.json"
    if not path.exists():
        return None
    advice = "delete it to evaluate the cell again"
    cell = read_object(path, advice, world=str, method=str, seed=int)
    try:
        method_of(cell["method"])
    except UnknownName as error:
        raise DataError(f"{path}: {error}; install the package that offers it, or {advice}") from None
    if [cell["world"], cell["method"], f"seed{cell['seed']}"] != list(folder.parts[-3:]):
        names = f"{cell['world']}/{cell['method']}/seed{cell['seed']}"
        raise DataError(f"{path} is the cell of {names}; was it copied? Delete it")
    cell["folder"] = str(folder)
    return cell


def read_study(study: Path) -> list[dict[str, Any]]:
    """All finished cells, in the order of the table."""
    cells = [cell for path in study.glob("*/*/seed*/cell.json") if (cell := read_cell(path.parent)) is not None]
    return sorted(cells, key=lambda cell: (cell["world"], place(cell["method"]), cell["seed"]))
