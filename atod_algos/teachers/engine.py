"""A frozen model on a vLLM engine in this process: log-probs of prompts, and their top-k tokens.

The invariant: vLLM scores prompts at temperature 1, so no other temperature is taken.
"""

from __future__ import annotations

import numpy as np

from agents.logits import usable_ids
from agents.models import LoadedModel
from atod_algos.batch import TokenBatch
from atod_algos.learner.loss import TeacherTokens
from atod_algos.teachers.support import along_tokens, tokens_of_rows
from atod_algos.training.config import RunConfig
from atod_envs.errors import AtodError


class EngineScorer:
    """Scores rows on a vLLM engine; a :class:`atod_algos.teachers.local.LogprobScorer`.

    Args:
        loaded: the model; it is not kept.
        config: resolved settings.
        device: where it runs.
        longest: most tokens of a row, and one more.
        top: k of the top-k tokens that :meth:`top` gives (all of a smaller vocabulary).

    Raises:
        AtodError: vLLM is missing or cannot run the model, or the temperature is not 1.
    """

    def __init__(self, loaded: LoadedModel, config: RunConfig, device: str, longest: int, top: int = 0) -> None:
        if config.temperature != 1.0:
            raise AtodError(
                f"vLLM gives prompt log-probs at temperature 1 only, but episodes are sampled at {config.temperature}; "
                "use --temperature 1 or --teacher-engine transformers"
            )
        from agents.engines.vllm import VllmEngine

        self._k = min(top, len(usable_ids(loaded.model)))
        self.engine = VllmEngine(
            loaded.model.to(device),
            slots=config.slots,
            max_context=longest,
            memory=config.engine_memory,
            top=max(1, self._k),
            sleeps=False,  # it stays, next to a student's engine that does
        )

    def logprobs(self, batch: TokenBatch, *, temperature: float, budget: int) -> np.ndarray:
        """See :class:`LogprobScorer`."""
        found = self.engine.prompt_logprobs([row.tolist() for row in batch.rows])
        offsets = np.cumsum([0, *(len(row) for row in batch.rows[:-1])])
        return np.asarray(np.concatenate(found)[offsets[batch.row_M] + batch.column_M])

    def top(self, batch: TokenBatch, *, temperature: float, budget: int) -> tuple[np.ndarray, TeacherTokens]:
        """See :class:`atod_algos.teachers.support.TopKScorer`."""
        at_B = tokens_of_rows(batch)
        places = [batch.column_M[at].tolist() for at in at_B]
        return along_tokens(batch, at_B, self.engine.prompt_top([row.tolist() for row in batch.rows], places, self._k))
