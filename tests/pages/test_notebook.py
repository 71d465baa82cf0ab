"""examples/notebook.ipynb runs from top to bottom, and what is kept of its outputs is of a run that did."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


def texts(cell: Any) -> str:
    """What a cell printed and gave, without pictures."""
    return "".join(str(out.get("text") or out.get("data", {}).get("text/plain", "")) for out in cell.outputs)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
def test_it_runs_and_finds_what_it_says(starter_model: Path, tmp_path: Path) -> None:
    shutil.copytree(starter_model, tmp_path / "artifacts" / ".models" / "tiny-arithmetic")
    notebook = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    kept = nbformat.read(NOTEBOOK, 4)
    for cell, before in zip(code_cells(notebook), code_cells(kept), strict=True):
        kinds, kinds_before = (
            {kind for out in each.outputs for kind in out.get("data", {})} for each in (cell, before)
        )
        assert kinds == kinds_before, cell.source
    means = dict(re.findall(r"^(lenient|strict) +([0-9.]+)$", texts(code_cells(notebook)[-1]), re.MULTILINE))
    assert float(means["strict"]) > float(means["lenient"]) > 0.5
    assert "16 iterations, 8192 rewards" in texts(code_cells(notebook)[-2])


def test_what_is_kept_is_whole_and_names_no_machine() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    assert [cell.execution_count for cell in code_cells(notebook)] == [1, 2, 3, 4, 5, 6, 7]
    pictures = [
        out for cell in code_cells(notebook) for out in cell.outputs if "image/png" in out.get("data", {})
    ]
    assert len(pictures) == 2
    for cell in code_cells(notebook):
        assert cell.outputs, cell.source
        assert all(out.output_type != "error" for out in cell.outputs)
        assert not re.search(r"/(home|work|root|tmp|Users)/", texts(cell)), cell.source
