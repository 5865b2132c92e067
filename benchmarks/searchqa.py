"""Search-QA measured: speed of BM25, environment and server; recall on real data; build and search at scale.

    python benchmarks/searchqa.py                     speed, on the real passages or else the built-in world
    python benchmarks/searchqa.py --recall wiki       recall of every index in a folder, on the real questions
    python benchmarks/searchqa.py --scale 2000000     build and search that many generated passages
    python benchmarks/searchqa.py --vectors 100000    build and search faiss indexes of that many vectors
    python benchmarks/searchqa.py --shards 4          serve the real passages in parts, against one index over all

Real data is taken from --realdata (default: $ATOD_REALDATA, else ../shared/realdata next to the repository). Rows of
one process count CPU time, so that other work on the machine does not count; the server's row counts wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from atod_envs.errors import DataError
from atod_envs.retrieval import BM25Index
from atod_envs.retrieval.analyzer import STOP_WORDS
from atod_envs.retrieval.build import BACKENDS, HYBRID, build_index, open_index, take_part
from atod_envs.retrieval.corpus import Corpus, read_passages
from atod_envs.retrieval.dense import DenseIndex, EncoderSettings
from atod_envs.retrieval.http import HttpSearch
from atod_envs.retrieval.progress import progress
from atod_envs.retrieval.protocol import LocalSearch
from atod_envs.searchqa.builtin import encyclopedia
from atod_envs.searchqa.env import SearchQAEnv
from atod_envs.searchqa.expert import SearchQAExpert
from atod_envs.searchqa.questions import DATASETS, load_questions
from atod_envs.searchqa.scoring import normalise
from atod_envs.searchqa.serve import RetrievalServer

DEPTHS = (1, 3, 10)
"""Depths at which recall is counted."""

WORDS = 400_000
"""Vocabulary of the generated passages; ranks follow Zipf's law."""

DIMENSION = 768
"""Size of a vector of e5-base."""

LENGTH = 100
"""Words of a generated passage, as in wiki-18."""


def main() -> None:
    """Run the part that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    root = Path(__file__).resolve().parents[1]
    default = os.environ.get("ATOD_REALDATA", root.parent / "shared" / "realdata")
    parser.add_argument(
        "--realdata", type=Path, default=Path(default), help="folder of the real passages and questions"
    )
    parser.add_argument("--recall", type=Path, metavar="FOLDER", help="index folder over the real passages")
    parser.add_argument("--scale", type=int, metavar="PASSAGES", help="build and search this many generated passages")
    parser.add_argument("--vectors", type=int, metavar="COUNT", help="size of the faiss indexes")
    parser.add_argument("--shards", type=int, metavar="PARTS", help="servers that the passages are cut into")
    parser.add_argument("--reader", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--queries", type=int, default=2000, help="queries that are timed")
    options = parser.parse_args()
    if options.reader:
        search(options.reader, json.loads((options.reader / "queries.json").read_text()))
    elif options.recall:
        recall(options.recall, options.realdata / "searchqa")
    elif options.scale:
        scale(options.scale, options.queries)
    elif options.vectors:
        dense(options.vectors)
    elif options.shards:
        shards(options.shards, options.realdata / "searchqa", options.queries)
    else:
        speed(options.realdata / "searchqa", options.queries)


def _texts(data: Path, count: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Passages and some questions: the real ones, else those of the built-in world."""
    if (data / "questions.jsonl").is_file():
        passages = list(read_passages(data / "passages.jsonl.gz"))
        queries = [question.text for question in load_questions(data)]
    else:
        passages = list(encyclopedia().passages())
        queries = [question.text for question in encyclopedia().questions]
    return passages, [queries[place] for place in np.random.default_rng(0).permutation(len(queries))[:count]]


