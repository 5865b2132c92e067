"""The page: one self-contained HTML file with curves, tables and every turn, which opens offline.

The data travel as compressed JSON in base64, so no text of a run ever stands in the page's own markup; the script puts
text on the page as text. The invariant: a page holds at most the asked number of turns, and says what it left out.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from atod_algos.report.data import Run
from atod_algos.report.tokens import Scorer, TurnScores, token_texts
from atod_algos.report.weights import before_and_after, by_turn_index, weight_distribution
from atod_algos.training.run_dir import replace_text
from atod_envs.caches import one_at_a_time
from atod_envs.trajectory import Trajectory

_FOLDER = Path(__file__).parent

TURNS = 10_000
"""Most turns on a page, over all runs."""


def _panel(title: str, unit: str, *keys: str, zero: bool = True, smooth: bool = True, **more: Any) -> dict[str, Any]:
    return {
        "title": title,
        "unit": unit,
        "keys": list(keys),
        "names": [],
        "note": "",
        "zero": zero,
        "smooth": smooth,
        **more,
    }


PANELS: tuple[dict[str, Any], ...] = (
    _panel("validation success", "success, %", "val", smooth=False),
    _panel("success of training episodes", "success, %", "episode/success"),
    _panel("reward, mean over turns", "reward", "critic/rewards/mean"),
    _panel("length of an episode", "turns", "episode/length/mean", zero=False),
    _panel("valid actions", "share of turns, %", "episode/valid_action_ratio", zero=False),
    _panel(
        *("size of the two terms", "mean over tokens", "atod/opd_abs_mean", "atod/rl_abs_mean"),
        names=["teacher: mean |κ Δ w|", "reward: mean |ρ A|"],
    ),
    _panel(
        *("coefficients", "coefficient", "atod/kl_coef", "atod/rl_coef"),
        smooth=False,
        names=["κ, of the teacher", "ρ, of the reward"],
    ),
    _panel("mean turn weight", "w_k", "tip/mean_importance"),
    _panel(
        *("gap to the teacher", "Δ, nats a token", "/teacher_student_gap_mean"),
        zero=False,
        note="Δ = log π_T − log π_S, mean over tokens",
    ),
    _panel("entropy", "nats a token", "actor/entropy_loss"),
    _panel(
        *("groups without a reward signal", "share of groups, %", "group/all_fail", "group/all_success"),
        names=["all attempts fail", "all succeed"],
    ),
    _panel("clipped tokens", "share of tokens, %", "actor/pg_clipfrac"),
)
"""Curves of the overview; a leading slash matches any algorithm's metric, a unit in % is drawn from shares."""


def write_page(
    path: Path,
    runs: Sequence[Run],
    *,
    scorers: Mapping[Path, Scorer],
    turns: int = TURNS,
    live: float = 0,
    stamp: str = "",
) -> dict[str, Any]:
    """Write the page.

    Args:
        path: of the HTML file.
        runs: what to show.
        scorers: by run's folder; a run without one is shown without a teacher's scores.
        turns: most turns on the page.
        live: seconds between looks for a newer page; 0 for a page that is finished.
        stamp: names this state of the runs.

    Returns:
        What the page shows, as the script reads it.
    """
    data = page_data(runs, scorers=scorers, turns=turns) | {"live": live, "stamp": stamp}
    packed = base64.b64encode(gzip.compress(json.dumps(data, separators=(",", ":")).encode(), 6, mtime=0)).decode()
    before, _, after = template().partition("@DATA@")
    with one_at_a_time(path.parent):  # a run that ends, and a command that looks at it, may write at once
        replace_text(path, before.replace("@TITLE@", html.escape(data["title"])) + packed + after)
    return data


def template() -> str:
    """The page without a title and without data: its markup, its style and its scripts as one text."""
    whole = (_FOLDER / "page.html").read_text(encoding="utf-8")
    for place, names in (("@STYLE@", ("page.css",)), ("@SCRIPT@", ("page.js", "charts.js", "episodes.js"))):
        text = "\n".join((_FOLDER / name).read_text(encoding="utf-8").strip() for name in names)
        whole = whole.replace(place, text)
    return whole


