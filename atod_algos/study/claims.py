"""What decides each claim: two methods' last checkpoints, over tasks and over training seeds.

The invariant: a claim is decided by two tests at once, over tasks (are these policies different on such tasks?) and
over training seeds (would training again give the same order?). Three seeds decide large differences only; where they
do not, the table says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from atod_algos.evaluate.statistics import Paired, paired, welch
from atod_algos.study import METHODS, row_of
from atod_algos.study.outcomes import Outcomes, outcomes_of
from atod_envs.errors import AtodError

Cells = Mapping[str, Sequence[Mapping[str, Any]]]
"""Finished cells of one world by method, in the order of the table."""

CLAIMS = (
    ("ATOD beats OPD", "atod", "opd"),
    ("OPD beats GRPO", "opd", "grpo"),
    ("ATOD beats GRPO", "atod", "grpo"),
    ("ATOD beats SDAR", "atod", "sdar"),
    ("ATOD beats SOD", "atod", "sod"),
    ("ATOD beats TCOD", "atod", "tcod"),
    ("the student passes its teacher", "atod", "teacher"),
    ("a distilled student passes its teacher", "opd", "teacher"),
    ("annealing is needed", "atod", "atod-constant"),
    ("turn weights are needed", "atod", "atod-uniform"),
    ("turns are a better unit than tokens", "atod", "atod-token"),
    ("turn weights are needed, at equal strength", "atod-level", "atod-uniform"),
    ("ATOD: kappa 10 to 1 against 1 to 0.1", "atod-kappa10", "atod"),
    ("ATOD, kappa 10 to 1, beats OPD", "atod-kappa10", "opd"),
    ("distillation: turns against nothing", "opd-turn", "opd"),
    ("distillation: turns against tokens", "opd-turn", "opd-token"),
    ("distillation: turns against positions", "opd-turn", "iw-opd-level"),
    ("a teacher against no teacher", "opd", "opsa"),
    ("a teacher that plays against one that comments", "guided-opd", "opd"),
)
"""The paper's claims, then the questions about weights and teachers: who should be ahead of whom."""

RIVALS = ("atod", "opd", "grpo")
"""Whom an algorithm of another package is compared with."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One claim in one world, on the last checkpoints.

    Attributes:
        claim: in words.
        seeds: training seeds that both methods have.
        tasks: paired difference over tasks, episodes of all seeds together.
        p_seeds: Welch's test over training seeds; 1 where there are fewer than two.
        by_label: difference by task type or data set.
    """

    claim: str
    seeds: tuple[int, ...]
    tasks: Paired
    p_seeds: float
    by_label: Mapping[str, Paired]

    @property
    def verdict(self) -> str:
        """Both tests must agree at 5 %."""
        decided = self.tasks.p_value < 0.05 and self.p_seeds < 0.05
        if self.tasks.difference > 0:
            return "holds" if decided else "ahead, not decided"
        if self.tasks.difference < 0:
            return "reversed" if decided else "behind, not decided"
        return "no difference"


def decide(claim: str, ahead: Sequence[Mapping[str, Any]], behind: Sequence[Mapping[str, Any]]) -> Decision | None:
    """Compare two methods' last checkpoints on the seeds that both have; None where they share none.

    Cells of several worlds are taken together: all their tasks are compared, and a seed's value is its mean over the
    worlds. A seed counts where both methods have it in all worlds of the cells.

    Raises:
        AtodError: two cells of a world played different tasks.
    """
    worlds = sorted({str(cell.get("world")) for cell in (*ahead, *behind)})  # an order of their own, or p would vary
    left, right = ({(cell["seed"], str(cell.get("world"))): cell for cell in side} for side in (ahead, behind))
    both = left.keys() & right.keys()
    seeds = tuple(sorted({seed for seed, _ in both if all((seed, world) in both for world in worlds)}))
    if not seeds:
        return None
    success = [
        [float(np.mean([side[s, w]["last"]["success"] for w in worlds])) for s in seeds] for side in (left, right)
    ]
    played = {world: [[outcomes_of(side[seed, world]) for seed in seeds] for side in (left, right)] for world in worlds}
    for world, sides in played.items():
        _require_one_panel(claim, world, [outcomes for side in sides for outcomes in side])
    # The mean over seeds of each task, worlds one after the other.
    a_N, b_N = (
        np.concatenate([np.mean([outcomes.solved for outcomes in sides[side]], axis=0) for sides in played.values()])
        for side in (0, 1)
    )
    label_N = np.array([label for sides in played.values() for label in sides[0][0].panel.labels])
    by_label = {str(label): paired(a_N[label_N == label], b_N[label_N == label]) for label in np.unique(label_N)}
    return Decision(claim, seeds, paired(a_N, b_N), welch(*success), by_label)


def _require_one_panel(claim: str, world: str, found: Sequence[Outcomes]) -> None:
    """Refuse cells that played different tasks."""
    panels = {outcomes.panel.digest: outcomes.panel for outcomes in found}
    if len(panels) > 1:
        sizes = " and ".join(f"{len(panel.tasks)} tasks of digest {panel.digest}" for panel in panels.values())
        raise AtodError(
            f"{world}, {claim!r}: the cells played different final panels, {sizes}; compare cells of the same data and panel size"
        )


def decisions_of(methods: Cells) -> list[Decision]:
    """The claims of one world that its cells decide on, and the first method against the runner-up."""
    own = [
        (f"{name} beats {METHODS[other].label}", name, other)
        for name in methods
        if name not in METHODS
        for other in RIVALS
    ]
    claims = [one for one in (*CLAIMS, *own) if one[1] in methods and one[2] in methods]
    found = [decide(claim, methods[a], methods[b]) for claim, a, b in claims]
    trained = [name for name in methods if row_of(name).algorithm and not row_of(name).tuned_as]  # no variants
    if len(trained) > 1:
        first, second = sorted(trained, key=lambda name: -mean_of(methods[name], "last"))[:2]
        claim = f"the first, {row_of(first).label}, against the runner-up, {row_of(second).label}"
        found.append(decide(claim, methods[first], methods[second]))
    return [decision for decision in found if decision is not None]


def together(worlds: Mapping[str, Cells]) -> list[Decision]:
    """The claims over all worlds; none where there is one world."""
    found = []
    for claim, a, b in CLAIMS if len(worlds) > 1 else ():
        if all(a in methods and b in methods for methods in worlds.values()):
            sides = [[cell for methods in worlds.values() for cell in methods[name]] for name in (a, b)]
            found.append(decide(claim, *sides))
    return [decision for decision in found if decision is not None]


def mean_of(cells: Sequence[Mapping[str, Any]], which: str, key: str = "success") -> float:
    """Mean over cells of a number of their last or best checkpoint."""
    values = [float(cell[which][key]) for cell in cells]
    return sum(values) / len(values)
