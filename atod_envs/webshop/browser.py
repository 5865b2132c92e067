"""The pages that people see: what the environment's observation says, as HTML without a script.

The invariant: whatever comes from the catalogue or from a person is text, never markup.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any, cast

from atod_envs.recording import RecordTurns
from atod_envs.tasks import TaskSet
from atod_envs.webshop.env import WebShopEnv
from atod_envs.webshop.pages import Page, Role

CONTENT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
"""What a browser may load and do on these pages."""

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
    """One person's episode.

    Attributes:
        env: the environment.
        info: what it said last.
        over: the episode has ended.
        understood: the last action was one.
        kept: where the visit was recorded, once it is over.
    """

    env: RecordTurns
    info: dict[str, Any]
    over: bool = False
    understood: bool = True
    kept: str = ""

    @property
    def shop_env(self) -> WebShopEnv:
        """The environment itself."""
        return cast(WebShopEnv, self.env.unwrapped)


def start_page(tasks: TaskSet, error: str = "") -> str:
    """Where a visit begins."""
    problem = f"<p class='error'>{html.escape(error)}</p>" if error else ""
    return _frame(
        f"<h1>WebShop</h1><p>Split <b>{html.escape(tasks.split)}</b>: {len(tasks)} tasks, such as "
        f"{html.escape(tasks[0])}.</p>{problem}<form method='post' action='/start'>"
        "<input name='task' id='task' placeholder='task id, or nothing for any'> "
        "<button id='start'>Start</button></form>"
    )


def visit_page(visit: Visit, path: str) -> str:
    """The present page of a visit."""
    env, info = visit.shop_env, visit.info
    session = env.session
    assert session is not None  # a visit begins with a reset
    head = (
        f"<header><b id='task'>{html.escape(info['task'])}</b><br><small>{html.escape(info['task_id'])} · "
        f"turn {info['turn']} of {env.max_turns}</small></header>"
    )
    if visit.over:
        return _frame(head + _result(info, visit.kept))
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


def _result(info: dict[str, Any], kept: str) -> str:
    bought = info.get("webshop/purchase")
    rows = [("stopped by", str(info["stop_reason"])), ("success", "yes" if info["success"] else "no")]
    rows += [(name, str(value)) for name, value in (bought or {}).items()]
    table = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return (
        f"<h2>Reward <span id='reward'>{info['score']:.3f}</span></h2><table>{table}</table><p>{html.escape(kept)}</p>"
        "<form method='get' action='/'><button>Another one</button></form>"
    )


def _frame(body: str) -> str:
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>WebShop</title>"
        f"<style>{_STYLE}</style></head><body>{body}</body></html>"
    )


def error_page(message: str) -> str:
    """Why a request is not carried out."""
    return _frame(f"<p class='error'>{html.escape(message)}</p><p><a href='/'>To the start</a></p>")
