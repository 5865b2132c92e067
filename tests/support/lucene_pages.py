"""Plays the same searches with our index and with Lucene itself, and prints how many pages differ."""

import random
import sys

from atod_envs.webshop.env import WebShopEnv


def main(data: str) -> None:
    """Search for every word that occurs in the first instructions, alone and together."""
    ours, theirs = (WebShopEnv("train", data=data, search=search, max_turns=10_000) for search in ("bm25", "lucene"))
    rng = random.Random(0)
    words = [word for task in ours.tasks[:200] for word in ours.reset(options={"task_id": task})[1]["task"].split()]
    for env in (ours, theirs):
        env.reset(seed=0)
    different = 0
    for _ in range(60):
        query = f"search[{' '.join(rng.choices(words, k=rng.randint(1, 12)))}]"
        different += ours.step(query)[0] != theirs.step(query)[0]
    print(f"{different} of 60 pages differ")


if __name__ == "__main__":
    main(sys.argv[1])
