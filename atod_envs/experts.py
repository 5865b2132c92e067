"""What every scripted expert is: a script that is shown what an agent is shown, and says what to do next and why.

The invariant: an expert can be asked in any state that another agent's actions have led to, so it watches what
every agent does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Move:
    """What to do, and why in a few words."""

    action: str
    thought: str


class Script(Protocol):
    """A scripted expert. An environment names its class (``TextEnv.expert``).

    It is made without arguments, or by a class method ``for_env(env, brief=...)`` where there is one.
    """

    def reset(self, task: str, observation: str, admissible: Sequence[str]) -> None:
        """Begin an episode."""

    def act(self, observation: str, admissible: Sequence[str]) -> Move:
        """What to do now."""

    def observe(self, action: str, observation: str, admissible: Sequence[str]) -> None:
        """Take note of what an action of any agent has led to."""
