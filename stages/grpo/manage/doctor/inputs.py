"""inputs: the models, the prompts and the rewards that the configuration names."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from grpo import tables
from grpo.artifacts import ActiveRun
from grpo.errors import DataError
from grpo.generate.engines.choice import choose_engine
from grpo.generate.engines.kv_cache import new_cache
from grpo.manage.doctor.report import Report
from grpo.models import starter_model
from grpo.models.find import BUILT_IN, local_model, resolve_model
from grpo.models.loading import check_model as check_checkpoint
from grpo.models.loading import load_config, load_tokenizer
from grpo.models.size import num_parameters
from grpo.pipeline.begin import Look, room_of
from grpo.prompts.held_out import compare, same_source
from grpo.prompts.rows import normalised
from grpo.prompts.source import Row
from grpo.prompts.table import (
    OUTPUT,
    check_no_template,
    check_template,
    config_of,
    is_on_hub,
    source_is_gone,
    usable,
)
from grpo.update.adapter import check_modules, require_peft
from grpo.update.optimizer import require_optimizer
from grpo.update.own_surrogate import surrogate_of

NUM_ROWS = 1000  # of prompts, read of the source; a run reads and checks all


@dataclass(frozen=True)
class Checkpoint:
    """A configured checkpoint. `folder` None: not on this machine yet; `parameters` None: not known yet.

    A starter that no run has trained yet is there untrained.
    """

    folder: Path | None = None
    parameters: int | None = None


def check_model(
    run: ActiveRun, report: Report, key: str, name: str, fetch: bool, needed: str = "a checkpoint"
) -> Checkpoint:
    """Whether a configured model is there with its weights; the policy also with tokenizer and room.

    fetch: it is trained or downloaded as a run would. Returns nothing known where it cannot be used.
    """
    found = Checkpoint()
    with report.check(key, name, needed) as check:
        folder = resolve_model(run, name) if fetch else local_model(run, name)
        if folder is None and name in BUILT_IN:
            check.needed = "the built-in starter model, trained at the first run"
            folder = report.scratch / name
            if not folder.exists():
                starter_model.sketch(folder)
        if folder is not None:
            parameters = num_parameters(folder)
            if not key.startswith("reward"):
                check_checkpoint(folder, run.config.model_options.attn_implementation)
            else:
                load_config(folder)
            if key == "model" and choose_engine(run.config.generate.engine)[0] == "transformers":
                new_cache(load_config(folder), max_new_tokens=1)
            if key == "model":
                load_tokenizer(folder)
                room_of(run, folder, OUTPUT)
            found = Checkpoint(folder, parameters)
            report.parameters[key] = parameters
        else:
            check.warn(f"{name} is downloaded at the first run; --model does so now, and checks memory, disk")
        size = "size not known" if found.parameters is None else f"{found.parameters / 1e6:,.1f}M parameters"
        check.found = f"{name}, {size}"
    return found


def check_lora(run: ActiveRun, report: Report, policy: Checkpoint) -> None:
    """Whether peft is there and, once the policy is, has what update.lora.targets names."""
    lora = run.config.update.lora
    if lora is None:
        return
    found = ", ".join(lora.targets or ["every linear layer"])
    with report.check("lora targets", found, "linear layers that take an adapter"):
        require_peft()
        if policy.folder is not None:
            check_modules(policy.folder, lora)


def check_optimizer(run: ActiveRun, report: Report) -> None:
    """Whether the library of update.optimizer can be imported, where that is not torch."""
    optimizer = run.config.update.optimizer
    if optimizer != "adamw":
        with report.check("optimizer", optimizer, "bitsandbytes can be imported"):
            require_optimizer(run.config.update)


def check_surrogate(run: ActiveRun, report: Report) -> None:
    """Whether a function of the user's that update.surrogate names can be maximised."""
    if name := run.config.update.own:
        with report.check("surrogate", name, "a function that can be maximised"):
            surrogate_of(run)


@dataclass
class Prompts:
    """Prompts that were looked at: the first rows, and of all of them the columns, and those without a value.

    `columns` None: not known yet.
    """

    rows: list[Row] = field(default_factory=list)
    columns: set[str] | None = None
    empty: set[str] = field(default_factory=set)
    longest: int = 0
    """Tokens of the longest of the first; 0: not known."""


def check_prompts(
    run: ActiveRun, report: Report, policy: Checkpoint, fetch: bool, output: str = OUTPUT
) -> Prompts:
    """Every row is read as a run reads it; the first are rendered, and counted where the tokenizer is there.

    fetch: get a data set from the hub where the run has not read it yet. No rows where they cannot be used.
    """
    config, notes = config_of(run, output), list[str]()
    looked = Prompts()
    needed = "prompts" if policy.folder is None else "prompts that leave room for max_new_tokens"
    name = "prompts" if output == OUTPUT else "held-out prompts"
    on_hub, there = is_on_hub(config, run.imports), run.manifest(output, None) is not None
    with report.check(name, config.source, needed) as check:
        check_template(run, output)
        if on_hub and not (fetch or there):
            check.warn(f"{config.source} is downloaded at the first run; --model downloads it now")
            return looked
        held = there and (on_hub or source_is_gone(run, output))  # a run would not ask for it again
        found = _held(run, output) if held else normalised(config, run.imports, notes)
        first = list(islice(found, NUM_ROWS))
        count, columns, filled = _counted((row for _, row in chain(first, found)))
        if "messages" not in filled:
            check_no_template(config)
        check.found = f"{config.source}: {count:,} rows"
        with closing(Look(run, policy.folder, output)) as look:
            rows = look.render([row for _, row in first])
            if policy.folder is not None:
                room, places = room_of(run, policy.folder, output), [place for place, _ in first]
                kept = usable(list(zip(places, rows, strict=True)), look.num_tokens, room, config, set())
                if not kept:  # or none was there
                    raise DataError(f"prompts.source: {config.source}: holds no prompt that can be used")
                of_first = f" of the first {len(first):,}" if count > len(first) else ""
                looked.longest = max(length for *_, length in kept)
                check.found += f", the longest{of_first} {looked.longest} tokens"
                rows = [row for _, row, _ in kept]
            if lines := look.lines(notes):
                check.warn("; ".join(lines))
        looked.rows, looked.columns, looked.empty = rows, columns, columns - filled
    return looked


def _held(run: ActiveRun, output: str) -> Iterator[tuple[str, Row]]:
    """(place, row) of the prompts that a run has of its own."""
    source = config_of(run, output).source
    rows = run.read(output, None).to_pylist()
    yield from ((f"{source}: prompt {row['prompt_id']}", row) for row in rows)


def _counted(rows: Iterable[Row]) -> tuple[int, set[str], set[str]]:
    """How many there are, what columns they have, and those that have a value in one of them."""
    count, columns, filled = 0, {"prompt_id", "answer"}, set[str]()
    for row in rows:
        count += 1
        columns |= row.keys()
        blank = {name for name in row.keys() - filled if isinstance(row[name], str) and not row[name].strip()}
        filled |= {name for name in row.keys() - filled - blank if row[name] is not None}
    own = {"prompt", "messages", tables.RENDERED}
    return count, columns - own, filled


def check_held_out(run: ActiveRun, report: Report, rows: list[Row], held_out: list[Row]) -> None:
    """Whether what is held out is, and asked as in training; nothing to say where it is."""
    lines = compare(run.config, rows, held_out) if rows and held_out else [same_source(run.config)]
    if note := "; ".join(filter(None, lines)):
        with report.check("held out", "", "prompts that training does not draw") as check:
            check.warn(note)
