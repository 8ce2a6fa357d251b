"""An edit while a stage runs is caught: every stage's record has the code at its start and at its end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from recipe.config.schema import Config, TimedBackend, Variant
from recipe.distributed import start_world
from recipe.document import figures
from recipe.document.render import generated_blocks
from recipe.document.run_data import source_changed
from recipe.inference.latency import measure_timing
from recipe.preprocessing.pipeline import preprocess
from recipe.run import provenance
from recipe.run.directory import Run
from recipe.run.files import CHECKOUT
from recipe.run.records import InferenceRecord, Provenance
from recipe.stages.evaluate import evaluate_run
from recipe.stages.infer import Demonstration
from recipe.stages.serialize import serialize_run
from recipe.training.loop import train
from tests.builders.configs import compose_config
from tests.builders.records import facts

BEFORE = "a" * 64
AFTER = "b" * 64


@pytest.fixture
def copied(config: Config, tmp_path: Path) -> Config:
    """The evaluated run, a copy that may be written to."""
    shutil.copytree(config.run_dir, tmp_path / "run")
    return replace(config, run_dir=str(tmp_path / "run"))


def preprocessing(config: Config) -> Provenance:
    words = ["data.train_images_per_class=1", "data.validation_images_per_class=1", "data.directory=data"]
    return preprocess(compose_config("experiment=smoke", *words, "data.raw_dir=raw")).provenance


def training(config: Config) -> Provenance:
    quick = replace(config.optimization, epochs=1)
    record = train(replace(config, run_dir="new", optimization=quick))
    assert record is not None
    return record.provenance


def evaluation(config: Config) -> Provenance:
    record = evaluate_run(config)
    assert record is not None
    return record.provenance


def serialization(config: Config) -> Provenance:
    quick = replace(config.serialization, variants=[Variant.fp32])
    return serialize_run(replace(config, serialization=quick)).provenance


def inference(config: Config) -> Provenance:
    words = [f"run_dir={config.run_dir}", f"data.directory={config.data.directory}"]
    Demonstration(words).write()
    record = Run(config.run_dir).read(InferenceRecord)
    assert record is not None
    return record.provenance


def timing(config: Config) -> Provenance:
    quick = replace(
        config.timing, seconds_per_cell=0.001, batch_sizes=[1], compiled_batch_sizes=[], backends=[TimedBackend.eager]
    )
    with start_world(config.trainer) as world:
        record = measure_timing(
            Run(config.run_dir), replace(config, timing=quick), world, CHECKOUT / "puppy.jpg", "python"
        )
    return record.provenance


STAGES: dict[str, Callable[[Config], Provenance]] = {
    "preprocessing": preprocessing,
    "training": training,
    "evaluation": evaluation,
    "serialization": serialization,
    "inference": inference,
    "timing": timing,
}


@pytest.mark.process
@pytest.mark.parametrize("stage", STAGES)
def test_a_file_touched_during_a_stage_is_in_its_record(
    copied: Config, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = iter([BEFORE])
    monkeypatch.setattr(provenance, "source_sha256", lambda: next(seen, AFTER))
    monkeypatch.setattr(figures, "draw", lambda *_: {})
    found = STAGES[stage](copied)
    assert (found.source_sha256, found.source_sha256_at_end) == (BEFORE, AFTER)
    assert source_changed(found)


@pytest.mark.parametrize("stage", ["preprocessing", "training", "evaluation"])
def test_the_document_names_the_file(stage: str) -> None:
    known = facts()
    record = getattr(known, stage)
    touched = msgspec.structs.replace(record.provenance, source_sha256_at_end=AFTER)
    blocks = generated_blocks(facts(**{stage: msgspec.structs.replace(record, provenance=touched)}))
    home = {
        "preprocessing": "processing_methods",
        "training": "optimization_methods",
        "evaluation": "performance_metrics",
    }
    warned = {name for name, content in blocks.items() if "**source changed during the stage**" in content}
    assert warned == {"summary", home[stage]}
