"""Would weights of eight bits make sampling on a CPU faster, and how far would they move what is sampled?

    python benchmarks/int8.py --model smollm2-135m

Two ways that PyTorch has: *dynamic*, which rounds the layer's input as well, and *weights alone*. For both: the time of
all linear layers of a pass of some rows, next to the engine's own packed float32, and the distance of the distributions
on text of the built-in ALFWorld. What is sampled under other weights has to be corrected by importance weights; the
effective sample size says how much of the data is left after that, of single tokens and of turns of ten.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import gymnasium as gym
import torch
from torch import nn

import atod_envs  # noqa: F401  (registers the environments)
from agents.models import load_model

TURN = 10
"""Tokens of a turn."""


class WeightOnly(nn.Module):
    """A linear layer whose weights are stored in eight bits, with one scale for each output.

    Args:
        layer: the layer in float32.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self.scale = weight.abs().amax(1) / 127
        self.weight = torch.round(weight / self.scale[:, None]).to(torch.int8)
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer gives, up to the rounding of its weights."""
        return nn.functional.linear(x, self.weight.float() * self.scale[:, None], self.bias)


def linear_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Every linear layer, with its owner and its name there."""
    for owner in list(model.modules()):
        for name, layer in list(owner.named_children()):
            if isinstance(layer, nn.Linear):
                yield owner, name, layer


def dynamic(model: nn.Module) -> nn.Module:
    """A copy whose linear layers round weights (by output) and inputs to eight bits."""
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    copied = copy.deepcopy(model)
    found: nn.Module = quantize_dynamic(copied, {nn.Linear: per_channel_dynamic_qconfig})  # type: ignore[no-untyped-call]
    return found


def weight_only(model: nn.Module) -> nn.Module:
    """A copy whose linear layers round their weights alone."""
    copied = copy.deepcopy(model)
    for owner, name, layer in list(linear_layers(copied)):
        setattr(owner, name, WeightOnly(layer))
    return copied


def text(tokens: int, encode: Callable[[str], list[int]]) -> torch.Tensor:
    """Ids [1, tokens] of observations of the built-in ALFWorld."""
    env = gym.make("atod/ALFWorld-v0", data="builtin", split="valid_seen")
    ids: list[int] = []
    for seed in range(1000):
        observation, info = env.reset(seed=seed)
        ids += encode(observation)
        for turn in range(10):
            action = info["admissible"][turn % len(info["admissible"])]
            observation, *_, info = env.step(action)
            ids += encode(f"\n> {action}\n{observation}")
        if len(ids) >= tokens:
            break
    return torch.tensor([ids[:tokens]])


def distance(model: nn.Module, other: nn.Module, ids: torch.Tensor) -> str:
    """KL of what samples from what learns, and the effective sample size of the importance weights."""
    torch.manual_seed(0)
    learned, sampled = (m(ids).logits[0].float().log_softmax(-1) for m in (model, other))
    kl = (sampled.exp() * (sampled - learned)).sum(-1)
    token = torch.multinomial(sampled.exp(), 1)
    ratio = (learned - sampled).gather(1, token)[:, 0]
    turns = ratio[: len(ratio) // TURN * TURN].view(-1, TURN).sum(1)
    sizes = [float(w.mean() ** 2 / (w**2).mean()) for w in (ratio.exp(), turns.exp())]
    return f"KL {kl.mean():.4f} nats a token, effective sample size {sizes[0]:.1%} of tokens, {sizes[1]:.1%} of turns"


def seconds(work: Callable[[], object], repeats: int) -> float:
    """CPU-seconds of one call, the least of some."""
    work()
    best = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        work()
        best = min(best, time.process_time() - began)
    return best


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the distances, then the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="requests of a pass")
    parser.add_argument("--tokens", type=int, default=600, help="of the text")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message=".*(quantiz|torch.ao).*")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    loaded = load_model(options.model, "student", world="alfworld", device="cpu")
    model = loaded.model.eval()
    ids = text(options.tokens, lambda found: loaded.tokenizer.encode(found, add_special_tokens=False))
    print(f"dynamic: {distance(model, dynamic(model), ids)}")
    print(f"weights alone: {distance(model, weight_only(model), ids)}")

    layers = [layer for _, _, layer in linear_layers(model)]
    rounded = [dynamic(nn.Sequential(layer)) for layer in layers]
    alone = [WeightOnly(layer) for layer in layers]
    packed = [torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 32) for layer in layers]
    cpu = torch.backends.cpu.get_cpu_capability()
    print(f"CPU-seconds of the {len(layers)} linear layers of a pass, {cpu}, torch {torch.__version__}, one thread")
    for rows in options.rows:
        inputs = [torch.randn(rows, layer.in_features) for layer in layers]
        halves = [x.bfloat16() for x in inputs]

        def each(product: Callable[..., torch.Tensor], xs: list[torch.Tensor], of: list[Any]) -> float:
            return seconds(lambda: [product(x, layer) for x, layer in zip(xs, of, strict=True)], options.repeats)

        found = {
            "float32, packed": each(_packed, inputs, packed),
            "dynamic": each(lambda x, layer: layer(x), inputs, rounded),
            "weights alone, float32": each(_eight_bits, inputs, alone),
            "weights alone, bfloat16": each(_eight_bits, halves, alone),
        }
        print(f"{rows:3} rows: {', '.join(f'{name} {value:.3f}' for name, value in found.items())}", flush=True)


def _packed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return cast("torch.Tensor", torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))


def _eight_bits(x: torch.Tensor, layer: WeightOnly) -> torch.Tensor:
    return torch._weight_int8pack_mm(x, layer.weight, layer.scale.to(x.dtype))


if __name__ == "__main__":
    main()
