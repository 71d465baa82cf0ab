"""FunctionPool.check and source_sha256: what a user hears about a function that cannot be used."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo.config import RewardConfig
from grpo.errors import UsageError
from grpo.score.functions.built_in import BUILT_IN
from grpo.score.functions.pool import FunctionPool
from grpo.score.functions.source import source_sha256

ROOT = Path(__file__).parent / "functions_root"


@pytest.fixture(scope="module")
def pool() -> Iterator[FunctionPool]:
    pool = FunctionPool(ROOT, num_workers=1)
    yield pool
    pool.close()


def spec(function: str, **arguments: Any) -> RewardConfig:
    name = function if function in BUILT_IN else f"reward:{function}"
    return RewardConfig(function=name, arguments=arguments, timeout_s=20.0)


# ---- check ----


@pytest.mark.parametrize(
    ("function", "columns", "problem"),
    [
        (spec("lenght"), None, "no 'lenght' in reward; it has: "),
        (spec("not_callable"), None, "not_callable is not callable, it is int '5'"),
        (
            spec("length", bonus=1),
            None,
            "arguments.bonus: the function takes no such keyword, but: completions",
        ),
        (spec("trl_style", prompts=1), None, "arguments.prompts: this keyword is passed to every function"),
        (spec("trl_style", answer=1), ["answer"], "arguments.answer: the data has a column of this name"),
        (
            spec("trl_style"),
            ["level"],
            "needs answer: not in arguments, and no column; the columns are: level",
        ),
        (spec("Callable"), None, "is a class; write `reward = Callable(...)` below it, and name that"),
        (
            spec("needs_environments"),
            ["answer"],
            "needs environments, which TRL has for tools; there are no tools here, so it cannot be used",
        ),
        (
            spec("needs_trl_keywords", log_extra=1),
            None,
            "arguments.log_extra: this keyword is passed to every",
        ),
        (spec("positional_only"), None, "'completions' is positional-only; everything is passed by keyword"),
        (
            spec("regex_format"),
            None,
            "arguments: regex_format() missing 1 required keyword-only argument: 'pattern'",
        ),
        (
            spec("regex_format", pattern="("),
            None,
            "arguments: pattern is not a regular expression: missing )",
        ),
        (
            spec("gsm8k"),
            ["question"],
            "needs answer: not in arguments, and no column; the columns are: question",
        ),
    ],
)
def test_check_names_what_is_wrong(
    pool: FunctionPool, function: RewardConfig, columns: list[str] | None, problem: str
) -> None:
    with pytest.raises(UsageError) as caught:
        pool.check(function, columns)
    assert str(caught.value).startswith(f"reward function {function.function!r}: {problem}")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import no_such_library", "importing broken failed: ModuleNotFoundError: No module named 'no_such_"),
        ("def broken(:", "importing broken failed: SyntaxError: invalid syntax (broken.py, line 1)"),
        ("1 / 0", "importing broken failed: ZeroDivisionError: division by zero (broken.py, line 1)"),
        ("exit(3)", "importing broken failed: SystemExit: 3"),
        (bytes(range(256)), "importing broken failed: SyntaxError: source code string"),
        ("import os; os.kill(os.getpid(), 11)", "the import of its module ended the process (SIGSEGV)"),
        ("", "no 'f' in broken; it has: no functions"),
    ],
)
def test_check_of_a_module_that_cannot_be_used(tmp_path: Path, source: str | bytes, problem: str) -> None:
    (tmp_path / "broken.py").write_bytes(source if isinstance(source, bytes) else source.encode())
    pool = FunctionPool(tmp_path, num_workers=1)
    with pytest.raises(UsageError) as caught:
        pool.check(RewardConfig(function="broken:f", timeout_s=1.0))
    assert str(caught.value).startswith(f"reward function 'broken:f': {problem}")
    pool.close()


def test_check_of_a_module_named_like_one_of_pythons(tmp_path: Path) -> None:
    (tmp_path / "re.py").write_text("def f(completions): return [1.0]")
    pool = FunctionPool(tmp_path, num_workers=1)
    with pytest.raises(UsageError, match=r"re is also the name of .*re/__init__\.py; rename re\.py"):
        pool.check(RewardConfig(function="re:f", timeout_s=1.0))
    pool.close()


# ---- source_sha256 ----


def test_source_of_a_built_in_is_empty_unless_its_values_changed() -> None:
    assert source_sha256("exact_answer", ROOT) == source_sha256("regex_format", ROOT) == ""
    assert source_sha256("gsm8k", ROOT) == hashlib.sha256(b"gsm8k 2").hexdigest()
    assert source_sha256("math_verify", ROOT) == hashlib.sha256(b"math_verify 2").hexdigest()


# ---- arguments that nobody reads, columns that hold nothing ----

KEYWORDS = """\
import functools


def looks_up(completions, **kwargs):
    return [kwargs["bonus"] + kwargs.get("scale", 1) * ("extra" in kwargs) for _ in completions]


