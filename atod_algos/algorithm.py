"""What an algorithm is: a base class whose hooks do nothing, and the terms that an algorithm hands to the learner.

The trainer knows no algorithm by name. An outside package adds one through the entry-point group ``atod.algorithms``: a
frozen dataclass that derives from :class:`Algorithm` and overrides the hooks it needs. Its fields become its options.

This module, ``batch``, ``advantages`` and ``metrics`` are the method floor: numpy only, so that importing an algorithm
loads no torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from atod_algos.advantages import GroupOptions, require_range, reward_advantage, task_reward
from atod_algos.batch import Scores, TokenBatch
from atod_algos.turn_plans import Branch, Role, TurnPlan
from atod_envs.errors import AtodError, UnknownName
from atod_envs.trajectory import Group, Trajectory

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Objective:
    """The clipped surrogate's options (``atod_algos.learner.loss``)."""

    clip_low: float = 0.2
    """Ratios below 1 - clip_low are clipped (eq 4)."""
    clip_high: float = 0.2
    """Ratios above 1 + clip_high are clipped (eq 4); DAPO raises it to 0.28."""
    dual_clip: float = 0.0
    """Bounds the loss of tokens with a negative advantage at dual_clip x |A|: 0 is off (paper), 3 in the released
    code."""
    loss_agg: Literal["trajectory_mean", "turn_mean", "token_mean", "constant"] = "trajectory_mean"
    """Average: 'trajectory_mean' of token means (eq 4), 'turn_mean' of token means (verl's seq-mean-token-mean, whose
    sequences are turns), 'token_mean' over a mini-batch (released code, DAPO), or 'constant': trajectory sums over
    --length-divisor (Dr. GRPO)."""
    length_divisor: float = 512.0
    """What a trajectory's token sum is divided by under 'constant'; 512 is the published longest response."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus: 0 (paper), 0.001 (released code)."""

    def __post_init__(self) -> None:
        require_range(self, "clip_low", low=0, high=1)
        require_range(self, "clip_high", low=0)
        require_range(self, "entropy_coef", low=-math.inf)
        if self.dual_clip:
            require_range(self, "dual_clip", low=1)
        require_range(self, "length_divisor", low=1e-9)


RELEASED: Mapping[str, Any] = MappingProxyType(
    {"objective": {"dual_clip": 3.0, "loss_agg": "token_mean", "entropy_coef": 0.001}}
)
"""The objective that the ATOD authors' code ran every method with."""

RELEASED_REWARD: Mapping[str, Any] = MappingProxyType(
    {**RELEASED, "group": {"group_stats": "turn_row", "invalid_penalty": 0.1}}
)
"""The same, with its group statistics, for methods that learn from reward."""


@dataclass(frozen=True, slots=True)
class RolloutLimits:
    """What an algorithm may change about training rollouts; evaluation never uses it.

    Attributes:
        max_turns: turns before an episode is cut; ``None`` leaves the environment's own limit.
        rounds: how often a step may play further tasks until it has enough groups that the algorithm learns from; 1
            plays once and takes every group.
        who: who plays which turn; ``None`` lets the student play them all.
    """

    max_turns: int | None = None
    rounds: int = 1
    who: TurnPlan | None = None


class Branching(Protocol):
    """What plays and scores the branches of a step's episodes, with the weights that played them."""

    def play(self, branches: Mapping[int, Branch], learned: Role) -> dict[int, Trajectory]:
        """Play branches.

        Args:
            branches: index of the episode (axis N) that is branched -> how.
            learned: whose turns carry token ids.
        """

    def score(self, trajectories: Sequence[Trajectory]) -> tuple[TokenBatch, Scores]:
        """Lay episodes out, and score their tokens as those of the step are scored."""


