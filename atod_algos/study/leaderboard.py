"""``atod leaderboard add RUN``: a row of docs/leaderboard.md, from a run that is evaluated anew on the fixed panel.

The invariant: rows of a world are comparable. Each has played the same tasks of the built-in data, under the same turn
limit and temperature, with the weights of the run's last step; a run that was made otherwise, or whose source is not
known to be that of a commit, is refused. Runs of one command that differ in their seed alone are one row.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import tyro

from atod_algos.evaluate.command import run as evaluate
from atod_algos.evaluate.settings import (
    EvaluateConfig,
    Panel,
    Sampling,
    held_out_splits,
    read_panels,
    sampling_of,
    settings_of,
)
from atod_algos.evaluate.statistics import t_interval, wilson
from atod_algos.guard import guarded, parse
from atod_algos.study import METHODS, PRESETS
from atod_algos.study.cells import without
from atod_algos.study.checks import is_number
from atod_algos.training.checkpoint import latest_checkpoint, require_whole, step_of
from atod_algos.training.config import builtin_profile
from atod_algos.training.run_dir import FREE_SETTINGS, read_metrics, read_object, read_settings, replace_text
from atod_envs import make
from atod_envs.caches import one_at_a_time
from atod_envs.errors import AtodError, DataError
from atod_envs.files import read_text
from atod_envs.text_env import TextEnv

FIXED = {str(world.train["env"]): world.report_tasks for world in PRESETS["laptop"].worlds}
"""Environment -> tasks of its panel, of the split for reporting."""

_BEGIN, _END = "<!-- rows: made by atod leaderboard add -->", "<!-- rows: end -->"
_ADVICE = "restore the file from the repository"


@dataclass(frozen=True)
class AddConfig:
    """Evaluate a finished run on the fixed panel of its environment, and put it on the leaderboard."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    page: Path = Path("docs/leaderboard.md")
    """The page; its numbers are kept next to it, in a file of the same name that ends in .json."""
    verbose: bool = False
    """Log more."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    config = parse(AddConfig, arguments, "atod_algos.study.leaderboard", AddConfig.__doc__)
    logging.basicConfig(level=logging.INFO if config.verbose else logging.WARNING, format="%(levelname)s %(message)s")
    guarded(lambda: print(add(config.run, config.page)))


def add(run: Path, page: Path) -> str:
    """Evaluate a run, and write it into the page.

    Args:
        run: the run's folder.
        page: the page.

    Returns:
        One line that says what was measured.

    Raises:
        AtodError: the run or the page does not fit; says what was expected.
    """
    _parts_of(page)
    store = page.with_suffix(".json")
    read_rows(store)
    entry = measured(run)
    with one_at_a_time(page.parent):  # what another process adds meanwhile stays
        rows = merged(read_rows(store), entry)
        before, after = _parts_of(page)
        replace_text(store, json.dumps({"rows": rows}, indent=1) + "\n")
        replace_text(page, f"{before}{_BEGIN}\n\n{tables(rows)}\n{_END}{after}")
    one = entry["runs"][0]
    return (
        f"{entry['method']} in {entry['env']}, seed {one['seed']}: {one['solved']} of {one['n']} solved; {page} has it"
    )


def _parts_of(page: Path) -> tuple[str, str]:
    """The text before and after the rows."""
    text = read_text(page, _ADVICE) if page.is_file() else ""
    before, begun, rest = text.partition(_BEGIN)
    _, ended, after = rest.partition(_END)
    if not begun or not ended:
        raise AtodError(
            f"--page {page}: expected a page with the line {_BEGIN!r}, and {_END!r} after it; run this in a clone of the repository"
        )
    return before, after


def read_rows(store: Path) -> list[dict[str, Any]]:
    """The rows that are kept next to the page; none where there is no file.

    Raises:
        DataError: a row is none; names its place and what was expected.
    """
    rows = read_object(store, _ADVICE, rows=list)["rows"] if store.exists() else []
    for place, row in enumerate(rows, 1):
        texts = ("env", "panel", "digest", "data", "method", "command")
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in texts):
            raise DataError(f"{store}, row {place}: expected an object with the texts {', '.join(texts)}; {_ADVICE}")
        runs = row.get("runs")
        if not isinstance(row.get("settings"), dict) or not isinstance(runs, list) or not runs:
            raise DataError(f"{store}, row {place}: expected an object 'settings' and a list 'runs'; {_ADVICE}")
        for run in runs:
            if not isinstance(run, dict) or not _is_run(run):
                raise DataError(
                    f"{store}, row {place}: expected runs with a whole 'seed', 'solved' of 'n' tasks, 'cpu_minutes' and 'commit'; {_ADVICE}"
                )
        if len({run["seed"] for run in runs}) < len(runs):
            raise DataError(f"{store}, row {place}: a seed stands twice; {_ADVICE}")
    return rows


def _is_run(run: Mapping[str, Any]) -> bool:
    counts = [run.get(name) for name in ("seed", "solved", "n")]
    if not all(type(count) is int for count in counts) or not isinstance(run.get("commit"), str):
        return False
    minutes: Any = run.get("cpu_minutes")
    return 0 <= run["solved"] <= run["n"] and 0 < run["n"] < 1 << 53 and is_number(minutes) and minutes >= 0


def measured(run: Path) -> dict[str, Any]:
    """A row with one seed: what the run is, and what its last weights solve of the fixed panel.

    Raises:
        AtodError: the run cannot be on the leaderboard.
    """
    if not (run / "config.json").is_file() or "algorithm" not in read_settings(run):
        raise AtodError(f"{run} is not the folder of a training run; give the one that --run of atod train named")
    settings = read_settings(run, "train", "algorithm")
    about = read_object(run / "config.json", _ADVICE)
    train, algorithm = settings["train"], settings["algorithm"]
    kinds: dict[str, type] = {"env": str, "steps": int, "seed": int}
    for name, kind in kinds.items():
        if type(train.get(name)) is not kind:
            raise DataError(f"{run / 'config.json'}: expected train.{name} of type {kind.__name__}; {_ADVICE}")
    env = train["env"]
    if settings.get("worlds") or env not in FIXED:
        raise AtodError(f"{run}: a run in {env} has no place here; expected one of: {', '.join(FIXED)}, alone")
    commit, command = _origin(run, about)
    checkpoint, cpu_minutes = _finished(run, train["steps"])
    panel = fixed_panel(env)
    config = EvaluateConfig(
        env=env,
        agent=str(checkpoint),
        data=train["data"],
        panels=(panel.name,),
        out=run / "leaderboard" / checkpoint.name,
    )
    require_comparable(run, config, panel)
    found = evaluate(config, show=False)["panels"][panel.name]
    single = {
        "seed": train["seed"],
        "n": found["n"],
        "solved": round(found["success"] * found["n"]),
        "cpu_minutes": cpu_minutes,
        "commit": commit,
    }
    varied = {"seed", "run", *FREE_SETTINGS} - {"steps"}
    return {
        "env": env,
        "panel": panel.name,
        "digest": panel.digest,
        "data": panel.data_version,
        "method": label_of(algorithm),
        "command": without(command, "--seed", "--run", *(f"--{name.replace('_', '-')}" for name in varied)),
        "settings": {
            "rules": settings["rules"],
            "algorithm": algorithm,
            "train": {name: value for name, value in train.items() if name not in varied},
        },
        "runs": [single],
    }


def _origin(run: Path, about: Mapping[str, Any]) -> tuple[str, str]:
    """The one commit whose source the run was made with, and its command."""
    commits, command = about.get("commits", []), about.get("command", "")
    texts = isinstance(commits, list) and all(isinstance(one, str) for one in commits)
    if not texts or not isinstance(command, str):
        raise DataError(f"{run / 'config.json'}: expected texts as 'commits', and a text as 'command'; {_ADVICE}")
    if len(commits) != 1 or "+" in commits[0] or commits[0] == "unknown" or not command:
        raise AtodError(
            f"{run}: its source is not that of one commit (commits: {', '.join(commits) or 'none'}; command: {command or 'not stored'}); "
            "commit what you changed, and train it in one go with atod train from a clone"
        )
    return commits[0], command


def _finished(run: Path, steps: int) -> tuple[Path, float]:
    """The checkpoint of the run's last step, and the CPU minutes of all steps."""
    rows = read_metrics(run)
    checkpoint = latest_checkpoint(run / "checkpoints")
    if len(rows) < steps or checkpoint is None:
        raise AtodError(f"{run} has {len(rows)} of {steps} steps; run its command again to finish it")
    if [row["step"] for row in rows] != list(range(1, steps + 1)) or step_of(checkpoint) != steps:
        raise AtodError(
            f"{run}: it is said to have {steps} steps, logged {len(rows)}, and its last checkpoint is {checkpoint.name}; run its "
            "command again to finish it"
        )
    if not all(is_number(row.get("time/cpu")) for row in rows):
        raise AtodError(f"{run}: its steps have no time/cpu, so it is of an earlier version; train it again")
    require_whole(checkpoint)
    return checkpoint, round(sum(row["time/cpu"] for row in rows) / 60, 1)


