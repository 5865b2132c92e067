"""The teacher's server: whose turn it is, and what it would not answer as asked."""

import threading
import time

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra 'serve')")
from wire import teacher

from atod_algos.teachers.server import SLICE_ROWS
from atod_envs.http.messages import Refused

ASKED = {"prompt_logprobs": 1, "max_tokens": 1}


@pytest.fixture
def server():
    with teacher() as server:
        yield server


def test_a_long_request_gives_way_to_a_short_one(server, monkeypatch):
    """Rows are scored in slices, and between two of them it is another's turn."""
    scored, short = [], []
    one_more = threading.Thread(target=lambda: short.append(server.completions({"prompt": [1, 2], **ASKED})))

    def slice_of(prompts, temperature):
        scored.append(len(prompts))
        if len(scored) == 1:
            one_more.start()
            while not server._worker._work_queue.qsize():
                time.sleep(0.001)
        return [[-1.0] * (len(prompt) - 1) for prompt in prompts]

    monkeypatch.setattr(server, "_scored", slice_of)
    long = server.completions({"prompt": [[1, 2, 3]] * (2 * SLICE_ROWS + 1), **ASKED})
    one_more.join()
    assert scored == [SLICE_ROWS, 1, SLICE_ROWS, 1] and len(short[0]["choices"]) == 1
    assert len(long["choices"]) == 2 * SLICE_ROWS + 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": True},
        {"max_tokens": -1},
        {"prompt_logprobs": "x"},
        {"prompt_logprobs": -1},
        {"stream": True},
        {"n": 2},
    ],
)
def test_what_would_not_be_answered_as_asked_is_refused(server, wrong):
    with pytest.raises(Refused) as no:
        server.completions({"prompt": [1, 2], **ASKED, **wrong})
    assert no.value.status == 400


def test_texts_that_are_none_or_too_long_are_refused_and_half_characters_are_not(server):
    assert server.tokenize({"prompt": "a\ud800"})["tokens"] == [ord("a"), 0xFFFD]
    for status, body in ((400, {"prompt": "a", "add_special_tokens": "false"}), (413, {"prompt": "a" * (1 << 18)})):
        with pytest.raises(Refused) as no:
            server.tokenize(body)
        assert no.value.status == status
