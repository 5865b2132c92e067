"""What defines an evaluation: the agent, its sampling, the panels. Equal settings give equal numbers.

The invariant: nothing that changes a number is left out of ``settings_of``; a folder is refused to any other evaluation
by comparing it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import gymnasium as gym

import atod_envs
from agents.api import server_address
from agents.chat import CHAT_DATE, ThinkingMode
from agents.gguf import gguf_file
from atod_algos.rollout.layouts import LayoutName
from atod_envs.errors import AtodError
from atod_envs.options import put_before, read_options, refuse_settings, require_splits
from atod_envs.text_env import TextEnv

_USUAL: dict[str, Any] = {"thinking": ("off", None), "chat_date": (CHAT_DATE, None), "layout": ("auto", None)}
"""Left out of the settings where it is as ever, so that evaluations from before there was a choice can be compared."""
_SERVERS_OWN = ("max_context", "thinking", "chat_date")
"""What a server decides by itself."""
PANEL_SIZE = 512
"""Tasks of a panel that names no size; all of a smaller split (the official ALFWorld's 140 and 134)."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a policy, or compare two evaluations."""

    env: str = "atod/ALFWorld-v0"
    """Registered id of the environment."""
    agent: str = "builtin"
    """Who plays: random, expert, api:MODEL (an OpenAI-compatible server), builtin, builtin:teacher, or a model's folder
    or hub id."""
    data: str | None = None
    """Data folder of the environment; by default its own variable, else the built-in world."""
    panels: tuple[str, ...] = ()
    """Panels, e.g. valid_seen/all valid_unseen/256; by default the splits for choosing and for reporting, up to 512
    tasks each."""
    seeds: tuple[int, ...] = (0,)
    """Every panel is played once with each."""
    out: Path | None = None
    """Where to store it; by default evaluations/<agent>-<environment>."""
    style: str | None = None
    """Prompt style; this, the next five and --option: by default those of the run that a checkpoint comes from, else of
    its profile."""
    layout: LayoutName | None = None
    """How turns become prompts, as in training: 'window' (each stands alone), 'turns' or 'trajectory' (the whole
    conversation), 'auto' (what the style is made for)."""
    max_turns: int | None = None
    """Turn limit."""
    max_response: int | None = None
    """Longest response, in tokens."""
    max_context: int | None = None
    """Longest prompt plus response, in tokens (models run here)."""
    temperature: float | None = None
    """Sampling temperature; 0 is greedy."""
    thinking: ThinkingMode | None = None
    """Thoughts of the chat template: off, on or keep; like --chat-date by default that of the run, else off."""
    chat_date: str | None = None
    """Date that chat templates are told."""
    concurrency: int = 64
    """Episodes at the same time; for a server: requests."""
    option: tuple[str, ...] = ()
    """Any other arguments of the environment, as name=value; they stand after those of the run or the profile, and
    win."""
    api_base: str = ""
    """Server's address up to /v1; by default $OPENAI_BASE_URL. Its key is read from $OPENAI_API_KEY."""
    api_timeout: float = 120.0
    """Seconds until a request counts as lost and is tried again."""
    api_retries: int = 6
    """Further tries of a request."""
    api_extra: str = "{}"
    """Further fields of each request, as JSON."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where a model runs."""
    compare: tuple[Path, Path] | None = None
    """Two finished evaluations to compare task by task, instead of playing."""
    verbose: bool = False
    """Log more."""


@dataclass(frozen=True, slots=True)
class Panel:
    """A fixed list of tasks.

    Attributes:
        name: ``split/size``.
        split: the split.
        tasks: task ids in the panel's order.
        data_version: what the tasks are made of, as the environment says.
        env_key: the environment's key.
    """

    name: str
    split: str
    tasks: tuple[str, ...] = field(repr=False)
    data_version: str = ""
    env_key: str = ""

    @property
    def digest(self) -> str:
        """Names the very tasks: equal digests, equal panels."""
        return hashlib.blake2b("\n".join(self.tasks).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are asked for, of what environment; for agents without a model, the environment alone."""

    option: tuple[str, ...] = ()
    style: str | None = None
    layout: LayoutName | None = None
    max_turns: int | None = None
    max_response: int | None = None
    max_context: int | None = None
    temperature: float | None = None
    thinking: ThinkingMode | None = None
    chat_date: str | None = None


def read_panels(make: Callable[[str], TextEnv], names: Sequence[str]) -> list[Panel]:
    """Panels by name: ``split``, ``split/all`` or ``split/size``.

    Args:
        make: makes the environment of a split.
        names: the names.

    Raises:
        AtodError: a size is no number, or the split holds fewer tasks.
    """
    panels = []
    for name in names:
        split, _, size = name.partition("/")
        env = make(split)
        tasks = env.tasks
        if size == "all":
            count = len(tasks)
        elif not size:
            count = min(PANEL_SIZE, len(tasks))
        elif size.isdecimal() and 0 < int(size) <= len(tasks):
            count = int(size)
        else:
            raise AtodError(f"panel {name!r}: expected a size from 1 to {len(tasks)}, or all")
        panels.append(Panel(f"{split}/{count}", split, tasks.panel(count), env.data_version, env.env_key))
        env.close()
    return panels


def sampling_of(config: EvaluateConfig) -> Sampling:
    """The sampling: as given, else that of the run that a checkpoint comes from, else of the agent's profile."""
    scripted, served = config.agent in ("random", "expert"), config.agent.startswith("api:")
    known = [f.name for f in dataclasses.fields(Sampling) if f.name not in ("option", "max_turns")]
    idle = known if scripted else _SERVERS_OWN if served else ()
    if given := [name for name in idle if getattr(config, name) is not None]:
        raise AtodError(f"--{given[0].replace('_', '-')} means nothing for --agent {config.agent}; leave it out")
    if scripted:
        return Sampling(option=config.option, max_turns=config.max_turns)
    from atod_algos.training.config import TrainConfig, resolve
    from atod_algos.training.run_dir import read_settings

    builtin = config.agent.partition(":")[0] == "builtin"
    profile = dataclasses.asdict(resolve(TrainConfig(env=config.env, student="builtin" if builtin else config.agent)))
    folder = Path(config.agent).expanduser().absolute()
    run = Path(os.path.normpath(folder)).parent.parent
    if not builtin and folder.is_dir() and all((run / name).is_file() for name in ("config.json", "metrics.jsonl")):
        trained = read_settings(run, "train")
        worlds = [*trained.get("worlds", {}).values()] or [trained["train"]]
        own = next((world for world in worlds if world["env"] == config.env), None)
        profile |= {n: value for n, value in trained["train"].items() if n not in ("env", "max_turns", "option")}
        profile |= own or {}  # an environment that the run never played has its own turn limit and options
    profile = {**profile, "temperature": profile["eval_temperature"]}
    if served:
        profile |= dict.fromkeys(_SERVERS_OWN)
    first = profile["option"] if profile["env"] == config.env else ()
    option = put_before(first, config.option)
    names = [f.name for f in dataclasses.fields(Sampling) if f.name != "option"]
    return Sampling(option, **{n: profile[n] if getattr(config, n) is None else getattr(config, n) for n in names})


def held_out_splits(env: str) -> tuple[str, ...]:
    """An environment's splits for choosing and for reporting; of others the data may be missing."""
    return tuple(getattr(atod_envs.environment_class(env), "splits", TextEnv.splits)[1:])


def make_env(config: EvaluateConfig, sampling: Sampling, split: str) -> gym.Env[str, str]:
    """Make the raw environment of an evaluation.

    Raises:
        UnknownName: no environment of that id is registered.
    """
    options = read_options(sampling.option, split)
    refuse_settings(options, {"max_turns": "--max-turns", "split": "--panels"})
    if config.data is not None:  # an environment without files need not take it
        refuse_settings(options, {"data": "--data alone"})
        options["data"] = config.data
    return atod_envs.make(config.env, **options, max_turns=sampling.max_turns, split=split)


def settings_of(config: EvaluateConfig, sampling: Sampling) -> tuple[dict[str, Any], list[Panel]]:
    """What defines the numbers, JSON-compatible, and the panels; :func:`agent_digest` is left for later."""
    known: dict[str, None] = {}

    def text_env(split: str) -> TextEnv:
        env = cast("TextEnv", make_env(config, sampling, split).unwrapped)
        known.update(dict.fromkeys((*env.splits, split)))
        return env

    panels = read_panels(text_env, config.panels or held_out_splits(config.env))
    require_splits(config.option, known)
    settings = {
        "env": config.env,
        "data": config.data,
        "option": list(sampling.option),
        "agent": config.agent,
        "weights": weights_digest(config.agent),
        "api_base": server_address(config.api_base).rstrip("/") if config.agent.startswith("api:") else None,
        "api_extra": config.api_extra,
        "sampling": {
            name: value
            for name, value in dataclasses.asdict(sampling).items()
            if name != "option" and value not in _USUAL.get(name, ())
        },
        "seeds": list(config.seeds),
        "panels": [
            {"name": p.name, "tasks": len(p.tasks), "digest": p.digest, "data_version": p.data_version} for p in panels
        ],
    }
    return settings, panels


def agent_digest(agent: str, world: str) -> str | None:
    """Digest of all that decides what a model says, once it was loaded; None for other agents."""
    kind, _, role = agent.partition(":")
    if agent in ("random", "expert") or kind == "api":
        return None
    from agents.models import model_digest

    return model_digest("builtin", world, role or "student") if kind == "builtin" else model_digest(agent)


def weights_digest(agent: str) -> str | None:
    """Digest of a model's weights in a folder or file: a checkpoint that changed is another policy."""
    packed = gguf_file(agent)
    files = (
        [packed] if packed else sorted(Path(agent).expanduser().glob("*.safetensors")) if Path(agent).is_dir() else []
    )
    whole = hashlib.blake2b(digest_size=8)
    for path in files:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: whole)
    return whole.hexdigest() if files else None


def episodes_path(out: Path, panel: str, seed: int) -> Path:
    """Where the episodes of a panel and a seed are stored."""
    return out / "episodes" / f"{panel.replace('/', '-')}-seed{seed}.jsonl.gz"
