"""Phrases that read as translated, in what a user reads: help, messages, README and docs."""

import ast
import re
from pathlib import Path

import pytest
from tests.pages.pages import ROOT

# What each would better be: rerun / rebuild, differently, resume / continue, exists, occurs, is not.
PHRASES = (
    r"\b(do|does|done|make|makes|made) (it |them |this )?again\b",
    r"\banew\b",
    r"\botherwise (than|configured|made|measured)\b",
    r"\b(command|run|training|score|fork)s? go(es)? on\b",
    r"\bgo(es)? on with\b",
    r"\bstands (in|at|twice|there)\b",
    r"\bis no (part|such thing|column|group|regular|module)\b",
    r"\bby itself\b",
    r"\bwhat is there\b",
)
FOUND = re.compile("|".join(PHRASES))
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def texts(path: Path) -> list[str]:
    """Every string of a module that is not a docstring: messages and the help of options."""
    tree = ast.parse(path.read_text())
    bodies = [getattr(node, "body", None) for node in ast.walk(tree)]
    first = [body[0] for body in bodies if isinstance(body, list) and body]
    docstrings = {id(each.value) for each in first if isinstance(each, ast.Expr)}
    if path.parent.name == "cli":
        docstrings = set()  # there they are the help of commands
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_are_in_plain_words(page: Path) -> None:
    found = [line for line in page.read_text().splitlines() if FOUND.search(line)]
    assert found == []


def test_messages_and_help_are_in_plain_words() -> None:
    modules = (ROOT / "stages" / "grpo").rglob("*.py")
    found = [(path.name, text) for path in modules for text in texts(path) if FOUND.search(text)]
    assert found == []
