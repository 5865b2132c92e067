"""Episodes to learn from by supervision: played by the expert with the student mixed in, or read from files.

The invariant: in what is handed on, exactly the turns that are learned from carry token ids. All other turns are
context.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import gymnasium as gym
import numpy as np

from agents.base import Decision
from agents.chat import ChatFormat
from agents.engines.base import Engine
from agents.engines.transformers import TransformersEngine
from agents.logits import limit_vocabulary, usable_ids
from agents.policy import next_prompt
from atod_algos.algorithm import RolloutLimits
from atod_algos.learner.lora import merged_weights
from atod_algos.rollout.episodes import Rollout, derive_seed
from atod_algos.turn_plans import EpisodeSpec, Role, TurnActor, TurnPlan
from atod_envs.errors import AtodError
from atod_envs.stored import episode_files, read_episodes
from atod_envs.styles import History, PromptStyle, phrase_response, read_response
from atod_envs.text_env import TextEnv
from atod_envs.trajectory import StopReason, Trajectory, Turn, to_record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImitationOptions:
    """How a model is fitted to demonstrations."""

    rounds: int = 40
    """Rounds; each plays fresh episodes with the current model, or takes the next recorded ones, and fits it to
    them."""
    episodes: int = 256
    """Episodes a round."""
    epochs: int = 2
    """Passes over a round's episodes."""
    first_beta: float = 0.1
    """Share of turns that the student acts in itself in the second round (in the first it never does)."""
    last_beta: float = 0.7
    """The same in the last round; in between the share rises linearly."""
    lr: float = 3e-3
    """Peak learning rate; it falls to a tenth along a cosine."""
    batch_tokens: int = 4096
    """Tokens of a mini-batch."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    warmup: float = 0.05
    """Share of the training over which the rate rises."""
    stop: int | None = None
    """Rounds after which it stops early, on the schedule of all of them; by default it plays them all."""
    seed: int = 0
    """Seed of tasks, coins, sampling and mini-batches."""


@dataclass(frozen=True)
class Mixture(TurnPlan):
    """The expert answers every turn, but the student plays a share of them, from wherever that leads.

    Attributes:
        coin_NT: whether the student plays turn t of episode n, whose group id is n; the last column holds for all later
            turns.
    """

    coin_NT: np.ndarray

    @property
    def learned(self) -> tuple[Role, ...]:
        """The expert's turns."""
        return ("expert",)

    @property
    def expert_watches(self) -> bool:
        """It answers wherever the student leads."""
        return True

    def begin(self, spec: EpisodeSpec, solution: Callable[[], Sequence[Decision]]) -> TurnActor:
        """See :class:`TurnPlan`."""
        coin_T = self.coin_NT[int(spec.group_id)]
        return lambda turn: "student" if coin_T[min(turn, len(coin_T) - 1)] else "expert"


def demonstrate(
    tasks: Sequence[str],
    make_env: Callable[[], gym.Env[str, str]],
    chat: ChatFormat,
    *,
    style: str | PromptStyle,
    seed: int,
    beta: float = 0.0,
    engine: Engine | None = None,
    max_tokens: int = 24,
) -> list[Trajectory]:
    """Play tasks with the expert, letting the student act in some turns.

    Args:
        tasks: what to play, one episode each.
        make_env: makes a raw environment.
        chat: renders messages to ids.
        style: prompt style; the conversation layout shows earlier turns, the window layout does not.
        seed: of the coins and the sampling.
        beta: probability that a turn is the student's own.
        engine: samples the student's turns; needed where ``beta`` is above 0.
        max_tokens: longest response of the student.

    Returns:
        One episode a task. The expert's turns carry token ids, the student's have none: they are context.
    """
    if beta > 0 and engine is None:
        raise ValueError("beta > 0 needs an engine that samples the student's turns")
    specs = [EpisodeSpec(task, str(n), derive_seed(seed, n)) for n, task in enumerate(tasks)]
    plan = Mixture(np.random.default_rng(seed).random((len(tasks), 256)) < beta)
    rollout = Rollout(
        engine, chat, make_env, style=style, max_tokens=max_tokens, concurrency=256, seed_of_turn=derive_seed
    )
    try:
        return rollout.play(specs, RolloutLimits(who=plan))
    finally:
        rollout.close()


