"""Writes a report, once or again and again while its runs train."""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from atod_algos.guard import guarded, parse
from atod_algos.report.data import Run, read_run
from atod_algos.report.page import TURNS, write_page
from atod_algos.report.tokens import Scorer
from atod_envs.errors import AtodError
from atod_envs.files import make_folder
from atod_envs.http.messages import is_local_name


@dataclass(frozen=True)
class ReportConfig:
    """Show stored runs: curves, tables, every turn and why it was weighted, and the paper's figures."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders; several are shown together."""
    out: Path | None = None
    """Folder of the report; by default the first run's own."""
    watch: bool = False
    """Follow the runs while they train: serve the page on this machine and write it again as they go on."""
    interval: float = 10.0
    """Seconds between looks, with --watch."""
    port: int = 0
    """Port of the page, with --watch; 0 takes a free one."""
    turns: int = TURNS
    """About how many turns are shown at most; of a stored step at least one group is."""
    score: bool = True
    """Let the teacher score the shown episodes where the run did not keep it (loads the teacher once; kept in
    RUN/scores)."""
    teacher: str | None = None
    """Another teacher to score with, also for runs that had none."""
    figures: bool = True
    """Draw the paper's figures as PNG and SVG (needs matplotlib: pip install 'atod[report]')."""
    verbose: bool = False
    """Log more."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    config = parse(ReportConfig, arguments, "atod_algos.report", ReportConfig.__doc__)
    logging.basicConfig(level=logging.INFO if config.verbose else logging.WARNING, format="%(levelname)s %(message)s")
    guarded(lambda: _run(config))


def _run(config: ReportConfig) -> None:
    if config.turns < 1 or not 0 < config.interval < math.inf:
        raise AtodError(
            f"--turns {config.turns}, --interval {config.interval:g}: expected at least 1 turn, and seconds above 0"
        )
    if not config.runs:
        raise AtodError("give one or more run folders, e.g. python -m atod_algos.report runs/atod-ALFWorld-v0-seed0")
    console = Console(soft_wrap=True)
    if config.watch:
        try:
            watch(config, console, threading.Event())
        except KeyboardInterrupt:
            console.print("stopped")
        return
    page = report(
        config.runs,
        out=config.out,
        turns=config.turns,
        compute=config.score,
        teacher=config.teacher,
        figures=config.figures,
    )
    console.print(str(page), highlight=False)


def report(
    folders: Sequence[Path],
    *,
    out: Path | None = None,
    turns: int = TURNS,
    compute: bool = True,
    teacher: str | None = None,
    figures: bool = True,
) -> Path:
    """Write the page, and the figures where they are wanted.

    Args:
        folders: of the runs.
        out: folder of the report; by default the first run's.
        turns: most turns on the page.
        compute: the teacher may be loaded to score what is shown.
        teacher: another teacher than the runs' own.
        figures: draw the paper's figures.

    Returns:
        The page.

    Raises:
        DataError: a folder holds no run.
        ImportError: figures were asked for and matplotlib is not installed.
    """
    runs = [read_run(folder) for folder in {Path(folder).resolve(): Path(folder) for folder in folders}.values()]
    target = out or runs[0].path
    make_folder(target, "--out")
    scorers = {run.path: _scorer(run, compute, teacher) for run in runs}
    page = target / "report.html"
    write_page(page, runs, scorers=scorers, turns=turns)
    if figures:
        from atod_algos.report.figures import write_figures

        write_figures(runs, target / "figures", scorers)
    return page


def _scorer(run: Run, compute: bool, teacher: str | None) -> Scorer:
    """A run that had no teacher gets scores from one that was asked for only."""
    taught = bool(run.series("/teacher_student_gap_mean")[0])
    return Scorer(run, teacher, compute and (taught or teacher is not None))


# --- following a run ----------------------------------------------------------------------------------------------


SECONDS, CONNECTIONS = 20.0, 64
"""Longest time of a connection, and how many there are at a time; the page needs no package of a server."""


class _Server(ThreadingHTTPServer):
    """Offers the page, and a stamp that changes with it."""

    daemon_threads = True

    def __init__(self, port: int, page: Path, stamp: str) -> None:
        self.page, self.stamp = page, stamp
        self._free = threading.Semaphore(CONNECTIONS)
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def handle(self) -> None:
        """A connection has a time, whatever its client does with it."""
        cut = threading.Timer(SECONDS, _cut, [self.connection])
        cut.daemon = True
        cut.start()
        with contextlib.suppress(ConnectionError):
            super().handle()
        cut.cancel()

    def do_GET(self) -> None:
        # A page elsewhere whose name was made to mean this machine is refused.
        if not is_local_name(self.headers.get("Host", "")):
            self.send_error(403)
            return
        if self.path in ("/", "/report.html") and self.server.page.exists():
            body, kind = self.server.page.read_bytes(), "text/html; charset=utf-8"
        elif self.path == "/stamp":
            body, kind = self.server.stamp.encode(), "text/plain"
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        logging.getLogger(__name__).debug(format, *args)


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def watch(config: ReportConfig, console: Console, stop: threading.Event) -> None:
    """Serve the page on this machine and write it again whenever the runs have gone on.

    Args:
        config: what to show.
        console: where the address is shown.
        stop: ends it.
    """
    target = config.out or config.runs[0]
    page = target / "report.html"
    stamp = _write(config, page)
    try:
        server = _Server(config.port, page, stamp)
    except (OSError, OverflowError) as error:
        raise AtodError(f"cannot listen on port {config.port}: {error}; choose another --port") from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    console.print(
        f"following {', '.join(map(str, config.runs))} at http://127.0.0.1:{server.server_port}/ (Ctrl-C ends)",
        highlight=False,
    )
    try:
        while not stop.wait(config.interval):
            if _stamp(config.runs) != server.stamp:
                server.stamp = _write(config, page)
    finally:
        server.shutdown()
        server.server_close()


def _write(config: ReportConfig, page: Path) -> str:
    """Write the page; the stamp of what it shows."""
    stamp = _stamp(config.runs)
    runs = [read_run(folder) for folder in config.runs]
    # The teacher is not loaded while a run trains; what is stored is used.
    scorers = {run.path: _scorer(run, False, config.teacher) for run in runs}
    page.parent.mkdir(parents=True, exist_ok=True)
    write_page(page, runs, scorers=scorers, turns=config.turns, live=config.interval, stamp=stamp)
    return stamp


def _stamp(folders: Sequence[Path]) -> str:
    """Changes whenever one of the runs has gone on."""
    sizes = []
    for folder in folders:
        path = folder / "metrics.jsonl"
        sizes.append(f"{path.stat().st_size if path.exists() else 0}{'.' if (folder / 'result.json').exists() else ''}")
    return "-".join(sizes)
