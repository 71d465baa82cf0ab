"""folder: the files of a policy, or of its adapter, as transformers, peft and vLLM load them.

Copies, not hard links: whoever saves over an exported file would write into the run.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from grpo.artifacts import ActiveRun, Run, checkpoint_files, files, is_hub_id, is_weight_file, read_json
from grpo.config import PromptsConfig
from grpo.errors import CorruptError, GrpoError, InputError, UsageError
from grpo.manage.export.card import card_of
from grpo.models.find import resolve_model
from grpo.prompts.chat import chat_of

DTYPES = ("float32", "bfloat16", "float16")
_CHUNK_BYTES = 2**24
_TEMPLATE = "chat_template.jinja"
_INDEX = ".safetensors.index.json"
_ADAPTER_CONFIG = "adapter_config.json"
Content = Iterable[bytes | memoryview]  # of a file, in pieces


def export(run: ActiveRun, policy: int | None, out: Path, dtype: str | None, adapter: bool) -> dict[str, Any]:
    """Write policy `policy` of a run (None: the newest) to the folder `out`, complete or not at all.

    dtype: cast the weights; None: as the run has them, float32, and those of the start as they came. adapter:
    only what LoRA trained, in peft's form.

    Raises UsageError (exit 2) where `out` holds something or an argument makes no sense, InputError (4) for
    a policy that was pruned, naming the nearest, and CorruptError (exit 6) for one that is damaged.
    """
    if dtype is not None and (adapter or dtype not in DTYPES):
        raise UsageError(
            f"--dtype {dtype}: expected {', '.join(DTYPES)}, and no --adapter: that stays as it is"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is there already and not empty; name another folder")
    number = _policy(run, policy)
    dtype = dtype or ("float32" if number else None)
    content = _adapter_files(run, number) if adapter else _policy_files(run, number, dtype)
    card = card_of(run, number, dtype, adapter).encode()
    unfinished = out.absolute().with_name(f".{out.absolute().name}.unfinished")
    files.remove_folder(unfinished)  # of a process that was killed
    try:
        files.make_folder(unfinished)
        for name, pieces in chain(content, [("README.md", [card])]):
            files.write_chunks(unfinished / name, pieces)
        files.sync_folder(unfinished)
    except GrpoError:
        files.remove_folder(unfinished)
        raise
    names = sorted(path.name for path in unfinished.iterdir())
    size = sum(path.stat().st_size for path in unfinished.iterdir())
    files.move(unfinished, out.absolute())
    files.sync_folder(out.absolute().parent)
    return {"run": run.name, "policy": number, "folder": str(out), "files": names, "bytes": size}


def _policy(run: Run, policy: int | None) -> int:
    there = [0, *(number + 1 for number in run.iterations() if run.manifest("update", number))]
    if policy is not None and policy not in there:
        raise UsageError(f"--policy {policy}: run {run.name} has policies 0 to {max(there)}")
    return max(run.policies()) if policy is None else policy


def _policy_files(run: ActiveRun, number: int, dtype: str | None) -> Iterator[tuple[str, Content]]:
    if number == 0:
        run.start["policy"] = _starting_policy(run)
    folder = run.policy_folder(number)
    template = _own_template(run.config.prompts, run.imports)
    for path in checkpoint_files(folder):
        if path.name == _TEMPLATE and template is not None:
            continue
        is_cast = dtype is not None and not (number and dtype == "float32")  # what an update writes is that
        if is_cast and path.name.endswith(".safetensors"):
            yield path.name, [_cast(path, str(dtype))]
        elif is_cast and path.name.endswith(_INDEX):
            yield path.name, [_cast_index(path, folder, str(dtype))]
        elif (
            dtype is not None and path.name == "config.json"
        ):  # loaders go by it, and a run leaves the base's
            config = {key: value for key, value in read_json(path).items() if key != "torch_dtype"}
            yield path.name, [json.dumps({**config, "dtype": dtype}, indent=2, sort_keys=True).encode()]
        else:
            yield path.name, _pieces(path)
    if template is not None:
        yield _TEMPLATE, [template.encode()]


def _starting_policy(run: ActiveRun) -> Path:
    """The checkpoint that the run started from. Raises InputError (exit 4) when it is another one now."""
    path = resolve_model(run, run.config.model)
    if run.checkpoint_id(str(path.absolute())) != run.id_of("policy@0"):
        raise InputError(f"{path}: not the checkpoint that run {run.name} started from; put that one back")
    return path


def _own_template(config: PromptsConfig, folder: Path) -> str | None:
    """The chat template that the prompts of the run went through, where it is not the tokenizer's."""
    return chat_of(config, folder).template


def _adapter_files(run: ActiveRun, number: int) -> Iterator[tuple[str, Content]]:
    manifest = run.manifest("update", number - 1) if number else None
    held = [file for file in (manifest.files if manifest else []) if file.part == "adapter"]
    if not held:
        raise UsageError(
            f"--adapter: policy {number} of run {run.name} has none: update.lora is null, or it is the start"
        )
    run.require_checkpoint(number)
    for file in held:
        path = run.path_of(file, "update", number - 1)
        run.verify(file, path)
        if file.name == _ADAPTER_CONFIG:
            base = (
                {"base_model_name_or_path": run.config.model}
                if is_hub_id(run.config.model, run.imports)
                else {}
            )
            yield file.name, [json.dumps({**read_json(path), **base}, indent=2, sort_keys=True).encode()]
        else:
            yield file.name, _pieces(path)
    for path in checkpoint_files(run.policy_folder(number)):
        if not is_weight_file(path.name) and path.name not in ("config.json", "generation_config.json"):
            yield path.name, _pieces(path)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            yield piece


def _cast(path: Path, dtype: str) -> bytes:
    """A safetensors file with its floating tensors cast: what from_pretrained(dtype=...) makes of them."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CorruptError(f"{path}: is not safetensors: {error}") from None
    wanted: torch.dtype = getattr(torch, dtype)
    cast = {name: t.to(wanted) if t.is_floating_point() else t for name, t in tensors.items()}
    if lost := [name for name, t in cast.items() if not torch.isfinite(t).all()]:
        raise UsageError(f"--dtype {dtype}: {lost[0]} is too large for it; take bfloat16 or float32")
    return save(cast, metadata={"format": "pt"})


def _cast_index(path: Path, folder: Path, dtype: str) -> bytes:
    """The index of cast files; the same but for their size."""
    from safetensors import safe_open

    index, total = read_json(path, weight_map=dict), 0
    for name in sorted(set(index["weight_map"].values())):
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(key)
                width = 4 if dtype == "float32" else 2
                total += tensor.numel() * (width if tensor.is_floating_point() else tensor.itemsize)
    metadata = {**index.get("metadata", {}), "total_size": total}
    return json.dumps({**index, "metadata": metadata}, indent=1, sort_keys=True).encode()
