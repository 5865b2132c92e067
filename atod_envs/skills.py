"""Skills: what is worth knowing about an environment's tasks, in words, for prompts that may hold it.

Each environment has one file, ``skills.md`` in its folder: a section ``# General`` for all tasks, and a section for
each kind of task (ALFWorld's task type, WebShop's category, Search-QA's data set; the label that results are broken
down by). A section's heading may name several kinds. The invariant: every task gets the general section *and* its own
kind's, or an error; there is no falling back on the general one alone, which would go unnoticed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from atod_envs.errors import DataError, UnknownName
from atod_envs.files import file_stamp, read_text

_GENERAL = "General"


@dataclass(frozen=True, slots=True)
class SkillBook:
    """The skills of one environment.

    Attributes:
        source: the file that they come from.
        general: what holds for all tasks.
        by_kind: kind of task -> what holds for it.
    """

    source: Path
    general: str
    by_kind: Mapping[str, str]

    def text_for(self, kind: str) -> str:
        """The general skills, then those of a kind of task.

        Raises:
            UnknownName: the book has nothing on that kind; says which kinds it has and where to add one.
        """
        if kind not in self.by_kind:
            shown = ", ".join(self.by_kind)
            raise UnknownName("kind of task", kind, (), f"{self.source} has skills for: {shown}; add '## {kind}' to it")
        return f"{self.general}\n\n{self.by_kind[kind]}"


def read_skills(path: Path) -> SkillBook:
    """Read a file of skills.

    Args:
        path: Markdown with ``# General`` and ``## kind, other kind`` sections; text before the first heading is for the
            reader.

    Raises:
        DataError: the file is missing, lacks the general section, or has an empty or a doubled one.
    """
    if not path.is_file():
        raise DataError(f"no skills at {path}; expected a Markdown file of skills")
    return _read(path, file_stamp(path))


@lru_cache(16)
def _read(path: Path, stamp: tuple[int, ...]) -> SkillBook:
    text = read_text(path, "expected a Markdown file of skills").replace("\r\n", "\n")
    parts = re.split(r"^#{1,2} +(.+?) *$", text, flags=re.MULTILINE)[1:]
    sections: dict[str, str] = {}
    for heading, body in zip(parts[::2], parts[1::2], strict=True):
        for kind in (name.strip() for name in heading.split(",")):
            if kind in sections:
                raise DataError(f"{path} has two sections for {kind!r}; join them")
            if not body.strip():
                raise DataError(f"{path}: the section for {kind!r} is empty; write its skills or remove it")
            sections[kind] = body.strip()
    if _GENERAL not in sections:
        raise DataError(f"{path} has no section '# {_GENERAL}'; expected one besides those for each kind of task")
    return SkillBook(path, sections.pop(_GENERAL), sections)


def skills_of(env_key: str) -> SkillBook:
    """The skills that come with an environment, given its key (``"alfworld"``).

    Raises:
        DataError: none come with it.
    """
    return read_skills(Path(__file__).parent / env_key / "skills.md")
