"""Loading language models and tokenizers: from a folder, a GGUF file, a package, the hub, or this project.

The invariant: a model is returned with the tokenizer that belongs to it, in evaluation mode, its log-probs checked
against its own forward pass and its vocabulary limited to ids that have a token; or an error says in one line what was
looked for and where.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from agents.chat import CHAT_DATE, ChatFormat, ThinkingMode, first_difference
from agents.gguf import converted, gguf_file
from agents.logits import limit_vocabulary, logit_head, require_finite, usable_ids, vocabulary_rows
from agents.weights import require_all_weights, require_as_written, require_plain_weights
from atod_envs.errors import AtodError
from atod_envs.files import hash_of

REFERENCE = Path(__file__).parent / "reference"
"""The reference models that come with the project: ``<environment key>/<role>``."""

_READ = (
    "*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "config.json", "generation_config.json", "adapter_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
)  # fmt: skip
"""What of a model's folder decides what it says."""


def device_of(name: str) -> str:
    """The device that an option names.

    Raises:
        AtodError: it is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise AtodError(
            "--device cuda was asked for, but torch sees no GPU; use --device cpu, or install a CUDA build of torch"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def computing_type(device: str) -> torch.dtype:
    """The type that weights compute in where no other is asked for: bfloat16 on a GPU, float32 elsewhere."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


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

    def chat(self, thinking: ThinkingMode = "off", date: str = CHAT_DATE) -> ChatFormat:
        """How this model is spoken to.

        Args:
            thinking: what its template is asked for, and what stays of earlier turns' thoughts.
            date: what its template is told, if it tells the date.

        Raises:
            AtodError: its tokenizer has no chat template that can be used.
        """
        try:
            return ChatFormat(self.tokenizer, model=self.model, thinking=thinking, date=date)
        except ValueError as error:
            raise AtodError(f"model {self.name!r}: {error}") from error

    @property
    def n_parameters(self) -> int:
        """Number of weights, tied ones counted once."""
        return sum(p.numel() for p in self.model.parameters())


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No search for unreachable cycles while much is imported that stays: it would cost a second, for nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def load_model(
    name: str,
    role: str,
    *,
    world: str = "",
    device: str = "cpu",
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    option: str = "",
) -> LoadedModel:
    """Load a model.

    Args:
        name: a folder, a hub id, a GGUF file, a model in a package (``"smollm2-135m"``), or ``"builtin"`` for the
            reference model of the role.
        role: ``"student"`` or ``"teacher"``.
        world: the environment's key (``"alfworld"``), for ``"builtin"``.
        device: where it goes.
        dtype: of its weights; ``"auto"`` is what its files hold.
        option: the command's option that names it, for messages; by default ``--student`` or ``--teacher``.

    Raises:
        AtodError: it cannot be found or read; says where was looked and what to do.
    """
    with _uncollected():
        import transformers.generation.utils  # noqa: F401 -- what every model imports
        from transformers import AutoTokenizer
        from transformers.utils import logging as hub_logging

    hub_logging.disable_progress_bar()
    source, looks_local = _located(name, role, world, option or f"--{role}")
    try:
        if looks_local:
            require_as_written(Path(source), _READ)
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(source)
            base, options = _adapted(source) if looks_local else (source, {})
            model, info = _kind(base, options).from_pretrained(base, dtype=dtype, output_loading_info=True, **options)
            require_plain_weights(model)
            require_all_weights(info)
            if base != source:
                model = _with_adapters(model, source)
    except Exception as error:  # damaged files fail in many ways in other people's code
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = "" if looks_local else "; give the path of a downloaded copy if the hub cannot be reached"
        raise AtodError(f"{role} model {name!r} could not be loaded: {reason}{hint}") from error
    logging.getLogger(__name__).info(
        "loaded %s %s: %d parameters", role, name, sum(p.numel() for p in model.parameters())
    )
    return LoadedModel(name, accept(model.to(device).eval(), tokenizer, f"{role} model {name!r}"), tokenizer)


def _located(name: str, role: str, world: str, option: str) -> tuple[str, bool]:
    """What ``from_pretrained`` is to read for a model's name, and whether it is a folder here."""
    source = name
    if name == "builtin":
        source = str(REFERENCE / world / role)
        if not Path(source).is_dir():
            offered = ", ".join(sorted(path.name for path in REFERENCE.iterdir() if (path / role).is_dir()))
            raise AtodError(
                f"no reference {role} comes with the project for {world or 'this environment'!r} (there is one for: {offered}); "
                f"give {option} PATH_OR_HUB_ID"
            )
    packed = gguf_file(source)
    if packed is not None:
        try:
            source = str(converted(packed))
        except AtodError as error:
            raise AtodError(f"{role} model {name!r}: {error}") from error
    if not source.startswith((".", "/", "~")) and not Path(source).exists():
        return source, False
    path = Path(source).expanduser()
    if not path.is_dir():
        raise AtodError(f"{role} model: no folder at {path}; expected one with config.json and weights")
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise AtodError(f"{role} model: {path} holds no config.json; expected a folder written by save_pretrained")
    return str(path.resolve()), True  # so that adapters trained on it name a place that is the same from everywhere


