"""checkpoint: what can be known of a configured model before anything of it is loaded."""

import math
from dataclasses import dataclass
from pathlib import Path

from grpo.artifacts import ActiveRun, checkpoint_files, is_hub_id, read_json
from grpo.errors import CorruptError, InputError, UsageError
from grpo.manage.doctor.report import Report
from grpo.models.find import STARTER, resolve_model, starter_folder
from grpo.models.loading import WEIGHT_FILES, context_length, load_config, load_tokenizer

STARTER_PARAMETERS = 427_136  # what training it will give; a test compares


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
            _check_use(run, folder, is_policy=key == "model")
            found = Checkpoint(folder, parameters)
        elif name == STARTER:
            found = Checkpoint(None, STARTER_PARAMETERS)
            check.needed = "the built-in starter model, trained at the first run"
        else:
            text = f"{name} is downloaded at the first run; --model downloads it now, and then checks memory"
            check.warn(f"{text} and disk")
        size = "size not known" if found.parameters is None else f"{found.parameters / 1e6:,.1f}M parameters"
        check.found = f"{name}, {size}"
    return found


def check_lora(run: ActiveRun, report: Report, policy: Checkpoint) -> None:
    """Whether peft is there and, once the policy is, has what update.lora.targets names."""
    lora = run.config.update.lora
    if lora is None:
        return
    from grpo.update.adapter import check_targets, require_peft

    found = ", ".join(lora.targets or ["every linear layer"])
    with report.check("lora targets", found, "linear layers that take an adapter"):
        require_peft()
        if policy.folder is not None:
            check_targets(policy.folder, lora.targets)


def num_parameters(folder: Path) -> int:
    """Weights in the checkpoint `folder`, from the headers of the files that transformers reads.

    Raises InputError, CorruptError.
    """
    from safetensors import SafetensorError, safe_open

    checkpoint_files(folder)
    single, index = (folder / name for name in WEIGHT_FILES)
    names = {single.name}
    if not single.is_file():
        if not index.is_file():
            raise InputError(
                f"{folder}: has no {' or '.join(WEIGHT_FILES)}; weights cannot be loaded without"
            )
        names = set(read_json(index, weight_map=dict)["weight_map"].values())
    total = 0
    for path in sorted(folder / name for name in names):
        if not path.is_file():
            raise InputError(f"{path}: missing, though the index of the checkpoint lists it")
        try:
            with safe_open(path, framework="numpy") as file:
                shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - no mapping
        except SafetensorError as error:
            raise CorruptError(f"{path}: is not safetensors: {error}") from error
        total += sum(map(math.prod, shapes))
    return total


def _local(run: ActiveRun, name: str) -> Path | None:
    if name == STARTER:
        return starter_folder(run) if starter_folder(run).exists() else None
    if not is_hub_id(name, run.imports):
        return run.imports / name
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def _check_use(run: ActiveRun, folder: Path, is_policy: bool) -> None:
    context, limit = context_length(load_config(folder)), run.config.generate.max_new_tokens
    if not is_policy:
        return
    load_tokenizer(folder)
    if context is not None and limit >= context:
        raise UsageError(
            f"generate.max_new_tokens: {limit} leaves no room for a prompt"
            f" in the model's context of {context} tokens"
        )
