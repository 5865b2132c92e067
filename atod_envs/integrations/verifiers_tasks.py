"""A verifiers taskset as an environment of ours: each message to the model is an observation, its reply an action.

    env = wrap(partial(TasksetGame, taskset), key="riddles", about="riddles in words")
    env = wrap(partial(TasksetGame, environment=environment), key="game")     # several turns: a verifiers Env

A plain taskset's episode is one prompt and one reply. An ``Env`` with one agent is played turn by turn: its ``run``
holds the conversation (``agents.NAME.interaction(task)``), and this module answers in the agent's place. The reward is
the sum of the trace's rewards, the task's own among them. The invariant: the same task and the same replies give the
same conversation as verifiers' own run of it, and what needs more than text in this process is refused by name.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from inspect import signature
from types import SimpleNamespace
from typing import Any

from atod_envs.errors import AtodError
from atod_envs.integrations.foreign import SPLITS
from atod_envs.tasks import dealt

try:
    import verifiers.v1 as vf
except ImportError as error:
    raise ImportError(
        "this needs verifiers: pip install 'atod[verifiers]' (in another virtual environment than openenv: they pin different "
        "versions of mcp)"
    ) from error

SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}
"""Split -> the share of the tasks that falls to it, by the hash of their keys."""


class TasksetGame:
    """A taskset with Gymnasium's ``reset`` and ``step``, for ``wrap`` and ``register``.

    Args:
        taskset: the tasks; by default those of the environment.
        environment: plays a task; by default each task is one prompt and one reply.

    Raises:
        AtodError: it needs what a text environment cannot give (tools, containers, judges, several agents); names it.
    """

    def __init__(self, taskset: Any = None, environment: Any = None) -> None:
        if taskset is None and environment is None:
            raise AtodError("TasksetGame: give a verifiers taskset, or an environment with one")
        self._env = environment
        taskset = environment.taskset if taskset is None else taskset
        name = type(taskset).__name__
        if not taskset.bounded:
            raise AtodError(f"{name} has no end; bound it with take(n)")
        if type(taskset).toolsets(taskset.config):
            raise AtodError(f"{name} has tool servers (toolsets), which a text environment does not start")
        self._seat = _seat(environment)
        self._parts: dict[str, list[Any]] = {split: [] for split in SPLITS}
        for task in taskset:
            self._parts[dealt(task.key, SHARES)].append(task)
        held = sorted(f"{task.key} {task.hash}" for part in self._parts.values() for task in part)
        digest = hashlib.blake2b("\n".join(held).encode(), digest_size=4).hexdigest()
        self.data_version = f"{type(taskset).__module__}.{name}/{digest}"
        self._loop = asyncio.new_event_loop()
        self._run: asyncio.Task[None] | None = None
        self._asked: list[str] = []
        self._reply: asyncio.Future[str] | None = None
        self._trace: Any = None

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        """Begin the task of a seed; further seeds than tasks begin them again.

        Raises:
            AtodError: the split has no task, or the task cannot be played.
        """
        self._end()
        place, number = divmod(seed, 1_000_000)
        split = list(SPLITS)[place]
        own = self._parts[split]
        if not own:
            raise AtodError(
                f"the taskset has no task in split {split!r}: {', '.join(f'{len(t)} in {s}' for s, t in self._parts.items())}; it needs "
                "more tasks"
            )
        task = own[number % len(own)]
        _require_text(task)
        self._run = self._loop.create_task(self._play(task))
        message = self._advance()
        if message is None:
            raise AtodError(f"{_name(task)} ended before the model was asked")
        return message, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Reply, and read the next message; the reward comes with the end."""
        assert self._reply is not None
        self._reply.set_result(action)
        message = self._advance()
        if message is not None:
            return message, 0.0, False, False, {}
        return "The task is over.", float(self._trace.reward), True, False, {}

    def close(self) -> None:
        """End the present task."""
        self._end()
        self._loop.close()

    # --- the conversation ---------------------------------------------------------------------------------------------

    def _advance(self) -> str | None:
        """Let the environment go on until it asks the model; None where it has ended."""
        assert self._run is not None

        async def wait() -> None:
            assert self._run is not None
            while not self._asked and not self._run.done():
                await asyncio.wait({self._run}, timeout=0.001)

        self._loop.run_until_complete(wait())
        if self._asked:
            return self._asked.pop()
        self._run.result()  # raises what it raised
        return None

    def _end(self) -> None:
        if self._run is not None and not self._run.done():
            self._run.cancel()
            self._loop.run_until_complete(asyncio.wait({self._run}))
        self._run, self._asked = None, []

    async def _ask(self, trace: Any, message: str) -> str:
        """Show the model a message, and wait for its reply."""
        self._note(trace, vf.UserMessage(content=message), sampled=False)
        system = trace.task.data.system_prompt
        self._asked.append(f"{system}\n\n{message}" if system and len(trace.nodes) <= 2 else message)
        self._reply = self._loop.create_future()
        reply = await self._reply
        self._note(trace, vf.AssistantMessage(content=reply), sampled=True)
        return reply

    @staticmethod
    def _note(trace: Any, message: Any, *, sampled: bool) -> None:
        parent = len(trace.nodes) - 1 if trace.nodes else None
        trace.nodes.append(vf.MessageNode(parent=parent, message=message, sampled=sampled))

    def _begin(self, task: Any) -> Any:
        """An empty record of a task that can be played with text alone."""
        _require_text(task)
        about = vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
        self._trace = vf.Trace(task=about, agent=vf.AgentInfo(config=vf.AgentConfig(), name=self._seat))
        if task.data.system_prompt:
            self._note(self._trace, vf.SystemMessage(content=task.data.system_prompt), sampled=False)
        return self._trace

    async def _play(self, task: Any) -> None:
        if self._env is None:
            await self._once(task)
            return
        agent = SimpleNamespace(run=self._once, interaction=self._interaction, trainable=True)
        agents = SimpleNamespace(**{self._seat: agent})
        await self._env.setup(agents)
        await self._env.run(task, agents)

    async def _once(self, task: Any) -> Any:
        """What an agent's ``run`` does: the prompt, the reply, the score."""
        trace = self._begin(task)
        await self._ask(trace, task.data.prompt_text)
        await task.score(trace)
        return trace

    @asynccontextmanager
    async def _interaction(self, task: Any) -> AsyncIterator[Any]:
        """What an agent's ``interaction`` does: a conversation, scored when it is closed."""
        trace = self._begin(task)

        async def turn(message: str | None = None) -> Any:
            reply = await self._ask(trace, task.data.prompt_text if message is None else message)
            said = vf.AssistantMessage(content=reply)
            return SimpleNamespace(messages=[said], root_reply=None, terminated=False, last_reply=reply.strip())

        yield SimpleNamespace(trace=trace, turn=turn)
        await task.score(trace)


