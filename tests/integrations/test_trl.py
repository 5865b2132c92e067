"""TRL itself trains on the environments: through rollout_func and through environment_factory."""

import gymnasium as gym
import pytest
import tiny

pytest.importorskip("trl", reason="TRL is not installed (extra 'trl')")
import torch
from datasets import Dataset
from tiny import BUILTIN
from trl import GRPOConfig, GRPOTrainer

from atod_algos.rollout.trl import TRLRollout, environment_reward, trl_rows
from atod_envs.errors import AtodError
from atod_envs.integrations.tools import OVER, TOOLS, tool_factory
from atod_envs.styles import as_conversation

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def settings(folder, **changed):
    usual = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "learning_rate": 1e-2,
        "beta": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return GRPOConfig(**{**usual, **changed})


def low_ids_are_better(*, completion_ids, **_):
    """A reward that differs between the attempts of an untrained model."""
    return [-float(sum(ids)) for ids in completion_ids]


def test_a_grpo_step_through_rollout_func(env_id, options, tmp_path):
    tokens = tiny.tokenizer()
    rollout = TRLRollout(env_id, style="compact", max_tokens=6, **options | {"max_turns": 3})
    seen = {}

    class Watched(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            seen["out"] = super()._generate_and_score_completions(inputs)
            with torch.no_grad():
                ids = torch.cat([seen["out"]["prompt_ids"], seen["out"]["completion_ids"]], dim=1)
                mask = torch.cat([seen["out"]["prompt_mask"], seen["out"]["completion_mask"]], dim=1)
                width = seen["out"]["completion_ids"].shape[1]
                self.model.eval()
                seen["logprobs"], *_ = self._get_per_token_logps_and_entropies(self.model, ids, mask, width)
                self.model.train()
            return seen["out"]

    trainer = Watched(
        model=tiny.model(tokens, context=8192),
        processing_class=tokens,
        reward_funcs=[environment_reward, low_ids_are_better],
        args=settings(tmp_path),
        train_dataset=Dataset.from_list(rollout.prompts(rollout.tasks[:2])),
        rollout_func=rollout,
    )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()

    out, episodes = seen["out"], rollout.trajectories
    assert len(episodes) == 4 and len({t.task_id for t in episodes}) == 1 and len({t.seed for t in episodes}) == 4
    for row, episode in enumerate(episodes):
        kept = out["completion_mask"][row].bool()
        sampled = kept & out["tool_mask"][row].bool()
        assert out["prompt_ids"][row][out["prompt_mask"][row].bool()].tolist() == list(episode.turns[0].prompt_ids)
        assert out["completion_ids"][row][sampled].tolist() == [i for t in episode.turns for i in t.response_ids]
        whole = [*episode.turns[-1].prompt_ids, *episode.turns[-1].response_ids]
        assert whole == [*episode.turns[0].prompt_ids, *out["completion_ids"][row][kept].tolist()]
        ours = torch.tensor([p for t in episode.turns for p in t.logprobs])
        # What TRL computes for these ids is what they were sampled with: nothing has shifted or been tokenized again.
        assert torch.allclose(seen["logprobs"][row][sampled], ours, atol=2e-5)
    log = trainer.state.log_history[0]
    assert log["rewards/environment_reward/mean"] == pytest.approx(sum(t.reward for t in episodes) / 4)
    moved = [name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])]
    assert moved, "the step changed nothing"


def test_rollouts_are_reproducible_and_groups_differ(tmp_path):
    def play():
        tokens = tiny.tokenizer()
        rollout = TRLRollout("atod/ALFWorld-v0", style="compact", max_tokens=4, max_turns=2, data="builtin")
        GRPOTrainer(
            model=tiny.model(tokens),
            processing_class=tokens,
            reward_funcs=[low_ids_are_better],
            args=settings(tmp_path),
            train_dataset=Dataset.from_list(rollout.prompts(rollout.tasks[:1])),
            rollout_func=rollout,
        ).train()
        return [[turn.response_ids for turn in t.turns] for t in rollout.trajectories]

    first = play()
    assert first == play()
    assert len({str(episode) for episode in first}) > 1


