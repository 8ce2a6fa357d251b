"""One run that was trained, evaluated and exported, for every test of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipe.config.schema import Config
from recipe.run.records import SerializationRecord
from recipe.stages.evaluate import evaluate_run
from recipe.stages.serialize import serialize_run
from recipe.training.loop import train
from tests.builders.configs import SMALL_DEMO, compose_config


@pytest.fixture(scope="session")
def config(data_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that was trained and evaluated."""
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
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        return serialize_run(config)
