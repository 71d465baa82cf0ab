# ruff: noqa: RUF001 - it is about characters that look alike
r"""number: text -> the numbers in it, each read whole or not at all.

Whatever joins digits to digits (`3/4`, `10^6`, `3:30`, `3-4`, `1,23`, `3 to 4`, `2 hours 30`) is one number,
and what is joined is a value only where GRAMMAR has a form for it: never its beginning, never its end.
Currency signs, percent signs and units are ignored; scale words (`2.5 million`) are read.
"""

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

MAX_CHARACTERS = 120  # of one number, and MAX_POWER of an exponent: no response makes the reading slow
MAX_POWER = 400
_AROUND = 24  # characters before and behind a number that decide whether it goes on


class Number(NamedTuple):
    """Digits that belong together, at text[start:end]; value: None where they are read as no number."""

    start: int
    end: int
    value: Fraction | None


_UNITS = r"h|hrs?|hours?|m|mins?|minutes?|(?:day|week|month|year|dollar|euro|pound|lb)s?|feet|foot|ft|kg|km"
_OPERATOR = r"(?:\*\*?|-{1,3}|[+/×·÷^~…±])"
# What joins digits to more digits. Never over a line: a list of numbers has one a line.
_JOIN = rf"""(?: [)\]}}]?\ ?{_OPERATOR}\ ?[({{\[]?  # 3/4  3 / 4  (3)-5  2^(10)
    | \ ?\. | ['_]\ ? | \ ?: | \ :[ ] | [(e|] | [eE][-+] | E  # 1.2.3  5' 10  3:30  1e3
    | \ ?[,;&]\ ? | \ {{1,3}} | \ ?x\ ?  # 3, 4  1 234  3 x 4
    | \ (?:and|or|to|by|times|plus|minus|over|through|point|(?:divided|multiplied)\ by)[ ]
    | \ ?(?:{_UNITS})\.?,?\ (?:and\ )? )"""  # 2 hours 30
_NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}%])(?P<sign>[-+]))?(?:(?P<currency>\$)\ ?(?P<inner>[-+])?)?"
    rf"(?P<digits>\.?[0-9]+(?:{_JOIN}[-+]?\$?[0-9]+)*)",
    re.VERBOSE,
)
_POWER = r"(?:\^|\*\*|\ \^\ |\ \*\*\ )[({]?"
_GRAMMAR = re.compile(
    rf"""(?: (?P<decimal>[0-9]+(?:\.[0-9]+)? | \.[0-9]+ | [1-9][0-9]{{0,2}}
            (?:(?P<mark>[, '_])[0-9]{{3}}(?:(?P=mark)[0-9]{{3}})*(?:\.[0-9]+)? | (?:\.[0-9]{{3}}){{2,}}))
        (?: [eE](?P<e>[-+]?[0-9]+) | \ ?[×·*x]\ ?10{_POWER}(?P<ten>[-+]?[0-9]+)
          | {_POWER}(?P<power>[-+]?[0-9]+) )?
      | (?:(?P<whole>[0-9]+)(?:\ |\ and\ ))?(?P<numerator>[0-9]+)(?:/|\ /\ )(?P<denominator>[0-9]+) )""",
    re.VERBOSE,
)
# Before a number, a letter or an exponent's mark makes it a part of a word; an operator, of an expression.
_GLUED = re.compile(r"(?:[A-Za-z_]|\^[({]?[-+]?)$")
_CURRENCY_CODE = re.compile(r"(?<![A-Za-z])(?:USD|EUR|GBP|INR|US|Rs)$")
_GOES_BEFORE = re.compile(
    r"""(?:[\w)\]}%](?:\*\*?|[-+/×·÷~])[({[]? | [\w)\]}%=:(#]\ [-+]\ | [\w)\]}%]\ (?:\*\*?|[/×·÷])\ [({[]?
      | [-+][({[]* | [±≤≥≠<√]\ ?[({[]* | }\s*\{ | [0-9A-Za-z]\.
      | [0-9][A-Za-z]{0,12}[^\sA-Za-z0-9=<>#]+ | [0-9]\ [.,:;'_^/*+~·-]+
      | (?:dozen|hundred|thousand|illion)s?\ (?:and\ )?)$""",
    re.VERBOSE,
)
_FRACTIONS = r"(?:half|third|quarter|fourth|fifth|tenth)"
_PARTS = r"(?:third|fourth|fifth|sixth|seventh|eighth|ninth|(?:ten|hundred|thousand|million|billion)th)s?"
_GOES_ON = re.compile(
    rf"""\ ?[*×·÷^/+-]\ ?(?:[-+(√]|[nxyz]\b)  # 3*(4+1)  3 - x
      | (?:[abinxyzT]|pi|sqrt)(?![A-Za-z])  # 3x  2pi  2sqrt
      | \ [nxyz]\b  # 3 x
      | \.?[A-Za-z]{{1,12}}[^\sA-Za-z0-9=<>]*[0-9]  # 3km2  2h30  7th-4
      | \ ?[π√∛‰]  # 2π  2 √
      | \((?=[-+0-9nxyz])  # 3(4)
      | [^\sA-Za-z0-9=<>]+[0-9]  # 3;;4
      | \ [.,:;'_^/*+~·-]+[0-9]  # 3 ,4
      | \ (?:squared|cubed|factorial|to\ the\ power)  # 3 squared
      | \ and\ (?:a|an|one|two|three)\ {_FRACTIONS}  # 3 and a half
      | [ -](?:halves|{_PARTS})\b(?!-)  # 3 halves  2-thirds""",
    re.VERBOSE,
)
_SCALES = {
    **{"dozen": 12, "hundred": 100, "thousand": 10**3, "k": 10**3, "lakh": 10**5, "crore": 10**7},
    **dict.fromkeys(("million", "mn", "mio", "m"), 10**6),
    **dict.fromkeys(("billion", "milliard", "bn", "mrd", "b"), 10**9),
    **{"trillion": 10**12, "quadrillion": 10**15},
}
_SCALE = re.compile(
    r"""(?P<word>
        [ -]?(?i:dozen|hundred|thousand|lakh|million|crore|milliard|(?:b|tr|quadr)illion)  # 3 thousand
      | \ ?(?i:k|mn|mio|mrd|bn)  # 3k  2 bn
      | [MB]  # 3M; a small m is metres
      )(?:(?<=[a-z]{4})(?:s|e|en))?(?![A-Za-z0-9])  # 2 millions  2 Millionen""",
    re.VERBOSE,
)
_AFTER_SCALE = re.compile(r",? (?:and )?(?:[0-9]|(?:a|one|two|three|four|five|six|seven|eight|nine|ten)\b)")

