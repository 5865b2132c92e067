"""Writing the folder, and the check that it holds the trained model.

The invariant: everything is written aside and checked there; the folder gets its name last. What is compared: log-probs
of the whole vocabulary on rows that the run itself played, in float32, the trained model as evaluations load it against
the folder as transformers alone loads it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from agents.logits import own_logits, probe_ids
from agents.models import LoadedModel, load_model
from atod_algos.export.source import Source
from atod_algos.training.checkpoint import write_failure
from atod_envs.errors import AtodError
from atod_envs.trajectory import read_jsonl

TOLERANCE = 1e-4
"""Largest difference of a log-prob, in nats in float32, that the exported model may have."""
_ROWS, _POSITIONS, _PROBE_TOKENS = 4, 64, 64
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        architecture: the model's class in transformers.
        parameters: number of weights.
        dtype: of the weights.
        base: the model that the adapters belong to; None for a whole model.
        difference: largest difference of a log-prob from the trained model, in nats.
        positions: how many distributions were compared.
        own_rows: whether on rows that the run played, rather than on random ids.
    """

    architecture: str
    parameters: int
    dtype: str
    base: str | None
    difference: float
    positions: int
    own_rows: bool


def refuse_target(to: Path) -> None:
    """Refuse a target that holds anything.

    Raises:
        AtodError: it is a file, or a folder that is not empty.
    """
    if to.is_symlink() or (to.exists() and not to.is_dir()):
        raise AtodError(f"--to {to} is no folder; choose the name of a new one")
    if to.is_dir() and any(to.iterdir()):
        raise AtodError(f"--to {to} exists and is not empty; choose a new folder, or empty that one")


def write_folder(source: Source, to: Path, *, merge: bool, card: Callable[[Exported], str] | None = None) -> Exported:
    """Write a checkpoint as a folder that ``from_pretrained`` loads.

    Args:
        source: the checkpoint.
        to: the folder; must not exist, or be empty.
        merge: adapters are added into the model; without it a checkpoint of adapters is written as adapters.
        card: text of the model card, given what was exported.

    Returns:
        What was written, and how close it is to the trained model.

    Raises:
        AtodError: the target is in use, cannot be written, or the folder does not give the trained model's log-probs.
            Nothing is left.
    """
    refuse_target(to)
    train = source.train
    as_trained: torch.dtype | Literal["auto"] = "auto"
    alone = source.adapters and not merge
    if alone:  # base and adapters stay apart: their sum is compared before it is rounded to anything
        as_trained = torch.float32
    elif source.adapters and train.get("dtype") in ("float32", "bfloat16"):
        as_trained = getattr(torch, train["dtype"])
    trained = load_model(str(source.checkpoint), "student", dtype=as_trained)
    part: Path | None = None
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
        part.chmod(0o755)
        if alone:
            for name in _ADAPTER_FILES:
                shutil.copyfile(source.checkpoint / name, part / name)
        else:
            _write_model(trained, part, train)
        trained.tokenizer.save_pretrained(part)
        _for_older_readers(part)
        exported = _check(trained, part, source, alone)
        if card is not None:
            (part / "README.md").write_text(card(exported), encoding="utf-8")
        part.replace(to)
    except BaseException as error:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
        reason = write_failure(error) if isinstance(error, Exception) else None
        if reason is None or isinstance(error, AtodError):
            raise
        raise AtodError(
            f"--to {to} could not be written: {reason}; nothing is left of it. Make room, or choose another place"
        ) from error
    return exported


def _write_model(trained: LoadedModel, part: Path, train: Mapping[str, Any]) -> None:
    """The model, with a generation configuration that stops and samples as the run's evaluations do."""
    model = trained.model
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        stops = list(trained.chat(train.get("thinking", "off")).stop_ids)
        temperature = train.get("eval_temperature")
        temperature = 1.0 if temperature is None else float(temperature)
        generation.eos_token_id = stops
        generation.pad_token_id = (
            trained.tokenizer.pad_token_id if generation.pad_token_id is None else generation.pad_token_id
        )
        generation.do_sample = temperature > 0
        generation.temperature, generation.top_k, generation.top_p = (
            (temperature, 0, 1.0) if temperature > 0 else (None,) * 3
        )
    model.save_pretrained(part)


