"""What the GPU script's parts are told, and where they write what they have found so far."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SO_FAR = ".so-far.json"
"""In the output folder: what a part has found so far."""


@dataclass(frozen=True)
class Setting:
    """What every part is told.

    Attributes:
        device: ``"cuda"``, or ``"cpu"`` in a rehearsal.
        toy: sizes that a CPU runs in seconds.
        out: folder for whatever a part writes.
        deadline: when its seconds are over, on the clock of :func:`time.monotonic`.
    """

    device: str
    toy: bool
    out: Path
    deadline: float = float("inf")

    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.monotonic()

    def keep(self, found: dict[str, Any]) -> dict[str, Any]:
        """Write down what a part has found so far, for the case that its seconds are over; the same numbers."""
        aside = self.out / ".so-far.part"
        aside.write_text(json.dumps(found))
        aside.replace(self.out / SO_FAR)
        return found

    def sync(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