def _seat(environment: Any) -> str:
    """The name of an environment's one agent."""
    if environment is None:
        return "agent"
    kind = type(environment)
    seats: list[str] = [name for name, value in environment.config if isinstance(value, vf.AgentConfig)]
    if len(seats) != 1:
        raise AtodError(f"{kind.__name__} has {len(seats)} agents ({', '.join(seats)}); a text environment is for one")
    for hook in ("start", "stop", "finalize"):
        if getattr(kind, hook) is not getattr(vf.Env, hook):
            raise AtodError(f"{kind.__name__}.{hook} needs verifiers' own run of an episode")
    return seats[0]


def _require_text(task: Any) -> None:
    """Refuse a task that needs more than text in this process; names what."""
    kind, data = type(task), task.data
    needs = {
        "a container": kind.NEEDS_CONTAINER or data.image is not None,
        "tool servers (toolsets)": bool(kind.toolsets(task.config)),
        "setup in a runtime": kind.setup is not vf.Task.setup,
        "finalize in a runtime": kind.finalize is not vf.Task.finalize,
        "a judge": bool(task.plugged_judges()),
        "stop conditions": bool(task.hooks("stop")),
        "a prompt that is no text": not _is_text(data.prompt),
        **{f"a runtime for {fn.__name__}": "runtime" in signature(fn).parameters for fn in task.hooks("reward")},
    }
    lacking = [what for what, needed in needs.items() if needed]
    if lacking:
        raise AtodError(f"{_name(task)} needs {', '.join(lacking)}; a text environment has no such thing")


def _is_text(prompt: Any) -> bool:
    """Whether a prompt is text, or one message of text."""
    if prompt is None or isinstance(prompt, str):
        return True
    return all(isinstance(message.content, str) and message.role == "user" for message in prompt) and len(prompt) == 1


def _name(task: Any) -> str:
    name: str = task.data.name or task.key
    return f"{type(task).__name__} {name}"


__all__ = ["TasksetGame"]