def speed(data: Path, count: int) -> None:
    """BM25 by depth, the environment with its expert, and the server with concurrent clients."""
    passages, queries = _texts(data, count)
    started = time.process_time()
    index = BM25Index.build(passages)
    print(f"passages                  {len(passages):>12,}")
    print(f"BM25 build                {time.process_time() - started:>12.1f} s")
    for k in (3, 10, 50):
        index.search_batch(queries, k)
        started = time.process_time()
        index.search_batch(queries, k)
        rate = len(queries) / (time.process_time() - started)
        print(f"BM25, top {k:<2}              {rate:>12,.0f} queries/s, one core")
    print(f"environment + expert      {_environment():>12,.0f} steps/s, one core")
    served = _server(LocalSearch(index, Corpus.build(passages)), queries)
    print(f"server, 32 clients        {served:>12,.0f} queries/s, wall")


def _environment() -> float:
    env, expert = SearchQAEnv("train"), SearchQAExpert()
    steps = 0
    started = time.process_time()
    for task_id in env.tasks.panel(500):
        observation, info = env.reset(options={"task_id": task_id})
        expert.reset(info["task"], observation, info["admissible"])
        over = False
        while not over:
            observation, _, terminated, truncated, info = env.step(expert.act(observation, info["admissible"]).action)
            over = terminated or truncated
            steps += 1
    return steps / (time.process_time() - started)


def _server(service: LocalSearch, queries: Sequence[str]) -> float:
    server = RetrievalServer(service)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    client = HttpSearch(server.url)
    try:
        with ThreadPoolExecutor(32) as pool:
            started = time.perf_counter()
            list(pool.map(lambda query: client.retrieve([query], 3), queries))
            return len(queries) / (time.perf_counter() - started)
    finally:
        client.close()
        server.shutdown()
        server.server_close()
        thread.join()


def shards(parts: int, data: Path, count: int) -> None:
    """BM25 over parts, each in a server behind one more server: agreement with one index, and speed."""
    passages, queries = _texts(data, count)
    whole = LocalSearch(BM25Index.build(passages), Corpus.build(passages))
    exact = whole.retrieve(queries, 10)
    with tempfile.TemporaryDirectory(prefix="searchqa-shards-") as scratch, ExitStack() as running:
        urls = []
        for number in range(1, parts + 1):
            folder = Path(scratch, f"part{number}")
            build_index(take_part(passages, f"{number}/{parts}"), folder, "bm25")
            urls.append(_serve(running, "--index", str(folder)))
        client = HttpSearch(_serve(running, *(text for url in urls for text in ("--shard", url))))
        found = client.retrieve(queries, 10)
        print(f"{len(passages):,} passages in {parts} parts, {len(queries):,} questions")
        for k in DEPTHS:
            pairs = [({p.docid for p in a[:k]}, {p.docid for p in b[:k]}) for a, b in zip(exact, found, strict=True)]
            shared = np.mean([len(a & b) / max(1, len(a)) for a, b in pairs])
            print(f"of the best {k:<2} of one index  {100 * shared:>6.1f} % are found")
        with ThreadPoolExecutor(32) as pool:
            started = time.perf_counter()
            list(pool.map(lambda query: client.retrieve([query], 3), queries))
            print(f"32 clients, top 3        {len(queries) / (time.perf_counter() - started):>10,.0f} queries/s, wall")
        client.close()


def _serve(running: ExitStack, *options: str) -> str:
    """Start a server in a process that ends with the stack; its address."""
    command = [sys.executable, "-m", "atod_envs.searchqa.serve", "--port", "0", *options]
    process = running.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    running.callback(process.terminate)
    assert process.stdout is not None
    return process.stdout.readline().split()[-1]


