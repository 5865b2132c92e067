"""A retriever that dies, and Search-QA whose clients soon give it up.

As a program it serves the built-in passages at a port, and dies at the first query after a path has come to exist.
Imported by a worker (an environment's id may name a module), it makes the worker's clients try three times in a moment,
where they would try six times in a quarter of a minute.
"""

import os
import sys
from pathlib import Path

from atod_envs.retrieval.http import HttpSearch

if "IMPATIENT" in os.environ:
    HttpSearch.__init__.__kwdefaults__.update(retries=2, backoff=0.05)


class Mortal:
    """A search service that ends its process."""

    def __init__(self, service, last):
        self.service, self.last = service, last

    def retrieve(self, queries, k):
        if self.last is not None and self.last.exists():
            os._exit(9)
        return self.service.retrieve(queries, k)


if __name__ == "__main__":
    from atod_envs.searchqa.serve import RetrievalServer
    from atod_envs.searchqa.sources import load_service

    last = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    server = RetrievalServer(Mortal(load_service("builtin", "bm25", None), last), port=int(sys.argv[1]))
    print(server.url.removesuffix("/retrieve"), flush=True)
    server.serve_forever()