def fixed_panel(env: str) -> Panel:
    """The panel of an environment: tasks of the built-in data, in the split for reporting."""
    split = held_out_splits(env)[-1]
    options = {"data": "builtin"}
    return read_panels(
        lambda name: cast("TextEnv", make(env, split=name, **options).unwrapped), [f"{split}/{FIXED[env]}"]
    )[0]


def require_comparable(run: Path, config: EvaluateConfig, panel: Panel) -> None:
    """Refuse a run that would be evaluated on other tasks or under other conditions than the other rows."""
    sampling = sampling_of(config)
    own = settings_of(config, sampling)[1][0]
    profile: Mapping[str, Any] = builtin_profile(config.env)
    standard = Sampling(
        profile.get("option", ()), max_turns=profile.get("max_turns"), temperature=profile["eval_temperature"]
    )
    facts = {
        "tasks": (own.digest, panel.digest),
        "data": (own.data_version, panel.data_version),
        "turn limit": (sampling.max_turns, standard.max_turns),
        "temperature": (sampling.temperature, standard.temperature),
        "options": (tuple(sampling.option), standard.option),
    }
    for name, (its, expected) in facts.items():
        if its != expected:
            raise AtodError(f"{run}: the panel differs in its {name}: {its!r}, the leaderboard's is {expected!r}")


