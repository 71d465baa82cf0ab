"""restart: `--from N`, what it reruns, and how that is moved out of the way."""

from pathlib import Path

from grpo.artifacts import CHECKPOINT, ActiveRun, Run, discard, files, origin_of, read_sealed, seal
from grpo.errors import CorruptError, InputError
from grpo.pipeline.stages import EVALUATE, GENERATE, STAGES, UPDATE, Stage
from grpo.pipeline.states import State, evaluation_states, nearest_policy, states
from grpo.update.plan import require_reference


def start_over(run: ActiveRun, iteration: int) -> None:
    """`--from N`: note the intent, then clear the way; a killed one is finished by the next run.

    Raises InputError (exit 4), with nothing moved, when the policy to go on from can be had no more or what
    is before `iteration` is missing or stale: a plain run could not go on from there.
    """
    present = states(run, iteration)  # what is later goes, however damaged it is
    for number in range(iteration):
        for name, state in present.get(number, {STAGES[0].name: State("missing")}).items():
            if state.name in ("missing", "partial", "stale"):
                nearest = nearest_policy(run, number)
                can_alone = nearest == number or name not in (GENERATE.name, UPDATE.name)
                alone = f", or `grpo {name} --iteration {number}`" if can_alone else ""
                raise InputError(
                    f"--from {iteration}: {name} of iteration {number} is {state.name}; nothing was moved;"
                    f" begin with that: --from {nearest}{alone}"
                )
    _, redone = done_again(run, iteration)
    if redone or run.manifest(UPDATE.output, iteration) is None:
        origin_of(run, iteration)
        require_reference(run, iteration)
    files.write_file(intent_path(run), seal({"from": iteration}))
    files.sync_folder(run.path)
    finish_start_over(run)


def finish_start_over(run: ActiveRun) -> None:
    """Move later iterations, then what is stale or changed in N and what follows it there, to .trash.

    With an update goes the checkpoint of its policy.
    """
    first = read_intent(run)
    if first is None:
        return
    later, redone = done_again(run, first)
    for iteration in reversed(later):
        discard(run, run.staging_root(iteration))
        discard(run, run.iteration_root(iteration))
    discard(run, run.staging_root(first))
    # Where its rollouts stay, how a policy was measured is history: `grpo run` does not measure it again.
    sampled_anew = STAGES[0] in redone or run.manifest(STAGES[0].output, first) is None
    if sampled_anew and _measured_otherwise(run, first):
        discard(run, run.folder(EVALUATE.output, first))
    if UPDATE in redone:  # first its checkpoint: what it was written from goes
        discard(run, run.folder(CHECKPOINT, first))
    for stage in reversed(redone):  # nothing stays that was made from what is gone
        discard(run, run.folder(stage.output, first))
    files.remove_file(intent_path(run))
    files.sync_folder(run.path)


def intent_path(run: Run) -> Path:
    """Where `--from` notes what it is about to do."""
    return run.path / ".from.json"


def read_intent(run: Run) -> int | None:
    """The N of a `--from N` that is not finished. Raises CorruptError (exit 6) when it cannot be read."""
    path = intent_path(run)
    if not path.exists():
        return None
    way = "`grpo verify --discard` moves it away, and `grpo run --from N` begins again"
    try:
        first = int(read_sealed(path, **{"from": int})["from"])
    except CorruptError as error:
        raise CorruptError(f"{error}; {way}") from None
    if not 0 <= first < 10**9:
        raise CorruptError(f"{path}: from: no iteration is called {first}; {way}")
    return first


def done_again(run: ActiveRun, first: int) -> tuple[list[int], list[Stage]]:
    """What `--from` does again: later iterations, and stages of `first` from a stale or differing one on."""
    by_stage = states(run, first).get(first, {})
    old = {name for name, state in by_stage.items() if state.name in ("stale", "changed")}
    changed = [stage.name in old for stage in STAGES]
    stages = [*(STAGES[changed.index(True) :] if any(changed) else ())]
    again = [stage for stage in stages if stage.name in by_stage]
    iterations = run.iterations()
    # The last policy has an evaluation and nothing else; it goes where the policy is made again.
    kept = first + 1 if run.manifest(UPDATE.output, first) is not None and not again else first
    measured = [policy for policy in run.evaluations() if policy not in iterations and policy > kept]
    return sorted([*(n for n in iterations if n > first), *measured]), again


def _measured_otherwise(run: ActiveRun, policy: int) -> bool:
    """Whether a policy that is still there was measured in another way than configured now, or stale."""
    if policy not in run.evaluations():
        return False
    if run.config.evaluate is None:
        return False
    return evaluation_states(run, states(run))[policy].name in ("stale", "changed")
