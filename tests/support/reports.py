"""Small runs on the toy world, and what is in their pages."""

import base64
import gzip
import json
import re

from toyworld import TOY


def options_of(models, run, *more):
    return [
        "--env", TOY, "--student", str(models["student"]), "--teacher", str(models["teacher"]), "--style", "compact",
        "--max-turns", "3", "--max-response", "8", "--max-context", "128", "--tasks-per-step", "4", "--group-size", "4",
        "--eval-every", "2", "--eval-tasks", "4", "--report-tasks", "4", "--checkpoint-every", "2", "--minibatches", "2",
        "--threads", "1", "--steps", "4", "--gap-clip", "2", "--run", str(run), *more,
    ]  # fmt: skip


def unpack(page):
    blob = re.search(r'id="data">([^<]*)<', page.read_text(encoding="utf-8"))[1]
    return json.loads(gzip.decompress(base64.b64decode(blob)))
