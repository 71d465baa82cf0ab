"""source: the file in which a reward function is written; nothing of the user's is imported to find it."""

import difflib
import importlib
import importlib.util
import re
import sys
from hashlib import sha256
from importlib.machinery import PathFinder
from pathlib import Path

from grpo.errors import UsageError
from grpo.score.functions.built_in import BUILT_IN

VERSIONS = {"gsm8k": 2, "math_verify": 2}
"""Of built-ins whose values changed once: 2 reads numbers whole or not at all."""
MODULE_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def source_sha256(function: str, import_root: Path) -> str:
    """sha256 of the file that holds the function; the file is found, never imported. Of a built-in's version,
    or "" where that never changed.

    Raises UsageError for an unknown built-in, and where no file of the module is found in `import_root`, on
    sys.path or among installed packages. What the file itself imports is not part of it.
    """
    file = find_file(function, import_root)
    if file is None:
        return sha256(f"{function} {VERSIONS[function]}".encode()).hexdigest() if function in VERSIONS else ""
    return sha256(file.read_bytes()).hexdigest()


def find_file(function: str, import_root: Path) -> Path | None:
    """The file of `package.module:function`, None for a built-in; nothing of the user's is imported."""
    if function in BUILT_IN:
        return None
    if ".py:" in function or not MODULE_FUNCTION.fullmatch(function):
        raise UsageError(f"reward function {function!r}: {_name_problem(function)}")
    module = function.partition(":")[0]
    top, *submodules = module.split(".")
    importlib.invalidate_caches()
    spec = PathFinder.find_spec(top, [str(import_root), *sys.path])
    if spec is None and top != "__main__":
        spec = importlib.util.find_spec(top)  # installed in a way that only its own finder knows
    for name in submodules:
        # By its last name alone: for a dotted name, importlib would import the package around it.
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations or ())) if spec else None
    if spec is None or not spec.has_location or spec.origin is None:
        raise UsageError(
            f"reward function {function!r}: no module file {module.replace('.', '/')}.py in {import_root}, "
            "and no such installed module"
        )
    return Path(spec.origin)


def _name_problem(function: str) -> str:
    if ":" in function:
        path, _, name = function.partition(":")
        module = path.removesuffix(".py").strip("./").replace("/", ".")
        hint = f"; did you mean {module}:{name}?" if MODULE_FUNCTION.fullmatch(f"{module}:{name}") else ""
        return f"not of the form package.module:function{hint}"
    near = difflib.get_close_matches(function, BUILT_IN, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(BUILT_IN)}"
    return f"no such built-in; {hint} (a function of your own is module:function)"
