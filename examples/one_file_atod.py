"""ATOD in one file: rollout, scoring, advantage, update, with torch, transformers and ``gym.make`` (arXiv 2606.27814).

For reading and for experiments: what the toolkit does in many rooms, fast and for any size, stands here in four
functions, slowly and for small models. Teacher and student share a tokenizer. Axes: G attempts at a task, N attempts in
a step, K turns, M sampled tokens.

    python examples/one_file_atod.py --student FOLDER --teacher FOLDER --steps 20
    python examples/one_file_atod.py                       # the small models that come with the project

The same episodes give the same advantages and the same gradient as ``python -m atod_algos.atod`` (there is a test).
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from atod_envs.prompting import prompted

KAPPA_INIT, KAPPA_MIN, RHO_INIT, RHO_MAX, ANNEAL_STEPS = 1.0, 0.1, 1.0, 2.0, 80
CLIP, REWARD_SCALE, EPS = 0.2, 10.0, 1e-6
NEW: list[dict] = []
LATER = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "@"}]


@dataclass
class Turn:
    """One response: the ids that it answers, and the ids that were sampled."""

    prompt: list[int]
    response: list[int]


@dataclass
class Attempt:
    """One episode of a task."""

    task: int
    seed: int
    success: bool = False
    turns: list[Turn] = field(default_factory=list)


# --- rollout --------------------------------------------------------------------------------------------------------


def message_ids(tokenizer, message: str, talk: list[dict] = NEW) -> list[int]:
    """Ids of a user message with the chat template around it; after a response (``talk=LATER``), from its end on.

    No text of the message becomes a control token: what would is cut in two before it is encoded.
    """

    def render(text: str) -> str:
        whole = [*talk, {"role": "user", "content": text}]
        shown = tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
        return shown.partition("@")[2] if talk else shown

    def read(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    added, template = tokenizer.added_tokens_decoder, tokenizer.chat_template
    control = {
        i: t.content
        for i, t in added.items()
        if t.special or t.content[:2] == "<|" or ("think" not in t.content and t.content in template)
    }
    ids, before, after = read(render(message)), *render("{0}").split("{0}")
    if [i for i in ids if i in control] == [i for i in read(before) + read(after) if i in control]:
        return ids
    cuts = [m.start() + 1 for m in re.finditer(f"(?={'|'.join(map(re.escape, control.values()))})", message)]
    pieces = [message[i:j] for i, j in zip([0, *cuts], [*cuts, len(message)], strict=True)]
    return [i for text in (before, *pieces, after) for i in read(text)]


@torch.no_grad()
def sample(model, tokenizer, prompts: list[list[int]], max_new: int) -> list[list[int]]:
    """One response for each prompt, sampled at temperature 1; ends with the stop token unless it is cut."""
    width, pad = max(map(len, prompts)), tokenizer.pad_token_id or tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        pad_token_id=pad, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    responses = []
    for row in out[:, width:].tolist():
        end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        responses.append(row[:end])
    return responses


def rollout(model, tokenizer, envs, attempts: list[Attempt], style: str, max_new: int) -> list[Attempt]:
    """Play all attempts, one turn of all of them at a time."""
    prompts: dict[int, list[int]] = {}
    for i, attempt in enumerate(attempts):
        tasks = envs[i].unwrapped.tasks
        message, _ = envs[i].reset(seed=attempt.seed, options={"task_id": tasks[attempt.task % len(tasks)]})
        prompts[i] = message_ids(tokenizer, message)
    while prompts:
        live = list(prompts)
        for i, response in zip(live, sample(model, tokenizer, [prompts[i] for i in live], max_new), strict=True):
            stopped = response[-1] == tokenizer.eos_token_id
            message, _, terminated, truncated, info = envs[i].step(
                tokenizer.decode(response[:-1] if stopped else response)
            )
            attempts[i].turns.append(Turn(prompts[i], response))
            attempts[i].success = info["success"]
            if terminated or truncated:
                del prompts[i]
            elif style == "compact":  # the conversation grows; a windowed style tells it anew each turn
                between = message_ids(tokenizer, message, LATER)
                prompts[i] = prompts[i] + response + (between[1:] if stopped else between)
            else:
                prompts[i] = message_ids(tokenizer, message)
    return attempts


# --- scoring --------------------------------------------------------------------------------------------------------


def log_probs(model, attempt: Attempt) -> torch.Tensor:
    """Log pi of every sampled token of an attempt [M], turn after turn."""
    found = []
    for turn in attempt.turns:
        ids = torch.tensor([turn.prompt + turn.response])
        logits = model(input_ids=ids).logits[0, len(turn.prompt) - 1 : -1].float()
        found.append(logits.log_softmax(-1).gather(1, ids[0, len(turn.prompt) :, None])[:, 0])
    return torch.cat(found)


# --- advantage ------------------------------------------------------------------------------------------------------


def min_max(x: np.ndarray) -> np.ndarray:
    """Min-max within a trajectory; 0.5 where all are alike (eq 15)."""
    return np.full_like(x, 0.5) if np.ptp(x) < 1e-8 else (x - x.min()) / np.ptp(x)


def advantages(
    attempts: list[Attempt], student: list[np.ndarray], teacher: list[np.ndarray], step: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A_t of an attempt's sampled tokens, and w_k of its turns; ``student``, ``teacher``: log-probs, an array each."""
    p = min(step / ANNEAL_STEPS, 1.0)  # eq 10
    kappa = max(KAPPA_MIN, KAPPA_INIT - (KAPPA_INIT - KAPPA_MIN) * p)  # eq 11
    rho = RHO_INIT + (RHO_MAX - RHO_INIT) * p  # eq 12
    A, W = [], []
    for attempt, log_pi, log_pi_T in zip(attempts, student, teacher, strict=True):
        group = [REWARD_SCALE * other.success for other in attempts if other.task == attempt.task]
        A_grpo = (REWARD_SCALE * attempt.success - np.mean(group)) / (np.std(group, ddof=1) + EPS)  # eq 2
        delta = log_pi_T - log_pi  # eq 6
        ends = np.cumsum([len(turn.response) for turn in attempt.turns])[:-1]
        d = np.array([np.abs(x).mean() for x in np.split(delta, ends)])  # eq 13
        h = np.array([-x.mean() for x in np.split(log_pi, ends)])  # eq 14
        w = 1 - (1 - min_max(d)) * (1 - min_max(h))  # eqs 15, 16
        w_token = np.repeat(w, [len(turn.response) for turn in attempt.turns])
        A.append(kappa * delta * w_token + rho * A_grpo)  # eqs 8, 9
        W.append(w)
    return A, W


