"""Presets: the published values, what wins over what, and the estimate against measured numbers."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from paths import SUPPORT
from toyworld import TOY, learner_options

from agents.engines.base import SamplingParams
from agents.engines.transformers import TransformersEngine
from agents.logits import usable_ids
from agents.models import load_model
from atod_algos.advantages import GroupOptions
from atod_algos.algorithm import Objective
from atod_algos.atod import ATOD
from atod_algos.batch import make_batch
from atod_algos.entropy_aware import EntropyAware
from atod_algos.gigpo import GiGPO
from atod_algos.gopd import GOPD
from atod_algos.grpo import GRPO
from atod_algos.learner import logprobs, memory
from atod_algos.learner.distribution import distribution
from atod_algos.learner.learner import Learner, recompute_layers
from atod_algos.opd import OPD
from atod_algos.rollout.async_rollout import AsyncRollout
from atod_algos.sdar import SDAR
from atod_algos.signals.agent_opsd import AgentOPSD
from atod_algos.signals.gkd import GKD
from atod_algos.signals.siblings import Siblings
from atod_algos.sod import SOD
from atod_algos.tcod import TCOD
from atod_algos.training import memory_estimate
from atod_algos.training.cli import main, with_rules
from atod_algos.training.config import TrainConfig, resolve, storage_of, worker_resources
from atod_algos.training.presets import MODELS, WORLDS, fit_algorithm, preset_config
from atod_envs.errors import AtodError
from atod_envs.trajectory import Group, StopReason, Trajectory, Turn

ALFWORLD, WEBSHOP, SEARCHQA = "atod/ALFWorld-v0", "atod/WebShop-v0", "atod/SearchQA-v0"


def dry(algorithm, arguments, capsys):
    main(algorithm, [*arguments, "--dry-run"])
    out = capsys.readouterr().out
    start, end = out.index("{\n"), out.index("\n}\n") + 2
    return json.loads(out[start:end]), out[end:]


# --- values and precedence ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", MODELS)
@pytest.mark.parametrize(
    "env, tasks, turns, context, temperature, every, panel, warmup",
    [
        (ALFWORLD, 16, 50, 2560, 0.4, 5, 128, 0),
        (WEBSHOP, 16, 15, 4608, 0.4, 5, 128, 0),
        (SEARCHQA, 128, 4, 4608, 0.0, 15, 2048, 15),
    ],
)
def test_published_settings(preset, env, tasks, turns, context, temperature, every, panel, warmup):
    config = preset_config(preset, env)
    assert vars(config) == resolve(config).stored()  # a preset leaves nothing to the profile
    assert (config.tasks_per_step, config.max_turns, config.max_context) == (tasks, turns, context)
    assert (config.eval_temperature, config.eval_every, config.eval_tasks) == (temperature, every, panel)
    assert (config.steps, config.group_size, config.lr, config.warmup_steps) == (150, 8, 1e-6, warmup)
    assert (config.style, config.max_response, config.temperature) == ("atod", 512, 1.0)
    assert (config.gap_clip, config.lr_floor, config.weight_decay, config.grad_clip) == (0, 1, 0.01, 1)


def test_students_and_teachers():
    pairs = {name: (preset_config(name, ALFWORLD).student, preset_config(name, ALFWORLD).teacher) for name in MODELS}
    assert pairs == {
        "paper-0.6b": ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B after GRPO"),
        "paper-1.7b": ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B after GRPO"),
        "paper-4b": ("Qwen/Qwen3-4B", "Qwen/Qwen3-30B-A3B after GRPO"),
    }


def test_published_history_windows():
    from atod_envs.alfworld.prompts import AtodStyle as AlfworldStyle
    from atod_envs.searchqa.prompts import AtodStyle as SearchStyle
    from atod_envs.webshop.prompts import AtodStyle as ShopStyle

    assert [style().history_length for style in (AlfworldStyle, ShopStyle, SearchStyle)] == [2, 2, 4]


def test_options_of_the_algorithms():
    horizons = {(name, env): fit_algorithm(ATOD(), name, env).coef_anneal_steps for name in MODELS for env in WORLDS}
    assert horizons.pop(("paper-1.7b", ALFWORLD)) == 150 and set(horizons.values()) == {80}
    assert fit_algorithm(ATOD(), "paper-4b", SEARCHQA).group.invalid_penalty == 0  # the paper's rules have none
    released = fit_algorithm(with_rules(GRPO, "released"), "paper-4b", SEARCHQA)
    assert (released.group.invalid_penalty, released.kl_coef) == (0.01, 0.001)
    assert released.group.group_stats == "turn_row"
    released = fit_algorithm(with_rules(GRPO, "released"), "paper-4b", ALFWORLD)
    assert (released.group.invalid_penalty, released.kl_coef) == (0.1, 0.01)
    assert fit_algorithm(with_rules(GRPO, "deepseek"), "paper-4b", SEARCHQA).kl_coef == 0.04  # not a published run's
    windows = [fit_algorithm(with_rules(TCOD, "released"), "paper-4b", env).turns_every for env in WORLDS]
    assert windows == [3, 6, 6] and fit_algorithm(TCOD(), "paper-4b", WEBSHOP).turns_every == 2


def test_the_command_line_wins_over_the_preset_and_the_preset_over_the_profile(capsys):
    settings, _ = dry(ATOD, ["--preset=paper-1.7b", "--env", WEBSHOP, "--lr", "3e-6", "--max-turns", "7"], capsys)
    train = settings["train"]
    assert (train["lr"], train["max_turns"]) == (3e-6, 7)  # command line
    assert (train["max_context"], train["student"]) == (4608, "Qwen/Qwen3-1.7B")  # preset; the profile has 2560
    assert train["report_tasks"] == TrainConfig().report_tasks
    settings, _ = dry(ATOD, ["--preset", "paper-1.7b", "--coef-anneal-steps", "90"], capsys)
    assert settings["algorithm"]["coef_anneal_steps"] == 90
    settings, _ = dry(ATOD, ["--lr", "3e-6"], capsys)
    assert settings["train"]["max_context"] == 1024 and settings["train"]["student"] == "builtin"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--preset", "paper-0.5b"], "unknown preset 'paper-0.5b'; did you mean 'paper-0.6b'"),
        (["--preset", "paper-4b", "--env", "toy/Say-v0"], "settings for atod/ALFWorld-v0, atod/WebShop-v0"),
        (["--preset", "paper-0.6b"], "Qwen/Qwen3-4B after GRPO, which does not come with a name"),
    ],
)
def test_what_a_preset_cannot_do_is_said_in_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(ATOD, arguments)
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and words in err and len(err.splitlines()) == 1


# --- the estimate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("Qwen/Qwen3-4B", 4_022_468_096),
        ("Qwen/Qwen3-30B-A3B", 30_532_122_624),
    ],
)
def test_weights_are_counted_exactly_without_being_there(name, parameters):
    """The numbers that the published checkpoints' own files add up to."""
    assert memory_estimate.shape_of(name, "", "student").parameters == parameters
    assert memory_estimate.shape_of(f"{name} after GRPO", "", "teacher").parameters == parameters


