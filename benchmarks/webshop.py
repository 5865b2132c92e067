"""WebShop's speed, memory and scale, measured.

    python benchmarks/webshop.py                      # the built-in catalogue
    python benchmarks/webshop.py --data DIR           # official files
    python benchmarks/webshop.py --large 1180000      # generate, build and search a catalogue of that size

Speeds are CPU seconds of one core, times of searches also wall time. Memory is read from the kernel: PSS shares a page
among the processes that map it, so the sum over processes is what they take together.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from atod_envs.webshop.catalogue.build import build_store
from atod_envs.webshop.catalogue.files import find_files
from atod_envs.webshop.env import WebShopEnv
from atod_envs.webshop.expert import WebShopExpert
from atod_envs.webshop.generate import CatalogueSpec, write_catalogue

MIB = 1024
ENVIRONMENTS = 256
WORKERS = 8
Episode = tuple[str, list[str]]


def memory() -> dict[str, float]:
    """PSS and private memory of this process in MiB."""
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        found[name.rstrip(":")] = int(value) / MIB
    return {"pss": found["Pss"], "private": found["Private_Clean"] + found["Private_Dirty"]}


def record_episodes(env: WebShopEnv, count: int) -> list[Episode]:
    """What the scripted shopper does on a fixed panel, with some idle clicks, to be replayed without it."""
    rng, episodes = random.Random(0), []
    for task in env.tasks.panel(min(count, len(env.tasks))):
        observation, info = env.reset(options={"task_id": task})
        expert, actions, over = WebShopExpert(), [], False
        expert.reset(info["task"], observation, info["admissible"])
        while not over:
            action = expert.act(observation, info["admissible"]).action
            if rng.random() < 0.2:
                action = rng.choice([name for name in info["admissible"] if "<" not in name] or [action])
            observation, _, terminated, truncated, info = env.step(action)
            expert.observe(action, observation, info["admissible"])
            actions.append(action)
            over = terminated or truncated
        episodes.append((task, actions))
    return episodes


def replay(env: WebShopEnv, episodes: Sequence[Episode]) -> int:
    """Play recorded episodes; returns the number of steps."""
    steps = 0
    for task, actions in episodes:
        env.reset(options={"task_id": task})
        for action in actions:
            env.step(action)
            steps += 1
    return steps


def measure_speed(data: str | None) -> None:
    """Steps a second on one core."""
    env = WebShopEnv("train", data=data)
    episodes = record_episodes(env, 200)
    for mode in ("text", "text_rich"):
        env = WebShopEnv("train", data=data, observation_mode=mode)
        replay(env, episodes)
        for name, forget in (("searches remembered", False), ("every search done anew", True)):
            steps, started = 0, time.process_time()
            for _ in range(5):
                if forget:
                    env.shop.ranking.cache_clear()  # type: ignore[attr-defined]
                steps += replay(env, episodes)
            seconds = time.process_time() - started
            report(f"steps/s, {mode}, {name}", steps / seconds, 0)
    queries = [actions[0][len("search[") : -1] for _, actions in episodes if actions[0].startswith("search[")]
    started = time.process_time()
    for query in queries:
        env.shop.engine.search(query, 50)
    report("searches/s (instruction as query, top 50)", len(queries) / (time.process_time() - started), 0)


def in_child(target: Callable[..., Any], *arguments: Any) -> tuple[Any, Connection, Any]:
    """Start a fresh process that reports once and then waits, so that several can be measured side by side."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_report_and_wait, args=(theirs, target, arguments), daemon=True)
    process.start()
    return ours.recv(), ours, process


