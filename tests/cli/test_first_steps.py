"""docs/first_steps.ipynb: its code cells run in order in a new process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rocr.demo import demo_model
from rocr.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.mark.thorough
def test_the_cells_of_the_notebook_run_in_order(tmp_path):
    pytest.importorskip("gguf")
    try:
        demo_model()
    except InputError as error:
        pytest.skip(str(error))
    notebook = json.loads((ROOT / "docs" / "first_steps.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 6
    script = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + "\n".join(cells) + "\nprint('all cells ran')\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("all cells ran\n") and "distance left:" in done.stdout


def test_the_notebook_carries_no_outputs():
    notebook = json.loads((ROOT / "docs" / "first_steps.ipynb").read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook["cells"])
