"""What a step will need of memory, what it used, and what to do when there is not enough.

The prediction is not a formula of one architecture: one small forward pass counts the bytes that the backward pass will
want back, for each token, on the model itself. The invariant: splitting a batch changes rounding alone, so running out
of memory costs time and never a result.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from agents.logits import decoder_of, in_eval_mode
from atod_algos.learner import distributed
from atod_algos.learner.onednn import recompute_context
from atod_algos.learner.packing import pack, packable, packed_states
from atod_envs.errors import AtodError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

MIB = 1 << 20
_PROBE_TOKENS = 64


# --- used ---------------------------------------------------------------------------------------------------------


def used(device: torch.device) -> int:
    """Bytes in use now: of the GPU by torch, or of the machine by this process."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _status("VmRSS")


def start_peak(device: torch.device) -> None:
    """Begin to watch for the highest use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        log.debug("this system keeps no resettable peak; the process's own is reported")


def peak(device: torch.device) -> int:
    """Bytes at the highest point since :func:`start_peak` (since the process began where that cannot be reset)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM")


def available(device: torch.device) -> int | None:
    """Bytes that can still be had; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + idle)
    free_bytes = _field(Path("/proc/meminfo"), "MemAvailable")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            # What files keep in memory counts as used there, but is given up when it is wanted.
            kept = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
            files = int(kept.get("inactive_file", 0)) + int(kept.get("active_file", 0))
            left = int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()) + files
            free_bytes = left if free_bytes is None else min(free_bytes, left)
    except (OSError, ValueError):
        pass
    return free_bytes


def _status(name: str) -> int:
    found = _field(Path("/proc/self/status"), name)
    if found is not None:
        return found
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most if sys.platform == "darwin" else most * 1024)


def _field(path: Path, name: str) -> int | None:
    try:
        for line in path.read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


# --- predicted ----------------------------------------------------------------------------------------------------


def bytes_per_token(model: Any) -> float:
    """Bytes that the backward pass wants kept for each token of a micro-batch, the output head apart.

    Counted on a small pass. With recomputed layers (gradient checkpointing) only a layer's input is kept, and one
    layer's inside at a time.
    """
    decoder = decoder_of(model)
    recomputes = bool(getattr(decoder, "gradient_checkpointing", False))
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    def run() -> torch.Tensor:
        if packable(model):
            return packed_states(model, pack([ids]))[0]
        rows = torch.from_numpy(ids)[None].to(next(model.parameters()).device)
        return decoder(input_ids=rows, use_cache=False).last_hidden_state[0]  # type: ignore[no-any-return]

    ids = np.arange(_PROBE_TOKENS) % int(model.get_input_embeddings().num_embeddings)
    noted = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    # Layers are recomputed in training only, so everything is counted here.
    with in_eval_mode(model), torch.enable_grad(), noted:
        states = run()
    whole = sum(seen.values()) / _PROBE_TOKENS
    if not recomputes:
        return whole
    layers = int(decoder.config.num_hidden_layers)
    return whole / layers + layers * states.shape[-1] * states.element_size()


def head_bytes(weight: torch.Tensor) -> int:
    """Bytes that the output head's weight needs besides its gradient: a chunk's share of that, before it is added.

    Of a model that is divided among ranks, the weight and its gradient are whole then.
    """
    divided, learns = distributed.size() > 1, bool(weight.requires_grad)
    share = weight.element_size()
    if weight.device.type == "cpu" and weight.dtype != torch.float32:
        share += 4  # a CPU adds half precision to float32 through a copy in float32
    return weight.numel() * (learns * share + divided * (1 + learns) * weight.element_size())


def predict_peak(
    now: int, *, tokens: int, per_token: float, logits: int, head: int, gradient: int, moments: int, states: int
) -> int:
    """Bytes at the highest point of an update.

    Args:
        now: in use before it.
        tokens: of the largest micro-batch.
        per_token: :func:`bytes_per_token`.
        logits: logits that are alive at once.
        head: :func:`head_bytes`.
        gradient: bytes of the gradient, gathered once more while it is made.
        moments: bytes of the optimizer's state that do not exist yet.
        states: bytes of the states that predict a token, and of what is handed back through them.
    """
    # Logits, their log-softmax, the product of the entropy and two gradients: five copies at once.
    return int(now + tokens * per_token + 5 * 4 * logits + head + gradient + moments + states)


# --- saved --------------------------------------------------------------------------------------------------------


def recomputed(part: Callable[..., tuple[torch.Tensor, ...]], states: torch.Tensor, *others: torch.Tensor) -> Any:
    """A part of the output head, whose inside is computed again in the backward pass instead of kept.

    The part's share of the head's gradient is added up at once. With torch's own checkpoints autograd holds the sum of
    all parts' shares apart until the last has come, in the type of the weights.

    Args:
        part: gives tensors from states and further tensors.
        states: what gradients flow back through, besides the model's weights.
        others: constants.
    """
    if not states.requires_grad:  # nothing is kept, or nothing but the head learns
        return part(states, *others)
    return _Recomputed.apply(part, states, *others)  # type: ignore[no-untyped-call]


class _Recomputed(torch.autograd.Function):
    """See :func:`recomputed`; what the loss does not use has no backward pass."""

    @staticmethod
    def forward(ctx: Any, part: Any, states: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.part, ctx.again = part, recompute_context()[1]
        ctx.save_for_backward(states, *others)
        return part(states, *others)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        states, *others = ctx.saved_tensors
        states = states.detach().requires_grad_()
        with torch.enable_grad(), ctx.again:
            found = ctx.part(states, *others)
        used = [pair for pair in zip(found, gradients, strict=True) if pair[1] is not None and pair[0].requires_grad]
        torch.autograd.backward([value for value, _ in used], [gradient for _, gradient in used])
        return None, states.grad, *(None for _ in others)


# --- not enough ---------------------------------------------------------------------------------------------------


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


class Budget:
    """The tokens of a micro-batch; halved, with a warning, when a pass runs out of memory.

    Args:
        tokens: to begin with.

    Attributes:
        tokens: at present.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def run(self, what: str, attempt: Callable[[int], Result], *, least: int, undo: Callable[[], None]) -> Result:
        """Try with the present budget; on running out, undo, halve and try again from the start.

        Args:
            what: names the work, for the log.
            attempt: does it with so many tokens at once.
            least: tokens below which a smaller budget splits nothing more (the longest row).
            undo: removes what a failed attempt left.

        Raises:
            AtodError: even single rows do not fit.
        """
        while True:
            try:
                return attempt(self.tokens)
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error) or distributed.size() > 1:  # one rank alone cannot begin anew
                    raise
                reason = str(error).splitlines()[0] if str(error) else "MemoryError"
            # Outside of the handler: the error holds on to the pass's tensors.
            undo()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.tokens <= least:
                raise AtodError(
                    f"out of memory in the {what}: one row of {least} tokens does not fit ({reason}); use "
                    "--gradient-checkpointing, a smaller --max-context, --lora-rank 16, or a machine with more memory"
                )
            self.tokens = max(least, self.tokens // 2)
            log.warning("out of memory in the %s (%s); going on with --token-budget %d", what, reason, self.tokens)
