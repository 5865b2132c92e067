"""Episodes of agents, a few at a time in threads: scripted ones, and models behind a server.

The invariant: an agent that fails to answer ends the whole evaluation with its error; episodes that had ended are kept, and nothing
is counted that was not played. (Language models on an engine of our own run in ``rollout``, batched.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, Lock, local
from typing import Any

import gymnasium as gym

from agents.base import Agent
from atod_algos.rollout.episodes import EpisodeSpec
from atod_envs.errors import DataError
from atod_envs.recording import RecordTurns
from atod_envs.trajectory import Trajectory, from_record, to_record


def play_episode(env: RecordTurns, agent: Agent, spec: EpisodeSpec) -> Trajectory:
    """Play one episode and return its record."""
    env.group_id = spec.group_id
    observation, info = env.reset(seed=spec.seed, options={"task_id": spec.task_id})
    agent.reset(observation, info)
    over = False
    while not over:
        action = agent.act().action
        observation, _, terminated, truncated, info = env.step(action)
        over = terminated or truncated
        if not over:
            agent.observe(action, observation, info)
    trajectory: Trajectory = info["trajectory"]
    return trajectory


def play_agents(
    make_agent: Callable[[gym.Env[str, str], int], Agent],
    make_env: Callable[[], gym.Env[str, str]],
    specs: Sequence[EpisodeSpec],
    *,
    concurrency: int = 1,
    on_finish: Callable[[Trajectory], None] | None = None,
) -> list[Trajectory]:
    """Play episodes, each with an agent of its own.

    Args:
        make_agent: from (environment, seed of the episode) to an agent.
        make_env: makes an environment, prompted or raw; called once a thread.
        specs: what to play.
        concurrency: episodes at the same time.
        on_finish: called with each finished episode, one call at a time.

    Returns:
        One trajectory an episode, in the order of ``specs``.

    Raises:
        Exception: whatever an agent or environment raised first; the other episodes are stopped.
    """
    own, lock, stop, opened = local(), Lock(), Event(), list[RecordTurns]()

    def one(spec: EpisodeSpec) -> Trajectory | None:
        if stop.is_set():
            return None
        if not hasattr(own, "env"):
            with lock:  # an environment's first construction may build caches
                own.env = RecordTurns(make_env())
                opened.append(own.env)
        try:
            trajectory = play_episode(own.env, make_agent(own.env, spec.seed), spec)
        except BaseException:
            stop.set()  # here, not where the error arrives: this thread takes the next episode at once
            raise
        if on_finish is not None:
            with lock:
                on_finish(trajectory)
        return trajectory

    try:
        with ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="episode") as pool:
            futures = [pool.submit(one, spec) for spec in specs]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
            for future in futures:
                if future in done and future.exception() is not None:
                    raise future.exception()  # type: ignore[misc]
        return [trajectory for future in futures if (trajectory := future.result()) is not None]
    finally:
        for env in opened:
            env.close()


class EpisodeJournal:
    """Episodes written down as they end, so that a broken evaluation goes on where it stopped.

    Args:
        path: of the journal; one JSON record a line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Trajectory]:
        """What was played before; a line that was cut off is dropped."""
        kept: list[Trajectory] = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    kept.append(from_record(json.loads(line), str(self.path)))
                except (json.JSONDecodeError, DataError):
                    break
            self.path.write_text("".join(_line(trajectory) for trajectory in kept), encoding="utf-8")
        return kept

    def add(self, trajectory: Trajectory) -> None:
        """Append an episode."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(trajectory))

    def drop(self) -> None:
        """Delete the journal: its episodes are stored elsewhere."""
        self.path.unlink(missing_ok=True)


def _line(trajectory: Trajectory) -> str:
    record: dict[str, Any] = to_record(trajectory)
    return json.dumps(record, ensure_ascii=True, separators=(",", ":")) + "\n"
