"""Hidden states to logits exactly as a model's own ``forward`` does it, and the check that a model is understood.

Rollouts, scoring and training run a model's decoder and its output layer apart: only states that predict a sampled
token become logits. Some models do more behind the output layer (Granite and Cohere scale, Gemma 2 and NanoChat cap).
The invariant: a model is used only after its logits, made here, equalled ``model(ids).logits`` on a probe; anything
else is refused by name. One function, :func:`logit_head`, decides it for engine, learner, scorers and weight check.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch

from atod_envs.errors import AtodError

CLOSED = -1e30
"""Logit of an id that has no token. Finite, so that 0 log 0 stays 0 in every sum."""
_PROBE_LOGITS = (1.0, 40.0, 1000.0)
"""Sizes of the probe's logits: a cap shows at those above it, whatever the weights are."""
_PROBE_LENGTHS = (7, 19)
_TOLERANCE = {torch.float16: 5e-2, torch.bfloat16: 8e-2}
"""Largest error of the probe's logits, as a share of their spread; float32 below."""
_TOLERANCE_FLOAT32 = 5e-4
_TOLERANCE_OF_PASSES = {torch.float16: 5e-2, torch.bfloat16: 0.15}
"""The same for two passes through all layers, as a mean over places."""
_WINDOWS = ("sliding_window", "attention_window", "attention_window_size", "window_size", "attention_chunk_size")
"""What configurations call the number of positions that a layer looks back."""
_MISSING = "atod_missing_ids"


class UnsupportedModel(AtodError):
    """A model whose log-probs cannot be had as training needs them."""


