"""Agents act by what they have seen, and the same policy acts the same by hand and in a rollout."""

import gymnasium as gym
import pytest
from toy import ToyEnv

from agents.base import Agent
from agents.expert import expert_for
from agents.random import RandomAgent
from atod_envs.errors import UnknownName


def play(agent: Agent, env, **reset):
    observation, info = env.reset(**reset)
    agent.reset(observation, info)
    actions = []
    while True:
        decision = agent.act()
        observation, _, terminated, truncated, info = env.step(decision.action)
        agent.observe(decision.action, observation, info)
        actions.append(decision.action)
        if terminated or truncated:
            return actions, info


def test_random_agent_is_seeded_and_admissible():
    a, _ = play(RandomAgent(3), ToyEnv(), seed=1)
    b, _ = play(RandomAgent(3), ToyEnv(), seed=1)
    assert a == b and set(a) <= {"apple", "pear", "plum", "fig"}
    different = {tuple(play(RandomAgent(s), ToyEnv(), seed=1)[0]) for s in range(10)}
    assert len(different) > 3


def test_random_agent_fills_patterns_with_words_of_the_task():
    agent = RandomAgent(0)
    agent.reset("", {"admissible": ("search[<your query>]",), "task": "find red shoes"})
    action = agent.act().action
    assert action.startswith("search[") and set(action[7:-1].split()) <= {"find", "red", "shoes"}


def test_expert_agent_wins_the_built_in_world():
    env = gym.make("atod/ALFWorld-v0", data="builtin", split="valid_unseen")
    for seed in range(12):
        _, info = play(expert_for(env), env, seed=seed)
        assert info["success"], info["task_id"]


def test_a_world_without_an_expert_says_so():
    with pytest.raises(UnknownName, match="scripted expert 'toy'"):
        expert_for(ToyEnv())