def recall(folder: Path, data: Path) -> None:
    """Share of questions with a gold answer in the first k passages, by backend and data set.

    Questions answered by yes or no are left out: those words prove nothing. 2,034 of the questions were chosen because
    BM25 finds them, so the numbers compare backends on this sample and say little about their quality in general.
    """
    questions = [question for question in load_questions(data) if not {"yes", "no"} & set(question.answers)]
    golds = [[f" {normalise(answer)} " for answer in question.answers] for question in questions]
    print("| backend | k | " + " | ".join(DATASETS) + " | all | both gold titles |")
    print("|---|---|" + "---|" * (len(DATASETS) + 2))
    for backend in (*BACKENDS, HYBRID):
        try:
            service = open_index(folder / backend)
        except DataError as error:
            print(f"({backend}: {error})", file=sys.stderr)
            continue
        found = service.retrieve([question.text for question in questions], max(DEPTHS))
        texts = [[f" {normalise(passage.contents)} " for passage in row] for row in found]
        titles = [[passage.contents.partition("\n")[0].strip('"') for passage in row] for row in found]
        for k in DEPTHS:
            hit = np.array(
                [
                    any(gold in text for text in row[:k] for gold in gold_list)
                    for row, gold_list in zip(texts, golds, strict=True)
                ]
            )
            cells = [hit[[question.dataset == name for question in questions]].mean() for name in DATASETS]
            gold = [
                set(question.gold_titles) <= set(row[:k])
                for question, row in zip(questions, titles, strict=True)
                if question.gold_titles
            ]
            row = " | ".join(f"{100 * value:.1f}" for value in (*cells, hit.mean(), np.mean(gold)))
            print(f"| {backend} | {k} | {row} |", flush=True)


def scale(count: int, queries: int) -> None:
    """Build an index of generated passages on disk, then open and search it as another process would."""
    with tempfile.TemporaryDirectory(prefix="searchqa-scale-") as scratch:
        folder = Path(scratch)
        started, cpu = time.perf_counter(), time.process_time()
        Corpus.write(progress(generated(count), "corpus: passages", count), folder / "corpus")
        wrote = time.perf_counter() - started
        corpus = Corpus.open(folder / "corpus")
        started, cpu = time.perf_counter(), time.process_time()
        BM25Index.build(progress(corpus, "bm25: passages", count), directory=folder / "bm25")
        print(f"passages                  {count:>14,} of {LENGTH} words")
        print(f"corpus written            {wrote:>14,.0f} s wall (generation included)")
        used, waited = time.process_time() - cpu, time.perf_counter() - started
        print(f"BM25 build                {used:>14,.0f} s CPU, {waited:,.0f} s wall")
        print(f"peak memory of the build  {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:>14.2f} GiB")
        for name in ("corpus", "bm25"):
            size = sum(path.stat().st_size for path in (folder / name).iterdir())
            print(f"{name + ' on disk':<25} {size / 2**30:>14.2f} GiB, {size / count:,.0f} bytes a passage")
        sizes = {path.stem: path.stat().st_size for path in (folder / "bm25").glob("*.npy")}
        print(f"postings                  {sizes['docs'] // 4:>14,}, {sizes['docs'] / 4 / count:.1f} a passage")
        print(f"terms                     {sizes['bounds'] // 4:>14,}")
        asked = list(questions_over(corpus, queries))
        (folder / "queries.json").write_text(json.dumps(asked))
        # A process of its own, so that its memory is that of a reader and not what the build has left.
        subprocess.run([sys.executable, __file__, "--reader", str(folder)], check=True)
        shutil.rmtree(folder / "bm25")


def search(folder: Path, queries: Sequence[str]) -> None:
    """Time single queries in a process that maps the index."""
    service = open_index(folder)
    for k in (3, 10):
        for query in queries[:50]:
            service.retrieve([query], k)
        seconds = []
        cpu = time.process_time()
        for query in queries:
            started = time.perf_counter()
            service.retrieve([query], k)
            seconds.append(time.perf_counter() - started)
        used = time.process_time() - cpu
        p50, p95 = np.percentile(seconds, [50, 95]) * 1000
        print(f"top {k:<2}  {len(queries) / used:>6,.0f} queries/s of CPU; wall p50 {p50:.1f} ms, p95 {p95:.1f} ms")
    memory = {
        line.split()[0]: int(line.split()[1]) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    }
    # Not the private pages: those of a mapped file count as private as long as no other process maps them.
    own = memory["Anonymous:"] / 1024
    print(f"memory of the reader      resident {memory['Rss:'] / 1024:,.0f} MiB, of it its own {own:,.0f} MiB")


