"""commands: what a command does once its run is open. The command line itself is cli.py."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa

from grpo import runner, status
from grpo import sql as sql_module
from grpo.artifacts import Manifest, Run, files
from grpo.config import flatten
from grpo.console import printable, stdout_console
from grpo.errors import InputError, UsageError
from grpo.generate.source import BUILT_IN

_ROWS_SHOWN = 200


def run(opened: Run, until: int | None, from_: int | None) -> dict[str, Any]:
    """`grpo run`: complete iterations, report each, and measure the held-out sums of the built-in task."""
    until = opened.config.iterations if until is None else until
    if until < 0:
        raise UsageError(f"--until {until}: expected a number of iterations, 0 or more")
    if from_ is not None:
        if from_ not in opened.iterations():
            raise UsageError(
                f"--from {from_}: run {opened.name} has no iteration {from_}; it has {_range(opened)}"
            )
        runner.start_over(opened, from_)
    worked = runner.run_iterations(
        opened, until, lambda iteration: opened.console.say(status.line_of(opened, iteration))
    )
    if not worked:
        opened.console.say(f"run {opened.name}: {until} iterations are complete; nothing to do")
    result = {"run": opened.name, "iterations": until, "worked": worked}
    if opened.config.prompts.source == BUILT_IN and until > 0:
        result["held_out_accuracy"] = _held_out(opened, until)
    return result


def _held_out(opened: Run, until: int) -> dict[str, float]:
    from grpo.evaluate import held_out_accuracy

    limit = opened.config.generate.max_new_tokens
    found = {
        "before": held_out_accuracy(opened.policy_folder(0), limit),
        "after": held_out_accuracy(opened.policy_folder(until), limit),
    }
    opened.console.say(
        f"held-out sums (never prompted in training), greedy: {found['before']:.2f} before,"
        f" {found['after']:.2f} after {until} iterations"
    )
    return found


def run_stage(opened: Run, name: str, wanted: str, force: bool) -> list[dict[str, Any]]:
    """One stage command over the iterations asked for. Raises InputError (exit 4) for what differs."""
    [stage] = [stage for stage in runner.STAGES if stage.name == name]
    results = []
    iterations = _iterations(opened, stage, wanted)
    if not iterations:
        opened.console.say(f"{name}: nothing to do; --iteration N and --force do it again")
    with runner.Tools(opened) as tools:
        for iteration in iterations:
            before = opened.manifest(stage.output, iteration)
            if before is not None:
                _check_replace(opened, stage, before, force)
            manifest = runner.perform(opened, stage, iteration, tools, force)
            done = before is None or manifest.fingerprint != before.fingerprint
            text = f"{manifest.rows} rows" if done else "nothing to do, it is complete"
            opened.console.say(f"{name} {iteration}: {text}")
            results.append({"iteration": iteration, "done": done, "rows": manifest.rows, "ids": manifest.ids})
    return results


def _check_replace(opened: Run, stage: runner.Stage, before: Manifest, force: bool) -> None:
    """Refuse what differs without --force; with it, say what may become stale."""
    iteration = before.iteration
    assert iteration is not None
    if force:
        after = runner.followers(opened, stage.output, iteration)
        if after:
            more = f" and {len(after) - 4} more" if len(after) > 4 else ""
            listed = ", ".join(after[:4]) + more
            opened.console.say(
                f"{stage.name} {iteration}: if its result changes, these become stale: {listed}"
            )
        return
    if runner.inputs_changed(opened, before):
        return  # stale: it is done again without being asked twice
    if changes := runner.differences_of(opened, stage, before):
        place = opened.folder(stage.output, iteration)
        raise InputError(f"{place}: differs ({'; '.join(changes)}); --force makes it again")


def _iterations(opened: Run, stage: runner.Stage, wanted: str) -> list[int]:
    """Iterations of `--iteration`: a number, a range, `all`, or the earliest that can be done and is not."""
    have = opened.iterations()
    if wanted == "all":
        return have
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", wanted)
    if wanted and not match:
        raise UsageError(f"--iteration {wanted}: expected a number such as 3, a range such as 0-19, or all")
    if match:
        first, last = int(match[1]), int(match[2] or match[1])
        if last > (have[-1] + 1 if have else 0) or first > last:
            raise UsageError(f"--iteration {wanted}: run {opened.name} has {_range(opened)}")
        return list(range(first, last + 1))
    present = runner.states(opened)
    for iteration in [*have, (have[-1] + 1) if have else 0]:
        state = present[iteration][stage.name].name if iteration in present else "missing"
        if state in ("missing", "partial", "stale") and _can_plan(opened, stage, iteration):
            return [iteration]
    return []


def _can_plan(opened: Run, stage: runner.Stage, iteration: int) -> bool:
    try:
        stage.plan(opened, iteration)
    except InputError:
        return False
    return True


def _range(opened: Run) -> str:
    have = opened.iterations()
    return f"iterations {have[0]} to {have[-1]}" if have else "no iteration yet"


def dry_run(opened: Run) -> None:
    """Print every resolved value, and on stderr what `grpo run` would do."""
    values = flatten(opened.config.model_dump())
    if opened.console.quiet:
        print(json.dumps(opened.config.model_dump(), indent=1))
    else:
        width = max(map(len, values))
        for key, value in values.items():
            print(f"{key:<{width}}  {json.dumps(value)}")
    exists = (opened.path / "run.json").exists() and opened.manifest("policy", None) is not None
    done = sum(1 for n in opened.iterations() if opened.manifest("update", n)) if exists else 0
    opened.console.say(f"{done} of {opened.config.iterations} iterations are complete")


def sql(runs: list[Run], query: str, out: Path | None, timeout_s: float, as_json: bool) -> None:
    """`grpo sql`: one query, or a prompt that takes one after the other."""
    with sql_module.connect(runs) as connection:
        if query:
            _deliver(sql_module.query(connection, query, timeout_s=timeout_s), out, as_json)
            return
        while (line := _ask()) not in (None, "exit", "quit"):
            try:
                if line:
                    _deliver(sql_module.query(connection, line, timeout_s=timeout_s), None, as_json)
            except UsageError as error:
                runs[0].console.say(str(error))


def _ask() -> str | None:
    import readline  # noqa: F401 - gives input() a history and arrow keys

    try:
        return input("grpo> ").strip().rstrip(";")
    except (EOFError, KeyboardInterrupt):
        return None


def _deliver(data: pa.Table, out: Path | None, as_json: bool) -> None:
    if out is not None:
        if not out.parent.is_dir():
            raise UsageError(f"--out {out}: no folder {out.parent}")
        files.write_file(out, _encoded(data, out))
    elif as_json:
        print(_json(data))
    else:
        _print_table(data)


def _encoded(data: pa.Table, out: Path) -> bytes:
    import pyarrow.csv as pacsv
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    if out.suffix == ".parquet":
        pq.write_table(data, sink, compression="zstd")
    elif out.suffix == ".csv":
        nested = [f.name for f in data.schema if pa.types.is_nested(f.type)]
        if nested:
            raise UsageError(f"--out {out}: column {nested[0]} is a list or map, which CSV has no place for")
        pacsv.write_csv(data, sink)
    elif out.suffix == ".json":
        return (_json(data) + "\n").encode()
    else:
        raise UsageError(f"--out {out}: expected a file ending in .parquet, .csv or .json")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _json(data: pa.Table) -> str:
    return json.dumps(data.to_pylist(maps_as_pydicts="strict"), indent=1, default=str)


def _print_table(data: pa.Table) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for field in data.schema:
        numeric = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        table.add_column(Text(printable(field.name)), justify="right" if numeric else "left", overflow="fold")
    for row in data.slice(0, _ROWS_SHOWN).to_pylist(maps_as_pydicts="strict"):
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    console = stdout_console()
    console.print(table)
    if len(data) > _ROWS_SHOWN:
        console.print(
            f"{len(data):,} rows, the first {_ROWS_SHOWN} shown; --out FILE writes all", style="dim"
        )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else printable(str(value))
