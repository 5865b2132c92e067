"""Checkpoints of a model that is divided among ranks: each writes its own part (``torch.distributed.checkpoint``).

Weights and optimizer state are stored by the weights' names, whole tensors in any number of pieces, so that another number of ranks, or a
single process, reads them as well. What is kept is what is moved: float32 weights, AdamW's two moments, its count of steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from atod_algos.learner import distributed
from atod_algos.learner.optimizer import Updater
from atod_envs.errors import DataError

FOLDER = "shards"
"""Where in a checkpoint's folder they lie."""


def save_shards(folder: Path, model: Any, updater: Updater) -> None:
    """Write this rank's part; called by all ranks at once.

    Raises:
        OSError: some rank could not write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(_tensors(model, updater), checkpoint_id=str(folder / FOLDER), no_dist=distributed.size() == 1)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise OSError(str(first)) from error


def load_shards(folder: Path, model: Any, updater: Updater) -> None:
    """Read what this rank holds, however many wrote it; called by all ranks at once.

    Raises:
        DataError: a part is missing or broken, or the checkpoint is another model's.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    tensors = _tensors(model, updater)
    try:
        load(tensors, checkpoint_id=str(folder / FOLDER), no_dist=distributed.size() == 1)
    except (CheckpointException, OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(
            f"{folder} cannot be read ({str(error).splitlines()[0]}); delete it to go back to an earlier one"
        ) from error
    updater.copy_to_model()


def _tensors(model: Any, updater: Updater) -> dict[str, torch.Tensor]:
    """Everything by name; writing into these tensors changes the model and its optimizer."""
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    found: dict[str, torch.Tensor] = {}
    for name, original, moments in zip(names, updater.master_weights, updater.moments(), strict=True):
        found[f"weight/{name}"] = original.detach()
        found |= {f"{kind}/{name}": tensor for kind, tensor in moments.items()}
    return found
