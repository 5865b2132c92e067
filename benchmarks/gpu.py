"""``benchmarks/gpu.sh``'s parts, one process each: one that fails or takes too long is recorded, the rest goes on.

    python benchmarks/gpu.py --rehearse           all parts at toy size on the CPU
    python benchmarks/gpu.py --parts engine memory

The parent imports everything once and touches no GPU; each part is a fork of it, with a GPU context of its own. Written
after every part: OUT/gpu.json and OUT/gpu.md. What a part printed is in OUT/PART.log.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu_setting import SO_FAR, Setting

# Asking whether there is a GPU must not open it before the forks.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "--rehearse" in sys.argv:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

_LEAST = 10.0
"""A part is not begun with fewer seconds left."""


Work = Callable[[Setting], "dict[str, Any]"]


def parts() -> dict[str, tuple[float, Work]]:
    """Name -> seconds and what is done, in order; what matters most comes first."""
    import gpu_checks as checks
    import gpu_speed as speed
    import gpu_train as train

    return {
        "device": (20, speed.device),
        "log-probs": (60, checks.logprobs),
        "weights": (20, checks.weights),
        "packing": (45, checks.packing),
        "algorithms": (60, checks.algorithms),
        "memory": (45, speed.memory_used),
        "adamw8bit": (20, speed.eight_bits),
        "offload": (20, speed.offload),
        "engine": (100, speed.engine),
        "learner": (30, speed.learner),
        "train": (400, train.train),
    }


def run_part(work: Work, setting: Setting, name: str, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own, and end that when its seconds are over.

    Returns:
        ``status`` (done, failed, stopped), ``seconds``, and the part's numbers or the error's last line.
    """
    answer = setting.out / f".{name}.json"
    so_far = setting.out / SO_FAR
    answer.unlink(missing_ok=True)
    so_far.unlink(missing_ok=True)
    began = time.monotonic()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        status = 1
        with open(setting.out / f"{name}.log", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.stdout = sys.stderr = log
            try:
                found = work(Setting(setting.device, setting.toy, setting.out, began + seconds))
                answer.write_text(json.dumps({"numbers": found}))
                status = 0
            except BaseException as error:
                traceback.print_exc()
                last = (str(error).strip().splitlines() or [""])[0]
                answer.write_text(json.dumps({"error": f"{type(error).__name__}: {last}"}))
        os._exit(status)
    over = False
    while not over and time.monotonic() - began < seconds + 2:
        over = os.waitpid(child, os.WNOHANG)[0] != 0
        if not over:
            time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # whatever the part started ends with it
    if not over:
        os.waitpid(child, 0)
    took = round(time.monotonic() - began, 2)
    kept = {"numbers": json.loads(so_far.read_text())} if so_far.is_file() else {}
    so_far.unlink(missing_ok=True)
    if answer.is_file():
        found = json.loads(answer.read_text())
        answer.unlink()
        return {"status": "failed" if "error" in found else "done", "seconds": took, **kept, **found}
    end = "died without a word" if over else f"was not done in {seconds:.0f} s"
    return {"status": "stopped", "seconds": took, **kept, "error": f"{end}; see {name}.log"}


def markdown(result: dict[str, Any]) -> str:
    """The table of everything."""
    lines = [
        f"# {result['title']}",
        "",
        f"{result['when']}, {result['seconds']:.0f} s in all" + (", toy sizes on a CPU: the numbers mean nothing" if result["toy"] else ""),
        "",
        "| part | quantity | value |",
        "|---|---|---:|",
    ]  # fmt: skip
    for name, part in result["parts"].items():
        note = part.get("error") or part.get("note") or ""
        lines.append(f"| **{name}** | {part['status']}, {part.get('seconds', 0):.1f} s | {note.replace('|', '/')} |")
        lines += [f"| | {what} | {_shown(value)} |" for what, value in part.get("numbers", {}).items()]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "/")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; the exit status is 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--seconds", type=float, default=600.0, help="for all parts together")
    parser.add_argument("--parts", nargs="+", help="some of them")
    options = parser.parse_args(arguments)
    if options.rehearse:
        import torch

        torch.set_num_threads(1)
    elif not _gpu():
        parser.error("there is no GPU that torch can use here; --rehearse runs all parts at toy size on the CPU")
    all_parts = parts()
    unknown = [name for name in options.parts or () if name not in all_parts]
    if unknown:
        parser.error(f"--parts {unknown[0]}: expected some of {', '.join(all_parts)}")
    options.out.mkdir(parents=True, exist_ok=True)
    setting = Setting("cpu" if options.rehearse else "cuda", options.rehearse, options.out)
    _import_everything()
    began = time.monotonic()
    result: dict[str, Any] = {
        "title": f"ATOD on {platform.node() if options.rehearse else 'a GPU'}", "toy": options.rehearse,
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "seconds": 0.0, "parts": {},
    }  # fmt: skip
    for name, (seconds, work) in all_parts.items():
        if options.parts and name not in options.parts:
            continue
        left = options.seconds - (time.monotonic() - began)
        if left < min(_LEAST, seconds):
            found = {"status": "skipped", "note": f"{left:.0f} s were left of {options.seconds:.0f}"}
        else:
            found = run_part(work, setting, name, min(seconds, left) if not options.rehearse else options.seconds)
        result["parts"][name] = found
        result["seconds"] = time.monotonic() - began
        (options.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "gpu.md").write_text(markdown(result))
        print(
            f"{name:12} {found['status']:8} {found.get('seconds', 0):6.1f} s  {found.get('error', found.get('note', ''))}",
            flush=True,
        )
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(
        f"{result['seconds']:.0f} s, {sum(u.ru_utime + u.ru_stime for u in used):.0f} of the CPU; {options.out / 'gpu.md'}"
    )
    return int(any(part["status"] in ("failed", "stopped") for part in result["parts"].values()))


def _gpu() -> bool:
    """Whether torch can use a GPU; asked in a fork, for a process that has asked may not fork any more."""
    import torch

    child = os.fork()
    if child == 0:
        os._exit(0 if torch.cuda.is_available() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _import_everything() -> None:
    """What parts need, so that no fork imports it again."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, Qwen3ForCausalLM  # noqa: F401

    import atod_algos.training.sft
    import atod_algos.training.trainer  # noqa: F401

    if not hasattr(os, "fork"):
        raise SystemExit("error: parts are forked; this system cannot")
    assert torch.__version__ and transformers.__version__


if __name__ == "__main__":
    sys.exit(main())