def page_data(runs: Sequence[Run], *, scorers: Mapping[Path, Scorer], turns: int = TURNS) -> dict[str, Any]:
    """Everything that the page shows, JSON-compatible."""
    worlds = sorted({run.env for run in runs})
    names = [run.name for run in runs]
    named = len(names) < 4 and len({*names}) == len(names)
    episodes: list[dict[str, Any]] = []
    left_out = 0
    for place, run in enumerate(runs):
        shown, missing = _episodes(place, run, scorers.get(run.path), turns // len(runs))
        episodes += shown
        left_out += missing
    return {
        "title": f"{' and '.join(names) if named else f'{len(names)} runs'} on {', '.join(worlds)}",
        "subtitle": "" if len(runs) > 1 else str(runs[0].path.name),
        "panels": PANELS,
        "runs": [_run(run, names, scorers.get(run.path)) for run in runs],
        "episodes": episodes,
        "left_out": f"{left_out} stored steps left out" if left_out else "",
    }


def _run(run: Run, names: list[str], scorer: Scorer | None) -> dict[str, Any]:
    series = {}
    for key in (key for panel in PANELS for key in panel["keys"]):
        for world in ("", *run.worlds):
            found = run.validations(world) if key == "val" else run.series(key, world)
            series[f"{world}:{key}" if world else key] = found
    steps = run.settings.get("train", {}).get("steps")
    return {
        "name": run.name if names.count(run.name) == 1 else f"{run.name} ({run.path.name})",
        "settings": run.said,
        "series": series,
        "worlds": run.worlds,
        "table": run.table,
        "panel": (run.result or {}).get("panel", ""),
        "steps": steps,
        "done": int(run.metrics[-1]["step"]) if run.metrics else 0,
        "weights": weight_distribution(run),
        "by_turn": _by_turn(run, scorer),
    }


def _by_turn(run: Run, scorer: Scorer | None) -> dict[str, Any] | None:
    """d, h and w by turn index before and after training, and the episodes that have such a turn."""
    tables = before_and_after(run, scorer)
    if not tables:
        return None
    found: dict[str, Any] = {"names": list(tables)}
    for quantity in "dhw":
        columns = [by_turn_index(scores, quantity) for scores in tables.values()]
        found[quantity] = [[turns, [round(mean, 4) for mean in means], counts] for turns, means, counts in columns]
    return found


def chosen_steps(run: Run, turns: int) -> tuple[list[tuple[str, int]], int]:
    """Steps to show: the first and the last validation, then as many training steps, evenly spread, as ``turns`` allow.

    Of an evaluation every panel is shown.

    Returns:
        (kind, step) of each, and how many stored steps are left out.
    """
    stored = {kind: run.steps(kind) for kind in ("valid", "train")}
    chosen = [("valid", step) for step in sorted({*stored["valid"][:1], *stored["valid"][-1:]})]
    left = turns - sum(_turns(run.episodes(kind, step)) for kind, step in chosen)
    train = stored["train"]
    if train:
        each = max(1, _turns(run.episodes("train", train[0])))
        wanted = max(2, min(len(train), left // each))
        spread = [train[round(i * (len(train) - 1) / max(1, wanted - 1))] for i in range(wanted)]
        chosen += [("train", step) for step in sorted(set(spread))]
    chosen += [("panel", step) for step in run.steps("panel")]
    return chosen, len(stored["valid"]) + len(train) - sum(kind != "panel" for kind, _ in chosen)


def _turns(episodes: Iterable[Trajectory]) -> int:
    return sum(len(t.turns) for t in episodes)


def _episodes(place: int, run: Run, scorer: Scorer | None, turns: int) -> tuple[list[dict[str, Any]], int]:
    steps, left_out = chosen_steps(run, turns)
    per_step = turns // max(1, len(steps))
    shown: list[dict[str, Any]] = []
    for kind, step in steps:
        episodes = run.episodes(kind, step)
        scores = scorer.scores(kind, step, episodes) if scorer is not None and episodes else {}
        texts = token_texts(run, episodes) or {}
        solved = _by_group(episodes)
        coefficients = next(
            ([r["atod/kl_coef"], r["atod/rl_coef"]] for r in run.metrics if r["step"] == step and "atod/kl_coef" in r),
            None,
        )
        count = 0
        for n, episode in enumerate(episodes):
            # Whole groups: an attempt means little without the others.
            if (
                count
                and count + len(episode.turns) > per_step
                and (n == 0 or episode.group_id != episodes[n - 1].group_id)
            ):
                break
            count += len(episode.turns)
            record = _episode(episode, n, scores, texts)
            shown.append(record | {"r": place, "k": kind, "s": step, "z": run.step_label(kind, step)})
            if kind == "train":
                shown[-1] |= {"n": solved[episode.group_id], "q": coefficients}
    return shown, left_out


def _by_group(episodes: Sequence[Trajectory]) -> dict[str, list[int]]:
    """Solved and played attempts of each group."""
    found: dict[str, list[int]] = {}
    for episode in episodes:
        counts = found.setdefault(episode.group_id, [0, 0])
        counts[0] += int(episode.success)
        counts[1] += 1
    return found


def _episode(
    episode: Trajectory, n: int, scores: Mapping[tuple[int, int], TurnScores], texts: Mapping[int, str]
) -> dict[str, Any]:
    turns = []
    for turn in episode.turns:
        found = scores.get((n, turn.index))
        tokens: list[list[Any]] = []
        if texts:
            student = list(turn.logprobs)
            teacher = found.teacher if found is not None and found.teacher is not None else [None] * len(student)
            tokens = [
                [texts[i], round(s, 3), None if t is None else round(t, 3)]
                for i, s, t in zip(turn.response_ids, student, teacher, strict=True)
            ]
        gaps = [t - s for _, s, t in tokens if t is not None]
        turns.append(
            {
                "o": turn.observation, "a": list(turn.admissible), "p": turn.response, "x": tokens, "c": turn.action,
                "f": int(turn.format_ok), "v": int(turn.valid), "m": round(min(gaps), 3) if gaps else None,
                "d": _short(found.d if found else None), "h": _short(found.h if found else None), "w": _short(found.w if found else None),
            }
        )  # fmt: skip
    return {
        "t": episode.task_id,
        "i": episode.task,
        "l": next(iter(episode.labels.values()), "all"),
        "ok": int(episode.success),
        "sc": episode.score,
        "stop": str(episode.stop_reason),
        "f": episode.final_observation,
        "turns": turns,
    }


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
