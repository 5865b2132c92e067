"""Make the table of ``docs/models.md``: every causal language model of transformers that can be built small, tried.

    python docs/make_models.py             # all, some minutes
    python docs/make_models.py qwen3 bloom # these alone, printed

Each is built with random weights at a few thousand parameters a layer. What is said of it is found by the checks that a
run makes when it loads a model; nothing is looked up.
"""

from __future__ import annotations

import collections
import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).parent / "models.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
LARGEST = 20_000_000
"""Weights beyond which an architecture does not count as built small."""
SECONDS = 60
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), 97),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "index_head_dim"), 8),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "n_inner"), 64
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True, "use_cache": True},
    **{"logits_scaling": 8.0, "logit_scale": 0.0625, "final_logit_softcapping": 30.0},
}


SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "recurrent_gemma": {"attention_window_size": 64},
}
"""What some need besides to be small and whole."""


class TooSlow(Exception):
    """An architecture took longer than it is given."""


def build(kind: Any) -> Any:
    """A small random model of a configuration class.

    Raises:
        ValueError: it cannot be made small this way.
    """
    from transformers import AutoModelForCausalLM

    usual = kind()
    if usual.sub_configs and usual.get_text_config(decoder=True) is not usual:
        raise ValueError("several configurations in one")
    options = {name: value for name, value in SIZES.items() if hasattr(usual, name)}
    if "kv_lora_rank" in options:  # every head has its own keys, made from a common latent
        options["num_key_value_heads"] = options["num_attention_heads"]
    options |= SPECIAL.get(kind.model_type, {})
    while True:
        try:
            config = kind(**options)
            break
        except Exception as error:  # derived from other settings
            name = next((name for name in options if repr(name) in str(error)), None)
            if name is None:
                raise
            del options[name]
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} weights at the smallest setting tried")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def try_one(kind: Any) -> tuple[str, str, str, str]:
    """Class of the model, its output layer, and what the learner and the engine do with it."""
    from agents.engines.decoder import FamilyDecoder, ModuleDecoder
    from agents.engines.transformers import TransformersEngine
    from agents.engines.weight_check import verify_weights
    from agents.logits import UnsupportedModel, logit_head
    from atod_algos.learner.packing import packable

    model = build(kind)
    name = type(model).__name__
    try:
        head = "plain" if logit_head(model).plain else "its own"
        learner = "packed" if packable(model) else "padded"
        engine = TransformersEngine(model, slots=2, max_context=128)
        decoder: Any = engine.decoder
        verify_weights(engine, model)
    except UnsupportedModel as error:
        return name, "", "refused", str(error).partition(": ")[2].partition(". Use")[0]
    kinds = {FamilyDecoder: "written out", ModuleDecoder: "its own modules"}
    cached = "own forward" if getattr(decoder, "caches", True) else "own forward, no cache"
    return name, head, learner, kinds.get(type(decoder), cached)


def rows(wanted: list[str]) -> list[tuple[str, ...]]:
    """A row for each architecture."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    def stop(*_: Any) -> None:
        raise TooSlow

    signal.signal(signal.SIGPROF, stop)
    found = []
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        key = kind.model_type
        if wanted and key not in wanted:
            continue
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of this process's own time
        try:
            row = (key, *try_one(kind))
        except TooSlow:
            row = (key, "", "", "not tried", f"took more than {SECONDS} s")
        except Exception as error:  # whatever other people's code says about settings that do not fit it
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:70].strip()
            row = (key, "", "", "not tried", reason)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        found.append(row)
        print(*row, sep=" | ", flush=True)
    return list(dict.fromkeys(found))  # some stand twice in transformers' list


def table(found: list[tuple[str, ...]]) -> str:
    """The rows as Markdown, with counts."""
    import transformers

    tried = [row for row in found if row[3] != "not tried"]
    counts = collections.Counter(row[3] if row[3] == "refused" else row[4] for row in tried)
    behind = sum(row[2] == "its own" for row in tried)
    lines = [
        f"transformers {transformers.__version__}: {len(tried)} of {len(found)} architectures could be built small. "
        f"In {behind} something stands behind the output layer.",
        "Engine: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()) + ".",
        "",
        "| architecture | output layer | learner | engine, or why not |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {key} | {head} | {learner} | {engine.replace('|', '/')} |"
        for key, _, head, learner, engine in sorted(found)
    ]
    return "\n".join(lines)


def main(wanted: list[str]) -> None:
    """Try them; write the page where all were tried."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = rows(wanted)
    if not wanted:
        page = PAGE.read_text()
        PAGE.write_text(
            page[: page.index(BEGIN)] + f"{BEGIN}\n\n{table(found)}\n\n{END}" + page[page.index(END) + len(END) :]
        )


if __name__ == "__main__":
    main(sys.argv[1:])
