"""Warnings before a training run collapses: what the last steps' metrics look like when it begins.

A policy that is moved too far unlearns. Its metrics say so before its success is gone. Each sign compares the mean of
the last two steps with the run's own first step, so it needs no scale: a run that begins badly gives no warning, one
that gets worse does. The invariant: what is said depends on the logged steps alone, so a resumed run says what an
uninterrupted one would have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping

LAST = 2
"""Steps whose mean is looked at."""
PAUSE = 10
"""Steps until the same sign is told again."""

_SLOWER = "lower --lr, or make fewer updates a step (--minibatches, --epochs, --gap-minibatches, --gap-epochs)"
_WATCHED = ("episode/success", "episode/valid_action_ratio", "actor/entropy_loss", "group/all_fail", "gap")

Means = Mapping[str, float]
"""Quantity -> its mean over some steps."""


def _worse(best: Means, last: Means) -> bool:
    """Success fell by a tenth of all episodes: noise alone rarely does that."""
    return last["episode/success"] <= best["episode/success"] - 0.1


def _entropy(first: Means, best: Means, last: Means) -> str:
    if last["actor/entropy_loss"] > 0.05 * first["actor/entropy_loss"] or not _worse(best, last):
        return ""
    return (
        f"entropy fell to {last['actor/entropy_loss']:.3f} nats (at first {first['actor/entropy_loss']:.3f}) while success fell to "
        f"{last['episode/success']:.0%} from {best['episode/success']:.0%}: the policy no longer tries anything else. Raise --entropy-coef "
        f"or --clip-high, or {_SLOWER}"
    )


def _valid(first: Means, best: Means, last: Means) -> str:
    if last["episode/valid_action_ratio"] > 0.8 * first["episode/valid_action_ratio"] or not _worse(best, last):
        return ""
    return (
        f"valid actions fell to {last['episode/valid_action_ratio']:.0%} (at first {first['episode/valid_action_ratio']:.0%}): the policy "
        f"forgets how to speak to the environment. Go back to an earlier checkpoint and {_SLOWER}"
    )


def _gap(first: Means, best: Means, last: Means) -> str:
    if last["gap"] < 1.5 * first["gap"] + 0.05:
        return ""
    return (
        f"the gap to the teacher grew to {last['gap']:.3f} nats a token (at first {first['gap']:.3f}): the student moves away from what "
        f"teaches it. With a teacher's term, {_SLOWER}"
    )


def _all_fail(first: Means, best: Means, last: Means) -> str:
    if first["group/all_fail"] > 0.5 or last["group/all_fail"] < 0.9:
        return ""
    return (
        f"in {last['group/all_fail']:.0%} of the groups every attempt fails (at first {first['group/all_fail']:.0%}): reward has nothing "
        f"left to say. Go back to an earlier checkpoint and {_SLOWER}"
    )


SIGNS: Mapping[str, tuple[tuple[str, ...], Callable[[Means, Means, Means], str]]] = {
    "entropy": (("actor/entropy_loss", "episode/success"), _entropy),
    "valid actions": (("episode/valid_action_ratio", "episode/success"), _valid),
    "teacher gap": (("gap",), _gap),
    "groups": (("group/all_fail",), _all_fail),
}
"""Sign -> quantities that it needs, and what it says of the first step's, the highest and the last
means; nothing where all is well."""


class CollapseWatch:
    """Looks at the steps of a run, one by one.

    Args:
        rows: steps that are over already (after a resume).
    """

    def __init__(self, rows: Iterable[Mapping[str, float]] = ()) -> None:
        self._recent: deque[dict[str, float]] = deque(maxlen=LAST)
        self._first: Means | None = None
        self._best: dict[str, float] = {}
        self._told: dict[str, int] = {}
        for row in rows:
            self.see(int(row["step"]), row)

    def see(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """What a step's metrics give reason to say: a line for each sign that was not told lately.

        Args:
            step: its number.
            metrics: as they are logged; quantities that a run does not have are left out.
        """
        self._recent.append(_watched(metrics))
        if self._first is None:
            self._first = self._recent[0]
            self._best = dict(self._first)
        if len(self._recent) < LAST:
            return []
        shared = set.intersection(*map(set, self._recent))
        last = {name: sum(row[name] for row in self._recent) / LAST for name in shared}
        self._best = {name: max(value, self._best.get(name, value)) for name, value in last.items()}
        lines = []
        for sign, (needed, says) in SIGNS.items():
            known = all(name in last and name in self._first for name in needed)
            line = says(self._first, self._best, last) if known else ""
            if line and step - self._told.get(sign, step - PAUSE) >= PAUSE:
                lines.append(f"step {step}: {line}")
                self._told[sign] = step
        return lines


def _watched(metrics: Mapping[str, float]) -> dict[str, float]:
    """The quantities that are looked at; ``gap`` is the mean absolute gap of whichever algorithm runs."""
    gaps = [value for name, value in metrics.items() if name.endswith("/raw_kl_mean") and name.count("/") == 1]
    found = {name: metrics[name] for name in _WATCHED if name in metrics}
    return {**found, **({"gap": gaps[0]} if gaps else {})}
