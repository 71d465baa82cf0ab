# ruff: noqa: RUF001 - it is about characters that look alike
"""Numbers are read whole or not at all: by a table, by what is built up, and against a parser of its own."""

from decimal import Decimal, InvalidOperation
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.score.functions.built_in import exact_answer, final_number, gsm8k, math_verify
from grpo.score.functions.number import numbers, plain

WHOLE = {
    **{"3/4": "3/4", "3 / 4": "3/4", "3 1/2": "7/2", "3 and 1/2": "7/2", "-1/2": "-1/2", "½": "1/2"},
    **{"3½": "7/2", "10^6": "1000000", "2^10": "1024", "10**6": "1000000", "10²": "100", "10⁻³": "1/1000"},
    **{"2^{10}": "1024", "1e3": "1000", "1.5E-3": "3/2000", "3 × 10^6": "3000000", "3x10^6": "3000000"},
    **{"1,234,567": "1234567", "1.234.567": "1234567", "1 234 567": "1234567", "1_000": "1000"},
    **{
        "1'234'567": "1234567",
        "1\u202f234": "1234",
        "1\\,234": "1234",
        "1{,}234.5": "2469/2",
        "1\u200b8": "18",
    },
    **{"2.5 million": "2500000", "3k": "3000", "$3M": "3000000", "2 dozen": "24", "1/2 million": "500000"},
    **{
        "2\\text{ dozen}": "24",
        "2 hundred thousand": "200000",
        "50%": "50",
        "$5": "5",
        "€5": "5",
        "5 €": "5",
    },
    **{"18 km": "18", "18cm": "18", "18 m²": "18", "18 m^2": "18", "90^\\circ": "90", "18個": "18"},
    **{"１８": "18", "١٨": "18", "१८": "18", "٣٫٥": "7/2", "−5": "-5", "–5": "-5", "-$5": "-5", "+5": "5"},
    **{"007": "7", "\\frac{3}{4}": "3/4", "3\\frac{1}{2}": "7/2", "\\frac34": "3/4", "-\\frac{1}{2}": "-1/2"},
    **{"18.": "18", "18!": "18", "**18**": "18", "18-year-old": "18", "18/day": "18"},
}
NONE = [
    *["3:30", "00:18", "2024-05-01", "5/1/2024", "3-4", "3–4", "3 to 4", "3 or 4", "3, 4", "3;4", "3~4"],
    *["1,23", "1,2345", "12,345,6789", "1,00,000", "1__000", "0,5", "1.2.3", "192.168.0.1", "3/0", "1/2/3"],
    *[
        "1e3.5",
        "2^3^2",
        "2^0.5",
        "1e401",
        "3*6",
        "3 + 4",
        "18 - 3",
        "(3)-5",
        "3(4)",
        "3x",
        "2π",
        "2\\sqrt{3}",
    ],
    *["3\\pi", "\\sqrt{16}", "n*5", "x-5", "±5", "--5", "-$-5", "≤3", "5万", "1.5…", "0.333...", "18\u0336"],
    *["2 hours 30 minutes", "18 dollars and 50 cents", "5'10", "3 million 200 thousand", "3 hundredths"],
    *[
        "3 squared",
        "3 and a half",
        "$5m",
        "3h30",
        "0x1F",
        "18 19",
        "3 5/2",
        "= - 5",
        "nan",
        "infinity",
        "∞",
        "-inf",
    ],
]


def read(text: str) -> list[Fraction | None]:
    return [number.value for number in numbers(plain(text))]


@pytest.mark.parametrize(("text", "value"), WHOLE.items())
@pytest.mark.parametrize("around", ["#### {}", "\\boxed{{{}}}", "The answer is {}.", "It is {}"])
def test_a_number_is_read_whole(around: str, text: str, value: str) -> None:
    assert final_number(around.format(text)) == Fraction(value)


@pytest.mark.parametrize("text", NONE)
@pytest.mark.parametrize("around", ["#### {}", "7 or \\boxed{{{}}}", "The answer is {}. So 7"])
def test_what_is_no_number_is_none_and_no_other_takes_its_place(around: str, text: str) -> None:
    assert final_number(around.format(text)) is None


@pytest.mark.parametrize("text", [*WHOLE, *NONE])
def test_no_part_of_it_is_paid(text: str) -> None:
    whole = Fraction(WHOLE[text]) if text in WHOLE else None
    for part in range(0, 40):
        if part != whole:
            assert gsm8k(["p"], [f"#### {text}"], [f"#### {part}"]) == [0.0], part


@pytest.mark.parametrize("text", ["H2O", "x^2", "m^2", "x_1", "Rs.500", "CO2"])
def test_what_is_glued_to_a_word_is_no_number(text: str) -> None:
    assert read(text) == []


# ---- numbers that are built up ----

WHOLES = st.integers(0, 10**9)


def grouped(number: int, mark: str) -> str:
    return f"{number:,}".replace(",", mark)


@given(WHOLES, st.sampled_from([",", " ", "_", "'", "\u00a0"]), st.sampled_from(["", "-", "$", "-$"]))
def test_grouped_digits(number: int, mark: str, before: str) -> None:
    sign = -1 if "-" in before else 1
    assert read(f"{before}{grouped(number, mark)}") == [sign * number]


@given(WHOLES, st.integers(1, 999), st.integers(2, 999))
def test_mixed_numbers(whole: int, over: int, under: int) -> None:
    proper = whole + Fraction(over, under) if over < under else None
    assert read(f"{whole} {over}/{under}") == [proper]


