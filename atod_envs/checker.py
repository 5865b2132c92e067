"""``check_text_env``: the environment contract as an executable check.

Gymnasium's ``check_env`` knows nothing of tasks, admissible actions or turn limits; this one plays episodes and asserts
what the rest of the toolkit relies on. It is meant for authors of new environments as much as for our own tests.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Mapping
from typing import Any, cast

import gymnasium as gym
import numpy as np

from atod_envs.errors import EpisodeError, UnknownName
from atod_envs.prompting import fill_pattern
from atod_envs.snapshots import restore, snapshot
from atod_envs.styles import History, PromptStyle, phrase_response, read_response
from atod_envs.text_env import INFO_KEYS, TextEnv
from atod_envs.trajectory import StopReason

NONSENSE = (
    "",
    " ",
    "\n",
    "hello world",
    "GO TO",
    "\x00\x07",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🦊",
    "\ud800",
    "a" * 100_000,
    "{}[]()<>|\\%s{0}",
)
"""Actions that no environment understands but every environment must survive."""

PHRASED = 20
"""Admissible actions of a turn that are phrased and read by each prompt style."""


class ContractError(AssertionError):
    """An environment breaks the contract; the message says which part and where."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ContractError(message)


def check_text_env(env: gym.Env[str, str], *, episodes: int = 3, seed: int = 0) -> None:
    """Play an environment and check the contract.

    Checked: the arguments that commands give, types and keys of everything returned, the same episode for the same
    task and seed, tasks drawn by the seed, the turn limit, both flags of the end, nonsense actions, and the errors for
    misuse; a snapshot in the middle of an episode, from which it must go on as it did (an environment whose
    ``snapshot()`` raises ``EpisodeError`` has none); and the prompt styles, which must write a prompt of every turn and
    read each action in the response that they phrase for it.

    Args:
        env: the environment, raw (not prompted).
        episodes: random episodes to play.
        seed: seed of the random play.

    Raises:
        ContractError: with the first violation found.
    """
    text_env = env.unwrapped
    _require(isinstance(text_env, TextEnv), f"{type(text_env).__name__} is not a TextEnv")
    text_env = cast("TextEnv", text_env)
    _check_arguments(type(text_env))
    _require(len(text_env.tasks) > 0, f"split {text_env.tasks.split!r} holds no task")
    _check_misuse(env, text_env)
    styles = _styles(text_env)
    for episode in range(episodes):
        first = _play(env, seed + episode, styles)
        _play(env, seed + episode, {}, first)
    _check_nonsense(env, text_env)


def _check_arguments(kind: type[TextEnv]) -> None:
    """Training and evaluation choose the split and the turn limit by these names."""
    taken = inspect.signature(kind).parameters
    if any(one.kind is one.VAR_KEYWORD for one in taken.values()):
        return
    missing = [name for name in ("split", "max_turns") if name not in taken]
    _require(
        not missing, f"{kind.__name__}.__init__ does not take {' and '.join(missing)}, which commands give by name"
    )


def _styles(text_env: TextEnv) -> Mapping[str, PromptStyle]:
    try:
        styles = text_env.prompt_styles()
    except Exception as error:
        raise ContractError(f"prompt_styles() raised {error!r}; it must give styles by name") from error
    for name, style in styles.items():
        for text in NONSENSE:
            try:
                style.parse(text)
            except Exception as error:
                raise ContractError(f"style {name!r}: parse({text[:40]!r}) raised {error!r}; it must not") from error
    return styles


def _play(
    env: gym.Env[str, str],
    seed: int,
    styles: Mapping[str, PromptStyle],
    first: list[tuple[object, ...]] | None = None,
) -> list[tuple[object, ...]]:
    """Play an episode at random; a second time compare it with the first, and go on from a snapshot in its middle."""
    rng = np.random.default_rng(seed)
    observation, info = env.reset(seed=seed)
    task_id = info["task_id"]
    limit = cast("TextEnv", env.unwrapped).max_turns
    _check_answer(env, observation, info, turn=0)
    seen: list[tuple[object, ...]] = [(observation, task_id, info["admissible"])]
    _require_same(seen[0], first[0] if first else seen[0], f"seed {seed}, turn 0")
    history = History(info["task"], [observation], [], info["admissible"])
    for turn in range(1, limit + 1):
        admissible = info["admissible"]
        action = str(admissible[int(rng.integers(len(admissible)))]) if admissible else "look"
        where = f"seed {seed}, turn {turn} ({action!r})"
        for name, style in styles.items():
            _check_style(style, history, f"seed {seed}, turn {turn}: style {name!r}")
        if first and turn == len(first) // 2:
            _check_snapshot(env, action, first[turn], seed, where)
        observation, reward, terminated, truncated, info = env.step(action)
        history.actions.append(action)
        history.observations.append(observation)
        history.admissible = info["admissible"]
        _check_answer(env, observation, info, turn=turn)
        _require(info["task_id"] == task_id, f"{where}: the task id changed during the episode")
        _require(
            isinstance(reward, float) and 0.0 <= reward <= 1.0, f"{where}: reward {reward!r} is not a float in [0, 1]"
        )
        _require(
            type(terminated) is bool and type(truncated) is bool, f"{where}: terminated and truncated must be bool"
        )
        _require(not (terminated and truncated), f"{where}: terminated and truncated are both set")
        _require(not info["success"] or terminated, f"{where}: success without the end of the episode")
        seen.append(_answer(observation, reward, terminated, truncated, info))
        if first:
            restored = " (the second after a snapshot was restored)" if turn >= len(first) // 2 else ""
            _require_same(seen[turn], first[turn], where, restored)
        if terminated or truncated:
            reason = info.get("stop_reason")
            _require(isinstance(reason, StopReason), f"{where}: stop_reason is {reason!r} at the end of the episode")
            _require(
                truncated == (reason == StopReason.TURN_LIMIT), f"{where}: stop_reason {reason} does not fit the flags"
            )
            _require(not truncated or turn == limit, f"{where}: truncated at turn {turn}, but the limit is {limit}")
            break
        _require("stop_reason" not in info, f"{where}: stop_reason before the end of the episode")
    else:
        raise ContractError(f"seed {seed}: the episode went on beyond its limit of {limit} turns")
    return seen


