"""AdamW, its schedule, and full-precision copies of half-precision weights.

The invariant: an update is computed in float32, whatever the model's own type is. A half-precision weight has a float32
original here; gradients are added up in float32, the optimizer moves the original, and the model gets it rounded.
Without this a learning rate of 1e-6 is lost in rounding: bfloat16 has eight bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from atod_algos.learner import distributed
from atod_algos.learner.options import OptimizerOptions
from atod_envs.errors import AtodError


def learning_rate(options: OptimizerOptions, step: int) -> float:
    """Learning rate of a step (from 1): linear warm-up, then a cosine down to ``lr_floor`` of it at the last step."""
    warm = min(1.0, step / max(1, options.warmup_steps))
    done = min(1.0, (step - 1) / max(1, options.steps - 1))
    fall = options.lr_floor + (1 - options.lr_floor) * 0.5 * (1 + math.cos(math.pi * done))
    return options.lr * warm * fall


class Updater:
    """The optimizer of some weights.

    Args:
        weights: the weights to be trained; half-precision ones get a float32 original.
        options: its settings.

    Raises:
        AtodError: eight-bit moments were asked for, but bitsandbytes or a GPU is missing.
    """

    def __init__(self, weights: Iterable[torch.nn.Parameter], options: OptimizerOptions) -> None:
        self.options = options
        self._pairs = [(weight, _master(weight)) for weight in weights]
        for weight, original in self._pairs:
            if original is not weight:
                weight.register_post_accumulate_grad_hook(_collector(original))  # type: ignore[no-untyped-call]
        master_weights = [original for _, original in self._pairs]
        groups = [
            {"params": [p for p in master_weights if p.ndim >= 2], "weight_decay": options.weight_decay},
            {"params": [p for p in master_weights if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer: Any = make_adamw([group for group in groups if group["params"]], options)
        self.moment_bytes = 1 if options.optimizer == "adamw8bit" else 4

    @property
    def moved(self) -> bool:
        """Whether the optimizer's state exists already (it is made by the first update)."""
        return bool(self.optimizer.state)

    @property
    def master_weights(self) -> list[torch.Tensor]:
        """The float32 tensors that are moved."""
        return [original for _, original in self._pairs]

    def update(self, lr: float) -> float:
        """Clip the gathered gradient, move the weights, clear the gradient.

        Args:
            lr: learning rate.

        Returns:
            The gradient's norm before clipping. Where it is not finite, or exactly zero, nothing has moved.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = float(distributed.full(torch.nn.utils.clip_grad_norm_(self.master_weights, self.options.grad_clip)))
        if math.isfinite(norm) and norm > 0:  # momentum and decay must not move weights that nothing was learned for
            self.optimizer.step()
            self.copy_to_model()
        self.zero_grad()
        return norm

    def copy_to_model(self) -> None:
        """Give half-precision weights what their master weights have become."""
        with torch.no_grad():
            for weight, original in self._pairs:
                if original is not weight:
                    weight.copy_(original)

    def moments(self) -> list[dict[str, torch.Tensor]]:
        """The optimizer's state of each weight by its own names, made if the first update is still to come."""
        if not self.moved:
            for group in self.optimizer.param_groups:
                for weight in group["params"]:
                    self.optimizer.state[weight] = {
                        # A fused step counts where its weights are, the others on the host.
                        "step": torch.zeros((), device=weight.device if group.get("fused") else None),
                        "exp_avg": torch.zeros_like(weight),
                        "exp_avg_sq": torch.zeros_like(weight),
                    }
        return [dict(self.optimizer.state[original]) for original in self.master_weights]

    def zero_grad(self) -> None:
        """Drop the gradient gathered so far."""
        for weight, original in self._pairs:
            weight.grad = original.grad = None

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides the model's weights."""
        kept = [original.detach() for weight, original in self._pairs if original is not weight]
        return {"optimizer": self.optimizer.state_dict(), "originals": kept}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave, of half-precision weights to float32 shards of them as well."""
        halves = [original for weight, original in self._pairs if original is not weight]
        if state["originals"] and not halves:
            halves = self.master_weights
        if halves and not state["originals"]:
            raise AtodError(
                "the checkpoint was made in float32, but here weights are in half precision; give the --device it was made on"
            )
        with torch.no_grad():
            for original, saved in zip(halves, state["originals"], strict=True):
                original.copy_(distributed.divided_like(saved, original))
        given = dict(state["optimizer"])
        order = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        given["state"] = {
            place: {
                kind: distributed.divided_like(value, order[place]) if kind != "step" else value
                for kind, value in of.items()
            }
            for place, of in given["state"].items()
        }
        self.optimizer.load_state_dict(given)


def _master(weight: torch.nn.Parameter) -> torch.Tensor:
    return weight if weight.dtype == torch.float32 else weight.detach().float().clone().requires_grad_()


def _collector(original: torch.Tensor) -> Any:
    def collect(weight: torch.Tensor) -> None:
        if weight.grad is not None:
            if original.grad is None:
                original.grad = weight.grad.float()
            else:
                original.grad += weight.grad
            weight.grad = None

    return collect


def make_adamw(groups: list[dict[str, Any]], options: OptimizerOptions) -> Any:
    """AdamW with these groups of parameters."""
    betas = (0.9, options.adam_beta2)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr, betas=betas, fused=True)
    if not all(p.is_cuda for group in groups for p in group["params"]):
        raise AtodError("--optimizer adamw8bit runs on a GPU only; use --optimizer adamw here")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise AtodError(
            "--optimizer adamw8bit needs bitsandbytes; pip install bitsandbytes, or use --optimizer adamw"
        ) from error
    return AdamW8bit(groups, lr=options.lr, betas=betas)
