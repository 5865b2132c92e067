"""``Agent``: turns observations of one episode into actions, without looking anywhere else.

An agent sees what ``reset`` and ``step`` of a text environment return, nothing more. Most work on the raw environment
(observation in, action out), so that the same agent plays by hand, in evaluation and as a demonstrator. On a prompted
environment observations are prompts and actions are whole responses: an API client plays that one, and
``agents.policy.Phrased`` lets any other agent do so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Decision:
    """What an agent does in one turn.

    Attributes:
        action: text for the environment.
        thought: why, in a few words; may be empty.
    """

    action: str
    thought: str = ""


class Agent(Protocol):
    """Plays one episode at a time."""

    def reset(self, observation: str, info: Mapping[str, Any]) -> None:
        """Begin an episode with what the environment's ``reset`` returned."""

    def act(self) -> Decision:
        """Choose the next action."""

    def observe(self, action: str, observation: str, info: Mapping[str, Any]) -> None:
        """Learn what an action led to; the action need not have been the agent's own."""
