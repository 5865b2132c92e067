"""Matrix products of the learner on a processor, through oneDNN.

PyTorch hands float32 products on a processor to MKL, which leaves half of the vector units of some makers' processors
idle; oneDNN is in the same build and does not. The invariant: inside :func:`fast_products` a linear layer and its gradients are what
they are outside, up to rounding, and depend on nothing but their inputs, so runs stay repeatable to the bit.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

_SMALLEST = 1 << 12
"""Matrices with fewer entries are multiplied as ever: calling oneDNN would cost more than it saves."""
_EVEN = 64
"""oneDNN keeps a kernel for each number of rows that it meets; were every batch of another length, these would lie scattered among large
tensors, and the memory between them could not be used again."""
_ONEDNN: bool = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
"""The operator is one of PyTorch's own that promises nothing: a build without it multiplies as ever."""


@contextlib.contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Linear layers that are called in here, and their backward passes wherever those run, use oneDNN.

    Args:
        device: of the model; anything but a processor is left alone.
    """
    if device.type != "cpu" or not _ONEDNN:
        yield
        return
    with _Replaced():
        yield


def even_filling(rows: int, device: torch.device) -> int:
    """How many rows to add to a large batch so that few different numbers of rows occur."""
    return -rows % _EVEN if device.type == "cpu" and _ONEDNN and rows >= 8 * _EVEN else 0


def same_products() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
    """For checkpointed layers (``context_fn``): computed again in the backward pass, they use the products of the forward pass."""
    return contextlib.nullcontext(), _Replaced() if _replaced.depth else contextlib.nullcontext()


class _Depth(threading.local):
    depth = 0


_replaced = _Depth()


class _Replaced(TorchFunctionMode):
    """Puts our product in the place of ``torch.nn.functional.linear``."""

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
    if weight.numel() < _SMALLEST or not x.numel():
        return linear(x, weight, bias)
    product = cast("torch.Tensor", _Linear.apply(x, weight))  # type: ignore[no-untyped-call]
    return product if bias is None else product + bias


_PLAIN = (torch.Tensor, torch.nn.Parameter)
"""What divided weights (DTensor) are not."""


class _Linear(torch.autograd.Function):
    """The product x @ weight.T for x [..., in] and weight [out, in]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x.flatten(0, -2), weight).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, flat = gradient.reshape(-1, weight.shape[0]), x.flatten(0, -2)
        of_x = _product(rows, weight.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            # The longer side as rows of the product is the faster of two equal ways.
            wide = weight.shape[0] > weight.shape[1]
            of_weight = _product(flat.t(), rows.t()).t() if wide else _product(rows.t(), flat.t())
        return of_x, of_weight


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product a @ b.T of two matrices, either of which may be a transposed view."""
    try:
        return cast("torch.Tensor", torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    except RuntimeError:
        # oneDNN does not say that memory ran out; the plain product does, and then the batch is split.
        return a @ b.t()
