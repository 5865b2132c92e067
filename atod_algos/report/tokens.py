"""Scores of single tokens for the episodes that are shown: what teacher and student thought of each.

The student's values were stored when it sampled (they differ from the learner's by rounding, see
``sampler/logprob_gap_*``); the teacher's were stored too if the run kept them (``--store tokens``), and are computed
here otherwise. The invariant: the teacher reads the very ids that were sampled, at the temperature they were sampled
at, with the bound on the gap that the run trained with.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atod_algos.advantages import min_max_by_trajectory, soft_or
from atod_algos.batch import make_batch
from atod_algos.report.data import Run
from atod_envs import environment_class
from atod_envs.errors import AtodError, DataError
from atod_envs.files import read_object
from atod_envs.trajectory import Group, Trajectory

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TurnScores:
    """One turn.

    Attributes:
        student: log-prob of each sampled token under the policy that sampled it.
        teacher: under the teacher; ``None`` without one.
        d: disagreement d_k.
        h: uncertainty h_k.
        w: weight w_k: as trained with, or what T-DUR gives where nothing was trained.
    """

    student: list[float]
    teacher: list[float] | None
    d: float | None
    h: float | None
    w: float | None


@dataclass
class Scorer:
    """Scores a run's episodes, with its teacher loaded at most once.

    Attributes:
        run: the run.
        teacher: another teacher than the run's own.
        compute: may load the teacher; otherwise only what is stored is used.
    """

    run: Run
    teacher: str | None = None
    compute: bool = True
    _loaded: Any = field(default=None, repr=False)
    _digests: dict[str, str | None] = field(default_factory=dict, repr=False)

    def scores(self, kind: str, step: int, episodes: list[Trajectory]) -> dict[tuple[int, int], TurnScores]:
        """Scores of a step's turns, by (place of the episode in the file, turn)."""
        teacher = self._teacher_tokens(kind, step, episodes)
        table = self.run.turn_table(step) if kind == "train" else None
        weights = dict(zip(_places(table), table["weight"], strict=True)) if table and "weight" in table else None
        trained_d, trained_h = (_trained(table, column) for column in ("sum_abs_gap", "sum_surprise"))
        if self.teacher not in (None, self.run.teacher):  # what was trained with is another teacher's
            weights, trained_d = None, {}
        found: dict[tuple[int, int], TurnScores] = {}
        for n, episode in enumerate(episodes):
            spoken = [turn for turn in episode.turns if turn.response_ids]
            rows = [(list(turn.logprobs), teacher.get((n, turn.index)) if teacher else None) for turn in spoken]
            h = [
                trained_h.get((n, turn.index)) or -float(np.mean(student))
                for turn, (student, _) in zip(spoken, rows, strict=True)
            ]
            d = [None if t is None else float(np.mean(np.abs(np.subtract(t, s)))) for s, t in rows]
            d = [trained_d.get((n, turn.index), value) for turn, value in zip(spoken, d, strict=True)]
            w: list[float | None] = [None] * len(rows)
            if weights is not None:
                w = [weights.get((n, turn.index)) for turn in spoken]
            elif kind != "train" and rows and all(value is not None for value in d):
                one, spoken_K = np.zeros(len(rows), dtype=np.int64), np.ones(len(rows), dtype=bool)
                d_K, h_K = (min_max_by_trajectory(np.array(x, dtype=float), one, spoken_K) for x in (d, h))
                w = soft_or(d_K, h_K).tolist()
            for turn, (student, by_teacher), d_k, h_k, w_k in zip(spoken, rows, d, h, w, strict=True):
                found[n, turn.index] = TurnScores(student, by_teacher, d_k, h_k, w_k)
        return found

    def _teacher_tokens(
        self, kind: str, step: int, episodes: list[Trajectory]
    ) -> dict[tuple[int, int], list[float]] | None:
        table = self.run.turn_table(step) if kind == "train" else None
        if self.teacher is None and table is not None and "token_teacher" in table:
            return dict(zip(_places(table), table["token_teacher"], strict=True))
        path = self.run.scores_path(kind, step)
        stored: dict[str, Any] | None = None
        with contextlib.suppress(DataError):  # missing or broken: computed again
            stored = read_object(path)
        name = self.teacher or self.run.teacher
        if name is None:
            return None
        said = _digest_of(episodes)
        if stored is None or not self._made_by(name, stored["teacher"]) or stored.get("said", [said]) != [said]:
            if not self.compute or not any(turn.response_ids for e in episodes for turn in e.turns):
                return None
            model = self.load(name)
            if model is None:
                return None
            stored = {"teacher": [name, self._digest(name)], "said": [said], **self._compute(model, kind, episodes)}
            try:
                path.parent.mkdir(exist_ok=True)
                part = path.with_name(path.name + ".part")
                part.write_bytes(gzip.compress(json.dumps(stored).encode(), 3, mtime=0))
                part.replace(path)
            except OSError as error:
                log.warning("the teacher's scores are shown, but not kept: %s: %s", path, error.strerror)
        return dict(zip(_places(stored), stored["token_teacher"], strict=True))

    def _made_by(self, name: str, teacher: list[str | None]) -> bool:
        """Whether stored scores are those of the model that lies under a name now, or of one whose files are gone."""
        return teacher[:1] == [name] and (self._digest(name) is None or teacher == [name, self._digest(name)])

    def _digest(self, name: str) -> str | None:
        if name not in self._digests:
            try:
                from agents.models import model_digest
            except ImportError:  # a page can be made where no model can be loaded
                return None
            self._digests[name] = model_digest(name, self._world, "teacher")
        return self._digests[name]

    @property
    def _world(self) -> str:
        if ", " in self.run.env:
            raise AtodError(
                f"{self.run.path} played several environments, whose teachers and limits differ; its page shows what was stored "
                "(--store tokens). Leave --teacher out, or give --no-score"
            )
        return getattr(environment_class(self.run.env), "env_key", "")

    def _compute(self, model: Any, kind: str, episodes: list[Trajectory]) -> dict[str, list[Any]]:
        from atod_algos.learner.logprobs import score

        whole = [(n, t) for n, t in enumerate(episodes) if str(t.stop_reason) != "aborted"]
        batch = make_batch([Group(trajectory.task_id, (trajectory,)) for _, trajectory in whole])
        teacher_M, _ = score(model, batch, temperature=self.run.temperature(kind))
        if limit := self.run.gap_clip:
            student_M = batch.sampler_logprobs_M
            teacher_M = student_M + np.clip(teacher_M - student_M, -limit, limit)
        parts = np.split(teacher_M, np.cumsum(batch.n_K)[:-1])
        return {
            "trajectory": [whole[n][0] for n in batch.trajectory_K],
            "turn": batch.index_K.tolist(),
            "token_teacher": [[round(float(value), 5) for value in part] for part in parts],
        }

    def load(self, name: str) -> Any:
        """The model of a role, loaded once."""
        if self._loaded is None:
            from agents.models import load_model

            try:
                self._loaded = load_model(name, "teacher", world=self._world)
            except AtodError as error:
                log.warning("no token scores: %s", error)
                self._loaded = False
        return self._loaded.model if self._loaded else None


