"""A device apart from the CPU that needs no hardware: what crosses over to it and back is written down.

Tensors there are wrappers that call themselves ``meta``; each holds a CPU tensor that does the arithmetic. An operation
on tensors of both sides fails, as on a GPU. So does one on a tensor that was made there without a copy.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

THERE = "meta"
WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}
"""Operations whose result, or its shape, the host waits for."""


class Far(torch.Tensor):
    """A tensor on the fake device; ``near`` is the CPU tensor that it stands for."""

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype, device=THERE
        )

    def __init__(self, near):
        self.near = near

    def tolist(self):
        return self.to("cpu").tolist()

    def data_ptr(self):
        return self.near.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on the fake device, outside of it")


class _Device(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.crossings = []  # "in" to the device, "out" from it or a wait for it
        self.operations = []  # (name, shapes of its tensors), in order

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        far = [tensor for tensor in tensors if isinstance(tensor, Far)]
        near = [tensor for tensor in tensors if not isinstance(tensor, Far)]
        if any(tensor.device.type == THERE for tensor in near):
            raise RuntimeError(f"{func}: a tensor was made on the device without a copy")
        name = func.overloadpacket.__name__
        devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        if func._schema.is_mutable:
            to_far = isinstance(args[0], Far)
        else:
            to_far = devices[0].type == THERE if devices else bool(far)
        if any(tensor.ndim for tensor in (near if to_far else far)):
            if name not in ("to", "_to_copy", "copy_"):
                raise RuntimeError(f"{func}: tensors on two devices")
            self.crossings.append("in" if to_far else "out")
        elif far and name in WAITING:
            self.crossings.append("out")
        elif name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1]):
            self.crossings.append("out")  # how many places are true
        self.operations.append((name, tuple(tuple(tensor.shape) for tensor in tensors)))
        here = tree_map_only(Far, lambda tensor: tensor.near, (args, kwargs or {}))
        here = tree_map_only(torch.device, lambda _: torch.device("cpu"), here)
        result = func(*here[0], **here[1])
        if func._schema.is_mutable:
            return args[0]
        return tree_map_only(torch.Tensor, Far, result) if to_far else result


class _Copies(TorchFunctionMode):
    """``torch.tensor(..., device=THERE)`` copies, which no operation shows."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == THERE:
            device = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@contextlib.contextmanager
def fake_device(model):
    """Move a model to the fake device, for good, and count what crosses over.

    Yields:
        An object with ``crossings`` (``"in"``, ``"out"``) and ``operations`` (name and shapes), which may be cleared.
    """
    with _Copies(), _Device() as device:
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = torch.nn.Parameter(Far(weight.data), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = Far(buffer)
        yield device