def ignores(completions, **kwargs):
    return [1.0 for _ in completions]


def hands_on(completions, **kwargs):
    return looks_up(completions, **kwargs)


def lists(completions, **kwargs):
    return [float(len(kwargs)) for _ in completions]


@functools.wraps(ignores)
def wrapped(*args, **kwargs):
    return ignores(*args, **kwargs)


class Object:
    def __call__(self, completions, **kwargs):
        return [1.0 for _ in completions]


an_object = Object()


def reads_answer(completions, answer, level=None, **kwargs):
    return [1.0 for _ in completions]
"""


@pytest.fixture(scope="module")
def keywords(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FunctionPool]:
    folder = tmp_path_factory.mktemp("keywords")
    (folder / "keywords.py").write_text(KEYWORDS)
    pool = FunctionPool(folder, num_workers=1)
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("function", "argument", "takes"),
    [
        *[("keywords:looks_up", "bonsu", "completions, bonus, extra, scale")],
        *[("keywords:ignores", "bonus", "completions"), ("exact_answer", "strip", "answer")],
        *[("gsm8k", "tolerance", "answer"), ("math_verify", "precision", "answer")],
    ],
)
def test_an_argument_that_nobody_reads(
    keywords: FunctionPool, function: str, argument: str, takes: str
) -> None:
    with pytest.raises(UsageError) as caught:
        keywords.check(RewardConfig(function=function, arguments={argument: 1}), ["answer"])
    no_such = f"arguments.{argument}: the function takes no such keyword, but: {takes}"
    assert str(caught.value).startswith(f"reward function {function!r}: {no_such.removesuffix('answer')}")
    assert str(caught.value).endswith("look up in its **kwargs changes nothing") == (":" in function)


@pytest.mark.parametrize("name", ["looks_up", "hands_on", "lists", "wrapped", "an_object"])
@pytest.mark.parametrize("argument", ["bonus", "scale", "extra"])
def test_an_argument_that_may_be_read_is_passed(keywords: FunctionPool, name: str, argument: str) -> None:
    keywords.check(RewardConfig(function=f"keywords:{name}", arguments={argument: 1}), ["answer"])


@pytest.mark.parametrize("function", ["exact_answer", "gsm8k", "math_verify", "keywords:reads_answer"])
def test_a_column_without_a_value(keywords: FunctionPool, function: str) -> None:
    reward = RewardConfig(function=function)
    keywords.check(reward, ["answer", "level"], {"level"})
    with pytest.raises(UsageError) as caught:
        keywords.check(reward, ["answer", "level"], {"answer"})
    assert str(caught.value) == (
        f"reward function {function!r}: needs answer, and no row of the prompts has a value there;"
        " `prompts.columns.answer: NAME` says where it is"
    )


def test_source_is_the_files_digest_and_nothing_is_imported(tmp_path: Path) -> None:
    package = tmp_path / "rules" / "deep"
    package.mkdir(parents=True)
    (tmp_path / "rules" / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "format.py").write_text("raise RuntimeError('imported')")  # `deep` is a namespace package
    expected = hashlib.sha256(b"raise RuntimeError('imported')").hexdigest()
    assert source_sha256("rules.deep.format:f", tmp_path) == expected
    assert source_sha256("rules:f", tmp_path) == expected
    assert "rules" not in sys.modules


def test_import_root_comes_before_installed_modules(tmp_path: Path) -> None:
    (tmp_path / "pebble.py").write_text("mine")
    assert source_sha256("pebble:f", tmp_path) == hashlib.sha256(b"mine").hexdigest()


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (
            "exact_anser",
            "no such built-in; did you mean exact_answer? (a function of your own is module:function)",
        ),
        (
            "zzz",
            "no such built-in; there are exact_answer, gsm8k, math_verify, regex_format, length_penalty (a ",
        ),
        ("reward.py:f", "not of the form package.module:function; did you mean reward:f?"),
        ("./rules/form.py:f", "not of the form package.module:function; did you mean rules.form:f?"),
        ("a:b:c", "not of the form package.module:function"),
        ("rewards:f", f"no module file rewards.py in {ROOT}, and no such installed module"),
        ("reward.part:f", f"no module file reward/part.py in {ROOT}, and no such installed module"),
        ("__main__:f", f"no module file __main__.py in {ROOT}, and no such installed module"),
    ],
)
def test_source_of_an_unknown_function(function: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        source_sha256(function, ROOT)
    assert str(caught.value).startswith(f"reward function {function!r}: {problem}")


def test_check_of_math_verify_without_its_package(tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError(\"No module named 'math_verify'\")")
    pool = FunctionPool(tmp_path, num_workers=1)
    with pytest.raises(UsageError) as caught:
        pool.check(RewardConfig(function="math_verify", timeout_s=1.0), ["answer"])
    pool.close()
    assert str(caught.value) == (
        "reward function 'math_verify': needs the package math-verify (No module named 'math_verify');"
        " pip install 'grpo-stages[math]'"
    )
