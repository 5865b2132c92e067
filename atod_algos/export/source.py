"""What is exported: the run, one of its checkpoints, and what is known about both.

The invariant: every file of the checkpoint is as it was written (their checksums), and every number belongs to this
very checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atod_algos.evaluate import Evaluation
from atod_algos.evaluate.paired_command import load_evaluation
from atod_algos.evaluate.settings import weights_digest
from atod_algos.report.data import flat_table
from atod_algos.training.checkpoint import latest_checkpoint, require_whole
from atod_algos.training.run_dir import read_object, read_settings
from atod_envs.errors import AtodError
from atod_envs.trajectory import Trajectory, read_jsonl

_RESTORE = "restore the file"
_ADVICE = "give the folder of a finished evaluation (atod eval --out)"


@dataclass(frozen=True)
class Source:
    """A checkpoint and its run.

    Attributes:
        run: the run's folder.
        checkpoint: the checkpoint's folder.
        step: optimizer steps (of ``sft``: rounds) that it was trained for.
        algorithm: what trained it.
        settings: the run's.
        versions: of the packages that trained it.
        data_version: what the environment's tasks were made of.
    """

    run: Path
    checkpoint: Path
    step: int
    algorithm: str
    settings: Mapping[str, Any] = field(repr=False)
    versions: Mapping[str, Any] = field(repr=False)
    data_version: str

    @property
    def train(self) -> Mapping[str, Any]:
        """The settings that all algorithms share."""
        train: Mapping[str, Any] = self.settings["train"]
        return train

    @property
    def worlds(self) -> list[Mapping[str, Any]]:
        """The settings that each environment has for itself."""
        return list(self.settings.get("worlds", {"": self.train}).values())

    @property
    def adapters(self) -> bool:
        """Whether the checkpoint holds adapters alone."""
        return (self.checkpoint / "adapter_config.json").is_file()


def open_source(run: Path, checkpoint: str) -> Source:
    """Find a run's checkpoint, and check that it is whole.

    Args:
        run: a run's folder, the folder that ``atod train sft`` wrote, or a checkpoint's own.
        checkpoint: ``last``, ``best``, or the name of a folder in the run's ``checkpoints``.

    Raises:
        AtodError: there is no run, or no such checkpoint.
        DataError: a file of it is damaged.
    """
    folder = run.expanduser()
    if not folder.is_dir():
        raise AtodError(
            f"no folder at {folder}; expected that of a run (--run of atod train), or OUT of atod train sft"
        )
    if folder.parent.name == "checkpoints" and (folder / "complete.json").is_file():
        if checkpoint not in ("last", folder.name):  # "last" is what is taken where nothing is said
            raise AtodError(f"{folder} is one checkpoint, and --checkpoint names {checkpoint}; give the run's folder")
        folder, checkpoint = folder.parent.parent, folder.name
    elif not (folder / "config.json").is_file() or not (folder / "checkpoints").is_dir():
        if not (folder / "training" / "checkpoints").is_dir():
            raise AtodError(
                f"{folder} is no run: expected config.json and checkpoints/ in it (--run of atod train, or OUT of atod train sft)"
            )
        folder = folder / "training"
    chosen = latest_checkpoint(folder / "checkpoints") if checkpoint == "last" else folder / "checkpoints" / checkpoint
    if chosen is None or not (chosen / "complete.json").is_file():
        there = sorted(path.parent.name for path in (folder / "checkpoints").glob("*/complete.json"))
        raise AtodError(
            f"{folder} holds no checkpoint {'of a step yet' if chosen is None else repr(checkpoint)}; "
            + (f"there is: {', '.join(there)} (--checkpoint)" if there else "train for a step at least")
        )
    extra = require_whole(chosen)
    if (chosen / "shards").is_dir():
        raise AtodError(
            f"{chosen} was written in parts, by several ranks; start the run's own command once in a single process (without torchrun), "
            "which writes whole checkpoints from its next one on, or export --checkpoint best, which is always whole"
        )
    settings = read_settings(folder, "train", "algorithm")
    versions = read_object(folder / "config.json", _RESTORE, versions=dict)["versions"]
    name = str(settings["algorithm"].get("name", extra.get("algorithm", "unknown")))
    return Source(folder, chosen, int(extra["step"]), name, settings, versions, str(extra.get("data", "")))


# --- numbers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PanelRow:
    """One policy's numbers on one panel.

    Attributes:
        panel: the panel, and how it was sampled.
        policy: who played.
        summary: as :meth:`Evaluation.summary` gives it.
    """

    panel: str
    policy: str
    summary: Mapping[str, Any]


def panel_rows(source: Source, evaluations: Sequence[Path]) -> list[PanelRow]:
    """Every panel number of the checkpoint: the run's final table, its validation, evaluations that are named.

    Args:
        source: the checkpoint.
        evaluations: folders of finished evaluations of it.

    Raises:
        AtodError: an evaluation is of other weights.
        DataError: a file is broken.
    """
    rows: list[PanelRow] = []
    result = source.run / "result.json"
    if result.is_file():
        found = read_object(result, "delete it and run the training's command again", step=int, panel=str, table=dict)
        own = "best" if source.checkpoint.name == "best" else "last"
        table = flat_table(found["table"])
        names = [name for name in table if name.split(" ")[0].rstrip(",") in (own, "before", "teacher")]
        chosen = found.get("best", {}).get("step") if own == "best" else found["step"]
        if chosen == source.step:
            rows += [PanelRow(found["panel"], name, table[name]) for name in names]
    validation = source.run / "validation" / f"step_{source.step:06d}.jsonl.gz"
    if validation.is_file():
        played: dict[tuple[str, str], list[Trajectory]] = {}
        for trajectory in read_jsonl(validation):
            played.setdefault((trajectory.env_id, trajectory.split), []).append(trajectory)
        for (env, split), trajectories in played.items():
            title = f"{env}, {split}, validation panel (choices were made on it)"
            rows.append(PanelRow(title, f"step {source.step}", Evaluation(tuple(trajectories)).summary()))
    for folder in evaluations:
        rows += _evaluated(source, folder.expanduser())
    return rows


def _evaluated(source: Source, folder: Path) -> list[PanelRow]:
    if not (folder / "result.json").is_file():
        raise AtodError(f"{folder} holds no result.json; {_ADVICE}")
    settings = read_settings(folder, "sampling")
    digests = {weights_digest(str(path)) for path in (source.checkpoint, source.run.parent)} - {None}
    if settings.get("weights") not in digests:
        raise AtodError(
            f"{folder} is an evaluation of other weights ({settings.get('agent')}) than those of {source.checkpoint}; evaluate that "
            "folder: atod eval --agent"
        )
    panels = {name: found.summary() for name, found in load_evaluation(folder).items()}
    sampling = ", ".join(f"{name} {value}" for name, value in settings["sampling"].items() if value is not None)
    seeds = ", ".join(map(str, settings.get("seeds", ())))
    how = ", ".join(part for part in (sampling, f"seeds {seeds}" if seeds else "", *settings.get("option", ())) if part)
    return [PanelRow(f"{settings['env']}, {name}, {how}", "this model", summary) for name, summary in panels.items()]
