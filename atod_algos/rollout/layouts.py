"""How an episode becomes prompts and training rows: three layouts behind one setting.

``window``      (a) each turn stands alone, with a sliding-window prompt; a row for every turn (the paper's).
``turns``       (b) each turn's prompt is the whole conversation so far; a row for every turn.
``trajectory``  (c) the same prompts; one row for the whole episode, in which only the sampled tokens are learned from.

The invariant: the rows hold the ids that the policy saw and sampled. Chat templates that rewrite earlier turns would
break it; they are recognised, and the conversation is kept as it was sampled instead, which is said once, aloud.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Literal, cast

from agents.chat import ChatFormat
from atod_algos.batch import RowLayout
from atod_envs.errors import AtodError
from atod_envs.styles import Layout, PromptStyle

log = logging.getLogger(__name__)

LayoutName = Literal["auto", "window", "turns", "trajectory"]


def choose_layout(name: LayoutName, style: PromptStyle, chat: ChatFormat | None) -> tuple[PromptStyle, RowLayout]:
    """The prompt style and the row layout that a setting stands for.

    Args:
        name: the setting; ``auto`` is ``window`` for styles whose turns stand alone, else ``trajectory``.
        style: the prompt style.
        chat: the chat format, whose template may rewrite history; None where a server renders the messages.

    Raises:
        AtodError: the style cannot be laid out so.
    """
    if name == "auto":
        name = "window" if style.layout is Layout.WINDOW else "trajectory"
    wanted = Layout.WINDOW if name == "window" else Layout.CONVERSATION
    if style.layout is not wanted:
        if wanted is Layout.WINDOW:
            raise AtodError(
                "--layout window needs a prompt style whose turns stand alone, such as 'atod'; this one tells only what is new. "
                "Give --style atod, or --layout turns or trajectory"
            )
        if not dataclasses.is_dataclass(cast("object", style)):
            raise AtodError(
                f"--layout {name}: the prompt style {type(style).__name__} is made for {style.layout.value}s alone; make it a "
                "dataclass with a field 'layout' that its prompts respect"
            )
        style = cast("PromptStyle", dataclasses.replace(cast("Any", style), layout=wanted))
    if wanted is Layout.CONVERSATION and chat is not None:
        rewritten = chat.rewritten_history()
        if rewritten is not None:
            log.warning(
                "the chat template rewrites earlier turns (%s); conversations are kept as they were sampled instead, in "
                "training and in evaluation. A server of the trained model through this template gives it other prompts "
                "than it learned from: serve it with the ids appended, or train with --layout window",
                rewritten,
            )
    return style, RowLayout.PER_TURN if name == "turns" else RowLayout.MERGED
