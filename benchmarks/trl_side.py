"""TRL's side of ``benchmarks/train.py``: GRPOTrainer with a rollout function as one of its users writes it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def generate_rollout(args: argparse.Namespace) -> Any:
    """A ``rollout_func`` as a user of TRL writes it: turn by turn, ``generate()`` over the episodes that still run."""
    import torch

    import atod_envs
    from agents.chat import ChatFormat
    from atod_envs.prompting import Prompted

    pool: list[Any] = []

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        tokenizer, model = trainer.processing_class, trainer.model
        chat = ChatFormat(tokenizer)
        while len(pool) < len(prompts):
            pool.append(Prompted(atod_envs.make("atod/ALFWorld-v0", data="builtin", max_turns=args.turns), "compact"))
        count = len(prompts)
        first: list[list[int]] = []
        for i, prompt in enumerate(prompts):
            seed = trainer.state.global_step * 1000 + i
            message, _ = pool[i].reset(seed=seed, options={"task_id": prompt[0]["content"]})
            first.append(chat.opening(message))
        completions: list[list[int]] = [[] for _ in range(count)]
        mask: list[list[int]] = [[] for _ in range(count)]
        rewards = [0.0] * count
        live = list(range(count))
        model.eval()
        while live:
            inputs = [first[i] + completions[i] for i in live]
            width = max(map(len, inputs))
            ids = torch.full((len(live), width), tokenizer.pad_token_id)
            seen = torch.zeros_like(ids)
            for row, tokens in enumerate(inputs):
                ids[row, width - len(tokens) :] = torch.tensor(tokens)
                seen[row, width - len(tokens) :] = 1
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids, attention_mask=seen, max_new_tokens=args.response, do_sample=True, temperature=1.0,
                    top_k=0, top_p=1.0, eos_token_id=list(chat.stop_ids), pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip
            going = []
            for row, i in enumerate(live):
                said = out[row, width:].tolist()
                ends = [place for place, token in enumerate(said) if token in chat.stop_ids]
                said = said[: ends[0] + 1] if ends else said
                completions[i] += said
                mask[i] += [1] * len(said)
                message, reward, terminated, truncated, _ = pool[i].step(chat.decode(said))
                rewards[i] += float(reward)
                more = chat.continuation(message, bool(ends))
                room = args.context - len(first[i]) - len(completions[i]) - len(more)
                if not (terminated or truncated) and room >= args.response:
                    completions[i] += more
                    mask[i] += [0] * len(more)
                    going.append(i)
            live = going
        model.train()
        return {
            "prompt_ids": first,
            "completion_ids": completions,
            "env_mask": mask,
            "logprobs": None,
            "episode_reward": rewards,
        }

    return rollout


def run_trl(folder: Path, args: argparse.Namespace, engine: bool, phases: Any) -> None:
    """Train with GRPOTrainer; ``phases`` is told when a phase of a step ends.

    Args:
        folder: the model's.
        args: the benchmark's options.
        engine: play with our engine, through TRL's ``rollout_func``.
        phases: the benchmark's clock.
    """
    import warnings

    warnings.filterwarnings("ignore")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import atod_envs

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tasks = atod_envs.make("atod/ALFWorld-v0", data="builtin").unwrapped.tasks
    rows = [{"prompt": [{"role": "user", "content": task}]} for task in tasks.order(0)[: 4 * args.tasks]]
    batch = args.tasks * args.group
    config = GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=args.trl_batch,
        gradient_accumulation_steps=batch // args.trl_batch, num_generations=args.group, max_steps=args.warmup + args.steps,
        num_iterations=1, beta=0.0, bf16=False, gradient_checkpointing=False, learning_rate=1e-6, use_cpu=True,
        temperature=1.0, top_k=0, top_p=1.0, loss_type="grpo", logging_strategy="no", save_strategy="no", report_to="none",
        disable_tqdm=True, max_completion_length=args.context, dataloader_num_workers=0, weight_decay=0.01,
    )  # fmt: skip
    if engine:
        from atod_algos.rollout.trl import TRLRollout

        play: Any = TRLRollout(
            "atod/ALFWorld-v0", style="compact", max_tokens=args.response, max_context=args.context, concurrency=batch,
            data="builtin", max_turns=args.turns,
        )  # fmt: skip
    else:
        play = generate_rollout(args)
    made: dict[str, int] = {}

    def timed(prompts: list[Any], trainer: Any) -> Any:
        phases.lap("update")  # what TRL does before it asks: nearly nothing
        answer = play(prompts, trainer)
        phases.lap("rollout")
        made["row_tokens"] = sum(map(len, answer["prompt_ids"])) + sum(map(len, answer["completion_ids"]))
        made["sampled"] = sum(map(sum, answer["env_mask"]))
        made["episodes"] = len(prompts)
        return answer

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            phases.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            phases.lap("update")
            phases.end(**made)

    def reward(episode_reward: list[float], **_: Any) -> list[float]:
        return list(episode_reward)

    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        rollout_func=timed, callbacks=[Steps()],
    )  # fmt: skip
    trainer.train()
