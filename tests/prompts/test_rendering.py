"""Chats as the model sees them: what reaches the template, what it may not do, what does not change it."""

import time
from contextlib import closing
from typing import Any

import pytest

from grpo.errors import DataError, InputError, Interrupted, UsageError
from grpo.models import starter_model
from grpo.prompts.chat import Chat
from grpo.prompts.rendering import Encoder, encode, with_texts

# As models that may think have it: on unless it is turned off.
THINKING = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


def chat(*contents: str, **fields: Any) -> dict[str, Any]:
    """A row whose messages alternate between user and assistant; fields: more of the first message."""
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(contents)]
    return {"prompt_id": 3, "prompt": None, "messages": [messages[0] | fields, *messages[1:]]}


def text(template: str, row: dict[str, Any], **arguments: Any) -> str:
    """What a chat template makes of one row."""
    return encode([row], starter_model.build_tokenizer(), Chat(template, arguments))[0][0]


def test_arguments_reach_the_template() -> None:
    tokenizer = starter_model.build_tokenizer()
    tokenizer.chat_template = THINKING
    for value, shown in ((True, "<user>Hi<assistant>"), (False, "<user>Hi<assistant><think></think>")):
        texts, token_ids = encode([chat("Hi")], tokenizer, Chat(None, {"enable_thinking": value}))
        assert texts == [shown]
        assert token_ids == [list(shown.encode())]  # a token is a byte


def test_a_template_of_one_s_own_replaces_the_tokenizer_s() -> None:
    tokenizer = starter_model.build_tokenizer()
    own = Chat("{{ messages[0].content }}?{{ tail }}\n", {"tail": "!"})
    assert encode([chat("Hi")], tokenizer, Chat())[0] == ["user: Hi\nassistant: "]
    tokenizer.chat_template = None
    assert encode([chat("Hi")], tokenizer, own)[0] == ["Hi?!"]  # Jinja leaves the last line end out
    with pytest.raises(InputError, match="the model's tokenizer has no chat template"):
        encode([chat("Hi")], tokenizer, Chat())


def test_text_goes_past_every_template_and_what_has_its_text_is_not_rendered_again() -> None:
    plain = {"prompt": "1+1=", "messages": None}
    kept = chat("Hi") | {"rendered_prompt": "as it was"}
    texts, _ = encode([plain, kept], starter_model.build_tokenizer(), Chat("never", {"unknown": 1}))
    assert texts == ["1+1=", "as it was"]


