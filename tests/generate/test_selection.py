"""Which prompts are drawn: by the query, by rounds, and what of a query is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import Grpo

from grpo.generate.selection import least_drawn

DRAWN = (
    "select iteration, group_id, any_value(prompt_id) as prompt_id from rollouts group by all order by all"
)
SETTING = ("--set", "generate.prompts_sql=next.sql")


def drawn(grpo: Grpo, *options: str) -> dict[int, list[int]]:
    """The prompts of each iteration, in the order of their groups."""
    code, out, err = grpo("sql", DRAWN, "--json", *options)
    assert code == 0, err
    found: dict[int, list[int]] = {}
    for row in json.loads(out):
        found.setdefault(row["iteration"], []).append(row["prompt_id"])
    return found


def write(query: str) -> None:
    Path("next.sql").write_text(query)


def manifest(iteration: int) -> dict[str, Any]:
    path = Path(f"artifacts/tiny/iteration={iteration:06d}/rollouts/manifest.json")
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def test_prompts_drawn_least_come_first() -> None:
    # Of 5 prompts 0 was drawn twice, 3 once: first 1, 2, 4 in some order, then 3, then 0.
    found = least_drawn(5, np.array([0, 3, 0]), 5, [7, 1, 2]).tolist()
    assert sorted(found[:3]) == [1, 2, 4]
    assert found[3:] == [3, 0]
    assert least_drawn(5, np.array([0, 3, 0]), 2, [7, 1, 2]).tolist() == found[:2]
    assert least_drawn(5, np.array([0, 3, 0]), 7, [7, 1, 2]).tolist() == [*found, *found[:2]]
    others = [least_drawn(5, np.zeros(0, dtype=np.int64), 5, [0, 1, n]).tolist() for n in range(9)]
    assert len({tuple(order) for order in others}) > 5  # each round has an order of its own


def test_the_query_sees_earlier_iterations_and_says_what_is_drawn(project: Path, grpo: Grpo) -> None:
    """By how often a prompt was drawn so far, the highest number first: 5 4 3, then 2 1 0, then 5 4 3."""
    write(
        """
        select prompts.prompt_id
        from prompts
        left join (select prompt_id, count(*) as times from samples group by prompt_id) using (prompt_id)
        order by coalesce(times, 0), prompt_id desc
        """
    )
    code, _, err = grpo("run", "--until", "3", *SETTING)
    assert code == 0, err
    assert "seeded permutation" not in err
    assert drawn(grpo) == {0: [5, 4, 3], 1: [2, 1, 0], 2: [5, 4, 3]}
    found = manifest(2)
    names = ["rollouts", "reward/code", "advantages"]
    past = [f"{name}@{number}" for number in range(2) for name in names]
    assert list(found["inputs"]) == ["prompts", "policy@2", *past]
    assert (
        found["inputs"]["reward/code@1"]
        == json.loads(Path("artifacts/tiny/iteration=000001/rewards/manifest.json").read_text())["ids"][
            "reward/code"
        ]
    )
    assert list(found["user_files"]) == ["generate.prompts_sql"]
    assert found["summary"]["groups_by_query"] == 3

    # Never of this iteration or a later one: iteration 1, made again, draws as before, and all stays fresh.
    assert grpo("generate", "--iteration", "1", "--force", *SETTING)[0] == 0
    assert drawn(grpo) == {0: [5, 4, 3], 1: [2, 1, 0], 2: [5, 4, 3]}
    states = json.loads(grpo("status", "--json", *SETTING)[1])["iterations"]
    assert {stage["state"] for row in states for stage in row["stages"].values()} == {"done"}
    assert grpo("verify", *SETTING)[0] == 0

    # What the query read is part of what the rollouts are: another advantage of iteration 0 makes them stale.
    scale = ("--set", "advantage.scale=none")
    assert grpo("advantage", "--iteration", "0", "--force", *SETTING, *scale)[0] == 0
    states = json.loads(grpo("status", "--json", *SETTING, *scale)[1])["iterations"]
    stale = [row["stages"]["generate"] for row in states]
    assert stale[0]["state"] == "done"
    assert stale[1] == {"state": "stale", "why": "policy@1 is stale"}  # whose rollouts were learned otherwise

    # And so is the text of the query.
    write(Path("next.sql").read_text() + "-- the same")
    code, _, err = grpo("generate", "--iteration", "0", *SETTING)
    assert (code, "changed (generate.prompts_sql: its file changed)" in err) == (4, True), err


def test_parameters_and_random_numbers_are_the_same_each_time(project: Path, grpo: Grpo) -> None:
    """Nothing else that tells one time from another is there either."""
    write(
        """
        select prompt_id
        from prompts
        where $prompts_per_iteration = 3 and $seed = 0 and $iteration in (0, 1)
            and (select count(*) from timings) + (select count(*) from manifests) = 0
        order by random()
        """
    )
    assert grpo("run", *SETTING)[0] == 0
    first = drawn(grpo)
    assert grpo("run", *SETTING, "--set", "run=again")[0] == 0
    assert drawn(grpo, "--run", "again") == first
    assert first[0] != first[1]  # of six prompts in a random order; the seed is the iteration's own


def test_what_the_query_leaves_open_is_drawn_by_a_permutation_and_said(project: Path, grpo: Grpo) -> None:
    write("select 4 as prompt_id where $iteration = 0")
    code, _, err = grpo("run", *SETTING)
    assert code == 0, err
    for iteration, count in ((0, 1), (1, 0)):
        said = f"generate {iteration}: generate.prompts_sql gives prompts for {count} of 3 groups; the rest"
        assert said in err
        assert manifest(iteration)["summary"]["groups_by_query"] == count
    found = drawn(grpo)
    assert found[0][0] == 4
    assert len(set(found[0])) == len(set(found[1])) == 3  # none twice while there are others
    assert found[0][1:] == least_drawn(6, np.array([4]), 2, [0, 0, 0]).tolist()
    assert found[1] == least_drawn(6, np.zeros(0, dtype=np.int64), 3, [0, 1, 0]).tolist()


@pytest.mark.parametrize(
    ("query", "code", "message"),
    [
        ("select 6 as prompt_id", 3, "next.sql: returns prompt_id 6, which is none of `prompts`"),
        ("select -1 as prompt_id", 3, "next.sql: returns prompt_id -1, which is none of `prompts`"),
        (
            "select 3 as prompt_id union all select null",
            3,
            "next.sql: returns a prompt_id that is null; leave such rows out",
        ),
        (
            "select unnest([3, 1, 3]) as prompt_id",
            3,
            "next.sql: returns prompt_id 3 twice; it must return each prompt once",
        ),
        (
            "select prompt as prompt_id from prompts",
            3,
            "next.sql: prompt_id is of type string; it must be an integer, as in `prompts`",
        ),
        (
            "select 3 as id",
            2,
            "next.sql: returns no column prompt_id; it must return those of the next groups",
        ),
        ("", 2, "query: gives no rows; write a select"),
        ("selec", 2, 'query: Parser Error: syntax error at or near "selec" LINE 1: selec ^'),
        ("copy prompts to 'x.csv'", 2, "query: "),
        ("select $other as prompt_id", 2, "query: "),
        (
            "select 3 as prompt_id; select 4 as prompt_id",
            2,
            "query: 2 statements, divided by `;`; write one",
        ),
        (None, 2, "next.sql: no such file"),
    ],
)
def test_a_query_that_cannot_be_used(
    project: Path, grpo: Grpo, query: str | None, code: int, message: str
) -> None:
    if query is not None:
        write(query)
    found, _, err = grpo("generate", *SETTING)
    assert found == code, err
    assert err.splitlines()[-1].startswith("error: generate.prompts_sql: ")
    assert message in err
    assert not Path("artifacts/tiny/iteration=000000/rollouts").exists()
    assert not Path("x.csv").exists()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (
            "select 3 as prompt_id; select 4 as prompt_id",
            "next.sql: query: 2 statements, divided by `;`; write one",
        ),
        ("select prompt from prompts", "next.sql: returns no column prompt_id; it must return those of the"),
        (
            "select prompt_id from samples where rewrad > 0",
            'next.sql: query: Binder Error: Referenced column "rewrad"',
        ),
    ],
)
def test_a_run_refuses_a_query_before_it_samples_to_measure(
    measured_project: Path, grpo: Grpo, query: str, message: str
) -> None:
    write(query)
    code, _, err = grpo("run", *SETTING)
    assert code == 2, err
    assert err.splitlines()[-1].startswith(f"error: generate.prompts_sql: {message}")
    assert not list(Path("artifacts/tiny").glob("iteration=*"))
    assert not list(Path("artifacts/tiny").glob(".staging/iteration=*"))


def test_a_pivot_and_comments_behind_a_semicolon_are_one_statement(project: Path, grpo: Grpo) -> None:
    write("select c as prompt_id from (pivot (select 'c' as k, 4 as v) on k using max(v)); -- the end")
    code, _, err = grpo("run", "--until", "1", *SETTING)
    assert code == 0, err
    assert drawn(grpo)[0][0] == 4
