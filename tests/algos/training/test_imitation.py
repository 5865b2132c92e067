"""Demonstrations come from the expert alone where they are trained on, and fitting them works."""

import gymnasium as gym
import numpy as np
import pytest
from toyworld import small_model

from agents.chat import ChatFormat
from agents.engines.transformers import TransformersEngine
from agents.reference.tokenizer import train_tokenizer
from atod_algos.training.demonstrations import ImitationOptions, demonstrate
from atod_algos.training.imitation import Imitator, imitate

pytestmark = pytest.mark.slow


def world():
    return gym.make("atod/ALFWorld-v0", data="builtin", split="train", max_turns=20)


@pytest.fixture(scope="module")
def chat():
    tasks = world().unwrapped.tasks
    bare = ChatFormat(train_tokenizer(["a b"], tags=["<think>"]))
    shown = demonstrate(tasks[:24], world, bare, style="compact", seed=0)
    texts = [text for t in shown for turn in t.turns for text in (turn.observation, turn.response)]
    texts += [t.task for t in shown]
    return ChatFormat(train_tokenizer(texts, tags=["<think>", "</think><action>", "</action>"]))


def test_expert_episodes_win_and_are_supervised_throughout(chat):
    shown = demonstrate(world().unwrapped.tasks[:12], world, chat, style="compact", seed=0)
    assert all(t.success for t in shown)
    for trajectory in shown:
        for turn in trajectory.turns:
            assert chat.decode(turn.response_ids) == turn.response and turn.format_ok and turn.prompt_ids


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_turns_of_the_student_are_executed_and_not_learned(chat, beta):
    model = small_model(chat.tokenizer, 1)
    engine = TransformersEngine(model, slots=16, max_context=256)
    shown = demonstrate(world().unwrapped.tasks[:8], world, chat, style="compact", seed=3, beta=beta, engine=engine)
    experts = np.array([bool(turn.prompt_ids) for t in shown for turn in t.turns])
    assert (not experts.any()) if beta == 1.0 else 0.25 < experts.mean() < 0.75
    for trajectory in shown:
        told: list[str] = []
        for turn in trajectory.turns:
            if turn.prompt_ids:
                assert chat.decode(turn.response_ids) == turn.response and turn.format_ok
                assert all(response in chat.decode(turn.prompt_ids) for response in told), (
                    "the student's turns are context"
                )
            told.append(turn.response)
    again = demonstrate(world().unwrapped.tasks[:8], world, chat, style="compact", seed=3, beta=beta, engine=engine)
    assert [[t.action for t in e.turns] for e in again] == [[t.action for t in e.turns] for e in shown]


def test_the_learner_needs_an_engine(chat):
    with pytest.raises(ValueError, match="needs an engine"):
        demonstrate(world().unwrapped.tasks[:1], world, chat, style="compact", seed=0, beta=0.5)


def test_fitting_lowers_the_loss(chat):
    model = small_model(chat.tokenizer, 1)
    shown = demonstrate(world().unwrapped.tasks[:32], world, chat, style="compact", seed=0)
    imitator = Imitator(model, ImitationOptions(rounds=4, epochs=2, lr=1e-2, batch_tokens=1024))
    losses = [imitator.fit(shown, number, number) for number in range(4)]
    assert losses[-1] < 0.6 * losses[0]


def test_an_early_stop_is_the_same_training_cut_short(chat):
    def weights_after(rounds, stop):
        model, kept = small_model(chat.tokenizer, 1), {}

        def keep(number, loss):
            kept[number] = [p.detach().clone() for p in model.parameters()]

        options = ImitationOptions(rounds, episodes=6, epochs=1, batch_tokens=1024, stop=stop, seed=3)
        imitate(model, chat, world, options, style="compact", max_tokens=24, max_context=512, on_round=keep)
        return kept

    whole, cut = weights_after(3, None), weights_after(3, 2)
    assert sorted(whole) == [1, 2, 3] and sorted(cut) == [1, 2]
    assert all((a == b).all() for a, b in zip(whole[2], cut[2], strict=True))


def test_the_loss_is_the_mean_negative_log_prob_of_the_experts_tokens(chat):
    """One update by the learner's path is one AdamW step on the plain loss."""
    import torch

    shown = demonstrate(world().unwrapped.tasks[:3], world, chat, style="compact", seed=0)
    options = ImitationOptions(rounds=1, epochs=1, lr=1e-3, batch_tokens=10**6, warmup=0.5)
    ours, plain = small_model(chat.tokenizer, 1), small_model(chat.tokenizer, 1)
    loss = Imitator(ours, options).fit(shown, 0, 0)
    total, count = torch.zeros(()), 0
    for trajectory in shown:
        row = [*trajectory.turns[-1].prompt_ids, *trajectory.turns[-1].response_ids]
        logprobs = torch.log_softmax(plain(input_ids=torch.tensor([row])).logits[0], -1)
        for turn in trajectory.turns:
            start = len(turn.prompt_ids)
            for place, token in enumerate(turn.response_ids, start):
                total, count = total - logprobs[place - 1, token], count + 1
    assert loss == pytest.approx(float(total.detach()) / count, rel=1e-5)
    (total / count).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in plain.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=1e-3 * 1e-2, betas=(0.9, 0.98)).step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
