import json
import os
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "envs")]
from toy import WORDS
from toyworld import small_model

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def golden():
    """Recorded numbers of the equations."""
    path = Path(os.environ.get("ATOD_GOLDEN", REPOSITORY.parent / "shared" / "paper" / "golden_atod.json"))
    if not path.is_file():
        pytest.skip(f"no golden numbers at {path}; set ATOD_GOLDEN")
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def tokenizer():
    from agents.reference.tokenizer import train_tokenizer

    texts = [f"say {w}: Speak. You say {w}. Nothing happens. <think>x</think><action>{w}</action>" for w in WORDS] * 20
    return train_tokenizer(texts, tags=["<think>", "</think><action>", "</action>"])


@pytest.fixture(scope="session")
def models(tokenizer, tmp_path_factory):
    """Folders of a small student and a small teacher for the toy world, both able to say something well-formed."""
    import torch

    from agents.chat import ChatFormat
    from atod_algos.batch import make_batch
    from atod_algos.scoring import row_logprobs
    from atod_envs.trajectory import Group, StopReason, Trajectory, Turn

    chat = ChatFormat(tokenizer)
    folders = {}
    for role, seed, right, updates in (("student", 1, 0.3, 60), ("teacher", 2, 0.8, 120)):
        model = small_model(tokenizer, seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        trajectories = []
        for i in range(40):
            word = WORDS[i % 4]
            said = word if i % 10 < right * 10 else WORDS[(i + 1 + i // 10) % 4]
            prompt = chat.opening(f"say {word}: Speak ({i}).")
            response = chat.encode_response(f"<think>x</think><action>{said}</action>")
            turn = Turn(0, "", (), tuple(prompt), tuple(response), (0.0,) * len(response), "", "", True, True, 0.0)
            trajectories.append(Trajectory("e", "t", "s", "", "g", 0, (turn,), "", False, 0.0, StopReason.FAILURE))
        batch = make_batch([Group("t", tuple(trajectories))])
        import numpy as np

        for _ in range(updates):
            _, logprobs, _ = row_logprobs(model, batch, np.arange(40), temperature=1.0)
            (-logprobs.mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        folder = tmp_path_factory.mktemp(role)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[role] = folder
    return folders
