"""The pages that people see: what the environment's observation says, as HTML without a script.

A page's texts are laid out by their roles alone: results as cards, options as chips, the ways through the shop apart
from both, the instruction at the top wherever one scrolls. All of it works by keyboard. The invariant: whatever comes
from the catalogue or from a person is text, never markup, and every action of the page is a button of the observation.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, cast

from atod_envs.recording import RecordTurns
from atod_envs.tasks import TaskSet
from atod_envs.webshop.env import WebShopEnv
from atod_envs.webshop.pages import BACK, BUY, NEXT, PREVIOUS, SEARCH, Node, Role

CONTENT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
"""What a browser may load and do on these pages."""

_STYLE = files(__package__).joinpath("browser.css").read_text(encoding="utf-8")
_WAYS = (BACK, PREVIOUS, NEXT)
_KEYS = {BACK: "s", PREVIOUS: "p", NEXT: "n", BUY: "b"}
_HELP = (
    "Keys: Tab and Enter; with Alt (Firefox: Alt+Shift, Mac: Ctrl+Option): 1 to 9 and 0 open a result, N next, P previous, "
    "S search, B buy."
)


@dataclass(slots=True)
class Visit:
    """One person's episode.

    Attributes:
        env: the environment.
        info: what it said last.
        over: the episode has ended.
        understood: the last action was one.
        last: the last action.
        kept: where the visit was recorded, once it is over.
    """

    env: RecordTurns
    info: dict[str, Any]
    over: bool = False
    understood: bool = True
    last: str = ""
    kept: str = ""

    @property
    def shop_env(self) -> WebShopEnv:
        """The environment itself."""
        return cast(WebShopEnv, self.env.unwrapped)


def start_page(tasks: TaskSet, error: str = "") -> str:
    """Where a visit begins."""
    problem = f"<p class='error' role='alert'>{html.escape(error)}</p>" if error else ""
    return _frame(
        f"<h1>WebShop</h1><p>Split <b>{html.escape(tasks.split)}</b>: {len(tasks)} tasks, such as "
        f"{html.escape(tasks[0])}. You are given an instruction; find and buy what it asks for.</p>{problem}"
        "<form method='post' action='/start' class='row'>"
        "<input name='task' id='task' aria-label='Task' placeholder='task id, or nothing for any' autofocus> "
        "<button id='start'>Start</button></form>"
    )


def error_page(message: str) -> str:
    """Why a request is not carried out."""
    return _frame(f"<p class='error' role='alert'>{html.escape(message)}</p><p><a href='/'>To the start</a></p>")


def visit_page(visit: Visit, path: str) -> str:
    """The present page of a visit.

    Args:
        visit: the visit.
        path: where its forms go.
    """
    env, info = visit.shop_env, visit.info
    session = env.session
    assert session is not None  # a visit begins with a reset
    head = (
        f"<p><b id='task'>{html.escape(info['task'])}</b></p><small>{html.escape(info['task_id'])} · "
        f"turn {info['turn']} of {env.max_turns}</small>"
    )
    if visit.over:
        return _frame(_result(info, visit.kept), head)
    note = "" if visit.understood else "<p class='error' id='note' role='alert'>That was not understood.</p>"
    # The instruction stands in the header already.
    said = {(Role.TEXT, text) for text in (info["task"], "Instruction:", "Instruction: ")}
    nodes = [node for node in session.page.nodes if node not in said]
    body = page_body(nodes, session.options, visit.last)
    return _frame(f"{note}<form method='post' action='{html.escape(path)}'>{body}</form>", head, _HELP)


# --- the parts of a page ------------------------------------------------------------------------------------------


def page_body(nodes: Sequence[Node], options: dict[str, str], last: str) -> str:
    """What stands below the instruction.

    Args:
        nodes: the page's texts, without the instruction.
        options: chosen so far, by the lower-case name.
        last: the last action.
    """
    if (Role.BUTTON, SEARCH) in nodes:
        return (
            "<h1>WebShop</h1><div class='row' role='search'><input name='query' id='query' aria-label='Search the shop' "
            "placeholder='what are you looking for?' autofocus> <button id='search'>Search</button></div>"
        )
    ways = [text for role, text in nodes if role is Role.BUTTON and text in _WAYS]
    rest = [node for node in nodes if node not in {(Role.BUTTON, way) for way in ways}]
    if any(role is Role.PRODUCT for role, _ in nodes) or NEXT in ways:
        return _results(rest, ways)
    return _nav([_button(way) for way in ways]) + _product(rest, options, last)


def _results(nodes: Sequence[Node], ways: Sequence[str]) -> str:
    """A page of results: each is one button, the ways through them stand above and below."""
    cards: list[list[str]] = []
    above: list[str] = []
    for role, text in nodes:
        if role is Role.PRODUCT:
            cards.append([text])
        else:
            (cards[-1] if cards else above).append(text)
    number = f"<p>{html.escape(' '.join(above))}</p>"
    back = _nav([_button(way) for way in ways if way == BACK])
    through = [way for way in ways if way != BACK]
    shown = "".join(f"<li>{_card(card, place)}</li>" for place, card in enumerate(cards))
    empty = "" if cards else "<p class='faint'>Nothing here.</p>"
    pager = _nav([_button(way, keyed=True) for way in through] + [number], "pager")
    below = _nav([_button(way, keyed=False) for way in through], "pager")
    return f"{back}{pager}<ul class='cards'>{shown}</ul>{empty}{below}"


def _card(texts: Sequence[str], place: int) -> str:
    """One result, from its id, title and price."""
    asin, *words = texts
    price = words.pop() if len(words) > 1 else ""
    title = " ".join(words)
    inside = (
        f"{_image(title)}<span class='title'>{html.escape(title)}</span>"
        f"<span class='price'>{html.escape(price)}</span><small>{html.escape(asin)}</small>"
    )
    key = f" accesskey='{(place + 1) % 10}'" if place < 10 else ""
    return f"<button class='product'{key}{' autofocus' if not place else ''} {_action(asin)}>{inside}</button>"


def _product(nodes: Sequence[Node], options: dict[str, str], last: str) -> str:
    """The page of a product, or one of its sub pages: texts, chips, tabs and the purchase."""
    texts = [text for place, (role, text) in enumerate(nodes) if role is Role.TEXT and not _is_legend(nodes, place)]
    buttons = [text for role, text in nodes if role is Role.BUTTON]
    if BUY not in buttons:
        return "".join(f"<p>{html.escape(text)}</p>" for text in texts)
    title, *more = texts or [""]
    about = "".join(
        f"<p{' class=price' if text.startswith('Price: ') else ''}>{html.escape(text)}</p>" for text in more
    )
    chips = "".join(_choices(nodes, options, last))
    tabs = _nav([_button(text) for text in buttons if text != BUY])
    return (
        f"<div class='item'>{_image(title)}<div><h1>{html.escape(title)}</h1>{about}{chips}"
        f"<p>{_button(BUY, 'buy')}</p>{tabs}</div></div>"
    )


def _choices(nodes: Sequence[Node], options: dict[str, str], last: str) -> Iterator[str]:
    """Each option's values as chips, under its name."""
    name, chips = "", list[str]()
    for place, (role, text) in enumerate([*nodes, (Role.TEXT, "")]):
        if role is Role.OPTION:
            chosen = options.get(name.lower()) == text if name else text in options.values()
            mark = f"{' chosen' if chosen else ''}' aria-pressed='{str(chosen).lower()}'"
            # A keyboard user stays where they chose.
            focus = " autofocus" if chosen and last.lower() == f"click[{text}]".lower() else ""
            chips.append(f"<button class='option{mark}{focus} {_action(text)}>{html.escape(text)}</button>")
            continue
        if chips:
            legend = f"<legend>{html.escape(name)}</legend>" if name else ""
            yield f"<fieldset>{legend}<div class='chips'>{''.join(chips)}</div></fieldset>"
        name, chips = text if _is_legend(nodes, place) else "", []


