import json
from pathlib import Path

import pytest
from forks import forked_runs
from toy import WORDS
from toyworld import fit, small_model


@pytest.fixture(scope="session")
def golden():
    """Recorded numbers of the equations."""
    return json.loads(Path(__file__).with_name("golden_atod.json").read_text())


@pytest.fixture(scope="session")
def tokenizer():
    from agents.reference.tokenizer import train_tokenizer

    texts = [f"say {w}: Speak. You say {w}. Nothing happens. <think>x</think><action>{w}</action>" for w in WORDS] * 20
    return train_tokenizer(texts, tags=["<think>", "</think><action>", "</action>"])


@pytest.fixture(scope="session")
def models(tokenizer, tmp_path_factory):
    """Folders of a small student and a small teacher for the toy world, both able to say something well-formed."""
    from agents.chat import ChatFormat

    chat = ChatFormat(tokenizer)
    folders = {}
    for role, seed, right, updates in (("student", 1, 0.3, 60), ("teacher", 2, 0.8, 120)):
        prompts, responses = [], []
        for i in range(40):
            word = WORDS[i % 4]
            said = word if i % 10 < right * 10 else WORDS[(i + 1 + i // 10) % 4]
            prompts.append(chat.opening(f"say {word}: Speak ({i})."))
            responses.append(chat.encode_response(f"<think>x</think><action>{said}</action>"))
        model = small_model(tokenizer, seed)
        fit(model, prompts, responses, updates)
        folders[role] = tmp_path_factory.mktemp(role)
        model.save_pretrained(folders[role])
        tokenizer.save_pretrained(folders[role])
    return folders


@pytest.fixture(scope="session")
def runner(models):
    """Runs training in forks of a process that has imported everything; see ``faults_runner.py`` for its orders."""
    with forked_runs(models["student"]) as run:
        yield run
