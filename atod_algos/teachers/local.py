"""Models that are asked but never trained: teacher, reference, base; and the scores of a step under all of them.

The invariant: a model that can be had twice is held once. Two roles that name the same model share it; a role that
names the student's own starting point is the student with its adapters off, where it has adapters; on a GPU a frozen
model lies in the computer's memory and visits the GPU for the scoring alone.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, cast

import numpy as np
import torch

from agents.logits import longest_context, usable_ids
from agents.models import LoadedModel, require_same_tokenizer, share_vocabulary
from atod_algos.algorithm import Algorithm, RolloutLimits
from atod_algos.batch import Scores, TokenBatch, part_of, put_in_front
from atod_algos.learner import distributed
from atod_algos.learner.distribution import WHOLE, distribution
from atod_algos.learner.logprobs import compare, drops_out, score
from atod_algos.learner.lora import without_adapters
from atod_algos.learner.loss import TeacherTokens
from atod_algos.teachers.engine import EngineScorer
from atod_algos.teachers.remote import RemoteScorer, is_address
from atod_algos.teachers.routing import label_of, unseen_labels, world_places
from atod_algos.teachers.support import TopKScorer, joined, known_only
from atod_algos.training.config import RunConfig
from atod_envs.errors import AtodError
from atod_envs.trajectory import Group, Trajectory

log = logging.getLogger(__name__)


class LogprobScorer(Protocol):
    """Gives the log-probs of a batch's sampled tokens."""

    def logprobs(self, batch: TokenBatch, *, temperature: float, budget: int) -> np.ndarray:
        """Log-probs along axis M at this temperature."""


class LocalScorer:
    """A frozen model in this process.

    Args:
        loaded: the model, where it stays between scorings.
        device: where it scores.
    """

    def __init__(self, loaded: LoadedModel, device: str) -> None:
        self.loaded, self.device = loaded, torch.device(device)
        loaded.model.requires_grad_(False)
        if distributed.size() > 1:  # divided among the ranks, it is small enough to stay
            loaded.model.to(device)
            distributed.shard(loaded.model)

    @contextmanager
    def on_device(self) -> Iterator[Any]:
        """The model on the device that scores; afterwards the copy there is dropped."""
        model = self.loaded.model
        tensors = [*model.parameters(), *model.buffers()]
        if all(tensor.device.type == self.device.type for tensor in tensors):
            yield model
            return
        offloaded = [tensor.data for tensor in tensors]
        for tensor in tensors:
            tensor.data = _moved(tensor.data, self.device)
        try:
            yield model
        finally:
            for tensor, data in zip(tensors, offloaded, strict=True):
                tensor.data = data

    def logprobs(self, batch: TokenBatch, *, temperature: float, budget: int) -> np.ndarray:
        """See :class:`LogprobScorer`."""
        with self.on_device() as model:
            return score(model, batch, temperature=temperature, budget=budget)[0]


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device)


class AdaptersOffScorer:
    """The student without its adapters: what it was before training.

    Args:
        student: the student.
        adapters: its adapters.
    """

    def __init__(self, student: LoadedModel, adapters: Any) -> None:
        self.student, self.adapters = student, adapters

    @contextmanager
    def on_device(self) -> Iterator[Any]:
        """The student's model with its adapters off."""
        with without_adapters(self.adapters):
            yield self.student.model

    def logprobs(self, batch: TokenBatch, *, temperature: float, budget: int) -> np.ndarray:
        """See :class:`LogprobScorer`."""
        with self.on_device() as model:
            return score(model, batch, temperature=temperature, budget=budget)[0]


