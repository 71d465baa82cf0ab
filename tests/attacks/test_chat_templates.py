"""Chat templates that others wrote: one that never ends, or takes all memory, is exit 3; SIGTERM is heard."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from tests.conftest import Grpo
from tests.score.test_reward_model import TEMPLATE, last_token_model, save

from grpo.errors import DataError, InputError, Interrupted
from grpo.models import starter_model
from grpo.prompts.chat import Chat
from grpo.prompts.rendering import encode
from grpo.score.reward_model import RewardModel

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def settings(project: Path, template: str, place: str) -> list[str]:
    """A project whose chats meet `template`: of the configuration, or in its checkpoint."""
    if place == "checkpoint":
        (project / "model" / "chat_template.jinja").write_text(template)
        return ["--set", "prompts.chat=true"]
    (project / "own.jinja").write_text(template)
    return ["--set", "prompts.chat=true", "--set", "prompts.chat_template=own.jinja"]


@pytest.mark.parametrize("place", ["checkpoint", "configuration"])
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'x' * 3000000000 }}", "it takes more than 2 GiB of memory"),
        ("{% for a in range(10**12) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ cycler.__init__.__globals__ }}", "access to attribute '__init__' of 'type' object is unsafe"),
    ],
)
def test_it_is_refused(project: Path, grpo: Grpo, template: str, reason: str, place: str) -> None:
    arguments = settings(project, template, place)
    code, _, err = grpo("run", *arguments)
    message = f"error: prompts: the chat template cannot render prompt 0: {reason}"
    assert (code, message in err, "Traceback" in err) == (3, True, False), err


@pytest.mark.parametrize("command", ["run", "doctor"])
def test_sigterm_ends_a_command_that_waits_for_one_that_never_ends(project: Path, command: str) -> None:
    arguments = settings(project, LOOP, "checkpoint")
    start = [sys.executable, "-c", "from grpo.cli import main; main()", command, *arguments]
    process = subprocess.Popen(start, cwd=project, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        deadline = time.monotonic() + 60
        while not (children := _children(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        process.wait(timeout=60)
        assert time.monotonic() - sent < 8  # before the template's own limit of 10 s
        assert process.returncode in (143, -signal.SIGTERM)
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(Path(f"/proc/{child}").exists() for child in children)
    finally:
        process.kill()


def _children(pid: int) -> list[int]:
    """Processes of Python that were started by it."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return list(map(int, found.stdout.split()))


# ---- the template of a reward model: of a checkpoint that others made, too ----

LIMITS = {
    "{{ 'x' * 6000000000 }}": "it takes more than 2 GiB of memory",
    "{{ messages[0].content * 3000000000 }}": "it takes more than 2 GiB of memory",
    LOOP: "it takes more than 1 s",
    "{{ (messages | length + 6) ** (7 ** 11) }}": "it takes more than 1 s",
}
REFUSALS = {
    "{{ raise_exception('no') }}": "no",
    "{% for %}": "Expected an expression",
    "{{ 1 / 0 }}": "division by zero",
    "{{ messages[0].content + 1 }}": "can only concatenate str",
    "{{ messages[9].content }}": "list object has no element 9",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "maximum recursion depth exceeded",
    "{{ messages[0].content * 30000000 }}": "it writes 30,000,017 characters; 16,777,216 are the most",
    '{{ "\\ud800" }}': "it writes a lone surrogate",
    "{{ ''.__class__.__mro__ }}": "access to attribute '__class__' of 'str' object is unsafe",
}


@pytest.mark.parametrize("template", LIMITS)
def test_a_reward_model_s_template_at_a_limit_ends_the_command(tmp_path: Path, template: str) -> None:
    started = time.monotonic()
    with (
        closing(RewardModel(save(tmp_path, last_token_model(), template), "cpu")) as model,
        pytest.raises(DataError) as caught,
    ):
        model.score(["a"] * 50, ["b"] * 50, 4096, timeout_s=1)
    where = f"reward model {tmp_path}: its chat template cannot render a rollout: "
    assert str(caught.value).startswith(where)
    assert LIMITS[template] in str(caught.value)
    assert time.monotonic() - started < 60  # once, not for each rollout


def test_what_a_reward_model_s_template_raises_is_an_error_of_that_rollout(tmp_path: Path) -> None:
    """All of them in one template, each for its own rollout; the one behind them is scored."""
    cases = "".join(f"{{% if messages[1].content == 'b{n}' %}}{each}{{% endif %}}" for n, each in
                    enumerate(REFUSALS) if each != "{% for %}")  # fmt: skip
    with closing(RewardModel(save(tmp_path, last_token_model(), cases + TEMPLATE), "cpu")) as model:
        responses = [f"b{n}" for n, each in enumerate(REFUSALS) if each != "{% for %}"]
        outcomes = model.score(["a"] * len(responses) + ["a"], [*responses, "b"], 4096)
    reasons = [reason for each, reason in REFUSALS.items() if each != "{% for %}"]
    for outcome, reason in zip(outcomes, [*reasons, None], strict=True):
        assert (outcome.status, reason is None or reason in str(outcome.error)) == (
            "ok" if reason is None else "error",
            True,
        ), outcome


def test_a_reward_model_s_template_that_cannot_be_compiled_is_an_error_too(tmp_path: Path) -> None:
    with closing(RewardModel(save(tmp_path, last_token_model(), "{% for %}"), "cpu")) as model:
        outcomes = model.score(["a", "b"], ["b", "c"], 4096)
    assert [(each.status, "Expected an expression" in str(each.error)) for each in outcomes] == [
        ("error", True)
    ] * 2


def test_a_signal_is_heard_while_a_reward_model_s_template_loops(tmp_path: Path) -> None:
    started = time.monotonic()

    def stop() -> None:
        if time.monotonic() - started > 3:
            raise Interrupted(15)

    reward_model = RewardModel(save(tmp_path, last_token_model(), LOOP), "cpu", stop)
    with closing(reward_model), pytest.raises(Interrupted):
        reward_model.score(["a"], ["b"], 4096)
    assert time.monotonic() - started < 9  # the template's own limit is 10 s


def test_several_templates_of_which_none_is_the_default_are_refused(tmp_path: Path) -> None:
    tokenizer = starter_model.build_tokenizer()
    tokenizer.chat_template = {"tool_use": "x", "rag": "y"}
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(InputError, match=r"chat template: .*multiple chat templates with no default"):
        encode([{"prompt_id": 0, "prompt": None, "messages": messages}], tokenizer, Chat())
    save(tmp_path, last_token_model(), {"tool_use": "x", "rag": "y"})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"chat template: .*multiple chat templates with no default"):
        RewardModel(tmp_path, "cpu")
