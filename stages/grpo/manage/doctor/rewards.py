"""rewards: what each makes of a right answer and of an empty one, asked in the way in which `score` asks.

A judge is not asked: an answer may cost money.
"""

from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

from grpo.artifacts import ActiveRun
from grpo.config import RewardConfig
from grpo.errors import EngineError
from grpo.manage.doctor.inputs import Checkpoint, Prompts, check_model
from grpo.manage.doctor.report import Check, Report
from grpo.models.loading import best_device, load_tokenizer
from grpo.prompts.rows import as_given
from grpo.prompts.source import Row
from grpo.score.functions.built_in import Text
from grpo.score.functions.pool import FunctionPool
from grpo.score.judge.client import Judge
from grpo.score.judge.rubric import rubric_of
from grpo.score.outcome import Outcome
from grpo.score.reward_model import RewardModel
from grpo.score.scorers import Rollout, Scorers, score
from grpo.tables import RENDERED

_FORMS = (
    "{}",
    "#### {}",
    "\\boxed{{{}}}",
    "<think>\nso it is {0}\n</think>\n<answer>{0}</answer>",
    "<think>\nso it is {0}\n</think>\n{0}",
)
"""How a right answer is written, by what rewards look for."""
_ANSWER = "42"  # where the data has none
_NUM_PROMPTS = 3  # asked one after the other until one of them tells right from empty
_TIMEOUT_S = 20.0  # of a call here, at most
_QUICK = 200_000_000  # parameters of a reward model that is loaded without --model
_FAILED = ("error", "timeout", "nonfinite")


@dataclass(frozen=True)
class _Tried:
    """A reward that was asked. alike: its one value of right answers and of empty ones."""

    check: Check
    tells_apart: bool = False
    alike: float | None = None


def check_rewards(
    run: ActiveRun, report: Report, policy: Checkpoint, found: list[Prompts], with_model: bool
) -> None:
    """Every reward and teacher: whether it is there, does with the columns of `found`, and tells apart."""
    rows, tried = found[0].rows, list[_Tried]()
    with closing(FunctionPool(run.imports, 1)) as pool:
        for reward in run.config.score.rewards:
            name, judge = f"reward {reward.name}", reward.judge
            if reward.function is not None:
                needed = "a function that can be imported and takes its arguments"
                with report.check(name, reward.function, needed) as check:
                    for prompts in found:
                        pool.check(reward, _columns(prompts), prompts.empty)
                    scorers = Scorers(pool, None, {}, {}, {}, {})
                    tried.append(_try(run, check, reward, scorers, rows, policy))
            elif judge is not None:
                needed = "a judge with its rubric and its key (nothing is asked)"
                with report.check(name, f"{judge.model} at {judge.url}", needed):
                    for prompts in found:
                        rubric = rubric_of(reward, run.imports, _columns(prompts), prompts.empty)
                        Judge(reward, rubric).close()
            else:
                needed = "a sequence classifier with one label"
                model = check_model(run, report, name, str(reward.model), with_model, needed)
                quick = model.parameters is not None and (with_model or model.parameters <= _QUICK)
                if model.folder is not None and quick:
                    stop = run.console.stop_requested
                    with (
                        report.check(f"{name}, asked", "", needed) as check,
                        closing(RewardModel(model.folder, best_device(), stop)) as asked,
                    ):
                        scorers = Scorers(pool, None, {reward.name: asked}, {}, {}, {})
                        tried.append(_try(run, check, reward, scorers, rows, policy))
    _warn_alike(tried)


def check_teachers(run: ActiveRun, report: Report, policy: Checkpoint, with_model: bool) -> None:
    """Every teacher: a model that can be read, and the policy's own tokens."""
    for teacher in run.config.score.teachers:
        name, needed = f"teacher {teacher.name}", "a causal language model with the policy's tokenizer"
        found = check_model(run, report, name, teacher.model, with_model, needed)
        if found.folder is not None and policy.folder is not None:
            own, its = (load_tokenizer(folder).get_vocab() for folder in (policy.folder, found.folder))
            if other := [token for token in own if its.get(token) != own[token]]:
                report.checks[-1].warn(
                    f"{len(other):,} of {len(own):,} tokens of the policy are other ones for it, such as"
                    f" {other[0]!r}; a rollout that has one ends the run"
                )