class StepScorer:
    """Scores a step's batch under the student and everything else that an algorithm asks for.

    Args:
        config: resolved settings.
        algorithm: the algorithm.
        student: the student.
        adapters: the student's adapters, or None.
        load: loads a model by name, role and environment.
        device: where models score.

    Attributes:
        teachers: the teacher of each environment; none where the algorithm asks for none.
        late: the student's log-probs are the sampler's until the step's only update, whose own pass gives them: the
            algorithm does not look at them before.
        exact: the teacher's distribution is scored, for its divergence to be a loss.

    Raises:
        AtodError: a model does not fit the student, or cannot give what the algorithm asks for.
    """

    def __init__(
        self,
        config: RunConfig,
        algorithm: Algorithm,
        student: LoadedModel,
        adapters: Any,
        load: Callable[[str, str, str], LoadedModel],
        device: str,
    ) -> None:
        self.config, self.algorithm, self.student = config, algorithm, student
        self._adapters, self._load, self._device = adapters, load, device
        self._chat = student.chat(config.thinking, config.chat_date)
        self._held: dict[tuple[str, str], LogprobScorer] = {}
        self._scored = self._cut = False
        self.late = (
            config.old_logprobs == "learner"
            and config.minibatches * config.epochs == 1
            and not config.staleness
            and distributed.size() == 1
            and not algorithm.needs_student
            and not algorithm.scores & {"teacher", "entropy", "divergence", "support"}
            and not drops_out(student.model)
        )
        wanted = algorithm.scores
        self.exact = config.gap == "exact" and algorithm.takes_exact_gap
        if config.gap == "exact" and "teacher" in wanted and not self.exact:
            why = "with these options is" if algorithm.exact_gap else "is"
            log.warning("%s %s tied to the sampled token; --gap exact does not act on it", algorithm.name, why)
        self._top = 0  # k of the top-k tokens that a teacher elsewhere is asked for
        if self.exact or "support" in wanted:
            known = min(len(usable_ids(student.model)), len(student.tokenizer))
            self._top = min(config.gap_topk if self.exact else algorithm.support, known)
        self.teachers: list[LogprobScorer] = []
        self._label_teachers: list[dict[str, LogprobScorer]] = []
        for world in config.worlds if "teacher" in wanted else ():
            where = config.models_of(world)
            self.teachers.append(self._scorer_for(world.teacher, "teacher", where))
            of_labels = {label: self._scorer_for(name, "teacher", where) for label, name in world.label_teachers}
            self._label_teachers.append(of_labels)
        base, where = algorithm.base_model or config.student, config.models
        self.reference = self._scorer_for(config.student, "student", where) if "reference" in wanted else None
        self.base = self._scorer_for(base, "student", where) if "base" in wanted else None
        others = [scorer.loaded.model for scorer in self._held.values() if isinstance(scorer, LocalScorer)]
        share_vocabulary([student.model, *others], student.tokenizer)

    def _scorer_for(self, name: str, role: str, where: str) -> LogprobScorer:
        # The word "builtin" is another model for each role and environment; any other name is one model for all.
        key = (name, f"{role}/{where}" if name == "builtin" else "")
        if key not in self._held and role == "teacher" and is_address(name):
            self._require_top_enough()
            option = "--gap-topk" if self.exact else "--support"
            self._held[key] = RemoteScorer(
                name, self.student.tokenizer, temperature=self.config.temperature, top=self._top, top_option=option
            )
        elif key not in self._held:
            own = name == self.config.student and (name != "builtin" or role == "student")
            # Two whole distributions are compared at once: one model cannot give both.
            both = role == "teacher" and (self.exact or self.algorithm.scores & {"divergence", "support"})
            if own and self._adapters is not None and not both:
                self._held[key] = AdaptersOffScorer(self.student, self._adapters)
            else:
                vllm = role == "teacher" and self.config.teacher_engine == "vllm"
                if vllm:
                    self._require_top_enough()
                loaded = self._load(name, role, where)
                require_same_tokenizer(self.student, loaded, role)
                longest = self._require_room(loaded, role, vllm)
                self._held[key] = (
                    EngineScorer(loaded, self.config, self._device, longest, self._top)
                    if vllm
                    else LocalScorer(loaded, self._device)
                )
        return self._held[key]

    def _require_room(self, loaded: LoadedModel, role: str, vllm: bool) -> int:
        """The longest row that a scorer may get; vLLM has to have room for one token more.

        Raises:
            AtodError: the model reads less. Past its context a model's log-probs would be numbers without a meaning.
        """
        longest = min(max(w.max_context for w in self.config.worlds), longest_context(self.student.model)) + vllm
        if (reads := longest_context(loaded.model)) < longest:
            raise AtodError(
                f"{role} model {loaded.name!r} reads {reads} tokens, but a row of this run may have {longest - vllm}"
                f"{' and vLLM asks for one more' if vllm else ''}; use --max-context {reads - vllm}, or a model that reads more"
            )
        return longest

    def players(self, limits: RolloutLimits) -> list[Any]:
        """The teachers' models, for a plan by which the teacher plays turns; none for other plans.

        Raises:
            AtodError: they cannot play here; says what to use instead.
        """
        branches = type(self.algorithm).branch is not Algorithm.branch
        if not branches and (limits.who is None or not limits.who.teacher_plays):
            return []
        config = self.config
        reasons = {
            "--cluster": (config.cluster != "none", "the teacher is not on the workers; play in this process"),
            "torchrun": (distributed.size() > 1, "the teacher is divided among the ranks; use a single process"),
            "--staleness": (config.staleness > 0, "the teacher scores while episodes are played; use --staleness 0"),
            "a teacher per label": (any(w.label_teachers for w in config.worlds), "give one per environment"),
            "--teacher": (
                not all(isinstance(scorer, LocalScorer) for scorer in self.teachers),
                "it must be a model in this process, and not the student: --teacher PATH --teacher-engine transformers",
            ),
        }
        for setting, (asked, advice) in reasons.items():
            if asked:
                raise AtodError(
                    f"{self.algorithm.name} has its teacher play turns, which does not go with {setting}: {advice}"
                )
        return [cast("LocalScorer", scorer).loaded.model.to(self._device) for scorer in self.teachers]

    def score(self, batch: TokenBatch) -> Scores:
        """All log-probs of a step's sampled tokens, at the temperature of the sampling; each row under its teacher."""
        world_N = world_places(batch.trajectories, self.config)
        owners = [self._teacher_of(t, int(world)) for t, world in zip(batch.trajectories, world_N, strict=True)]
        if not self._scored:
            self._scored = True
            for said in unseen_labels(batch.trajectories, world_N, self.config):
                log.warning(said)
        several = list(dict.fromkeys(owners))
        if len(several) < 2:
            scores = self._score(batch, next(iter(several or self.teachers), None))
        else:
            scores = self._score_parts(batch, [(np.array([o is own for o in owners]), own) for own in several])
        if scores.teacher_M is None:
            return scores
        limit_M = self._limits(batch).astype(scores.teacher_M.dtype)
        clipped_M = scores.student_M + np.clip(scores.teacher_M - scores.student_M, -limit_M, limit_M)
        return dataclasses.replace(scores, teacher_M=np.where(np.isinf(limit_M), scores.teacher_M, clipped_M))

    def _limits(self, batch: TokenBatch) -> np.ndarray:
        """Bound of the gap at each sampled token (axis M), that of its environment; infinite where there is none."""
        limits = np.array([world.gap_clip or np.inf for world in self.config.worlds])
        return np.asarray(limits[world_places(batch.trajectories, self.config)][batch.trajectory_M])

    def _teacher_of(self, trajectory: Trajectory, world: int) -> LogprobScorer | None:
        if not self.teachers:
            return None
        label = label_of(trajectory, self.config.worlds[world])
        return self.teachers[world] if label is None else self._label_teachers[world][label]

    def _score_parts(self, batch: TokenBatch, parts: Sequence[tuple[np.ndarray, LogprobScorer | None]]) -> Scores:
        """The scores of a batch whose trajectories have different teachers: (which, teacher) of each part."""
        found = []
        for keep_N, teacher in parts:
            part, keep_M = part_of(batch, keep_N)
            if part.n_tokens:
                found.append((keep_M, self._score(part, teacher)))
        return joined(batch.n_tokens, found)

    def _score(self, batch: TokenBatch, teacher: LogprobScorer | None) -> Scores:
        temperature, budget = self.config.temperature, self.config.token_budget

        def under(scorer: LogprobScorer | None) -> Any:
            return None if scorer is None else scorer.logprobs(batch, temperature=temperature, budget=budget)

        model, wanted = self.student.model, self.algorithm.scores
        top = self.exact or "support" in wanted
        whole = wanted & {"divergence", "support"} and not self.exact
        if teacher is not None and whole and not isinstance(teacher, TopKScorer):
            size = self.algorithm.support if "support" in wanted else 0
            limit_M = self._limits(batch)
            with self._whole(teacher).on_device() as other:
                scores = compare(
                    model, other, batch, temperature=temperature, budget=budget, support=size, limit_M=limit_M
                )
            if self.config.old_logprobs == "sampler":  # the pass was for the distributions
                scores = dataclasses.replace(scores, student_M=batch.sampler_logprobs_M)
        else:
            sampled = self.config.old_logprobs == "sampler" or self.late
            student_M, entropy_M = batch.sampler_logprobs_M, None
            if "entropy" in wanted or not sampled:
                passes = score(model, batch, temperature=temperature, budget=budget, entropy="entropy" in wanted)
                student_M = student_M if sampled else passes[0]
                entropy_M = passes[1] if "entropy" in wanted else None
            if top and teacher is not None:
                theirs_M, tokens = self._tokens(teacher, batch)
                scores = Scores(student_M, theirs_M, support_MS=tokens.ids_MS, teacher_support_MS=tokens.logprobs_MS)
            else:
                scores = Scores(student_M, under(teacher))
            scores = dataclasses.replace(scores, entropy_M=entropy_M)
        return dataclasses.replace(
            scores,
            reference_M=under(self.reference),
            base_M=under(self.base),
            privileged_M=self._privileged(batch),
        )

    def _tokens(self, teacher: LogprobScorer, batch: TokenBatch) -> tuple[np.ndarray, TeacherTokens]:
        """The teacher's log-probs of the sampled tokens, and its top-k tokens, or all of a small vocabulary."""
        temperature, budget = self.config.temperature, self.config.token_budget
        model = self.student.model
        if isinstance(teacher, TopKScorer):
            theirs_M, found = teacher.top(batch, temperature=temperature, budget=budget)
            tokens = known_only(found, usable_ids(model))
            asked, kept = found.logprobs_MS.shape[1], tokens.logprobs_MS.shape[1]
            if kept < asked and not self._cut:
                self._cut = True
                log.warning(
                    "some of the teacher's %d most likely ids at a token are none of the student's; in this step %d are kept at "
                    "each token, in others as many as are known",
                    asked,
                    kept,
                )
            return theirs_M, tokens
        with self._whole(teacher).on_device() as other:
            return distribution(
                other, model, batch, temperature=temperature, budget=budget, topk=self.config.gap_topk, whole=WHOLE
            )

    def _require_top_enough(self) -> None:
        """Refuse a teacher elsewhere where its top-k tokens are not enough, before it is asked or loaded."""
        ids = len(usable_ids(self.student.model))
        if self.exact and ids <= WHOLE:
            self._refuse_elsewhere(
                f"--gap exact compares whole distributions where there are at most {WHOLE:,} ids (here {ids:,})"
            )
        if "divergence" in self.algorithm.scores:
            self._refuse_elsewhere(f"{self.algorithm.name} compares whole distributions")

    def _refuse_elsewhere(self, what: str) -> NoReturn:
        raise AtodError(
            f"{what}, and an engine or a server gives top-k tokens at most; use a local teacher: --teacher PATH_OR_HUB_ID "
            "--teacher-engine transformers"
        )

    def _whole(self, teacher: LogprobScorer) -> LocalScorer:
        """The teacher as a model whose whole distribution can be had."""
        if not isinstance(teacher, LocalScorer):
            self._refuse_elsewhere(
                f"{'--gap exact' if self.exact else self.algorithm.name} compares whole distributions"
            )
        return teacher

    def _privileged(self, batch: TokenBatch) -> Any:
        """The student as its own teacher: shown the algorithm's privileged text in front of everything else."""
        if "privileged" not in self.algorithm.scores:
            return None
        attempts: dict[int, list[Trajectory]] = {}
        for n, trajectory in zip(batch.group_N, batch.trajectories, strict=True):
            attempts.setdefault(int(n), []).append(trajectory)
        groups = {n: Group(members[0].task_id, tuple(members)) for n, members in attempts.items()}
        texts = [
            self.algorithm.privileged_text(trajectory, groups[int(n)])
            for n, trajectory in zip(batch.group_N, batch.trajectories, strict=True)
        ]
        shown = put_in_front(batch, [self._chat.encode(text) if text else [] for text in texts])
        longest, limit = max(len(row) for row in shown.rows), longest_context(self.student.model)
        if longest > limit:
            raise AtodError(
                f"privileged text and episode are {longest} tokens, but the student reads {limit}; nothing is cut, so lower "
                f"--max-context by {longest - limit} or shorten the text"
            )
        temperature, budget = self.config.temperature, self.config.token_budget
        return score(self.student.model, shown, temperature=temperature, budget=budget)[0]