def _is_legend(nodes: Sequence[Node], place: int) -> bool:
    return [role for role, _ in nodes[place : place + 2]] == [Role.TEXT, Role.OPTION]


def _button(text: str, kind: str = "", *, keyed: bool = True) -> str:
    key = f" accesskey='{_KEYS[text]}'" if keyed and text in _KEYS else ""
    kind = "next" if text == NEXT else kind
    return f"<button class='{kind}'{key} {_action(text)}>{html.escape(text)}</button>"


def _action(argument: str) -> str:
    return f'name="action" value="{html.escape(f"click[{argument}]", quote=True)}"'


def _nav(parts: Sequence[str], kind: str = "") -> str:
    return f"<nav class='{kind}'>{''.join(parts)}</nav>" if parts else ""


def _image(title: str) -> str:
    """Where a picture would be: the catalogue has none here."""
    return f"<span class='image' aria-hidden='true'>{html.escape(title.strip()[:1])}</span>"


def _result(info: dict[str, Any], kept: str) -> str:
    bought = info.get("webshop/purchase")
    rows = [("stopped by", str(info["stop_reason"])), ("success", "yes" if info["success"] else "no")]
    rows += [(name, str(value)) for name, value in (bought or {}).items()]
    table = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return (
        f"<h1>Reward <span id='reward'>{info['score']:.3f}</span></h1><table>{table}</table><p>{html.escape(kept)}</p>"
        "<form method='get' action='/'><button autofocus>Another one</button></form>"
    )


def _frame(body: str, head: str = "", foot: str = "") -> str:
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>WebShop</title>"
        f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style></head><body>"
        + (f"<header><div>{head}</div></header>" if head else "")
        + f"<main>{body}</main>"
        + (f"<footer>{foot}</footer>" if foot else "")
        + "</body></html>"
    )