def merged(rows: Sequence[Mapping[str, Any]], entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows with one more run: in the row of its settings, in the place of an earlier one of the same seed.

    Raises:
        AtodError: the page has rows of another panel of this environment.
    """
    kept = [dict(row) for row in rows]
    for row in kept:
        if row["env"] == entry["env"] and (row["digest"], row["data"]) != (entry["digest"], entry["data"]):
            raise AtodError(
                f"{entry['env']}: the page has rows of panel {row['panel']} ({row['digest']}, {row['data']}), this run was measured on "
                f"{entry['panel']} ({entry['digest']}, {entry['data']}); begin the page anew"
            )
    own = entry["runs"][0]
    for row in kept:
        if row["env"] == entry["env"] and row["settings"] == entry["settings"]:
            others = [run for run in row["runs"] if run["seed"] != own["seed"]]
            row["runs"] = sorted([*others, own], key=lambda run: int(run["seed"]))
            return kept
    return [*kept, dict(entry)]


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page's tables, one an environment, the best method first."""
    parts = []
    for env in dict.fromkeys(row["env"] for row in rows):
        own = sorted((row for row in rows if row["env"] == env), key=lambda row: -_success(row))
        parts.append(
            f"## {env.split('/')[-1].rpartition('-')[0]}\n\nPanel `{own[0]['panel']}` of `{own[0]['data']}`, digest `{own[0]['digest']}`.\n\n"
            "| method | success | 95 % interval | seeds | CPU minutes | commit | command |\n|---|---:|---:|---|---:|---|---|\n"
            + "".join(_line(row) for row in own)
        )
    return "\n".join(parts)


def _success(row: Mapping[str, Any]) -> float:
    return float(np.mean([run["solved"] / run["n"] for run in row["runs"]]))


def _line(row: Mapping[str, Any]) -> str:
    runs = row["runs"]
    shares = [run["solved"] / run["n"] for run in runs]
    low, high = t_interval(shares) if len(runs) > 1 else wilson(runs[0]["solved"], runs[0]["n"])
    minutes = sum(run["cpu_minutes"] for run in runs) / len(runs)
    commits = ", ".join(dict.fromkeys(run["commit"][:7] for run in runs))
    seeds = ", ".join(str(run["seed"]) for run in runs)
    interval = f"{100 * max(0.0, low):.1f} - {100 * min(1.0, high):.1f}"
    cells = (row["method"], f"{_success(row):.1%}", interval, seeds, f"{minutes:.1f}", commits, f"`{row['command']}`")
    return f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in cells)} |\n"


def label_of(algorithm: Mapping[str, Any]) -> str:
    """The study's name of a method where it has the same options, else the algorithm's own.

    Of several rows the one that names most of them: OPD by position is IW-OPD with one option more.
    """
    fitting = []
    for method in METHODS.values():
        own = {"name": method.algorithm, **method.options}
        if method.algorithm and all(algorithm.get(name) == value for name, value in own.items()):
            fitting.append(method)
    return max(reversed(fitting), key=lambda method: len(method.options)).label if fitting else str(algorithm["name"])


if __name__ == "__main__":
    main()
