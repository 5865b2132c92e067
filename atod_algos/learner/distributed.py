"""Several processes, one run: who computes what, and how the parts are gathered (``torchrun``, PyTorch FSDP2).

Every rank holds the whole batch of a step, which is small, and a shard of the weights, gradients and optimizer state,
which are not. Groups are played, rows scored and micro-batches learned in shares. Their trajectories, log-probs and
gradients are gathered or reduced, so everything between is computed alike on all ranks. The invariant: with any number
of ranks the run is the one that a single process makes, up to the order in which numbers are added.

Without ``torchrun`` there is one rank, and every function here does nothing.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from atod_envs.errors import AtodError

Item = TypeVar("Item")
Result = TypeVar("Result")


def start(device: str) -> str:
    """Join the other processes if ``torchrun`` started this one.

    Args:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Returns:
        The device to use: with GPUs, the one of this process.

    Raises:
        AtodError: there are more processes than GPUs on this node.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu and not dist.is_initialized():
        local, held = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= held:
            raise AtodError(
                f"torchrun started {local + 1} or more processes here, but there are {held} GPUs; lower --nproc-per-node"
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        atexit.register(_leave)
    return f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process is the only one: it waits for no other rank, and none waits for it."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def size() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def barrier() -> None:
    """Wait for all ranks.

    It also has to be the last thing that ranks do together. Gloo's threads may still hold the tensors of any other
    operation; one that lets go of them while the interpreter ends aborts the process. A barrier has none.
    """
    if size() > 1:
        dist.barrier()


def gather(value: Result) -> list[Result]:
    """Every rank's value, by rank."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Result) -> Result:
    """The first rank's value."""
    return gather(value)[0] if size() > 1 else value


def all_reduce(arrays: Sequence[np.ndarray]) -> None:
    """Add arrays up over the ranks, in place. Entries that one rank filled are the same everywhere afterwards."""
    if size() > 1:
        for array in arrays:
            dist.all_reduce(torch.from_numpy(array))


def iter_shard(parts: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """This rank's share of some parts.

    A forward pass of a sharded model is made by all ranks at once, so all of them get equally many parts: where they do
    not come out even, a rank gets a part again that does not count.

    Args:
        parts: the same on every rank, in the same order.

    Yields:
        A part, and whether it counts.
    """
    every = list(parts)
    for turn in range(-(-len(every) // size())):
        place = turn * size() + rank()
        yield (every[place], True) if place < len(every) else (every[0], False)


def per_rank_budget(budget: int, total: int) -> int:
    """Tokens of a micro-batch, few enough that every rank gets work.

    Args:
        budget: the most that fit.
        total: tokens of everything that is to be divided.
    """
    return budget if size() == 1 else max(1, min(budget, -(-total // size())))


# --- the model ----------------------------------------------------------------------------------------------------


def shard(model: Any, compute: torch.dtype | None = None) -> None:
    """Divide a model among the ranks (FSDP2): each holds its share, and a layer is whole only while it computes.

    Args:
        model: a causal language model, equal on all ranks, on this rank's device; changed in place.
        compute: type in which its layers compute; by default that of its weights. Gradients are added up in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    from atod_algos.learner.packing import packable

    packable(model)  # found out, and remembered, while the model is whole
    kind = next(model.parameters()).device.type
    mesh = init_device_mesh(kind, (size(),))
    half = compute if compute is not None and compute != next(model.parameters()).dtype else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # The head may share the embedding's weight, so both are whole together: see ``unsharded``.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    model.run_unsharded = MethodType(_run_unsharded, model)
    register_fsdp_forward_method(model, "run_unsharded")


def _run_unsharded(_: Any, work: Callable[..., Result], *arguments: Any) -> Result:
    return work(*arguments)


def unsharded(model: Any, work: Callable[..., Result], *arguments: Any) -> Result:
    """Run some work in which the model's embeddings and head are whole; its layers see to themselves.

    Args:
        model: a model, sharded or not.
        work: uses the model; returns a tensor or a tuple, so that the backward pass finds its way.
        arguments: for ``work``.
    """
    run = getattr(model, "run_unsharded", None)
    return work(*arguments) if run is None else run(work, *arguments)


def full(tensor: Any) -> Any:
    """A whole tensor of a sharded one; called by all ranks at once. Anything else is given back."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def divided_like(value: torch.Tensor, like: Any) -> torch.Tensor:
    """A whole tensor divided among the ranks as another one is."""
    if not hasattr(like, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
