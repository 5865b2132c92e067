"""Several ranks under torchrun: one process's run, checkpoints at any number of ranks, the end with a lost rank."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from paths import SUPPORT
from safetensors.torch import load_file

from atod_algos.atod import ATOD
from atod_algos.grpo import GRPO
from atod_algos.learner import distributed
from atod_algos.learner.learner import Learner
from atod_algos.rollout.pools import dtype_of
from atod_algos.training.checkpoint import load_shards
from atod_algos.training.cli import main, train
from atod_algos.training.config import TrainConfig, resolve
from atod_algos.training.trainer import Trainer
from atod_envs.errors import AtodError

pytestmark = pytest.mark.slow

COMMAND = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import toyworld
from atod_algos.atod import ATOD
from atod_algos.training.cli import main
main(ATOD, sys.argv[1:])
"""


@pytest.fixture
def options(models):
    return [
        "--env", "toy/Say-v0", "--student", str(models["student"]), "--teacher", str(models["teacher"]), "--style", "compact",
        "--max-turns", "3", "--max-response", "8", "--max-context", "128", "--lr", "2e-3", "--tasks-per-step", "4",
        "--group-size", "4", "--eval-every", "2", "--eval-tasks", "4", "--report-tasks", "4", "--checkpoint-every", "2",
        "--minibatches", "2", "--threads", "1", "--token-budget", "600",
    ]  # fmt: skip


@pytest.fixture
def ranks(runner, tmp_path):
    """Trains on several ranks, which are started as torchrun starts them, and gives what they say."""

    def run(count, options, algorithm="atod"):
        out = tmp_path / "said"
        end = runner(ranks=count, algorithm=algorithm, arguments=["--", *options], out=str(out))
        assert end["code"] == 0, out.read_text()[-4000:]
        return out.read_text()

    return run


def torchrun(count, script, arguments):
    """Start a script's text under torchrun itself."""
    words = f"--nproc-per-node {count} --master-port 0 --rdzv-backend c10d --rdzv-endpoint localhost:0".split()
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words, str(script), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def compared(row):
    left_out = ("time/", "speed/", "memory/")
    return {name: value for name, value in row.items() if not name.startswith(left_out)}


def require_same_metrics(one, many):
    for left, right in zip(metrics(one), metrics(many), strict=True):
        assert compared(left) == pytest.approx(compared(right), rel=1e-4, abs=1e-5)


def require_same_tensors(one, many):
    for name, tensor in one.items():
        torch.testing.assert_close(many[name], tensor, rtol=1e-5, atol=1e-5)


def weights(run):
    """The whole weights of a run's last checkpoint, in whatever form it was written."""
    from toyworld import small_model
    from transformers import AutoTokenizer

    from atod_algos.learner.options import OptimizerOptions
    from atod_algos.training.checkpoint import latest_checkpoint, load_checkpoint

    path = latest_checkpoint(run / "checkpoints")
    model = small_model(AutoTokenizer.from_pretrained(path), seed=99)
    plain = OptimizerOptions(
        lr=1e-3, lr_floor=1.0, warmup_steps=0, steps=1, weight_decay=0.0, adam_beta2=0.999, grad_clip=1.0, optimizer="adamw",
        minibatches=1, token_budget=100,
    )  # fmt: skip
    load_checkpoint(path, model, Learner(model, plain).updater)
    return dict(model.named_parameters())


