"""checkpoint: what can be known of a configured model before anything of it is loaded."""

import math
from dataclasses import dataclass
from pathlib import Path

from grpo.artifacts import ActiveRun, checkpoint_files, is_hub_id, read_json
from grpo.errors import CorruptError, GrpoError, InputError, UsageError
from grpo.manage.doctor.check import Check, failed
from grpo.models.find import STARTER, resolve_model, starter_folder

STARTER_PARAMETERS = 427_136  # what training it will give; a test compares


@dataclass(frozen=True)
class Checkpoint:
    """A configured checkpoint. `folder` None: not on this machine yet; `parameters` None: not known yet."""

    folder: Path | None
    parameters: int | None


def find(run: ActiveRun, name: str, fetch: bool) -> Checkpoint:
    """The checkpoint `name`; with `fetch` it is trained or downloaded as a run would.

    Raises InputError or CorruptError where it cannot be used.
    """
    folder = resolve_model(run, name) if fetch else _local(run, name)
    if folder is None:
        return Checkpoint(None, STARTER_PARAMETERS if name == STARTER else None)
    return Checkpoint(folder, num_parameters(folder))


def check_model(run: ActiveRun, key: str, name: str, fetch: bool) -> tuple[Check, Checkpoint]:
    """Whether a configured model is there with weights, tokenizer, and room for a response."""
    try:
        found = find(run, name, fetch)
        if found.folder is not None:
            _check_use(run, key, found.folder)
    except GrpoError as error:
        return failed(key, name, "a checkpoint", error), Checkpoint(None, None)
    size = "size not known" if found.parameters is None else f"{found.parameters / 1e6:,.1f}M parameters"
    if found.folder is not None:
        return Check(key, f"{name}, {size}", "a checkpoint"), found
    if name == STARTER:
        return Check(key, f"{name}, {size}", "the built-in starter model, trained at the first run"), found
    note = f"{name} is downloaded at the first run; --model downloads it now, and then checks memory and disk"
    return Check(key, f"{name}, {size}", "a checkpoint", "warning", note), found


def check_lora(run: ActiveRun, policy: Checkpoint) -> list[Check]:
    """Whether peft is there and, once the policy is, has what update.lora.targets names."""
    lora = run.config.update.lora
    if lora is None:
        return []
    from grpo.update.adapter import check_targets, require_peft

    found, needed = ", ".join(lora.targets or ["every linear layer"]), "linear layers that take an adapter"
    try:
        require_peft()
        if policy.folder is not None:
            check_targets(policy.folder, lora.targets)
    except GrpoError as error:
        return [failed("lora targets", found, needed, error)]
    return [Check("lora targets", found, needed)]


def num_parameters(folder: Path) -> int:
    """Weights in the checkpoint `folder`, from the headers of its files. Raises InputError, CorruptError."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for path in _weight_files(folder):
        if not path.is_file():
            raise InputError(f"{path}: missing, though the index of the checkpoint lists it")
        try:
            with safe_open(path, framework="numpy") as file:
                shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - no mapping
        except SafetensorError as error:
            raise CorruptError(f"{path}: is not safetensors: {error}") from error
        total += sum(map(math.prod, shapes))
    return total


def _weight_files(folder: Path) -> list[Path]:
    """The files transformers reads, and no other copy of the weights that lies beside them."""
    from grpo.models.loading import WEIGHT_FILES

    checkpoint_files(folder)
    single, index = (folder / name for name in WEIGHT_FILES)
    if single.is_file():
        return [single]
    if not index.is_file():
        raise InputError(f"{folder}: has no {' or '.join(WEIGHT_FILES)}; weights cannot be loaded without")
    return [folder / name for name in sorted(set(read_json(index, weight_map=dict)["weight_map"].values()))]


def _local(run: ActiveRun, name: str) -> Path | None:
    if name == STARTER:
        return starter_folder(run) if starter_folder(run).exists() else None
    if not is_hub_id(name, run.imports):
        return run.imports / name
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def _check_use(run: ActiveRun, key: str, folder: Path) -> None:
    from grpo.models.loading import context_length, load_config, load_tokenizer

    context, limit = context_length(load_config(folder)), run.config.generate.max_new_tokens
    if key != "model":
        return
    load_tokenizer(folder)
    if context is not None and limit >= context:
        raise UsageError(
            f"generate.max_new_tokens: {limit} leaves no room for a prompt"
            f" in the model's context of {context} tokens"
        )