@pytest.mark.parametrize(
    ("name", "hint"), [("enable_thinkng", "did you mean enable_thinking?"), ("zzz", "leave it out")]
)
def test_a_variable_that_the_template_does_not_know_is_refused(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        text(THINKING, chat("Hi"), **{name: False})
    message = f"prompts.chat_template_arguments: {name}: the chat template has no such variable; {hint}"
    assert str(caught.value) == message


def test_every_field_of_a_message_reaches_the_template() -> None:
    calls = [{"function": {"name": "calc", "arguments": {"x": 1}}}]
    row = chat("1+2=", name="Ann", weight=0, tool_calls=calls, reasoning_content="hm")
    shown = text("{{ messages[0] | tojson }}", row)
    assert shown == (
        '{"role": "user", "content": "1+2=", "name": "Ann", "weight": 0,'
        ' "tool_calls": [{"function": {"name": "calc", "arguments": {"x": 1}}}], "reasoning_content": "hm"}'
    )


def test_an_answer_that_is_begun_is_continued_as_trl_does() -> None:
    from trl.data_utils import apply_chat_template

    tokenizer = starter_model.build_tokenizer()
    rows = [chat("1+2=", "The total is"), chat("1+2="), chat("1+2=", "3", "so"), chat("a", "")]
    expected = [apply_chat_template({"prompt": row["messages"]}, tokenizer)["prompt"] for row in rows]
    assert encode(rows, tokenizer, Chat())[0] == expected
    assert expected[:2] == ["user: 1+2=\nassistant: The total is", "user: 1+2=\nassistant: "]


# ---- a template of others: exit 3, one line, in time ----

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected an expression, got 'end of statement block'"),
        ("{{ messages[0].content + 1 }}", 'can only concatenate str (not "int") to str'),
        ("{{ messages[3].content }}", "list object has no element 3"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for a in range(10**12) %}{% endfor %}", "Range too big"),
        ("{{ 'x' * 3000000000 }}", "it takes more than 2 GiB of memory"),
        ("{{ messages[0].content * 3000000000 }}", "it takes more than 2 GiB of memory"),
        ("{{ messages[0].content * 30000000 }}", "it writes 60,000,000 characters; 16,777,216 are the most"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        (LOOP, "it takes more than 1 s"),
        ("{% set n = namespace(x='a') %}" + LOOP, "it takes more than 1 s"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe."),
    ],
)  # fmt: skip
def test_a_template_that_cannot_render_a_prompt_names_it(template: str, reason: str) -> None:
    encoder = Encoder(starter_model.build_tokenizer(), Chat(template), timeout_s=1)
    with closing(encoder), pytest.raises(DataError) as caught:
        encoder.rows([chat("Hi")])
    assert str(caught.value).startswith(f"prompts: the chat template cannot render prompt 3: {reason}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", ["{{ 7 ** (7 ** 9) }}", "{{ (messages | length + 6) ** (7 ** 9) }}"])
def test_an_operation_that_hears_no_alarm_ends_with_its_process(template: str) -> None:
    started = time.perf_counter()
    encoder = Encoder(starter_model.build_tokenizer(), Chat(template), timeout_s=1)
    with closing(encoder), pytest.raises(DataError, match="prompt 3: it takes more than 1 s"):
        encoder.rows([chat("Hi")])
    assert time.perf_counter() - started < 60  # seconds of which most are for the process to start


def test_a_signal_ends_the_waiting_at_once() -> None:
    """As Console.stop_requested() raises it; the process is ended too."""
    started = time.perf_counter()

    def stop() -> None:
        if time.perf_counter() - started > 3:
            raise Interrupted(15)

    encoder = Encoder(starter_model.build_tokenizer(), Chat(LOOP), stop, timeout_s=100)
    with closing(encoder), pytest.raises(Interrupted):
        encoder.rows([chat("Hi")])
    assert time.perf_counter() - started < 20


# ---- what is hidden: clock, chance, time zone, locale, environment ----


def test_chance_has_a_seed_and_no_prompt_depends_on_those_before_it() -> None:
    template = "{{ range(99999) | random }} {{ lipsum(1) }} {{ strftime_now('%Z') }}"
    tokenizer = starter_model.build_tokenizer()
    [first, second], _ = encode([chat("a"), chat("b")], tokenizer, Chat(template))
    [alone], _ = encode([chat("b")], tokenizer, Chat(template))
    assert first == second == alone


@pytest.mark.parametrize(
    "variables",
    [
        {"TZ": "Asia/Tokyo"},
        {"TZ": "America/New_York", "LANG": "de_DE.UTF-8", "LC_ALL": "C"},
        {"PYTHONHASHSEED": "7", "HOME": "/nonexistent", "PYTHONUTF8": "0"},
    ],
)
def test_the_environment_is_no_part_of_a_prompt(variables: dict[str, str], monkeypatch: Any) -> None:
    template = "{{ strftime_now('%H %Z %A %x') }}|{{ {'b': 1, 'a': 2} }}|{{ messages[0].content | upper }}"
    plain = text(template, chat("straße é"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert text(template, chat("straße é")) == plain


def test_prompts_of_a_run_of_before_texts_were_kept_get_theirs() -> None:
    import pyarrow as pa

    from grpo import tables

    rows = [{"prompt_id": n, "prompt": None, "messages": chat(f"{n}")["messages"]} for n in range(3)]
    old = pa.Table.from_pylist(rows, schema=tables.schema("prompts"))
    found = with_texts(old, starter_model.build_tokenizer(), Chat(), lambda: None)
    assert found["rendered_prompt"].to_pylist() == [f"user: {n}\nassistant: " for n in range(3)]
    assert found.drop_columns("rendered_prompt").equals(old)
    assert with_texts(found, starter_model.build_tokenizer(), Chat("other"), lambda: None) is found
