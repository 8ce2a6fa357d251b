"""Fixtures of many tests, one small preprocessed data set among them, and the lanes: `slow`, `process` and `gpu`."""

from __future__ import annotations

import multiprocessing.process
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from recipe.config.schema import Config
from recipe.run.records import SerializationRecord
from recipe.run.terminal import handlers_put_back
from tests.builders.configs import SMALL_DEMO, compose_config

STARTING_FIXTURES = {
    "smoke",
    "record",
    "emitted",
    "reproduced",
    "executed",
    "proven",
    "trained",
    "two",
    "two_and_three",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests whose fixtures start a process or train as `process`; skip those of a GPU where there is none."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch finds none"))
    for item in items:
        if STARTING_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.process)


@pytest.fixture(autouse=True)
def fast_lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test without the marks `process` and `slow` that starts a Python process or trains."""
    if any(request.node.get_closest_marker(name) for name in ("process", "slow", "gpu")):
        return

    def refuse(*_: object, **__: object) -> NoReturn:
        pytest.fail("this test starts a process or trains: mark it with @pytest.mark.process")

    start = subprocess.Popen.__init__

    def start_unless_python(self: subprocess.Popen[Any], command: Any, *arguments: Any, **options: Any) -> None:
        program = command if isinstance(command, str | bytes) else next(iter(command))
        if Path(os.fsdecode(program)).name.startswith("python"):
            refuse()
        start(self, command, *arguments, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", start_unless_python)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    if "recipe.training.loop" in sys.modules:
        monkeypatch.setattr("recipe.training.loop.take_step", refuse)


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs in an empty directory, where its journal and anything stray ends up."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """A training that a signal has stopped ignores the next ones, since its process is about to end."""
    with handlers_put_back():
        yield


@pytest.fixture
def default_signals() -> Iterator[None]:
    """A test, and the processes that it starts, heed the signals that a background job and nohup ignore."""
    before = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in before.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo data set, preprocessed once for the whole session."""
    from recipe.preprocessing.pipeline import preprocess

    directory = tmp_path_factory.mktemp("small") / "demo"
    preprocess(
        compose_config(
            "experiment=smoke",
            *SMALL_DEMO,
            f"data.directory={directory}",
            f"data.raw_dir={directory.parent / 'raw'}",
            "data.processes=0",
        )
    )
    return directory


@pytest.fixture
def smoke(data_directory: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Command-line words for the smoke experiment on the small data set, in a run directory of the test's own."""

    def words(*overrides: str, run: str = "run") -> list[str]:
        return [
            "experiment=smoke",
            *SMALL_DEMO,
            f"data.directory={data_directory}",
            f"run_dir={tmp_path / run}",
            "optimization.batch_size=24",
            *overrides,
        ]

    return words


# ---- a run that was trained, evaluated and exported, for tests of stages and of inference --------------


@pytest.fixture(scope="session")
def config(data_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that was trained and evaluated."""
    from recipe.stages.evaluate import evaluate_run
    from recipe.training.loop import train

    directory = tmp_path_factory.mktemp("exported")
    config = compose_config(
        "experiment=smoke",
        *SMALL_DEMO,
        f"data.directory={data_directory}",
        f"run_dir={directory / 'run'}",
        "optimization.batch_size=24",
        "optimization.epochs=4",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        train(config)
        evaluate_run(config)
    return config


@pytest.fixture(scope="session")
def record(config: Config, tmp_path_factory: pytest.TempPathFactory) -> SerializationRecord:
    """Its three exported files."""
    from recipe.stages.serialize import serialize_run

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        return serialize_run(config)