@pytest.mark.parametrize("count, kind", [(2, ATOD), (4, GRPO)])
def test_ranks_make_the_run_of_a_single_process(count, kind, options, models, ranks, tmp_path):
    extra = ["--rules", "released"] if kind is not ATOD else []  # GRPO's has a reference model and a term of its own
    if kind is ATOD:  # two environments, and a teacher for each of two labels
        options[1:2] = ["toy/Say-v0", "toy/Echo-v0"]
        options += ["--teacher", options[options.index("--teacher") + 1], f"echo/small={models['student']}"]
    main(kind, [*options, *extra, "--steps", "3", "--run", str(tmp_path / "one")])
    said = ranks(count, [*options, *extra, "--steps", "3", "--run", str(tmp_path / "many")], kind.name)
    assert said.count("rules:") == 1, "only the first rank speaks"
    require_same_metrics(tmp_path / "one", tmp_path / "many")
    require_same_tensors(weights(tmp_path / "one"), weights(tmp_path / "many"))
    stored = json.loads((tmp_path / "many" / "result.json").read_text())["table"]
    assert stored == json.loads((tmp_path / "one" / "result.json").read_text())["table"]


def test_a_run_goes_on_with_any_number_of_ranks(options, ranks, tmp_path):
    main(ATOD, [*options, "--steps", "6", "--run", str(tmp_path / "whole")])
    run = ["--run", str(tmp_path / "parts")]
    main(ATOD, [*options, *run, "--steps", "2"])
    ranks(2, [*options, *run, "--steps", "4"])
    assert (tmp_path / "parts" / "checkpoints" / "step_000004" / "shards").is_dir()
    main(ATOD, [*options, *run, "--steps", "6"])
    require_same_metrics(tmp_path / "whole", tmp_path / "parts")
    require_same_tensors(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_adapters_learn_on_any_number_of_ranks(options, ranks, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed (extra lora)")
    options = [*options, "--lora-rank", "4", "--checkpoint-every", "1", "--eval-every", "1", "--lr", "1e-2"]
    main(ATOD, [*options, "--steps", "3", "--run", str(tmp_path / "whole")])
    run = ["--run", str(tmp_path / "parts")]
    main(ATOD, [*options, *run, "--steps", "1"])
    ranks(2, [*options, *run, "--steps", "2"])
    assert (tmp_path / "parts" / "checkpoints" / "step_000002" / "shards").is_dir()
    main(ATOD, [*options, *run, "--steps", "3"])
    require_same_metrics(tmp_path / "whole", tmp_path / "parts")
    name = "checkpoints/step_000003/adapter_model.safetensors"
    one, many = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
    assert max(float(tensor.abs().max()) for key, tensor in one.items() if "lora_B" in key) > 1e-3, "they have moved"
    require_same_tensors(one, many)


def test_a_lost_rank_ends_the_run_which_then_goes_on(options, tmp_path):
    run = ["--run", str(tmp_path / "r")]
    script = tmp_path / "run.py"
    script.write_text(COMMAND)
    process = torchrun(2, script, [str(SUPPORT), "--", *options, *run, "--steps", "10000"])
    started = time.monotonic()
    while not (tmp_path / "r" / "checkpoints" / "step_000002").is_dir():
        assert process.poll() is None and time.monotonic() - started < 200, process.communicate()[0]
        time.sleep(0.1)
    psutil.Process(process.pid).children()[-1].kill()
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "SIGKILL" in out
    reached = max(int(p.name[5:]) for p in (tmp_path / "r" / "checkpoints").glob("step_*"))
    main(ATOD, [*options, *run, "--steps", str(reached + 1)])
    assert [row["step"] for row in metrics(tmp_path / "r")] == list(range(1, reached + 2))


@pytest.mark.parametrize(
    "setting, words",
    [
        (
            {"staleness": 1},
            r"--staleness 1 .* use --staleness 0 under torchrun, or --cluster ray with a single learner",
        ),
        ({"engine": "vllm"}, r"--engine vllm cannot be used under torchrun: .* first GPU; use --engine transformers"),
        ({"teacher_engine": "vllm"}, r"--teacher-engine vllm .* \(divided among the ranks"),
        ({"optimizer": "adamw8bit"}, r"--optimizer adamw8bit .* cannot be loaded again; use --optimizer adamw"),
    ],
)
def test_what_ranks_cannot_do_is_refused_before_anything_is_loaded(setting, words, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "start", lambda device: pytest.fail("too late"))
    config = resolve(TrainConfig(env="toy/Say-v0", device="cpu", **setting))
    with pytest.raises(AtodError, match=words):
        train(config, ATOD(), "paper")
    with pytest.raises(AtodError, match=words):
        Trainer(config, ATOD(), None)


def test_on_a_gpu_every_rank_computes_in_bfloat16():
    auto = TrainConfig()
    assert dtype_of(auto, "cuda:1") is dtype_of(auto, "cuda") is torch.bfloat16
    assert dtype_of(auto, "cpu") is torch.float32
    assert dtype_of(TrainConfig(dtype="float32"), "cuda:0") is torch.float32


ENDS = """
import sys
from atod_algos.algorithm import find_algorithm
from atod_algos.training.cli import main

folder, names, *options = sys.argv[1:]
for name in names.split(","):
    name, _, dtype = name.partition(":")
    main(find_algorithm(name), [*options, "--dtype", dtype or "auto", "--run", f"{folder}/{name}"])
"""
SHORT = [
    "--data", "builtin", "--steps", "1", "--tasks-per-step", "2", "--group-size", "2", "--max-turns", "2", "--eval-every", "0",
    "--eval-tasks", "2", "--report-tasks", "2",
]  # fmt: skip
EVERY = "entropy_aware,gigpo,gopd,grpo,opd,sdar,sod,tcod,tip,vopd,opsa,iw_opd,agent_opsd,sign_safe,gkd,tropd,turn_opd,sage_opd,siblings,reopd"


@pytest.mark.timeout(900)  # seconds of the CPU are few; a busy machine takes many of the clock
def test_runs_on_ranks_end_with_exit_0(tmp_path):
    """One after the other in the same ranks, each but the first in bfloat16, and the built-in student's a second time.

    A finished run is shown again, and the built-in student's ends with a page that scores tokens.
    """
    script = tmp_path / "run.py"
    script.write_text(ENDS)
    names = ["atod", "atod", *(f"{name}:bfloat16" for name in EVERY.split(","))]
    process = torchrun(2, script, [str(tmp_path), ",".join(names), *SHORT])
    out, _ = process.communicate(timeout=850)
    assert process.returncode == 0, out[-4000:]
    for name in ("atod", *EVERY.split(",")):
        assert (tmp_path / name / "result.json").is_file() and (tmp_path / name / "report.html").is_file(), out[-3000:]


def test_half_precision_frozen_models_and_master_weights_on_ranks(options, ranks, tmp_path):
    run = ["--run", str(tmp_path / "r"), "--dtype", "bfloat16"]
    main(ATOD, [*options, *run, "--steps", "1", "--checkpoint-every", "1"])
    ranks(2, [*options, *run, "--steps", "2", "--checkpoint-every", "1"])
    rows = metrics(tmp_path / "r")
    assert [row["step"] for row in rows] == [1, 2] and all(np.isfinite(row["actor/pg_loss"]) for row in rows)


def test_shares_cover_everything_once(monkeypatch):
    parts = list("abcdefg")
    for size in (1, 2, 3, 8):
        monkeypatch.setattr(distributed, "size", lambda size=size: size)
        got = []
        lengths = set()
        for rank in range(size):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            share = list(distributed.iter_shard(parts))
            lengths.add(len(share))
            got += [part for part, counts in share if counts]
        assert sorted(got) == parts and len(lengths) == 1


def test_broken_shards_are_refused(tmp_path, models):
    from atod_envs.errors import DataError

    (tmp_path / "shards").mkdir()
    model = torch.nn.Linear(2, 2)

    class Nothing:
        @property
        def master_weights(self):
            return list(model.parameters())

        def moments(self):
            return [{}, {}]

    before = [weight.detach().clone() for weight in model.parameters()]
    with pytest.raises(DataError, match="cannot be read"):
        load_shards(tmp_path, model, Nothing())
    for weight, untouched in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, untouched)
