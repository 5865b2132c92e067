"""Log-probs of sampled tokens under a model: the same ids, the same temperature, bounded memory.

The invariant: no tensor of rows x positions x vocabulary ever exists. The model's decoder gives hidden states; only
those that predict a sampled token go through the output head (with all that the model does behind it, see
``agents.logits``), a bounded chunk at a time, and in training each chunk's logits are recomputed in the backward pass
instead of kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from agents.logits import LogitHead, decoder_of, decoder_states, in_eval_mode, logit_head, require_known_ids, usable_ids
from atod_algos.batch import Scores, TokenBatch
from atod_algos.learner import distributed
from atod_algos.learner.loss import TeacherTokens, reverse_kl
from atod_algos.learner.memory import Budget, recomputed
from atod_algos.learner.onednn import onednn_linear, row_padding
from atod_algos.learner.options import UpdateOptions
from atod_algos.learner.packing import pack, packable, packed_states, packs

CHUNK_LOGITS = 1 << 24
"""Most logits alive at once (64 MiB in float32)."""


def micro_batches(lengths: Sequence[int], budget: int) -> Iterator[np.ndarray]:
    """Split rows that are to be padded into micro-batches of similar length.

    Args:
        lengths: tokens of each row.
        budget: most tokens of a micro-batch, padding included; a single row may exceed it.

    Yields:
        Row indices, longest rows first.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        count = max(1, budget // max(1, int(lengths[order[start]])))
        yield order[start : start + count]
        start += count


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model predicts for the sampled tokens of some rows.

    Attributes:
        index_M: [m] indices of the tokens into axis M.
        logprobs: [m] log-probs of the sampled tokens.
        entropy: [m] entropies in nats; zeros where they were not asked for.
        support: [m, S] log-probs of the support tokens; None without a support.
        divergence: [m] reverse KL to the teacher in nats; None without a teacher.
    """

    index_M: np.ndarray
    logprobs: torch.Tensor
    entropy: torch.Tensor
    support: torch.Tensor | None
    divergence: torch.Tensor | None = None


def head_logprobs(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: LogitHead,
    temperature: float,
    entropy: bool,
    support: torch.Tensor | None = None,
    teacher: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs of targets and support tokens, each distribution's entropy, its divergence from a teacher's.

    Args:
        hidden: [m, D] states that predict the targets.
        targets: [m] token ids.
        head: the model's output head.
        temperature: divides the logits.
        entropy: whether entropies are wanted; zeros otherwise.
        support: [m, S] further token ids; ``None`` is the same as S = 0.
        teacher: [m, T] token ids and the teacher's log-probs of them; ids [m, 0] stand for the first of the vocabulary,
            in order.

    Returns:
        [m] log-probs, [m] entropies in nats, [m, S] log-probs of the support, and [m] reverse KLs to the teacher in
        nats (zeros without one), float32.
    """
    none = targets.new_empty((len(targets), 0))
    asked = none if support is None else support
    said = (none, none.float()) if teacher is None else teacher

    def part(
        states: torch.Tensor, ids: torch.Tensor, more: torch.Tensor, their_ids: torch.Tensor, theirs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        logprobs = torch.log_softmax(head(states) / temperature, dim=-1)
        spread = entropies(logprobs) if entropy else torch.zeros_like(logprobs[:, 0])
        apart = torch.zeros_like(logprobs[:, 0])
        if teacher is not None:
            own = logprobs.gather(1, their_ids) if their_ids.shape[1] else logprobs[:, : theirs.shape[1]]
            apart = reverse_kl(own, theirs)
        return logprobs.gather(1, ids[:, None])[:, 0], spread, logprobs.gather(1, more), apart

    size = max(1, CHUNK_LOGITS // head.rows)
    if len(targets) <= size:
        count = len(targets)
        padding = row_padding(count, hidden.device)
        below = (0, 0, 0, padding)
        found = part(F.pad(hidden, below), F.pad(targets, (0, padding)), *(F.pad(x, below) for x in (asked, *said)))
        chosen, width, further, apart = (values[:count] for values in found)
        return chosen, width, further, apart
    pieces = [
        recomputed(part, *piece)
        for piece in zip(*(torch.split(x, size) for x in (hidden, targets, asked, *said)), strict=True)
    ]
    logprobs, spread, others, apart = (torch.cat(values) for values in zip(*pieces, strict=True))
    return logprobs, spread, others, apart


def entropies(logprobs: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of each distribution of log-probs [m, V]; an impossible id adds nothing: 0 log 0 = 0."""
    spread = -(logprobs.exp() * logprobs).sum(-1)
    if not bool(torch.isnan(spread).any()):
        return spread
    return -(logprobs.exp() * logprobs.masked_fill(torch.isneginf(logprobs), 0.0)).sum(-1)


def _divergence(own: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """KL(own || theirs) in nats of log-probs [m, V]; ids that the first gives no probability add nothing."""
    gap = (own - theirs).masked_fill(torch.isneginf(own), 0.0)
    return (own.exp() * gap).sum(-1).clamp(min=0)


def _mean_gap(own: torch.Tensor, theirs: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Mean gap in nats of log-probs [m, V] over what the first would sample, each gap cut to its place's limit [m]."""
    gap = (theirs - own).masked_fill(torch.isneginf(own), 0.0)
    return (own.exp() * gap.clamp(-limit[:, None], limit[:, None])).sum(-1)


def split_rows(model: Any, rows: Sequence[np.ndarray], budget: int) -> Iterator[np.ndarray]:
    """Split rows into micro-batches of at most ``budget`` tokens, as this model runs them: packed or padded."""
    return packs(rows, budget) if packable(model) else micro_batches([len(row) for row in rows], budget)


def stream_tokens(model: Any, rows: Sequence[np.ndarray]) -> int:
    """Tokens that a pass over these rows computes: packed, shared prefixes count once; padded, padding counts."""
    return len(pack(rows).ids_T) if packable(model) else len(rows) * max(len(row) for row in rows)


def states_of(model: Any, batch: TokenBatch, rows: np.ndarray) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Run some rows of a batch through a model's decoder: packed where the model allows it, padded otherwise.

    Args:
        model: a causal language model.
        batch: the batch.
        rows: which of its rows.

    Returns:
        Indices into axis M of the tokens in these rows, the states [m, D] that predict them, and their ids [m].
    """
    place = np.full(len(batch.rows), -1)
    place[rows] = np.arange(len(rows))
    index_M = np.flatnonzero(place[batch.row_M] >= 0)
    line, column = place[batch.row_M[index_M]], batch.column_M[index_M]
    device = next(model.parameters()).device
    if packable(model):
        packed = pack([batch.rows[row] for row in rows])
        states, _ = packed_states(model, packed)
        at = np.asarray(packed.bounds)[line] + column
        before = torch.from_numpy(packed.place_R[at - 1]).to(device)
        targets = torch.from_numpy(packed.ids_T[packed.place_R[at]]).to(device)
        return index_M, states.index_select(0, before), targets
    width = max(len(batch.rows[row]) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(batch.rows[row])] = batch.rows[row]
    tokens = torch.from_numpy(ids).to(device)
    # Padding stands on the right: with causal attention no real token sees it, so no mask is needed.
    states = decoder_states(model, tokens)
    at_line, at_column = torch.from_numpy(line).to(device), torch.from_numpy(column).to(device)
    return index_M, states[at_line, at_column - 1], tokens[at_line, at_column]


def predict(
    model: Any,
    batch: TokenBatch,
    rows: np.ndarray,
    *,
    temperature: float,
    entropy: bool = False,
    support_MS: np.ndarray | None = None,
    teacher: TeacherTokens | None = None,
) -> Predictions:
    """Run some rows of a batch through a model.

    Args:
        model: a causal language model.
        batch: the batch.
        rows: which of its rows.
        temperature: divides the logits.
        entropy: whether entropies are wanted.
        support_MS: ids of further tokens whose log-probs are wanted in the place of each sampled one.
        teacher: what the divergence is taken from.
    """

    def work() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
        index_M, states, targets = states_of(model, batch, rows)
        support = None if support_MS is None else torch.from_numpy(support_MS[index_M]).long().to(targets.device)
        said = None if teacher is None else teacher.at(index_M, targets.device)
        head = logit_head(model)
        return *head_logprobs(states, targets, head, temperature, entropy, support, said), index_M

    with onednn_linear(next(model.parameters()).device):
        logprobs, spread, others, apart, index_M = distributed.unsharded(model, work)
    return Predictions(
        index_M,
        logprobs,
        spread,
        None if support_MS is None else others,
        None if teacher is None else apart,
    )


def row_logprobs(
    model: Any, batch: TokenBatch, rows: np.ndarray, *, temperature: float, entropy: bool = False
) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """:func:`predict` without a support: indices into axis M, log-probs, entropies."""
    found = predict(model, batch, rows, temperature=temperature, entropy=entropy)
    return found.index_M, found.logprobs, found.entropy


def drops_out(model: Any) -> bool:
    """Whether a training pass leaves something out by chance, so that its log-probs are not those of scoring."""
    parts = any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in model.modules())
    return parts or bool(getattr(decoder_of(model).config, "attention_dropout", 0.0))


def score(
    model: Any,
    batch: TokenBatch,
    *,
    temperature: float,
    budget: int = UpdateOptions.token_budget,
    entropy: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of all sampled tokens of a batch, without gradients.

    Args:
        model: student, teacher or reference; its tokenizer must be the one that made the ids.
        batch: the batch.
        temperature: that of the sampling, for every model alike.
        budget: tokens of a micro-batch.
        entropy: whether entropies are wanted.

    Returns:
        Log-probs and entropies along axis M, float64.
    """
    logprobs_M = np.zeros(batch.n_tokens)
    entropy_M = np.zeros(batch.n_tokens)
    require_known_ids(model, batch.rows, "the model")

    @torch.no_grad()
    def attempt(tokens: int) -> None:
        for rows, counts in distributed.iter_shard(split_rows(model, batch.rows, tokens)):
            index_M, logprobs, spread = row_logprobs(model, batch, rows, temperature=temperature, entropy=entropy)
            if counts:
                logprobs_M[index_M] = numbers(logprobs)
                entropy_M[index_M] = numbers(spread)

    with in_eval_mode(model):
        in_memory(attempt, batch, budget)
    distributed.all_reduce([logprobs_M, entropy_M])
    return logprobs_M, entropy_M


def compare(
    student: Any,
    teacher: Any,
    batch: TokenBatch,
    *,
    temperature: float,
    budget: int = UpdateOptions.token_budget,
    support: int = 0,
    limit_M: np.ndarray | None = None,
) -> Scores:
    """Compare two models' whole distributions at every sampled token, without gradients and in bounded memory.

    Both distributions of a chunk of tokens exist at the same time, and of each only its statistics are kept. Models of
    one family pad their vocabularies differently; ids that only one of them has are never sampled, so the divergence is
    taken over the ids that both have, both distributions made to sum to 1 there.

    Args:
        student: the learner's model.
        teacher: a model that shares its tokenizer.
        batch: the batch.
        temperature: that of the sampling, for both.
        budget: tokens of a micro-batch.
        support: k of the teacher's top-k tokens to keep at each token (all of a smaller vocabulary).
        limit_M: largest size of a gap, at each token, in the mean of the gaps; ``None`` for no limit anywhere.

    Returns:
        Scores with everything but reference and base.
    """
    n = batch.n_tokens
    heads = logit_head(student), logit_head(teacher)
    both = np.intersect1d(usable_ids(student), usable_ids(teacher))
    shared = len(both)
    columns: Any = slice(shared) if shared and both[-1] == shared - 1 else torch.from_numpy(both)
    require_known_ids(teacher, batch.rows, "the teacher")
    size = max(1, CHUNK_LOGITS // (4 * shared))  # two distributions, and the terms of two sums over them
    width = min(support, shared)
    student_M, teacher_M, entropy_M, teacher_entropy_M, kl_M, mean_M = (np.zeros(n) for _ in range(6))
    cut = limit_M is not None and bool(np.isfinite(limit_M).any())
    ids_MS = np.zeros((n, width), dtype=np.int32) if support else None
    logprobs_MS = np.zeros((n, width), dtype=np.float32) if support else None

    @torch.no_grad()
    def attempt(tokens: int) -> None:
        for rows, counts in distributed.iter_shard(split_rows(student, batch.rows, tokens)):
            with onednn_linear(next(student.parameters()).device):
                distributed.unsharded(student, distributed.unsharded, teacher, some, rows, counts)

    def some(rows: np.ndarray, counts: bool) -> None:
        index_M, own_states, targets = states_of(student, batch, rows)
        _, their_states, _ = states_of(teacher, batch, rows)
        if not counts:
            return
        for start in range(0, len(index_M), size):
            chunk = slice(start, start + size)
            at, ids = index_M[chunk], targets[chunk, None]
            own, theirs = (
                torch.log_softmax(head(states[chunk]) / temperature, dim=-1)
                for head, states in zip(heads, (own_states, their_states), strict=True)
            )
            student_M[at] = numbers(own.gather(1, ids)[:, 0])
            teacher_M[at] = numbers(theirs.gather(1, ids)[:, 0])
            entropy_M[at] = numbers(entropies(own))
            teacher_entropy_M[at] = numbers(entropies(theirs))
            if ids_MS is not None and logprobs_MS is not None:
                best = theirs[:, columns].topk(width, dim=-1)
                ids_MS[at], logprobs_MS[at] = both[best.indices.cpu().numpy()], best.values.cpu().numpy()
            own, theirs = (torch.log_softmax(part[:, columns], dim=-1) for part in (own, theirs))
            kl_M[at] = numbers(_divergence(own, theirs))
            mean_M[at] = -kl_M[at]
            if cut and limit_M is not None:
                mean_M[at] = numbers(_mean_gap(own, theirs, torch.from_numpy(limit_M[at]).to(own)))

    with in_eval_mode(student, teacher):
        in_memory(attempt, batch, budget)
    distributed.all_reduce([student_M, teacher_M, entropy_M, teacher_entropy_M, kl_M, mean_M])
    if ids_MS is not None and logprobs_MS is not None:
        distributed.all_reduce([ids_MS, logprobs_MS])
    return Scores(
        student_M,
        teacher_M,
        entropy_M=entropy_M,
        teacher_entropy_M=teacher_entropy_M,
        reverse_kl_M=kl_M,
        gap_mean_M=mean_M,
        support_MS=ids_MS,
        teacher_support_MS=logprobs_MS,
        vocabulary=shared,
    )


def in_memory(attempt: Callable[[int], None], batch: TokenBatch, budget: int) -> None:
    """Score with so many tokens at once, or with fewer where memory runs out; what was written is written again."""
    budget = distributed.per_rank_budget(budget, sum(len(row) for row in batch.rows))
    Budget(budget).run("scoring", attempt, least=max(len(row) for row in batch.rows), undo=lambda: None)


def numbers(values: torch.Tensor) -> np.ndarray:
    """A tensor as float64 in the computer's own memory."""
    return np.asarray(values.double().cpu().numpy())
