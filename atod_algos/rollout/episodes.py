"""The turn loop: plays many episodes at once, whichever actor answers their turns.

Every episode asks for its next turn as soon as its own environment has answered. Nothing waits for the slowest, and a
finished episode costs nothing more. The invariant: what an episode samples depends on its task, its seed and the
weights, not on which other episodes run at the same time, because each request draws from its own random stream.

A turn is answered by the student (a language model on an engine, many turns in one forward pass), by an agent (a
scripted expert, a random agent, a model behind a server), or as it was answered before (a stored episode). An
algorithm's ``TurnPlan`` says which. Turns of others than the one who is learned from are executed and recorded, but
they have no token ids: they are part of the prompt that follows them, and nothing is learned from them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import gymnasium as gym

from agents.base import Agent, Decision
from agents.chat import ChatFormat
from agents.engines.base import Engine
from agents.expert import expert_for, expert_solution
from agents.policy import Phrased, Policy, next_prompt
from atod_algos.algorithm import RolloutLimits
from atod_algos.rollout.groups import collect_groups
from atod_algos.rollout.stage import Stage
from atod_algos.turn_plans import EpisodeSpec as EpisodeSpec
from atod_algos.turn_plans import Replay, Role, TurnActor
from atod_envs.errors import AtodError
from atod_envs.prompting import Prompted
from atod_envs.recording import RecordTurns
from atod_envs.styles import PromptStyle, phrase_response, read_response
from atod_envs.text_env import TextEnv
from atod_envs.trajectory import Group, StopReason, Trajectory

log = logging.getLogger(__name__)

_THREADS = 64
"""Environments that wait for something at the same time."""


OnFinish = Callable[[int], None]
"""Told the number of finished episodes."""

Play = Callable[..., Sequence[Trajectory]]
"""(specs, limits=..., on_finish=...) -> one trajectory each: ``Rollout.play``, or a pool's with split and temperature
chosen."""

MoreEpisodes = Callable[[int, int], "Sequence[EpisodeSpec] | None"]
"""(places free, episodes finished) -> episodes to go on with: none of them for the moment, or None for never again."""

MakeAgent = Callable[[gym.Env[str, str], int], Agent]
"""(environment, seed of the episode) -> the agent that plays it."""


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts: the one way in which seeds are made from other seeds."""
    text = "\x00".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def turn_seed(seed: int, turn: int) -> int:
    """Seed of the sampling of one turn (from 0) of an episode."""
    return derive_seed(seed, "turn", turn)