def test_an_unknown_architecture_is_not_guessed(capsys):
    assert memory_estimate.shape_of("some-org/some-model", "", "student") is None
    _, text = dry(ATOD, ["--preset", "paper-0.6b", "--teacher", "some-org/some-model"], capsys)
    assert "without teacher: architecture not known here" in text and "596,049,920 numbers" in text


@pytest.fixture(scope="module")
def builtin():
    return load_model("builtin", "student", world="alfworld").model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_originals_and_moments_of_the_built_in_model(dtype):
    model = load_model("builtin", "student", world="alfworld", dtype=dtype).model
    config = resolve(TrainConfig(dtype=str(dtype).removeprefix("torch.")))
    parts = {part.name: part.size for part in memory_estimate.memory(config, ATOD())}
    assert parts["student: weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    teacher = load_model("builtin", "teacher", world="alfworld", dtype=dtype)
    assert parts["teacher: weights"] == dtype.itemsize * teacher.n_parameters
    learner = Learner(model, learner_options(minibatches=1))
    one = batch_of_rows(2, 20, 5)
    learner.update(one, np.ones(10), np.zeros(10), Objective(), step=1, temperature=1.0, seed=0)
    state = learner.state()
    moments = [t for kept in state["optimizer"]["state"].values() for t in kept.values() if t.ndim]
    assert parts["student: AdamW"] == sum(t.numel() * t.element_size() for t in moments)
    originals = sum(t.numel() * t.element_size() for t in state["originals"])
    assert parts.get("student: master weights", 0) == originals == (0 if dtype == torch.float32 else 4 * 265_120)
    assert parts["update: gradient"] == 4 * 265_120


def test_adapters_of_the_built_in_model():
    pytest.importorskip("peft", reason="peft is not installed")
    from atod_algos.learner.lora import add_adapters

    model = load_model("builtin", "student", world="alfworld").model
    add_adapters(model, rank=4, alpha=8.0, seed=0)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory_estimate.adapter_weights(memory_estimate.shape_of("builtin", "alfworld", "student"), 4) == learned
    config = resolve(TrainConfig(lora_rank=4))
    parts = {part.name: part.size for part in memory_estimate.memory(config, with_rules(GRPO, "released"))}
    assert parts["student: AdamW"] == 2 * 4 * learned and parts["engine: weights"] == parts["student: weights"]
    assert "reference: weights" not in parts  # the student with its adapters off


def batch_of_rows(n, prompt, response):
    rng = np.random.default_rng(0)

    def ids(count):
        return tuple(int(i) for i in rng.integers(0, 500, count))

    def one():
        turn = Turn(0, "o", (), ids(prompt), ids(response), (0.0,) * response, "", "", True, True, 0.0)
        return Trajectory("e", "t", "s", "", "g", 0, (turn,), "", False, 0.0, StopReason.FAILURE)

    return make_batch([Group("t", tuple(one() for _ in range(n)))])


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(role, dtype):
    """Within 3 % of every tensor saved for the backward pass, with and without recomputed layers."""
    model = load_model("builtin", role, world="alfworld", dtype=dtype).model
    shape = memory_estimate.shape_of("builtin", "alfworld", role)
    assert memory.bytes_per_token(model) == pytest.approx(
        memory_estimate.activation_bytes(shape, 1, dtype.itemsize), rel=0.03
    )
    recompute_layers(model.train())
    assert memory.bytes_per_token(model) == pytest.approx(
        memory_estimate.recomputed_bytes(shape, 1, dtype.itemsize), rel=0.12
    )


@pytest.mark.parametrize("n, prompt, response", [(8, 200, 40), (4, 480, 20), (64, 40, 24)])
def test_a_whole_pass_stays_within_its_estimate(builtin, n, prompt, response):
    """Decoder within 5 %, output head below its bound, on rows of several lengths."""
    batch = batch_of_rows(n, prompt, response)
    shape = memory_estimate.shape_of("builtin", "alfworld", "student")
    own = {p.untyped_storage().data_ptr() for p in builtin.parameters()}
    alive, decoder, head = [], {}, {}

    def note(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            of_head = tensor.ndim and tensor.shape[-1] == shape.vocabulary
            (head if of_head else decoder)[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logprobs.row_logprobs(builtin.train(), batch, np.arange(n), temperature=1.0, entropy=True)
    builtin.eval()
    tokens = n * (prompt + response)
    assert 0.95 < sum(decoder.values()) / memory_estimate.activation_bytes(shape, tokens, 4) < 1.05
    assert 0 < sum(head.values()) <= memory_estimate.head_bytes(shape, n * response)


def test_cache_is_what_the_engine_holds_when_it_is_full(builtin):
    engine = TransformersEngine(builtin, slots=3, max_context=512)
    for i in range(3):
        engine.submit(str(i), list(range(5, 505)), SamplingParams(max_tokens=12))
    engine.step()
    held = sum(t.numel() * t.element_size() for t in (*engine.store.keys, *engine.store.values))
    shape = memory_estimate.shape_of("builtin", "alfworld", "student")
    assert held == memory_estimate.cache_bytes(shape, 3, 512, 4)


def test_local_folders_are_read(models, tmp_path):
    """Any causal model that transformers knows; an architecture without normalised queries keeps a little less."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    student = load_model(str(models["student"]), "student")
    assert memory_estimate.shape_of(str(models["student"]), "", "student").parameters == student.n_parameters
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    llama = AutoModelForCausalLM.from_config(config).eval()
    llama.config.save_pretrained(tmp_path)
    shape = memory_estimate.shape_of(str(tmp_path), "", "student")
    assert shape.parameters == sum(p.numel() for p in llama.parameters())
    assert 0.7 < memory.bytes_per_token(llama) / memory_estimate.activation_bytes(shape, 1, 4) <= 1.01


def test_weights_of_earlier_steps_are_counted():
    parts = {part.name: part for part in memory_estimate.memory(resolve(TrainConfig(staleness=2)), ATOD())}
    weights = parts["student: weights"].size
    assert parts["engine: weights"].size == weights and parts["student: kept weights"].size == 3 * weights
    assert "engine: weights" not in {part.name for part in memory_estimate.memory(resolve(TrainConfig()), ATOD())}
    rollout = AsyncRollout(2, 9, lambda *_: None, 1)
    kept = []
    rollout.begin(0, {"w": torch.zeros(1)}, {})
    for step in range(1, 10):
        rollout.take(step)
        rollout.learned(step, {"w": torch.zeros(1)})
        kept.append(len(rollout.kept))
    rollout.close()
    assert max(kept) == 3


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_kept_of_the_teacher_is_counted(builtin, monkeypatch, whole):
    if not whole:
        monkeypatch.setattr(memory_estimate, "WHOLE", 100)
    batch = batch_of_rows(2, 20, 5)
    given = {"temperature": 1.0, "budget": 4096, "topk": 8, "whole": memory_estimate.WHOLE}
    _, tokens = distribution(builtin, builtin, batch, **given)
    held = tokens.logprobs_MS.nbytes + (0 if tokens.ids_MS is None else tokens.ids_MS.nbytes)
    config = resolve(TrainConfig(gap="exact", gap_topk=8))
    parts = {part.name: part.size for part in memory_estimate.memory(config, ATOD())}
    sampled = memory_estimate.tokens(config, ATOD())["sampled tokens, at most"]
    ids = len(usable_ids(builtin))  # the output head has as many rows or more
    name, rows = ("teacher's tokens", builtin.config.vocab_size / ids) if whole else ("teacher's top-k", 1)
    assert parts[name] / sampled == held / batch.n_tokens * rows


@pytest.mark.parametrize(("style", "layout", "rows"), [("compact", "turns", 30), ("atod", "trajectory", 1)])
def test_rows_are_those_of_the_layout_that_is_asked_for(style, layout, rows):
    config = resolve(TrainConfig(style=style, layout=layout, max_turns=30, tasks_per_step=2, group_size=2))
    assert memory_estimate.tokens(config, ATOD())["training rows, at most"] == 4 * rows


@pytest.mark.slow
def test_a_step_stays_below_its_estimate(models, tmp_path):
    """Every count of a real run of the toy world, in both layouts."""
    for style in ("atod", "compact"):
        options = [
            "--env", TOY, "--student", str(models["student"]), "--teacher", str(models["teacher"]), "--style", style,
            "--max-turns", "3", "--max-response", "8", "--max-context", "128", "--tasks-per-step", "4", "--group-size",
            "4", "--eval-every", "0", "--report-tasks", "1", "--threads", "1", "--steps", "1", "--run", str(tmp_path / style),
        ]  # fmt: skip
        main(ATOD, options)
        row = json.loads((tmp_path / style / "metrics.jsonl").read_text())
        config = resolve(
            TrainConfig(
                student=str(models["student"]),
                style=style,
                max_turns=3,
                max_response=8,
                max_context=128,
                tasks_per_step=4,
                group_size=4,
            )
        )
        found = memory_estimate.tokens(config, ATOD())
        turns = row["episode/length/mean"] * found["episodes"]
        assert found["episodes"] == 16 and turns <= 16 * found["turns of an episode, at most"]
        assert 0 < row["batch/tokens"] <= found["sampled tokens, at most"]
        assert row["batch/row_tokens"] <= found["tokens in rows, at most"]
        assert found["training rows, at most"] == (48 if style == "atod" else 16)


def test_what_is_asked_for_is_counted():
    config = resolve(preset_config("paper-0.6b", WEBSHOP))
    names = {part.name for part in memory_estimate.memory(config, with_rules(GRPO, "released"))}
    assert "reference: weights" in names and "teacher: weights" not in names
    parts = {part.name: part.size for part in memory_estimate.memory(config, GOPD())}
    assert parts["base: weights"] == parts["student: weights"] < parts["teacher: weights"]
    shared = memory_estimate.memory(config, GOPD(base=config.teacher))
    assert "teacher, base: weights" in {part.name for part in shared}  # held once
    on_cpu = memory_estimate.memory(dataclasses.replace(config, device="cpu"), GOPD())
    assert {part.phase for part in on_cpu} == {"always", "update"}
    assert memory_estimate.peak(on_cpu) == sum(part.size for part in on_cpu)
    on_gpu = memory_estimate.memory(config, GOPD())
    weights = {part.name: part.size for part in on_gpu}
    turns = sum(part.size for part in on_gpu if part.phase == "update")
    always = sum(part.size for part in on_gpu if part.phase == "always")
    assert memory_estimate.peak(on_gpu) == always + max(turns, weights["teacher: weights"])
    parts = {part.name: part.size for part in memory_estimate.memory(config, EntropyAware())}
    assert parts["teacher's top-k"] == 128 * 15 * 512 * 16 * 8
    dapo = memory_estimate.tokens(config, with_rules(GRPO, "dapo"))
    assert dapo["episodes played, at most"] == 10 * dapo["episodes"] == 1280
    assert memory_estimate.tokens(config, with_rules(TCOD, "released"))["turns of an episode, at most"] == 15
    lowered = {p.name: p.size for p in memory_estimate.memory(dataclasses.replace(config, slots=64), GRPO())}
    whole = {p.name: p.size for p in memory_estimate.memory(config, GRPO())}
    assert 2 * lowered["engine: keys, values"] == whole["engine: keys, values"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--steps", "0"], "--steps 0: expected a number above 0"),
        (["--report-tasks", "0"], "--report-tasks 0: expected a number above 0"),
        (["--kappa-min", "-1"], "--kappa-min -1.0: expected a number from 0"),
        (["--coef-anneal-steps", "-5"], "--coef-anneal-steps -5: expected a number from 0"),
        (["--clip-low", "2"], "--clip-low 2.0: expected a number from 0 to 1"),
        (["--clip-high", "nan"], "--clip-high nan: expected a number from 0"),
        (["--dual-clip", "0.5"], "--dual-clip 0.5: expected a number from 1"),
        (["--length-divisor", "0"], "--length-divisor 0.0: expected a number from"),
        (["--lr", "nan"], "--lr nan: expected 0 or more"),
        (["--temperature", "0"], "--temperature 0.0: expected a number above 0"),
        (["--lr-floor", "1.5"], "--lr-floor 1.5: expected a share from 0 to 1"),
        (["--max-response", "2000"], "leaves no room for a prompt in --max-context 1024"),
        (["--old-logprobs", "sampler", "--staleness", "1"], "use --old-logprobs learner"),
        (["--teacher-engine", "vllm", "--temperature", "0.7"], "use --teacher-engine transformers"),
        (["--store", "everything"], "--store everything: expected trajectories, tokens or nothing"),
        (["--store", "tokens/0"], "--store tokens/0: expected"),
        (["--cluster", "slurm"], "--cluster slurm: expected none, ray, or ray:cpus=2,gpus=0.5"),
        (["--cluster", "ray:tpus=1"], "--cluster ray:tpus=1: expected"),
        (["--cluster", "ray:gpus=-1"], "--cluster ray:gpus=-1: expected"),
        (["--keep-tokens"], "--keep-tokens is no option any more: use --store tokens"),
        (["--worker_gpus=1"], "--worker-gpus is no option any more: use --cluster ray:gpus=N"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(ATOD, [*arguments, "--dry-run"])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and words in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ATOD(kappa_init=0.05), "--kappa-init 0.05: expected a number from 0.1"),
        (lambda: ATOD(kappa_init=0.0, coef_anneal_steps=0), "--kappa-init 0.0: expected a number from 0.1"),
        (lambda: GRPO(kl_coef=-0.1), "--kl-coef -0.1: expected a number from 0"),
        (lambda: GRPO(sampling_rounds=0), "--sampling-rounds 0: expected a number from 1"),
        (lambda: GRPO(group=GroupOptions(reward_scale=-1)), "--reward-scale -1: expected a number from 0"),
        (lambda: GRPO(group=GroupOptions(invalid_penalty=-5)), "--invalid-penalty -5: expected a number from 0"),
        (lambda: SOD(weight_cap=-1.5), "--weight-cap -1.5: expected a number from 0"),
        (lambda: TCOD(count_from=-5), "--count-from -5: expected a number from 0"),
        (lambda: TCOD(turns_every=0), "--turns-every 0: expected a number from 1"),
        (lambda: OPD(opd_coef=-1), "--opd-coef -1: expected a number from 0"),
        (lambda: SDAR(gate_beta=float("nan")), "--gate-beta nan: expected a number from 0"),
        (lambda: GiGPO(discount=1.5), "--discount 1.5: expected a number from 0 to 1"),
        (lambda: GKD(coef=-1), "--coef -1: expected a number from 0"),
        (lambda: EntropyAware(forward_coef=-1), "--forward-coef -1: expected a number from 0"),
        (lambda: AgentOPSD(kl_coef=-1), "--kl-coef -1: expected a number from 0"),
        (lambda: Siblings(nudge=-1), "--nudge -1: expected a number from 0"),
        (lambda: Objective(entropy_coef=float("inf")), "--entropy-coef inf: expected a finite number"),
    ],
)
def test_an_option_that_would_turn_a_method_around_is_refused(make, words):
    with pytest.raises(AtodError, match=re.escape(words)):
        make()


def test_the_built_in_run_has_settings_of_its_own_and_flags_win(capsys, monkeypatch):
    run = {"steps": 110, "gap": "exact", "warmup_steps": 5, "staleness": 1}

    def settings(algorithm, *arguments):
        found, _ = dry(algorithm, arguments, capsys)
        method = found["algorithm"]
        return {name: found["train"][name] for name in run}, method.get("coef_anneal_steps"), method["objective"]

    train, annealing, objective = settings(ATOD)
    assert (train, annealing, objective["clip_high"]) == (run, 60, 0.28)
    train, annealing, objective = settings(
        ATOD, "--steps", "9", "--staleness=0", "--coef-anneal-steps", "7", "--clip-high", "0.2"
    )
    assert (train, annealing, objective["clip_high"]) == (run | {"steps": 9, "staleness": 0}, 7, 0.2)
    assert dry(ATOD, [], capsys)[0]["train"]["lr"] == 4e-4 != dry(GRPO, [], capsys)[0]["train"]["lr"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert settings(ATOD)[0] == run | {"staleness": 0}
    monkeypatch.delenv("WORLD_SIZE")
    plain = {name: getattr(resolve(TrainConfig()), name) for name in run}
    for algorithm, *arguments in (
        (GRPO,),
        (ATOD, "--rules", "released"),
        (ATOD, "--student", "tiny", "--lr", "1e-4"),
        (ATOD, "--data", "real"),
    ):
        train, annealing, objective = settings(algorithm, *arguments)
        assert (train, annealing, objective["clip_high"]) == (plain, None if algorithm is GRPO else 80, 0.2)
    monkeypatch.setenv("WEBSHOP_DATA", str(SUPPORT))  # data that a variable names is not the built-in world's either
    named = {name: getattr(resolve(TrainConfig(env=WEBSHOP)), name) for name in run}
    assert settings(ATOD, "--env", WEBSHOP)[:2] == (named, 80)
    assert settings(ATOD, "--env", WEBSHOP, "--data", "builtin")[:2] == (run | {"steps": 100}, 60)
    monkeypatch.delenv("WEBSHOP_DATA")
    for other in (WEBSHOP, "atod/SearchQA-v0", "all"):
        assert settings(ATOD, "--env", other)[:2] == (run | {"steps": 100}, 60)
    textcraft = {name: getattr(resolve(TrainConfig(env="atod/TextCraft-v0")), name) for name in run}
    assert settings(ATOD, "--env", "atod/TextCraft-v0")[:2] == (textcraft, 80)


def test_what_store_and_cluster_say():
    config = resolve(TrainConfig(store="tokens/10", cluster="ray:gpus=0.5"))
    assert storage_of(config) == (10, True) and worker_resources(config) == (1.0, 0.5)
    assert (
        storage_of(resolve(TrainConfig())) == (1, False) and storage_of(resolve(TrainConfig(store="nothing")))[0] == 0
    )


@pytest.mark.slow
def test_a_dry_run_leaves_nothing_behind_and_fetches_nothing(tmp_path):
    """In a process of its own, in an empty folder, with the hub out of reach."""
    code = "import sys; from atod_algos.training.cli import main; from atod_algos.atod import ATOD; main(ATOD, sys.argv[1:])"
    import os

    done = subprocess.run(
        [sys.executable, "-c", code, "--preset", "paper-4b", "--env", SEARCHQA, "--dry-run"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "30,532,122,624 numbers" in done.stdout and "1,024" in done.stdout
    assert list(tmp_path.iterdir()) == []
