"""The one training loop: rollout -> score -> advantage -> update -> log -> checkpoint.

It knows no algorithm by name. The invariant: everything random in a step is derived from (seed, step), so a run that
was killed and resumed from a checkpoint computes exactly what an uninterrupted one does.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from agents.logits import limit_vocabulary, usable_ids
from agents.models import LoadedModel, load_model
from atod_algos.algorithm import Advantages, Algorithm, RolloutLimits
from atod_algos.batch import Scores, make_batch
from atod_algos.evaluate import Evaluation, evaluate
from atod_algos.learner import distributed
from atod_algos.learner.learner import DivergenceTerm, Learner, SupportTerm, recompute_layers
from atod_algos.learner.lora import add_adapters, merged_weights
from atod_algos.learner.loss import TeacherTokens
from atod_algos.learner.memory import bytes_per_token
from atod_algos.metrics import sampler_metrics, step_metrics, turn_table
from atod_algos.rollout.async_rollout import AsyncRollout, correct
from atod_algos.rollout.environments import describe
from atod_algos.rollout.episodes import Play, derive_seed
from atod_algos.rollout.layouts import choose_layout
from atod_algos.rollout.make_pool import make_pool
from atod_algos.rollout.pools import Conditions, RankPool, RolloutPool, device_of, dtype_of, local_pool
from atod_algos.rollout.task_sampler import StepSampler, solved_at_least_once
from atod_algos.teachers.local import LocalScorer, StepScorer
from atod_algos.training.checkpoint import latest_checkpoint, load_checkpoint, prune, recover, save_checkpoint, strays
from atod_algos.training.clock import Clock
from atod_algos.training.config import RunConfig, storage_of
from atod_algos.training.console import Progress
from atod_algos.training.presets import refuse_settings
from atod_algos.training.run_dir import RunFolder
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
        refuse_settings(config)
        self.device = distributed.start(device_of(config.device))
        self.facts = describe(config)
        self.world, self.splits = self.facts.env_key, self.facts.splits
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
        limit_vocabulary(policy, usable_ids(self.student.model).tolist())
        per_token = bytes_per_token(self.student.model)
        if distributed.size() > 1:
            distributed.shard(self.student.model, compute)
        self.learner = Learner(self.student.model, config, per_token)
        self.chat = self.student.chat(config.thinking, config.chat_date)
        self.style, self.rows = choose_layout(config.layout, self.facts.style, self.chat)
        self.pool = make_pool(config, self.world, self.style, policy, self.chat)
        self.async_rollout: AsyncRollout[tuple[list[Group], dict[str, float]]] | None = None
        self._stale: dict[int, Any] = {}
        self.step = 0
        self.best: dict[str, float] = {"success": -1.0, "step": 0}
        self.sampler = StepSampler(
            self.facts.tasks(self.splits[0]),
            seed=config.seed,
            tasks_per_step=config.tasks_per_step,
            group_size=config.group_size,
        )

    def _training(self) -> Play:
        return partial(self.pool.play, under=Conditions(self.splits[0], self.config.temperature, _TOLERATED))

    def _load(self, name: str, role: str, dtype: torch.dtype | None = None) -> LoadedModel:
        dtype = dtype or dtype_of(self.config, self.device)
        return load_model(name, role, world=self.world, device=self.device, dtype=dtype)

    def _load_scorer_model(self, name: str, role: str) -> LoadedModel:
        """A model that stays in the computer's own memory and visits the device."""
        return load_model(name, role, world=self.world, device="cpu", dtype=dtype_of(self.config, self.device))

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
        if self.async_rollout is not None:
            progress.phase("waiting for episodes")
            groups, sampling = self.async_rollout.take(step)
        else:
            self._sync(step - 1)
            groups, sampling = self.sampler.play(step, algorithm, self._training(), progress.phase)
            self.pool.rest()
        if step == 1 and algorithm.limits(step) == RolloutLimits():
            start = f"atod train sft --student {config.student} --out FOLDER --env {config.env}"
            progress.note(solved_at_least_once(groups, start))
        batch = make_batch(groups, self.rows)
        clock.lap("rollout")
        progress.phase("scoring")
        scores = self.scorer.score(batch)
        clock.lap("score")
        advantages = algorithm.advantages(batch, scores, step)
        divergence = self._divergence(scores, advantages)
        advantage_M = advantages.token_M
        if divergence is not None:
            advantage_M = np.zeros(batch.n_tokens) if advantages.reward_M is None else advantages.reward_M
        advantage_M, corrected = correct(
            advantage_M, scores.student_M, batch.sampler_logprobs_M, step=step, staleness=config.staleness
        )
        clock.lap("advantage")
        progress.phase("update")
        update = self.learner.update(
            batch,
            advantage_M,
            None if self.scorer.late else scores.student_M,
            algorithm.objective,
            step=step,
            temperature=config.temperature,
            seed=derive_seed(seed, "minibatches"),
            auxiliary=lambda logprobs, index_M: algorithm.auxiliary_loss(logprobs, index_M, scores),
            support=self._support_term(scores),
            divergence=divergence,
        )
        scores = dataclasses.replace(scores, student_M=update.old_logprobs_M)
        metrics = update.metrics
        clock.lap("update")
        reward_N = algorithm.reward(batch)
        every, tokens = storage_of(config)
        if every and step % every == 0:
            table = turn_table(step, batch, scores, reward_N, advantages.turn_weight_K, tokens=tokens)
            self.run.store(step, batch.trajectories, table)
        clock.lap("store")
        aborted = [t.stop_reason is StopReason.ABORTED for group in groups for t in group.trajectories]
        metrics["episode/aborted"] = sum(aborted) / len(aborted)
        if config.old_logprobs == "learner":
            metrics |= sampler_metrics(batch, scores)
        metrics |= sampling | corrected | step_metrics(algorithm, batch, scores, advantages, reward_N)
        return metrics | clock.metrics(batch)

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

    def _divergence(self, scores: Scores, advantages: Advantages) -> DivergenceTerm | None:
        """The teacher's term as a loss, under ``--gap exact``."""
        config = self.config
        if not self.scorer.exact:
            return None
        if advantages.teacher_weight_M is None:
            raise AtodError(
                f"--gap exact: {self.algorithm.name} gives no teacher_weight_M, which weighs the divergence; use --gap sampled"
            )
        teacher = TeacherTokens(scores.support_MS, scores.require("teacher_support"))
        return DivergenceTerm(teacher, advantages.teacher_weight_M, config.gap_minibatches, config.gap_epochs)

    def _support_term(self, scores: Scores) -> SupportTerm | None:
        if scores.support_MS is None or "support" not in self.algorithm.scores:
            return None
        loss = self.algorithm.support_loss
        return SupportTerm(scores.support_MS, lambda logprobs, index_M: loss(logprobs, index_M, scores))

    # --- evaluation -----------------------------------------------------------------------------------------------

    def _validate(self, progress: Progress) -> dict[str, float]:
        progress.phase("validation")

        def work() -> Evaluation:
            self._sync(self.step)
            return self.evaluate_on(self.pool, self.splits[1], self.config.eval_tasks, progress)

        result = work() if self.async_rollout is None else self.async_rollout.call(work)
        if result.success > self.best["success"]:
            self.best = {"success": result.success, "step": float(self.step)}
            self._save("best")
        self.run.store_validation(self.step, result.trajectories)
        progress.validation(self.step, result.success, len(result.trajectories))
        metrics = {"val/success_rate": result.success, "val/length": result.length}
        metrics[f"val/{self.world}_task_score"] = result.score
        return metrics | {f"val/{label}_success_rate": part.success for label, part in result.by_label().items()}

    def evaluate_on(self, pool: RolloutPool, split: str, n_tasks: int, progress: Progress) -> Evaluation:
        """Play the fixed panel of a split with whatever weights the pool holds."""
        tasks = self.facts.tasks(split)
        panel = tasks.panel(min(n_tasks, len(tasks)))
        play = partial(pool.play, under=Conditions(split, self.config.eval_temperature))
        return evaluate(play, panel, on_finish=lambda n: progress.phase(f"evaluation {n}/{len(panel)}"))

    def report(self, progress: Progress) -> dict[str, Any]:
        """Evaluate vanilla, last, best and teacher on the report panel, on which no choice was made."""
        rows: dict[str, Any] = {}
        policies: list[tuple[str, Callable[[], AbstractContextManager[Any]]]] = [
            ("before", lambda: nullcontext(self._load(self.config.student, "student").model)),
            (f"last (step {self.step})", lambda: nullcontext(None)),
        ]
        if self.config.eval_every:
            best = str(self.run.checkpoints / "best")
            policies.append(
                (f"best (step {int(self.best['step'])})", lambda: nullcontext(self._load(best, "student").model))
            )
        if isinstance(self.scorer.teacher, LocalScorer):
            if distributed.size() == 1:
                policies.append(("teacher", self.scorer.teacher.on_device))
            else:  # the scorer's is divided
                teacher = self.config.teacher
                policies.append(("teacher", lambda: nullcontext(self._load(teacher, "teacher").model)))
        for name, weights in policies:
            progress.phase(f"final evaluation: {name}")
            with weights() as model, self._playing(model) as pool:
                rows[name] = self.evaluate_on(pool, self.splits[2], self.config.report_tasks, progress).summary()
        return rows

    @contextmanager
    def _playing(self, model: Any | None) -> Iterator[RolloutPool]:
        """A pool that plays with a model, or the run's own for the student as it is."""
        if model is None:
            self._sync(self.step)
            yield self.pool
        elif self.config.engine == "vllm" and type(model) is type(self.student.model):
            # The model may run on that engine alone. It gets the weights, and the student keeps its own.
            self.pool.load_weights(model.named_parameters(), self.step, model)
            yield self.pool
        else:
            plain = dataclasses.replace(self.config, engine="transformers")
            own = local_pool(plain, self.style, model, self.chat)
            pool = own if distributed.size() == 1 else RankPool(own, divided=True)
            yield pool
            pool.close()

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self, name: str) -> Path:
        extra = {
            "step": self.step,
            "best": self.best,
            "algorithm": self.algorithm.name,
            "data": self.facts.data_version,
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
            AtodError: the checkpoint is broken, or was trained on other data.
        """
        if distributed.rank() == 0:
            recover(self.run.checkpoints)
            prune(self.run.checkpoints, CHECKPOINTS_KEPT)  # an earlier process may have been killed just before it did
            for name in strays(self.run.checkpoints):
                log.warning("%s is no complete checkpoint; left alone", self.run.checkpoints / name)
        distributed.barrier()
        path = latest_checkpoint(self.run.checkpoints)
        if path is not None:
            state, extra = load_checkpoint(path, self.student.model, self.learner.updater, self.adapters)
            if not isinstance(extra.get("best"), dict) or "data" not in extra:
                raise DataError(f"{path} is no checkpoint of a training run; delete it to go back to an earlier one")
            if extra["data"] != self.facts.data_version:
                raise AtodError(
                    f"{path} was trained on the data {extra['data']!r}, but {self.config.env} now plays {self.facts.data_version!r}; "
                    "give the old data back (--data, or the environment's variable), or start another run with --run"
                )
            self.learner.load_state(state)
            self._stale, self.step, self.best = state["stale"], int(extra["step"]), dict(extra["best"])
        return self.step

    def close(self) -> None:
        """Close environments and files."""
        if self.async_rollout is not None:
            self.async_rollout.close()
        self.pool.close()
        self.run.close()


def settings_of(config: RunConfig, algorithm: Algorithm, rules: str) -> dict[str, Any]:
    """Everything that defines a run, JSON-compatible."""
    options = dataclasses.asdict(cast("Any", algorithm))
    # A run may be prolonged, but not one whose learning rate falls towards its last step.
    horizon = None if config.lr_floor == 1.0 else config.steps
    return {
        "rules": rules,
        "horizon": horizon,
        "train": dataclasses.asdict(config),
        "algorithm": {"name": algorithm.name, **options},
    }