# --- update ---------------------------------------------------------------------------------------------------------


def gradient(model, attempts: list[Attempt], A: list[np.ndarray], old: list[np.ndarray]) -> float:
    """Add up the gradient of the clipped surrogate (eq 4): mean over trajectories of means over tokens; the loss."""
    total = 0.0
    for attempt, advantage, old_log_pi in zip(attempts, A, old, strict=True):
        log_pi = log_probs(model, attempt)
        a = torch.tensor(advantage, dtype=torch.float32)
        eta = (log_pi - torch.tensor(old_log_pi, dtype=torch.float32)).exp()  # eq 3
        loss = -torch.minimum(eta * a, eta.clamp(1 - CLIP, 1 + CLIP) * a).mean() / len(attempts)
        loss.backward()
        total += float(loss.detach())
    return total


def main() -> None:
    """Train, and print how often the student succeeds."""
    builtin = Path(__file__).resolve().parents[1] / "agents" / "reference" / "alfworld"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", default="atod/ALFWorld-v0")
    parser.add_argument("--style", default="compact", help="prompt style: compact, or atod for real models")
    parser.add_argument("--student", default=str(builtin / "student"))
    parser.add_argument("--teacher", default=str(builtin / "teacher"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tasks", type=int, default=8, help="tasks a step")
    parser.add_argument("--group", type=int, default=8, help="attempts at each task")
    parser.add_argument("--max-turns", type=int, default=14)
    parser.add_argument("--max-response", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    envs = [prompted(gym.make(args.env, max_turns=args.max_turns), args.style) for _ in range(args.tasks * args.group)]
    for step in range(1, args.steps + 1):
        attempts = [
            Attempt(task=step * args.tasks + n // args.group, seed=step * 1000 + n) for n in range(len(envs))
        ]  # fmt: skip
        student.eval()
        attempts = rollout(student, tokenizer, envs, attempts, args.style, args.max_response)
        with torch.no_grad():
            old = [log_probs(student, attempt).double().numpy() for attempt in attempts]
            by_teacher = [log_probs(teacher, attempt).double().numpy() for attempt in attempts]
        A, _ = advantages(attempts, old, by_teacher, step)
        student.train()
        loss = gradient(student, attempts, A, old)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        success = np.mean([attempt.success for attempt in attempts])
        gap = np.concatenate([t - s for s, t in zip(old, by_teacher, strict=True)]).mean()
        print(
            f"step {step:3}  success {success:5.1%}  gap {gap:+.3f}  loss {loss:+.4f}  gradient {norm:.3f}", flush=True
        )


if __name__ == "__main__":
    main()
