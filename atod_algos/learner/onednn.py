"""Linear layers of the learner on a CPU, through oneDNN.

PyTorch gives float32 matmuls on a CPU to MKL, which leaves half of the vector units of some makers' CPUs idle. oneDNN
is in the same build and does not. The invariant: inside :func:`onednn_linear` a linear layer and its gradients are what
they are outside, up to rounding. They depend on nothing but their inputs, so runs stay repeatable to the bit.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

SMALLEST = 1 << 12
"""Smaller weights stay with PyTorch: calling oneDNN would cost more than it saves."""
EVEN_ROWS = 64
"""Rows are padded to a multiple of this. oneDNN keeps a kernel for each number of rows that it meets: with batches of
every length, kernels would lie scattered among large tensors, and the memory between them could not be used again."""
AVAILABLE: bool = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
"""The operator is private to PyTorch: a build without it uses its default."""
FASTER: bool = AVAILABLE and torch.backends.cpu.get_cpu_capability() == "AVX512"
"""On a CPU with AVX2 alone MKL leaves nothing idle, and is the faster one at the gradients (docs/log.md)."""


@contextlib.contextmanager
def onednn_linear(device: torch.device) -> Iterator[None]:
    """Linear layers that are called in here, and their backward passes wherever those run, use oneDNN where it pays.

    Args:
        device: of the model; anything but a CPU is left alone.
    """
    if device.type != "cpu" or not FASTER:
        yield
        return
    with _Replaced():
        yield


def row_padding(rows: int, device: torch.device) -> int:
    """How many rows to add to a large batch so that few different numbers of rows occur."""
    return -rows % EVEN_ROWS if device.type == "cpu" and FASTER and rows >= 8 * EVEN_ROWS else 0


def recompute_context() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
    """For checkpointed layers (``context_fn``): the recomputation uses oneDNN where the forward pass did."""
    return contextlib.nullcontext(), _Replaced() if _replaced.depth else contextlib.nullcontext()


class _Depth(threading.local):
    depth = 0


_replaced = _Depth()


class _Replaced(TorchFunctionMode):
    """Puts our layer in the place of ``torch.nn.functional.linear``."""

    def __enter__(self) -> _Replaced:
        _replaced.depth += 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *reason: Any) -> None:
        _replaced.depth -= 1
        super().__exit__(*reason)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not (type(weight) in _PLAIN and type(x) in _PLAIN and x.dtype == weight.dtype == torch.float32):
        return linear(x, weight, bias)
    if weight.numel() < SMALLEST or not x.numel():
        return linear(x, weight, bias)
    output = cast("torch.Tensor", _Linear.apply(x, weight))  # type: ignore[no-untyped-call]
    return output if bias is None else output + bias


_PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Types of unsharded weights; sharded ones are DTensors."""


class _Linear(torch.autograd.Function):
    """Matmul x @ weight.T for x [..., in] and weight [out, in]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return matmul(x.flatten(0, -2), weight).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, flat = gradient.reshape(-1, weight.shape[0]), x.flatten(0, -2)
        of_x = matmul(rows, weight.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            # The longer side as rows of the result is the faster of two equal ways.
            wide = weight.shape[0] > weight.shape[1]
            of_weight = matmul(flat.t(), rows.t()).t() if wide else matmul(rows.t(), flat.t())
        return of_x, of_weight


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Matmul a @ b.T of two matrices, either of which may be a transposed view."""
    try:
        return cast("torch.Tensor", torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    except RuntimeError:
        # oneDNN does not say that memory ran out; PyTorch's default does, and then the batch is split.
        return a @ b.t()
