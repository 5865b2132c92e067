"""The learner's settings; no torch is needed to read or make them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class UpdateOptions:
    """AdamW and how a step's data is split: what is the same for all models."""

    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    weight_decay: float = 0.01
    """AdamW's weight decay, on matrices alone (released code)."""
    grad_clip: float = 1.0
    """Largest gradient norm (released code)."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """'adamw8bit' keeps AdamW's moments in eight bits (needs bitsandbytes and a GPU)."""
    minibatches: int = 4
    """Optimizer updates in a pass; each takes its share of the step's trajectories."""
    epochs: int = 1
    """Passes over a step's trajectories."""
    token_budget: int = 4096
    """Tokens of a micro-batch; lowered by itself where memory runs out. Results change by rounding
    alone."""


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(UpdateOptions):
    """All that the learner must know; ``atod_algos.training.config.RunConfig``, a run's settings, extends it."""

    lr: float
    """Learning rate."""
    lr_floor: float
    """Share of the rate that is left at the last step, along a cosine; 1 keeps it constant."""
    adam_beta2: float
    """AdamW's second decay rate."""
    steps: int
    """Training steps in all, for the cosine."""
