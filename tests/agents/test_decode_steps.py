"""What a step of the built-in engine asks of a GPU, counted on a device that is none."""

import contextlib

import numpy as np
import pytest
import torch
from fake_device import fake_device
from requests_to_engines import prompts, run, small
from torch.utils._python_dispatch import TorchDispatchMode

from agents.engines import decode_graph
from agents.engines.base import SamplingParams
from agents.engines.decode_graph import DecodeGraphs
from agents.engines.decoder import FamilyDecoder
from agents.engines.transformers import TransformersEngine

TEMPERATURES = (0.0, 0.7, 1.0)


def asked(count, *, seed=0, low=3, high=40, tokens=4):
    """Requests of different lengths and temperatures."""
    return [
        (str(i), prompt, SamplingParams(tokens + i % 3, TEMPERATURES[i % 3], seed=i))
        for i, prompt in enumerate(prompts(count, seed, low, high))
    ]


def test_the_fake_device_counts_every_way_of_waiting():
    with fake_device(torch.nn.Linear(2, 2)) as device:
        x = torch.arange(4).to("meta")
        for wait in (
            lambda: x.tolist(),
            lambda: x.sum().item(),
            lambda: bool(x.sum() > 0),
            lambda: x[x > 1],
            lambda: x.nonzero(),
            lambda: x.cpu(),
        ):
            device.crossings.clear()
            wait()
            assert "out" in device.crossings and "in" not in device.crossings
        device.crossings.clear()
        assert (x + torch.tensor([1, 2, 3, 4], device="meta")).near.tolist() == [1, 3, 5, 7]
        assert device.crossings == ["in"]
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.arange(4)


@pytest.mark.parametrize(("kind", "layers"), [("Qwen3", 2), ("Llama", 4), ("Olmo2", 2)])
def test_a_step_sends_twice_and_waits_once(kind, layers):
    model = small(kind, num_hidden_layers=layers)
    requests = asked(6)
    expected = run(TransformersEngine(model, slots=4), requests)
    with fake_device(model) as device:
        engine = TransformersEngine(model, slots=4)
        assert isinstance(engine.decoder, FamilyDecoder) == (kind != "Olmo2")
        for request in requests:
            engine.submit(*request)
        done = {}
        while len(done) < len(requests):
            device.crossings.clear()
            done |= {completion.request_id: completion for completion in engine.step()}
            # The pass's indices, and what is needed to draw; back come ids and log-probs together.
            assert device.crossings == ["in", "in", "out"]
    assert {key: answer.token_ids for key, answer in done.items()} == {
        key: answer.token_ids for key, answer in expected.items()
    }


def test_a_group_that_shares_its_prompt_costs_two_small_copies_more():
    model = small("Qwen3")
    with fake_device(model) as device:
        engine = TransformersEngine(model, slots=8)
        for i in range(8):
            engine.submit(str(i), [5, 6, 7], SamplingParams(4, 1.0, seed=i))
        device.crossings.clear()
        engine.step()
        assert device.crossings == ["in"] * 4 + ["out"]
        device.crossings.clear()
        engine.step()
        assert device.crossings == ["in", "in", "out"]


# --- steps of fixed shape, which a GPU records ------------------------------------------------------------------------


