"""Runs training in forked children that die where they are told to; spoken to in JSON lines (see test_faults.py).

One process imports everything once and never computes; each run is a fork of it.
"""

import json
import os
import shutil  # noqa: F401
import signal
import sys
import threading
import traceback

import torch
import torch.utils.tensorboard
import toyworld  # noqa: F401

from agents.models import load_model
from atod_algos.atod import ATOD
from atod_algos.learner import learner, optimizer  # noqa: F401
from atod_algos.training import checkpoint, cli, console, trainer  # noqa: F401

PLACES = {
    "load": "agents.models.accept",
    "rollout": "agents.policy.Policy.submit",
    "scoring": "atod_algos.teachers.local.score",
    "update": "atod_algos.learner.optimizer.Updater.update",
    "evaluation": "atod_algos.training.panels.evaluate",
    "log": "atod_algos.training.run_dir.RunFolder.log",
    "finish": "atod_algos.training.run_dir.RunFolder.finish",
    "store": "atod_algos.training.run_dir.RunFolder.store",
    "weights": "torch.save",
    "fsync": "os.fsync",
    "rename": "pathlib.Path.rename",
    "remove": "shutil.rmtree",
}


def die(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def die_at(place, count, after, number):
    """Get a signal at (or just after) the count-th call of a function."""
    owner, _, name = PLACES[place].rpartition(".")
    target = sys.modules.get(owner)
    if target is None:
        module, _, cls = owner.rpartition(".")
        target = getattr(sys.modules[module], cls)
    honest, calls = getattr(target, name), [0]

    def call(*arguments, **options):
        calls[0] += 1
        if calls[0] == count and not after:
            die(number)
        answer = honest(*arguments, **options)
        if calls[0] == count and after:
            die(number)
        return answer

    setattr(target, name, call)


def child(order):
    out = open(order["out"], "w")  # noqa: SIM115
    os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
    torch.set_num_threads(1)
    if order.get("place"):
        die_at(order["place"], order["count"], order.get("after", False), order.get("signal", signal.SIGKILL))
    if order.get("seconds"):
        threading.Timer(order["seconds"], die).start()
    if order.get("file_bytes"):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"], order["file_bytes"]))
    try:
        cli.main(ATOD, order["arguments"])
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def serve():
    for folder in sys.argv[1:]:
        load_model(folder, "student")  # so that what is imported late is imported once
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = child(order)
            sys.stdout.flush()
            os._exit(code)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status)
        print(json.dumps({"killed": killed, "code": None if killed else os.WEXITSTATUS(status)}), flush=True)


if __name__ == "__main__":
    serve()