class Expert:
    """Episodes of the scripted expert, with the student acting in a share of the turns that rises from round to round.

    Args:
        model: the student; its present weights act.
        chat: renders messages to ids.
        make_env: makes a raw environment; asked anew each round, so what it makes may change from one to the next.
        options: how many episodes, and which shares.
        style: prompt style.
        max_tokens: longest response of the student.
        max_context: longest prompt plus response.
        tasks: what episodes are drawn from; by default all tasks of the environment's split.
    """

    def __init__(
        self,
        model: Any,
        chat: ChatFormat,
        make_env: Callable[[], gym.Env[str, str]],
        options: ImitationOptions,
        *,
        style: str | PromptStyle,
        max_tokens: int,
        max_context: int,
        tasks: Sequence[str] | None = None,
    ) -> None:
        self._model, self._chat, self._make_env, self._options = model, chat, make_env, options
        self._style, self._max_tokens, self._tasks = style, max_tokens, tasks
        # Adapters' sums are weights that the student itself does not have.
        adapted = any(".lora_" in name for name, _ in model.named_parameters())
        self._acting = _without_adapters(model) if adapted else model
        # As many slots as a round has episodes: every slot costs the memory of a whole conversation.
        self._engine = TransformersEngine(self._acting, slots=min(256, options.episodes), max_context=max_context)

    def __call__(self, number: int) -> list[Trajectory]:
        """The episodes of a round (from 0), played with the student's present weights."""
        options, seed = self._options, derive_seed(self._options.seed, "round", number)
        self._engine.load_weights(merged_weights(self._model))
        drawn_from = _tasks_of(self._make_env) if self._tasks is None else self._tasks
        places = np.random.default_rng(seed).integers(len(drawn_from), size=options.episodes)
        rise = (number - 1) / max(1, options.rounds - 2)
        beta = 0.0 if number == 0 else options.first_beta + (options.last_beta - options.first_beta) * rise
        played = demonstrate(
            [drawn_from[int(i)] for i in places],
            self._make_env,
            self._chat,
            style=self._style,
            seed=seed,
            beta=beta,
            engine=self._engine,
            max_tokens=self._max_tokens,
        )
        self._engine.sleep()  # its keys and values are of no use to the fit, nor to the next round's weights
        return played


