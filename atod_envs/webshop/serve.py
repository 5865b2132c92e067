"""The shop in a browser, for people.

    python -m atod_envs.webshop.serve --split test --record sessions.jsonl

Every button is an action of the environment, and each finished visit is appended to a file in the trajectory format.
The invariant: a person and an agent play the same environment; nothing here knows a rule of the shop.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs

import gymnasium as gym

import atod_envs
from atod_envs.errors import AtodError
from atod_envs.files import append_line
from atod_envs.http.messages import Refused
from atod_envs.options import needed_imports, program
from atod_envs.recording import RecordTurns
from atod_envs.stopping import stoppable
from atod_envs.trajectory import to_record
from atod_envs.webshop.browser import CONTENT_POLICY, Visit, error_page, start_page, visit_page
from atod_envs.webshop.env import WebShopEnv

with needed_imports("serve", __name__):
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import RedirectResponse, Response
    from starlette.routing import Route

    from atod_envs.http.guard import Access, HttpLimits, make_app
    from atod_envs.http.server import HttpServer, require_free, server_of

MOST_VISITS = 256
"""Visits that are kept; older ones are forgotten."""
LONGEST_REQUEST = 1 << 16
"""Bytes of a form that are read."""
PERSON_TURNS = 100
"""Turn limit of a visit by a person."""


class ShopServer(HttpServer):
    """Serves one environment's tasks.

    Args:
        address: host and port; port 0 takes a free one.
        options: arguments of the environment.
        record: file to which finished visits are appended; ``None`` records nothing.

    Raises:
        AtodError: the address cannot be had, or the environment cannot be made.
    """

    def __init__(self, address: tuple[str, int], options: dict[str, Any], record: Path | None) -> None:
        self.options = {"max_turns": PERSON_TURNS, **options}
        self.record = record
        self.visits: OrderedDict[str, Visit] = OrderedDict()
        atod_envs.register()
        self.tasks = cast(WebShopEnv, self._make().unwrapped).tasks
        # Environments share data in this process, so one thread steps them all; what it makes is sent by another.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="shop")

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            yield
            self._worker.shutdown(wait=False, cancel_futures=True)

        routes = [
            Route("/", self._endpoint(self._start_page), methods=["GET"]),
            Route("/start", self._endpoint(self._begin), methods=["POST"]),
            Route("/visit/{name}", self._endpoint(self._visit_page), methods=["GET"]),
            Route("/visit/{name}", self._endpoint(self._act), methods=["POST"]),
        ]
        limits = HttpLimits(connections=512, body_bytes=LONGEST_REQUEST)
        app = make_app(routes, _refuse, limits, Access(pages=True, open_paths=frozenset()), lifespan)
        super().__init__(server_of(app, limits), *address)

    def _make(self) -> gym.Env[str, str]:
        return cast("gym.Env[str, str]", gym.make("atod/WebShop-v0", **self.options))

    @property
    def url(self) -> str:
        """Where the start page is."""
        return f"{self.origin}/"

    def begin(self, task_id: str) -> str:
        """Begin a visit; an empty task id draws a task. Returns the visit's name."""
        env = RecordTurns(self._make())
        seed = secrets.randbelow(2**31)
        _, info = env.reset(seed=seed, options={"task_id": task_id} if task_id else None)
        name = secrets.token_urlsafe(9)
        self.visits[name] = Visit(env, info)
        while len(self.visits) > MOST_VISITS:
            self.visits.popitem(last=False)[1].env.close()
        return name

    def act(self, visit: Visit, action: str) -> None:
        """Carry out an action of a visit that is not over, and record the visit at its end."""
        if visit.over:
            return
        _, _, terminated, truncated, visit.info = visit.env.step(action)
        visit.understood, visit.last = visit.info["valid"], action
        visit.over = terminated or truncated
        if visit.over and self.record is not None:
            line = json.dumps(to_record(visit.info["trajectory"]))
            try:
                self.record.parent.mkdir(parents=True, exist_ok=True)
                append_line(self.record, line)
                visit.kept = f"Recorded in {self.record}."
            except OSError as error:
                visit.kept = f"Not recorded in {self.record}: {error.strerror}."

    # --- requests ---

    def _endpoint(self, work: Callable[[Request, dict[str, str]], Response]) -> Callable[[Request], Any]:
        """An endpoint that works in the one thread that holds the environments; it gets the form's fields."""

        async def answer(request: Request) -> Response:
            text = (await request.body()).decode("utf-8", "replace")
            try:
                form = parse_qs(text, keep_blank_values=True, max_num_fields=100)
            except ValueError as error:
                raise Refused(400, f"the form cannot be read: {error}") from error
            fields = {name: values[0] for name, values in form.items()}
            return await asyncio.get_running_loop().run_in_executor(self._worker, work, request, fields)

        return answer

    def _start_page(self, request: Request, form: dict[str, str]) -> Response:
        return _html(200, start_page(self.tasks))

    def _begin(self, request: Request, form: dict[str, str]) -> Response:
        try:
            name = self.begin(form.get("task", "").strip())
        except AtodError as error:
            return _html(400, start_page(self.tasks, str(error)))
        return RedirectResponse(f"/visit/{name}", 303)

    def _visit_page(self, request: Request, form: dict[str, str]) -> Response:
        return _html(200, visit_page(self._visit(request), request.url.path))

    def _act(self, request: Request, form: dict[str, str]) -> Response:
        visit = self._visit(request)
        self.act(visit, form["action"] if "action" in form else f"search[{form.get('query', '')}]")
        return RedirectResponse(request.url.path, 303)

    def _visit(self, request: Request) -> Visit:
        visit = self.visits.get(request.path_params["name"])
        if visit is None:
            raise Refused(404, "No such visit: it was long ago, or the server was started anew.")
        return visit


def _html(status: int, page: str) -> Response:
    # Half characters of crawled text cannot be sent.
    headers = {"Content-Security-Policy": CONTENT_POLICY}
    return Response(page.encode("utf-8", "replace"), status, headers, "text/html")


def _refuse(status: int, message: str) -> Response:
    return _html(status, error_page(message))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog=program("atod_envs.webshop.serve"), description="Show the shop in a browser.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=3000, help="port, 0 for any (%(default)s)")
    parser.add_argument("--split", default="test", help="split that is played (%(default)s)")
    parser.add_argument("--goals", default="human", choices=["human", "synthetic"], help="kind of goals (%(default)s)")
    parser.add_argument("--data", default=None, help="catalogue; default $WEBSHOP_DATA, else the built-in one")
    parser.add_argument("--record", type=Path, default=None, help="file to which finished visits are appended (.jsonl)")
    given = parser.parse_args(arguments)
    options = {"split": given.split, "goals": given.goals, "data": given.data}
    try:
        with stoppable():
            require_free(given.host, given.port)
            server = ShopServer((given.host, given.port), options, given.record)
    except (AtodError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with server:
        return server.serve_command(f"WebShop at {server.url} (Ctrl-C stops it)")


if __name__ == "__main__":
    sys.exit(main())
