"""One complete recipe, made once. Every test damages its own copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch

from recipe.models.build import weights_sha256
from recipe.run.directory import Run
from tests.builders.runs import complete_run


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe as its stages left it. The weights have their hash."""
    directory = tmp_path_factory.mktemp("whole") / "demo"
    complete_run(directory, lambda path: weights_sha256(safetensors.torch.load_file(path)))
    return directory


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Run:
    """A copy to damage."""
    shutil.copytree(whole, tmp_path / "demo")
    return Run(tmp_path / "demo")