_TERMS = ("distillation_M", "reward_M", "teacher_weight_M", "turn_weight_K", "left_out_N")


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """What an algorithm makes of a scored batch: named terms, whose sum the learner gets.

    Attributes:
        distillation_M: the term of each sampled token that is no reward's, coefficients included: the teacher's, as a
            rule; ``None`` without one.
        reward_M: the reward's term, coefficients included; ``None`` where reward is not learned from.
        teacher_weight_M: weight of the teacher at each token, coefficients included: ``distillation_M`` is this times
            the gap, and under ``--gap exact`` it weighs the reverse KL instead. ``None``: the method is tied to the
            sampled token.
        turn_weight_K: weight of each turn's teacher supervision, where turns are weighted.
        left_out_N: why a trajectory's turn weights stay at 1: 0 they do not, 1 too few turns, 2 too little
            disagreement; ``None`` where weights have no such exceptions.
        coefficients: published numbers of the step, by name.
        notes: further quantities by name; the mean of each is published.
    """

    distillation_M: np.ndarray | None = None
    reward_M: np.ndarray | None = None
    teacher_weight_M: np.ndarray | None = None
    turn_weight_K: np.ndarray | None = None
    left_out_N: np.ndarray | None = None
    coefficients: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, np.ndarray | float] = field(default_factory=dict)

    def only(self, batch: TokenBatch, keep_N: np.ndarray) -> Advantages:
        """The terms of some trajectories of their batch (booleans, axis N), without the quantities of the whole."""
        keep_K = keep_N[batch.trajectory_K]
        kept = {"N": keep_N, "K": keep_K, "M": keep_K[batch.turn_M]}
        terms = {name: getattr(self, name) for name in _TERMS}
        parts = {name: None if term is None else term[kept[name[-1]]] for name, term in terms.items()}
        return replace(self, **parts, coefficients={}, notes={})

    def scaled(self, factor_M: np.ndarray) -> Advantages:
        """The same with another size of the teacher's term.

        Args:
            factor_M: what it is multiplied with at each sampled token.

        Raises:
            AtodError: the algorithm gives no such term.
        """
        if self.distillation_M is None:
            raise AtodError(
                "--gap-scale: the algorithm has no term of its teacher (distillation_M) to scale; leave it out"
            )
        weight_M = self.teacher_weight_M
        return replace(
            self,
            distillation_M=self.distillation_M * factor_M,
            teacher_weight_M=None if weight_M is None else weight_M * factor_M,
        )

    @property
    def token_M(self) -> np.ndarray:
        """Detached advantage of each sampled token: the sum of the terms.

        Raises:
            AtodError: there is no term.
        """
        terms = [term for term in (self.distillation_M, self.reward_M) if term is not None]
        if not terms:
            raise AtodError("the algorithm gave no term to learn from: neither distillation_M nor reward_M")
        return np.asarray(sum(terms[1:], terms[0]))


def require_terms(given: Any, batch: TokenBatch, algorithm: str) -> Advantages:
    """Check what an algorithm gave: each term must have a finite number for everything on its axis.

    Args:
        given: what :meth:`Algorithm.advantages` returned.
        batch: what it was made from.
        algorithm: whose it is, for the message.

    Raises:
        AtodError: names the term, its shape and the expected one.
    """
    if not isinstance(given, Advantages):
        raise AtodError(f"{algorithm}: advantages() returned a {type(given).__name__}; expected Advantages(...)")
    axes = {
        "M": (batch.n_tokens, "sampled token; value_N[batch.trajectory_M] gives each token its trajectory's"),
        "K": (len(batch.trajectory_K), "turn"),
        "N": (len(batch.group_N), "trajectory"),
    }
    for name in _TERMS:
        term, (size, what) = getattr(given, name), axes[name[-1]]
        if term is None:
            continue
        if np.shape(term) != (size,):
            raise AtodError(
                f"{algorithm}: {name} has the shape {np.shape(term)}; expected ({size},), a number for each {what}"
            )
        if not np.isfinite(term).all():
            at = int(np.flatnonzero(~np.isfinite(term))[0])
            raise AtodError(
                f"{algorithm}: {name} is {term[at]} at {at}; nothing was learned from it. Look at how it is made, and at student and "
                "teacher: a model that overflows gives such numbers"
            )
    return given


ActsWith = Mapping[str, tuple[str, tuple[str, ...]]]
"""Option -> another option of the algorithm, and the values of that one under which it acts."""