class LogitHead:
    """A model's output layer with all that its ``forward`` does behind it.

    Args:
        model: the causal language model.
        plain: nothing is done behind the output layer.

    Attributes:
        plain: as given.
        rows: size of the vocabulary, ids without a token included.
    """

    def __init__(self, model: Any, plain: bool) -> None:
        self.plain = plain
        self._model = model
        self._output = model.get_output_embeddings()
        self.rows = vocabulary_rows(model)
        missing = getattr(model, _MISSING, None)
        self._missing: torch.Tensor | None = missing if missing is not None and len(missing) else None

    def raw(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [m, V] of states [m, D], in the model's own type; ids without a token are still open."""
        if self.plain:
            return cast("torch.Tensor", self._output(states))
        return _through_forward(self._model, states)

    def close(self, logits: torch.Tensor) -> torch.Tensor:
        """Shut out the ids that have no token, in place; logits [m, V] in float32."""
        if self._missing is None:
            return logits
        if self._missing.device != logits.device:
            self._missing = self._missing.to(logits.device)
        return logits.index_fill_(-1, self._missing, CLOSED)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [m, V] of states [m, D], in float32; ids without a token have no probability."""
        logits = self.raw(states)
        # In place only where the logits are fresh: a cap's backward pass may want its own output.
        safe = self._missing is None or self.plain or logits.dtype != torch.float32
        return self.close(logits.float() if safe else logits.clone())


_HEADS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def logit_head(model: Any) -> LogitHead:
    """The output layer of a model; the first call for a model checks it against ``model(ids).logits``.

    Args:
        model: a ``transformers`` causal language model (not peft's wrapper).

    Raises:
        UnsupportedModel: the two differ, or the model gives no finite numbers; names the model and what to use instead.
    """
    plain = _HEADS.get(model)
    if plain is None:
        plain = _HEADS[model] = _check(model)
    return LogitHead(model, plain)


def text_config(model: Any) -> Any:
    """The configuration of the language model; of a multimodal model, that of the text model inside."""
    config = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def decoder_of(model: Any) -> Any:
    """The module that turns ids into states: transformers' own answer, if it is part of the model and reads ids."""
    found = model.get_decoder()
    embedding = model.get_input_embeddings()
    if found is not model and any(part is embedding for part in found.modules()):
        return found
    holders = (
        child for child in (model.base_model, *model.children()) if child is not model and child is not embedding
    )
    return next((child for child in holders if any(part is embedding for part in child.modules())), found)


def vocabulary_rows(model: Any) -> int:
    """How many ids a model has logits for."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return int(text_config(model).vocab_size if weight is None else weight.shape[0])


def longest_context(model: Any) -> int:
    """Most positions that a model is made for and has one set of log-probs for; a model that names none gets 2^17."""
    config = text_config(model)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "context_length")
    values = (getattr(config, name, None) for name in names)
    longest = next((value for value in values if isinstance(value, int) and value > 0), 1 << 17)
    return min(longest, steady_positions(model) or longest)


def steady_positions(model: Any) -> int | None:
    """Up to how many positions a model's rotary frequencies stay the same; None where they do not depend on the length.

    Of ``longrope`` and ``dynamic`` models every log-prob changes when the row grows past this number, those of tokens
    that were sampled before it included: sampling and scoring would not see the same distribution.
    """
    config = text_config(model)
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    original = getattr(config, "original_max_position_embeddings", None)
    found = []
    for rope in (given, *given.values()):  # one for all layers, or one for each kind of layer
        kind = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, dict) else None
        if kind == "longrope" or "dynamic" in str(kind):
            wide = rope.get("original_max_position_embeddings") or original or config.max_position_embeddings
            found.append(int(config.max_position_embeddings if kind != "longrope" else wide))
    return min(found, default=None)


def require_steady_positions(model: Any, length: int, what: str) -> None:
    """Refuse rows that are longer than a model's rotary frequencies stay the same.

    Raises:
        UnsupportedModel: names the length, and what to set.
    """
    steady = steady_positions(model)
    if steady is not None and length > steady:
        raise UnsupportedModel(
            f"{what} {type(model).__name__} changes its rotary frequencies beyond {steady:,} positions, so that what was sampled "
            f"before would get other log-probs; {length:,} are wanted: set --max-context to at most {steady:,}"
        )


def attends_fully(model: Any, length: int | None = None) -> bool:
    """Whether the configuration says that every layer attends to the whole context, or to ``length`` positions."""
    config = text_config(model)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = [getattr(config, name, None) for name in _WINDOWS]
    window = min((int(width) for width in windows if isinstance(width, int) and width > 0), default=0)
    if not getattr(config, "layer_types", None) and window:
        kinds = {"sliding_attention"}
    if length is not None and window and window >= length:
        kinds -= {"sliding_attention"}
    return kinds <= {"full_attention"}


# --- the vocabulary -----------------------------------------------------------------------------------------------


def limit_vocabulary(model: Any, ids: Iterable[int]) -> None:
    """Let a model give probability to these ids alone; what was shut out before stays out.

    Models have more rows than their tokenizer has tokens, to fill up tiles or a family's largest vocabulary. The rows
    were never trained, and the ids mean nothing.
    """
    before = getattr(model, _MISSING, None)
    shut, allowed = set() if before is None else set(before.tolist()), set(ids)
    missing = sorted(shut | {i for i in range(vocabulary_rows(model)) if i not in allowed})
    setattr(model, _MISSING, torch.tensor(missing, dtype=torch.int64))


def usable_ids(model: Any) -> np.ndarray:
    """The ids that a model may say, rising."""
    open_ids = np.ones(vocabulary_rows(model), dtype=bool)
    missing = getattr(model, _MISSING, None)
    if missing is not None:
        open_ids[missing.cpu().numpy()] = False
    return np.flatnonzero(open_ids)


def require_known_ids(model: Any, rows: Sequence[np.ndarray], what: str) -> None:
    """Refuse token ids that a model has no embedding for, and rows that it has no steady log-probs for.

    Raises:
        AtodError: names the id and the model's vocabulary, or the length.
    """
    require_steady_positions(model, max(map(len, rows), default=0), what)
    size = int(model.get_input_embeddings().weight.shape[0])
    worst = max((int(row.max()) for row in rows if len(row)), default=-1)
    if worst >= size:
        raise AtodError(
            f"{what} {type(model).__name__} has embeddings for {size:,} ids, but a prompt holds id {worst}; use a model whose "
            "vocabulary has all of the tokenizer's tokens"
        )


# --- the model's own forward pass ---------------------------------------------------------------------------------


def decoder_states(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """States [B, T, D] of rows that are padded on the right. No real token of a causal model sees the padding."""
    return cast("torch.Tensor", decoder_of(model)(input_ids=ids_BT, use_cache=False).last_hidden_state)


class _Given(dict[str, Any]):
    """What a decoder would have returned: its states, and nothing else."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__(last_hidden_state=states)
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, key: Any) -> Any:
        return self.last_hidden_state if key in (0, "last_hidden_state") else () if isinstance(key, slice) else None


class _Decoded(torch.nn.Module):
    """Stands where the decoder, or what holds it, stood, and hands over states that were computed before."""

    def __init__(self, stood: Any, decoder: Any, states: torch.Tensor) -> None:
        super().__init__()
        self._known = (stood, decoder, states)  # a tuple: these are not modules of this one

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            stood, decoder, _ = self.__dict__["_known"]
            found = getattr(stood, name)
            holds = isinstance(found, torch.nn.Module) and decoder in found.modules()
            return self if holds else found

    def forward(self, *_: Any, **__: Any) -> _Given:
        return _Given(self._known[2])


def _through_forward(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Run a model's own ``forward`` from its decoder's states on.

    The model's modules are used as they are; only a shallow copy of the outer model is told of another decoder, so
    nothing is changed that another thread could be using.
    """
    decoder = decoder_of(model)
    outer = copy.copy(model)
    outer.__dict__ = dict(model.__dict__)
    modules = dict(model._modules)
    stood = next(name for name, child in modules.items() if child is not None and decoder in child.modules())
    modules[stood] = _Decoded(modules[stood], decoder, states[None])
    outer.__dict__["_modules"] = modules
    ids = torch.zeros((1, len(states)), dtype=torch.int64, device=states.device)
    return cast("torch.Tensor", type(model).forward(outer, input_ids=ids).logits[0])


# --- the check ----------------------------------------------------------------------------------------------------


def own_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """``model(ids).logits`` of one row, [T, V] in float32."""
    device = next(model.parameters()).device
    return cast("torch.Tensor", model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float())


def probe_ids(model: Any, count: int, seed: int = 0) -> list[int]:
    """Some ids of a model's vocabulary, the same for every model of a size."""
    known = usable_ids(model)
    return [int(known[i]) for i in np.random.default_rng(seed).integers(0, len(known), count)]


def agree(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether logits [m, V] are the same up to rounding, measured against the spread of each row."""
    spread = (expected - expected.mean(-1, keepdim=True)).abs().amax(-1, keepdim=True).clamp(min=1e-6)
    error = float(((got - expected) / spread).abs().max())
    return error <= _TOLERANCE.get(dtype, _TOLERANCE_FLOAT32)


def passes_agree(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two passes of one model through all its layers gave the same logits [m, V], up to rounding.

    In half precision single places are no evidence: rounding alone moves some logit of SmolLM2-135M by up to 0.23 of
    the spread in bfloat16, 0.03 to 0.04 in the mean over places. What is computed wrongly is off at most of them.
    """
    if dtype not in _TOLERANCE_OF_PASSES:
        return agree(got, expected, dtype)
    spread = (expected - expected.mean(-1, keepdim=True)).abs().amax(-1).clamp(min=1e-6)
    error = float(((got - expected).abs().amax(-1) / spread).mean())
    return error <= _TOLERANCE_OF_PASSES[dtype]


@contextlib.contextmanager
def in_eval_mode(*models: Any) -> Iterator[None]:
    """Models as they answer, without dropout; each is afterwards as it was."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, training in zip(models, modes, strict=True):
            model.train(training)


def _check(model: Any) -> bool:
    """Whether the output layer alone gives a model's logits; raises where they cannot be had at all."""
    name, dtype = type(model).__name__, next(model.parameters()).dtype
    try:
        with torch.no_grad(), in_eval_mode(model):
            rows = [probe_ids(model, length, length) for length in _PROBE_LENGTHS]
            expected = torch.cat([own_logits(model, row) for row in rows])
            if not bool(torch.isfinite(expected).all()):
                raise UnsupportedModel(_not_finite(model))
            width = max(_PROBE_LENGTHS)
            ids = torch.tensor([row + [row[0]] * (width - len(row)) for row in rows], device=expected.device)
            states = decoder_states(model, ids)
            states = torch.cat([line[: len(row)] for line, row in zip(states, rows, strict=True)])
            plain = _is_plain(model, states)
            got = LogitHead(model, plain).raw(states).float()
            if got.shape == expected.shape and passes_agree(got, expected, dtype):
                return plain
            reason = "its logits are not those of its own forward pass where rows are computed together"
    except AtodError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
    raise UnsupportedModel(
        f"{name} cannot be used here: {reason}. Use a causal decoder such as Qwen3, Llama, Mistral, Gemma or Granite (docs/models.md "
        "lists what was tried)"
    )


def _is_plain(model: Any, states: torch.Tensor) -> bool:
    """Whether ``forward`` does nothing behind the output layer, seen on states that make small and large logits."""
    output = model.get_output_embeddings()
    if output is None or not hasattr(output, "weight"):
        return False
    try:
        alone = output(states).float()
        size = float(alone.abs().max()) or 1.0
        for wanted in _PROBE_LOGITS:
            larger = states * (wanted / size)
            a, b = output(larger).float(), _through_forward(model, larger).float()
            if a.shape != b.shape or not agree(b, a, states.dtype):
                return False
    except StopIteration:  # the decoder is no part of the model's own modules
        return True
    except (RuntimeError, ValueError, TypeError):
        return False  # what the output layer takes is not what the decoder gives
    return True


def _not_finite(model: Any) -> str:
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            return (
                f"the weights of {type(model).__name__} are broken: {name} holds values that are no finite numbers; load another copy "
                "of the checkpoint"
            )
    return f"{type(model).__name__} gives logits that are no finite numbers although its weights are finite; try another --dtype"


def require_finite(model: Any) -> None:
    """Refuse a model with a weight that is not a finite number.

    Raises:
        UnsupportedModel: names the weight.
    """
    # A sum shows NaN and infinity; only if it is not finite are the entries looked at.
    if not all(bool(torch.isfinite(weight.detach().sum(dtype=torch.float32))) for weight in model.parameters()):
        for weight in model.parameters():
            if not bool(torch.isfinite(weight.detach()).all()):
                raise UnsupportedModel(_not_finite(model))
