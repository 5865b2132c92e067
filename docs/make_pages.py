"""Fill the made parts of each algorithm's page: ``python docs/make_pages.py``; ``--check`` compares.

A page is written by hand but for what stands between ``<!-- made: PART -->`` and ``<!-- made: end -->``: the head, the
equations and differences (both from the module's docstring), the lines that compute the equations, the study's results
(``docs/study/study-results.json``) and the options. The curves of the results are drawn into ``docs/images``. The
study's page and the README's table of it are filled along (``make_study.py``).
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from make_results import curves, results, rows_of
from make_study import pages

from atod_algos.guard import explanations

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
        "A_t (eqs 8, 9)": ("", "ATOD.advantages", "distillation_M=kappa * learned * w_token"),
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
        "A^S_t": ("", "GiGPO.advantages", "step_K = group_advantage("),
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
