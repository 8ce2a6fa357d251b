"""The doctor's arithmetic, and one examination of the small set."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from recipe.errors import UserError
from recipe.stages import doctor
from recipe.stages.doctor import Findings, training_time, verdict
from tests.builders.layouts import with_damaged_image

SLOW_LOADING = Findings(read=9000, decode=1000, transform=1000, small=1250, copy=None, model=4000, cores=4)


def test_the_slowest_stage_is_named_with_its_rate() -> None:
    assert SLOW_LOADING.load_on_a_core == pytest.approx(500)
    assert verdict(SLOW_LOADING).startswith("decoding and augmentation bounds this experiment at 2,000 images/s; ")
    assert verdict(replace(SLOW_LOADING, model=50)).startswith(
        "the training step bounds this experiment at 50 images/s"
    )
    assert verdict(replace(SLOW_LOADING, read=70)).startswith("storage bounds this experiment at 70 images/s")
    assert verdict(replace(SLOW_LOADING, copy=90)).startswith("the copy to the device bounds this experiment at 90")


def test_workers_re_encoding_and_cores() -> None:
    said = verdict(SLOW_LOADING)
    assert "needs 9 of the 4 cores" in said, "4,000 images/s and a tenth more, 500 on each core"
    assert "re-encoding (data.resize_short_side=256) would make loading 2.5 times as fast" in said
    assert "with 9 cores instead of 4 the device would not wait" in said
    enough = verdict(replace(SLOW_LOADING, model=400, small=None))
    assert "needs 1 of the 4 cores" in enough
    assert "re-encoding" not in enough
    assert "instead of" not in enough


def test_the_time_of_training_comes_with_its_arithmetic() -> None:
    sentence = training_time(SLOW_LOADING, epochs=90, images=1_281_167)
    assert sentence.startswith("90 epochs would take about 16 h 01 min on this machine: ")
    assert ": 90 x 1,281,167 images / 2,000.0 images/s; " in sentence
    assert "an estimate of training alone" in sentence


def test_every_stage_is_measured(
    smoke: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "SAMPLE", 8)
    monkeypatch.setattr(doctor, "MEASURED_STEPS", 1)
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    assert doctor.run(parser.parse_args(smoke("trainer.gpus=null"))) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == [
        "reading",
        "decoding crops, one core",
        "augmentation, one core",
        "training step",
    ]
    assert "bounds this experiment at" in lines[4]
    assert lines[5].startswith("2 epochs would take about ")
    assert ": 2 x 108 images / " in lines[5]


def test_a_damaged_image_is_named(
    smoke: Callable[..., list[str]], data_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, shard = with_damaged_image(data_directory, tmp_path / "damaged")
    monkeypatch.setattr(doctor, "SAMPLE", 10**6)
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    words = smoke("trainer.gpus=null", f"data.directory={tmp_path / 'damaged'}")
    with pytest.raises(UserError, match="the shard is damaged; delete that file") as stopped:
        doctor.run(parser.parse_args(words))
    assert key in str(stopped.value)
    assert shard in str(stopped.value)
