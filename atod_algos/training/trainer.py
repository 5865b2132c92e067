"""The one training loop: rollout -> score -> advantage -> update -> log -> checkpoint.

It knows no algorithm by name. The invariant: everything random in a step is derived from (seed, step), so a run that
was killed and resumed from a checkpoint computes exactly what an uninterrupted one does.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agents.logits import limit_vocabulary, usable_ids
from agents.models import LoadedModel, device_of, like, load_model
from atod_algos.algorithm import Algorithm, RolloutLimits, require_terms
from atod_algos.batch import TokenBatch, make_batch
from atod_algos.evaluate import Evaluation
from atod_algos.learner import distributed
from atod_algos.learner.learner import Learner, recompute_layers
from atod_algos.learner.lora import add_adapters, merged_weights
from atod_algos.learner.memory import bytes_per_token
from atod_algos.metrics import sampler_metrics, step_metrics, turn_table, world_metrics
from atod_algos.rollout.async_rollout import AsyncRollout
from atod_algos.rollout.environments import describe
from atod_algos.rollout.episodes import Play, derive_seed
from atod_algos.rollout.layouts import choose_layout
from atod_algos.rollout.make_pool import make_pool
from atod_algos.rollout.pools import Conditions, RankPool, RolloutPool, dtype_of, local_pool
from atod_algos.rollout.task_sampler import StepSampler, solved_at_least_once
from atod_algos.teachers.local import LocalScorer, StepScorer
from atod_algos.teachers.routing import require_scale, scaled_gaps, world_places
from atod_algos.training.branching import StepBranching, first_only, with_branches
from atod_algos.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    model_digests,
    prune,
    require_same_models,
    require_whole,
    save_checkpoint,
    tidy,
)
from atod_algos.training.clock import Clock
from atod_algos.training.config import RunConfig, storage_of
from atod_algos.training.console import Progress
from atod_algos.training.panels import CHOOSING, REPORTING, mean_success, play_panels, table_row, validation_metrics
from atod_algos.training.presets import refuse_settings
from atod_algos.training.run_dir import RunFolder
from atod_algos.training.terms import loss_terms
from atod_envs.errors import AtodError, DataError
from atod_envs.trajectory import Group, StopReason

log = logging.getLogger(__name__)

_TOLERATED = 0.25
"""Share of a step's training episodes that may be lost to an environment that raises; evaluation tolerates none."""

CHECKPOINTS_KEPT = 2
"""Checkpoints of steps that stay, besides the best one: the newest, and one to fall back on."""


