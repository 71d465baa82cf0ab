"""start: configuration -> run.json, prompts/, policy/. What a run stands on, fixed for its whole life."""

import json
from pathlib import Path
from typing import Any

from grpo.artifacts import Plan, Run, Staging, files, open_run, versions
from grpo.config import Config, overridden_keys
from grpo.errors import InputError, UsageError
from grpo.generate import prompts
from grpo.generate.source import Row

STARTER = "tiny-arithmetic"
STAGE_VERSION = 1


def prepare(run: Run) -> None:
    """Make sure that run.json, prompts/ and policy/ are there and are those of the configuration.

    Needs the lock. Raises InputError (exit 4) when the run was made with other prompts, another model,
    reference or seed: those ask for a new `run:`.
    """
    created = (run.path / "run.json").exists()
    if created:
        _check_seed(run)
    _policy(run, created)
    _prompts(run, created)
    if not created:
        for line in overridden_keys(run.config):
            run.console.say(f"differs from its objective: {line}")
        files.write_file(run.path / "run.json", _run_json(run.config))
        files.sync_folder(run.path)


def resolve_model(run: Run, name: str) -> Path:
    """The local directory of a checkpoint; the starter model is trained when it is first asked for."""
    if name == STARTER:
        folder = run.root / ".models" / name
        if not folder.exists():  # the folder appears complete; training it imports torch
            from grpo import starter

            starter.ensure(folder, run.console.say)
        return folder
    return run.checkpoint_path(name)


def _check_seed(run: Run) -> None:
    created: dict[str, Any] = open_run(run.name, run.root)["config"]
    if created["seed"] != run.config.seed:
        raise InputError(_fixed(run, "seed", created["seed"], run.config.seed))


def _policy(run: Run, created: bool) -> None:
    """Resolve the starting policy and the reference, and commit or check their ids."""
    names = {"policy": run.config.model, "reference": run.config.update.reference or run.config.model}
    paths = {part: resolve_model(run, name) for part, name in names.items()}
    ids = {part: run.checkpoint_id(str(path.absolute())) for part, path in paths.items()}
    manifest = run.manifest("policy", None)
    if manifest is None or (not created and manifest.ids != ids):
        plan = Plan("policy", STAGE_VERSION, "policy", None, names, {}, ids)
        staging = Staging(run, plan, 0)
        staging.commit(ids, [], {part: str(path) for part, path in paths.items()})
    else:
        for part, name in names.items():
            if manifest.ids[part] != ids[part]:
                key = "model" if part == "policy" else "update.reference"
                raise InputError(_fixed(run, key, manifest.config[part], f"{name} (other files)"))
    run.start = paths


def _prompts(run: Run, created: bool) -> None:
    manifest = run.manifest(prompts.OUTPUT, None)
    if manifest is not None and created and prompts.source_is_gone(run):
        run.console.say(f"prompts.source: {run.config.prompts.source} is gone; the run has its own copy")
        return
    plan = prompts.plan(run)
    if manifest is not None and plan.same_as(manifest):
        return
    if manifest is not None and created:
        raise InputError(_fixed(run, "prompts", "", "; ".join(plan.differences(manifest))))
    from grpo.model import context_length, load_config, load_tokenizer

    tokenizer = load_tokenizer(run.start["policy"])
    context = context_length(load_config(run.start["policy"]))
    room = None if context is None else context - run.config.generate.max_new_tokens
    if room is not None and room < 1:
        raise UsageError(
            f"generate.max_new_tokens: {run.config.generate.max_new_tokens} leaves no room for a prompt"
            f" in the model's context of {context} tokens"
        )

    def num_tokens(rows: list[Row]) -> list[int]:
        return [len(ids) for ids in prompts.encode(rows, tokenizer)[1]]

    prompts.prepare(run, Staging(run, plan, 0), num_tokens, room)


def _fixed(run: Run, key: str, old: object, new: object) -> str:
    change = f"{old} -> {new}" if old != "" else new
    return (
        f"{key}: fixed for the run {run.name}, but changed ({change}); give the new setting a new `run:` name"
    )


def _run_json(config: Config) -> bytes:
    return (json.dumps({"config": config.model_dump(), "versions": versions()}, indent=1) + "\n").encode()
