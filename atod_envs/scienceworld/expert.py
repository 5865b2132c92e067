"""The simulator's own solution of a task, as an expert.

It does not look at what happens: after actions of another agent it goes on with the first of its own that has not been
done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from atod_envs.experts import Move

if TYPE_CHECKING:
    from .env import ScienceWorldEnv


class ScienceWorldExpert:
    """Plays the gold actions of the environment's present task.

    Args:
        env: the environment.
    """

    def __init__(self, env: ScienceWorldEnv) -> None:
        self._env = env
        self._gold: tuple[str, ...] = ()
        self._done = 0

    @classmethod
    def for_env(cls, env: ScienceWorldEnv, *, brief: bool = False) -> Self:
        """The expert of an environment."""
        del brief
        return cls(env)

    def reset(self, task: str, observation: str, admissible: Sequence[str]) -> None:
        """Begin an episode: look its solution up."""
        self._gold, self._done = self._env.gold_actions(), 0

    def observe(self, action: str, observation: str, admissible: Sequence[str] = ()) -> None:
        """Take note of an action of any agent."""
        if self._done < len(self._gold) and action == self._gold[self._done]:
            self._done += 1

    def act(self, observation: str, admissible: Sequence[str]) -> Move:
        """The next action of the solution; it looks around when there is none left."""
        mine = self._done < len(self._gold) and self._gold[self._done].isdigit()
        if observation.startswith("Ambiguous request") and not mine:
            return Move("0", "another agent left a choice open: the first")
        if self._done < len(self._gold):
            return Move(self._gold[self._done], f"step {self._done + 1} of the solution")
        return Move("look around", "the solution has been played")
