"""Refused before any harm: two runs in one directory, processes that do not fit together, hostile files."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from recipe.errors import UserError
from recipe.models.checkpoint import checkpoint_files
from recipe.run.directory import Run
from recipe.training import loop
from tests.builders.configs import compose_config
from tests.builders.training import train_killed_in_epoch
from tests.faults.inject import injected
from tests.faults.launched import COMMON, TORCHRUN, finish, start, steps_done, wait_until

Words = Callable[..., list[str]]


# ---- processes that do not fit together ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("what", ["the configuration", "the data set's manifest"])
def test_f13_processes_that_differ_are_refused_before_the_first_step(
    what: str, data_directory: Path, tmp_path: Path
) -> None:
    """Torchrun for real, where each process composes for itself: the second one gets another name, or other data."""
    for rank in range(2):
        shutil.copytree(data_directory, tmp_path / f"data-{rank}")
    if what == "the configuration":
        words = ["name=node-${oc.env:RANK}"]
    else:
        words = [f"data.directory={tmp_path}/data-${{oc.env:RANK}}"]
        manifest = tmp_path / "data-1" / "manifest.json"
        manifest.write_text(manifest.read_text() + "\n")
    process = start(tmp_path, data_directory, *words, launcher=TORCHRUN)
    output, errors = finish(process, 1)  # torchrun's own
    assert f"error: {what} differs between processes: rank 0: " in errors
    assert "step" not in output
    run = Run(tmp_path / "x")
    assert run.metric_rows() == []
    assert not checkpoint_files(run.checkpoints)


# ---- one run directory --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_f14_a_second_training_is_refused_at_once_and_accepted_when_the_first_is_killed(
    data_directory: Path, tmp_path: Path
) -> None:
    """The first is a command. The second, in this process, has the same words."""
    words = ["optimization.epochs=500", "trainer.log_every_steps=1"]
    first = start(tmp_path, data_directory, *words)
    wait_until(lambda: steps_done(tmp_path) > 9)
    config = compose_config(*COMMON, f"data.directory={data_directory}", *words)
    started = time.monotonic()
    with pytest.raises(UserError, match="x is in use by another process; wait for it or give another run_dir"):
        loop.train(config)
    assert time.monotonic() - started < 5
    first.send_signal(signal.SIGKILL)
    first.communicate()
    with injected(f"stop@0:{saved_step(tmp_path) + 1}"), pytest.raises(SystemExit) as stopped:
        loop.train(config)
    assert stopped.value.code == 75


def saved_step(directory: Path) -> int:
    return int(checkpoint_files(directory / "x" / "checkpoints")[-1].stem.removeprefix("step-"))


# ---- hostile files ------------------------------------------------------------------------------------


class Hostile:
    """Unpickling this runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


def test_f16_a_hostile_checkpoint_in_a_run_is_set_aside_and_not_executed(
    smoke: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a right checksum, as the newest one: the one before is used."""
    words = smoke("optimization.epochs=2", "optimization.batch_size=36")
    train_killed_in_epoch(words, 1, step_in_epoch=1)
    hostile = tmp_path / "run" / "checkpoints" / "step-00000099.pt"
    content = pickle.dumps(Hostile(tmp_path / "executed"), protocol=2)
    hostile.write_bytes(content)
    hostile.with_name(f"{hostile.name}.sha256").write_text(hashlib.sha256(content).hexdigest() + "\n")
    record = loop.train(compose_config(*words))
    assert record is not None
    assert "step-00000099.pt is not a file of plain tensors" in capsys.readouterr().err
    assert [session.first_step for session in record.sessions] == [0, 3]
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("_target_: os.system", "_target_"),
        ("model: {_target_: os.system, name: x}", "_target_"),
        ("seed: ${oc.env:HOME}", r"\$\{"),
        ("hydra: {job_logging: {(): os.system}}", "hydra"),
        ("seed: !!python/object/apply:os.system ['touch executed']", "is not YAML"),
        ("name: x; touch executed", "another configuration"),
        ("name: $(touch executed)", "another configuration"),
    ],
)
def test_f16_a_hostile_configuration_in_a_run_is_refused_and_not_executed(
    line: str, named: str, smoke: Words, tmp_path: Path
) -> None:
    """Training continues in a directory that came from others."""
    words = smoke("optimization.epochs=2", "optimization.batch_size=36")
    key = line.partition(":")[0]
    run = Run(tmp_path / "run")
    run.write_config({"name": "smoke", "seed": 0})
    lines = [found for found in run.config.read_text().splitlines() if not found.startswith(f"{key}:")]
    run.config.write_text("\n".join([*lines, line]) + "\n")
    run.checkpoints.mkdir()
    (run.checkpoints / "step-00000001.pt").touch()  # it has begun, so its configuration binds
    with pytest.raises(UserError, match=named):
        loop.train(compose_config(*words))
    assert not (tmp_path / "executed").exists()