def _report_and_wait(pipe: Connection, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # What was opened stays alive until the end, or its memory would be gone before it is read.
    answer, kept = target(*arguments)
    pipe.send(answer)
    while pipe.recv() == "memory":
        pipe.send(memory())
    del kept


def _ask_memory(pipe: Connection) -> dict[str, float]:
    pipe.send("memory")
    answer: dict[str, float] = pipe.recv()
    return answer


def open_environments(data: str | None, count: int) -> tuple[dict[str, float], list[WebShopEnv]]:
    """Open environments and play a few turns in each; returns memory and the environments."""
    environments = [WebShopEnv("train", data=data) for _ in range(count)]
    for seed, env in enumerate(environments):
        _, info = env.reset(seed=seed)
        for action in (f"search[{info['task']}]", "click[next >]", "click[< prev]"):
            _, _, _, _, info = env.step(action)
        env.step(next((name for name in info["admissible"][2:]), "click[next >]"))
    return memory(), environments


def measure_memory(data: str | None) -> None:
    """256 environments, in one process and over eight."""
    answer, pipe, process = in_child(open_environments, data, ENVIRONMENTS)
    report(f"MiB (PSS), {ENVIRONMENTS} environments in one process", answer["pss"], 0)
    pipe.send("stop")
    process.join()
    children = [in_child(open_environments, data, ENVIRONMENTS // WORKERS) for _ in range(WORKERS)]
    report(
        f"MiB (PSS), {ENVIRONMENTS} environments over {WORKERS} processes, together",
        sum(_ask_memory(pipe)["pss"] for _, pipe, _ in children),
        0,
    )
    for _, pipe, process in children:
        pipe.send("stop")
        process.join()


def search_large(store: str, queries: int) -> tuple[dict[str, Any], WebShopEnv]:
    """Open a store and search it with the instructions of its own tasks."""
    started = time.perf_counter()
    env = WebShopEnv("test", data=store)
    opened = time.perf_counter() - started
    wall, cpu = [], []
    for seed in range(queries):
        _, info = env.reset(seed=seed)
        words = info["task"].partition(", and price")[0].removeprefix("Find me ")
        before = time.perf_counter(), time.process_time()
        env.step(f"search[{words}]")
        wall.append(time.perf_counter() - before[0])
        cpu.append(time.process_time() - before[1])
    return {"open": opened, "wall": sorted(wall), "cpu": sorted(cpu), **memory()}, env


def measure_large(products: int, folder: Path, queries: int) -> None:
    """Generate, build, open twice, search."""
    started = time.perf_counter()
    # A tenth of the products with instructions gives as many goals a product as the official full catalogue has.
    write_catalogue(CatalogueSpec(products, instructed=min(1.0, 120_000 / products)), folder)
    report(f"s, writing {products} products", time.perf_counter() - started, 1)
    report("MB of official files", sum(p.stat().st_size for p in folder.glob("*.json")) / 1e6, 0)
    started = time.perf_counter()
    build_store(find_files(folder), folder / "store")
    report("s, building the store", time.perf_counter() - started, 1)
    report("MiB, peak of this process while building", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB, 0)
    report(
        "MB of store and index", sum(p.stat().st_size for p in (folder / "store").rglob("*") if p.is_file()) / 1e6, 0
    )
    store = str(folder / "store")
    search_large(store, 5)  # makes the tables of goals, once
    first, first_pipe, first_process = in_child(search_large, store, queries)
    alone = _ask_memory(first_pipe)["pss"]
    second, second_pipe, second_process = in_child(search_large, store, queries)
    together = _ask_memory(first_pipe)["pss"] + _ask_memory(second_pipe)["pss"]
    report("MiB (PSS), first process after its searches", alone, 0)
    report("MiB more for a second process after the same", together - alone, 0)
    report("s, opening in the second process", second["open"], 2)
    for kind in ("wall", "cpu"):
        for share in (0.5, 0.95, 0.99):
            report(f"ms a search and its page, {kind}, {share:.0%}", 1000 * second[kind][int(share * queries)], 1)
    del first
    for pipe, process in ((first_pipe, first_process), (second_pipe, second_process)):
        pipe.send("stop")
        process.join()


RESULTS: dict[str, float] = {}


def report(name: str, value: float, digits: int) -> None:
    """Print a measurement and keep it."""
    RESULTS[name] = value
    print(f"{value:>14,.{digits}f}  {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None, help="official files; default: the built-in catalogue")
    parser.add_argument("--large", type=int, default=0, metavar="PRODUCTS", help="also measure a generated catalogue")
    parser.add_argument("--queries", type=int, default=300, help="searches in the large catalogue (%(default)s)")
    parser.add_argument("--scratch", default=None, help="folder for the large catalogue; it is emptied afterwards")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers to this file")
    given = parser.parse_args()
    measure_speed(given.data)
    measure_memory(given.data)
    if given.large:
        with tempfile.TemporaryDirectory(dir=given.scratch, prefix="webshop-") as folder:
            measure_large(given.large, Path(folder), given.queries)
    if given.json is not None:
        given.json.write_text(json.dumps(RESULTS, indent=1) + "\n")


if __name__ == "__main__":
    main()
