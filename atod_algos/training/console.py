"""What a person sees while a run goes on: a live panel in a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_SHOWN = (
    ("success", "episode/success", "{:.1%}"),
    ("reward", "episode/reward/mean", "{:.2f}"),
    ("turns", "episode/length/mean", "{:.1f}"),
    ("valid actions", "episode/valid_action_ratio", "{:.0%}"),
    ("kappa", "atod/kl_coef", "{:.3f}"),
    ("rho", "atod/rl_coef", "{:.3f}"),
    ("OPD size", "atod/opd_abs_mean", "{:.3f}"),
    ("RL size", "atod/rl_abs_mean", "{:.3f}"),
    ("turn weight", "tip/mean_importance", "{:.2f}"),
    ("teacher gap", "/teacher_student_gap_mean", "{:.3f}"),
    ("entropy", "actor/entropy_loss", "{:.3f}"),
    ("clipped", "actor/pg_clipfrac", "{:.1%}"),
    ("tokens/s", "speed/tokens_per_second", "{:,.0f}"),
)
"""Label, metric (a leading slash matches any algorithm's), format."""


class Progress:
    """Shows steps and evaluations.

    Args:
        steps: training steps in all.
        title: what is run.
        first: the step that comes first (above 1 after a resume).
        quiet: show nothing (on all but the first of several ranks).
    """

    def __init__(self, steps: int, title: str, first: int = 1, *, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet)
        if not self.console.is_terminal:
            self.console.width = 120
        self._steps, self._title, self._done = steps, title, first - 1
        self._durations: deque[float] = deque(maxlen=20)
        self._last = time.monotonic()
        self._metrics: Mapping[str, float] = {}
        self._phase = "starting"
        self._validation = ""
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live = Live(self._panel(), console=self.console, refresh_per_second=4, transient=False)
            self._live.start()
        else:
            self.console.print(self._title, highlight=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def phase(self, text: str) -> None:
        """Say what is being done now (live display only)."""
        self._phase = text
        self._refresh()

    def note(self, text: str) -> None:
        """Say something that stays."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step has ended."""
        now = time.monotonic()
        self._durations.append(now - self._last)
        self._last, self._done, self._metrics = now, step, metrics
        if self._live is None:
            parts = [f"{label} {text}" for label, text in self._values()]
            self.console.print(
                f"step {step}/{self._steps}  " + "  ".join(parts) + f"  ETA {self.eta()}",
                highlight=False,
                soft_wrap=True,
            )
            self.console.file.flush()
        self._refresh()

    def validation(self, step: int, success: float, n: int) -> None:
        """A validation has ended; its time does not count as a step's."""
        self._validation = f"step {step}: {success:.1%} of {n}"
        self._last = time.monotonic()
        if self._live is None:
            self.console.print(f"validation after step {step}: success {success:.1%} of {n} tasks", highlight=False)
        self._refresh()

    def eta(self) -> str:
        """Time left for the remaining steps, from the last twenty."""
        if not self._durations:
            return "-"
        left = int(sum(self._durations) / len(self._durations) * (self._steps - self._done))
        return (
            f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}" if left >= 3600 else f"{left // 60}:{left % 60:02d}"
        )

    def _values(self) -> list[tuple[str, str]]:
        found = []
        for label, key, form in _SHOWN:
            value = self._metrics.get(key)
            if value is None and key.startswith("/"):
                value = next((v for name, v in self._metrics.items() if name.endswith(key)), None)
            if value is not None:
                found.append((label, form.format(value)))
        return found

    def _panel(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        values = self._values()
        for start in range(0, len(values), 4):
            table.add_row(
                *[Text.assemble((f"{label} ", "dim"), (text, "bold")) for label, text in values[start : start + 4]]
            )
        head = Text(f"{self._title}   step {self._done}/{self._steps}   ETA {self.eta()}   {self._phase}")
        parts: list[RenderableType] = [head, ProgressBar(total=self._steps, completed=self._done, width=60), table]
        if self._validation:
            parts.append(Text(f"validation, {self._validation}", style="green"))
        return Group(*parts)

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._panel())


def result_tables(table: Mapping[str, Any], title: str) -> list[Table]:
    """The final table of a run: one, or one for each of several environments.

    Args:
        table: the summaries by policy, as the run's folder keeps them.
        title: says the panel and the sampling.
    """
    worlds = dict.fromkeys(name for row in table.values() for name in row.get("worlds", ()))
    if not worlds:
        return [result_table(list(table.items()), title)]
    everywhere = {policy: row for policy, row in table.items() if len(row["worlds"]) == len(worlds)}
    mean = ", ".join(f"{policy} {row['success']:.1%}" for policy, row in everywhere.items())
    found: list[Table] = []
    for name in worlds:
        rows = [(policy, row["worlds"][name]) for policy, row in table.items() if name in row["worlds"]]
        found.append(result_table(rows, f"{name} ({title})" if not found else name))
    found[-1].caption = f"mean success over the environments: {mean}"
    return found


def result_table(rows: Sequence[tuple[str, Mapping[str, Any]]], title: str) -> Table:
    """The final table: success with its interval, length, and success by label, one policy a column.

    Args:
        rows: (policy, summary of its evaluation).
        title: says the panel and the sampling.
    """
    labels = sorted({label for _, summary in rows for label in summary["by_label"]})
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name, _ in rows:
        table.add_column(name, justify="right", no_wrap=True)

    def line(label: str, text: Callable[[Mapping[str, Any]], str]) -> None:
        table.add_row(label, *[text(summary) for _, summary in rows])

    line("success", lambda s: f"{s['success']:.1%}")
    line("95 % interval", lambda s: f"{100 * s['low']:.1f} - {100 * s['high']:.1f}")
    line("turns", lambda s: f"{s['length']:.1f}")
    for label in labels:
        line(label, lambda s, label=label: _part(s["by_label"].get(label)))  # type: ignore[misc]
    return table


def _part(part: Mapping[str, Any] | None) -> str:
    return f"{part['success']:.0%} of {part['n']}" if part else "-"
