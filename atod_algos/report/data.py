"""Reads runs and evaluations: settings, metrics, episodes, and the quantities of every turn.

The invariant: only complete files are read, so a run may be read while it is being written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atod_algos.evaluate.paired_command import load_evaluation
from atod_algos.evaluate.settings import episodes_path
from atod_algos.training.run_dir import FREE_SETTINGS, read_metrics, read_object
from atod_envs import files
from atod_envs.errors import DataError
from atod_envs.trajectory import Trajectory, read_jsonl

KINDS = {"train": "trajectories", "valid": "validation"}
"""Kind of episode -> folder of a run that holds them."""

_NAMES = {"grpo": "GRPO", "opd": "OPD", "atod": "ATOD", "sdar": "SDAR", "sod": "SOD", "tcod": "TCOD", "gigpo": "GiGPO"}
_NOT_IN_A_RECIPE = {"seed", "run", *FREE_SETTINGS} - {"steps"}
_ADVICE = "restore or delete it"
_SAID = 2
"""Most options in a line's name."""


@dataclass(frozen=True)
class Run:
    """One stored training run.

    Attributes:
        path: its folder.
        settings: what was asked for, resolved.
        versions: what it ran with.
        metrics: one dictionary a step.
        result: the final table; ``None`` while it trains.
        label: how the reader calls its method; empty: as its options say.
    """

    path: Path
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    metrics: list[dict[str, float]] = field(repr=False)
    result: Mapping[str, Any] | None = field(repr=False)
    label: str = ""

    @property
    def env(self) -> str:
        """Registered ids of the environments."""
        worlds = self.settings.get("worlds") or {"": self.settings["train"]}
        return ", ".join(str(world["env"]) for world in worlds.values())

    @property
    def teacher(self) -> str | None:
        """Whom the run was taught by, or could have been; None where several teachers share it."""
        return None if "worlds" in self.settings else str(self.settings["train"]["teacher"])

    @property
    def gap_clip(self) -> float:
        """Largest gap to the teacher that was learned from; 0 is no limit."""
        return float(self.settings["train"]["gap_clip"])

    @property
    def tokenizers(self) -> list[Path]:
        """Folders in which its tokenizer may be."""
        checkpoints = self.path / "checkpoints"
        return [checkpoints / "best", *sorted(checkpoints.glob("step_*"))]

    @property
    def table(self) -> Mapping[str, Any] | None:
        """Summaries of the final evaluation, by policy (and environment); ``None`` while it trains."""
        return None if self.result is None else flat_table(self.result["table"])

    @property
    def said(self) -> str:
        """Every setting, for the page."""
        known = {
            **self.settings["train"],
            **self.settings["algorithm"],
            "rules": self.settings.get("rules", ""),  # supervised fine-tuning has none
            **self.versions,
        }
        return "  ".join(f"{name}={value}" for name, value in known.items())

    def temperature(self, kind: str) -> float:
        """Temperature that log-probs of an episode's tokens belong to; greedy sampling stores those at 1."""
        train = self.settings["train"]
        return float(train["temperature"] if kind == "train" else train["eval_temperature"] or 1.0)

    def step_label(self, kind: str, step: int) -> str:
        """How the page calls a step."""
        return f"training step {step}" if kind == "train" else f"validation after step {step}"

    @property
    def method(self) -> str:
        """The algorithm, with what makes it an ablation."""
        return self.label or method_of(self.settings["algorithm"])

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What decides the result, but for the seed: options of the algorithm and settings of the training."""
        if self.label:
            return {"label": self.label}
        train = {name: value for name, value in self.settings["train"].items() if name not in _NOT_IN_A_RECIPE}
        rest = {name: value for name, value in self.settings.items() if name not in ("train", "algorithm")}
        return {**rest, **train, **self.settings["algorithm"]}

    @property
    def seed(self) -> int:
        """The training seed."""
        return int(self.settings["train"]["seed"])

    @property
    def name(self) -> str:
        """The method and what tells the run from others of it."""
        return f"{self.method}, seed {self.seed}"

    @property
    def worlds(self) -> tuple[str, ...]:
        """Names of its environments where it has several, else none."""
        return tuple(self.settings.get("worlds", {}))

    def series(self, key: str, world: str = "") -> tuple[list[float], list[float]]:
        """A metric by step; a leading slash matches any algorithm's.

        Args:
            key: of the metric, as for all environments together.
            world: the name of one of several environments.
        """
        points = []
        for row in self.metrics:
            name = f"{world}/{key}" if world else key
            if key.startswith("/"):  # the shortest is that of all environments together
                found = [one for one in row if one.endswith(key) and (not world or one.startswith(f"{world}/"))]
                name = min(found, key=len, default="")
            if name in row:
                points.append((row["step"], row[name]))
        return [x for x, _ in points], [y for _, y in points]

    def validations(self, world: str = "") -> tuple[list[float], list[float]]:
        """Validation success by step, the untrained student first where its episodes are stored.

        Args:
            world: the name of one of several environments; of all it is the mean over environments.
        """
        steps, values = self.series("val/success_rate", world)
        if 0 in self.steps("valid") and 0 not in steps:
            own = str(self.settings["worlds"][world]["env"]).rpartition(":")[2] if world else ""
            by_world: dict[str, list[bool]] = {}
            for episode in self.episodes("valid", 0):
                if not world or episode.env_id == own:
                    by_world.setdefault(episode.env_id, []).append(episode.success)
            shares = [sum(part) / len(part) for part in by_world.values()]
            steps, values = [0.0, *steps], [sum(shares) / max(1, len(shares)), *values]
        return steps, values

    def steps(self, kind: str) -> list[int]:
        """Steps whose episodes are stored."""
        if kind not in KINDS:
            return []
        found = (self.path / KINDS[kind]).glob("step_*.jsonl.gz")
        return sorted(int(path.name.removeprefix("step_").removesuffix(".jsonl.gz")) for path in found)

    def episodes(self, kind: str, step: int) -> list[Trajectory]:
        """The episodes of a step."""
        return read_episodes(self.path / KINDS[kind] / f"step_{step:06d}.jsonl.gz")

    def turn_table(self, step: int) -> dict[str, list[Any]] | None:
        """Columns, one entry a turn, of a training step (``atod_algos.metrics.turn_table``); None if there is no file.

        Raises:
            DataError: it is broken.
        """
        path = self.path / "turns" / f"step_{step:06d}.json.gz"
        return files.read_object(path, _ADVICE) if path.exists() else None

    def scores_path(self, kind: str, step: int) -> Path:
        """Where the scores of single tokens are kept."""
        return self.path / "scores" / f"{kind}_{step:06d}.json.gz"


class StoredEvaluation(Run):
    """A stored evaluation (``atod_algos.evaluate``): episodes of one policy on panels, no training.

    Its only kind of episodes is ``"panel"``; its steps count the pairs of panel and seed.
    """

    @property
    def env(self) -> str:
        """Registered id of the environment."""
        return str(self.settings["env"])

    @property
    def teacher(self) -> str | None:
        """None: it was not taught here."""
        return None

    @property
    def gap_clip(self) -> float:
        """No limit: nothing was learned."""
        return 0.0

    @property
    def tokenizers(self) -> list[Path]:
        """The evaluated model's own folder."""
        return [Path(str(self.settings["agent"])).expanduser()]

    @property
    def table(self) -> Mapping[str, Any] | None:
        """Summaries by panel."""
        return None if self.result is None else self.result["panels"]

    @property
    def said(self) -> str:
        """Every setting, for the page."""
        return "  ".join(f"{name}={value}" for name, value in {**self.settings, **self.versions}.items())

    @property
    def method(self) -> str:
        """The agent."""
        return str(self.settings["agent"])

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Every setting."""
        return self.settings

    @property
    def name(self) -> str:
        """The agent; evaluations have no training seed."""
        return self.method

    def validations(self, world: str = "") -> tuple[list[float], list[float]]:
        """None: nothing was trained."""
        return [], []

    def temperature(self, kind: str) -> float:
        """Temperature of the sampling."""
        return float(self.settings["sampling"]["temperature"] or 1.0)

    def step_label(self, kind: str, step: int) -> str:
        """Panel and seed."""
        panel, seed = self._parts()[step]
        return f"{panel}, seed {seed}"

    def steps(self, kind: str) -> list[int]:
        """One for each panel and seed."""
        return list(range(len(self._parts()))) if kind == "panel" else []

    def episodes(self, kind: str, step: int) -> list[Trajectory]:
        """The episodes of a panel with a seed."""
        path = episodes_path(self.path, *self._parts()[step])
        return read_episodes(path) if path.exists() else []

    def _parts(self) -> list[tuple[str, int]]:
        return [(panel["name"], seed) for panel in self.settings["panels"] for seed in self.settings["seeds"]]


def flat_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """A run's final table with a summary an entry: those of several environments have the environment's name."""
    found: dict[str, Any] = {}
    for policy, row in table.items():
        found |= (
            {f"{policy}, {name}": part for name, part in row["worlds"].items()} if "worlds" in row else {policy: row}
        )
    return found


def method_of(algorithm: Mapping[str, Any]) -> str:
    """An algorithm's name as printed, from its stored options."""
    name = str(algorithm["name"])
    label = _NAMES.get(name, name)
    if name != "atod":
        return label
    weighting = str(algorithm["weighting"])
    if not algorithm.get("rho_init", 1) and not algorithm.get("rho_max", 1):  # the teacher alone
        return "OPD" if weighting == "none" else f"OPD by {weighting}"
    parts = [*({"none": ["w/o T-DUR"], "token": ["token-level"]}.get(weighting, []))]
    parts += [] if algorithm["coef_anneal_steps"] else ["w/o annealing"]
    return " ".join([label, ", ".join(parts)]).strip()


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seed alone, by the name of their method, in the order in which they first appear.

    Methods of one name are told apart by the options in which they differ, or by a folder where these are many.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.recipe, sort_keys=True), []).append(run)
    found: dict[str, list[Run]] = {}
    for members in groups.values():
        first = members[0]
        rivals = [other[0].recipe for other in groups.values() if other[0].method == first.method]
        names = sorted({name for recipe in rivals for name in recipe if _differ(name, rivals)})
        said = [f"{name} {first.recipe.get(name)}" for name in names]
        key = ", ".join([first.method, *(said if len(said) <= _SAID else [first.path.name])])
        found[key if key not in found else f"{key}, {first.path}"] = members
    return found


