"""Checkpoints: written aside and renamed, so that a run never holds half of one; checked byte for byte when read.

A checkpoint is a folder that ``from_pretrained`` loads as a model (or, of a run with adapters, as adapters), with the
optimizer's state and the step next to it, and a list of every file's checksum written last. No generator's state is
needed: every random choice of a step is derived from the run's seed and the step's number.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from agents.models import model_digest
from agents.weights import DONE, checksum_of
from atod_algos.algorithm import Algorithm
from atod_algos.learner import distributed
from atod_algos.learner.lora import base_model, load_adapters
from atod_algos.learner.optimizer import Updater
from atod_algos.teachers.routing import scoring_models
from atod_algos.training.config import RunConfig
from atod_algos.training.run_dir import read_object
from atod_envs.errors import AtodError, DataError

log = logging.getLogger(__name__)

_STATE = "trainer_state.pt"
_SHARDS = "shards"
_ADVICE = "delete it to go back to an earlier one"


def save_checkpoint(
    folder: Path,
    name: str,
    *,
    model: Any,
    tokenizer: Any,
    state: Mapping[str, Any],
    extra: Mapping[str, Any],
    updater: Updater | None = None,
) -> Path:
    """Write a checkpoint; of a run on several ranks, all call this at once.

    Args:
        folder: the run's checkpoint folder.
        name: the checkpoint's own folder name; one of that name is replaced, whole by whole.
        model: written with ``save_pretrained``; peft's wrapper writes its adapters alone.
        tokenizer: written into the same folder.
        state: tensors that training needs besides the weights.
        extra: JSON-compatible values, the step among them.
        updater: the optimizer of a model that is divided among ranks: each writes its part of both. Without it such a
            model is written whole, for use and not for resuming.

    Returns:
        The checkpoint's folder.

    Raises:
        AtodError: it could not be written (a full disk, say); earlier checkpoints are untouched.
    """
    target, part, old = folder / name, folder / f".{name}.part", folder / f".{name}.old"
    weights = {key: distributed.full(tensor) for key, tensor in model.state_dict().items()} if updater is None else {}
    try:
        if distributed.rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        distributed.barrier()
        if updater is not None:
            save_shards(part, base_model(model), updater)
        distributed.barrier()
        if distributed.rank() == 0:
            if updater is not None:
                model.config.save_pretrained(part)
            elif distributed.size() > 1:
                model.save_pretrained(part, state_dict={key: value.cpu() for key, value in weights.items()})
            else:
                model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            torch.save(dict(state), part / _STATE)
            _finish(target, part, old, extra)
        distributed.barrier()
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        recover(folder)
        reason = write_failure(error)
        if reason is None:
            raise
        raise AtodError(
            f"checkpoint {target} could not be written: {reason}; earlier ones are kept. Make room and run the same command again"
        ) from error
    return target


def _finish(target: Path, part: Path, old: Path, extra: Mapping[str, Any]) -> None:
    """List the files, have them on the disk, and put the folder in its place."""
    written = sorted(path for path in part.rglob("*") if path.is_file())
    files = {path.relative_to(part).as_posix(): checksum_of(path) for path in written}
    (part / DONE).write_text(json.dumps({**extra, "files": files}))
    for path in (*part.rglob("*"), part):
        _fsync(path)
    # A folder cannot replace a folder in one stroke: between the two renames the old one stands aside, where
    # `recover` finds it.
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    part.rename(target)
    _fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    path: Path, model: Any, updater: Updater, adapters: Any = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load weights into a model; return the training state and the extra values.

    A checkpoint that was written in parts is read by any number of ranks, and one that was written whole by several.

    Args:
        path: the checkpoint's folder.
        model: the model that gets the weights.
        updater: its optimizer, which gets its state at once where the checkpoint was written in parts.
        adapters: peft's wrapper around it; then the checkpoint holds adapters alone.

    Raises:
        DataError: the folder is not a complete checkpoint, a byte of it has changed, or it does not fit the model.
    """
    from safetensors import SafetensorError

    try:
        extra = require_whole(path)
        state = torch.load(path / _STATE, map_location="cpu", weights_only=True)
        if (path / _SHARDS).is_dir():
            load_shards(path, model, updater)
            return state, extra
        if adapters is not None:
            load_adapters(adapters, path)
            return state, extra
        weights = _weights(path, model)
    except DataError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        EOFError,
        UnpicklingError,
        SafetensorError,
    ) as error:
        raise DataError(f"{path} is not a complete checkpoint ({error}); {_ADVICE}") from error
    own = model.state_dict()
    weights = {name: distributed.divided_like(tensor, own.get(name)) for name, tensor in weights.items()}
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # equal names, other sizes
        raise DataError(f"{path} holds another model: {str(error).strip().splitlines()[-1].strip()}") from error
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise DataError(
            f"{path} holds another model: parameter {[*unexpected, *(set(missing) - tied)][0]!r} does not fit"
        )
    return state, extra