def like(model: Any, other: Any) -> bool:
    """Whether two models have the same class and the same parameters, but for their values."""
    shapes = [{name: weight.shape for name, weight in one.named_parameters()} for one in (model, other)]
    return type(model) is type(other) and shapes[0] == shapes[1]


def model_digest(name: str, world: str = "", role: str = "student") -> str | None:
    """Digest of all that decides what a model says: weights, configuration, tokenizer and template, and adapters' base.

    Args:
        name: as :func:`load_model` takes it.
        world: the environment's key, for ``"builtin"``.
        role: for ``"builtin"``.

    Returns:
        Sixteen hexadecimal digits; None for what is no file here, such as a model behind a server. Of a hub's model it
        is what the hub's cache holds, so ask after it was loaded.
    """
    packed = None if "://" in name else gguf_file(name)
    folder = REFERENCE / world / role if name == "builtin" else Path(name).expanduser()
    kinds: tuple[str, ...] = _READ
    if not packed and not folder.is_dir() and "://" not in name:
        folder = _snapshot(name) or folder
        if any(folder.glob("*.safetensors")):  # another program may have fetched the same weights in the older form
            kinds = tuple(kind for kind in _READ if not kind.endswith(".bin"))
    files = {packed} if packed else {file for kind in kinds for file in folder.glob(kind) if file.is_file()}
    whole = hash_of(sorted(files))
    if not packed and (folder / "adapter_config.json").is_file():
        with contextlib.suppress(OSError):  # loading says what is wrong with it
            whole.update((model_digest(_adapted(str(folder))[0]) or "").encode())
    return whole.hexdigest() if files else None


def _with_adapters(model: Any, source: str) -> Any:
    """A model with a folder's adapters added to its weights.

    Raises:
        OSError: the folder's adapters are not those of the model; peft would leave such out.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    adapted = PeftModel.from_pretrained(model, source)
    there, wanted = set(load_peft_weights(source, device="cpu")), set(get_peft_model_state_dict(adapted))
    if there != wanted:
        raise OSError(f"its adapters do not fit the model (one that only one of the two has: {min(there ^ wanted)})")
    return adapted.merge_and_unload()


def _snapshot(name: str) -> Path | None:
    """The folder of a hub's model in the hub's cache, as loading finds it; no hub is asked."""
    from transformers.utils import cached_file

    for file in ("config.json", "adapter_config.json"):
        with contextlib.suppress(OSError, ValueError):
            if found := cached_file(name, file, local_files_only=True):
                return Path(found).parent
    return None


def _kind(source: str, options: dict[str, Any]) -> Any:
    """The class that loads a checkpoint; a multimodal one that is no causal language model by itself has one inside."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = type(AutoConfig.from_pretrained(source, **options))
    both = config in AutoModelForImageTextToText._model_mapping and config not in AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if both else AutoModelForCausalLM


def accept(model: Any, tokenizer: Any, what: str) -> Any:
    """Check a model that was just loaded, and limit it to the ids that its tokenizer has a token for; the model.

    Raises:
        AtodError: a weight is not finite, or log-probs cannot be had; names the model.
    """
    try:
        require_finite(model)
        limit_vocabulary(model, set(tokenizer.get_vocab().values()))
        logit_head(model)
    except AtodError as error:
        raise AtodError(f"{what}: {error}") from error
    return model


def share_vocabulary(models: Iterable[Any], tokenizer: Any) -> int:
    """Limit models that score the same ids to the ids that all of them have; how many there are.

    Raises:
        AtodError: one of them has no row for the end of a response.
    """
    models = list(models)
    common = set(usable_ids(models[0]).tolist()).intersection(*(usable_ids(model).tolist() for model in models[1:]))
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in common:
        small = min(models, key=vocabulary_rows)
        raise AtodError(
            f"{type(small).__name__} has {vocabulary_rows(small):,} ids, and the end of a response is id {tokenizer.eos_token_id}; "
            "choose models of one family"
        )
    for model in models:
        limit_vocabulary(model, common)
    return len(common)


def _adapted(source: str) -> tuple[str, dict[str, Any]]:
    """The model that a folder's adapters belong to, with options for loading it; else the folder itself.

    A name in an adapter's configuration is a folder (as it stands, or seen from the adapter's own folder), or a model
    that the hub's cache holds. A hub is never asked for it: the name may be a folder that is not here, and its name
    there is free for any user to take.
    """
    path = Path(source) / "adapter_config.json"
    if not path.is_file():
        return source, {}
    try:
        base = str(json.loads(path.read_text())["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{path} names no base model ({type(error).__name__}: {error})") from error
    if Path(base).is_absolute():
        if not Path(base).is_dir():
            raise OSError(f"its adapters belong to the model in {base}, which is not there")
        return base, {}
    above = Path(source).resolve()
    for place in (above, *above.parents[:4], Path.cwd()):
        if (place / base / "config.json").is_file():
            return str((place / base).resolve()), {}
    from transformers.utils import cached_file

    try:
        cached_file(base, "config.json", local_files_only=True)
    except (OSError, ValueError) as error:
        raise OSError(
            f"its adapters belong to the model {base!r}, which is neither a folder in or above {above} nor in the hub's cache; put it "
            "there, or write its folder into adapter_config.json as base_model_name_or_path"
        ) from error
    return base, {"local_files_only": True}


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
