"""The three layouts, for every environment and with templates that rewrite history."""

import copy
import logging

import gymnasium as gym
import numpy as np
import pytest
from toy import ToyStyle
from toyworld import TOY, small_model

import atod_envs
from agents.chat import ChatFormat
from agents.engines.transformers import TransformersEngine
from atod_algos.atod import ATOD
from atod_algos.batch import RowLayout, make_batch
from atod_algos.learner.logprobs import score
from atod_algos.rollout.episodes import EpisodeSpec, Rollout
from atod_algos.rollout.layouts import choose_layout
from atod_algos.training.cli import main
from atod_envs.errors import AtodError
from atod_envs.styles import Layout

QWEN3 = """{%- set last = namespace(user=0) -%}
{%- for m in messages if m.role == 'user' %}{% set last.user = loop.index0 %}{% endfor -%}
{%- set seen = namespace(n=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'user' %}{% set seen.n = seen.n + 1 %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% else -%}
{%- set parts = m.content.split('</think>') -%}
{%- set said = parts[-1].lstrip('\n') if parts | length > 1 else m.content -%}
{%- set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' -%}
{{- '<|im_start|>assistant\n' -}}
{%- if seen.n > last.user and thought %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif -%}
{{- said + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif -%}"""
"""Behaves as Qwen3's: thoughts of turns before the last question are dropped, an empty thought opens an answer."""


@pytest.fixture(scope="module")
def qwen(tokenizer):
    """A tokenizer with Qwen3's template and its end-of-turn token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = QWEN3
    return tokenizer


def trajectory_rows(name, style, tokenizer, make_env, task, split="train"):
    chat = ChatFormat(tokenizer)
    style, rows = choose_layout(name, style, chat)
    model = small_model(tokenizer, 5)
    model.config.max_position_embeddings = 4096
    engine = TransformersEngine(model, slots=4, max_context=4096)
    rollout = Rollout(engine, chat, make_env, style=style, max_tokens=6, temperature=1.0)
    groups = rollout.play_groups([EpisodeSpec(task, "g", 3), EpisodeSpec(task, "g", 4)])
    rollout.close()
    return model, groups, make_batch(groups, rows)


@pytest.mark.slow
@pytest.mark.parametrize("world", sorted(atod_envs.playable()))
@pytest.mark.parametrize("name", ["window", "turns", "trajectory"])
def test_the_published_style_in_every_layout(world, name, tokenizer):
    def make_env():
        return gym.make(world, max_turns=3, data="builtin")

    env = make_env()
    style, task = env.unwrapped.prompt_styles()["atod"], env.unwrapped.tasks[0]
    model, groups, batch = trajectory_rows(name, style, tokenizer, make_env, task)
    turns = [turn for group in groups for member in group.trajectories for turn in member.turns]
    assert len(turns) > 2
    assert len(batch.rows) == (2 if name == "trajectory" else len(turns))
    for member in groups[0].trajectories:
        for before, after in zip(member.turns, member.turns[1:], strict=False):
            whole = before.prompt_ids + before.response_ids
            assert (after.prompt_ids[: len(whole)] == whole) == (name != "window")
            # What the environment answered stands in the next prompt, whatever the layout.
            new = after.prompt_ids if name == "window" else after.prompt_ids[len(whole) :]
            assert after.observation.split("\n")[0].split(" [SEP] ")[-1][:20] in tokenizer.decode(new)
    # Only sampled tokens are learned from, and they are scored as they were sampled.
    assert batch.n_tokens == sum(len(turn.response_ids) for turn in turns)
    np.testing.assert_allclose(score(model, batch, temperature=1.0)[0], batch.sampler_logprobs_M, atol=1e-4)


def test_a_style_that_tells_only_what_is_new_cannot_stand_alone(tokenizer):
    styles = gym.make("atod/ALFWorld-v0", data="builtin").unwrapped.prompt_styles()
    chat = ChatFormat(tokenizer)
    with pytest.raises(AtodError, match=r"--style atod, or --layout"):
        choose_layout("window", styles["compact"], chat)
    with pytest.raises(AtodError, match="ToyStyle is made for windows alone"):
        choose_layout("turns", ToyStyle(Layout.WINDOW), chat)
    assert choose_layout("auto", styles["compact"], chat) == (styles["compact"], RowLayout.MERGED)
    assert choose_layout("auto", styles["atod"], chat) == (styles["atod"], RowLayout.MERGED)
    assert choose_layout("turns", styles["compact"], chat) == (styles["compact"], RowLayout.PER_TURN)


@pytest.mark.parametrize("name", ["auto", "window", "turns", "trajectory"])
def test_qwen3s_template_is_repaired_and_said_aloud(name, qwen, caplog):
    styles = gym.make("atod/ALFWorld-v0", data="builtin").unwrapped.prompt_styles()
    with caplog.at_level(logging.WARNING, "atod_algos.rollout.layouts"):
        choose_layout(name, styles["atod"], ChatFormat(qwen))
    warned = [record.getMessage() for record in caplog.records]
    if name in ("auto", "window"):  # every prompt is rendered anew: nothing to repair
        assert not warned
    else:
        assert len(warned) == 1 and "rewrites earlier turns" in warned[0] and "<think>" in warned[0]


def test_an_episode_is_one_row_as_it_was_sampled_under_a_template_that_would_rewrite_it(qwen):
    env = gym.make("atod/ALFWorld-v0", data="builtin", max_turns=3)
    style, task = env.unwrapped.prompt_styles()["compact"], env.unwrapped.tasks[0]
    chat = ChatFormat(qwen)
    said = chat.encode_response("<think>where is it</think><action>look</action>")

    class Scripted(TransformersEngine):  # what is sampled is of no matter here: every response has a thought
        def step(self):
            import dataclasses

            return [
                dataclasses.replace(done, token_ids=tuple(said), logprobs=(-1.0,) * len(said), stopped=True)
                for done in super().step()
            ]

    engine = Scripted(small_model(qwen, 5), slots=2, max_context=2048)
    rollout = Rollout(
        engine,
        chat,
        lambda: gym.make("atod/ALFWorld-v0", data="builtin", max_turns=3),
        style=style,
        max_tokens=2,
    )
    batch = make_batch(rollout.play_groups([EpisodeSpec(task, "g", 1)]))
    assert len(batch.rows) == 1
    text = qwen.decode(batch.rows[0])
    assert text.count("<think>where is it</think><action>look</action><|im_end|>") == 3
    rendered = qwen.apply_chat_template(
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "<think>t</think>b"},
            {"role": "user", "content": "c"},
        ],
        tokenize=False,
    )
    assert "<think>" not in rendered  # the template itself would have dropped them


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["turns", "trajectory"])
def test_a_run_learns_in_every_layout(layout, models, tmp_path, capsys):
    main(
        ATOD,
        [
            "--env", TOY, "--student", str(models["student"]), "--teacher", str(models["teacher"]), "--style", "compact",
            "--max-turns", "3", "--max-response", "8", "--max-context", "128", "--tasks-per-step", "2", "--group-size", "2",
            "--eval-every", "0", "--report-tasks", "2", "--steps", "1", "--layout", layout, "--threads", "1",
            "--run", str(tmp_path / "r"),
        ],
    )  # fmt: skip
    assert "last (step 1)" in capsys.readouterr().out


def test_a_layout_that_the_style_cannot_have_is_answered_in_one_line(models, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(
            ATOD,
            ["--student", "builtin", "--layout", "window", "--run", str(tmp_path / "r")],
        )
    assert "error: --layout window needs a prompt style whose turns stand alone" in capsys.readouterr().err