@dataclass(frozen=True)
class Algorithm(ABC):
    """Base class: every hook but :meth:`advantages` does nothing, so a method overrides the one or two that it needs.

    Derive a frozen dataclass. Its fields are its command-line options; the text under a field is its help.
    """

    name: ClassVar[str] = ""
    """Short name, e.g. ``"atod"``; the first part of the names that it publishes."""
    rules: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({"paper": {}})
    """What ``--rules`` presets: name of the rule set -> option -> value."""
    acts_with: ClassVar[ActsWith] = MappingProxyType({})
    """Options that act under some values of another one alone; the command line refuses them elsewhere."""
    needs_student: ClassVar[bool] = True
    """Whether :meth:`advantages` looks at ``scores.student_M``. Where it does not, and a step has one update, the pass
    that makes the update gives these log-probs: a pass less."""
    exact_gap: ClassVar[bool] = False
    """Whether ``--gap exact`` may act: :meth:`advantages` gives ``teacher_weight_M``, and the method does not need the
    sampled gap. ``teacher_support_MS`` then holds the tokens that the divergence is taken over, in any order."""
    objective: Objective = field(default_factory=Objective)

    @property
    def scores(self) -> frozenset[str]:
        """Which log-probs it wants besides the student's; none by default.

        A subset of {"teacher", "reference", "base", "entropy", "divergence", "support", "privileged"}. "base" is a
        third model's; "entropy" is that of the student's own distribution; "divergence" compares the whole
        distributions of student and teacher; "support" keeps the teacher's top-k tokens for :meth:`support_loss`;
        "privileged" scores the student with :meth:`privileged_text` in front.
        """
        return frozenset()

    @property
    def takes_exact_gap(self) -> bool:
        """Whether ``--gap exact`` acts under these options: a baseline or a loss of its own needs the distributions."""
        own_loss = "support" in self.scores and type(self).support_loss is not Algorithm.support_loss
        return self.exact_gap and "teacher" in self.scores and "divergence" not in self.scores and not own_loss

    @property
    def support(self) -> int:
        """How many top-k tokens of the teacher are kept at each sampled token; read where ``scores`` name "support"."""
        return 0

    @property
    def base_model(self) -> str | None:
        """The third model, read if ``scores`` name "base": a folder or a hub id; ``None`` for the initial student."""
        return None

    def reads(self) -> Mapping[str, str]:
        """Digests of files that it reads, by what names them: a run goes on with the same alone. None by default."""
        return {}

    def limits(self, step: int) -> RolloutLimits:
        """Limits of the training rollouts at a step (from 1); none by default."""
        return RolloutLimits()

    def branch(
        self, batch: TokenBatch, scores: Scores, step: int, branching: Branching
    ) -> tuple[Sequence[Trajectory], Mapping[str, float]]:
        """Further episodes to learn from at a step, such as branches of those that were played; none by default.

        A method that has this hook plays in one process, without ``--staleness``.

        Args:
            batch: what was played.
            scores: its log-probs.
            step: training step, from 1.
            branching: plays and scores branches.

        Returns:
            The episodes, each a group of its own, and numbers to publish by name.
        """
        return (), {}

    def reward(self, batch: TokenBatch) -> np.ndarray:
        """Training reward of each trajectory (axis N); by default reported only."""
        return task_reward(batch, GroupOptions())

    def informative(self, batch: TokenBatch) -> np.ndarray:
        """Which groups to learn from (booleans, axis G); the others are played again if ``limits`` allow rounds."""
        return np.ones(int(batch.group_N.max(initial=-1)) + 1, dtype=bool)

    @abstractmethod
    def advantages(self, batch: TokenBatch, scores: Scores, step: int) -> Advantages:
        """The terms of a scored batch at a step (from 1). The one hook that every algorithm has."""

    def auxiliary_loss(self, logprobs: torch.Tensor, index_M: np.ndarray, scores: Scores) -> torch.Tensor | None:
        """A further loss for each of some tokens, from their current log-probs [m]; ``None`` for none.

        Args:
            logprobs: [m] current log-probs, with gradients.
            index_M: [m] the tokens' indices into axis M.
            scores: the step's scores.
        """
        return None

    def support_loss(self, logprobs: torch.Tensor, index_M: np.ndarray, scores: Scores) -> torch.Tensor | None:
        """A further loss for each of some tokens, from the student's log-probs [m, S] of the teacher's top-k."""
        return None

    def privileged_text(self, trajectory: Trajectory, group: Group) -> str:
        """What the student is shown in front of everything else when it is scored as its own teacher.

        Args:
            trajectory: the one that is scored.
            group: all attempts at its task, this one included.

        Raises:
            AtodError: there is nothing to show for this trajectory's task.
        """
        return ""


@dataclass(frozen=True)
class RewardAlgorithm(Algorithm):
    """Base of algorithms that learn from reward: how rewards become group-relative advantages."""

    group: GroupOptions = field(default_factory=GroupOptions)

    def reward(self, batch: TokenBatch) -> np.ndarray:
        """R(tau), scaled (axis N)."""
        return task_reward(batch, self.group)

    def grpo_by_turn(self, batch: TokenBatch) -> np.ndarray:
        """A^GRPO of each turn, eq 2 (axis K)."""
        return reward_advantage(self.reward(batch), batch.group_N, batch.trajectory_K, batch.valid_K, self.group)

    def grpo(self, batch: TokenBatch) -> np.ndarray:
        """A^GRPO of each sampled token, eq 2 (axis M)."""
        return np.asarray(self.grpo_by_turn(batch)[batch.turn_M])


def algorithm_names() -> list[str]:
    """Names of all algorithms that installed packages offer."""
    return sorted(_offered())


def _offered() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group="atod.algorithms")}


def find_algorithm(name: str) -> type[Algorithm]:
    """Load an algorithm by name from the entry-point group ``atod.algorithms``.

    Raises:
        UnknownName: no installed package offers it; the message lists what is installed.
        AtodError: it is offered, but cannot be imported.
    """
    offered = _offered()
    if name not in offered:
        raise UnknownName("algorithm", name, sorted(offered))
    try:
        return offered[name].load()  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise AtodError(f"algorithm {name!r} is offered as {offered[name].value}, but: {error}") from error
