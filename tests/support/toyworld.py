"""The toy world under a registered id, and random models for it; shared by all tests that train."""

import dataclasses

import gymnasium as gym
from tinymodel import tiny_qwen3
from toy import ToyEnv

from atod_algos.batch import make_batch
from atod_algos.learner.logprobs import row_logprobs
from atod_envs.trajectory import Group, StopReason, Trajectory, Turn

TOY = "toy/Say-v0"
if TOY not in gym.registry:
    gym.register(TOY, entry_point=ToyEnv, disable_env_checker=True)


class EchoEnv(ToyEnv):
    """The toy world under another name, with other splits and a turn limit of its own."""

    env_key = "echo"
    splits = ("learn", "choose", "report")
    label = "size"

    def __init__(self, max_turns=None, split="learn", data=None, loud=False):
        super().__init__(max_turns=max_turns, split=split)
        self.loud = loud

    def _begin(self, task_id, seed):
        text, frame = super()._begin(task_id, seed)
        return text, self._sized(frame)

    def _act(self, action):
        return self._sized(super()._act(action))

    def _sized(self, frame):
        return dataclasses.replace(frame, extra={"size": "small" if self.word == "fig" else "large"})


ECHO = "toy/Echo-v0"
if ECHO not in gym.registry:
    gym.register(ECHO, entry_point=EchoEnv, disable_env_checker=True)


def small_model(tokenizer, seed: int, hidden: int = 32):
    """A random model that knows the tokenizer's ids."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return tiny_qwen3(len(tokenizer), seed, hidden=hidden, eos_token_id=eos, pad_token_id=pad, bos_token_id=None)


def fit(model, prompts, responses, updates: int):
    """Teach a model to answer prompts (token ids) with responses (token ids)."""
    import numpy as np
    import torch

    trajectories = []
    for prompt, response in zip(prompts, responses, strict=True):
        turn = Turn(0, "", (), tuple(prompt), tuple(response), (0.0,) * len(response), "", "", True, True, 0.0)
        trajectories.append(Trajectory("e", "t", "s", "", "g", 0, (turn,), "", False, 0.0, StopReason.FAILURE))
    batch = make_batch([Group("t", tuple(trajectories))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(updates):
        _, logprobs, _ = row_logprobs(model, batch, np.arange(len(prompts)), temperature=1.0)
        (-logprobs.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def learner_options(**changes):
    """The learner's settings as a real checkpoint's run has them, with changes."""
    from atod_algos.training.config import TrainConfig, resolve

    return resolve(TrainConfig(student="folder", **changes))
