"""Small models and recorded episodes for the tests of the adapters."""

import functools

import numpy as np

from atod_envs import playable
from atod_envs.trajectory import Group

OPTIONS = {
    "atod/ALFWorld-v0": {"data": "builtin"},
    "atod/WebShop-v0": {"data": "builtin", "nouns": "rules"},
    "atod/SearchQA-v0": {"data": "builtin"},
    "atod/TextCraft-v0": {"data": "builtin"},
    "atod/ScienceWorld-v0": {"tasks": ["find-non-living-thing"], "simulators": 1, "max_turns": 20},
}
"""Every environment with arguments that need no files. ScienceWorld's episodes share one Java process."""
BUILTIN = {env_id: OPTIONS[env_id] for env_id in playable()}
"""Those whose packages are installed here."""


@functools.lru_cache
def tokenizer():
    """A tokenizer for English with Qwen's special tokens, small enough to train on in seconds."""
    from agents.reference.tokenizer import train_tokenizer

    texts = [
        "look around the room and go to the fridge . search for a red shirt , click buy now ; answer the question"
    ] * 4
    return train_tokenizer(texts, tags=["<think>", "</think><action>", "</action>", "<action>"])


def model(tokens, context=4096):
    from toyworld import small_model

    made = small_model(tokens, 0)
    made.config.max_position_embeddings = context
    return made


def groups(env_id, options, *, style="compact", tasks=2, attempts=2):
    """Episodes that a random model plays on the engine."""
    import gymnasium as gym

    from agents.chat import ChatFormat
    from agents.engines.transformers import TransformersEngine
    from atod_algos.rollout.episodes import EpisodeSpec, Rollout

    tokens = tokenizer()
    make = lambda: gym.make(env_id, **options)  # noqa: E731
    engine = TransformersEngine(model(tokens), slots=8)
    rollout = Rollout(engine, ChatFormat(tokens), make, style=style, max_tokens=6)
    chosen = make().unwrapped.tasks[:tasks]
    specs = [EpisodeSpec(task, f"g{i}", 10 * i + j) for i, task in enumerate(chosen) for j in range(attempts)]
    played = rollout.play_groups(specs)
    rollout.close()
    return played


def expert_trajectory(env_id, options, task=0, seed=0, style=None):
    """An episode of the scripted expert: bare actions, or responses in a prompt style."""
    import gymnasium as gym

    from agents.expert import expert_for
    from atod_envs.prompting import prompted
    from atod_envs.recording import RecordTurns

    raw = gym.make(env_id, **options)
    env = RecordTurns(raw if style is None else prompted(raw, style))
    agent = expert_for(env)
    observation, info = env.reset(seed=seed, options={"task_id": raw.unwrapped.tasks[task]})
    agent.reset(info.get("observation", observation), info)
    over = False
    while not over:
        decision = agent.act()
        said = decision.action if style is None else env.env.style.respond(decision.action, decision.thought)
        observation, _, terminated, truncated, info = env.step(said)
        agent.observe(decision.action, info.get("observation", observation), info)
        over = terminated or truncated
    return env.trajectory


def with_rewards(group, rewards):
    """The group with other rewards at the ends of its episodes."""
    from dataclasses import replace

    changed = []
    for trajectory, reward in zip(group.trajectories, rewards, strict=True):
        last = replace(trajectory.turns[-1], reward=reward)
        changed.append(replace(trajectory, turns=(*trajectory.turns[:-1], last), score=reward, success=reward == 1.0))
    return Group(group.task_id, tuple(changed))


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))