def test_low_rank_adapters_accumulation_and_evaluation(tmp_path):
    """What else a run does: adapters, several updates of the same episodes, an evaluation between them."""
    peft = pytest.importorskip("peft", reason="peft is not installed (extra 'lora')")
    tokens = tiny.tokenizer()
    rollout = TRLRollout("atod/ALFWorld-v0", style="atod", max_tokens=4, max_turns=2, data="builtin")
    asked = []

    def play(prompts, trainer):
        asked.append((len(prompts), trainer.state.global_step))
        return rollout(prompts, trainer)

    changed = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_iterations": 2}
    changed |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2, "num_generations_eval": 2}
    trainer = GRPOTrainer(
        model=tiny.model(tokens),
        processing_class=tokens,
        reward_funcs=[environment_reward, low_ids_are_better],
        args=settings(tmp_path, **changed),
        train_dataset=Dataset.from_list(rollout.prompts(rollout.tasks[:2])),
        eval_dataset=Dataset.from_list(rollout.prompts(rollout.tasks[2:3])),
        rollout_func=play,
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert asked == [(4, 0), (2, 2)]
    log = trainer.state.log_history
    assert log[0]["grad_norm"] > 0 and any("eval_reward" in entry for entry in log)


def test_windows_are_refused_and_conversations_are_not():
    (group,) = tiny.groups("atod/ALFWorld-v0", {"data": "builtin", "max_turns": 2}, style="atod", tasks=1)
    with pytest.raises(ValueError, match="do not continue each other"):
        trl_rows(group.trajectories)
    env = gym.make("atod/ALFWorld-v0", data="builtin")
    style = as_conversation(env.unwrapped.prompt_styles()["atod"])
    (group,) = tiny.groups("atod/ALFWorld-v0", {"data": "builtin", "max_turns": 2}, style=style, tasks=1)
    rows = trl_rows(group.trajectories)
    for episode, ids, mask, logprobs in zip(
        group.trajectories, rows["completion_ids"], rows["env_mask"], rows["logprobs"], strict=True
    ):
        assert len(ids) == len(mask) == len(logprobs) and 0 in mask
        assert sum(mask) == episode.n_tokens


def test_truncated_sampling_is_refused(tmp_path):
    tokens = tiny.tokenizer()
    rollout = TRLRollout("atod/ALFWorld-v0", style="compact", max_tokens=4, data="builtin")
    trainer = GRPOTrainer(
        model=tiny.model(tokens),
        processing_class=tokens,
        reward_funcs=[environment_reward],
        args=settings(tmp_path, top_p=0.9),
        train_dataset=Dataset.from_list(rollout.prompts(rollout.tasks[:1])),
        rollout_func=rollout,
    )
    with pytest.raises(ValueError, match="whole distribution"):
        trainer.train()


# ---- environment_factory ----


CALLS = {
    "atod/ALFWorld-v0": ('{"name": "look", "arguments": {}}', "look"),
    "atod/WebShop-v0": ('{"name": "search", "arguments": {"words": "red"}}', "search[red]"),
    "atod/SearchQA-v0": ('{"name": "search", "arguments": {"query": "red"}}', "<search>red</search>"),
    "atod/TextCraft-v0": ('{"name": "inventory", "arguments": {}}', "inventory"),
    "atod/ScienceWorld-v0": ('{"name": "act", "arguments": {"action": "wait1"}}', "wait1"),
}
END = "<|im_end|>"


def tagged(call):
    return f"<tool_call>\n{call}\n</tool_call>"


@pytest.fixture(scope="module")
def qwen_tokens():
    """A tokenizer with Qwen3's chat template, in which each of the calls is one token."""
    from pathlib import Path

    import trl
    from transformers.utils import get_json_schema

    from agents.reference.tokenizer import train_tokenizer

    schemas = [
        str(get_json_schema(getattr(kind, name)))
        for kind in TOOLS.values()
        for name, member in vars(kind).items()
        if callable(member)
    ]
    special = ["<|im_start|>", END, "<tool_response>", "</tool_response>", "<think>", "</think>"]
    calls = [tagged(call) for call, _ in CALLS.values()]
    tokens = train_tokenizer([" ".join(schemas)] * 3, tags=[*calls, *special], words=800)
    tokens.add_special_tokens({"eos_token": END})
    tokens.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return tokens


def calling_model(tokens, call):
    """A model in which attention and layers add nothing, so that a token alone decides on the next: always the call."""
    made = tiny.model(tokens, context=8192)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                value.zero_()
    ((said,), (end,), (line,)) = (tokens.encode(text) for text in (tagged(call), END, "\n"))
    embedding = made.get_input_embeddings().weight
    optimizer = torch.optim.AdamW([embedding], lr=3e-2)
    pairs = torch.tensor([[line, said], [said, end]])
    for _ in range(60):
        torch.nn.functional.cross_entropy(made(pairs[:, :1]).logits[:, 0], pairs[:, 1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return made


def test_a_grpo_step_through_environment_factory(env_id, options, qwen_tokens, tmp_path):
    call, action = CALLS[env_id]
    made = []

    def factory():
        made.append(tool_factory(env_id, **options | {"max_turns": 2})())
        return made[-1]

    task_ids = factory().task_ids[:2]
    made.clear()
    trainer = GRPOTrainer(
        model=calling_model(qwen_tokens, call),
        processing_class=qwen_tokens,
        reward_funcs=[low_ids_are_better],
        args=settings(tmp_path, max_completion_length=1500, max_tool_calling_iterations=2),
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": "Use the tools."}], "task_id": task} for task in task_ids]
        ),
        environment_factory=factory,
    )
    trainer.train()
    played = [env.trajectory for env in made]
    assert len(played) == 4 and {t.task_id for t in played} <= set(task_ids)
    assert any(turn.action == action for t in played for turn in t.turns), "no tool was called"
    log = trainer.state.log_history[0]
    name = type(made[0]).__name__
    assert log[f"rewards/{name}/mean"] == pytest.approx(sum(t.reward for t in played) / 4)
    assert log["tools/call_frequency"] > 0 and log["tools/failure_frequency"] == 0


@pytest.mark.parametrize("env_id", BUILTIN)
def test_tools_play_what_the_expert_plays(env_id):
    """Every action that the expert needs is within reach of the tools, and means the same."""
    import re

    episode = tiny.expert_trajectory(env_id, BUILTIN[env_id])
    env = tool_factory(env_id, **BUILTIN[env_id])()
    with pytest.raises(AtodError, match="columns prompt, task, but neither task_id nor seed"):
        env.reset(prompt=[], task=episode.task_id)  # each attempt of a group would be at another task
    first = env.reset(task_id=episode.task_id, seed=episode.seed, prompt=[{"role": "user", "content": "x"}])
    assert episode.turns[0].observation in first and episode.task in first
    forms = [
        (r"go to (.+)", "go_to"),
        (r"(?:move|put) (.+) (?:to|in/on) (.+)", "put"),
        (r"take (.+) from (.+)", "take"),
        (r"(clean|heat|cool|slice) (.+) with (.+)", None),
        (r"(open|close|use|examine) (.+)", None),
        (r"search\[(.*)\]", "search"),
        (r"click\[(.*)\]", "click"),
        (r"<search>(.*)</search>", "search"),
        (r"<answer>(.*)</answer>", "answer"),
        (r"(look|inventory)", None),
        (r"get (\d+) (.+)", "get"),
        (r"craft (.+) using (.+)", "craft"),
    ]
    if env_id == "atod/ScienceWorld-v0":
        forms = [(r"(.+)", "act")]
    said = ""
    for turn in episode.turns:
        form, name = next((form, name) for form, name in forms if re.fullmatch(form, turn.action))
        words = list(re.fullmatch(form, turn.action).groups())
        name = name or words.pop(0)
        said = getattr(env, name)(*words)
    assert said.endswith(OVER) and env.get_reward() == episode.reward == 1.0
    assert [t.action for t in env.trajectory.turns] == [t.action for t in episode.turns]
    assert getattr(env, name)(*words) == OVER and len(env.trajectory.turns) == len(episode.turns)
