"""Hugging Face datasets of the trajectories; TRL's trainers train on them."""

import copy
import re
from dataclasses import replace

import pytest
import tiny

pytest.importorskip("datasets", reason="datasets is not installed (extra 'datasets')")
from datasets import concatenate_datasets, load_from_disk

from atod_envs.integrations.hf_datasets import IGNORED, episodes, preferences, supervised, tokens, trajectories
from atod_envs.trajectory import Group, StopReason, write_jsonl

pytestmark = pytest.mark.slow

WORLD = ("atod/ALFWorld-v0", {"data": "builtin"})
MARKED = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A chat template that says what the assistant wrote, as TRL asks for."""


@pytest.fixture(scope="module")
def played():
    (group,) = tiny.groups(WORLD[0], {**WORLD[1], "max_turns": 3}, tasks=1, attempts=3)
    return tiny.with_rewards(group, [1.0, 0.0, 0.0])


def test_episodes_read_back_equal(played, tmp_path):
    kept = [*played.trajectories, tiny.expert_trajectory(*WORLD)]
    clean = [t for t in kept if "\ud800" not in str(t)]
    episodes(clean).save_to_disk(tmp_path / "data")
    assert list(trajectories(load_from_disk(tmp_path / "data"))) == clean
    write_jsonl(tmp_path / "t.jsonl", clean)


def test_episodes_of_different_agents_are_one_data_set(played):
    model, expert = played.trajectories[0], tiny.expert_trajectory(*WORLD)
    assert not any(turn.response_ids for turn in expert.turns)
    nothing = replace(expert, turns=(), labels={})
    parts = [episodes([one]) for one in (expert, model, nothing)]
    assert list(trajectories(concatenate_datasets(parts))) == [expert, model, nothing]


def test_half_characters_are_refused_or_replaced(played):
    turn = replace(played.trajectories[0].turns[0], response="a\ud83eb")
    broken = replace(played.trajectories[0], turns=(turn,), success=True)
    with pytest.raises(ValueError, match="half a character"):
        episodes([broken])
    assert supervised([broken], "compact")[0]["messages"][1]["content"] == "a\ufffdb"


def test_supervised_chats_of_an_expert():
    episode = tiny.expert_trajectory(*WORLD)
    (chat,) = supervised([episode], "compact")["messages"]
    assert [m["role"] for m in chat] == ["user", "assistant"] * len(episode.turns)
    assert chat[2]["content"] == episode.turns[1].observation
    assert f"<action>{episode.turns[0].action}</action>" in chat[1]["content"]
    rows = supervised([episode], "atod")
    assert len(rows) == len(episode.turns)
    shown = tiny.expert_trajectory(*WORLD, style="atod")
    import gymnasium as gym

    from atod_envs.prompting import prompted

    env = prompted(gym.make(WORLD[0], **WORLD[1]), "atod")
    prompt, _ = env.reset(seed=0, options={"task_id": shown.task_id})
    for row, turn in zip(supervised([shown], "atod"), shown.turns, strict=True):
        assert row["prompt"] == [{"role": "user", "content": prompt}]
        assert row["completion"] == [{"role": "assistant", "content": turn.response}]
        prompt, *_ = env.step(turn.response)


def test_bare_actions_are_named_as_the_prompt_names_them():
    episode = tiny.expert_trajectory("atod/WebShop-v0", tiny.OPTIONS["atod/WebShop-v0"])
    product = re.fullmatch(r"click\[(.*)\]", episode.turns[1].action)[1]
    (chat,) = supervised([episode], "compact")["messages"]
    number = re.search(r"<action>click\[ (#\d+)\]</action>", chat[3]["content"])[1]
    assert number in chat[2]["content"] and product not in chat[2]["content"]


def test_a_bare_action_in_the_wrong_form_is_no_well_formed_response():
    episode = tiny.expert_trajectory(*WORLD)
    turns = (replace(episode.turns[0], format_ok=False), *episode.turns[1:])
    (chat,) = supervised([replace(episode, turns=turns)], "compact")["messages"]
    assert chat[1]["content"] == turns[0].action and chat[3]["content"] != turns[1].action


def test_tokens_label_what_was_sampled_alone(played):
    (row,) = tokens(played.trajectories)
    first = played.trajectories[0]
    assert [i for i in row["labels"] if i != IGNORED] == [i for turn in first.turns for i in turn.response_ids]
    assert tuple(row["input_ids"]) == first.turns[-1].prompt_ids + first.turns[-1].response_ids
    assert len(tokens(played.trajectories, successful=False)) == 3
    with pytest.raises(ValueError, match="successful=False"):
        tokens(played.trajectories[1:])


def test_preferences_compare_responses_in_one_situation(played):
    pairs = preferences([played], "compact")
    assert len(pairs) == 2
    best = played.trajectories[0]
    for pair in pairs:
        place = pair["turn"]
        assert len(pair["prompt"]) == 2 * place + 1 and pair["margin"] == 1.0
        assert pair["chosen"] == [{"role": "assistant", "content": best.turns[place].response}]
        assert pair["rejected"] != pair["chosen"] and len(pair["rejected"]) == 1


def test_episodes_whose_environment_broke_are_in_no_data(played):
    solved, *failed = played.trajectories
    broken = replace(failed[0], stop_reason=StopReason.ABORTED)
    with pytest.raises(ValueError, match="no"):
        preferences([replace(played, trajectories=(solved, broken))])
    for data in (supervised, tokens):
        assert len(data([solved, broken], successful=False)) == len(data([solved], successful=False))


def test_attempts_that_were_shown_different_things_make_no_pair(played):
    a, b, _ = played.trajectories
    turns = (replace(b.turns[0], observation="Another room."), *b.turns[1:])
    with pytest.raises(ValueError, match="nothing to export"):
        preferences([Group(played.task_id, (a, replace(b, turns=turns)))], "compact")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["messages", "prompt and completion", "tokens"])
def test_trl_trains_on_supervised_data(kind, played, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed (extra 'trl')")
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = MARKED
    expert = [tiny.expert_trajectory(*WORLD)]
    data = {
        "messages": lambda: supervised(expert, "compact").select_columns("messages"),
        "prompt and completion": lambda: supervised(expert, "atod").select_columns(["prompt", "completion"]),
        "tokens": lambda: tokens(played.trajectories).select_columns(["input_ids", "labels"]),
    }[kind]()
    trainer = trl.SFTTrainer(
        model=tiny.model(tokenizer, context=8192),
        processing_class=tokenizer,
        train_dataset=data,
        args=trl.SFTConfig(**common(tmp_path), max_length=8192, assistant_only_loss=kind == "messages"),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    if kind == "tokens":
        assert batch["labels"][0].tolist()[: len(data[0]["labels"])] == data[0]["labels"]
    if kind == "messages":
        said = [message["content"] for message in data[0]["messages"] if message["role"] == "assistant"]
        labels = batch["labels"][0]
        assert tokenizer.decode(labels[labels != IGNORED]) == "".join(f"{text}<|end|>" for text in said)
    if kind == "prompt and completion":
        assert (batch["labels"] != IGNORED).sum() < batch["labels"].numel() / 2
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


@pytest.mark.filterwarnings("ignore")
def test_trl_trains_on_preferences(played, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed (extra 'trl')")
    tokenizer = tiny.tokenizer()
    tiny.model(tokenizer, context=8192).save_pretrained(tmp_path / "model")
    trainer = trl.DPOTrainer(
        model=str(tmp_path / "model"),
        processing_class=tokenizer,
        train_dataset=preferences([played], "compact").select_columns(["prompt", "chosen", "rejected"]),
        args=trl.DPOConfig(**common(tmp_path)),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(
        0.6931, abs=1e-2
    )  # ln 2: policy and reference are equal


def common(folder):
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