def _without_adapters(model: Any) -> Any:
    """A plain model of the same form, whose weights are loaded before it plays."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if hasattr(module, "base_layer"):
            plain.set_submodule(name, module.base_layer)
    limit_vocabulary(plain, usable_ids(model).tolist())
    return plain


def _tasks_of(make_env: Callable[[], gym.Env[str, str]]) -> Sequence[str]:
    env = make_env()
    env.close()
    return cast("TextEnv", env.unwrapped).tasks


# --- recorded episodes ---------------------------------------------------------------------------------------------


def read_recorded(paths: Iterable[str | Path], *, only: Literal["all", "success"], best_of: int) -> list[Trajectory]:
    """Read and choose recorded episodes.

    Args:
        paths: files (``.jsonl``, ``.jsonl.gz``, ``.parquet``), or folders of runs and evaluations, whose
            ``trajectories/`` and ``episodes/`` are taken.
        only: keep all episodes, or solved ones alone; those that were aborted never count.
        best_of: keep so many of each task, the highest score first, then the fewest turns; 0 keeps all.

    Raises:
        AtodError: nothing is there, or nothing is left.
        DataError: a file is broken.
    """
    files = [file for path in paths for file in episode_files(path, "--source", "'expert', ")]
    found = [t for file in files for t in read_episodes(file) if t.turns and t.stop_reason is not StopReason.ABORTED]
    kept = [t for t in found if t.success or only == "all"]
    if best_of:
        by_task: dict[str, list[Trajectory]] = {}
        for trajectory in kept:
            by_task.setdefault(trajectory.task_id, []).append(trajectory)
        kept = [t for same in by_task.values() for t in sorted(same, key=lambda t: (-t.score, len(t.turns)))[:best_of]]
    if not kept:
        raise AtodError(
            f"of {len(found)} recorded episodes in {len(files)} files none is left with --only {only}; give other --source files, or "
            "--only all"
        )
    return kept


def require_episodes_of(trajectories: Sequence[Trajectory], env: str, split: str) -> None:
    """Refuse episodes of another environment; one line says how many are of tasks that a model is judged by.

    Args:
        trajectories: the episodes.
        env: registered id of the environment that is learned.
        split: its split for training.

    Raises:
        AtodError: one is of another environment.
    """
    others = {trajectory.env_id for trajectory in trajectories} - {env.rpartition(":")[2]}
    if others:
        raise AtodError(
            f"--source holds episodes of {', '.join(sorted(others))}, but --env is {env}; give episodes of one environment"
        )
    held_out = sum(trajectory.split != split for trajectory in trajectories)
    if held_out:
        log.warning(
            "%d of %d recorded episodes are not of the split %r; do not judge the model by their tasks",
            held_out,
            len(trajectories),
            split,
        )


def episodes_digest(trajectories: Iterable[Trajectory]) -> str:
    """Digest of episodes, in their order: equal digests, equal demonstrations."""
    whole = hashlib.blake2b(digest_size=8)
    for trajectory in trajectories:
        whole.update(json.dumps(to_record(trajectory)).encode() + b"\n")
    return whole.hexdigest()


def tokenized(
    trajectories: Iterable[Trajectory], style: PromptStyle, chat: ChatFormat, max_context: int
) -> list[Trajectory]:
    """Recorded episodes with the ids that a student would have been shown and is to say; every turn is learned from.

    Prompts are written by the style, whatever the episode was played with. A response is kept as it stands where the
    style reads the recorded action in it and in the right form; else the action is phrased by the style. Turns whose
    prompt and response do not fit are left out, and in a conversation everything after them.

    Args:
        trajectories: the episodes.
        style: the prompt style in the student's layout.
        chat: renders messages to ids.
        max_context: longest prompt plus response, in tokens.

    Raises:
        AtodError: not one turn fits.
    """
    laid = [_tokenized(trajectory, style, chat, max_context) for trajectory in trajectories]
    lost = sum(not turn.prompt_ids for trajectory in laid for turn in trajectory.turns)
    total = sum(len(trajectory.turns) for trajectory in laid)
    if lost == total:
        raise AtodError(
            f"not one of {total} recorded turns fits --max-context {max_context}; raise it as far as the model's own limit, or choose a "
            "shorter prompt --style"
        )
    if lost:
        log.warning("%d of %d recorded turns do not fit --max-context %d; they are left out", lost, total, max_context)
    return [trajectory for trajectory in laid if any(turn.prompt_ids for turn in trajectory.turns)]


def _tokenized(trajectory: Trajectory, style: PromptStyle, chat: ChatFormat, max_context: int) -> Trajectory:
    history = History(trajectory.task)
    conversation: list[int] = []
    turns: list[Turn] = []
    for turn in trajectory.turns:
        history.observations.append(turn.observation)
        history.admissible = turn.admissible
        response = turn.response
        parsed = read_response(style, response, history)
        if parsed.action != turn.action or not parsed.format_ok:
            response = phrase_response(style, turn.action, "", history)
        prompt = next_prompt(chat, style.layout, conversation, style.prompt(history))
        ids = chat.encode_response(response)
        fits = len(prompt) + len(ids) <= max_context
        conversation = chat.remember(prompt, ids)
        turns.append(
            dataclasses.replace(
                turn,
                prompt_ids=tuple(prompt) if fits else (),
                response_ids=tuple(ids) if fits else (),
                logprobs=(0.0,) * len(ids) if fits else (),
                response=response,
            )
        )
        history.actions.append(turn.action)
    return dataclasses.replace(trajectory, turns=tuple(turns))


class Recorded:
    """Recorded episodes, so many a round, in a new order each time all have been taken.

    Args:
        trajectories: the episodes, with token ids.
        options: how many a round.
    """

    def __init__(self, trajectories: Sequence[Trajectory], options: ImitationOptions) -> None:
        self._all, self._options = trajectories, options

    def __call__(self, number: int) -> list[Trajectory]:
        """The episodes of a round (from 0)."""
        size, count = len(self._all), min(self._options.episodes, len(self._all))
        chosen = []
        for place in range(number * count, (number + 1) * count):
            epoch, index = divmod(place, size)
            order = np.random.default_rng(derive_seed(self._options.seed, "order", epoch)).permutation(size)
            chosen.append(self._all[int(order[index])])
        return chosen
