"""Loading language models and tokenizers: from a folder, from the hub, or the small ones that come with the project.

The invariant: a model is returned with the tokenizer that belongs to it, in evaluation mode, or an error says in one line
what was looked for and where.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agents.chat import first_difference
from atod_envs.errors import AtodError

REFERENCE = Path(__file__).parent / "reference"
"""The reference models that come with the project: ``<environment key>/<role>``."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model with its tokenizer.

    Attributes:
        name: what was asked for.
        model: the ``transformers`` model.
        tokenizer: its tokenizer.
    """

    name: str
    model: Any
    tokenizer: Any

    @property
    def n_parameters(self) -> int:
        """Number of weights, tied ones counted once."""
        return sum(p.numel() for p in self.model.parameters())


def load_model(
    name: str, role: str, *, world: str = "", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Load a model.

    Args:
        name: a folder, a hub id, or ``"builtin"`` for the reference model of the role.
        role: ``"student"`` or ``"teacher"``.
        world: the environment's key (``"alfworld"``), for ``"builtin"``.
        device: where it goes.
        dtype: of its weights.

    Raises:
        AtodError: it cannot be found or read; says where was looked and what to do.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hub_logging

    hub_logging.disable_progress_bar()
    source = name
    if name == "builtin":
        source = str(REFERENCE / world / role)
        if not Path(source).is_dir():
            offered = ", ".join(sorted(path.name for path in REFERENCE.iterdir() if (path / role).is_dir()))
            raise AtodError(
                f"no reference {role} comes with the project for {world or 'this environment'!r} (there is one for: {offered}); "
                f"give --{role} PATH_OR_HUB_ID"
            )
    looks_local = source.startswith((".", "/", "~")) or Path(source).exists()
    if looks_local:
        path = Path(source).expanduser()
        if not path.is_dir():
            raise AtodError(f"{role} model: no folder at {path}; expected one with config.json and weights")
        if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            raise AtodError(f"{role} model: {path} holds no config.json; expected a folder written by save_pretrained")
        source = str(path)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(source)
            base = _adapted(source) if looks_local else source
            model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
            if base != source:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, source).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        hint = "" if looks_local else "; give the path of a downloaded copy if the hub cannot be reached"
        raise AtodError(f"{role} model {name!r} could not be loaded: {reason}{hint}") from error
    logging.getLogger(__name__).info(
        "loaded %s %s: %d parameters", role, name, sum(p.numel() for p in model.parameters())
    )
    return LoadedModel(name, model.to(device).eval(), tokenizer)


def _adapted(source: str) -> str:
    """The model that a folder's adapters belong to; the folder itself where it holds no adapters."""
    path = Path(source) / "adapter_config.json"
    if not path.is_file():
        return source
    base = str(json.loads(path.read_text())["base_model_name_or_path"])
    if base.startswith("/") and not Path(base).is_dir():
        raise OSError(f"its adapters belong to the model in {base}, which is not there")
    return base


def require_same_tokenizer(student: LoadedModel, other: LoadedModel, role: str) -> None:
    """Refuse two models whose tokenizers differ: log-probs of the same ids would mean different texts.

    Raises:
        AtodError: they differ; says which token differs.
    """
    difference = first_difference(student.tokenizer, other.tokenizer)
    if difference is not None:
        raise AtodError(
            f"student {student.name!r} and {role} {other.name!r} have different tokenizers: {difference}; "
            "on-policy distillation compares log-probs of the same token ids, so choose models of one family"
        )
