"""A teacher's distribution at every sampled token: whole for a small vocabulary, its top-k tokens for a large one.

The invariant: of a large vocabulary only the top-k tokens of a chunk outlive the chunk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from agents.logits import in_eval_mode, logit_head, require_known_ids, usable_ids
from atod_algos.batch import TokenBatch
from atod_algos.learner import distributed
from atod_algos.learner.logprobs import CHUNK_LOGITS, in_memory, numbers, split_rows, states_of
from atod_algos.learner.loss import TeacherTokens
from atod_algos.learner.onednn import onednn_linear
from atod_algos.learner.options import UpdateOptions

WHOLE = 4096
"""Vocabularies up to this size are kept whole."""


def distribution(
    teacher: Any,
    student: Any,
    batch: TokenBatch,
    *,
    temperature: float,
    budget: int = UpdateOptions.token_budget,
    topk: int = 64,
    whole: int = WHOLE,
) -> tuple[np.ndarray, TeacherTokens]:
    """What a teacher says at every sampled token, without gradients.

    Args:
        teacher: a model that shares the student's tokenizer.
        student: the student; ids that only one of the two may say are never kept.
        batch: the batch.
        temperature: that of the sampling.
        budget: tokens of a micro-batch.
        topk: k of the top-k tokens to keep at each place of a large vocabulary.
        whole: largest vocabulary of which everything is kept.

    Returns:
        Log-probs of the sampled tokens along axis M, float64; the tokens that were kept, float32.
    """
    ids = np.intersect1d(usable_ids(student), usable_ids(teacher))
    best_alone = len(ids) > whole
    width = min(topk, len(ids)) if best_alone else len(ids)
    prefix = bool(len(ids)) and int(ids[-1]) == len(ids) - 1
    columns: Any = slice(len(ids)) if prefix else torch.from_numpy(ids)
    require_known_ids(teacher, batch.rows, "the teacher")
    logprobs_M = np.zeros(batch.n_tokens)
    kept_MS = np.zeros((batch.n_tokens, width), dtype=np.float32)
    ids_MS = np.zeros((batch.n_tokens, width), dtype=np.int32) if best_alone else None
    head = logit_head(teacher)
    size = max(1, CHUNK_LOGITS // head.rows)

    @torch.no_grad()
    def attempt(tokens: int) -> None:
        for rows, counts in distributed.iter_shard(split_rows(teacher, batch.rows, tokens)):
            with onednn_linear(next(teacher.parameters()).device):
                distributed.unsharded(teacher, some, rows, counts)

    def some(rows: np.ndarray, counts: bool) -> None:
        index_M, states, targets = states_of(teacher, batch, rows)
        for start in range(0, len(index_M) if counts else 0, size):
            chunk = slice(start, start + size)
            at = index_M[chunk]
            logprobs = torch.log_softmax(head(states[chunk]) / temperature, dim=-1)
            logprobs_M[at] = numbers(logprobs.gather(1, targets[chunk, None])[:, 0])
            kept = logprobs[:, columns]
            if ids_MS is not None:
                best = kept.topk(width, dim=-1)
                ids_MS[at], kept = ids[best.indices.cpu().numpy()], best.values
            kept_MS[at] = kept.cpu().numpy()

    with in_eval_mode(teacher):
        in_memory(attempt, batch, budget)
    distributed.all_reduce([logprobs_M, kept_MS] if ids_MS is None else [logprobs_M, kept_MS, ids_MS])
    if ids_MS is None and not prefix:
        ids_MS = np.broadcast_to(ids, kept_MS.shape)
    return logprobs_M, TeacherTokens(ids_MS, kept_MS)
