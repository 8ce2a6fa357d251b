"""A kill while the document is written: every file is the old one or the new one, and people's words are kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from recipe.document.curves import TRAINING_INPUTS
from recipe.document.render import write_document
from recipe.run.directory import Run
from recipe.run.files import CHECKOUT
from recipe.run.records import TrainingRecord
from recipe.training import loop
from tests.builders.configs import compose_config
from tests.faults.launched import COMMON, finish, start

Words = Callable[..., list[str]]
# Writes the document of `x` over and over, killed before the 1st, 2nd, ... file gets its name, and once in peace.
# Forks import nothing again, and nothing here has threads.
KILL_AT_EACH_FILE = """
import os, shutil, sys
from recipe.document.render import write_document
from recipe.run.directory import Run
from tests.faults.inject import injected
for number in range(int(sys.argv[1])):
    child = os.fork()
    if child == 0:
        with injected(f"naming@0:{number}"):
            write_document(Run("x"), "x")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
    shutil.copytree("x", f"killed-{number}")
write_document(Run("x"), "x")
"""
PROSE = "\nWords of a person, äöü.\n"


@pytest.fixture(scope="module")
def documented(data_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run `x` whose document has somebody's own words, and whose records have changed since."""
    directory = tmp_path_factory.mktemp("documented")
    words = [*COMMON, f"data.directory={data_directory}", f"run_dir={directory / 'x'}", "optimization.epochs=1"]
    loop.train(compose_config(*words))
    run = Run(directory / "x")
    write_document(run, "x")
    run.document.write_text(run.document.read_text() + PROSE)
    record = run.read(TrainingRecord)
    assert record is not None
    run.write(msgspec.structs.replace(record, training_seconds=record.training_seconds + 12345))
    return directory


def files_of(run: Run) -> dict[str, bytes]:
    return {str(path.relative_to(run.directory)): path.read_bytes() for path in (run.document, run.json_file)}


@pytest.mark.slow
def test_f19_a_kill_at_any_file_leaves_each_complete_and_the_next_time_is_as_the_first(
    documented: Path, tmp_path: Path
) -> None:
    """The worst moment of each: its content is there, its name is not."""
    shutil.copytree(documented / "x", tmp_path / "x")
    run = Run(tmp_path / "x")
    drawn = [path for path in run.figures.iterdir() if path.name != Path(TRAINING_INPUTS).name]  # by training itself
    before, count = files_of(run), len(drawn) + 3  # journal, recipe.json, page
    program = [sys.executable, "-c", KILL_AT_EACH_FILE, str(count)]
    subprocess.run(program, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(CHECKOUT)}, check=True)
    after = files_of(run)
    assert before["recipe.md"] != after["recipe.md"]
    assert before["recipe.json"] != after["recipe.json"]
    for number in range(count):
        found = files_of(Run(tmp_path / f"killed-{number}"))
        assert found["recipe.md"] == before["recipe.md"]  # the last one to get its name
        assert found["recipe.json"] == (after if number == count - 1 else before)["recipe.json"]
        assert len(list((tmp_path / f"killed-{number}").rglob("*.tmp-*"))) >= 1
    assert after["recipe.md"].decode().endswith(PROSE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_f19_a_training_command_killed_while_it_writes_the_document_is_completed_by_the_next(
    documented: Path, data_directory: Path, tmp_path: Path
) -> None:
    shutil.copytree(documented / "x", tmp_path / "x")
    run = Run(tmp_path / "x")
    before = files_of(run)
    words = ("optimization.epochs=1",)
    last = len(list(run.figures.iterdir())) + 1
    finish(start(tmp_path, data_directory, *words, fault=f"naming@0:{last}"), -signal.SIGKILL)
    assert run.document.read_bytes() == before["recipe.md"]
    finish(start(tmp_path, data_directory, *words), 0)
    text = run.document.read_text()
    assert text.endswith(PROSE)
    assert text.encode() != before["recipe.md"]