@given(st.decimals(-1000, 1000, places=3), st.integers(-30, 30), st.sampled_from(["e", "E"]))
def test_exponents(number: Decimal, exponent: int, mark: str) -> None:
    assert read(f"{number:f}{mark}{exponent}") == [Fraction(number) * Fraction(10) ** exponent]


@given(st.integers(1, 99), st.integers(0, 99), st.sampled_from(["^", "**", " ^ "]))
def test_powers(base: int, power: int, mark: str) -> None:
    assert read(f"{base}{mark}{power}") == [base**power]


@given(WHOLES, st.sampled_from([("thousand", 10**3), ("million", 10**6), ("dozen", 12), ("billions", 10**9)]))
def test_scale_words(number: int, scale: tuple[str, int]) -> None:
    assert read(f"{number} {scale[0]} eggs") == [number * scale[1]]


# ---- a parser of its own: characters and str methods, no regular expression ----


def digits(text: str) -> int | None:
    return int(text) if text and all(c in "0123456789" for c in text) else None


def decimal(text: str) -> Fraction | None:
    for mark in (",", " ", "'", "_"):
        head, point, tail = text.partition(".")
        first, *groups = head.split(mark)
        if groups and 1 <= len(first) <= 3 and first[0] != "0" and all(len(group) == 3 for group in groups):
            if point and digits(tail) is None:
                return None
            text = "".join([first, *groups]) + point + tail
            break
    first, *groups = text.split(".")
    if (
        len(groups) > 1
        and 1 <= len(first) <= 3
        and first[0] != "0"
        and all(len(group) == 3 for group in groups)
    ):
        text = "".join([first, *groups])
    if any(c not in "0123456789." for c in text) or text.endswith("."):
        return None
    try:
        return Fraction(Decimal(text))
    except InvalidOperation:
        return None


def value(text: str) -> Fraction | None:
    """What a text that is nothing but a number is worth."""
    if text[:1] in ("-", "+"):
        found = value(text[1:]) if text[1:2] not in ("-", "+", " ") else None
        return found if found is None or text[0] == "+" else -found
    if text.endswith("k"):
        found = value(text[:-1].removesuffix(" "))
        return None if found is None else found * 1000
    if "/" in text:
        left, right = (part.strip() for part in text.split("/", 1))
        head, _, over = left.rpartition(" ")
        parts = [digits(part) for part in ([head] if head else []) + [over, right]]
        if None in parts or (" /" in text) != ("/ " in text) or parts[-1] == 0:
            return None
        *whole, top, under = [part or 0 for part in parts]
        return None if whole and top >= under else sum(whole) + Fraction(top, under)
    for mark in ("**", "^", "e"):
        base, found_mark, power = text.partition(mark)
        if found_mark:
            if mark != "e" and base.endswith(" ") and power.startswith(" "):
                base, power = base[:-1], power[1:]
            exponent, number = (
                digits(power.lstrip("-+") if power[1:2] not in ("-", "+") else "x"),
                decimal(base),
            )
            if (
                exponent is None
                or number is None
                or (number == 0 and mark != "e" and power.strip("-+0") == "")
            ):
                return None
            exponent = -exponent if power[0] == "-" else exponent
            if mark == "e":
                return number * Fraction(10) ** exponent
            return None if number == 0 and exponent <= 0 else number**exponent
    return decimal(text)


JOINTS = [
    *[
        "",
        ",",
        ".",
        " ",
        "/",
        "^",
        "*",
        "**",
        ":",
        "_",
        "'",
        "-",
        "+",
        "e",
        "e-",
        ";",
        "~",
        "|",
        "x",
        "(",
        "⁄",
    ],
    *[", ", "; ", " / ", " ^ ", " - ", "/ ", " /", "- ", " -", " : ", " ** ", "::", "//", "..", ",,", "--"],
    *[
        "' ",
        " .",
        " and ",
        " or ",
        " to ",
        " times ",
        " point ",
        "·",
        " × ",
        "e+",
        "e--",
        "^^",
        "_ ",
        "):(",
        "}/{",
    ],
]
RUNS = st.text("0123456789", min_size=1, max_size=4)


@settings(max_examples=1000, deadline=None)
@given(
    st.sampled_from(["", "-", "+"]),
    st.lists(st.tuples(RUNS, st.sampled_from(JOINTS)), max_size=3),
    RUNS,
    st.sampled_from(["", ".", ",", "!", " eggs", "%", "k", " k", ":", ") ", "**"]),
)
def test_whole_or_not_at_all(sign: str, runs: list[tuple[str, str]], last: str, tail: str) -> None:
    text = sign + "".join(digits + joint for digits, joint in runs) + last
    [found, *_] = [*read(text + tail), None]
    if found is not None:
        asked = text.replace("⁄", "/").replace(" × 10^", "e").replace("x10^", "e").replace(" and ", " ")
        assert found == value(asked + "k" * tail.endswith("k")), (text, found)


@settings(max_examples=300, deadline=None)
@given(st.from_regex(r"\A[0-9]{1,4}([,. '_][0-9]{1,4}){0,3}(/[0-9]{1,2}|(\^|\*\*|e)-?[0-9]{1,2}| ?k)?\Z"))
def test_what_the_parser_reads_is_read(text: str) -> None:
    assert read(text) == [value(text)]


# ---- an empty response and a missing answer ----


@pytest.mark.parametrize("function", [exact_answer, gsm8k, math_verify])
@pytest.mark.parametrize("empty", ["", " ", "\n\t", "\u200b", "\u00a0"])
def test_an_empty_answer_is_a_missing_one(function: object, empty: str) -> None:
    for response in ("", empty, "None", "0"):
        assert function(["p"] * 3, [response] * 3, [None, empty, "7"]) == [None, None, 0.0]  # type: ignore[operator]
