"""The pages below docs/: their commands run, their configurations parse, their links lead somewhere.

A page's blocks are taken in order, in a folder of its own: one with a title is written to that file, commands
are run. `# exit code 4` behind a command says how it ends; without, it succeeds.
"""

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from tests.conftest import Grpo
from tests.faults.tally import introduction
from tests.pages.pages import DOCS, ROOT, Block, Shell, anchors, blocks, links, num_fences, texts

from grpo import errors
from grpo.config import moving
from grpo.config.loading import validated
from grpo.config.yaml import parse

PAGES = {path.name: path.read_text() for path in sorted(DOCS.glob("*.md"))}
WITH_README = {**PAGES, "../README.md": (ROOT / "README.md").read_text()}
# Every file is on the page, or made by it; the others begin with a finished quickstart.
FROM_EMPTY = ("quickstart.md", "your-data-and-reward.md", "from-trl.md")
# What it shows is of runs that went wrong and took minutes: its queries are tried on a healthy run, which may
# have nothing to show, and its runs are not made.
OF_OTHER_RUNS = ("reading-a-run.md",)
OF_SIXTY_ITERATIONS = ("compare.md",)  # a short run has other tables and curves: only that it prints some
LOOKED_AT_ELSEWHERE = ("steering.md", "evaluation.md")  # closer, by tests of their own
HAVE_COMMANDS = [name for name, text in PAGES.items() if "\n$ " in text and name not in LOOKED_AT_ELSEWHERE]
LANGUAGES = ("console", "text", "yaml", "python", "json", "sql", "markdown")
NUMBER = re.compile(r"[+-]?\d[\d.,]*(?:e[+-]?\d+)?")


@pytest.fixture
def folder(
    quickstart: Path, starter_model: Path, tmp_path: Path, page: str, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Where a page begins: the finished quickstart, or an empty folder but for the starter model."""
    folder = tmp_path / "project"
    if page in FROM_EMPTY:
        shutil.copytree(starter_model, folder / "artifacts" / ".models" / "tiny-arithmetic")
    else:
        shutil.copytree(quickstart, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", HAVE_COMMANDS)
def test_every_command_of_a_page_runs(page: str, folder: Path) -> None:
    shell = Shell()
    for block in blocks(PAGES[page]):
        if block.language == "console":
            for command, shown in shell.steps(block.text):
                dry = ["--dry-run"] if page in OF_OTHER_RUNS and command.startswith("grpo run") else []
                _check(page, command, shown, *shell.run(command, *dry))
        elif block.title and not block.title.startswith("benchmarks/"):
            short = block.text.replace("iterations: 60", "iterations: 12")  # as the quickstart here
            (folder / block.title).write_text(short)


def _check(page: str, command: str, shown: list[str], code: int, out: str, err: str) -> None:
    expected = re.search(r"# exit code (\d+)$", command)
    assert code == (int(expected[1]) if expected else 0), (command, err)
    err = err.replace(f"{Path.cwd()}/", "")
    if shown and shown[0].startswith("error: "):
        assert _shape(err.splitlines()[-1]) == _shape(shown[0]), command
    elif command.startswith("grpo sql") and "--out" not in command:
        lines = [line.split() for line in out.splitlines() if line.strip()]
        assert not shown or lines[0] == shown[0].split(), command  # the same columns
        assert len(lines) > 2 or page in OF_OTHER_RUNS, f"{command}: no rows"
    elif page not in (*OF_OTHER_RUNS, *OF_SIXTY_ITERATIONS):
        printed = {_shape(line) for line in (out + err).splitlines()}
        assert [line for line in shown if line != "..." and _shape(line) not in printed] == [], (
            command,
            out,
            err,
        )


def _shape(line: str) -> str:
    """A printed line without what differs between machines: numbers, digests, the width of the terminal."""
    line = re.sub(r"\b[0-9a-f]{8}\b", "#", line)
    return " ".join(re.sub("─+", "─", NUMBER.sub("#", line)).split())


def test_every_block_is_understood() -> None:
    for name, text in PAGES.items():
        assert len(blocks(text)) == num_fences(text), name
        for block in blocks(text):
            assert block.language in LANGUAGES, (name, block.language)


def test_configurations_on_the_pages_are_valid() -> None:
    base = parse("{run: a, model: b, prompts: {source: c}, score: {rewards: [{function: exact_answer}]}}")
    shown = [(name, text) for name, page in WITH_README.items() for text in texts(page, "yaml")]
    for name, text in shown:
        given = parse(text)
        sections = {key: base[key] | given[key] for key in ("prompts", "score") if key in given}
        validated(given if "run" in given else base | given | sections, Path(name))
    assert len(shown) >= 15


def test_a_command_that_is_not_run_here_knows_its_options(grpo: Grpo) -> None:
    shown = [
        line for page in WITH_README.values() for text in texts(page, "text") for line in text.split("\n")
    ]
    found = [re.match(r"grpo ([a-z]+)(?: (.*?))?(?:#.*)?$", line) for line in shown]
    commands = [(line[1], line[2] or "") for line in found if line]
    assert len(commands) >= 10
    helps = {command: grpo(command, "--help") for command in {command for command, _ in commands}}
    for command, rest in commands:
        code, out, _ = helps[command]
        assert code == 0, command
        assert [option for option in re.findall(r"--[a-z-]+", rest) if option not in out] == [], command


def test_links_lead_somewhere() -> None:
    broken = []
    for name, text in WITH_README.items():
        page = DOCS / name
        for link in links(text):
            target, _, anchor = link.partition("#")
            path = page.parent / target if target else page
            if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
                broken.append(f"{page.name}: {link}")
    assert broken == []


def test_the_index_has_every_page() -> None:
    linked = set(links(PAGES["README.md"]))
    assert {name for name in PAGES if name != "README.md"} - linked == set()


def test_quotations_of_benchmarks_are_what_these_printed() -> None:
    quoted = [
        block for text in PAGES.values() for block in blocks(text) if block.title.startswith("benchmarks/")
    ]
    assert len(quoted) >= 3
    for block in quoted:
        printed = [line.strip() for line in (ROOT / block.title).read_text().splitlines()]
        assert [line for line in _lines(block) if line not in printed] == [], block.title


def _lines(block: Block) -> list[str]:
    return [line.strip() for line in block.text.splitlines() if line.strip() not in ("", "...")]


def test_every_exit_code_is_explained() -> None:
    codes = {int(row) for row in re.findall(r"^\| (\d+) \|", PAGES["troubleshooting.md"], re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert codes == {kind.exit_code for kind in kinds if issubclass(kind, errors.GrpoError)} | {
        0,
        1,
        130,
        143,
    }


@pytest.mark.parametrize("page", ["configuration", "tables"])
def test_generated_pages_are_current(page: str) -> None:
    build = _module(DOCS / "build.py")
    assert getattr(build, page)() == PAGES[f"{page}.md"], "run `python docs/build.py`"


@pytest.mark.parametrize("trainer", moving.TRAINERS)
def test_the_pages_about_moving_are_current(trainer: str) -> None:
    page = PAGES[f"from-{trainer.lower()}.md"]
    assert _module(DOCS / "build.py").from_trainer(trainer) == page, "run `python docs/build.py`"


def test_the_page_of_faults_says_what_is_tried() -> None:
    assert PAGES["faults.md"].startswith("\n".join(introduction())), "see tests/faults/tally.py"


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
