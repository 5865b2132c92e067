"""Who learns: groups of episodes are sampled, scored, turned into per-token advantages, and learned from."""

import importlib.util
from pathlib import Path

from atod_envs import stopping  # noqa: F401  # so that Ctrl-C ends `python -m` without a traceback


def foreign_agents() -> str | None:
    """What is wrong if ``import agents`` would find another distribution's package; None if it is ours.

    ``agents`` is a common name, and two distributions that carry it overwrite each other's files without a word.
    """
    spec = importlib.util.find_spec("agents")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    # Looked at, not imported: a stranger's package may do anything on import.
    start = Path(places[0], "__init__.py") if places else None
    if start is not None and start.is_file() and "Part of atod" in start.read_text(encoding="utf-8"):
        return None
    from importlib.metadata import packages_distributions

    owners = [owner for owner in packages_distributions().get("agents", []) if owner != "atod"]
    owner = f"the distribution {', '.join(owners)!r}" if owners else "another project"
    where = places[0] if places else "no folder at all"
    return (
        f"the package 'agents' at {where} belongs to {owner}, and hides or has overwritten atod's package of that name; use a virtual "
        "environment without it (pip uninstall it, then pip install --force-reinstall --no-deps atod), or start in another folder"
    )
