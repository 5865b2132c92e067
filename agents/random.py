"""An agent that chooses uniformly among the admissible actions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from agents.base import Decision


class RandomAgent:
    """Chooses uniformly; fills ``search[<your query>]`` with words of the task, and ``<number>`` with 1 to 9.

    Args:
        seed: of its own random numbers.
    """

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._info: Mapping[str, Any] = {}

    def reset(self, observation: str, info: Mapping[str, Any]) -> None:
        """Begin an episode."""
        self._info = info

    def act(self) -> Decision:
        """Draw one of the admissible actions."""
        choices = self._info["admissible"]
        if not choices:
            return Decision("")
        action = str(choices[int(self._rng.integers(len(choices)))])
        before, opened, rest = action.partition("<")
        _, closed, after = rest.partition(">")
        if opened and closed and "your" in rest:
            words = str(self._info["task"]).split() or ["something"]
            start = int(self._rng.integers(len(words)))
            action = before + " ".join(words[start : start + 4]) + after
        elif rest.startswith("number>"):
            action = f"{before}{int(self._rng.integers(1, 10))}{after}"
        return Decision(action)

    def observe(self, action: str, observation: str, info: Mapping[str, Any]) -> None:
        """Note what is admissible now."""
        self._info = info
