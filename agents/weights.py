"""Whether a model's files are those that were written and hold all of its weights, as numbers that can be trained."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from atod_envs.files import read_object

DONE = "complete.json"
"""File of a training's checkpoint: the checksum of every other one, by its name."""

_LAYER = re.compile(r"\.\d+\.")
_BUFFER = re.compile(r"(inv_freq|position_ids|attn\.(masked_)?bias|attention\.(masked_)?bias)$")
"""What older versions of transformers wrote besides weights: masks and frequencies, which are computed."""


def require_as_written(folder: Path, kinds: Iterable[str]) -> None:
    """Refuse a training's checkpoint of which something has changed since it was written; other folders are not known.

    Args:
        folder: of the model.
        kinds: patterns of the files that are read.

    Raises:
        DataError: the list of checksums is broken.
        OSError: a file is gone, or is another one.
    """
    files = read_object(folder / DONE).get("files") if (folder / DONE).is_file() else None
    for name, checksum in files.items() if isinstance(files, dict) else ():
        if any(Path(name).match(kind) for kind in kinds) and checksum_of(folder / name) != checksum:
            raise OSError(
                f"its file {name} is not as the training wrote it; restore it, or take another checkpoint (a model that is meant to be "
                "changed is exported first: atod export)"
            )


def checksum_of(path: Path) -> str:
    """BLAKE2b of a file, the first 32 hexadecimal digits, as a checkpoint lists it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def require_all_weights(info: Mapping[str, Any]) -> None:
    """Refuse files that are not the whole model, or hold layers that it has not: transformers makes up what is missing.

    Args:
        info: ``output_loading_info`` of ``from_pretrained``.

    Raises:
        OSError: names the first weight.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        raise OSError(
            f"its files lack {len(missing)} of its weights ({missing[0]}), and transformers would make them up; is a file missing, or "
            "does config.json belong to another model?"
        )
    # A head for something else may lie next to a language model; what belongs into its layers may not be left out.
    left_out = sorted(key for key in info["unexpected_keys"] if _LAYER.search(key) and not _BUFFER.search(key))
    if left_out:
        raise OSError(
            f"its files hold {len(left_out)} weights for which config.json has no place ({left_out[0]}); does it belong to another model?"
        )


def require_plain_weights(model: Any) -> None:
    """Refuse a model whose weights stay quantized: only its norms and embeddings would learn, and it cannot be moved.

    Raises:
        OSError: names the kind of quantization.
    """
    settings = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if settings is not None and not getattr(settings, "dequantize", False):
        kind = getattr(settings, "quant_method", None) or type(settings).__name__
        raise OSError(
            f"its weights are quantized ({getattr(kind, 'value', kind)}), which cannot be trained or offloaded here; use the checkpoint "
            "that it was made from"
        )
