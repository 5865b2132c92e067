"""The shop in a browser, for people.

    python -m atod_envs.webshop.serve --split test --record sessions.jsonl

The pages show what the environment's observation says, every button is an action of the environment, and each finished
visit is appended to a file in the trajectory format. The invariant: a person and an agent play the same environment;
nothing here knows a rule of the shop.
"""

from __future__ import annotations

import argparse
import html
import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import gymnasium as gym

import atod_envs
from atod_envs.errors import AtodError
from atod_envs.options import program
from atod_envs.recording import RecordTurns
from atod_envs.trajectory import to_record
from atod_envs.webshop.env import WebShopEnv
from atod_envs.webshop.pages import Page, Role

MOST_VISITS = 256
"""Visits that are kept; older ones are forgotten."""
LONGEST_REQUEST = 1 << 16
"""Bytes of a form that are read."""
PERSON_TURNS = 100
"""Turn limit of a visit by a person."""

_STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; color: #222; }
header { background: #f3f6fa; border-radius: .5rem; padding: .6rem 1rem; margin-bottom: 1rem; }
button { font: inherit; border: 1px solid #8aa; border-radius: .4rem; background: #fff; padding: .25rem .7rem; }
button:hover { background: #eef4ff; } button.product { font-weight: bold; } button.chosen { background: #cde3c8; }
button.buy { background: #f6c945; } p { margin: .3rem 0; } .error { color: #a00; }
td, th { text-align: left; padding: .1rem .8rem .1rem 0; } input { font: inherit; padding: .3rem; width: 28rem; }
"""


@dataclass(slots=True)
class Visit:
    """One person's episode."""

    env: RecordTurns
    info: dict[str, Any]
    over: bool = False
    understood: bool = True

    @property
    def shop_env(self) -> WebShopEnv:
        """The environment itself."""
        return cast(WebShopEnv, self.env.unwrapped)


class ShopServer(ThreadingHTTPServer):
    """Serves one environment's tasks.

    Args:
        address: host and port; port 0 takes a free one.
        options: arguments of the environment.
        record: file to which finished visits are appended; ``None`` records nothing.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], options: dict[str, Any], record: Path | None) -> None:
        self.options = {"max_turns": PERSON_TURNS, **options}
        self.record = record
        self.lock = threading.Lock()
        self.visits: OrderedDict[str, Visit] = OrderedDict()
        atod_envs.register()
        self.tasks = cast(WebShopEnv, self._make().unwrapped).tasks
        super().__init__(address, _Handler)

    def _make(self) -> gym.Env[str, str]:
        return cast("gym.Env[str, str]", gym.make("atod/WebShop-v0", **self.options))

    @property
    def url(self) -> str:
        """Where the start page is."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/"

    def begin(self, task_id: str) -> str:
        """Begin a visit; an empty task id draws a task. Returns the visit's name."""
        env = RecordTurns(self._make())
        seed = secrets.randbelow(2**31)
        _, info = env.reset(seed=seed, options={"task_id": task_id} if task_id else None)
        name = secrets.token_urlsafe(9)
        self.visits[name] = Visit(env, info)
        while len(self.visits) > MOST_VISITS:
            self.visits.popitem(last=False)
        return name

    def act(self, visit: Visit, action: str) -> None:
        """Carry out an action of a visit that is not over, and record the visit at its end."""
        if visit.over:
            return
        _, _, terminated, truncated, visit.info = visit.env.step(action)
        visit.understood = visit.info["valid"]
        visit.over = terminated or truncated
        if visit.over and self.record is not None:
            self.record.parent.mkdir(parents=True, exist_ok=True)
            with open(self.record, "a", encoding="utf-8") as out:
                out.write(json.dumps(to_record(visit.info["trajectory"])) + "\n")


class _Handler(BaseHTTPRequestHandler):
    server: ShopServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        with self.server.lock:
            if path == "/":
                self._send(start_page(self.server))
            elif (visit := self._visit(path)) is not None:
                self._send(visit_page(visit, path, self.server.record))
            else:
                self._send(_frame("<p class='error'>No such page.</p>"), HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        if not 0 <= size <= LONGEST_REQUEST:
            self.close_connection = True
            # A browser that is still sending does not read the answer.
            self.rfile.read(max(0, min(size, 16 * LONGEST_REQUEST)))
            self._send(_frame("<p class='error'>Too much text.</p>"), HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        form = parse_qs(self.rfile.read(size).decode("utf-8", "replace"), keep_blank_values=True)
        path = urlsplit(self.path).path
        with self.server.lock:
            if path == "/start":
                try:
                    self._redirect("/visit/" + self.server.begin(form.get("task", [""])[0].strip()))
                except AtodError as error:
                    self._send(start_page(self.server, str(error)), HTTPStatus.BAD_REQUEST)
            elif (visit := self._visit(path)) is not None:
                action = form["action"][0] if "action" in form else f"search[{form.get('query', [''])[0]}]"
                self.server.act(visit, action)
                self._redirect(path)
            else:
                self._send(_frame("<p class='error'>No such page.</p>"), HTTPStatus.NOT_FOUND)

    def _visit(self, path: str) -> Visit | None:
        return self.server.visits.get(path.removeprefix("/visit/")) if path.startswith("/visit/") else None

    def _send(self, page: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        # Half characters of crawled text cannot be sent.
        body = page.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'")
        self.end_headers()
        self.wfile.write(body)

    def _redirect(self, path: str) -> None:
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the terminal quiet."""


# --- pages ---------------------------------------------------------------------------------------------------------


def start_page(server: ShopServer, error: str = "") -> str:
    """Where a visit begins."""
    tasks = server.tasks
    problem = f"<p class='error'>{html.escape(error)}</p>" if error else ""
    return _frame(
        f"<h1>WebShop</h1><p>Split <b>{html.escape(tasks.split)}</b>: {len(tasks)} tasks, such as "
        f"{html.escape(tasks[0])}.</p>{problem}<form method='post' action='/start'>"
        "<input name='task' id='task' placeholder='task id, or nothing for any'> "
        "<button id='start'>Start</button></form>"
    )


def visit_page(visit: Visit, path: str, record: Path | None) -> str:
    """The present page of a visit."""
    env, info = visit.shop_env, visit.info
    session = env.session
    assert session is not None  # a visit begins with a reset
    head = (
        f"<header><b id='task'>{html.escape(info['task'])}</b><br><small>{html.escape(info['task_id'])} · "
        f"turn {info['turn']} of {env.max_turns}</small></header>"
    )
    if visit.over:
        return _frame(head + _result(info, record))
    note = "" if visit.understood else "<p class='error' id='note'>That was not understood.</p>"
    body = _nodes(session.page, info["task"], set(session.options.values()))
    return _frame(f"{head}{note}<form method='post' action='{path}'>{body}</form>")


def _nodes(page: Page, task: str, chosen: set[str]) -> str:
    parts = []
    for role, text in page.nodes:
        shown = html.escape(text)
        if role is Role.TEXT:
            # The instruction stands in the header already.
            parts.append("" if text in (task, "Instruction:", "Instruction: ") else f"<p>{shown}</p>")
        elif text == "Search":
            parts.append("<p><input name='query' id='query' autofocus> <button id='search'>Search</button></p>")
        else:
            kind = {Role.PRODUCT: "product", Role.OPTION: "option"}.get(role, "buy" if text == "Buy Now" else "")
            mark = " chosen" if role is Role.OPTION and text in chosen else ""
            value = html.escape(f"click[{text}]", quote=True)
            parts.append(f"<button class='{kind}{mark}' name='action' value=\"{value}\">{shown}</button>")
    return "\n".join(parts)


def _result(info: dict[str, Any], record: Path | None) -> str:
    bought = info.get("webshop/purchase")
    rows = [("stopped by", str(info["stop_reason"])), ("success", "yes" if info["success"] else "no")]
    rows += [(name, str(value)) for name, value in (bought or {}).items()]
    table = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    kept = f"<p>Recorded in {html.escape(str(record))}.</p>" if record is not None else ""
    return (
        f"<h2>Reward <span id='reward'>{info['score']:.3f}</span></h2><table>{table}</table>{kept}"
        "<form method='get' action='/'><button>Another one</button></form>"
    )


def _frame(body: str) -> str:
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>WebShop</title>"
        f"<style>{_STYLE}</style></head><body>{body}</body></html>"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m atod_envs.webshop.serve``."""
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
        server = ShopServer((given.host, given.port), options, given.record)
    except (AtodError, OSError) as error:
        parser.exit(1, f"{error}\n")
    print(f"WebShop at {server.url} (Ctrl-C stops it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
