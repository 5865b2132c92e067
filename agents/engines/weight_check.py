"""Checking that an engine samples with the weights it should: one short probe after every load.

An engine may keep copies that a load does not reach (packed or fused matrices, a tied output layer), and nothing but
its numbers shows it. The invariant: after ``verify_weights`` returns, the engine's log-probs of the probe are the
model's own.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from agents.engines.base import Engine, SamplingParams
from agents.logits import in_eval_mode, logit_head, own_logits, probe_ids
from atod_envs.errors import AtodError

log = logging.getLogger(__name__)

_PROMPT_TOKENS = 12
_RESPONSE_TOKENS = 5
TOLERANCES = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2.5e-1}
"""Largest difference of a log-prob, in nats, that rounding may make, of logits up to about 10."""
_STEPS = 4
"""Of larger ones: so many steps between two neighbouring numbers of their size."""


class WeightMismatch(AtodError):
    """An engine samples with other weights than the model that is trained."""


def verify_weights(engine: Engine, model: Any) -> float:
    """Compare the engine with a model on one prompt: its next tokens, and their log-probs.

    Args:
        engine: an idle engine into which the model's weights were loaded.
        model: the ``transformers`` model.

    Returns:
        The largest difference of a log-prob, in nats.

    Raises:
        WeightMismatch: they differ by more than rounding; says where.
    """
    prompt = probe_ids(model, max(1, min(_PROMPT_TOKENS, engine.max_context - _RESPONSE_TOKENS)))
    response = min(_RESPONSE_TOKENS, engine.max_context - len(prompt))
    engine.submit("probe", prompt, SamplingParams(response, temperature=0.0))
    answer = engine.step()
    while not answer:
        answer = engine.step()
    tokens, logprobs = list(answer[0].token_ids), np.array(answer[0].logprobs)
    own, best, largest = _greedy_logprobs(model, prompt, tokens)
    dtype = next(model.parameters()).dtype
    tolerance = max(TOLERANCES.get(dtype, TOLERANCES[torch.float32]), _STEPS * torch.finfo(dtype).eps * largest)
    gaps = np.abs(logprobs - own)
    # Where two tokens are all but equally likely, either may be taken.
    if np.all(gaps <= tolerance) and np.all(best - own <= 2 * tolerance):
        return float(gaps.max())
    worst = int(np.nanargmax(np.maximum(gaps, best - own))) if np.isfinite(gaps).any() else 0
    raise WeightMismatch(
        f"{type(engine).__name__} does not sample with the trained weights: on a probe prompt its log-prob of token "
        f"{tokens[worst]} (place {worst} of {len(tokens)}) is {logprobs[worst]:.6f}, the model's own is {own[worst]:.6f} "
        f"(its best {best[worst]:.6f}; they may differ by {tolerance:g}). {_suspect(model)}"
    )


def _greedy_logprobs(model: Any, prompt: list[int], tokens: list[int]) -> tuple[np.ndarray, np.ndarray, float]:
    """Log-probs of the tokens in the model's own forward pass, the highest at each place, the largest logit's size."""
    with torch.no_grad(), in_eval_mode(model):
        logits = logit_head(model).close(own_logits(model, [*prompt, *tokens])[len(prompt) - 1 : -1])
        rows = torch.log_softmax(logits, dim=-1)
    own = rows.gather(1, torch.tensor(tokens, device=rows.device)[:, None])[:, 0]
    largest = float(logits[logits.isfinite()].abs().max())
    return own.double().cpu().numpy(), rows.max(-1).values.double().cpu().numpy(), largest


def _suspect(model: Any) -> str:
    if getattr(model.config, "tie_word_embeddings", False):
        return (
            "The model's output layer is tied to its embedding; some builds keep an old copy of it. Use --engine "
            "transformers, another build of the engine, or a model with untied embeddings"
        )
    return "Use --engine transformers, or another build of the engine"
