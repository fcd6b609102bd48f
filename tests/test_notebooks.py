"""The notebooks, each run from top to bottom, and the outputs that they are committed with.

`python tests/test_notebooks.py [NAME …]` runs them and saves their outputs.
"""

import copy
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = ("attention", "batch_evaluation", "finetune", "inside_llava", "quickstart", "serving")
VARIES = "varies"  # the tag of a cell whose text is not the same on every machine
TEXTS = ("text/plain", "text/html", "text/markdown", "text/latex")
LARGEST = 600_000  # bytes: what a code host still shows
MACHINE = re.compile(r"(?<![\w.:<>/~-])/(?:home|root|tmp|work|var|Users|private|usr|opt|mnt|data|content)\b|[A-Z]:\\\\")


def execute(notebook, folder):
    """A copy with the outputs of a run by this very interpreter, in `folder`.

    Raises:
        CellExecutionError: a cell failed.
    """
    done = copy.deepcopy(notebook)
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "IPYTHONDIR": str(folder / "ipython")}
    env |= {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # compiled as users do, to the same digits
    kernels = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))  # of no other environment
    client = NotebookClient(done, km=kernels, timeout=300, record_timing=False)
    client.execute(cwd=str(folder), env=env, cleanup_kc=True)
    return done


def tidied(notebook):
    """As it is committed: without stderr (what compiles, progress), twofold pictures and facts about this machine."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
        }
    )
    for cell in code_cells(notebook):
        kept = []
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                continue
            if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
            if "image/png" in output.get("data", {}):
                output.data.pop("image/jpeg", None)
            kept.append(output)
        cell.outputs = kept
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def said(cell):
    """What a code cell put out: each output's kinds and, but for pictures and for cells that vary, its texts."""
    varies = VARIES in cell.metadata.get("tags", ())
    out = []
    for output in cell.outputs:
        texts = {"stdout": output.text} if output.output_type == "stream" else dict(output.data)
        compared = () if varies or "image/png" in texts else ("stdout", *TEXTS)
        out.append({kind: text if kind in compared else "" for kind, text in texts.items()})
    return out


def stderr(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stderr")


# ---- the tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


def committed(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def test_none_is_missing():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_says_what_is_committed(name, folder):
    before = committed(name)
    after = execute(before, folder)
    assert "Warning" not in stderr(after)
    for old, new in zip(code_cells(before), code_cells(tidied(after)), strict=True):
        assert said(new) == said(old), f"{name}, cell {old.id}: run python tests/test_notebooks.py {name}"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_committed_whole(name):
    path, notebook = NOTEBOOKS / f"{name}.ipynb", committed(name)
    nbformat.validate(notebook)
    assert notebook == tidied(copy.deepcopy(notebook))
    assert path.stat().st_size < LARGEST
    assert notebook.cells[0].cell_type == "markdown" and re.search(r"\bseconds\b", notebook.cells[0].source)
    code = code_cells(notebook)
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert sum("MODEL = None" in cell.source for cell in code) == 1
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, cell.id
        texts = [cell.source, *(text for output in cell.get("outputs", ()) for text in texts_of(output))]
        found = [text for text in texts if MACHINE.search(text) or "Traceback" in text]
        assert not found, f"{name}, cell {cell.id}: {found}"


def texts_of(output):
    if output.output_type == "stream":
        return [output.text]
    return [text for kind, text in output.get("data", {}).items() if kind in TEXTS]


def test_the_kernel_is_this_interpreter_and_a_failing_cell_is_an_error(folder):
    new = nbformat.v4
    where = new.new_notebook(cells=[new.new_code_cell("import sys\nprint(sys.executable)")])
    assert said(code_cells(execute(where, folder))[0]) == [{"stdout": sys.executable + "\n"}]
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(new.new_notebook(cells=[new.new_code_cell("1 / 0")]), folder)


def save(names):
    for name in names:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(committed(name), Path(folder))
        sys.stderr.write(stderr(notebook))
        nbformat.write(tidied(notebook), NOTEBOOKS / f"{name}.ipynb")
        print(f"{name}: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    save(sys.argv[1:] or NAMES)
