"""Runs training, one process or several ranks of it, or other code in forked children; spoken to in JSON lines.

One process imports everything once and never computes; each run is a fork of it (see ``runner`` in
``tests/algos/conftest.py``). A run dies where it is told to. Ranks are started as torchrun starts them: they find their
numbers in the environment.
"""

import atexit
import json
import os
import runpy
import shutil  # noqa: F401
import signal
import socket
import sys
import threading
import traceback

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.utils.tensorboard
import toyworld  # noqa: F401

from agents.models import load_model
from atod_algos import atod, grpo  # noqa: F401
from atod_algos.algorithm import find_algorithm
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
    out = open(order["out"], "a")  # noqa: SIM115
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
        if "code" in order:
            exec(order["code"], {})
        elif "module" in order:
            sys.argv[1:] = order["arguments"]
            runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
        else:
            cli.main(find_algorithm(order.get("algorithm", "atod")), order["arguments"])
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
        open(order["out"], "w").close()
        ranks = order.get("ranks", 0)
        settings = list(rank_settings(ranks)) if ranks else [{}]
        running, first = {start(order, own) for own in settings}, 0
        while running:
            pid, status = os.wait()
            running.discard(pid)
            first = first or status
            for other in running if status else ():  # they would wait for it
                os.kill(other, signal.SIGKILL)
        killed = os.WIFSIGNALED(first)
        print(json.dumps({"killed": killed, "code": None if killed else os.WEXITSTATUS(first)}), flush=True)


def start(order, environment):
    """A run, or a rank of one, in a process of its own; its number."""
    pid = os.fork()
    if pid == 0:
        os.environ.update(environment)
        code = child(order)
        sys.stdout.flush()
        if environment:
            atexit._run_exitfuncs()  # ranks take their leave of each other
        os._exit(code)
    return pid


def rank_settings(ranks):
    """What torchrun tells each of its processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    for rank in map(str, range(ranks)):
        own = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        yield {**own, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}


if __name__ == "__main__":
    serve()
    os._exit(0)  # there is nothing to put away, and putting PyTorch away takes seconds