_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_SPACES = re.compile(r"[^\S\n\t]")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPERSCRIPT = re.compile(r"(?P<base>[0-9)\]}])?[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_LATEX = (
    # \textbf{42}
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mathsf|boldsymbol)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\{,\}"), ","),  # 1{,}000
    (re.compile(r"\\([$%#&])"), r"\1"),  # \$5
    (re.compile(r"\\[,;:!>]|\\(?:quad|qquad|left|right|displaystyle|approx)\b"), " "),  # 1\,000  3\quad
    (re.compile(r"\^\s*(?:\{\s*)?\\circ\s*\}?"), "°"),  # 90^\circ  90^{\circ}
    (re.compile(r"\\(?:times|cdot|ast)\b"), "×"),  # 3 \times 4
    (re.compile(r"\\div\b"), "÷"),  # 3 \div 4
    (re.compile(r"\\(?:pm|mp)\b"), "±"),  # 3 \pm 1
    (re.compile(r"\\(?:leq?|geq?|neq?|lt|gt)\b"), "≤"),  # x \geq 3
    # 1\frac{3}{4}, \frac{3}{4}, 1\frac34, \frac34, \frac{x}{4}
    (re.compile(r"(?<=[0-9])\s*\\[dtc]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}"), r" \1/\2"),
    (re.compile(r"\\[dtc]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}"), r"\1/\2"),
    (re.compile(r"(?<=[0-9])\s*\\[dtc]?frac\s*([0-9])\s*([0-9])"), r" \1/\2"),
    (re.compile(r"\\[dtc]?frac\s*([0-9])\s*([0-9])"), r"\1/\2"),
    (re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"(\1)/(\2)"),
    (re.compile(r"\^\s*\{([^{}]*)\}"), r"^(\1)"),  # 10^{-3}
    # Any other command beside a number is mathematics that is not read here: it stands for itself as a root.
    (
        re.compile(
            r"\\(?!(?:boxed|fbox|begin|end|item|to|rightarrow|Rightarrow|implies|therefore)\b)[A-Za-z]+"
        ),
        "√",
    ),
)


