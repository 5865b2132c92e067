"""``python -m atod_envs.serve``: offer environments over HTTP and WebSocket.

    ATOD_TOKEN=... python -m atod_envs.serve --env atod/ALFWorld-v0 --option data=PATH --host 0.0.0.0 --port 8080

The invariant: beyond this machine the server asks for a token, and what clients may choose is fixed before it starts.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import gymnasium as gym

import atod_envs
from atod_envs.errors import AtodError
from atod_envs.http.client import is_loopback
from atod_envs.options import read_options
from atod_envs.serve.client import TOKEN_VARIABLE
from atod_envs.serve.sessions import Limits, Offer, Sessions


def make_offer(env_id: str, splits: Sequence[str], options: dict[str, Any]) -> Offer:
    """An offer that works: every split is made once.

    Args:
        env_id: registered id.
        splits: what clients may choose; none for those that the environment names.
        options: its other arguments.
    """
    if not splits:
        splits = atod_envs.environment_class(env_id).splits
    offer = Offer(env_id, tuple(splits), options)
    for split in offer.splits:
        offer.make(split).close()
    return offer


def _options() -> argparse.ArgumentParser:
    defaults = Limits()
    parser = argparse.ArgumentParser(
        prog=sys.argv[0] if sys.argv[0].startswith("atod ") else "python -m atod_envs.serve",
        description="Offer environments over HTTP and WebSocket.",
        epilog=f"The token stands in ${TOKEN_VARIABLE} or in the file of --token-file.",
    )
    parser.add_argument(
        "--env", action="append", default=[], help="environment to offer; repeat; default: all that can be played here"
    )
    parser.add_argument(
        "--split", action="append", default=[], help="split to offer; repeat; default: the environment's three"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of the environment; repeat",
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one; default: %(default)s")
    parser.add_argument("--token-file", type=Path, help="file whose first line is the token")
    parser.add_argument("--certificate", help="file with a TLS certificate")
    parser.add_argument("--key", help="file with its key")
    texts = {
        "sessions": "sessions at the same time",
        "idle_seconds": "seconds without a call after which a session is closed",
        "call_seconds": "longest time of one call",
        "message_bytes": "longest message that is read",
        "turns": "highest turn limit that clients may ask for, unless the environment's own is higher",
        "connections": "connections at the same time",
        "threads": "threads for environments that wait on something outside",
    }
    for part in fields(Limits):
        value = getattr(defaults, part.name)
        name = "--" + part.name.replace("_", "-")
        parser.add_argument(name, type=type(value), default=value, help=f"{texts[part.name]}; default: %(default)s")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = _options().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        token = _token(given.token_file)
        if not token and not is_loopback(given.host):
            raise AtodError(
                f"--host {given.host} can be reached from other machines; set a token in ${TOKEN_VARIABLE} or with --token-file"
            )
        limits = Limits(**{part.name: getattr(given, part.name) for part in fields(Limits)})
        for part in fields(Limits):
            if getattr(limits, part.name) <= 0:
                raise AtodError(f"--{part.name.replace('_', '-')} {getattr(limits, part.name)}; expected more than 0")
        from atod_envs.http.server import listen, require_free, serve_command
        from atod_envs.serve.app import make_server

        if split := next((pair for pair in given.option if "." in pair.partition("=")[0]), None):
            raise AtodError(
                f"--option {split!r}: a server's options hold for all its splits; leave out the split's name"
            )
        options = read_options(given.option)
        require_free(given.host, given.port)
        offers = [make_offer(env_id, given.split, options) for env_id in given.env or atod_envs.playable()]
        sessions = Sessions(offers, limits)
        server = make_server(sessions, token=token, certificate=given.certificate, key=given.key)
        listening = listen(given.host, given.port)
    except (AtodError, ImportError, OSError, ValueError, TypeError, gym.error.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    port = listening.getsockname()[1]
    secure = "s" if given.certificate else ""
    return serve_command(
        server, listening, f"serving {', '.join(sessions.offers)} on http{secure}://{given.host}:{port}"
    )


def _token(path: Path | None) -> str:
    if path is not None:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        token = lines[0].strip() if lines else ""
        if not token:
            raise AtodError(f"{path}: the token file is empty")
        return token
    return os.environ.get(TOKEN_VARIABLE, "").strip()