def _differ(name: str, recipes: Sequence[Mapping[str, Any]]) -> bool:
    return any(recipe.get(name) != recipes[0].get(name) for recipe in recipes)


def read_run(path: Path) -> Run:
    """Read the folder of a run or of an evaluation.

    Raises:
        DataError: it is neither; says what was looked for.
    """
    known = read_object(path / "config.json", "restore it", settings=dict) if (path / "config.json").is_file() else {}
    settings = known.get("settings", {})
    kind = Run if "algorithm" in settings else StoredEvaluation if "panels" in settings else None
    if kind is None:
        raise DataError(f"{path} is not a run's folder, nor an evaluation's: no config.json of either in it")
    metrics = read_metrics(path)
    result = path / "result.json"
    found: dict[str, Any] | None = read_object(result, _ADVICE) if result.exists() else None
    if found is not None and kind is StoredEvaluation:
        found = {**found, "panels": {name: one.summary() for name, one in load_evaluation(path).items()}}
    run = kind(path, settings, known.get("versions", {}), metrics, found)
    broken = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
    try:  # all that is asked of them later
        _ = (run.env, run.teacher, run.gap_clip, run.name, run.said, run.recipe, run.tokenizers, run.steps("panel"))
        _ = run.seed if kind is Run else run.temperature("panel")
    except broken as error:
        what = "a run" if kind is Run else "an evaluation"
        raise DataError(f"{path / 'config.json'}: expected the settings of {what} ({error!r}); restore it") from None
    try:
        for row in (run.table or {}).values():
            _ = [float(row[name]) for name in ("success", "low", "high", "n", "length")]
    except broken as error:
        raise DataError(f"{result}: expected the numbers of policies ({error!r}); {_ADVICE}") from None
    return run


def read_episodes(path: Path) -> list[Trajectory]:
    """Stored episodes; a run puts a file into place when it is whole.

    Raises:
        DataError: the file is broken.
    """
    try:
        return list(read_jsonl(path))
    except DataError as error:
        raise DataError(f"{path} is broken ({error}); {_ADVICE}") from error