def _weights(path: Path, model: Any) -> dict[str, torch.Tensor]:
    """A whole checkpoint's weights, by the names that they have in the model.

    transformers writes some architectures, mixtures of experts and models that also see among them, under their
    published names, and only its own loading knows which is which.

    Raises:
        DataError: they are those of another model.
    """
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("model*.safetensors")):
        weights |= load_file(file)
    if weights.keys() <= model.state_dict().keys():
        return weights
    written, own = read_object(path / "config.json", _ADVICE).get("model_type"), model.config.model_type
    if written != own:
        raise DataError(f"{path} holds another model: of type {written!r}, where {own!r} is expected")
    kind: Any = next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch."))  # not FSDP's
    dtype = next(iter(weights.values())).dtype
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        read, info = kind.from_pretrained(path, dtype=dtype, output_loading_info=True)
    foreign = sorted({*info["missing_keys"], *info["unexpected_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if foreign:
        raise DataError(f"{path} holds another model: parameter {foreign[0]!r} does not fit")
    return dict(read.state_dict())


def require_whole(path: Path) -> dict[str, Any]:
    """Check that every file of a checkpoint is as it was written; return the extra values, the step among them.

    Raises:
        DataError: the folder is not a complete checkpoint, or a byte of it has changed.
    """
    extra = read_object(path / DONE, _ADVICE, files=dict, step=int)
    for name, checksum in extra.pop("files").items():
        try:
            same = checksum_of(path / name) == checksum
        except OSError as error:
            raise DataError(f"{path} is not a complete checkpoint ({error}); {_ADVICE}") from error
        if not same:
            raise DataError(f"{path} is not a complete checkpoint ({name} is not as it was written); {_ADVICE}")
    return extra


# --- the models that are read besides it --------------------------------------------------------------------------


def model_digests(config: RunConfig, algorithm: Algorithm) -> dict[str, str | None]:
    """What the models and other files that a run reads besides its checkpoints are made of: they may change under it.

    Only the first rank compares them; the others get nothing.
    """
    if distributed.rank() > 0:
        return {}
    asked = [("student", config.student, config.models)]
    asked += [(model.role, model.name, model.models) for model in scoring_models(config, algorithm)]
    return {
        f"{role} {where}" if name == "builtin" else name: model_digest(name, where, role) for role, name, where in asked
    } | dict(algorithm.reads())


def require_same_models(path: Path, extra: Mapping[str, Any], digests: Mapping[str, str | None]) -> None:
    """Refuse a checkpoint that was trained with other models than those that lie under their names now.

    Raises:
        AtodError: names the model.
    """
    known = extra.get("models", {})
    for name, digest in digests.items():
        if known.get(name) not in (None, digest):  # earlier versions looked at no model of a hub, or at none
            raise AtodError(
                f"{path} was trained with another {'' if name.startswith('--') else 'model '}{name}: its files have changed since; "
                "give the old ones back, or start another run with --run"
            )


# --- of a model that is divided among ranks ----------------------------------------------------------------------
#
# Each rank writes its own part (torch.distributed.checkpoint), by the weights' names, whole tensors in any number of
# pieces, so that another number of ranks, or a single process, reads them as well. What is kept is what is moved:
# float32 weights, AdamW's two moments, its count of steps.


def save_shards(folder: Path, model: Any, updater: Updater) -> None:
    """Write this rank's part; called by all ranks at once.

    Raises:
        OSError: some rank could not write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(_tensors_by_name(model, updater), checkpoint_id=str(folder / _SHARDS), no_dist=distributed.size() == 1)
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

    tensors = _tensors_by_name(model, updater)
    try:
        load(tensors, checkpoint_id=str(folder / _SHARDS), no_dist=distributed.size() == 1)
    except (CheckpointException, OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(
            f"{folder} cannot be read ({str(error).splitlines()[0]}); delete it to go back to an earlier one"
        ) from error
    updater.copy_to_model()


def _tensors_by_name(model: Any, updater: Updater) -> dict[str, torch.Tensor]:
    """Everything by name; writing into these tensors changes the model and its optimizer."""
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    found: dict[str, torch.Tensor] = {}
    for name, original, moments in zip(names, updater.master_weights, updater.moments(), strict=True):
        found[f"weight/{name}"] = original.detach()
        found |= {f"{kind}/{name}": tensor for kind, tensor in moments.items()}
    return found


# --- a run's checkpoints ------------------------------------------------------------------------------------------


def recover(folder: Path) -> None:
    """Undo what an ended process left half done: put back a checkpoint that stood aside, remove half-written ones."""
    for old in folder.glob(".*.old"):
        target = folder / old.name[1 : -len(".old")]
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
    for part in folder.glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True)


def tidy(folder: Path, keep: int) -> None:
    """Undo what an ended process left half done or had not deleted yet, and say what is there besides; by all ranks."""
    if distributed.rank() == 0:
        recover(folder)
        prune(folder, keep)  # an earlier process may have been killed just before it did
        for name in strays(folder):
            log.warning("%s is no complete checkpoint; left alone", folder / name)
    distributed.barrier()


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    return max(_complete(folder), key=step_of, default=None)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells; -1 for any other name."""
    number = path.name.removeprefix("step_")
    return int(number) if path.name.startswith("step_") and number.isdecimal() and number.isascii() else -1


def strays(folder: Path) -> list[str]:
    """Names in a run's checkpoint folder that no run writes, or that are not complete."""
    known = {"best", *(path.name for path in _complete(folder))}
    return sorted(path.name for path in folder.iterdir() if path.name not in known)


def _complete(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step_*") if step_of(path) >= 0 and (path / DONE).is_file()]
    return sorted(found, key=step_of)


def prune(folder: Path, keep: int) -> None:
    """Delete all complete step checkpoints but the newest ``keep``, and what is left of older deletions."""
    kept = _complete(folder)[-keep:]
    for path in folder.glob("step_*"):
        if not kept or not 0 <= step_of(path) < step_of(kept[0]):
            continue
        # The list of files goes first: what is left of a deletion cut short is then no checkpoint.
        (path / DONE).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def _fsync(path: Path) -> None:
    """Have the system write a file or a folder's list of names to the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_failure(error: Exception) -> str | None:
    """Why a file could not be written, in a line; None if the error is of another kind.

    Torch and safetensors report a failed write as errors of their own kinds.
    """
    text = str(error).lower()
    words = ("write", "i/o", "os error", "no space", "file too large", "iostream")
    if not isinstance(error, OSError) and not any(word in text for word in words):
        return None
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
