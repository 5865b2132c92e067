"""OpenEnv's own server and client play the environments."""

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import time

import gymnasium as gym
import pytest
import tiny

pytest.importorskip(
    "openenv.core", reason="openenv-core is not installed (extra 'openenv'; not together with verifiers)"
)
import uvicorn
from openenv.core import GenericEnvClient
from websockets.exceptions import ConnectionClosed

from atod_envs.errors import DataError
from atod_envs.integrations import wrap
from atod_envs.integrations.openenv import TextAction, TextEnvClient, make_app

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def serving(app):
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="websockets-sansio"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)


def test_client_and_server_play_the_experts_episode(env_id, options):
    episode = tiny.expert_trajectory(env_id, options, seed=2)
    with serving(make_app(env_id, **options)) as url, TextEnvClient(base_url=url).sync() as client:
        result = client.reset(seed=2, task_id=episode.task_id, episode_id="mine")
        assert result.observation.text == episode.turns[0].observation and not result.done
        for number, turn in enumerate(episode.turns, 1):
            assert tuple(result.observation.admissible) == turn.admissible
            result = client.step(TextAction(text=turn.action))
            assert result.reward == turn.reward and result.observation.turn == number
        assert result.done and result.observation.success and result.observation.stop_reason == "success"
        assert result.observation.text == episode.final_observation
        state = client.state()
        assert state.step_count == len(episode.turns) and state.success and state.task_id == episode.task_id
        assert state.episode_id == "mine"


def test_a_client_is_wrapped_as_an_environment_of_ours():
    """Any OpenEnv client becomes one. This one's server plays ALFWorld, so what must come out is known."""
    own = {"data": "builtin", "split": "train"}
    direct = gym.make("atod/ALFWorld-v0", **own)
    _, info = direct.reset(seed=5)
    tasks = list(direct.unwrapped.tasks)
    episode = tiny.expert_trajectory("atod/ALFWorld-v0", own, task=tasks.index(info["task_id"]), seed=5)
    with serving(make_app("atod/ALFWorld-v0", **own)) as url, TextEnvClient(base_url=url).sync() as client:
        env = wrap(client, key="house", actions=lambda text: TextAction(text=text), text=lambda seen: seen.text)
        seen, _ = env.reset(seed=0, options={"task_id": "train-5"})
        for turn in episode.turns:
            assert seen == turn.observation
            seen, reward, terminated, truncated, info = env.step(turn.action)
        assert seen == episode.final_observation and terminated and not truncated
        assert info["success"] and reward == info["score"] == 1.0


def test_prompts_are_served_and_plain_dictionaries_work():
    episode = tiny.expert_trajectory("atod/ALFWorld-v0", {"data": "builtin"}, style="compact")
    with (
        serving(make_app("atod/ALFWorld-v0", style="compact", data="builtin")) as url,
        GenericEnvClient(base_url=url).sync() as client,
    ):
        result = client.reset(seed=0, task_id=episode.task_id)
        for turn in episode.turns:
            result = client.step({"text": turn.response})
        assert result.done and result.reward == 1.0 and result.observation["success"]


def test_sessions_do_not_share_episodes_and_are_limited():
    async def play(url):
        async with TextEnvClient(base_url=url) as one, TextEnvClient(base_url=url) as two:
            a, b = await asyncio.gather(one.reset(seed=1), two.reset(seed=2))
            await one.step("look")
            state_one, state_two = await asyncio.gather(one.state(), two.state())
            assert (state_one.step_count, state_two.step_count) == (1, 0)
            assert a.observation.task_id != b.observation.task_id
            with pytest.raises((RuntimeError, ConnectionClosed)):  # OpenEnv closes it, or says why before
                async with TextEnvClient(base_url=url) as three:
                    await three.reset(seed=3)
            with pytest.raises(RuntimeError, match="unknown task id"):
                await two.reset(task_id="../../etc/passwd")

    with serving(make_app("atod/ALFWorld-v0", sessions=2, data="builtin")) as url:
        asyncio.run(play(url))


def test_broken_data_is_said_before_the_first_client(tmp_path):
    with pytest.raises(DataError):
        make_app("atod/ALFWorld-v0", data=str(tmp_path))


def test_the_command_of_the_docs_serves():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "--factory",
        "atod_envs.integrations.openenv:webshop",
        "--port",
        str(port),
    ]
    process = subprocess.Popen([*command, "--log-level", "error"])
    try:
        deadline = time.monotonic() + 200  # a busy machine takes its time to import FastAPI
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        with TextEnvClient(base_url=f"http://127.0.0.1:{port}").sync() as client:
            assert "WebShop" in client.reset(seed=0).observation.text
    finally:
        process.terminate()
        process.wait(60)
