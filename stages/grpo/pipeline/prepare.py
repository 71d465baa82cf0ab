"""prepare: configuration -> run.json, prompts/, policy/. What a run stands on, fixed for its whole life."""

from contextlib import suppress

from grpo.artifacts import STAGE_OUTPUTS, ActiveRun, Run, created_config, files, is_hub_id, seal, versions
from grpo.config import Config, differing_keys, overridden_keys
from grpo.errors import CorruptError, DataError, InputError
from grpo.models.find import BUILT_IN, configured_model, local_model
from grpo.prompts import table as prompts
from grpo.prompts.held_out import compare


def prepare(run: ActiveRun) -> None:
    """Make sure that run.json, prompts/ and policy/ are there and are those of the configuration.

    Needs the lock. Raises as check_stand(); what needs no model is looked at before one is fetched, and
    before anything is written. A run that holds no rollouts yet is begun anew with whatever is configured.
    """
    begun, created = bool(run.iterations()), (run.path / "run.json").exists()
    check_stand(run)
    if not begun:
        from grpo.pipeline.ahead import check_ahead  # it imports torch: a complete run does without

        check_ahead(run)
    ids = find_start(run)
    for teacher in run.config.score.teachers:
        configured_model(run, "score.teachers.model", teacher.model)
    manifest = run.manifest("policy", None)
    # Before the run has begun, prompts in the words and tokens of another model may be there.
    policy = None if begun else ids["policy"]
    before = run.id_of(prompts.OUTPUT)
    _prompts(run, begun, created, policy)
    _held_out(run, policy)
    if manifest is None or manifest.ids != ids:
        from grpo.pipeline.begin import commit_policy

        commit_policy(run, {part: name for part, (_, name) in _start(run).items()}, ids)
    if not (begun and created):
        _write_down(run, created, before not in (None, run.id_of(prompts.OUTPUT)))


def check_local_models(run: ActiveRun) -> None:
    """Raise InputError (exit 4) for a checkpoint of a run yet to begin that is not where its name says.

    One that would be fetched, or trained, is not looked at.
    """
    if run.iterations():
        return  # it may be another than before, which is said first
    for key, name in _start(run).values():
        if name not in BUILT_IN and not is_hub_id(name, run.imports):
            configured_model(run, key, name)


def find_start(run: ActiveRun) -> dict[str, str]:
    """Find the checkpoints that the run stands on, `run.start`; their ids.

    Raises InputError (exit 4) for one that is not there, and where a run that has begun stands on others.
    """
    run.start = {part: configured_model(run, key, name) for part, (key, name) in _start(run).items()}
    ids = {part: run.checkpoint_id(str(path.absolute())) for part, path in run.start.items()}
    if run.iterations():
        _check_models(run, ids)
    return ids


def check_stand(run: ActiveRun) -> None:
    """Raise InputError (exit 4) for a run that was made with other prompts, another model or seed.

    Those ask for a new `run:`. Writes and fetches nothing: a model that is not here is known by its name.
    """
    if not run.iterations():
        return
    _check_seed(run)
    manifest = run.manifest("policy", None)
    were = manifest.config if manifest else {}
    paths = {part: (name, local_model(run, name)) for part, (_, name) in _start(run).items()}
    for part, (name, path) in paths.items():
        if path is None and were.get(part, name) != name:
            raise InputError(_fixed(run, _start(run)[part][0], were[part], name))
    known = {part: path for part, (_, path) in paths.items() if path is not None and path.is_dir()}
    _check_models(run, {part: run.checkpoint_id(str(path.absolute())) for part, path in known.items()})
    held = run.manifest(prompts.OUTPUT, None)
    if held is not None and not (plan := prompts.plan(run, kept=held)).same_as(held):
        raise InputError(_fixed(run, "prompts", "", "; ".join(plan.differences(held))))


