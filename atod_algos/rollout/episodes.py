"""Free-running episodes over one engine.

Every episode submits its next turn as soon as its own environment has answered; nothing waits for the slowest, and a
finished episode costs nothing more. The invariant: what an episode samples depends on its task, its seed and the weights,
not on which other episodes run beside it, because each request draws from its own random stream.

An algorithm may let the environment's scripted expert play an episode's first turns. They are executed and recorded, but
they have no token ids: to the policy they are part of its prompt, and nothing is learned from them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import gymnasium as gym

from agents.base import Decision
from agents.chat import ChatFormat
from agents.engines.base import Completion, Engine, SamplingParams
from agents.expert import expert_solution
from atod_algos.algorithm import RolloutLimits
from atod_envs.errors import AtodError
from atod_envs.prompting import Prompted
from atod_envs.recording import RecordTurns
from atod_envs.styles import Layout, PromptStyle, phrase_response
from atod_envs.text_env import TextEnv
from atod_envs.trajectory import Group, StopReason, Trajectory

log = logging.getLogger(__name__)

_Answer = tuple[str, float, bool, bool, dict[str, Any]]
"""What an environment's step returns."""


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """One episode to be played.

    Attributes:
        task_id: the task.
        group_id: attempts with the same group id are compared with each other.
        seed: of the environment's episode and of the sampling.
    """

    task_id: str
    group_id: str
    seed: int


OnFinish = Callable[[int], None]
"""Told the number of finished episodes."""

MoreEpisodes = Callable[[int, int], "Sequence[EpisodeSpec] | None"]
"""(places free, episodes finished) -> episodes to go on with: none of them for the moment, or None for never again."""


class Plays(Protocol):
    """Plays episodes of one split: a ``Rollout``, or something that has others play."""

    def play(
        self, specs: Sequence[EpisodeSpec], limits: RolloutLimits | None = None, on_finish: OnFinish | None = None
    ) -> list[Trajectory]:
        """Play all episodes; one trajectory each, in the order of ``specs``."""

    def play_groups(
        self, specs: Sequence[EpisodeSpec], limits: RolloutLimits | None = None, on_finish: OnFinish | None = None
    ) -> list[Group]:
        """Play all episodes and collect them by group, in order of first appearance."""


@dataclass(slots=True)
class _Episode:
    index: int
    spec: EpisodeSpec
    env: RecordTurns
    conversation: list[int] = field(default_factory=list)
    turn: int = 0
    prompt: list[int] = field(default_factory=list)