class Rollout:
    """Plays episodes of one environment, or of several.

    Args:
        engine: samples the student's responses; None where the student plays no turn.
        chat: renders messages to ids; the engine's model must share its tokenizer. None where no actor works on tokens.
        make_env: makes a raw environment; called once for each episode that runs at the same time.
        style: the prompt style, by name or as an object; None leaves the environment raw (for agents).
        max_tokens: longest response, in tokens.
        temperature: of the sampling; 0 is greedy.
        max_context: longest prompt plus response, where it is less than the engine's own.
        concurrency: episodes that run at the same time.
        tolerated: share of the episodes whose environment may raise; they end as aborted, and nothing is learned from
            them.
        agent: makes the agent that plays every turn, instead of the student.
        agent_waits: that agent waits for something (a server), so it is asked in a thread.
        seed_of_turn: (episode's seed, turn) -> seed of the sampling.
        others: further environments, whose episodes have ``world`` 1, 2, ...; the one above is 0.
        teacher: answers the turns that a plan gives to the teacher, on an engine of its own.
    """

    def __init__(
        self,
        engine: Engine | None,
        chat: ChatFormat | None,
        make_env: Callable[[], gym.Env[str, str]],
        *,
        style: str | PromptStyle | None,
        max_tokens: int = 1,
        temperature: float = 1.0,
        max_context: int | None = None,
        concurrency: int = 128,
        tolerated: float = 0.0,
        agent: MakeAgent | None = None,
        agent_waits: bool = False,
        seed_of_turn: Callable[[int, int], int] = turn_seed,
        others: Sequence[Stage] = (),
        teacher: Policy | None = None,
    ) -> None:
        self.engine, self.chat = engine, chat
        policy = None
        if engine is not None and chat is not None:
            policy = Policy(engine, chat, max_tokens, temperature, max_context)
        self.stages = (Stage(make_env, style, policy, teacher), *others)
        asked = [player.engine for stage in self.stages for player in (stage.policy, stage.teacher) if player]
        self.engines = list(dict.fromkeys(asked))
        self.concurrency, self.tolerated = concurrency, tolerated
        self.agent, self.agent_waits, self.seed_of_turn = agent, agent_waits, seed_of_turn
        self.threads = ThreadPoolExecutor(concurrency if agent_waits else _THREADS, thread_name_prefix="env")

    def play(
        self,
        specs: Sequence[EpisodeSpec],
        limits: RolloutLimits | None = None,
        on_finish: OnFinish | None = None,
        more: MoreEpisodes | None = None,
        on_trajectory: Callable[[Trajectory], None] | None = None,
        whole: int | None = None,
    ) -> list[Trajectory]:
        """Play all episodes.

        Args:
            specs: what to play.
            limits: an algorithm's limits.
            on_finish: called with the number of finished episodes whenever one ends.
            more: asked for further episodes whenever there is room.
            on_trajectory: called with every episode when it ends.
            whole: how many episodes these are a part of, for ``tolerated``; by default they are all.

        Returns:
            One trajectory an episode, in the order of ``specs`` and of what ``more`` gave.

        Raises:
            AtodError: more environments raised than are tolerated, or one could not even begin; names the task.
            Exception: whatever an agent raised first.
        """
        return _Play(self, specs, limits or RolloutLimits(), on_finish, more, on_trajectory, whole).run()

    def play_groups(
        self, specs: Sequence[EpisodeSpec], limits: RolloutLimits | None = None, on_finish: OnFinish | None = None
    ) -> list[Group]:
        """Play all episodes and collect them by ``group_id``, in order of first appearance."""
        return collect_groups(self.play(specs, limits, on_finish))

    def close(self) -> None:
        """Close the environments; the engine stays."""
        self.threads.shutdown(wait=self.agent_waits, cancel_futures=True)
        for stage in self.stages:
            stage.close()


@dataclass(slots=True)
class _Episode:
    index: int
    spec: EpisodeSpec
    stage: Stage
    env: RecordTurns
    actor: TurnActor
    learned: tuple[Role, ...] = ("student",)
    agent: Agent | None = None
    conversation: list[int] = field(default_factory=list)
    turn: int = 0
    prompt: list[int] = field(default_factory=list)
    role: Role = "student"


_Answer = tuple[str, float, bool, bool, dict[str, Any]]
"""What an environment's step returns."""


