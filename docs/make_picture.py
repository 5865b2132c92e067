"""Draw the README's picture from a run's report page: ``python docs/make_picture.py runs/atod-ALFWorld-v0-seed0``.

It shows three neighbouring turns of one training episode as the page does: tokens coloured by the teacher's gap, d, h
and the bar of w. Chosen is the solved episode, and the turns in it, that show most of both.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
from html import escape
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "images" / "turns.svg"
WIDTH, CHARACTER, LINE = 960, 7.3, 20
COLUMNS = 122


def page_data(run: Path) -> dict[str, Any]:
    """What the report page of a run holds."""
    found = re.search(r'id="data">([^<]*)<', (run / "report.html").read_text(encoding="utf-8"))
    if found is None:
        raise SystemExit(f"{run}/report.html holds no data; write it anew: python -m atod_algos.report {run}")
    data: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(found[1])))
    return data


def interest(turns: list[dict[str, Any]]) -> float:
    """How much turns show: gaps of the teacher (cut at 2 nats, as their colour is) and the spread of the weights."""
    gaps = sum(min(2.0, abs(teacher - student)) for t in turns for _, student, teacher in t["x"] if teacher is not None)
    weights = [t["w"] for t in turns]
    return gaps + 2 * (max(weights) - min(weights))


def chosen(data: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """An episode, and the first of its three turns."""
    offered = [
        (interest(episode["turns"][first : first + 3]), number, first)
        for number, episode in enumerate(data["episodes"])
        if episode["ok"] and episode["k"] != "valid"
        for first in range(len(episode["turns"]) - 2)
        if all(t.get("w") is not None and t["x"] for t in episode["turns"][first : first + 3])
    ]
    if not offered:
        raise SystemExit("the page shows no solved training episode with weights and three turns")
    _, number, first = max(offered)
    return data["episodes"][number], first


def text(x: float, y: float, words: str, look: str) -> str:
    """One line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{look}" xml:space="preserve">{escape(words)}</text>'


def token(x: float, y: float, words: str, gap: float) -> list[str]:
    """One token over its colour: blue and underlined where the teacher finds it more likely, else orange and dotted."""
    wide, strength = len(words) * CHARACTER, min(1.0, abs(gap) / 2) * 0.75
    colour = "#d55e00" if gap < 0 else "#0072b2"
    out = []
    if strength >= 0.03:
        out.append(f'<rect x="{x:.1f}" y="{y - 13}" width="{wide:.1f}" height="17" rx="2" fill="{colour}" ')
        out[-1] += f'fill-opacity="{strength:.2f}"/>'
    if abs(gap) > 0.05:
        dots = ' stroke-dasharray="2 2"' if gap < 0 else ""
        out.append(f'<path d="M{x:.1f} {y + 5}h{wide:.1f}" stroke="{colour}" stroke-width="2"{dots}/>')
    shown = text(x, y, words, "m").replace("<text", f'<text textLength="{wide:.1f}" lengthAdjust="spacingAndGlyphs"')
    return [*out, shown]


def picture(episode: dict[str, Any], first: int) -> str:
    """The drawing."""
    body = [text(16, 26, f"Task: {episode['i']}  (solved in {len(episode['turns'])} turns)", "b")]
    y = 48.0
    for index in range(first, first + 3):
        turn = episode["turns"][index]
        top = y
        observation = " ".join(turn["o"].split())
        y += 22
        body.append(text(30, y, f"turn {index + 1}", "b"))
        body.append(text(100, y, f"d {turn['d']:.2f}   h {turn['h']:.2f}   w {turn['w']:.2f}", "t"))
        body.append(f'<rect x="290" y="{y - 10}" width="120" height="10" fill="none" stroke="#5b6570"/>')
        body.append(f'<rect x="290" y="{y - 10}" width="{120 * turn["w"]:.1f}" height="10" fill="#7a4b94"/>')
        y += LINE
        body.append(
            text(30, y, observation if len(observation) < COLUMNS else observation[: COLUMNS - 4] + " ...", "s")
        )
        y += LINE + 2
        column = 0
        for words, student, teacher in turn["x"]:
            if column + len(words) > COLUMNS:
                column, y = 0, y + LINE + 2
            gap = 0.0 if teacher is None else teacher - student
            body += token(30 + column * CHARACTER, y, words, gap)
            column += len(words)
        y += 14
        body.insert(1, f'<rect x="16" y="{top}" width="{WIDTH - 32}" height="{y - top:.0f}" rx="6" class="c"/>')
        y += 10
    body.append(
        text(
            16,
            y + 12,
            "blue: the teacher finds the token more likely; orange: less likely. w: weight of the teacher",
            "s",
        )
    )
    style = (
        ".c{fill:#fff;stroke:#d8dee4}text{font:13px system-ui,Arial,sans-serif;fill:#1b1f24}.b{font-weight:700}"
        ".s{fill:#5b6570}.m{font:12.1px ui-monospace,Consolas,monospace}.g{fill:#f6f8fa}"
        "@media(prefers-color-scheme:dark){.c{fill:#1b2027;stroke:#39414b}"
        "text{fill:#e4e8ee}.s{fill:#99a3b0}.g{fill:#12151a}}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 24:.0f}" width="{WIDTH}" role="img">'
    ground = '<rect width="100%" height="100%" class="g"/>'
    return "\n".join([head, f"<style>{style}</style>", ground, *body, "</svg>", ""])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(picture(*chosen(page_data(Path(sys.argv[1])))), encoding="utf-8")
    print(f"wrote {OUT}")