def _start(run: ActiveRun) -> dict[str, tuple[str, str]]:
    """The checkpoints that a run stands on: the key that names each, and the name."""
    model, reference = run.config.model, run.config.update.reference
    return {
        "policy": ("model", model),
        "reference": ("update.reference", reference) if reference is not None else ("model", model),
    }


def _check_seed(run: ActiveRun) -> None:
    if (run.path / "run.json").exists():
        seed = created_config(run.path).seed
    else:  # it was damaged, and set aside
        sampled = (run.manifest("rollouts", iteration) for iteration in run.iterations())
        seed = next((found.config["seed"] for found in sampled if found), run.config.seed)
    if seed != run.config.seed:
        raise InputError(_fixed(run, "seed", seed, run.config.seed))


def _check_models(run: ActiveRun, ids: dict[str, str]) -> None:
    """ids: of the configured checkpoints, of those that are known."""
    manifest = run.manifest("policy", None)
    if manifest is None:  # damaged, and set aside: what was made from it says which it was
        held: dict[str, str | None] = {
            "policy": _recorded(run, "policy@0"),
            "reference": _recorded(run, "reference"),
        }
    else:
        held = {**manifest.ids}
    for part, id_ in ids.items():
        if held.get(part) not in (None, id_):
            key, name = "model" if part == "policy" else "update.reference", _start(run)[part][1]
            was = manifest.config.get(part, "") if manifest else ""
            raise InputError(_fixed(run, key, was, f"{name} (other files)"))


def _write_down(run: ActiveRun, created: bool, other_prompts: bool) -> None:
    """Write run.json, and say what differs from the objective, or from what the run was begun with."""
    differs = overridden_keys(run.config)
    if run.iterations():  # else it is a run's first
        run.console.say(
            f"run {run.name}: run.json was gone; it is written again, with what is configured now"
        )
    if created:
        with suppress(CorruptError, InputError):  # damaged, or of another version: nothing stands on it
            were = created_config(run.path)
            differs = differing_keys(were.model_dump(), run.config.model_dump())
            if other_prompts and not any(text.startswith("prompts") for text in differs):
                differs.append("prompts: their content")
            if not differs:
                return
            text = "; ".join(differs)
            run.console.say(f"run {run.name} holds no rollouts yet, so it starts over with {text}")
            differs = []
    for line in differs:
        run.console.say(f"differs from its objective: {line}")
    # Its name is synced with that of the first iteration: lost before, it is written again as it was.
    files.write_file(run.path / "run.json", run_json(run.config))


def _recorded(run: Run, reference: str) -> str | None:
    """Id of what the run stands on, from the first output that was made from it."""
    manifests = (run.manifest(output, n) for n in run.iterations() for output in STAGE_OUTPUTS)
    found = (manifest.inputs.get(reference) for manifest in manifests if manifest is not None)
    return next((id_ for id_ in found if id_), None)


def _prompts(run: ActiveRun, begun: bool, created: bool, policy: str | None) -> None:
    manifest = run.manifest(prompts.OUTPUT, None)
    plan = prompts.plan(run, kept=manifest if begun or created else None)
    if manifest is not None and policy in (None, manifest.summary.get("policy")) and plan.same_as(manifest):
        if (begun or created) and prompts.source_is_gone(run):
            run.console.say(f"prompts.source: {run.config.prompts.source} is gone; the run has its own copy")
        return
    expected = _recorded(run, prompts.OUTPUT)
    from grpo.pipeline.begin import normalise

    normalise(run, plan, expected)


def _held_out(run: ActiveRun, policy: str | None) -> None:
    """Commit `eval_prompts` where `evaluate` is configured: others than before are for what comes next."""
    if run.config.evaluate is None:
        return
    manifest = run.manifest(prompts.HELD_OUT, None)
    try:
        plan = prompts.plan(run, prompts.HELD_OUT, manifest)
        if (
            manifest is not None
            and policy in (None, manifest.summary.get("policy"))
            and plan.same_as(manifest)
        ):
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
