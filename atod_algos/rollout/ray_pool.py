"""Episodes on a Ray cluster: workers hold environments and an engine each, groups are work.

A worker takes groups as it has room for them, and takes more as its own end, so a slow one holds up nothing but what it
holds. Weights go through Ray's object store: once a step into it, once for each node out of it. A worker that dies or
falls silent is replaced, and what it had taken is played again. Every process of the cluster is started once and stays:
starting one costs more than a small rollout.

The invariant: every group is in the result exactly once, played with the weights of that call. Seeds come from the
specs, so who played makes no difference.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atod_algos.algorithm import RolloutLimits
from atod_algos.rollout.episodes import OnFinish
from atod_algos.rollout.groups import require_few_lost
from atod_algos.rollout.pools import Conditions, LocalPool, Weights
from atod_algos.rollout.work_queue import WorkQueue
from atod_algos.turn_plans import EpisodeSpec
from atod_envs.errors import AtodError
from atod_envs.trajectory import Trajectory

log = logging.getLogger(__name__)

_START_SECONDS = 300.0
"""A worker that has not loaded its model by then will not."""
_LOSSES = 8
"""Workers that may be lost in one step before the run stops."""


class _Worker:
    """Runs in a process of the cluster."""

    def __init__(self, make_pool: Callable[[], LocalPool]) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._pool = make_pool()
        self._load: int | None = None

    def ready(self) -> int:
        return os.getpid()

    def play(
        self,
        under: Conditions,
        specs: Sequence[EpisodeSpec],
        limits: RolloutLimits | None,
        weights: list[Any],
        version: int,
        load: int,
        work: Any,
        call: int,
    ) -> tuple[list[int], list[Trajectory]]:
        """Play groups until none are left; returns the places of their episodes, and the episodes.

        ``load`` numbers the weights that the driver gave out. ``version`` does not: the final table plays several
        models after the same step.
        """
        import ray

        try:
            if self._load != load:
                # The reference comes inside a list, so that Ray does not fetch the weights for workers that have them.
                self._pool.load_weights(ray.get(weights[0]).items(), version)
                self._load = load
            places: list[int] = []
            refused_at = -1

            def more(room: int, finished: int) -> list[EpisodeSpec] | None:
                nonlocal refused_at
                if finished == refused_at:  # it holds its share, and none of it has ended since it last asked
                    return []
                taken = ray.get(work.take.remote(call, room, len(places) - finished))
                if taken is None:
                    return None
                refused_at = -1 if taken else finished
                places.extend(taken)
                return [specs[place] for place in taken]

            return places, self._pool.play((), under, limits, more=more, whole=len(specs))
        except Exception as error:  # not every exception survives the way to the driver; its words do
            raise AtodError(f"{type(error).__name__}: {error}") from None


class RayPool:
    """Plays on a Ray cluster: the one that $RAY_ADDRESS names, or one that is started on this machine.

    Args:
        make_pool: builds a worker's engine and environments; sent to the workers.
        workers: how many rollout workers there are.
        cpus: CPU cores that Ray sets aside for each.
        gpus: GPUs for each.
        patience: seconds after which a worker that has not come to the end of a step's episodes counts as lost.

    Raises:
        AtodError: Ray is not installed, cannot be reached, or the cluster is too small.
    """

    def __init__(
        self,
        make_pool: Callable[[], LocalPool],
        *,
        workers: int,
        cpus: float = 1.0,
        gpus: float = 0.0,
        patience: float = 1800.0,
    ) -> None:
        self._ray = ray = _ray()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._make, self._wanted = make_pool, (workers, cpus, gpus)
        self.patience = patience
        self._own = not ray.is_initialized()
        if self._own:
            _connect(ray)
        _require_resources(ray, *self._wanted)
        self._actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(_Worker)
        # Next to the driver: a node that is lost must not take the list of what is to be done with it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._work = ray.remote(num_cpus=0)(WorkQueue).options(scheduling_strategy=here).remote()
        self.calls = 0
        self._weights: Any = None
        self._version, self._loads = -1, 0
        self._workers: list[Any] = []
        self.pids: list[int] = []
        self._start(workers)

    def load_weights(self, weights: Weights, version: int, truth: Any | None = None) -> None:
        """Put the weights into the object store; workers fetch and check them with their next groups."""
        self._weights = self._ray.put({name: tensor.detach().cpu() for name, tensor in weights})
        self._version = version
        self._loads += 1

    def rest(self) -> None:
        """Nothing: the workers have machines, or shares of them, of their own."""

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        for worker in [*self._workers, self._work]:
            self._ray.kill(worker)
        self._workers = []
        if self._own:
            self._ray.shutdown()

    # --- work --------------------------------------------------------------------------------------------------------

    def play(
        self,
        specs: Sequence[EpisodeSpec],
        under: Conditions,
        limits: RolloutLimits | None = None,
        on_finish: OnFinish | None = None,
    ) -> list[Trajectory]:
        """Play all episodes on whichever workers are free; see ``RolloutPool.play``."""
        if self._weights is None:
            raise AtodError("the workers have no weights yet; call load_weights before play")
        work, everything = self._work, self._ray.put(list(specs))
        self._ray.get(work.begin.remote([spec.group_id for spec in specs], len(self._workers), self.calls))
        finished: dict[int, Trajectory] = {}
        running: dict[Any, _Call] = {}

        def give(worker: Any) -> None:
            weights = ([self._weights], self._version, self._loads)
            future = worker.play.remote(under, everything, limits, *weights, work, self.calls)
            running[future] = _Call(worker, self.calls, time.monotonic())
            self.calls += 1

        for worker in self._workers:
            give(worker)
        losses = shown = 0
        while running:
            done, _ = self._ray.wait(list(running), num_returns=1, timeout=min(1.0, self.patience))
            for future in [*done, *self._silent(running, done)]:
                call = running.pop(future)
                answer = self._answer(future) if future in done else None
                if answer is not None:
                    finished.update(zip(*answer, strict=True))
                    continue
                losses += 1
                if losses > _LOSSES:
                    raise AtodError(
                        f"{losses} rollout workers were lost in one step; look at the nodes' memory and at Ray's logs. The same "
                        "command goes on from the last checkpoint"
                    )
                log.warning("a rollout worker was lost; what it had taken is played again")
                self._ray.get(work.give_back.remote(call.number))
                give(self._replace(call.worker))
            if on_finish is not None and (now := self._ray.get(work.finished.remote())) > shown:
                shown = now
                on_finish(shown)
        if on_finish is not None and shown < len(specs):
            on_finish(len(specs))
        played = [finished[place] for place in range(len(specs))]
        require_few_lost(played, under.tolerated)
        return played

    def _answer(self, future: Any) -> tuple[list[int], list[Trajectory]] | None:
        """What a call returned; None if its worker died.

        Raises:
            AtodError: the worker is alive but could not play (a retriever that is down, an environment that raised).
        """
        from ray.exceptions import RayActorError, RayTaskError

        try:
            places, trajectories = self._ray.get(future)
            return places, trajectories
        except RayActorError:
            return None
        except RayTaskError as error:
            raise AtodError(f"a rollout worker failed: {error.cause}") from error

    def _silent(self, running: dict[Any, _Call], done: Sequence[Any]) -> list[Any]:
        late = time.monotonic() - self.patience
        return [future for future, call in running.items() if call.since < late and future not in done]

    def _replace(self, lost: Any) -> Any:
        self._ray.kill(lost)  # it may be alive and merely silent
        place = self._workers.index(lost)
        del self._workers[place], self.pids[place]
        self._start(1)
        return self._workers[-1]

    def _start(self, count: int) -> None:
        """Start workers and wait until they have loaded their model."""
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        fresh = [self._actor.remote(self._make) for _ in range(count)]
        try:
            self.pids += self._ray.get([worker.ready.remote() for worker in fresh], timeout=_START_SECONDS)
        except GetTimeoutError as error:
            workers, cpus, gpus = self._wanted
            raise AtodError(
                f"a rollout worker did not start within {_START_SECONDS:.0f} s; the cluster has {_resources(self._ray)}, each of "
                f"{workers} workers takes {cpus:g} CPUs and {gpus:g} GPUs"
            ) from error
        except (RayActorError, RayTaskError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise AtodError(f"a rollout worker could not start: {reason}") from error
        self._workers += fresh


@dataclass(slots=True)
class _Call:
    worker: Any
    number: int
    since: float


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise AtodError("--cluster ray needs Ray: pip install 'atod[ray]'") from error
    return ray


def _worker_env(variables: Mapping[str, str]) -> dict[str, Any]:
    """Ray's ``runtime_env`` for workers with these environment variables.

    Ray starts workers through a shell and does not quote the path of Python, so a path with a blank is quoted here.
    On a cluster that runs already, the path is the cluster's own affair.
    """
    quoted = shlex.quote(sys.executable)
    if quoted == sys.executable or os.environ.get("RAY_ADDRESS"):
        return {"env_vars": dict(variables)}
    return {"env_vars": dict(variables), "py_executable": quoted}


def start_ray(ray: Any, variables: Mapping[str, str], **options: Any) -> None:
    """Connect to a cluster, or start one; this process's answer to SIGTERM stays, which Ray would replace by its own.

    Args:
        ray: the module.
        variables: environment variables of the workers.
        options: further ones of ``ray.init``.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(include_dashboard=False, log_to_driver=False, runtime_env=_worker_env(variables), **options)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _connect(ray: Any) -> None:
    # By default Ray's workers give way to everything else on a machine (niceness 15): here the learner waits for them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Workers must find what the driver finds: a registered environment may live in the folder it was started from.
    paths = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    variables = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        start_ray(ray, variables, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = os.environ.get("RAY_ADDRESS", "this machine")
        raise AtodError(
            f"no Ray cluster at {where}: {error}; start one with `ray start --head`, or unset RAY_ADDRESS to use this machine alone"
        ) from error


def _require_resources(ray: Any, workers: int, cpus: float, gpus: float) -> None:
    held = ray.cluster_resources()
    for kind, each in (("CPU", cpus), ("GPU", gpus)):
        if each * workers > held.get(kind, 0.0) + 1e-6:
            raise AtodError(
                f"{workers} rollout workers of {each:g} {kind} each do not fit: the cluster has {_resources(ray)}; lower --workers "
                f"or take less for each: --cluster ray:{kind.lower()}s=N"
            )


def _resources(ray: Any) -> str:
    held = ray.cluster_resources()
    return f"{held.get('CPU', 0):g} CPUs and {held.get('GPU', 0):g} GPUs"
