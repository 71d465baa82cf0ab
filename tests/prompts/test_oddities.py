"""What is odd about prompts: a line for each thing, and none for prompts that are as they should be."""

from contextlib import closing
from typing import Any

import pytest

from grpo.config import Config
from grpo.models import starter_model
from grpo.prompts.chat import Chat
from grpo.prompts.held_out import compare, same_source
from grpo.prompts.oddities import Oddities
from grpo.prompts.rendering import Encoder

GOOD = starter_model.CHAT_TEMPLATE
BARE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
OPEN = BARE + "{% if add_generation_prompt %}[assistant]{% endif %}"


def plain(*pairs: tuple[str, str | None], **own: Any) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "messages": None, "answer": answer, **own} for prompt, answer in pairs]


def chats(*messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"prompt": None, "messages": each, "answer": str(n)} for n, each in enumerate(messages)]


def user(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **fields}


def lines(rows: list[dict[str, Any]], template: str = GOOD, **arguments: Any) -> list[str]:
    encoder, odd = Encoder(starter_model.build_tokenizer(), Chat(template, arguments)), Oddities()
    with closing(encoder):
        odd.add(encoder.rows(rows))
        return odd.lines(encoder)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (plain(("1+2=", "3"), ("1+3=", "4")), []),
        (plain(("a", None), ("b", None)), []),
        (
            plain(*[("1+2=", "3")] * 6, ("1+2=", "4"), ("3+4=", "7")),
            ["8 rows, 2 distinct prompts; 1+2= has answers 3 and 4"],
        ),
        (plain(("a", "1"), ("a", "1")), ["2 rows, 1 distinct prompts"]),
        (
            plain(("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")),
            ["4 rows, 2 distinct prompts; a has answers 1 and 2, and 1 more have several"],
        ),
        (plain(("a", "1"), ("b", None)), ["1 of 2 rows have no answer"]),
        (plain(("a", ""), ("b", "1")), ["1 of 2 answers are empty text, which is not a missing one"]),
        (
            plain(("a", "NA"), ("b", "1")),
            ["1 of 2 answers are the text NA; leave it empty where there is none"],
        ),
        (plain(("a", "3.0"), ("b", "1")), ["1 of 2 answers are text like 3.0; a response 3 is another"]),
        (
            plain(("a", None), reward_model={"ground_truth": "3"}),
            ["no row has an answer; columns.answer may name reward_model.ground_truth"],
        ),
    ],
)
def test_of_text(rows: list[dict[str, Any]], found: list[str]) -> None:
    assert lines(rows) == found


@pytest.mark.parametrize(
    ("rows", "template", "found"),
    [
        (chats([user()]), GOOD, []),
        (chats([{"role": "system", "content": "Be brief."}, user()]), GOOD, []),
        (
            chats([{"role": "system", "content": "Be brief."}, user()], [user("x")]),
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}>{% endif %}",
            ["the chat template leaves text of system messages out, in 1 of 2 chats"],
        ),
        (
            chats([user("first"), {"role": "assistant", "content": "reply"}, user("last")]),
            "{{ messages[-1].content }}{% if add_generation_prompt %}>{% endif %}",
            [
                "the chat template leaves text of assistant messages out, in 1 of 1 chats",
                "the chat template leaves text of user messages out, in 1 of 1 chats",
            ],
        ),
        (
            chats([user()]),
            BARE,
            [
                "the chat template gives the same text with and without add_generation_prompt: nothing says"
                " that the assistant is next"
            ],
        ),
        (
            chats([user(), {"role": "assistant", "content": "It is"}]),
            GOOD,
            ["1 of 1 chats end in an assistant message: it is continued"],
        ),
        (
            chats([user(name="Ann", weight=0)]),
            OPEN,
            [
                "field name of messages has no effect: the chat template does not show it",
                "field weight of messages has no effect: the chat template does not show it",
            ],
        ),
        (chats([user(name="Ann")]), OPEN + "{{ messages[0].name }}", []),
        (
            chats([user()]),
            OPEN + "{{ strftime_now('%Y') }}",
            ["the chat template asks for the time: it is that of now, in UTC, for the whole run"],
        ),
    ],
)
def test_of_chats(rows: list[dict[str, Any]], template: str, found: list[str]) -> None:
    assert sorted(lines(rows, template)) == sorted(found)


def test_a_variable_that_changes_nothing() -> None:
    template = OPEN + "{% if thinking is defined and thinking is false %}!{% endif %}"
    assert lines(chats([user()]), template, thinking=False) == []
    found = ["chat_template_arguments.thinking: True changes nothing in these prompts"]
    assert lines(chats([user()]), template, thinking=True) == found


# ---- held-out prompts ----


def config(prompts: dict[str, Any] | None = None, **held_out: Any) -> Config:
    values = {
        "run": "r",
        "model": "m",
        "prompts": {"source": "a.jsonl", **(prompts or {})},
        "evaluate": {"prompts": {"source": "b.jsonl", **held_out}},
        "score": {"rewards": [{"function": "exact_answer"}]},
    }
    return Config.model_validate(values)


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("drawn", "held_out", "found"),
    [
        (plain(("a", "1")), plain(("b", "1")), []),
        (
            plain(("a", "1"), ("c", "1")),
            plain(("a", "1"), ("b", "1")),
            ["1 of 2 are among `prompts`: not held out"],
        ),
        (
            chats([user("a")]),
            plain(("a", "1")),
            [
                "1 of 1 are among `prompts`: not held out",
                "1 of 1 are text, and `prompts` are chats: the model is measured on another form",
            ],
        ),
        (chats([SYSTEM, user("a")]), chats([SYSTEM, user("b")]), []),
        (
            chats([SYSTEM, user("a")]),
            chats([user("b")]),
            ["1 of 1 have no system message, or another one than `prompts` have"],
        ),
        (
            chats([SYSTEM, user("a")]),
            chats([user("a")]),
            [
                "1 of 1 are among `prompts`: not held out",
                "1 of 1 have no system message, or another one than `prompts` have",
            ],
        ),
        (
            chats([SYSTEM, user("a")], [{**SYSTEM, "content": "x"}, user("b")]),
            chats([{**SYSTEM, "content": "y"}, user("c")]),
            [],
        ),
    ],
)
def test_held_out_prompts_are_compared(drawn: Any, held_out: Any, found: list[str]) -> None:
    assert compare(config(), drawn, held_out) == [f"evaluate.prompts: {line}" for line in found]


def test_another_template_is_said() -> None:
    other = config({"chat": True}, chat=True, chat_template_arguments={"enable_thinking": False})
    found = compare(other, chats([user("a")]), chats([user("b")]))
    assert found == ["evaluate.prompts: chat_template_arguments is not that of `prompts`"]


def test_the_split_that_is_trained_on() -> None:
    hub = config({"source": "openai/gsm8k"}, source="openai/gsm8k")
    assert same_source(hub) == ("evaluate.prompts: openai/gsm8k (train) is what `prompts` are: not held out")
    assert same_source(config({"source": "openai/gsm8k"}, source="openai/gsm8k", split="test")) == ""
