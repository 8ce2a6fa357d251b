"""What many tests share: composed configurations and one small preprocessed data set."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from recipe.config.schema import Config
from recipe.run.terminal import handlers_put_back
from tests.builders.configs import SMALL_DEMO, compose_config

if TYPE_CHECKING:
    pass

Compose = Callable[..., Config]


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
            "experiment=smoke", *SMALL_DEMO, f"data.directory={directory}", f"data.raw_dir={directory.parent / 'raw'}"
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
