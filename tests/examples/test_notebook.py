"""The notebook runs, and shows what its code computes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def shown(notebook: Any) -> list[str]:
    """What the outputs say: text, and the text of tables and captions; digits are left out."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            text = output.get("text") or data.get("text/html") or data["text/plain"]
            text = re.sub(r"data:image/png;base64,[^\"]*", "", text)
            found.append(re.sub(r"[\d.]+", "0", text))
    return found


@pytest.mark.slow
def test_the_notebook_shows_what_its_code_computes(tmp_path: Path) -> None:
    saved, executed = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    client = NotebookClient(
        executed, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    for cell in executed.cells:  # progress bars and warnings of other packages
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    assert shown(executed) == shown(saved)
    (accuracy,) = re.findall(r"accuracy ([\d.]+)", str(executed.cells))
    assert float(accuracy) > 0.9
    assert str(saved.cells).count("data:image/png") == 2