def _columns(prompts: Prompts) -> Collection[str] | None:
    return None if prompts.columns is None else sorted(prompts.columns)


def _try(
    run: ActiveRun,
    check: Check,
    reward: RewardConfig,
    scorers: Scorers,
    rows: list[Row],
    policy: Checkpoint,
) -> _Tried:
    """Say what the first prompts come to. Raises EngineError (exit 8) where nothing can be scored."""
    asked = reward.model_copy(update={"timeout_s": min(reward.timeout_s, _TIMEOUT_S)})
    answered = [row for row in rows if (row["answer"] or "").strip()] or rows
    outcomes: list[Outcome] = []
    for rollouts in islice(_groups(answered, policy), _NUM_PROMPTS):
        group = [outcome for _, outcome in score(run, scorers, 0, asked, rollouts)]
        outcomes += group
        values = [outcome.value for outcome in group if outcome.value is not None]
        if any(outcome.status in _FAILED for outcome in group) or len(set(values)) > 1:
            break
    else:
        if values := [outcome.value for outcome in outcomes if outcome.value is not None]:
            check.found += f": {values[0]:g} where right, and where empty"
            return _Tried(check, alike=values[0])
        if outcomes:
            check.warn(
                "applies to none of the first prompts (it gave None); what is not scored teaches nothing"
            )
        return _Tried(check)
    return _Tried(check, tells_apart=_say(run, check, reward, group) and reward.weight != 0)


def _warn_alike(tried: list[_Tried]) -> None:
    """Say which rewards tell nothing apart, unless another does: one of length or of form need not."""
    for each in tried:
        if each.alike is not None and not any(other.tells_apart for other in tried):
            each.check.warn(
                f"gives {each.alike:g} to a right answer in {len(_FORMS)} forms, and to an empty response"
                " too; a group whose rewards are all equal teaches nothing"
            )


def _say(run: ActiveRun, check: Check, reward: RewardConfig, group: list[Outcome]) -> bool:
    """Say what one group came to: right answers, and an empty response at its end; whether that is less."""
    failed = [outcome for outcome in group if outcome.status in _FAILED]
    if failed:
        text = f"{len(failed)} of {len(group)} made-up responses failed; first: {failed[0].error}"
        # One that takes longer than is waited for here may do in a run.
        late = reward.timeout_s > _TIMEOUT_S or reward.on_timeout != "error"
        certain = not (late and any(outcome.status == "timeout" for outcome in failed))
        if certain and len(failed) == len(group) and run.config.score.on_error == "stop":
            raise EngineError(text)
        check.warn(text)
        return False
    *right, empty = [outcome.value for outcome in group]
    best = max(value for value in right if value is not None)
    check.found += f": {best:g} where right, {'none' if empty is None else f'{empty:g}'} where empty"
    if empty is not None and empty > best:
        check.warn(f"gives an empty response {empty:g}, and no form of a right answer more than {best:g}")
    return empty is None or empty < best


def _groups(rows: list[Row], policy: Checkpoint) -> Iterator[list[Rollout]]:
    """Of each prompt a group: its answer in the forms that rewards look for, and an empty response."""
    tokenizer = load_tokenizer(policy.folder) if policy.folder is not None and rows else None
    for number, row in enumerate(rows):
        columns: dict[str, Any] = {**row}
        prompt, messages, _ = columns.pop("prompt"), columns.pop("messages"), columns.pop(RENDERED, None)
        answer, group = (row["answer"] or "").strip() or _ANSWER, []
        for sample, response in enumerate([*(form.format(answer) for form in _FORMS), ""]):
            ids = tokenizer.encode(response, add_special_tokens=False) if tokenizer else [*response.encode()]
            asked: Text = prompt
            said: Text = response
            if messages is not None:
                asked, said = as_given(messages), [{"role": "assistant", "content": response}]
            group.append(Rollout((number, sample), asked, said, response, ids, columns))
        yield group