class Tape(TorchDispatchMode):
    """Records operations and runs them again on the same tensors, as a CUDA graph does: no Python, no new sizes."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.lines.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, before in self.lines:
            again = func(*args, **kwargs)
            if isinstance(before, torch.Tensor) and again is not before:
                before.copy_(again)  # a view's copy is onto itself


def taped(self, run):
    tape = Tape()
    with tape:
        run()
    return tape.replay


def talk(engine, count=14, turns=3, low=3, high=60):
    """Conversations over several turns; what was said, log-probs apart, and the prompt tokens that were read in."""
    said, logprobs = {}, []
    conversations = {str(i): prompt for i, prompt in enumerate(prompts(count, 20, low, high))}
    for turn in range(turns):
        requests = [
            (key, prompt, SamplingParams(2 + (5 * i + turn) % 9, TEMPERATURES[i % 3], seed=100 * turn + i))
            for i, (key, prompt) in enumerate(conversations.items())
        ]
        done = run(engine, requests)
        for key in conversations:
            said[key, turn] = done[key].token_ids
            logprobs += done[key].logprobs
            conversations[key] = [*conversations[key], *done[key].token_ids, 5, 6, 7]
    return said, np.array(logprobs), engine.prefilled


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Llama", "Mistral"])
def test_a_recorded_step_replayed_gives_what_a_ragged_pass_gives(kind, monkeypatch):
    options = {"sliding_window": None} if kind == "Mistral" else {}
    model = small(kind, **options)
    said, logprobs, prefilled = talk(TransformersEngine(model, slots=9, graphs=False))
    replays = []

    def record(self, run):
        replay = taped(self, run)
        return lambda: (replays.append(1), replay())

    monkeypatch.setattr(DecodeGraphs, "_record", record)
    engine = TransformersEngine(model, slots=9, graphs=True)
    engine.graphs.records = True
    got, found, read = talk(engine)
    assert got == said and read == prefilled, "slots that were carried along kept what they had cached"
    np.testing.assert_allclose(found, logprobs, atol=1e-5)
    # Nine slots, a fourth and a sixteenth of them, rounded up; replayed many times each.
    assert set(engine.graphs.recorded) == {(1, 256), (3, 256), (9, 256)} and len(replays) > 20


def test_a_step_of_fixed_shape_is_a_copy_in_a_replay_and_a_copy_out():
    model = small("Qwen3")
    requests = asked(9, tokens=9)
    expected = run(TransformersEngine(model, slots=4, graphs=False), requests)
    inside = {}
    with fake_device(model) as device:
        engine = TransformersEngine(model, slots=4, graphs=True)
        region = engine.graphs._run

        def watched(buffers, span):
            crossings, begin = len(device.crossings), len(device.operations)
            region(buffers, span)
            assert len(device.crossings) == crossings, "a wait or a copy cannot be recorded"
            places = [t.data_ptr() for t in (buffers.inputs, buffers.output, *engine.store.keys, *engine.store.values)]
            shape = (places, device.operations[begin:])
            assert inside.setdefault((len(buffers.rows), span), shape) == shape, "the same kernels in the same memory"
            used.append(True)

        engine.graphs._run = watched
        for request in requests:
            engine.submit(*request)
        done, fixed = {}, 0
        while len(done) < len(requests):
            device.crossings.clear()
            used = []
            done |= {completion.request_id: completion for completion in engine.step()}
            fixed += len(used)
            assert device.crossings == (["in", "out"] if used else ["in", "in", "out"])
    assert {key: answer.token_ids for key, answer in done.items()} == {
        key: answer.token_ids for key, answer in expected.items()
    }
    assert fixed > 15 and set(inside) == {(1, 256), (4, 256)}


def test_a_step_reads_no_more_positions_than_it_must(monkeypatch):
    monkeypatch.setattr(DecodeGraphs, "_record", taped)
    model = small("Qwen3")
    requests = [
        ("short", [3, 4, 5], SamplingParams(40, 1.0, seed=1)),
        ("long", prompts(1, 3, 250, 251)[0], SamplingParams(20, 0.7, seed=2)),
    ]
    expected = run(TransformersEngine(model, slots=2, graphs=False), requests)
    engine = TransformersEngine(model, slots=2, graphs=True)
    engine.graphs.records = True
    done = run(engine, requests)
    for key, answer in expected.items():
        assert done[key].token_ids == answer.token_ids
        np.testing.assert_allclose(done[key].logprobs, answer.logprobs, atol=1e-5)
    assert set(engine.graphs.recorded) == {(2, 256), (2, 512), (1, 256)}


def test_recordings_are_few_and_go_when_their_memory_goes(monkeypatch):
    recorded = []

    def record(self, run):
        recorded.append(1)
        return run

    monkeypatch.setattr(DecodeGraphs, "_record", record)
    monkeypatch.setattr(decode_graph, "MOST", 1)
    model = small("Qwen3")
    engine = TransformersEngine(model, slots=9, graphs=True)
    engine.graphs.records = True

    def count(requests=9):
        recorded.clear()
        run(engine, asked(9)[:requests])
        return len(recorded)

    assert count() == 2 and len(engine.graphs.recorded) == 1, "nine slots, then three"
    assert count(1) == 1 and count(1) == 0, "weights and cache stand where they stood"
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    assert count(1) == 0, "changed in place"
    model.get_decoder().norm.weight.data = model.get_decoder().norm.weight.data.clone()
    assert count(1) == 1, "a weight has moved"
    engine.sleep()
    assert not engine.graphs.recorded
    assert count(1) == 1
    engine.load_weights(model.named_parameters())
    assert not engine.graphs.recorded, "the cache was dropped, and its memory"
    engine.close()
    assert TransformersEngine(model, slots=2).graphs is None, "on a CPU the ragged pass is the default"
    assert TransformersEngine(small("Olmo2"), slots=2, graphs=True).graphs is None


def test_a_step_that_cannot_be_recorded_is_computed_as_before(monkeypatch, caplog):
    model = small("Qwen3")
    said, logprobs, _ = talk(TransformersEngine(model, slots=9, graphs=False), turns=1)

    def refuse(self, run):
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(DecodeGraphs, "_record", refuse)
    engine = TransformersEngine(model, slots=9, graphs=True)
    engine.graphs.records = True
    got, found, _ = talk(engine, turns=1)
    assert got == said and np.array_equal(found, logprobs)
    warnings = [record.message for record in caplog.records if "CUDA graphs" in record.message]
    assert len(warnings) == 1 and "RuntimeError: operation not permitted when stream is capturing)" in warnings[0]


def test_what_is_said_to_cuda(monkeypatch):
    """The order of calls, with a tape in a graph's place: two runs on a side stream, then one that is recorded."""
    calls = []

    class Stream:
        def wait_stream(self, other):
            calls.append("wait")

    class Graph(Tape):
        pass

    @contextlib.contextmanager
    def graph(tape, pool, capture_error_mode):
        calls.append(("record", pool, capture_error_mode))
        with tape:
            yield

    @contextlib.contextmanager
    def entered(what):
        calls.append("side" if isinstance(what, Stream) else "device")
        yield

    for name, value in {
        "Stream": Stream, "current_stream": Stream, "stream": entered, "device": entered, "CUDAGraph": Graph, "graph": graph,
        "graph_pool_handle": lambda: (0, 1),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    model = small("Qwen3")
    requests = asked(1, tokens=9)
    expected = run(TransformersEngine(model, slots=1, graphs=False), requests)
    engine = TransformersEngine(model, slots=1, graphs=True)
    engine.graphs.records = True
    done = run(engine, requests)
    assert done["0"].token_ids == expected["0"].token_ids
    assert calls[:5] == ["device", "wait", "side", "wait", ("record", (0, 1), "thread_local")]
    assert calls[5:] == ["device"] * 8, "from then on it is replayed"
