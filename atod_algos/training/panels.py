"""A run's fixed panels: validation during training, and the final table, of one environment or of each.

The success of a policy on several environments is the mean of its success on each, whatever their panels' sizes; a
checkpoint is chosen by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from atod_algos.evaluate import Evaluation, evaluate
from atod_algos.rollout.environments import EnvironmentFacts
from atod_algos.rollout.pools import Conditions, RolloutPool
from atod_algos.training.config import RunConfig

CHOOSING, REPORTING = 1, 2
"""Places of the splits in ``EnvironmentFacts.splits``."""


def play_panels(
    pool: RolloutPool,
    facts: Sequence[EnvironmentFacts],
    config: RunConfig,
    purpose: int,
    phase: Callable[[str], None],
    places: Sequence[int] | None = None,
) -> dict[str, Evaluation]:
    """Play the fixed panels with whatever weights the pool holds; an evaluation by the environment's name.

    Args:
        pool: plays.
        facts: about the environments.
        config: resolved settings.
        purpose: ``CHOOSING`` or ``REPORTING``.
        phase: told what is being done.
        places: which environments; all by default.
    """
    found: dict[str, Evaluation] = {}
    for world in range(len(facts)) if places is None else places:
        split = facts[world].splits[purpose]
        tasks = facts[world].tasks(split)
        panel = tasks.panel(min(config.eval_tasks if purpose == CHOOSING else config.report_tasks, len(tasks)))
        play = partial(pool.play, under=Conditions(split, config.eval_temperature))
        on_finish = partial(_tell, phase, len(panel))
        found[facts[world].env_key] = evaluate(play, panel, world=world, on_finish=on_finish)
    return found


def _tell(phase: Callable[[str], None], total: int, finished: int) -> None:
    phase(f"evaluation {finished}/{total}")


def mean_success(evaluations: Mapping[str, Evaluation]) -> float:
    """Mean over environments of the share of solved episodes."""
    return sum(evaluation.success for evaluation in evaluations.values()) / len(evaluations)


def validation_metrics(evaluations: Mapping[str, Evaluation]) -> dict[str, float]:
    """What a validation publishes: of each environment with its name in front, where there are several, and of all."""
    found: dict[str, float] = {}
    for name, result in evaluations.items():
        own = {"val/success_rate": result.success, "val/length": result.length, f"val/{name}_task_score": result.score}
        own |= {f"val/{label}_success_rate": part.success for label, part in result.by_label().items()}
        found |= own if len(evaluations) == 1 else {f"{name}/{key}": value for key, value in own.items()}
    if len(evaluations) > 1:
        found["val/success_rate"] = mean_success(evaluations)
        found["val/length"] = sum(result.length for result in evaluations.values()) / len(evaluations)
    return found


def table_row(evaluations: Mapping[str, Evaluation], several: bool) -> dict[str, Any]:
    """A policy's row of the final table: its summary; of several environments their mean success and each summary."""
    summaries = {name: evaluation.summary() for name, evaluation in evaluations.items()}
    if several:
        return {"success": mean_success(evaluations), "worlds": summaries}
    (summary,) = summaries.values()
    return summary
