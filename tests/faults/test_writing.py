"""A kill while the document is written: every file is the old one or the new one, and people's words are kept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from recipe.document.render import write_document
from recipe.records import TrainingRecord
from recipe.run import CHECKOUT, Run
from recipe.training import loop
from tests.conftest import compose_config
from tests.faults.launched import COMMON, finish, start

Words = Callable[..., list[str]]
WRITE = "from recipe.document.render import write_document; from recipe.run import Run; write_document(Run('x'), 'x')"
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
    return {str(path.relative_to(run.directory)): path.read_bytes() for path in (run.document, run.twin)}


def written(directory: Path, fault: str | None, code: int) -> dict[str, bytes]:
    """Write the document in a process of its own, which ends with this code; what the files hold then."""
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)} | ({"FAULT": fault} if fault else {})
    done = subprocess.run([sys.executable, "-c", WRITE], cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return files_of(Run(directory / "x"))


def test_f19_a_kill_between_any_two_files_leaves_each_whole_and_the_next_time_is_as_the_first(
    documented: Path, tmp_path: Path
) -> None:
    """The worst moment of each: its content is there, its name is not."""
    for name in ("killed", "whole"):
        shutil.copytree(documented / "x", tmp_path / name / "x")
    before, after = files_of(Run(tmp_path / "killed" / "x")), written(tmp_path / "whole", None, 0)
    assert before["recipe.md"] != after["recipe.md"]
    seen = set()
    for step in range(len(list((tmp_path / "whole" / "x" / "figures").iterdir())) + 2):
        found = written(tmp_path / "killed", f"naming@0:{step}", -signal.SIGKILL)
        assert all(found[name] in (before[name], after[name]) for name in found)
        seen.add((found["recipe.md"] == after["recipe.md"], found["recipe.json"] == after["recipe.json"]))
        json.loads(found["recipe.json"])
    assert seen == {(False, False), (False, True)}  # the document itself comes last
    assert written(tmp_path / "killed", None, 0) == after
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