class Rollout:
    """Plays episodes of one environment with one engine.

    Args:
        engine: samples the responses.
        chat: renders messages to ids; the engine's model must share its tokenizer.
        make_env: makes a raw environment; called once for each episode that runs at the same time.
        style: the prompt style, by name or as an object.
        max_tokens: longest response, in tokens.
        temperature: of the sampling; 0 is greedy.
        concurrency: episodes that run at the same time.
        tolerated: share of the episodes whose environment may raise; they end as aborted, and nothing is learned from them.
    """

    def __init__(
        self,
        engine: Engine,
        chat: ChatFormat,
        make_env: Callable[[], gym.Env[str, str]],
        *,
        style: str | PromptStyle,
        max_tokens: int,
        temperature: float = 1.0,
        concurrency: int = 128,
        tolerated: float = 0.0,
    ) -> None:
        self.engine = engine
        self.chat = chat
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.concurrency = concurrency
        self.tolerated = tolerated
        self._make_env = make_env
        self._style = style
        self._pool: list[RecordTurns] = []
        self._threads: ThreadPoolExecutor | None = None

    def play(
        self,
        specs: Sequence[EpisodeSpec],
        limits: RolloutLimits | None = None,
        on_finish: Callable[[int], None] | None = None,
        more: MoreEpisodes | None = None,
    ) -> list[Trajectory]:
        """Play all episodes.

        Args:
            specs: what to play.
            limits: an algorithm's limits.
            on_finish: called with the number of finished episodes whenever one ends.
            more: asked for further episodes whenever there is room.

        Returns:
            One trajectory an episode, in the order of ``specs`` and of what ``more`` gave.

        Raises:
            AtodError: more environments raised than are tolerated, or one could not even begin; names the task.
        """
        finished: dict[int, Trajectory] = {}
        running: dict[str, _Episode] = {}
        stepping: dict[Future[_Answer], tuple[_Episode, str]] = {}
        waiting = deque(enumerate(specs))
        total = len(waiting)

        def end(episode: _Episode, trajectory: Trajectory) -> None:
            finished[episode.index] = trajectory
            self._pool.append(episode.env)
            if on_finish is not None:
                on_finish(len(finished))

        failed: list[int] = []

        def step(episode: _Episode, response: str, call: Callable[[], _Answer]) -> _Answer | None:
            """The environment's answer; None where it raised and the episode is given up."""
            try:
                return call()
            except AtodError:
                raise
            except Exception as error:
                failed.append(episode.index)
                place = f"turn {episode.turn} of task {episode.spec.task_id!r} (seed {episode.spec.seed})"
                what = f"the environment raised {type(error).__name__}: {error} at {place}, answering {response!r}"
                if len(failed) > self.tolerated * total:
                    raise AtodError(
                        f"{what}; {len(failed)} of {total} episodes have failed so. Mend the environment and run the same "
                        "command to go on from the last checkpoint"
                    ) from error
                log.warning("%s; the episode is left out", what)
                finished[episode.index] = episode.env.close_episode(StopReason.ABORTED)
                with contextlib.suppress(Exception):  # it is broken: whether it can still be closed does not matter
                    episode.env.close()
                if on_finish is not None:
                    on_finish(len(finished))
                return None

        def ask(episode: _Episode, message: str, stopped: bool) -> None:
            """Submit the next turn, or end the episode where it no longer fits the context."""
            style = cast("Prompted", episode.env.env).style
            if style.layout is Layout.WINDOW or not episode.conversation:
                episode.prompt = self.chat.opening(message)
            else:
                episode.prompt = episode.conversation + self.chat.continuation(message, stopped)
            if len(episode.prompt) + self.max_tokens > self.engine.max_context:
                end(episode, episode.env.close_episode(StopReason.CONTEXT_LIMIT))
                return
            request = f"{episode.index}/{episode.turn}"
            running[request] = episode
            self.engine.submit(request, episode.prompt, self._params(episode))

        def settle(episode: _Episode, answer: _Answer | None, stopped: bool) -> None:
            if answer is None:
                return
            message, _, terminated, truncated, info = answer
            episode.turn += 1
            if terminated or truncated:
                end(episode, info["trajectory"])
            else:
                ask(episode, message, stopped)

        while waiting or running or stepping or more is not None:
            room = self.concurrency - len(running) - len(stepping)
            if more is not None and not waiting and room > 0:
                further = more(room, len(finished))
                if further is None:
                    more = None
                else:
                    waiting.extend(enumerate(further, total))
                    total += len(further)
            while waiting and len(running) + len(stepping) < self.concurrency:
                index, spec = waiting.popleft()
                episode = _Episode(index, spec, self._environment(limits))
                message, trajectory = self._begin_or_say(episode, limits)
                if trajectory is None:
                    ask(episode, message, True)
                else:
                    end(episode, trajectory)
            for completion in self.engine.step():
                episode = running.pop(completion.request_id)
                self._note(episode, completion)
                response = self.chat.decode(completion.token_ids)
                if cast("TextEnv", episode.env.unwrapped).blocking:
                    self._threads = self._threads or ThreadPoolExecutor(max_workers=64, thread_name_prefix="env")
                    stepping[self._threads.submit(episode.env.step, response)] = episode, response
                else:
                    answer = step(episode, response, partial(episode.env.step, response))
                    settle(episode, answer, completion.stopped)
            if stepping:
                done, _ = wait(stepping, timeout=None if not running else 0, return_when=FIRST_COMPLETED)
                for future in done:
                    episode, response = stepping.pop(future)
                    answer = step(episode, response, future.result)
                    settle(episode, answer, episode.conversation[-1] in self.chat.stop_ids)
        return [finished[index] for index in range(total)]

    def play_groups(
        self,
        specs: Sequence[EpisodeSpec],
        limits: RolloutLimits | None = None,
        on_finish: Callable[[int], None] | None = None,
    ) -> list[Group]:
        """Play all episodes and collect them by ``group_id``, in order of first appearance."""
        return collect_groups(self.play(specs, limits, on_finish))

    def close(self) -> None:
        """Close the environments; the engine stays."""
        for env in self._pool:
            env.close()
        self._pool.clear()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _environment(self, limits: RolloutLimits | None) -> RecordTurns:
        env = self._pool.pop() if self._pool else RecordTurns(Prompted(self._make_env(), self._style))
        text_env = cast("TextEnv", env.unwrapped)
        own = text_env.configured_max_turns
        text_env.max_turns = own if limits is None or limits.max_turns is None else min(own, limits.max_turns)
        return env

    def _begin_or_say(self, episode: _Episode, limits: RolloutLimits | None) -> tuple[str, Trajectory | None]:
        try:
            return self._begin(episode, limits)
        except AtodError:
            raise
        except Exception as error:
            raise AtodError(
                f"the environment raised {type(error).__name__}: {error} at the beginning of task {episode.spec.task_id!r} "
                f"(seed {episode.spec.seed}). Mend it and run the same command to go on from the last checkpoint"
            ) from error

    def _begin(self, episode: _Episode, limits: RolloutLimits | None) -> tuple[str, Trajectory | None]:
        """Start an episode and play the expert's turns of it; the first message to the policy, or the end."""
        spec, env = episode.spec, episode.env
        ahead: Sequence[Decision] = ()
        if limits is not None and limits.expert_leaves is not None:
            solution = expert_solution(env, spec.task_id, spec.seed)
            ahead = solution[: max(0, len(solution) - limits.expert_leaves)]
        env.group_id, env.policy_version = spec.group_id, self.engine.version
        message, _ = env.reset(seed=spec.seed, options={"task_id": spec.task_id})
        for decision in ahead:
            prompted = cast("Prompted", env.env)
            response = phrase_response(prompted.style, decision.action, decision.thought, prompted.history)
            before = (
                episode.conversation + self.chat.continuation(message) if episode.turn else self.chat.opening(message)
            )
            episode.conversation = before + self.chat.encode_response(response)
            episode.turn += 1
            message, _, terminated, truncated, info = env.step(response)
            if terminated or truncated:
                return message, info["trajectory"]
        return message, None

    def _params(self, episode: _Episode) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=derive_seed(episode.spec.seed, "turn", episode.turn),
            stop_ids=self.chat.stop_ids,
        )

    def _note(self, episode: _Episode, completion: Completion) -> None:
        episode.conversation = [*episode.prompt, *completion.token_ids]
        episode.env.annotate(
            prompt_ids=episode.prompt,
            response_ids=completion.token_ids,
            logprobs=completion.logprobs,
            seconds_policy=completion.seconds,
        )


def collect_groups(trajectories: Iterable[Trajectory]) -> list[Group]:
    """Trajectories by ``group_id``, in order of first appearance."""
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.group_id, []).append(trajectory)
    return [Group(members[0].task_id, tuple(members)) for members in groups.values()]


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts: the one way in which seeds are made from other seeds."""
    text = "\x00".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
