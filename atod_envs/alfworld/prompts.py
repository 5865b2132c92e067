"""How ALFWorld is put to a language model: the paper's prompt (Figure 7) and a compact conversation.

The two templates of the ``atod`` style and the way its slots are filled are a published format and are reproduced to
the byte (see NOTICE for their origin); the compact style is ours, for small models that cannot read two thousand tokens
a turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from atod_envs.styles import History, Layout, PromptStyle, TaggedResponses, history_lines

FIRST_TURN = """
You are an expert agent operating in the ALFRED Embodied Environment.
Your current observation is: {current_observation}
Your admissible actions of the current situation are: [{admissible_actions}].

Now it's your turn to take an action.
You should first reason step-by-step about the current situation. This reasoning process MUST be enclosed within <think> </think> tags. 
Once you've finished your reasoning, you should choose an admissible action for current step and present it within <action> </action> tags.
"""

LATER_TURN = """
You are an expert agent operating in the ALFRED Embodied Environment. Your task is to: {task_description}
Prior to this step, you have already taken {step_count} step(s). Below are the most recent {history_length} observations and the corresponding actions you took: {action_history}
You are now at step {current_step} and your current observation is: {current_observation}
Your admissible actions of the current situation are: [{admissible_actions}].

Now it's your turn to take an action.
You should first reason step-by-step about the current situation. This reasoning process MUST be enclosed within <think> </think> tags. 
Once you've finished your reasoning, you should choose an admissible action for current step and present it within <action> </action> tags.
"""  # noqa: E501


@dataclass(frozen=True, slots=True)
class AtodStyle(TaggedResponses):
    """The paper's prompt: every turn stands alone and shows the last ``history_length`` turns.

    In a conversation every turn is told in the form of the first, because the earlier ones stand above it.
    The action list leaves ``help`` out. The first turn has no task slot: the task stands inside the observation.
    """

    history_length: int = 2
    layout: Layout = Layout.WINDOW
    gap: ClassVar[str] = "\n"

    def prompt(self, history: History) -> str:
        """Fill the template of the turn."""
        actions = "\n ".join(f"'{action}'" for action in history.admissible if action != "help")
        observation = history.observations[-1]
        if not history.actions or self.history_length <= 0 or self.layout is Layout.CONVERSATION:
            return FIRST_TURN.format(current_observation=observation, admissible_actions=actions)
        lines, shown = history_lines(history, self.history_length)
        return LATER_TURN.format(
            task_description=history.task,
            step_count=len(history.actions),
            history_length=shown,
            action_history=lines,
            current_step=len(history.actions) + 1,
            current_observation=observation,
            admissible_actions=actions,
        )


@dataclass(frozen=True, slots=True)
class CompactStyle(TaggedResponses):
    """One growing conversation in few words, without the list of admissible actions.

    The first message states the task and lists what is in the room; later ones are the observation alone.
    """

    layout: Layout = Layout.CONVERSATION

    def prompt(self, history: History) -> str:
        """The task and the room first, afterwards the last observation."""
        observation = history.observations[-1]
        if history.actions:
            return observation
        _, _, places = observation.partition("you see ")
        places, _, _ = places.partition("\n")
        return f"{history.task}\n{places or observation}"


STYLES: Mapping[str, PromptStyle] = {"atod": AtodStyle(), "compact": CompactStyle()}
"""By name, with the published settings."""
