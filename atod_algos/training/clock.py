"""What a step's phases take: seconds, CPU seconds and memory."""

from __future__ import annotations

import time

import torch

from atod_algos.batch import TokenBatch
from atod_algos.learner import memory


class Clock:
    """Seconds, and the highest use of memory, by phase.

    Args:
        device: whose memory is meant.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._laps: dict[str, float] = {}
        self._peaks: dict[str, float] = {}
        memory.start_peak(self._device)
        self._last, self._cpu = time.perf_counter(), time.process_time()

    def lap(self, name: str) -> None:
        """End a phase."""
        self._peaks[f"memory/{name}_peak_mib"] = memory.peak(self._device) / memory.MIB
        memory.start_peak(self._device)
        now = time.perf_counter()
        self._laps[name], self._last = now - self._last, now

    def metrics(self, batch: TokenBatch) -> dict[str, float]:
        """Seconds and peaks of the step's phases, CPU seconds of this process over all its threads, tokens a second."""
        total = sum(self._laps.values())
        rows = sum(len(row) for row in batch.rows)
        return (
            self._peaks
            | {f"time/{name}": seconds for name, seconds in self._laps.items()}
            | {
                "time/step": total,
                "time/cpu": time.process_time() - self._cpu,
                "speed/tokens_per_second": rows / total,
                "speed/sampled_per_second": batch.n_tokens / self._laps["rollout"],
            }
        )
