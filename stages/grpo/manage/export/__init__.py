"""export: a policy of a run, or its adapter -> a plain Hugging Face directory with a model card.

Copies, not hard links: whoever saves over an exported file would write into the run.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from grpo.artifacts import (
    ADAPTER,
    POLICY,
    ActiveRun,
    checkpoint_files,
    files,
    held_part,
    is_hub_id,
    is_weight_file,
    newest_policy,
    read_json,
    refuse_inside_run,
)
from grpo.errors import CorruptError, GrpoError, InputError, ResourceError, UsageError, first_line
from grpo.manage.export.card import card_of
from grpo.models.find import resolve_model
from grpo.pipeline.prepare import find_start
from grpo.prompts.chat import chat_of

DTYPES = ("float32", "bfloat16", "float16")
_CHUNK_BYTES = 2**24
_TEMPLATE = "chat_template.jinja"
_INDEX = ".safetensors.index.json"
Content = Iterable[bytes | memoryview]  # of a file, in pieces


def export(run: ActiveRun, policy: int | None, out: Path, dtype: str | None, adapter: bool) -> dict[str, Any]:
    """Write policy `policy` of a run (None: the newest) to the folder `out`, complete or not at all.

    dtype: cast the weights; None: as the run has them, float32, and those of the start as they came. adapter:
    only what LoRA trained, in peft's form. Raises UsageError (exit 2) for an argument that makes no sense,
    InputError (4) for a policy that can be had no more, CorruptError (6) for one that is damaged, EngineError
    (8) where a replay gives another.
    """
    if dtype is not None and (adapter or dtype not in DTYPES):
        right = f"expected {', '.join(DTYPES)}, and no --adapter: that stays as it is"
        raise UsageError(f"--dtype {dtype}: {right}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is there already and not empty; name another folder")
    _check_above(out)
    refuse_inside_run(out)
    newest = newest_policy(run)
    number = newest if policy is None else policy
    if not 0 <= number <= newest:
        raise UsageError(f"--policy {policy}: run {run.name} has policies 0 to {newest}")
    dtype = dtype or ("float32" if number else None)
    part = _part_of(run, number, adapter)
    _find_start(run, number, part)
    card = card_of(run, number, dtype, adapter).encode()
    unfinished = out.absolute().with_name(f".{out.absolute().name}.unfinished")
    files.remove(unfinished)  # of a process that was killed
    held = bool(number) and held_part(run, number, part) is not None
    try:
        _fill(run, number, dtype, unfinished, part, card)
    except (GrpoError, OSError):
        files.remove(unfinished)
        if not held or held_part(run, number, part) is not None:
            raise
        _find_start(run, number, part)  # a command that works on the run has dropped it meanwhile
        _fill(run, number, dtype, unfinished, part, card)
    sizes = {path.name: path.stat().st_size for path in unfinished.iterdir()}
    files.move(unfinished, out.absolute())
    files.sync_folder(out.absolute().parent)
    told = {"run": run.name, "policy": number, "folder": str(out)}
    return {**told, "files": sorted(sizes), "bytes": sum(sizes.values())}


def _fill(run: ActiveRun, number: int, dtype: str | None, folder: Path, part: str, card: bytes) -> None:
    """Write the files of a policy, or its adapter, into `folder`, synced."""
    files.make_folder(folder)
    with _on_disk(run, number, part, folder.parent) as held:
        content = _adapter_files(run, held) if part == ADAPTER else _policy_files(run, held, number, dtype)
        for name, pieces in chain(content, [("README.md", [card])]):
            files.write_chunks(folder / name, pieces)
    files.sync_folder(folder)


def _check_above(out: Path) -> None:
    above = next(path for path in out.absolute().parents if path.exists())
    if not above.is_dir():
        raise UsageError(f"--out {out}: {above} is no folder; name another place")


def _part_of(run: ActiveRun, number: int, adapter: bool) -> str:
    """The part of a checkpoint to export. Raises UsageError (exit 2) for an adapter that is not there."""
    update = run.manifest("update", number - 1) if number else None
    if adapter and (update is None or not update.config["update"].get("lora")):
        why = "update.lora is null, or it is the start"
        raise UsageError(f"--adapter: policy {number} of run {run.name} has none: {why}")
    return ADAPTER if adapter else POLICY


def _find_start(run: ActiveRun, number: int, part: str) -> None:
    """Find the starting checkpoint where it is read. Raises InputError (exit 4) for another one."""
    held = held_part(run, number, part) if number else None
    if held is not None and part == POLICY:
        return  # the run has all of it
    if number and held is None:
        find_start(run)
        return
    start = run.start["policy"] = resolve_model(run, run.config.model)
    if run.checkpoint_id(str(start.absolute())) != run.id_of("policy@0"):
        what = f"not the checkpoint that run {run.name} started from"
        raise InputError(f"{start}: {what}; put that one back")


@contextmanager
def _on_disk(run: ActiveRun, number: int, part: str, scratch: Path) -> Iterator[Path]:
    """The folder of a part of a policy; rebuilt where the run does not have it."""
    folder = held_part(run, number, part) if number else run.start["policy"]
    if folder is not None:
        yield folder
        return
    from grpo.update.policies import rebuilt_part  # it imports torch: what is there is copied without

    with rebuilt_part(run, number, part, scratch) as folder:
        yield folder


def _policy_files(
    run: ActiveRun, folder: Path, number: int, dtype: str | None
) -> Iterator[tuple[str, Content]]:
    template = chat_of(run.config.prompts, run.imports).template  # None: the prompts used the tokenizer's
    if template is not None:
        yield _TEMPLATE, [template.encode()]
    cast_to = None if number and dtype == "float32" else dtype  # what an update writes is that
    sizes: dict[str, int] = {}
    paths = checkpoint_files(folder)
    for path in sorted(paths, key=lambda path: path.name.endswith(_INDEX)):  # last: it holds their size
        if cast_to and path.suffix == ".safetensors":
            weights, sizes[path.name] = _cast(path, cast_to)
            yield path.name, [weights]
        elif cast_to and path.name.endswith(_INDEX):
            index = read_json(path, weight_map=dict)
            size = sum(sizes[name] for name in set(index["weight_map"].values()))
            yield path.name, _json({**index, "metadata": {**index.get("metadata", {}), "total_size": size}})
        elif dtype and path.name == "config.json":  # loaders go by it, and a run leaves the base's
            config = {key: value for key, value in read_json(path).items() if key != "torch_dtype"}
            yield path.name, _json({**config, "dtype": dtype})
        elif path.name != _TEMPLATE or template is None:
            yield path.name, _pieces(path)


def _adapter_files(run: ActiveRun, folder: Path) -> Iterator[tuple[str, Content]]:
    on_hub = is_hub_id(run.config.model, run.imports)
    base = {"base_model_name_or_path": run.config.model} if on_hub else {}
    for path in sorted(folder.iterdir()):
        is_config = path.name == "adapter_config.json"
        yield path.name, _json({**read_json(path), **base}) if is_config else _pieces(path)
    for path in checkpoint_files(run.start["policy"]):
        if not is_weight_file(path.name) and path.name not in ("config.json", "generation_config.json"):
            yield path.name, _pieces(path)


def _json(document: dict[str, Any]) -> Content:
    return [json.dumps(document, indent=2, sort_keys=True).encode()]


def _pieces(path: Path) -> Content:
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            yield piece


def _cast(path: Path, dtype: str) -> tuple[bytes, int]:
    """A safetensors file with its floating tensors cast, as from_pretrained(dtype=...) does; their bytes."""
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
    return save(cast, metadata={"format": "pt"}), sum(t.nbytes for t in cast.values())


def check_repository(name: str) -> None:
    """Raise UsageError (exit 2) unless `name` can be a repository of somebody's, first of all."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"--push {name}: {first_line(error)}") from None
    if name.count("/") != 1:
        raise UsageError(f"--push {name}: expected owner/name")


def push(folder: Path, name: str) -> str:
    """Upload `folder` to the repository `name`, made private where it is not there; returns its address.

    Raises ResourceError (exit 7) where the hub refuses or cannot be reached; the folder stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # What a connection raises is the HTTP client's own error: httpx or httpx2, by the release of the library.
    client_error: Any = HfHubHTTPError.__mro__[1]
    api = HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="grpo export")
    except (client_error, OSError, ValueError) as error:
        way = f"the folder is complete: `hf upload {name} {folder}` tries again"
        raise ResourceError(f"--push {name}: {first_line(error)}; {way}") from None
    return str(url)