def _for_older_readers(part: Path) -> None:
    """Say what release 5 of transformers writes in its own words in those of release 4, too, for what reads these."""
    path = part / "config.json"
    if path.is_file():
        config = json.loads(path.read_text())
        if "dtype" in config:
            config.setdefault("torch_dtype", config["dtype"])
        rope = config.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope:
            config.setdefault("rope_theta", rope["rope_theta"])
            if rope.get("rope_type", "default") != "default":
                config.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"})
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    path = part / "tokenizer_config.json"
    if path.is_file():
        config = json.loads(path.read_text())
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


# --- the check -----------------------------------------------------------------------------------------------------


def _check(trained: LoadedModel, part: Path, source: Source, alone: bool) -> Exported:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(part)
    _require_same_prompts(trained.tokenizer, tokenizer)
    whole = trained.model
    dtype = str(whole.dtype).removeprefix("torch.")
    name, count = type(whole).__name__, trained.n_parameters
    base = json.loads((part / "adapter_config.json").read_text())["base_model_name_or_path"] if alone else None
    rows = _played(source)
    own_rows = bool(rows)
    rows = rows or [probe_ids(whole, _PROBE_TOKENS)]
    expected = [_logprobs(whole.float().eval(), row) for row in rows]
    loader = AutoModelForCausalLM if alone else type(whole)
    model: Any = loader.from_pretrained(part, dtype=torch.float32).eval()
    worst, places = 0.0, 0
    for row, before in zip(rows, expected, strict=True):
        after = _logprobs(model, row)
        if after.shape != before.shape:
            raise AtodError(
                f"the exported model gives log-probs of {after.shape[1]} ids, the trained one of {before.shape[1]}; not exported"
            )
        gap = float((after - before).abs().max())
        worst = max(worst, gap) if gap == gap else float("inf")
        places += len(after)
    if not worst <= TOLERANCE:
        raise AtodError(
            f"the exported model is not the trained one: on {places} places a log-prob differs by {worst:.3g} nats (up to {TOLERANCE:g} is "
            "rounding); nothing was written. " + ("Is the base model of the adapters still the one they were trained on?" if source.adapters else "")
        )  # fmt: skip
    return Exported(name, count, dtype, base, worst, places, own_rows)


def _require_same_prompts(trained: Any, exported: Any) -> None:
    messages = [
        {"role": "user", "content": "go to fridge 1 <think> naïve\n"},
        {"role": "assistant", "content": "open it"},
    ]
    for chosen in (messages, messages[:1]):
        texts = [
            t.apply_chat_template(chosen, tokenize=False, add_generation_prompt=len(chosen) == 1)
            for t in (trained, exported)
        ]
        ids = [t.encode(text, add_special_tokens=False) for t, text in zip((trained, exported), texts, strict=True)]
        if texts[0] != texts[1] or ids[0] != ids[1]:
            raise AtodError(
                "the exported tokenizer does not write the prompts that the model was trained on; nothing was written"
            )


def _played(source: Source) -> list[list[int]]:
    """Some rows that the run played: the longest turns of its newest stored episodes."""
    for kind in ("trajectories", "validation"):
        for path in sorted((source.run / kind).glob("step_*.jsonl.gz"), reverse=True):
            turns = [turn for t in read_jsonl(path) for turn in t.turns if turn.prompt_ids and turn.response_ids]
            rows: Sequence[list[int]] = [[*turn.prompt_ids, *turn.response_ids] for turn in turns]
            if rows:
                return sorted(rows, key=len, reverse=True)[:_ROWS]
    return []


def _logprobs(model: Any, row: list[int]) -> torch.Tensor:
    """Log-probs [t, V] of the last places of a row."""
    with torch.no_grad():
        return torch.log_softmax(own_logits(model, row)[-_POSITIONS:], dim=-1)
