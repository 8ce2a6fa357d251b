"""Published weights: read as plain data, measured by their own protocol, refused by name if they do not exist.

A local file replaces the download.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recipe.config.schema import Config, Interpolation, Precision
from recipe.errors import UserError
from recipe.models.build import build_model, weights_sha256
from recipe.models.pretrained import published_accuracy, published_config, published_weights
from recipe.run.directory import Run
from recipe.run.records import EvaluationRecord
from recipe.stages.evaluate import evaluate_run
from tests.builders.configs import SMALL_DEMO, compose_config


def asking(weights: str, *overrides: str) -> Config:
    return compose_config(f"evaluation.weights={weights}", *overrides)


def test_named_weights_bring_their_own_protocol_and_accuracy() -> None:
    config = published_config(
        asking("IMAGENET1K_V2", "evaluation.resize_pixels=256", "evaluation.interpolation=bicubic")
    )
    protocol = config.evaluation
    assert (protocol.resize_pixels, protocol.crop_pixels, protocol.interpolation) == (232, 224, Interpolation.bilinear)
    assert config.trainer.precision is Precision.fp32
    assert published_config(asking("IMAGENET1K_V1")).evaluation.resize_pixels == 256
    assert published_accuracy("resnet50", "IMAGENET1K_V2") == pytest.approx(
        {"top1_accuracy": 0.80858, "top5_accuracy": 0.95434}
    )


def test_unknown_weights_are_refused_with_those_that_exist() -> None:
    with pytest.raises(UserError, match=r"IMAGENET1K_V9 is neither a file nor weights of resnet50.*IMAGENET1K_V1"):
        published_config(asking("IMAGENET1K_V9"))


def test_without_a_network_the_message_names_the_file_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError, match=r"could not be downloaded from https://.*fetch that file by other means"):
        published_weights("resnet50", "IMAGENET1K_V2")


def test_a_local_file_is_measured_beside_the_runs_own_result(data_directory: Path, tmp_path: Path) -> None:
    config = compose_config(
        "experiment=smoke", *SMALL_DEMO, f"data.directory={data_directory}", f"run_dir={tmp_path / 'run'}"
    )
    weights = build_model(config.model, 12, seed=5).state_dict()
    torch.save(weights, tmp_path / "theirs.pth")
    asked = replace(config, evaluation=replace(config.evaluation, weights=str(tmp_path / "theirs.pth")))
    record = evaluate_run(published_config(asked))
    assert record is not None
    assert record.inputs["weights"] == weights_sha256(weights)
    assert record.protocol.name == "resize28-crop24-bilinear-small-theirs"
    run = Run(config.run_dir)
    assert run.read_all(run.other_evaluations, EvaluationRecord) == [record]
    assert run.read(EvaluationRecord) is None


def test_a_file_for_another_number_of_classes_is_refused(data_directory: Path, tmp_path: Path) -> None:
    config = compose_config(
        "experiment=smoke", *SMALL_DEMO, f"data.directory={data_directory}", f"run_dir={tmp_path / 'run'}"
    )
    torch.save(build_model(config.model, 7, seed=5).state_dict(), tmp_path / "other.pth")
    asked = replace(config, evaluation=replace(config.evaluation, weights=str(tmp_path / "other.pth")))
    with pytest.raises(UserError, match=r"evaluation\.weights=.*other\.pth does not fit the model"):
        evaluate_run(asked)
