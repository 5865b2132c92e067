"""Fill the made parts of each algorithm's page: ``python docs/make_pages.py``; ``--check`` compares.

A page is written by hand but for what stands between ``<!-- made: PART -->`` and ``<!-- made: end -->``: the head, the
equations and differences (both from the module's docstring), the lines that compute the equations, the study's results
(``docs/study/study-results.json``) and the options. The curves of the results are drawn into ``docs/images``. The
study's page and the README's table of it are filled along (``make_study.py``).
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from html import escape
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from make_study import RESULTS, WORLDS, decisions, pages

from atod_algos.evaluate.statistics import t_interval
from atod_algos.guard import explanations
from atod_algos.study import METHODS

FOLDER = Path(__file__).parent / "algorithms"
ROOT = FOLDER.parent.parent
IMAGES = FOLDER.parent / "images"
HEADINGS = (
    "What it is for",
    "Equations",
    "Metrics",
    "Differences from the paper and the released code",
    "Results",
    "When not to use it",
    "Options",
)
"""The sections of a page, in order."""
MADE = re.compile(r"<!-- made: ([\w-]+) -->\n.*?<!-- made: end -->", re.DOTALL)
DIFFERS = re.compile(r"^(``--|Differences|Where the paper|What is uncertain)")
"""How the paragraph of a docstring begins from which on it speaks of differences."""

GRPO = ("atod_algos.algorithm", "RewardAlgorithm.grpo", "def grpo(")
GAP = ("", "{}.advantages", 'scores.require("teacher") - scores.student_M')
SURROGATE = ("atod_algos.learner.loss", "surrogate", "def surrogate(")
LINES: dict[str, dict[str, tuple[str, str, str]]] = {
    "atod": {
        "Delta_t (eq 6)": ("", "ATOD.advantages", "delta = log_pi_T - log_pi"),
        "A^GRPO (eq 2)": ("", "ATOD.advantages", "A_grpo = self.grpo(batch)"),
        "d_k (eq 13)": ("", "ATOD.advantages", "d = turn_mean("),
        "h_k (eq 14)": ("", "ATOD.advantages", "h = turn_mean("),
        "d~, h~ (eq 15)": ("", "ATOD.advantages", "d_norm, h_norm ="),
        "w_k (eq 16)": ("", "ATOD.advantages", "w = 1 - (1 - d_norm)"),
        "p(s) (eq 10)": ("", "ATOD.advantages", "p = min("),
        "kappa(s) (eq 11)": ("", "ATOD.advantages", "kappa = max("),
        "rho(s) (eq 12)": ("", "ATOD.advantages", "rho = self.rho_init"),
        "A_t (eqs 8, 9)": ("", "ATOD.advantages", "distillation_M=kappa * delta * w_token"),
    },
    "grpo": {
        "A_i (eq 2)": ("atod_algos.advantages", "group_advantage", "def group_advantage("),
        "surrogate (eqs 3, 4)": SURROGATE,
        "average (eq 4)": ("atod_algos.learner.loss", "aggregation_weights", "def aggregation_weights("),
        "k3": ("", "k3", "return x.exp() - x - 1"),
    },
    "opd": {"Delta_t (eq 6)": GAP, "A_t (eq 7)": ("", "OPD.advantages", "distillation_M=weight_M * delta_M")},
    "sdar": {
        "g_t": ("", "SDAR.auxiliary_loss", "gate = (self.gate_beta * delta.detach()).sigmoid()"),
        "delta_t": ("", "SDAR.auxiliary_loss", "delta = logprobs.new_tensor("),
        "lambda L_SDAR": ("", "SDAR.auxiliary_loss", "self.sdar_coef * gate * delta"),
        "L_GRPO": GRPO,
    },
    "sod": {
        "d_k (eq 13)": ("", "SOD.advantages", "d_K = turn_mean("),
        "w_k (SOD eqs 6, 7)": ("", "stepwise_weights", "weight_K = np.minimum("),
        "A_t": ("", "SOD.advantages", "distillation_M=weight_M * delta_M"),
    },
    "tcod": {
        "A_t (eqs 2, 3)": GAP,
        "k(n) (eq 4)": ("", "TCOD.turns", "return self.turns_start +"),
        "the curriculum": ("", "TCOD.limits", "RolloutLimits(max_turns=k)"),
    },
    "gigpo": {
        "A^E_i": ("", "GiGPO.advantages", "episode_K = reward_advantage("),
        "R_t": ("", "discounted_returns", "return_K[k] += discount"),
        "anchor states": ("", "anchor_states", "seen.setdefault("),
        "A^S_t": ("", "GiGPO.advantages", "step_K = np.where("),
        "A_t": ("", "GiGPO.advantages", "episode_K + self.omega * step_K"),
    },
    "gopd": {
        "log pi_T - log pi_base": ("", "GOPD.advantages", "gain_M = "),
        "log pi_old - log pi_base": ("", "GOPD.advantages", "drift_M = "),
        "A_t": ("", "GOPD.advantages", "self.extrapolation * gain_M - drift_M"),
    },
    "tip": {
        "h_t, d_t": ("", "TIP.advantages", "kl_M, entropy_M ="),
        "s_t": ("atod_algos.advantages", "importance", "def importance("),
        "which are kept": ("", "largest", "kept_M[np.argsort("),
        "A_t": ("", "TIP.advantages", "delta_M * kept_M / kept_M.mean()"),
    },
    "entropy_aware": {
        "A_t": GAP,
        "F_t": ("", "EntropyAware.support_loss", "self.forward_coef * marked"),
    },
    "vopd": {
        "V_t": ("", "VOPD.advantages", 'value_M = scores.require("gap_mean")'),
        "A_t": ("", "VOPD.advantages", "advantage_M = "),
    },
    "opsa": {
        "U": ("", "OPSA.advantages", "unlikely_M = "),
        "A_t, fixed": ("", "OPSA.advantages", "= self.advantage"),
        "A_t, by entropy": ("", "OPSA.advantages", "-0.5 - 0.5 * min_max("),
    },
    "iw_opd": {
        "F_t": ("", "share_before", "np.divide(before_M"),
        "w_t": ("", "IWOPD.advantages", "weight_M = 1 + self.iw_gamma"),
        "A_t": ("", "IWOPD.advantages", "distillation_M=weight_M * delta_M"),
    },
    "agent_opsd": {
        "e_k": ("", "AgentOPSD.advantages", "evidence_K = np.bincount("),
        "B_0": ("", "AgentOPSD.beliefs", "prior_N = np.clip("),
        "c_k": ("", "AgentOPSD.beliefs", "gathered = self.decay * gathered + own"),
        "B_k": ("", "AgentOPSD.beliefs", "belief_K[k] = 0.5 * (1 + np.tanh("),
        "z_k": ("", "standardised", "return np.asarray(apart_K / "),
        "q_k (eq 6)": ("", "AgentOPSD.advantages", "q_K = np.sign(advantage_K)"),
        "w_k": ("", "AgentOPSD.advantages", "weight_K = np.clip(1 + self.band"),
        "A'_k": ("", "AgentOPSD.advantages", "shaped_K = advantage_K * ("),
    },
    "guided_opd": {
        "p(s)": ("", "GuidedOPD.share", "self.guide_share * (1 + math.cos"),
        "who plays": ("atod_algos.turn_plans", "Guided.guides", "random() < self.share"),
        "A_t": ("", "GuidedOPD.advantages", "distillation_M=np.where(guided_M"),
    },
    "reopd": {
        "p_t": ("atod_algos.turn_plans", "Stored.begin", "weights = self.decay"),
        "who plays": ("atod_algos.turn_plans", "Stored.begin", "lambda turn: stored[turn] if"),
        "A_t": ("", "ReOPD.advantages", 'distillation_M=scores.require("teacher")'),
    },
    "futurebridge": {
        "d_k": ("", "FutureBridge.places", "d_K = turn_mean("),
        "k*": ("", "FutureBridge.places", "k = max(earlier"),
        "the bridge": ("", "FutureBridge.branch", "bridges = branching.play("),
        "q": ("", "preferred", "better_M = "),
        "what is kept": ("", "FutureBridge.branch", "kept = [bridges[n]"),
        "A_t": ("", "FutureBridge.advantages", 'distillation_M=scores.require("teacher")'),
    },
    "sage_opd": {
        "c_k": ("", "SageOPD.advantages", "confidence_K = turn_mean("),
        "u_k": ("", "SageOPD.advantages", "help_K = np.where("),
        "w_t (eq 12)": ("", "SageOPD.advantages", "weight_K = weight_K * (batch.n_tokens / total"),
        "A_t": GAP,
    },
    "siblings": {
        "delta_t": (
            "",
            "Siblings.advantages",
            'delta_M = np.where(shown_N[batch.trajectory_M], scores.require("privileged") - scores.student_M, 0.0)',
        ),
        "A_t, opid": ("", "Siblings.advantages", "distillation_M=self.nudge * delta_M"),
        "x_k": ("", "Siblings.advantages", "signal_K = np.expm1("),
        "q_k": ("", "Siblings.advantages", "level_K = np.clip("),
        "A_k, grsd": ("", "Siblings.advantages", "reward_M=(advantage_K * factor_K)"),
    },
    "sign_safe": {
        "delta_t": ("", "SignSafe.advantages", "delta_M = scores.require("),
        "w_t": ("", "SignSafe.advantages", "weight_M = np.clip("),
        "A_t, the first three": ("", "SignSafe.advantages", "reward_M=A_M * factor_M"),
        "f_k": ("", "equal_budgets", "factor_K = np.clip("),
        "A_t, sg_opd": ("", "SignSafe.advantages", "distillation_M=factor_M * delta_M"),
        "A_t, opdvr": ("", "SignSafe.advantages", "distillation_M=outcome_M * np.maximum("),
    },
    "turn_opd": {
        "p(s)": ("", "TurnOPD.advantages", "progress = min("),
        "w_t": ("", "TurnOPD.advantages", "weight_M = (1 - progress)"),
        "A_t": GAP,
    },
    "gkd": {
        "the tail": ("atod_algos.learner.loss", "with_tail", "return torch.cat([logprobs, rest.log()]"),
        "forward": ("", "GKD.support_loss", "return self.coef * kl(theirs, own)"),
        "reverse": ("", "GKD.support_loss", "return self.coef * kl(own, theirs)"),
        "m": ("", "GKD.support_loss", "middle = "),
        "jsd": ("", "GKD.support_loss", "self.beta * kl(theirs, middle)"),
    },
    "tropd": {
        "P_t": ("", "trust", "return np.asarray(np.exp(np.minimum("),
        "A_t": ("", "TrOPD.advantages", "distillation_M=trust_M * delta_M"),
        "F_t": ("", "TrOPD.support_loss", "return self.outlier_coef * outside"),
    },
}
"""Algorithm -> what is computed -> its module ("" for the algorithm's own), its function, and a part of the line."""


def parts(name: str, algorithm: type[Any]) -> dict[str, str]:
    """The made parts of an algorithm's page."""
    module = sys.modules[algorithm.__module__]
    said = (module.__doc__ or "").strip()
    first, _, rest = said.partition("\n\n")
    paragraphs = rest.split("\n\n")
    cut = next((i for i, text in enumerate(paragraphs) if DIFFERS.match(text)), len(paragraphs))
    commands = [text for text in paragraphs if text.startswith("    python -m")]
    differences = [text for text in paragraphs[cut:] if text not in commands]
    about = [text for text in paragraphs[:cut] if text not in commands]
    call = [line.strip() for text in commands for line in text.splitlines()]
    return {
        "head": "\n".join([first, "", f"`atod train {name}` is `{call[0].split(' --')[0]}`."]),
        "equations": block(about),
        "lines": lines_table(name, algorithm),
        "differences": block(differences),
        "results": results(name),
        "options": options_table(algorithm),
    }


def block(paragraphs: list[str]) -> str:
    """Paragraphs of a docstring as they stand there."""
    return "\n".join(["```text", *"\n\n".join(paragraphs).strip("\n").splitlines(), "```"])


def lines_table(name: str, algorithm: type[Any]) -> str:
    """Which line computes what, with links into the reference, which shows the source."""
    table = ["| what | line | |", "|---|---|---|"]
    for what, (module, function, snippet) in LINES[name].items():
        module = module or algorithm.__module__
        function = function.format(algorithm.__name__)
        path = f"{module.replace('.', '/')}.py"
        found = [
            (number, line.split("  #")[0].strip())
            for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
            if snippet in line
        ]
        if len(found) != 1:
            raise SystemExit(
                f"{path}: {len(found)} lines hold {snippet!r}; one is expected (docs/make_pages.py, LINES)"
            )
        number, line = found[0]
        line = line.replace("|", "\\|")
        table.append(f"| {what} | `{line}` | [`{path}`, line {number}](../api/methods.md#{module}.{function}) |")
    return "\n".join(table)


# --- results of the study -----------------------------------------------------------------------------------------


def cells_of(method: str) -> dict[str, list[dict[str, Any]]]:
    """The study's finished cells of a method, by world."""
    every = json.loads(RESULTS.read_text())["cells"]
    return {world: [cell for cell in every if (cell["world"], cell["method"]) == (world, method)] for world in WORLDS}


def rows_of(name: str) -> list[str]:
    """An algorithm's own rows of the study: its methods that were run."""
    return [key for key, method in METHODS.items() if method.algorithm == name and any(cells_of(key).values())]


def results(name: str) -> str:
    """Success in all worlds with the command, or that there is none."""
    rows = rows_of(name)
    if not rows:
        offered = [key for key, method in METHODS.items() if method.algorithm == name]
        how = f"\nTo run it there: `--methods {' '.join(offered)}`." if offered else ""
        return f"Not run in [the study](../study.md): there is no table and no curve, in any world.{how}"
    cells = [cell for key in rows for found in cells_of(key).values() for cell in found]
    torch = {cell["versions"]["torch"] for cell in cells}
    commits = dict.fromkeys(commit[:7] for cell in cells for commit in cell.get("commits", ()))
    seeds = sorted({len(found) for key in rows for found in cells_of(key).values() if found})
    numbers = map(str, sorted({cell["seed"] for cell in cells}))
    how_many = " or ".join(map(str, seeds))
    table = ["| | ALFWorld | turns | Search-QA | turns | WebShop | turns |", f"|---|{'---:|' * 6}"]
    for key in ("vanilla", *rows, "teacher"):
        label = {"vanilla": "the student before", "teacher": "the teacher"}.get(key) or f"**{METHODS[key].label}**"
        table.append(f"| {label} | {' | '.join(in_world(cells) for cells in cells_of(key).values())} |")
    claims = decisions(json.loads(RESULTS.read_text())["claims"], tuple(METHODS), rows)
    said = "What [the study](../study.md) decides: points of success (p over tasks, p over seeds), bold where both are below 5 %."
    decided = [*textwrap.wrap(said, 120), "", claims, ""] if len(claims.splitlines()) > 2 else []
    asked = f"--seeds {' '.join(numbers)} --methods {' '.join(rows)}"
    command = f"Command: `python -m atod_algos.study --preset laptop {asked}`."
    return "\n".join(
        [
            f"Success in % of the last checkpoint, with the 95 % t-interval over {how_many} training seeds, 60 steps each.",
            "",
            *table,
            "",
            f"![validation success by step, the other methods in grey](../images/results-{name}.svg)",
            "",
            *decided,
            *textwrap.wrap(command, 120, break_on_hyphens=False),
            f"Commit `{', '.join(commits)}`, torch {', '.join(sorted(torch))}.",
            "All rows, seeds and curves: [tables](../study/tables.md).",
        ]
    )


def in_world(cells: list[dict[str, Any]]) -> str:
    """Success with its interval, and turns; a bar where the method was not run."""
    if not cells:
        return "- | -"
    values = [100 * cell["last"]["success"] for cell in cells]
    low, high = t_interval(values)
    turns = sum(cell["last"]["length"] for cell in cells) / len(cells)
    return f"{sum(values) / len(values):.1f} ± {(high - low) / 2:.1f} | {turns:.1f}"


def curves(name: str) -> str:
    """Validation success by step in each world, the mean over seeds: own methods in colour, the others in grey."""
    width, height, left, top, bottom = 300, 190, 44, 24, 36
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d1f", "#7a5195")
    dashes = ("", "7 3", "2 2", "8 3 2 3", "1 3", "10 2", "4 1", "6 2 1 2")
    own = rows_of(name)
    body = []
    for column, (world, title) in enumerate(WORLDS.items()):
        x0, y0 = column * width + left, height - bottom
        lines = {}
        for key in (key for key, method in METHODS.items() if method.algorithm):
            found = [cell["validation"] for cell in cells_of(key)[world]]
            if found:
                lines[key] = {int(step): 100 * sum(v[step] for v in found) / len(found) for step in found[0]}
        steps = sorted({step for line in lines.values() for step in line})
        highest = 10 * -(-max(max(line.values()) for line in lines.values()) // 10)

        def at(
            step: float, value: float, x0: int = x0, y0: int = y0, last: int = steps[-1], most: float = highest
        ) -> str:
            across, up = (width - left - 14) * step / last, (height - top - bottom) * value / most
            return f"{x0 + across:.1f} {y0 - up:.1f}"

        for value in range(0, int(highest) + 1, 10):
            body.append(f'<path class="g" d="M{at(0, value)}L{at(steps[-1], value)}"/>')
            body.append(
                f'<text x="{x0 - 5}" y="{float(at(0, value).split()[1]) + 4:.1f}" text-anchor="end">{value}</text>'
            )
        for step in steps[1::2]:
            body.append(f'<text x="{at(step, 0).split()[0]}" y="{y0 + 14}" text-anchor="middle">{step}</text>')
        body.append(f'<text class="b" x="{x0}" y="15">{title}</text>')
        body.append(f'<text x="{x0 + 121}" y="{height - 6}" text-anchor="middle">training step</text>')
        for key in sorted(lines, key=own.__contains__):
            path = "L".join(at(step, lines[key][step]) for step in sorted(lines[key]))
            place = own.index(key) if key in own else None
            look = 'class="o"' if place is None else f'stroke="{colours[place]}" stroke-dasharray="{dashes[place]}"'
            body.append(f'<path fill="none" stroke-width="{1 if place is None else 2.2}" {look} d="M{path}"/>')
    body.append(
        f'<text transform="translate(11 {(top + height - bottom) / 2}) rotate(-90)" text-anchor="middle">success, %</text>'
    )
    for place, key in enumerate(own):
        x, y = 44 + place % 4 * 215, height + 12 + place // 4 * 18
        body.append(
            f'<path stroke-width="2.2" stroke="{colours[place]}" stroke-dasharray="{dashes[place]}" d="M{x} {y - 4}h28"/>'
        )
        body.append(f'<text x="{x + 34}" y="{y}">{escape(METHODS[key].label)}</text>')
    style = (
        "text{font:11px system-ui,Arial,sans-serif;fill:#5b6570}.b{font-weight:700;font-size:13px}.g{stroke:#e3e7eb}"
        ".o{stroke:#b9c1ca}@media(prefers-color-scheme:dark){text{fill:#99a3b0}.g{stroke:#39414b}.o{stroke:#5b6570}}"
    )
    tall = height + 20 + (len(own) - 1) // 4 * 18
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {3 * width} {tall}" role="img">'
    return "\n".join([head, f"<style>{style}</style>", *body, "</svg>", ""])


def options_table(algorithm: type[Any]) -> str:
    """Every option with its default."""
    table = ["| option | default | |", "|---|---|---|"]
    for option, default, text in options(algorithm()):
        table.append(f"| `--{option.replace('_', '-')}` | `{default}` | {text.replace('|', chr(92) + '|')} |")
    table += ["", "The settings of a run (models, steps, learning rate, ...) are [TrainConfig](../api/algos.md)'s."]
    return "\n".join(table)


def options(settings: Any) -> Iterator[tuple[str, Any, str]]:
    """Name, default and explanation of each field, those of nested groups in their place."""
    texts = explanations(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from options(value)
        else:
            yield field.name, value, texts.get(field.name, "")


def filled(page: str, made: dict[str, str]) -> str:
    """The page with its made parts as they are now."""
    return MADE.sub(lambda part: f"<!-- made: {part[1]} -->\n\n{made[part[1]]}\n\n<!-- made: end -->", page)


def main() -> int:
    """Write or check; returns the exit status."""
    stale: list[str] = []
    targets = {path: filled(path.read_text(), made) for path, made in pages().items()}
    for point in entry_points(group="atod.algorithms"):
        if not point.module.startswith("atod_algos."):
            continue
        path = FOLDER / f"{point.name}.md"
        if not path.exists():
            raise SystemExit(f"{path} is missing: write it with the sections of the other pages")
        targets[path] = filled(path.read_text(), parts(point.name, point.load()))
        if rows_of(point.name):
            targets[IMAGES / f"results-{point.name}.svg"] = curves(point.name)
    for target, wanted in targets.items():
        if not target.exists() or target.read_text() != wanted:
            stale.append(target.name)
            if "--check" not in sys.argv:
                target.write_text(wanted)
    if "--check" not in sys.argv:
        print(f"wrote: {', '.join(stale) or 'nothing, all are up to date'}")
        return 0
    print(f"out of date: {', '.join(stale)}; run python docs/make_pages.py" if stale else "up to date")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