def _answer(
    observation: str, reward: object, terminated: bool, truncated: bool, info: dict[str, Any]
) -> tuple[object, ...]:
    return (observation, reward, terminated, truncated, info["admissible"], info["valid"], info["score"])


def _require_same(now: tuple[object, ...], first: tuple[object, ...], where: str, about: str = "") -> None:
    _require(now == first, f"{where}: two plays of the same episode differ{about}: {first} and {now}")


def _check_snapshot(env: gym.Env[str, str], action: str, first: tuple[object, ...], seed: int, where: str) -> None:
    """Take a snapshot, act, go back and act again; then go back from another episode, by the pickled snapshot.

    The first way back is without the pickle, so that a snapshot is found that the step has changed.
    """
    try:
        state = snapshot(env)
    except EpisodeError:
        return  # such as an episode on a server
    try:
        kept = pickle.dumps(state)
    except Exception as error:
        raise ContractError(f"{where}: a snapshot cannot be pickled ({error!r}); see TextEnv.save_state") from error
    _require_same(_answer(*env.step(action)), first, where)
    _restore(env, state, where)
    again = _answer(*env.step(action))
    _require(
        again == first,
        f"{where}: after the snapshot before it was restored, the answer is {again} instead of {first}; save_state() must "
        "give all that a step changes, as a copy, and load_state() must set all of it",
    )
    env.reset(seed=seed + 1)
    _restore(env, pickle.loads(kept), where)


def _restore(env: gym.Env[str, str], state: object, where: str) -> None:
    try:
        restore(env, state)
    except Exception as error:
        raise ContractError(f"{where}: restore() of the snapshot before it raised {error!r}") from error


def _check_style(style: PromptStyle, history: History, where: str) -> None:
    actions = [fill_pattern(pattern, "word") for pattern in history.admissible[:PHRASED]]
    try:
        prompt = style.prompt(history)
        responses = [phrase_response(style, action, "t", history) for action in actions]
        read = [read_response(style, response, history).action for response in responses]
    except Exception as error:
        raise ContractError(f"{where} raised {error!r}") from error
    _require(isinstance(prompt, str), f"{where}: the prompt is {type(prompt).__name__}, not str")
    for action, response, found in zip(actions, responses, read, strict=True):
        _require(found == action, f"{where}: the response {response!r} for the action {action!r} is read as {found!r}")


def _check_answer(env: gym.Env[str, str], observation: object, info: dict[str, Any], turn: int) -> None:
    where = f"turn {turn}"
    _require(
        env.observation_space.contains(cast("str", observation)),
        f"{where}: observation is {type(observation).__name__}",
    )
    missing = [key for key in INFO_KEYS if key not in info]
    _require(not missing, f"{where}: info lacks {missing}")
    key = cast("TextEnv", env.unwrapped).env_key
    strangers = [
        name for name in info if name not in INFO_KEYS and name != "stop_reason" and not name.startswith(f"{key}/")
    ]
    _require(
        not strangers, f"{where}: info holds {strangers}; what is particular to one environment stands under '{key}/'"
    )
    admissible = info["admissible"]
    listed = isinstance(admissible, tuple) and all(isinstance(action, str) for action in admissible)
    _require(listed, f"{where}: info['admissible'] must be a tuple of str")
    _require(info["turn"] == turn, f"{where}: info['turn'] is {info['turn']}")
    _require(
        isinstance(info["score"], float) and 0.0 <= info["score"] <= 1.0,
        f"{where}: score {info['score']!r} not in [0, 1]",
    )
    _require(type(info["valid"]) is bool and type(info["success"]) is bool, f"{where}: valid and success must be bool")


def _check_nonsense(env: gym.Env[str, str], text_env: TextEnv) -> None:
    before = text_env.max_turns
    text_env.max_turns = len(NONSENSE) + 1
    try:
        env.reset(seed=0, options={"task_id": text_env.tasks[0]})
        for action in NONSENSE:
            try:
                observation, _, terminated, truncated, _ = env.step(action)
            except Exception as error:
                raise ContractError(
                    f"step({action[:40]!r}) raised {error!r}; it must answer, whatever the text"
                ) from error
            _require(isinstance(observation, str), f"step({action[:40]!r}) answered {type(observation).__name__}")
            if terminated or truncated:
                env.reset(seed=0, options={"task_id": text_env.tasks[0]})
    finally:
        text_env.max_turns = before


def _check_misuse(env: gym.Env[str, str], text_env: TextEnv) -> None:
    try:
        env.reset(options={"task_id": "no such task"})
    except UnknownName:
        pass
    else:
        raise ContractError("reset() accepted an unknown task id")
    before = text_env.max_turns
    text_env.max_turns = 1
    try:
        _, info = env.reset(seed=1, options={"task_id": text_env.tasks[0]})
        _require(info["task_id"] == text_env.tasks[0], f"asked for {text_env.tasks[0]!r}, got {info['task_id']!r}")
        env.step("look")
        try:
            env.step("look")
        except EpisodeError:
            pass
        else:
            raise ContractError("step() after the end of the episode did not raise EpisodeError")
    finally:
        text_env.max_turns = before
