"""Throughput of a server of environments: many clients at once, each in its own session.

    python benchmarks/serve.py --clients 64 --seconds 5

The server runs in a process of its own, the clients in four. Printed: steps a second over all clients, and how long a
step takes a client, and how much time of a core the server spends on it, which other work on the machine does not
change. A local environment without a server is measured for comparison.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium as gym
import numpy as np

import atod_envs
from atod_envs.serve.client import RemoteEnv

PROCESSES = 4


def play(env: gym.Env, until: float, times: list[float]) -> None:
    """Take the first admissible actions in turn until the time is over."""
    _, info = env.reset(seed=0)
    seed = 0
    while time.monotonic() < until:
        action = info["admissible"][info["turn"] % len(info["admissible"])]
        started = time.perf_counter()
        *_, terminated, truncated, info = env.step(action)
        times.append(time.perf_counter() - started)
        if terminated or truncated:
            seed += 1
            _, info = env.reset(seed=seed)


def clients(url: str, env_id: str, number: int, until: float) -> None:
    """Clients in threads of this process; prints their times."""
    times: list[list[float]] = [[] for _ in range(number)]
    envs = [RemoteEnv(url, env_id) for _ in range(number)]
    threads = [threading.Thread(target=play, args=(env, until, kept)) for env, kept in zip(envs, times, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for env in envs:
        env.close()
    np.array([t for kept in times for t in kept]).astype("<f8").tofile(sys.stdout.buffer)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        url, env_id, number, until = given.child
        clients(url, env_id, int(number), float(until))
        return
    command = [sys.executable, "-m", "atod_envs.serve", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        print(f"{given.clients} clients in {PROCESSES} processes, {os.cpu_count()} cores")
        print(f"{'environment':20s} {'way':6s} {'steps/s':>9s} {'ms, median':>11s} {'ms, 95 %':>9s} {'core ms':>8s}")
        for env_id in atod_envs.ENVIRONMENTS:
            alone: list[float] = []
            play(gym.make(env_id), time.monotonic() + given.seconds / 5, alone)
            report(env_id, "local", np.array(alone), given.seconds / 5, 0.0)
            for kind in ("http", "ws"):
                before = core_seconds(server.pid)
                until = str(time.monotonic() + 3.0 + given.seconds)
                share = [str(given.clients // PROCESSES)] * PROCESSES
                children = [
                    subprocess.Popen(
                        [sys.executable, __file__, "--child", url.replace("http", kind), env_id, number, until],
                        stdout=subprocess.PIPE,
                    )
                    for number in share
                ]
                data = b"".join(child.communicate()[0] for child in children)
                report(env_id, kind, np.frombuffer(data, "<f8"), given.seconds, core_seconds(server.pid) - before)
    finally:
        server.terminate()


def core_seconds(process: int) -> float:
    """Seconds that a process has spent on a core (Linux; 0 elsewhere)."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def report(env_id: str, way: str, times: np.ndarray, seconds: float, spent: float) -> None:
    """One line."""
    median, high = np.percentile(times, [50, 95]) * 1e3
    print(
        f"{env_id:20s} {way:6s} {len(times) / seconds:9.0f} {median:11.3f} {high:9.3f} {spent / len(times) * 1e3:8.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
