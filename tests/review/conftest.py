"""One complete recipe, made once. Every test damages its own copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch

from recipe.models.build import weights_sha256
from recipe.review.check import code
from recipe.run.directory import Run
from recipe.run.provenance import commit, source_sha256
from tests.builders.runs import complete_run


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe as its stages left it. The weights have their hash."""
    directory = tmp_path_factory.mktemp("whole") / "demo"
    complete_run(directory, lambda path: weights_sha256(safetensors.torch.load_file(path)))
    return directory


@pytest.fixture
def run(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy to damage. Its commit has the source of this checkout, which may be in the middle of a change."""
    source_at = code.source_sha256_at

    def source_of(name: str) -> str | None:
        return source_sha256() if name == commit() else source_at(name)

    monkeypatch.setattr(code, "source_sha256_at", source_of)
    shutil.copytree(whole, tmp_path / "demo")
    return Run(tmp_path / "demo")
