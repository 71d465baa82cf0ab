"""config.yaml: YAML 1.2 text -> text, numbers, true, false, null, lists, and mappings by text.

A tag makes nothing else, and aliases cannot make much of little: a configuration runs no code and is small.
"""

from collections.abc import Callable, Iterator
from io import StringIO
from typing import Any

MAX_DEPTH = 100
_MAX_VALUES = 100_000  # a configuration has hundreds; ten lines of aliases of aliases would make 9**9
_TAGS = "tag:yaml.org,2002:"
_DATA = ("str", "null", "bool", "int", "float", "seq", "map")


class YamlError(Exception):
    """What is wrong with a text; `place` is `:line:column`, from 1, or empty where the parser names none."""

    def __init__(self, problem: str, mark: Any = None) -> None:
        super().__init__(problem)
        self.place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""


def parse(text: str) -> Any:
    """What a YAML text holds; None of an empty one. Raises YamlError."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, StringMark
    from ruamel.yaml.reader import ReaderError

    loader = YAML(typ="safe", pure=True)
    loader.composer.warn_double_anchors = False  # the later of two anchors holds, as YAML says
    try:
        root = loader.compose(text)
        if root is None:
            return None
        _check(root, 0, iter(range(_MAX_VALUES)), loader.constructor.construct_object)
        return loader.constructor.construct_document(root)
    except MarkedYAMLError as error:
        mark: Any = error.problem_mark or error.context_mark
        hint = "; use spaces, not tabs" if mark and text[mark.index : mark.index + 1] == "\t" else ""
        raise YamlError(f"{error.problem or error.context}{hint}", mark) from None
    except ReaderError as error:
        before = text[: error.position]
        place = StringMark("", 0, before.count("\n"), len(before) - before.rfind("\n") - 1, None, None)
        raise YamlError(f"control character U+{error.character:04X} in the text", place) from None
    except RecursionError:
        raise YamlError("nested too deeply") from None
    except (AssertionError, LookupError):  # the library's, of a directive
        raise YamlError("a %YAML directive of a version that is not known; leave it out") from None


def dump(values: dict[str, Any]) -> str:
    """A YAML text that parse() makes `values` of, keys in their order."""
    from ruamel.yaml import YAML

    dumper: Any = YAML(typ="safe", pure=True)
    text = StringIO()
    dumper.default_flow_style, dumper.sort_base_mapping_type_on_output = False, False
    dumper.dump(values, text)
    return text.getvalue()


def _check(node: Any, depth: int, budget: Iterator[int], construct: Callable[[Any], Any]) -> None:
    """Refuse a node that is not plain data, or too much of it; `budget` ends after _MAX_VALUES nodes."""
    kind = node.tag.removeprefix(_TAGS)
    if kind in ("timestamp", "value"):  # a bare date, and a bare `=`
        node.tag = f"{_TAGS}str"
    elif kind not in _DATA:
        raise YamlError(f"unknown tag {node.tag}", node.start_mark)
    if depth > MAX_DEPTH:  # also an alias of itself
        raise YamlError("nested too deeply", node.start_mark)
    if next(budget, None) is None:
        raise YamlError(f"aliases that expand to more than {_MAX_VALUES:,} values", node.start_mark)
    if node.id == "scalar":
        try:
            construct(node)
        except (ValueError, LookupError):  # !!int before a word, or 5,000 digits
            raise YamlError(f"cannot be read as {kind}: {node.value[:40]}", node.start_mark) from None
        return
    for child in node.value:
        if node.id == "mapping":
            key, child = child
            if key.tag not in (f"{_TAGS}str", f"{_TAGS}merge"):
                raise YamlError("a key must be text; put it in quotes", key.start_mark)
        _check(child, depth + 1, budget, construct)
