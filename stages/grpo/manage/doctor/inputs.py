"""inputs: the models, the prompts and the rewards that the configuration names."""

import math
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from safetensors import SafetensorError

from grpo import tables
from grpo.artifacts import ActiveRun, checkpoint_files, is_hub_id
from grpo.errors import CorruptError, DataError
from grpo.generate.engines.choice import choose_engine
from grpo.generate.engines.kv_cache import new_cache
from grpo.manage.doctor.report import Report
from grpo.models.bounds import shapes_in, weight_files
from grpo.models.find import STARTER, TEACHER, resolve_model, starter_folder
from grpo.models.loading import check_model as check_checkpoint
from grpo.models.loading import load_config, load_tokenizer
from grpo.pipeline.begin import Look, room_of
from grpo.prompts.held_out import compare, same_source
from grpo.prompts.rows import normalised
from grpo.prompts.source import Row
from grpo.prompts.table import OUTPUT, config_of, is_on_hub, source_is_gone, usable
from grpo.score.functions.pool import FunctionPool
from grpo.score.judge.client import Judge
from grpo.score.judge.rubric import rubric_of
from grpo.update.adapter import check_modules, require_peft
from grpo.update.optimizer import require_optimizer
from grpo.update.own_surrogate import surrogate_of

NUM_ROWS = 1000  # of prompts, read of the source; a run reads and checks all
STARTER_PARAMETERS = 427_136  # what training it will give; a test compares
_STARTERS = {STARTER: STARTER_PARAMETERS, TEACHER: 1_341_504}


@dataclass(frozen=True)
class Checkpoint:
    """A configured checkpoint. `folder` None: not on this machine yet; `parameters` None: not known yet."""

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
        folder = resolve_model(run, name) if fetch else _local(run, name)
        if folder is not None:
            parameters = num_parameters(folder)
            if key in ("model", "reference"):
                check_checkpoint(folder, run.config.model_options.attn_implementation)
            else:
                load_config(folder)
            if key == "model" and choose_engine(run.config.generate.engine)[0] == "transformers":
                new_cache(load_config(folder), max_new_tokens=1)
            if key == "model":
                load_tokenizer(folder)
                room_of(run, folder, OUTPUT)
            found = Checkpoint(folder, parameters)
        elif name in _STARTERS:
            found = Checkpoint(None, _STARTERS[name])
            check.needed = "the built-in starter model, trained at the first run"
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


def num_parameters(folder: Path) -> int:
    """Of a checkpoint, from the headers of what transformers reads. Raises InputError, CorruptError."""
    checkpoint_files(folder)
    total = 0
    for path in weight_files(folder):
        try:
            total += sum(map(math.prod, shapes_in(path)))
        except SafetensorError as error:
            raise CorruptError(f"{path}: is not safetensors: {error}") from error
    return total


def _local(run: ActiveRun, name: str) -> Path | None:
    if name in _STARTERS:
        return starter_folder(run, name) if starter_folder(run, name).exists() else None
    if not is_hub_id(name, run.imports):
        return run.checkpoint_path(name)
    from huggingface_hub import try_to_load_from_cache

    revision = run.config.model_options.revision if name == run.config.model else None
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def check_prompts(
    run: ActiveRun, report: Report, policy: Checkpoint, fetch: bool, output: str = OUTPUT
) -> list[Row]:
    """The first rows of prompts, or held-out ones, with their length where the tokenizer is there.

    fetch: get a data set from the hub where the run has not read it yet. No rows where they cannot be used.
    """
    config, rows, notes = config_of(run, output), list[Row](), list[str]()
    needed = "prompts" if policy.folder is None else "prompts that leave room for max_new_tokens"
    name = "prompts" if output == OUTPUT else "held-out prompts"
    on_hub, there = is_on_hub(config, run.imports), run.manifest(output, None) is not None
    with report.check(name, config.source, needed) as check:
        if on_hub and not (fetch or there):
            check.warn(f"{config.source} is downloaded at the first run; --model downloads it now")
            return rows
        if there and (on_hub or source_is_gone(run, output)):  # a run would not ask for it again
            held = run.read(output, None).slice(0, NUM_ROWS).to_pylist()
            found = [(f"{config.source}: prompt {row['prompt_id']}", row) for row in held]
        else:
            found = list(islice(normalised(config, run.imports, notes), NUM_ROWS))
        if not found:
            raise DataError(f"prompts.source: {config.source}: holds no prompt")
        more = "first " if len(found) == NUM_ROWS else ""
        check.found = f"{config.source}: {more}{len(found):,} rows"
        with closing(Look(run, policy.folder, output)) as look:
            seen = look.render([row for _, row in found])
            if policy.folder is None:
                rows += seen
            else:
                room, places = room_of(run, policy.folder, output), [place for place, _ in found]
                kept = usable(list(zip(places, seen, strict=True)), look.num_tokens, room, config, set())
                if not kept:
                    raise DataError(f"prompts.source: {config.source}: holds no prompt that can be used")
                check.found += f", the longest {max(length for *_, length in kept)} tokens"
                rows += [row for _, row, _ in kept]
            if lines := look.lines(notes):
                check.warn("; ".join(lines))
    return rows


def check_held_out(run: ActiveRun, report: Report, rows: list[Row], held_out: list[Row]) -> None:
    """Whether what is held out is, and asked as in training; nothing to say where it is."""
    lines = compare(run.config, rows, held_out) if rows and held_out else [same_source(run.config)]
    if note := "; ".join(filter(None, lines)):
        with report.check("held out", "", "prompts that training does not draw") as check:
            check.warn(note)


def check_rewards(run: ActiveRun, report: Report, rows: list[Row], fetch: bool) -> None:
    """Import every reward function in a worker, as `score` does; look for every reward model and judge."""
    names = {*tables.schema("prompts").names, *(name for row in rows for name in row)}
    columns = sorted(names - {"prompt", "messages", tables.RENDERED}) if rows else None
    with closing(FunctionPool(run.imports, 1)) as pool:
        for reward in run.config.score.rewards:
            name, judge = f"reward {reward.name}", reward.judge
            if reward.function is not None:
                needed = "a function that can be imported and takes its arguments"
                with report.check(name, reward.function, needed):
                    pool.check(reward, columns)
            elif judge is not None:  # without a request: an answer may cost money
                needed = "a judge with its rubric and its key (nothing is asked)"
                with report.check(name, f"{judge.model} at {judge.url}", needed):
                    Judge(reward, rubric_of(reward, run.imports, columns)).close()
            else:
                needed = "a sequence classifier with one label"
                check_model(run, report, name, str(reward.model), fetch, needed)
    for teacher in run.config.score.teachers:
        needed = "a causal language model with the policy's tokenizer"
        check_model(run, report, f"teacher {teacher.name}", teacher.model, fetch, needed)
