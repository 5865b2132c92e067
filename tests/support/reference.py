"""Panels played by the models that come with the project."""

import gymnasium as gym

from agents.chat import ChatFormat
from agents.engines.transformers import TransformersEngine
from atod_algos.evaluate import evaluate
from atod_algos.evaluate.settings import held_out_splits
from atod_algos.rollout.episodes import Rollout
from atod_algos.training.config import builtin_profile
from atod_envs.options import read_options


def play_panel(loaded, env, n, data="builtin"):
    """Evaluate a model on n tasks of an environment's last split, as the environment's profile says."""
    profile = builtin_profile(env)

    def world():
        options = {"max_turns": profile["max_turns"], **read_options(profile.get("option", ()))}
        return gym.make(env, data=data, split=held_out_splits(env)[-1], **options)

    engine = TransformersEngine(loaded.model, slots=n, max_context=profile["max_context"])
    chat = ChatFormat(loaded.tokenizer)
    rollout = Rollout(engine, chat, world, style=profile["style"], max_tokens=profile["max_response"])
    return evaluate(rollout.play, world().unwrapped.tasks.panel(n))
