"""Who answers the prompts of an episode: a language model on an engine, or an agent whose actions are put into words.

An ``Agent`` (``agents.base``) plays one episode. A ``Policy`` answers the turns of many episodes at once, because an
engine is fastest when it runs many requests together. The one loop that plays either is
``atod_algos.rollout.episodes``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agents.base import Agent, Decision
from agents.chat import ChatFormat
from agents.engines.base import Engine, SamplingParams
from atod_envs.prompting import Prompted
from atod_envs.styles import Layout, phrase_response


@dataclass(frozen=True, slots=True)
class Policy:
    """A language model that answers prompts.

    Attributes:
        engine: samples the responses.
        chat: renders messages to ids; the engine's model must share its tokenizer.
        max_tokens: longest response, in tokens.
        temperature: of the sampling; 0 is greedy.
        max_context: longest prompt plus response, where it is less than the engine's own.
    """

    engine: Engine
    chat: ChatFormat
    max_tokens: int
    temperature: float = 1.0
    max_context: int | None = None

    @property
    def context(self) -> int:
        """Longest prompt plus response, in tokens."""
        own = self.engine.max_context
        return own if self.max_context is None else min(own, self.max_context)

    def fits(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt and the longest response fit the context."""
        return len(prompt) + self.max_tokens <= self.context

    def submit(self, request_id: str, prompt: Sequence[int], seed: int) -> None:
        """Ask for a response; the engine's ``step`` returns it.

        Args:
            request_id: names the request; unique among those that run.
            prompt: its ids.
            seed: of the sampling.
        """
        params = SamplingParams(
            max_tokens=self.max_tokens, temperature=self.temperature, seed=seed, stop_ids=self.chat.stop_ids
        )
        self.engine.submit(request_id, prompt, params)


def next_prompt(chat: ChatFormat, layout: Layout, conversation: Sequence[int], message: str) -> list[int]:
    """Ids of the prompt that ends with a message.

    Args:
        chat: renders messages to ids.
        layout: whether the prompt stands alone or continues the conversation.
        conversation: ids of the episode so far, the last response included; empty at the first turn.
        message: the environment's next message.
    """
    if layout is Layout.WINDOW or not conversation:
        return chat.opening(message)
    return chat.extend(conversation, message)


class Phrased:
    """An agent of the raw environment as one that answers prompts: its actions are phrased as the style asks for.

    Args:
        agent: plays the raw environment.
        env: the prompted environment that is played.
    """

    def __init__(self, agent: Agent, env: Prompted) -> None:
        self._agent, self._env = agent, env

    def reset(self, observation: str, info: Mapping[str, Any]) -> None:
        """Begin an episode."""
        self._agent.reset(info["observation"], info)

    def act(self) -> Decision:
        """Decide, and put it into words."""
        decision = self._agent.act()
        return Decision(phrase_response(self._env.style, decision.action, decision.thought, self._env.history))

    def observe(self, action: str, observation: str, info: Mapping[str, Any]) -> None:
        """Tell the agent what was executed and what the environment said."""
        self._agent.observe(info["action"], info["observation"], info)