def ascii_digits(text: str) -> str:
    """The text with the decimal digits and minus signs of every script as ASCII has them."""
    kinds = {c: unicodedata.category(c) for c in set(_NOT_ASCII.findall(text))}
    digits = {ord(c): str(unicodedata.decimal(c)) for c, kind in kinds.items() if kind == "Nd"}
    return text.translate(digits | {ord("−"): "-", ord("－"): "-"})


def plain(text: str) -> str:
    """The text with digits of every script, signs, fractions and LaTeX as ASCII has them; other length."""
    if _NOT_ASCII.search(text):
        text = _SUPERSCRIPT.sub(_power, _NOT_ASCII.sub(_ascii, text))
    if "\\" in text or "{" in text:
        for pattern, becomes in _LATEX:
            text = pattern.sub(becomes, text)
    return re.sub(r"\.{3,}", "…", _SPACES.sub(" ", text))


def numbers(text: str, start: int = 0, end: int | None = None) -> Iterator[Number]:
    """The numbers of a plain() text in text[start:end]; what is glued to a word (`H2O`, `m^2`) is none."""
    for match in _NUMBER.finditer(text, start, len(text) if end is None else end):
        before = text[max(0, match.start() - _AROUND) : match.start()]
        is_code = _CURRENCY_CODE.search(before) and not match["digits"].startswith(".")  # Rs.5 is not Rs 0.5
        if _GLUED.search(before) and not is_code:
            continue
        yield Number(match.start(), match.end(), _value(match, before, text))


def _value(match: re.Match[str], before: str, text: str) -> Fraction | None:
    found = _read(match["digits"])
    if found is None or (match["sign"] and match["inner"]) or _GOES_BEFORE.search(before):
        return None
    end, scaled = match.end(), False
    while scale := _SCALE.match(text, end):
        found, end, scaled = found * _SCALES[scale["word"].strip(" -").lower()], scale.end(), True
    behind = text[end : end + _AROUND]
    goes_on = (
        _GOES_ON.match(behind)
        or (scaled and _AFTER_SCALE.match(behind))
        or (match["currency"] and re.match(r"m\b(?!\$)", behind))  # metres, or millions of money
        or (behind.startswith("…") and "." in match["digits"])
        # A combining mark, or a numeral of a script that counts otherwise.
        or (behind and (unicodedata.category(behind[0])[0] == "M" or behind[0].isnumeric()))
    )
    if goes_on:
        return None
    return -found if "-" in (match["sign"], match["inner"]) else found


def _read(digits: str) -> Fraction | None:
    """What a form of GRAMMAR says; None where none fits, and where it would be endless."""
    match = _GRAMMAR.fullmatch(digits) if len(digits) <= MAX_CHARACTERS else None
    if match is None:
        return None
    if match["decimal"] is None:
        over, under = int(match["numerator"]), int(match["denominator"])
        if under == 0 or (match["whole"] and over >= under):
            return None
        return Fraction(int(match["whole"] or 0)) + Fraction(over, under)
    number = match["decimal"]
    if number.count(".") > 1:
        number = number.replace(".", "")
    found = Fraction(re.sub("[, '_]", "", number))
    exponent = int(match["e"] or match["ten"] or match["power"] or 0)
    if abs(exponent) > MAX_POWER or (found == 0 and exponent <= 0 and match["power"]):
        return None
    if match["power"]:
        return found**exponent
    return found * Fraction(10) ** exponent


def _ascii(match: re.Match[str]) -> str:
    character = match[0]
    if character.isspace() and unicodedata.category(character) == "Zs":
        return " "
    category = unicodedata.category(character)
    if category == "Cf":
        return ""  # not seen by who reads it: 1<zero width space>8 is 18
    if category == "Sc":
        return "$"
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Pd" or character in "−﹣－":
        return "-"
    if category == "No" and "⁄" in (fraction := unicodedata.normalize("NFKC", character)):
        before = match.string[: match.start()][-1:]
        return (" " if before.isdecimal() else "") + fraction.replace("⁄", "/")
    return _ALIKE.get(character) or (chr(ord(character) - 0xFEE0) if "！" <= character <= "～" else character)


_ALIKE = dict(zip("⁄∕∙⋅∗˙’٫٬、∞", "//··*·'.,,√", strict=True))


def _power(match: re.Match[str]) -> str:
    """10² is 10^2; m² is a unit, and the square is no number of its own."""
    base = match["base"]
    return f"{base}^{match[0][len(base) :].translate(_SUPERSCRIPTS)}" if base else ""
