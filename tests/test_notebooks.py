"""The notebooks run, and the outputs that they store are small."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_small_and_complete(notebook: Path) -> None:
    assert notebook.stat().st_size < 50_000
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output["output_type"] == "execute_result" for cell in cells for output in cell["outputs"])


def test_the_method_is_that_of_the_page() -> None:
    page = (DOCS / "adding-a-method.md").read_text(encoding="utf-8")
    (first, *_) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    cells = json.loads((DOCS / "notebooks" / "method-of-your-own.ipynb").read_text(encoding="utf-8"))["cells"]
    (source,) = ("".join(cell["source"]) for cell in cells if "class Sliced" in "".join(cell["source"]))
    assert source in first


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(notebook: Path, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    cells = nbformat.read(notebook, 4)
    nbclient.NotebookClient(cells, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    assert "random on mlp" in str(cells)