class Trainer:
    """Trains a student with one algorithm.

    Args:
        config: resolved settings.
        algorithm: the algorithm.
        run: the run's folder.

    Raises:
        AtodError: models, tokenizers or data do not fit; says what to do.
    """

    def __init__(self, config: RunConfig, algorithm: Algorithm, run: RunFolder) -> None:
        self.config, self.algorithm, self.run = config, algorithm, run
        refuse_settings(config, algorithm)
        self.device = distributed.start(device_of(config.device))
        require_scale(config, algorithm)
        self.facts = [describe(world) for world in config.worlds]
        self.names = [facts.env_key for facts in self.facts]
        self.data_version = "; ".join(facts.data_version for facts in self.facts)
        compute = dtype_of(config, self.device)
        # Ranks hold shards of the master weights themselves, in float32; their layers compute in the run's type.
        weights = torch.float32 if distributed.size() > 1 else compute
        self.student = self._load(config.student, "student", weights)
        self.adapters = None
        policy = self.student.model
        if config.lora_rank or config.staleness or distributed.size() > 1:
            # The engine samples from weights that the learner does not have: merged, older or unsharded ones.
            policy = copy.deepcopy(self.student.model).to(compute)
        if config.lora_rank:
            seed = derive_seed(config.seed, "adapters")
            self.adapters = add_adapters(self.student.model, rank=config.lora_rank, alpha=config.lora_alpha, seed=seed)
        if config.gradient_checkpointing:
            recompute_layers(self.student.model)
        self.scorer = StepScorer(config, algorithm, self.student, self.adapters, self._load_scorer_model, self.device)
        self._digests = model_digests(config, algorithm)  # a hub's models are here only now
        limit_vocabulary(policy, usable_ids(self.student.model).tolist())
        per_token = bytes_per_token(self.student.model)
        if distributed.size() > 1:
            distributed.shard(self.student.model, compute)
        self.learner = Learner(self.student.model, config, per_token)
        self.chat = self.student.chat(config.thinking, config.chat_date)
        laid_out = [choose_layout(config.layout, facts.style, self.chat) for facts in self.facts]
        self.styles, self.rows = [style for style, _ in laid_out], laid_out[0][1]
        self.pool = make_pool(config, self.styles, policy, self.chat, self.scorer.players(algorithm.limits(1)))
        self.async_rollout: AsyncRollout[tuple[list[Group], dict[str, float]]] | None = None
        self._stale: dict[int, Any] = {}
        self.step = 0
        self.best: dict[str, float] = {"success": -1.0, "step": 0}
        self.sampler = StepSampler(
            [facts.tasks(facts.splits[0]) for facts in self.facts],
            seed=config.seed,
            tasks_per_step=config.tasks_per_step,
            group_size=config.group_size,
            weights=[world.weight for world in config.worlds],
        )

    def _training(self) -> Play:
        return partial(self.pool.play, under=Conditions(None, self.config.temperature, _TOLERATED))

    def _load(self, name: str, role: str, dtype: torch.dtype | None = None, world: str = "") -> LoadedModel:
        dtype = dtype or dtype_of(self.config, self.device)
        return load_model(name, role, world=world or self.config.models, device=self.device, dtype=dtype)

    def _load_scorer_model(self, name: str, role: str, world: str) -> LoadedModel:
        """A model that stays in the computer's own memory and visits the device."""
        return load_model(name, role, world=world, device="cpu", dtype=dtype_of(self.config, self.device))

    # --- the loop -------------------------------------------------------------------------------------------------

    def fit(self, progress: Progress) -> None:
        """Train up to ``config.steps``, from the last checkpoint if there is one."""
        config = self.config
        steps = config.steps
        self.run.begin(self.step)
        if config.staleness:
            self.async_rollout = AsyncRollout(config.staleness, steps, self._play, torch.get_num_threads())
            self.async_rollout.begin(self.step, dict(merged_weights(self.student.model)), self._stale)
        if self.step == 0:
            self._validate(progress)
        for step in range(self.step + 1, steps + 1):
            metrics = self.train_step(step, progress)
            self.step = step
            if self.async_rollout is not None:
                self.async_rollout.learned(step, dict(merged_weights(self.student.model)))
            if config.eval_every and (step % config.eval_every == 0 or step == steps):
                metrics |= self._validate(progress)
            self.run.log(step, metrics)
            progress.step(step, metrics)
            if step % config.checkpoint_every == 0 or step == steps:
                progress.phase("checkpoint")
                self._save(f"step_{step:06d}")
                if distributed.rank() == 0:
                    prune(self.run.checkpoints, CHECKPOINTS_KEPT)

    def train_step(self, step: int, progress: Progress) -> dict[str, float]:
        """One step: rollout, scores, advantages, updates; returns its metrics."""
        config, algorithm = self.config, self.algorithm
        seed = derive_seed(config.seed, "step", step)
        torch.manual_seed(seed)
        clock = Clock(self.device)
        groups, sampling = self._rollout(step, progress)
        batch = make_batch(groups, self.rows)
        clock.lap("rollout")
        progress.phase("scoring")
        branching = self._branching(batch, step)
        batch, scores, branched = with_branches(algorithm, groups, batch, self.scorer.score(batch), step, branching)
        clock.lap("score")
        advantages = require_terms(algorithm.advantages(batch, scores, step), batch, algorithm.name)
        advantages, scale = scaled_gaps(config, batch, scores, advantages, self.names)
        terms = loss_terms(config, algorithm, batch, scores, advantages, step)
        clock.lap("advantage")
        progress.phase("update")
        update = self.learner.update(
            batch,
            terms.advantage_M,
            None if self.scorer.late else scores.student_M,
            algorithm.objective,
            step=step,
            temperature=config.temperature,
            seed=derive_seed(seed, "minibatches"),
            auxiliary=terms.auxiliary,
            support=terms.support,
            divergence=terms.divergence,
        )
        scores = dataclasses.replace(scores, student_M=update.old_logprobs_M)
        clock.lap("update")
        reward_N = algorithm.reward(batch)
        every, tokens = storage_of(config)
        if every and step % every == 0:
            table = turn_table(step, batch, scores, reward_N, advantages.turn_weight_K, tokens=tokens)
            self.run.store(step, batch.trajectories, table)
        clock.lap("store")
        metrics = update.metrics | sampling | terms.metrics | scale | branched
        aborted = [t.stop_reason is StopReason.ABORTED for group in groups for t in group.trajectories]
        metrics["episode/aborted"] = sum(aborted) / len(aborted)
        n = len(branching.episodes)
        batch, scores, advantages = first_only(n, batch, scores, advantages)
        reward_N = reward_N[:n]
        if config.old_logprobs == "learner":
            metrics |= sampler_metrics(batch, scores)
        metrics |= step_metrics(algorithm, batch, scores, advantages, reward_N)
        if len(self.names) > 1:
            world_N = world_places(batch.trajectories, config)
            metrics |= world_metrics(algorithm, batch, scores, advantages, reward_N, world_N, self.names)
        return metrics | clock.metrics(batch)

    def _rollout(self, step: int, progress: Progress) -> tuple[list[Group], dict[str, float]]:
        """A step's groups, and what sampling them took; the first step says what no reward can teach."""
        algorithm, config = self.algorithm, self.config
        if self.async_rollout is not None:
            progress.phase("waiting for episodes")
            groups, sampling = self.async_rollout.take(step)
        else:
            self._sync(step - 1)
            groups, sampling = self.sampler.play(step, algorithm, self._training(), progress.phase)
            self.pool.rest()
        if step == 1 and algorithm.limits(step) == RolloutLimits():
            start = f"atod train sft --student {config.student} --out FOLDER"
            places = world_places([group.trajectories[0] for group in groups], config)
            for n, world in enumerate(config.worlds):
                own = [group for group, place in zip(groups, places, strict=True) if place == n]
                if own:
                    name = world.name if config.others else ""
                    progress.note(solved_at_least_once(own, f"{start} --env {world.env}", name))
        return groups, sampling

    def _branching(self, batch: TokenBatch, step: int) -> StepBranching:
        """How an algorithm plays on from a step's episodes."""
        return StepBranching(
            batch.trajectories,
            world_places(batch.trajectories, self.config),
            play_specs=self._training(),
            wake=partial(self._sync, step - 1),
            rest=self.pool.rest,
            score_batch=self.scorer.score,
            rows=self.rows,
        )

    def _sync(self, version: int, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Hand weights, by default the student's own, to the engine, with the step that made them as version."""
        if weights is not None:
            self.pool.load_weights(weights.items(), version)
            return
        present = ((name, distributed.full(weight)) for name, weight in merged_weights(self.student.model))
        self.pool.load_weights(present, version, self.student.model if distributed.size() == 1 else None)

    def _play(
        self, step: int, version: int, weights: Mapping[str, torch.Tensor], ask: Callable[[], None]
    ) -> tuple[list[Group], dict[str, float]]:
        """Play a step's episodes with older weights, in the thread of the asynchronous rollout."""
        self._sync(version, weights)
        return self.sampler.play(step, self.algorithm, self._training(), lambda _: ask())

    # --- evaluation -----------------------------------------------------------------------------------------------

    def _validate(self, progress: Progress) -> dict[str, float]:
        progress.phase("validation")

        def work() -> dict[str, Evaluation]:
            self._sync(self.step)
            return play_panels(self.pool, self.facts, self.config, CHOOSING, progress.phase)

        results = work() if self.async_rollout is None else self.async_rollout.call(work)
        success = mean_success(results)
        if success > self.best["success"]:
            self.best = {"success": success, "step": float(self.step)}
            if self.config.eval_every:
                self._save("best")
        trajectories = [trajectory for result in results.values() for trajectory in result.trajectories]
        self.run.store_validation(self.step, trajectories)
        progress.validation(self.step, success, len(trajectories))
        return validation_metrics(results)

    def report(self, progress: Progress) -> dict[str, Any]:
        """Evaluate vanilla, last, best and teacher on the report panels, on which no choice was made."""
        config, everywhere = self.config, range(len(self.facts))
        policies: list[tuple[str, Callable[[], AbstractContextManager[Any]], Sequence[int]]] = [
            ("before", lambda: nullcontext(self._load(config.student, "student").model), everywhere),
            (f"last (step {self.step})", lambda: nullcontext(None), everywhere),
        ]
        if config.eval_every:
            best = self.run.checkpoints / "best"
            load_best = lambda: nullcontext(self._load(str(best), "student").model)  # noqa: E731
            self.best = dict(require_whole(best)["best"])  # after a kill it may be another than the log's
            policies.append((f"best (step {int(self.best['step'])})", load_best, everywhere))
        for scorer in dict.fromkeys(self.scorer.teachers):
            if isinstance(scorer, LocalScorer):
                taught = [n for n in everywhere if self.scorer.teachers[n] is scorer]
                policies.append(("teacher", partial(self._teacher, scorer, config.worlds[taught[0]]), taught))
        found: dict[str, dict[str, Evaluation]] = {}
        for policy, weights, places in policies:
            progress.phase(f"final evaluation: {policy}")
            with weights() as model, self._playing(model) as pool:
                own = play_panels(pool, self.facts, config, REPORTING, progress.phase, places)
                found[policy] = found.get(policy, {}) | own
        return {policy: table_row(evaluations, len(self.facts) > 1) for policy, evaluations in found.items()}

    def _teacher(self, scorer: LocalScorer, world: RunConfig) -> AbstractContextManager[Any]:
        """A teacher as a model that plays."""
        if distributed.size() == 1:
            return scorer.on_device()
        where = self.config.models_of(world)  # the scorer's is divided
        return nullcontext(self._load(world.teacher, "teacher", world=where).model)

    @contextmanager
    def _playing(self, model: Any | None) -> Iterator[RolloutPool]:
        """A pool that plays with a model, or the run's own for the student as it is."""
        if model is None:
            self._sync(self.step)
            yield self.pool
        elif self.config.engine == "vllm" and like(model, self.student.model):
            # The model may run on that engine alone. It gets the weights, and the student keeps its own.
            self.pool.load_weights(model.named_parameters(), self.step, model)
            yield self.pool
        else:
            plain = dataclasses.replace(self.config, engine="transformers")
            own = local_pool(plain, self.styles, model, self.chat)
            pool = own if distributed.size() == 1 else RankPool(own, divided=True)
            yield pool
            pool.close()

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self, name: str) -> Path:
        extra = {
            "step": self.step,
            "best": self.best,
            "algorithm": self.algorithm.name,
            "data": self.data_version,
            "models": self._digests,
        }
        stale = {} if self.async_rollout is None else self.async_rollout.kept_weights(self.step)
        return save_checkpoint(
            self.run.checkpoints,
            name,
            model=self.adapters or self.student.model,
            tokenizer=self.student.tokenizer,
            state={**self.learner.state(), "stale": stale},
            extra=extra,
            updater=self.learner.updater if distributed.size() > 1 and name != "best" else None,
        )

    def resume(self) -> int:
        """Load the newest checkpoint of the run's folder; return the step it was taken after (0 without one).

        Raises:
            AtodError: the checkpoint is broken, or was trained on other data or with other models.
        """
        tidy(self.run.checkpoints, CHECKPOINTS_KEPT)
        path = latest_checkpoint(self.run.checkpoints)
        if path is not None:
            state, extra = load_checkpoint(path, self.student.model, self.learner.updater, self.adapters)
            if not isinstance(extra.get("best"), dict) or "data" not in extra:
                raise DataError(f"{path} is no checkpoint of a training run; delete it to go back to an earlier one")
            if extra["data"] != self.data_version:
                raise AtodError(
                    f"{path} was trained on the data {extra['data']!r}, but {self.config.title} now plays {self.data_version!r}; "
                    "give the old data back (--data, or the environment's variable), or start another run with --run"
                )
            require_same_models(path, extra, self._digests)
            self.learner.load_state(state)
            self._stale, self.step, self.best = state["stale"], int(extra["step"]), dict(extra["best"])
        return self.step

    def close(self) -> None:
        """Close environments and files."""
        if self.async_rollout is not None:
            self.async_rollout.close()
        self.pool.close()
        self.run.close()
