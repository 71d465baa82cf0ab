"""prepare: configuration -> run.json, prompts/, policy/. What a run stands on, fixed for its whole life."""

from typing import Any

from grpo.artifacts import STAGE_OUTPUTS, ActiveRun, Run, created_config, files, seal, versions
from grpo.config import Config, overridden_keys
from grpo.errors import DataError, InputError
from grpo.models.find import configured_model
from grpo.prompts import table as prompts
from grpo.prompts.held_out import compare


def prepare(run: ActiveRun) -> None:
    """Make sure that run.json, prompts/ and policy/ are there and are those of the configuration.

    Needs the lock. Raises InputError (exit 4) when the run was made with other prompts, another model,
    reference or seed: those ask for a new `run:`.
    """
    created = (run.path / "run.json").exists()
    begun = created or bool(run.iterations())  # run.json may have been damaged, and set aside
    _check_seed(run, created)
    names = {"policy": run.config.model, "reference": run.config.update.reference or run.config.model}
    key_of = {"policy": "model", "reference": "update.reference"}
    if run.config.update.reference is None:
        key_of["reference"] = "model"
    paths = {part: configured_model(run, key_of[part], name) for part, name in names.items()}
    for teacher in run.config.score.teachers:
        configured_model(run, "score.teachers.model", teacher.model)
    ids = {part: run.checkpoint_id(str(path.absolute())) for part, path in paths.items()}
    manifest = run.manifest("policy", None)
    if manifest is not None and begun:
        _check_models(run, names, ids, manifest.ids, manifest.config)
    elif manifest is None:  # damaged, and set aside: what was made from it says which it was
        read = {"policy": _recorded(run, "policy@0"), "reference": _recorded(run, "reference")}
        _check_models(run, names, ids, {part: id_ for part, id_ in read.items() if id_}, {})
    run.start = paths
    # Before the run has begun, prompts of another model's template may be there.
    are_its = begun or (manifest is not None and manifest.ids == ids)
    _prompts(run, begun, are_its)
    _held_out(run, are_its)
    if manifest is None or manifest.ids != ids:
        from grpo.pipeline.begin import commit_policy  # it loads models: a complete run does without

        commit_policy(run, names, ids)
    if not created:
        for line in overridden_keys(run.config):
            run.console.say(f"differs from its objective: {line}")
        # Its name is synced with that of the first iteration: lost before, it is written again as it was.
        files.write_file(run.path / "run.json", run_json(run.config))


def _check_seed(run: ActiveRun, created: bool) -> None:
    if created:
        seed = created_config(run.path).seed
    else:
        sampled = (run.manifest("rollouts", iteration) for iteration in run.iterations())
        seed = next((found.config["seed"] for found in sampled if found), run.config.seed)
    if seed != run.config.seed:
        raise InputError(_fixed(run, "seed", seed, run.config.seed))


def _check_models(
    run: Run, names: dict[str, str], ids: dict[str, str], held: dict[str, str], were: dict[str, Any]
) -> None:
    for part, id_ in held.items():
        if id_ != ids[part]:
            key = "model" if part == "policy" else "update.reference"
            raise InputError(_fixed(run, key, were.get(part, ""), f"{names[part]} (other files)"))


def _recorded(run: Run, reference: str) -> str | None:
    """Id of what the run stands on, from the first output that was made from it."""
    manifests = (run.manifest(output, n) for n in run.iterations() for output in STAGE_OUTPUTS)
    found = (manifest.inputs.get(reference) for manifest in manifests if manifest is not None)
    return next((id_ for id_ in found if id_), None)


def _prompts(run: ActiveRun, begun: bool, are_its: bool) -> None:
    manifest = run.manifest(prompts.OUTPUT, None)
    plan = prompts.plan(run, kept=manifest if begun else None)
    if manifest is not None and are_its and plan.same_as(manifest):
        if begun and prompts.source_is_gone(run):
            run.console.say(f"prompts.source: {run.config.prompts.source} is gone; the run has its own copy")
        return
    if manifest is not None and begun:
        raise InputError(_fixed(run, "prompts", "", "; ".join(plan.differences(manifest))))
    expected = _recorded(run, prompts.OUTPUT)
    from grpo.pipeline.begin import normalise

    normalise(run, plan, expected)


def _held_out(run: ActiveRun, are_its: bool) -> None:
    """Commit `eval_prompts` where `evaluate` is configured: others than before are for what comes next."""
    if run.config.evaluate is None:
        return
    manifest = run.manifest(prompts.HELD_OUT, None)
    try:
        plan = prompts.plan(run, prompts.HELD_OUT, manifest)
        if manifest is not None and are_its and plan.same_as(manifest):
            if prompts.source_is_gone(run, prompts.HELD_OUT):
                source = run.config.evaluate.prompts.source
                run.console.say(f"evaluate.prompts.source: {source} is gone; the run has its own copy")
            return
        from grpo.pipeline.begin import normalise

        normalise(run, plan)
        _say_shared(run)
    except DataError as error:
        raise DataError(f"evaluate.prompts: {error}") from None


def _say_shared(run: ActiveRun) -> None:
    """Say what of the held-out prompts training draws too, or draws in another form."""
    # One and the same object: a checkpoint is measured with them, and training draws nothing.
    if run.config.evaluate is None or run.config.evaluate.prompts is run.config.prompts:
        return
    drawn, held_out = (
        run.read(output, None, ["prompt", "messages"]).to_pylist()
        for output in (prompts.OUTPUT, prompts.HELD_OUT)
    )
    for line in compare(run.config, drawn, held_out):
        run.console.say(line)


def _fixed(run: Run, key: str, old: object, new: object) -> str:
    change = f"{old} -> {new}" if old != "" else new
    return (
        f"{key}: fixed for the run {run.name}, but changed ({change}); give the new setting a new `run:` name"
    )


def run_json(config: Config) -> bytes:
    """The content of run.json: the configuration at creation, every value, and who made it."""
    return seal({"config": config.model_dump(), "versions": versions()})
