"""Pages and comments: lines of at most 120 columns, and the words of docs/design.md rather than home-made ones."""

import re

import pytest
from paths import REPOSITORY

PAGES = [
    *REPOSITORY.glob("*.md"),
    *(REPOSITORY / "docs").rglob("*.md"),
    *(REPOSITORY / ".github").rglob("*.md"),
]
CODE = [
    path
    for folder in ("atod_envs", "agents", "atod_algos", "benchmarks", "examples", "data", "tests", "docs")
    for path in (REPOSITORY / folder).rglob("*.py")
]
HOME_MADE = {
    r"nobody|somebody|anybody|whoever": "name the actor: the learner, a client, another agent",
    r"likeliest": "top-k, most probable",
    r"beside": "next to, besides, compared with",
    r"fillings?|common beginnings?": "padding, shared prefix",
    r"errands?|wares?|takers?": "subgoal, product type, consumer",
    r"retells?|retold|retelling": "sliding-window prompt",
    r"mends?|mended": "fix",
    r"playing ahead": "asynchronous rollout",
}
# The stop words of WebShop's noun finder; the names that TextWorld's and this test's own texts hold.
QUOTED = {"nouns.py": {"beside"}, "household.py": {"filling"}, "test_prose.py": None}


def prose(text):
    """(line number, line) of a page without its code blocks and tables."""
    code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code and not line.lstrip().startswith("|"):
            yield number, line


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_prose_keeps_to_120_columns(page):
    long = [(number, len(line)) for number, line in prose(page.read_text()) if len(line) > 120]
    assert not long, f"{page.name}: (line, columns) {long}"


def test_the_fields_words():
    every = re.compile(rf"\b(?:{'|'.join(HOME_MADE)})\b", re.IGNORECASE)
    assert len(CODE) > 300 and every.search("Nobody fills a filling")
    found = []
    for path in [*PAGES, *CODE]:
        allowed = QUOTED.get(path.name, set())
        if allowed is None:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for word in every.findall(line):
                if word.lower() not in allowed:
                    hint = next(hint for words, hint in HOME_MADE.items() if re.fullmatch(words, word.lower()))
                    found.append(f"{path.relative_to(REPOSITORY)}:{number}: {word!r}; say {hint}")
    assert not found, "\n".join(found)