class _Play:
    """The episodes of one call of ``Rollout.play``."""

    def __init__(
        self,
        rollout: Rollout,
        specs: Sequence[EpisodeSpec],
        limits: RolloutLimits,
        on_finish: OnFinish | None,
        more: MoreEpisodes | None,
        on_trajectory: Callable[[Trajectory], None] | None,
        whole: int | None,
    ) -> None:
        self.rollout, self.limits, self.whole = rollout, limits, whole
        self.on_finish, self.more, self.on_trajectory = on_finish, more, on_trajectory
        self.waiting = deque(enumerate(specs))
        self.total = len(self.waiting)
        self.finished: dict[int, Trajectory] = {}
        self.asked: dict[str, _Episode] = {}
        self.pending: dict[Future[Any], Callable[[Callable[[], Any]], str | None]] = {}
        self.episode_of: dict[Future[Any], _Episode] = {}
        self.failed = 0

    def run(self) -> list[Trajectory]:
        rollout = self.rollout
        while self.waiting or self.asked or self.pending or self.more is not None:
            self._refill()
            while self.waiting and len(self.asked) + len(self.pending) < rollout.concurrency:
                self._start(*self.waiting.popleft())
            for completion in [completion for engine in rollout.engines for completion in engine.step()]:
                episode = self.asked.pop(completion.request_id)
                assert rollout.chat is not None
                response = rollout.chat.decode(completion.token_ids)
                ids, logprobs, seconds = completion.token_ids, completion.logprobs, completion.seconds
                self._go_on(episode, self._say(episode, episode.role, response, ids, logprobs, seconds))
            if self.pending:
                done, _ = wait(self.pending, timeout=0 if self.asked else None, return_when=FIRST_COMPLETED)
                for future in done:
                    then, episode = self.pending.pop(future), self.episode_of.pop(future)
                    self._go_on(episode, then(future.result))
        return [self.finished[index] for index in range(self.total)]

    def _refill(self) -> None:
        room = self.rollout.concurrency - len(self.asked) - len(self.pending)
        if self.more is not None and not self.waiting and room > 0:
            further = self.more(room, len(self.finished))
            if further is None:
                self.more = None
            else:
                self.waiting.extend(enumerate(further, self.total))
                self.total += len(further)

    def _start(self, index: int, spec: EpisodeSpec) -> None:
        stage = self.rollout.stages[spec.world]
        env = stage.take(self.limits)
        plan, agent = self.limits.who, None
        env.group_id = spec.group_id
        if self.rollout.engine is not None:
            env.policy_version = self.rollout.engine.version
        try:
            if self.rollout.agent is not None:
                agent = self.rollout.agent(env, spec.seed)
                episode = _Episode(index, spec, stage, env, lambda turn: "expert", agent=agent)
            elif plan is None:
                episode = _Episode(index, spec, stage, env, lambda turn: "student")
            else:
                actor = plan.begin(spec, partial(expert_solution, env, spec.task_id, spec.seed))
                if plan.expert_watches:
                    agent = Phrased(expert_for(env, brief=True), cast("Prompted", env.env))
                episode = _Episode(index, spec, stage, env, actor, plan.learned, agent)
            message, info = env.reset(seed=spec.seed, options={"task_id": spec.task_id})
            if agent is not None:
                agent.reset(message, info)
        except AtodError:
            raise
        except Exception as error:
            raise AtodError(
                f"the environment raised {type(error).__name__}: {error} at the beginning of task {spec.task_id!r} "
                f"(seed {spec.seed}). Fix it and run the same command to go on from the last checkpoint"
            ) from error
        self._go_on(episode, message)

    def _go_on(self, episode: _Episode, message: str | None) -> None:
        """Play turns until an answer has to be waited for, or the episode ends (then there is no message)."""
        rollout = self.rollout
        while message is not None:
            actor = episode.actor(episode.turn)
            if actor is None:
                self._end(episode, episode.env.close_episode(StopReason.TURN_LIMIT))
                return
            policy = episode.stage.teacher if actor == "teacher" else episode.stage.policy
            if rollout.chat is not None:
                layout = cast("Prompted", episode.env.env).style.layout
                episode.prompt = next_prompt(rollout.chat, layout, episode.conversation, message)
                if actor in ("student", "teacher", *episode.learned) and policy and not policy.fits(episode.prompt):
                    self._end(episode, episode.env.close_episode(StopReason.CONTEXT_LIMIT))
                    if not episode.turn:
                        log.warning(
                            "task %r: the first prompt has %d tokens; with %d for the response it does not fit a context of %d",
                            episode.spec.task_id,
                            len(episode.prompt),
                            policy.max_tokens,
                            policy.context,
                        )
                    return
            if actor in ("student", "teacher"):
                if policy is None:
                    raise ValueError(f"the {actor} is to play a turn, and the rollout has no engine to ask")
                episode.role = actor
                request = f"{episode.index}/{episode.turn}"
                self.asked[request] = episode
                policy.submit(request, episode.prompt, rollout.seed_of_turn(episode.spec.seed, episode.turn))
                return
            if isinstance(actor, Replay):
                message = self._again(episode, actor)
                continue
            if isinstance(actor, Decision):
                prompted = cast("Prompted", episode.env.env)
                response = phrase_response(prompted.style, actor.action, actor.thought, prompted.history)
                message = self._say(episode, None, response)
                continue
            if episode.agent is None:
                raise ValueError("the expert is to play a turn, but the plan does not let it watch the episode")
            if rollout.agent_waits:
                self._later(episode, episode.agent.act, lambda get: self._say(episode, "expert", get().action))
                return
            message = self._say(episode, "expert", episode.agent.act().action)

    def _again(self, episode: _Episode, stored: Replay) -> str | None:
        """Play a stored turn where it was played before."""
        shown = episode.env.trajectory.final_observation
        if shown != stored.observation:
            raise AtodError(
                f"the stored episode of task {episode.spec.task_id!r} cannot be played again: before turn {episode.turn} it was shown "
                f"{stored.observation!r}, the environment shows {shown!r}; give episodes of the same data, options and seeds"
            )
        response, prompted = stored.response, cast("Prompted", episode.env.env)
        if not stored.ids and read_response(prompted.style, response, prompted.history).action != stored.action:
            response = phrase_response(prompted.style, stored.action, "", prompted.history)
        return self._say(episode, None, response, stored.ids)

    def _say(
        self,
        episode: _Episode,
        role: Role | None,
        response: str,
        ids: Sequence[int] = (),
        logprobs: Sequence[float] = (),
        seconds: float | None = None,
    ) -> str | None:
        """Execute a response; the environment's next message, or None where it has ended or is waited for."""
        chat, env = self.rollout.chat, episode.env
        if chat is not None:
            if not ids and role not in ("student", "teacher"):
                ids = chat.encode_response(response)
                logprobs = (0.0,) * len(ids)
            if role in episode.learned:
                env.annotate(prompt_ids=episode.prompt, response_ids=ids, logprobs=logprobs, seconds_policy=seconds)
            episode.conversation = chat.remember(episode.prompt, ids)
        then = partial(self._said, episode, response)
        if cast("TextEnv", env.unwrapped).blocking:
            self._later(episode, partial(env.step, response), then)
            return None
        return then(partial(env.step, response))

    def _said(self, episode: _Episode, response: str, call: Callable[[], _Answer]) -> str | None:
        try:
            message, _, terminated, truncated, info = call()
        except AtodError:
            raise
        except Exception as error:
            self._give_up(episode, response, error)
            return None
        episode.turn += 1
        if terminated or truncated:
            self._end(episode, info["trajectory"])
            return None
        if episode.agent is not None:
            episode.agent.observe(response, message, info)
        return message

    def _later(
        self, episode: _Episode, work: Callable[[], Any], then: Callable[[Callable[[], Any]], str | None]
    ) -> None:
        future = self.rollout.threads.submit(work)
        self.pending[future], self.episode_of[future] = then, episode

    def _end(self, episode: _Episode, trajectory: Trajectory) -> None:
        self.finished[episode.index] = trajectory
        episode.stage.idle.append(episode.env)
        self._tell(trajectory)

    def _give_up(self, episode: _Episode, response: str, error: Exception) -> None:
        """Leave an episode out whose environment raised, if so many may be left out."""
        self.failed += 1
        place = f"turn {episode.turn} of task {episode.spec.task_id!r} (seed {episode.spec.seed})"
        what = f"the environment raised {type(error).__name__}: {error} at {place}, answering {response!r}"
        whole = self.total if self.whole is None else self.whole
        if self.failed > self.rollout.tolerated * whole:
            raise AtodError(
                f"{what}; {self.failed} of {whole} episodes have failed so. Fix the environment and run the same "
                "command to go on from the last checkpoint"
            ) from error
        log.warning("%s; the episode is left out", what)
        trajectory = self.finished[episode.index] = episode.env.close_episode(StopReason.ABORTED)
        with contextlib.suppress(Exception):  # it is broken: whether it can still be closed does not matter
            episode.env.close()
        self._tell(trajectory)

    def _tell(self, trajectory: Trajectory) -> None:
        if self.on_trajectory is not None:
            self.on_trajectory(trajectory)
        if self.on_finish is not None:
            self.on_finish(len(self.finished))