class _Random:
    """Unit vectors that depend on the text alone, clustered as those of real texts are."""

    settings = EncoderSettings("random")

    def __init__(self) -> None:
        self._centres = np.random.default_rng(3).standard_normal((500, DIMENSION), dtype=np.float32)

    def encode(self, texts: Sequence[str], *, is_query: bool) -> npt.NDArray[np.float32]:
        """One vector of the size of e5-base for each text."""
        vectors = np.empty((len(texts), DIMENSION), dtype=np.float32)
        for place, text in enumerate(texts):
            rng = np.random.default_rng(int(text))
            vectors[place] = self._centres[int(text) % 500] + rng.standard_normal(DIMENSION, dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def dense(count: int) -> None:
    """Size, build time and single-query time of faiss indexes, with recall against the exact one."""
    queries = [str(10**9 + number) for number in range(200)]
    exact: list[set[str]] = []
    print("| kind | bytes a vector | build, s CPU | ms a query, CPU | of the exact top 10 |")
    print("|---|---|---|---|---|")
    for kind in ("flat", "ivfsq8", "ivfpq"):
        with tempfile.TemporaryDirectory(prefix="searchqa-dense-") as scratch:
            started = time.process_time()
            index = DenseIndex.build(((str(n), str(n)) for n in range(count)), scratch, _Random(), kind=kind)
            built = time.process_time() - started
            size = (Path(scratch) / "dense.faiss").stat().st_size / count
            started = time.process_time()
            found = [{hit.docid for hit in index.search(query, 10)} for query in queries]
            each = (time.process_time() - started) / len(queries) * 1000
            exact = exact or found
            share = np.mean([len(one & other) / 10 for one, other in zip(exact, found, strict=True)])
            print(f"| {kind} | {size:,.0f} | {built:.0f} | {each:.2f} | {100 * share:.0f} % |", flush=True)


def generated(count: int) -> Iterator[tuple[str, str]]:
    """Passages of Zipf-distributed made-up words, the commonest being English stop words, titled by two rare words."""
    rng = np.random.default_rng(7)
    stops = sorted(STOP_WORDS)
    words = np.array(stops + [_word(number) for number in range(WORDS - len(stops))], dtype=object)
    chances = np.cumsum(1.0 / (np.arange(WORDS) + 2.7) ** 1.05)
    chances /= chances[-1]
    for start in range(0, count, 10_000):
        size = min(10_000, count - start)
        drawn = words[np.searchsorted(chances, rng.random((size, LENGTH))).clip(max=WORDS - 1)]
        titles = words[rng.integers(WORDS // 100, WORDS, (size, 2))]
        for place in range(size):
            yield str(start + place), f'"{" ".join(titles[place])}"\n{" ".join(drawn[place])}'


def _word(number: int) -> str:
    """A pronounceable word for a number; different numbers give different words."""
    onsets, vowels = "bdfgklmnprstvz", "aeiou"
    word = ""
    number += 70
    while number:
        number, rest = divmod(number, 70)
        word = onsets[rest // 5] + vowels[rest % 5] + word
    return word


def questions_over(corpus: Corpus, count: int) -> Iterator[str]:
    """Queries of six to eight words: a title, and words of its passage, common ones among them."""
    rng = np.random.default_rng(11)
    for number in rng.integers(0, len(corpus), count):
        title, _, text = corpus[str(number)].partition("\n")
        yield " ".join([title.strip('"'), *rng.choice(text.split(), size=int(rng.integers(4, 7)))])


if __name__ == "__main__":
    main()
