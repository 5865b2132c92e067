"""``benchmarks/int8.py``: rounding the weights alone moves little, and the tables are whole."""

import copy
import re
import sys

import pytest
import torch
from paths import REPOSITORY
from tinymodel import tiny_qwen3

sys.path.append(str(REPOSITORY / "benchmarks"))  # at the end: a file there is called alfworld
from int8 import WeightOnly, distance, linear_layers, main, weight_only


def test_weights_of_eight_bits_are_within_half_a_step():
    layer = torch.nn.Linear(32, 48)
    rounded = WeightOnly(layer)
    error = (rounded.weight.float() * rounded.scale[:, None] - layer.weight).abs()
    assert (error <= rounded.scale[:, None] / 2 + 1e-7).all() and rounded.weight.abs().max() == 127
    x = torch.randn(5, 32)
    assert torch.allclose(rounded(x), layer(x), atol=0.05) and not torch.equal(rounded(x), layer(x))


@torch.no_grad()
def test_a_distance_is_nothing_between_equals_and_grows_with_what_is_changed():
    model, ids = tiny_qwen3(64, 1), torch.arange(60)[None]
    numbers = re.compile(r"KL (\S+) nats a token, effective sample size (\S+)% of tokens, (\S+)% of turns")

    def of(other):
        return [float(part) for part in numbers.fullmatch(distance(model, other, ids)).groups()]

    far = copy.deepcopy(model)
    for _, _, layer in linear_layers(far):
        layer.weight.data += 0.3 * torch.randn_like(layer.weight)
    assert of(model) == [0, 100, 100]
    near, moved = of(weight_only(model)), of(far)
    assert near[0] < 0.01 < 0.5 < moved[0] and near[1] > 99 and moved[1] < 50


@pytest.mark.slow
def test_both_tables_are_whole(capsys):
    threads = torch.get_num_threads()
    try:
        main(["--model", "builtin", "--tokens", "60", "--rows", "2", "--repeats", "1"])
    finally:
        torch.set_grad_enabled(True)
        torch.set_num_threads(threads)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said[:2]] == ["dynamic", "weights alone"]
    assert re.fullmatch(r"  2 rows: float32, packed [\d.]+, dynamic [\d.]+, weights alone, .*", said[3])
