"""A language-model policy as an agent: one episode at a time, on an inference engine.

Rollouts drive an engine with many episodes at once; this is the same policy for a single one: to watch it, to play it against
another, or to let it act inside somebody else's loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agents.base import Decision
from agents.chat import ChatFormat
from agents.engines.base import Completion, Engine, SamplingParams
from atod_envs.errors import AtodError
from atod_envs.styles import History, Layout, PromptStyle, read_response


class PolicyAgent:
    """Answers observations with a language model's responses.

    Args:
        engine: samples the responses; must be idle otherwise.
        chat: renders messages to ids for the engine's model.
        style: how the environment is put to the model.
        max_tokens: longest response.
        temperature: of the sampling; 0 is greedy.
        seed: of the sampling.
    """

    def __init__(
        self,
        engine: Engine,
        chat: ChatFormat,
        style: PromptStyle,
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._engine, self._chat, self._style = engine, chat, style
        self._max_tokens, self._temperature, self._seed = max_tokens, temperature, seed
        self._history = History("")
        self._ids: list[int] = []
        self._turns = 0
        self.response = ""

    def reset(self, observation: str, info: Mapping[str, Any]) -> None:
        """Begin an episode."""
        self._history = History(info["task"], [observation], [], info["admissible"])
        self._ids = []

    def act(self) -> Decision:
        """Sample a response; the whole of it stands in ``response`` afterwards.

        Raises:
            AtodError: the conversation no longer fits the model's context.
        """
        message = self._style.prompt(self._history)
        if self._style.layout is Layout.WINDOW or not self._ids:
            prompt = self._chat.opening(message)
        else:
            prompt = self._ids + self._chat.continuation(message, self._ids[-1] in self._chat.stop_ids)
        if len(prompt) + self._max_tokens > self._engine.max_context:
            raise AtodError(
                f"the conversation has {len(prompt)} tokens and no longer fits the context of {self._engine.max_context}"
            )
        self._turns += 1
        params = SamplingParams(self._max_tokens, self._temperature, self._seed + self._turns, self._chat.stop_ids)
        self._engine.submit(f"turn {self._turns}", prompt, params)
        done: list[Completion] = []
        while not done:
            done = self._engine.step()
        self._ids = [*prompt, *done[0].token_ids]
        self.response = self._chat.decode(done[0].token_ids)
        return Decision(read_response(self._style, self.response, self._history).action, self.response)

    def observe(self, action: str, observation: str, info: Mapping[str, Any]) -> None:
        """Note what an action led to."""
        self._history.actions.append(action)
        self._history.observations.append(observation)
        self._history.admissible = info["admissible"]
