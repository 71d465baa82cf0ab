"""docs/querying.md: the files in other tools, each snippet run; and what it says of views."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Grpo
from tests.pages.pages import DOCS, texts

from grpo import sql
from grpo.artifacts import Run

SNIPPETS = texts((DOCS / "querying.md").read_text(), "python")
# What each leaves in `rollouts`, as (type of the column iteration, its values).
SHOWN: dict[str, Callable[[Any], tuple[str, list[int]]]] = {
    "duckdb": lambda found: (str(found.types[0]), [row[0] for row in found.fetchall()]),
    "pandas": lambda found: (str(found.iteration.dtype), found.iteration.tolist()),
    "polars": lambda found: (str(found.collect()["iteration"].dtype), found.collect()["iteration"].to_list()),
    "pyarrow": lambda found: (str(found.schema.field("iteration").type), found["iteration"].to_pylist()),
}


@pytest.mark.parametrize(("tool", "snippet"), list(zip(SHOWN, SNIPPETS, strict=True)))
def test_each_tool_reads_whole_numbers_of_iterations(finished: Path, tool: str, snippet: str) -> None:
    assert f"import {tool}" in snippet
    names: dict[str, Any] = {}
    exec(snippet.replace("artifacts/quickstart", "artifacts/tiny"), names)
    kind, iterations = SHOWN[tool](names["rollouts"])
    assert kind.lower() in ("int32", "integer")
    assert sorted(iterations) == [0] * 6 + [1] * 6  # 3 prompts, 2 samples each


def test_the_columns_of_scored_are_those_of_the_page(finished: Path, grpo: Grpo) -> None:
    page = (DOCS / "tables.md").read_text()
    described = page.partition("- `scored`")[2].partition("- `timings`")[0]
    with sql.connect([Run(Path("artifacts"), "tiny")], 0) as connection:
        sql.create_scored(connection, [1.0])
        columns = sql.query(connection, "from scored").column_names
    assert set(re.findall(r"`(\w+)`", described)) - {"advantage"} == set(columns[3:]) - {"advantage"}
