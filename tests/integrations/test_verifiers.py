"""verifiers' own evaluation runs the environments against a server with OpenAI's interface."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny

pytest.importorskip("verifiers.v1", reason="verifiers is not installed (extra 'verifiers'; not together with openenv)")
from verifiers.v1.cli.eval.main import main as vf_eval
from verifiers.v1.cli.eval.runner import run_eval
from verifiers.v1.configs.cli.eval import EvalConfig

pytestmark = pytest.mark.slow


class Script(BaseHTTPRequestHandler):
    """Answers each conversation with the expert's next response; the turn is told by the number of answers so far."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = [m for m in request["messages"] if m["role"] == "assistant"]
        first = next(m["content"] for m in request["messages"] if m["role"] == "user")
        responses = self.server.responses[first]
        assert [m["content"] for m in said] == responses[: len(said)]
        answer = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": responses[len(said)]},
                }
            ],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def provider():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    server.responses = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def learn(provider, env_id, options, task, style, spoil=False):
    """Let the provider know the expert's responses to a task; its first prompt tells it which."""
    import gymnasium as gym

    from atod_envs.prompting import prompted

    episode = tiny.expert_trajectory(env_id, options, task=task, style=style)
    env = prompted(gym.make(env_id, **options), style)
    first, _ = env.reset(seed=0, options={"task_id": episode.task_id})
    responses = [turn.response for turn in episode.turns]
    provider.responses[first] = ["no action at all"] * 100 if spoil else responses
    return episode


def config(provider, folder, env_id, options, style, **changed):
    return EvalConfig(
        env={
            "taskset": {
                "id": "atod_verifiers",
                "environment": env_id,
                "style": style,
                "options": options,
            }
        },
        model="script",
        client={"base_url": f"http://127.0.0.1:{provider.server_address[1]}/v1"},
        output_dir=folder,
        push=False,
        rich=None,
        **changed,
    )


def test_the_evaluation_plays_the_experts_episodes(env_id, options, provider, tmp_path, monkeypatch):
    style = "atod"
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    options = {**options, "max_turns": 60}
    won = learn(provider, env_id, options, 0, style)
    lost = learn(provider, env_id, options, 1, style, spoil=True)
    episodes = asyncio.run(
        run_eval(config(provider, tmp_path, env_id, options, style, select={"limit": 2}, num_rollouts=2))
    )
    assert len(episodes) == 4 and all(episode.ok for episode in episodes), [e.errors for e in episodes]
    for episode in episodes:
        (trace,) = episode.traces
        assert episode.task.key in (won.task_id, lost.task_id)
        if episode.task.key == won.task_id:
            assert trace.reward == 1.0 and trace.metrics["success"] == 1.0 and trace.info["stop_reason"] == "success"
            assert trace.metrics["turns"] == len(won.turns) == trace.num_turns
            said = [node.message.content for node in trace.nodes if node.sampled]
            assert said == [turn.response for turn in won.turns]
        else:
            assert trace.reward == 0.0 and trace.metrics["success"] == 0.0


def test_the_command_line_evaluates_a_panel(provider, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    import gymnasium as gym

    options = {"data": "builtin"}
    tasks = gym.make("atod/ALFWorld-v0", **options).unwrapped.tasks
    (task_id,) = tasks.panel(1)
    learn(provider, "atod/ALFWorld-v0", options, tuple(tasks).index(task_id), "compact")
    vf_eval(
        [
            "atod_verifiers",
            "--env.taskset.environment",
            "atod/ALFWorld-v0",
            "--env.taskset.style",
            "compact",
            "--env.taskset.panel",
            "1",
            "--env.taskset.options.data",
            "builtin",
            "--model",
            "script",
            "--client.base-url",
            f"http://127.0.0.1:{provider.server_address[1]}/v1",
            "--output-dir",
            str(tmp_path),
            "--no-push",
            "--no-rich",
        ]
    )
    (traces,) = tmp_path.glob("*/traces.jsonl")
    episode = json.loads(traces.read_text().splitlines()[0])
    assert task_id in json.dumps(episode) and capsys.readouterr().out