def _digest_of(episodes: Sequence[Trajectory]) -> str:
    """Of the tokens that are scored: a step that is played again, after a kill, may sample others on a GPU."""
    ids = [[turn.response_ids for turn in episode.turns] for episode in episodes]
    return hashlib.blake2b(json.dumps(ids).encode(), digest_size=8).hexdigest()


def token_texts(run: Run, episodes: list[Trajectory]) -> dict[int, str] | None:
    """Text of every token that was sampled, or None where the run's tokenizer is not there."""
    folder = next((path for path in run.tokenizers if (path / "tokenizer.json").is_file()), None)
    if folder is None:
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = {i for episode in episodes for turn in episode.turns for i in turn.response_ids}
    return {i: tokenizer.decode([i], skip_special_tokens=False) for i in sorted(ids)}


def _trained(table: dict[str, list[Any]] | None, column: str) -> dict[tuple[int, int], float | None]:
    """The d_k or h_k that were trained with; their sums are stored for every turn, single tokens or not.

    h_k of stored tokens is that of the weights that sampled, which under ``--staleness`` are older ones.
    """
    if table is None or column not in table:
        return {}
    values = [total / n if n else None for total, n in zip(table[column], table["n"], strict=True)]
    return dict(zip(_places(table), values, strict=True))


def _places(table: dict[str, list[Any]] | None) -> list[tuple[int, int]]:
    return [] if table is None else list(zip(table["trajectory"], table["turn"], strict=True))
