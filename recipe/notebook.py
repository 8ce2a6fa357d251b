"""Run `inference.ipynb` without a browser: python -m recipe.notebook run_dir=runs/demo

The notebook of the checkout stays as it is. The executed copy, with its pictures, goes into the run.
"""

from __future__ import annotations

import os
import re
import sys
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

from recipe.config.compose import stage_config_from_overrides
from recipe.document.render import check_document
from recipe.errors import DiskError, UserError, one_clear_sentence
from recipe.run import CHECKOUT, Run, shown_path, without_paths, write_atomically

NOTEBOOK = CHECKOUT / "inference.ipynb"
PARAMETERS = "parameters"  # tag of the cell that names the run
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # colours of a traceback


def main(words: list[str]) -> None:
    """Execute the notebook on the run that `words` name; it adds to the run's records and document itself."""
    with one_clear_sentence():
        run = Run(stage_config_from_overrides(words, own_group="timing").run_dir)
        check_document(run)
        notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
        executed = execute(with_words(notebook, words))
        write_atomically(run.notebook, nbformat.writes(executed).encode())  # type: ignore[no-untyped-call]
        print(f"wrote {shown_path(run.notebook)} and {shown_path(run.document)}")


def with_words(notebook: Any, words: list[str]) -> Any:
    """The notebook with other words in its cell of parameters."""
    cells = [cell for cell in notebook.cells if PARAMETERS in cell.metadata.get("tags", [])]
    assert len(cells) == 1, f"{NOTEBOOK.name} has {len(cells)} cells with the tag {PARAMETERS}"
    cells[0].source = f"words = {words!r}"
    return notebook


def execute(notebook: Any) -> Any:
    """Run all cells in a kernel of this environment; raises `UserError` for what the notebook says in one sentence."""
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # else a kernel of the same name in the home directory goes first
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # else the kernel's debugger warns
    settings = Config({"KernelManager": {"transport": "ipc"}})  # no port that others could connect to
    with TemporaryDirectory() as sockets:
        os.environ["JUPYTER_RUNTIME_DIR"] = sockets
        client = Speaking(notebook, timeout=None, kernel_name="python3", record_timing=False, config=settings)
        return without_places(_executed(client))


def _executed(client: NotebookClient) -> Any:
    try:
        return client.execute()
    except CellExecutionError as error:
        if error.ename in (UserError.__name__, DiskError.__name__):
            raise (DiskError if error.ename == DiskError.__name__ else UserError)(error.evalue) from None
        print(ESCAPES.sub("", str(error)), file=sys.stderr)
        raise UserError(f"a cell of {NOTEBOOK.name} failed: {error.ename}: {error.evalue}") from None


class Speaking(NotebookClient):
    """Shows what the cells print while they run: some take a minute."""

    def output(self, outs: list[Any], msg: dict[str, Any], display_id: str | None, cell_index: int) -> Any:
        """Keep the output, as any client does, and print its text."""
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", file=sys.stderr, flush=True)
        return super().output(outs, msg, display_id, cell_index)


def without_places(notebook: Any) -> Any:
    """The executed notebook as others may see it: no path of this machine in its words and texts."""
    for cell in notebook.cells:
        if PARAMETERS in cell.metadata.get("tags", []):
            cell.source = without_paths(cell.source)
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = without_paths(output.text)
            if "text/plain" in output.get("data", {}):
                output.data["text/plain"] = without_paths(output.data["text/plain"])
    return notebook


if __name__ == "__main__":
    main(sys.argv[1:])
