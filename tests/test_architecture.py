"""The dependency direction of the design, read from the import statements themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "stages" / "grpo"
FILES = sorted(PACKAGE.rglob("*.py"))
STAGES = ("generate", "score", "advantage", "update")
# A file imports files of rooms further up only; rooms of one row never import one another.
ORDER = (
    ("errors",),
    ("console", "tables", "config"),
    ("artifacts",),
    ("sql", "prompts", "execute", "mirror"),
    ("models", "environments"),
    STAGES,
    ("evaluate",),
    ("pipeline",),
    ("inspect",),
    ("manage",),
    ("api",),
    ("stages",),
    ("cli", ""),  # "": what `import grpo` has, which is imported when it is used
    ("__main__",),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
LOOSE = 8  # files beside the rooms
MAX_LINES = 300
MAX_FUNCTION = 40


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(["grpo", *(parts[:-1] if parts[-1] == "__init__" else parts)])


def room_of(module: str) -> str:
    """`grpo.update.loss` -> `update`."""
    return module.split(".")[1] if "." in module else ""


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere, also within functions and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            source = str(node.module)
            names = {f"{source}.{alias.name}" for alias in node.names}
            own = source == "grpo" or source.startswith("grpo.")
            found |= {name if own and is_module(name) else source for name in names}
    return found


def importers(package: str) -> list[str]:
    """Files that import a third-party package."""
    return [name_of(path) for path in FILES if package in {name.split(".")[0] for name in imports(path)}]


def test_every_room_has_a_rank() -> None:
    rooms = {room_of(module_of(path)) for path in FILES}
    assert rooms - set(RANK) == set()
    assert len(list(PACKAGE.glob("*.*"))) <= LOOSE


def test_imports_go_one_way() -> None:
    wrong = [
        f"{name_of(path)} imports {imported}"
        for path in FILES
        for imported in imports(path)
        if imported.startswith("grpo.")
        and room_of(imported) != room_of(module_of(path))
        and RANK[room_of(imported)] >= RANK[room_of(module_of(path))]
    ]
    assert wrong == []


def test_engines_know_errors_and_models_only() -> None:
    """What samples can be read, and replaced, without the rest of the pipeline."""
    for path in (PACKAGE / "generate" / "engines").glob("*.py"):
        own = {name for name in imports(path) if name.startswith("grpo.")}
        wrong = {
            name
            for name in own
            if room_of(name) not in ("errors", "models") and not name.startswith("grpo.generate.engines")
        }
        assert wrong == set(), name_of(path)


def test_a_stage_never_imports_another_stage() -> None:
    rooms = {stage: [path for path in FILES if room_of(module_of(path)) == stage] for stage in STAGES}
    assert all(len(paths) >= 2 for paths in rooms.values())
    for stage, paths in rooms.items():
        others = {f"grpo.{other}" for other in STAGES if other != stage}
        for path in paths:
            reached = {".".join(name.split(".")[:2]) for name in imports(path)}
            assert reached & others == set(), name_of(path)


def test_only_one_file_imports_duckdb_and_only_its_engine_may_import_vllm() -> None:
    assert importers("duckdb") == ["sql/connection.py"]
    assert all(name.startswith("generate/") and "/vllm_" in name for name in importers("vllm"))
    assert importers("obstore") == ["mirror/store.py"]


def test_no_thread_computes() -> None:
    """While a CUDA graph is captured, or an engine falls asleep, no other thread may touch the device."""
    threads = set(importers("threading")) | set(importers("concurrent"))
    # One's thread ends the process when a batch is late, in the process of the second one computes; while the
    # third's sends, whoever began it waits.
    allowed = {"score/reward_model.py", "score/model_worker.py", "generate/vllm_transfer.py"}
    assert threads & set(importers("torch")) <= allowed


def test_nothing_unpickles_and_nothing_evaluates_text() -> None:
    for package in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"):
        assert importers(package) == []
    calls = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name in ("torch.load", "eval", "exec", "yaml.load", "yaml.unsafe_load"):
                    calls.append(f"{name_of(path)}: {name}")
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", name_of(path)
    assert calls == []


def test_no_file_is_long() -> None:
    files = [*FILES, *PACKAGE.rglob("*.sql")]
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_function_is_long() -> None:
    long = {
        f"{name_of(path)}: {node.name}": node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    }
    assert {name: lines for name, lines in long.items() if lines > MAX_FUNCTION} == {}


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert {path.stem for path in FILES} & {"utils", "util", "common", "helpers", "misc", "base"} == set()


def test_nothing_catches_everything() -> None:
    # The user's reward functions may raise anything: what a worker does with that is marked there (BLE001).
    # A checkpoint of others may make transformers raise any, and tokenizers raises nothing else.
    # vLLM raises bare Exception too, so that nothing narrower would turn its failures into an EngineError.
    allowed = {
        "score/functions/call.py": {"BaseException"},
        "score/functions/worker.py": {"BaseException"},
        "prompts/template_worker.py": {"Exception"},  # a chat template is code of others too
        "generate/engines/vllm_engine.py": {"Exception"},
        "models/refusals.py": {"Exception"},
        "execute/answering.py": {"Exception"},  # whatever it is, the driver raises it
        "generate/hand_out.py": {"BaseException"},  # of a thread: whoever waits for it raises it
        "generate/vllm_transfer.py": {"BaseException"},
        "models/tokenizer.py": {"Exception"},
        "update/own_surrogate.py": {"Exception"},  # the user's, like a reward function
        "inspect/track.py": {
            "Exception"
        },  # a tracker is a service of others: training goes on, whatever it raises
    }
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                types = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                caught = {"" if each is None else ast.unparse(each) for each in types}
                wrong = {"", "Exception", "BaseException"} - allowed.get(name_of(path), set())
                assert caught & wrong == set(), f"{name_of(path)}:{node.lineno}"


def test_the_learner_calls_its_models_through_the_reader() -> None:
    # Sharded weights are whole only in the forward of the module that holds them all.
    paths = [*(PACKAGE / "update").glob("*.py"), PACKAGE / "models" / "weight_check.py"]
    assert len(paths) > 10
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).rpartition(".")[2]
                assert called not in ("model", "trunk", "get_decoder()"), f"{name_of(path)}:{node.lineno}"


def test_only_artifacts_moves_and_removes_files() -> None:
    # The temporary folder of the reward workers is no part of a run.
    allowed = {"artifacts/files.py", "score/functions/workspace.py", "score/functions/guard.py"}
    methods = {"unlink", "rename", "rmtree", "rmdir", "mkdir", "link", "symlink_to"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and name_of(path) not in allowed:
                name = ast.unparse(node)
                wrong = node.attr in methods or name in ("os.replace", "os.remove", "shutil.move")
                assert not wrong, f"{name_of(path)}:{node.lineno}: {name}"


@pytest.mark.parametrize(
    "module", ["cli", "pipeline.runner", "pipeline.work", "config", "tables", "artifacts", "sql", "stages"]
)
def test_importing_does_not_load_torch(module: str) -> None:
    code = f"import sys, grpo.{module}; print({{'torch', 'transformers', 'vllm'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
