"""Text environments for language-model agents, registered with Gymnasium.

Importing this package registers ``ENVIRONMENTS``; the engines behind them load on first use, so the import stays light.
"""

from __future__ import annotations

from atod_envs import stopping  # noqa: F401  # isort: skip  # before what takes long to import

import importlib
import inspect
import re
from typing import Any

import gymnasium as gym
from gymnasium.envs import registration

from atod_envs.errors import AtodError, UnknownName

ENVIRONMENTS = {
    "atod/ALFWorld-v0": "atod_envs.alfworld.env:ALFWorldEnv",
    "atod/WebShop-v0": "atod_envs.webshop.env:WebShopEnv",
    "atod/SearchQA-v0": "atod_envs.searchqa.env:SearchQAEnv",
    "atod/TextCraft-v0": "atod_envs.textcraft.env:TextCraftEnv",
    "atod/ScienceWorld-v0": "atod_envs.scienceworld.env:ScienceWorldEnv",
}
"""Registered id -> entry point."""

ROOMS = {entry_point.split(".")[1]: env_id for env_id, entry_point in ENVIRONMENTS.items()}
"""Folder of an environment, which is its key, too -> registered id."""

REQUIRES = {"atod/ScienceWorld-v0": "scienceworld"}
"""Registered id -> the package without which it cannot be played; the others need nothing."""


def playable() -> tuple[str, ...]:
    """The environments whose packages are installed."""
    from importlib.metadata import Distribution

    return tuple(
        env_id for env_id in ENVIRONMENTS if env_id not in REQUIRES or any(Distribution.discover(name=REQUIRES[env_id]))
    )


def register() -> None:
    """Register the environments with Gymnasium; does nothing the second time.

    The turn limit is the environments' own (``max_turns=``), so no time-limit wrapper is asked for. Gymnasium's passive
    checker is left out: ``check_text_env`` checks more, once, instead of a little at every step.
    """
    for room, env_id in ROOMS.items():
        if env_id not in registration.registry:
            registration.register(
                id=env_id,
                entry_point=ENVIRONMENTS[env_id],
                vector_entry_point=f"atod_envs.vector:make_{room}",
                disable_env_checker=True,
            )


def require_registered(env_id: str) -> None:
    """Check that an environment id can be made.

    Args:
        env_id: a registered id, or ``"module:id"``, whose module registers it on import (Gymnasium's own form).

    Raises:
        UnknownName: nothing of that name is registered, or the module does not exist.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
            raise UnknownName("module of an environment", module, advice="it must be importable from here") from None
    if name not in registration.registry:
        raise UnknownName("environment", env_id, ENVIRONMENTS)


def environment_class(env_id: str) -> Any:
    """The class behind a registered id, a subclass of ``TextEnv``, with the facts that it states: splits, label, ...

    It opens no data.

    Raises:
        UnknownName: no environment of that id is registered.
    """
    require_registered(env_id)
    entry = gym.spec(env_id.rpartition(":")[2]).entry_point
    return registration.load_env_creator(entry) if isinstance(entry, str) else entry


def make(env_id: str, **options: Any) -> gym.Env[str, str]:
    """``gymnasium.make`` for a command line: whatever is wrong with the id or an option ends in one line.

    Raises:
        UnknownName: no such environment, or an unknown value of an option.
        DataError: the environment's data is missing or broken.
        AtodError: the environment does not take an option, or not that value.
    """
    taken = inspect.signature(environment_class(env_id)).parameters
    for name, value in options.items():
        if name in taken and taken[name].annotation in (bool, "bool") and not isinstance(value, bool):
            raise AtodError(f"{env_id}: {name}={value!r}; expected true or false")
    try:
        return gym.make(env_id, **options)
    except AtodError:
        raise
    except (TypeError, ValueError) as error:
        reason = str(error).partition(" was raised from the environment creator")[0]
        if unknown := re.search(r"unexpected keyword argument '(\w+)'", reason):
            raise UnknownName(f"option of {env_id}", unknown[1], taken) from error
        raise AtodError(f"{env_id}: {reason}") from error


register()
