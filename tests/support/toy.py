"""A tiny world for tests of the core: say the task's word to win; anything else is not understood."""

from collections.abc import Mapping

from atod_envs.styles import History, Layout, Parsed, PromptStyle, parse_tagged
from atod_envs.tasks import TaskSet
from atod_envs.text_env import Frame, TextEnv

WORDS = ("apple", "pear", "plum", "fig")


class ToyStyle:
    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def prompt(self, history: History) -> str:
        return f"{history.task}: {history.observations[-1]}"

    def parse(self, response: str) -> Parsed:
        return parse_tagged(response, 30)

    def respond(self, action: str, thought: str) -> str:
        return f"<think>{thought}</think><action>{action}</action>"


class ToyEnv(TextEnv):
    env_key = "toy"
    default_max_turns = 4
    label = "kind"

    def __init__(self, max_turns: int | None = None, split: str = "train", data: str | None = None) -> None:
        super().__init__(TaskSet(split, [f"say-{word}-{split}" for word in WORDS]), max_turns=max_turns)

    def _begin(self, task_id: str, seed: int) -> tuple[str, Frame]:
        self.word = task_id.split("-")[1]
        return f"say {self.word}", Frame(f"Speak ({seed}).", WORDS, extra={"kind": "fruit"})

    def _act(self, action: str) -> Frame:
        won = action == self.word
        known = action in WORDS
        text = f"You say {action}." if known else "Nothing happens."
        return Frame(text, WORDS, float(won), float(won), won, won, known, {"kind": "fruit"})

    def prompt_styles(self) -> Mapping[str, PromptStyle]:
        return {"atod": ToyStyle(Layout.WINDOW), "compact": ToyStyle(Layout.CONVERSATION)}
