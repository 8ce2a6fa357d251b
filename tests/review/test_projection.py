"""A projection is its factors' arithmetic, of the recipe's own step or of none, and `check` computes it again."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from recipe import projection
from recipe.__main__ import main
from recipe.config.compose import config_from_overrides
from recipe.document.render import write_document
from recipe.errors import UserError
from recipe.provenance import Stage
from recipe.records import ProjectionRecord
from recipe.review.check.command import check
from recipe.review.findings import Finding, Kind
from recipe.review.opening import open_subject
from recipe.run import CHECKOUT, Run
from tests.review.factory import change_record, set_at

MEASURED = CHECKOUT / "benchmarks" / "results" / "step-nvidia-h200-256x224.json"
MACHINE = {"processor": "a processor", "cores": 16, "memory_gib": 128.0, "accelerator": "NVIDIA X", "accelerators": 1}


def contestants(*speeds: float) -> list[dict[str, Any]]:
    return [
        {"name": "this project, eager", "images_per_second": list(speeds)},
        {"name": "this project, compiled", "images_per_second": [9 * speed for speed in speeds]},
        {"name": "timm, eager", "images_per_second": [7.0]},
    ]


def step_file(path: Path, **changes: Any) -> Path:
    """Eager steps of 1,000 images/s in batches of 256 and 800 in batches of 128, and 2,500 of an evaluation."""
    values = {
        "time": "2026-11-26T04:00:00Z",
        "commit": "c" * 40,
        "tree": "clean",
        "hardware": MACHINE,
        "versions": {"torch": "2.15.0"},
        "arguments": {"batch": 256, "pixels": 176, "precision": "bf16"},
        "contestants": contestants(900.0, 1000.0, 1300.0),
        "batches": {"256": contestants(900.0, 1000.0, 1300.0), "128": contestants(800.0)},
        "evaluation": {"pixels": 224, "batch": 256, "images_per_second": [2500.0]},
    }
    path.write_text(json.dumps(values | changes))
    return path


def loading_file(path: Path, **changes: Any) -> Path:
    """500 images/s on 16 cores."""
    rows = [{"peer": "ours-processes", "absent": "", "median": 500.0}, {"peer": "ffcv", "absent": "", "median": 900.0}]
    values = {"processor": "a processor", "cores": 16, "date": "2026-11-26", "kinds": {"original": rows}}
    path.write_text(json.dumps(values | changes))
    return path


def projected(*words: str) -> ProjectionRecord:
    """By the verb's own arguments."""
    parser = argparse.ArgumentParser()
    projection.describe(parser)
    arguments = parser.parse_args(list(words))
    return projection.projection(config_from_overrides(arguments.words), arguments, Stage(Path("nowhere")))


def test_the_reference_recipe_by_hand(tmp_path: Path) -> None:
    """1,251 steps of 1,024 images are 1,281,024 an epoch; 10 epochs; 31.25 images/s for each of the loader's cores."""
    step, loading = step_file(tmp_path / "step.json"), loading_file(tmp_path / "loading.json")
    record = projected(
        "optimization.epochs=10",
        *("--step", str(step), "--loading", str(loading), "--dollars-per-gpu-hour", "3.6"),
    )
    one, eight = record.rows
    assert (one.accelerators, one.images_per_forward, record.steps[one.step].batch_size) == (1, 256, 256)
    assert one.training_seconds == pytest.approx(12_810.24)
    assert one.validation_seconds == pytest.approx(200)
    assert one.accelerator_hours == pytest.approx(13_010.24 / 3600)
    assert one.dollars == pytest.approx(13.01024)
    assert (one.loader_images_per_second, one.loader_cores) == (1000, 32)
    assert (eight.accelerators, eight.images_per_forward, record.steps[eight.step].batch_size) == (8, 128, 128)
    assert eight.training_seconds == pytest.approx(2001.6)
    assert eight.validation_seconds == pytest.approx(25)
    assert eight.accelerator_hours == pytest.approx(8 * 2026.6 / 3600)
    assert (eight.loader_images_per_second, eight.loader_cores) == (6400, 205)


def test_what_was_not_measured_or_given_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = step_file(tmp_path / "step.json", evaluation=None, batches=None)
    assert main(["project", "--step", str(step)]) == 0
    page = capsys.readouterr().out
    assert page.startswith("## Projection (not measured)\n")
    assert page.count("no evaluation at its size was measured") == 2
    assert page.count("no loader was measured on that machine") == 2
    assert page.count("nobody gave a price") == 2
    assert page.count("No run on 8 accelerators was measured. These are lower bounds") == 1
    assert page.count("A pass takes 128 images here; step 1 was measured with 256.") == 1
    assert "115,292,160 / (1,000.0 × 8) = 14,412 s = 4 h 00 min" in page


def test_the_step_is_the_one_that_the_configuration_makes(tmp_path: Path) -> None:
    step = str(step_file(tmp_path / "step.json"))
    assert projected("trainer.compile=true", "--step", step).steps[0].images_per_second == 9000
    measured = json.loads(MEASURED.read_bytes())["contestants"]
    speeds = next(found["images_per_second"] for found in measured if found["name"] == "this project, compiled")
    words = ["augmentation.crop_pixels=224", "trainer.compile=true"]
    record = projected(*words, "--step", str(MEASURED))
    assert [found.images_per_second for found in record.steps] == [statistics.median(speeds)]
    assert record.settings == words
    assert record.evaluation is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["experiment=resnet50_next"], "changes the size of its images from epoch to epoch"),
        (["experiment=resnet50_rsb_a3"], "optimization.optimizer=lamb"),
        (["augmentation.crop_pixels=224"], "trains at 224 pixels in bf16"),
        (["trainer.precision=fp32"], "trains at 176 pixels in fp32"),
        (["model.blur_pool=true"], "model.blur_pool=True"),
        (["trainer.compile=true", "trainer.cuda_graphs=true"], "compiled, CUDA graphs"),
        (["--dollars-per-gpu-hour", "nan"], "--dollars-per-gpu-hour nan cannot be"),
        (["--gpus", "0"], "--gpus 0 cannot be"),
        (["--gpus", "3"], "does not divide into 3 processes"),
        (["--run", "nothing"], "--run nothing holds no run"),
    ],
)
def test_another_step_is_refused_in_one_sentence(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = step_file(tmp_path / "step.json")
    with pytest.raises(SystemExit) as stopped:
        main(["project", *words, "--step", str(step)])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    step = step_file(tmp_path / "step.json")
    other = step_file(tmp_path / "other.json", hardware=MACHINE | {"accelerator": "NVIDIA Y"})
    with pytest.raises(UserError, match="of different machines"):
        projected("--step", str(step), str(other))
    loading = loading_file(tmp_path / "loading.json", cores=2)
    with pytest.raises(UserError, match="2 cores of a processor and 16 cores of a processor"):
        projected("--step", str(step), "--loading", str(loading))


@pytest.mark.parametrize("content", ["{}", "no JSON", '{"contestants": 1}'])
def test_a_file_that_is_no_measurement_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text(content)
    with pytest.raises(UserError, match=r"broken\.json"):
        projected("--step", str(tmp_path / "broken.json"))


# ---- in the document of a run -----------------------------------------------------------------------


def faults(run: Run) -> list[Finding]:
    return [one for one in check(open_subject(run.directory)).findings if one.kind is Kind.finding]


def test_it_joins_the_document_of_a_run_between_its_chapters(run: Run, tmp_path: Path) -> None:
    before = run.document.read_text()
    assert "Projection" not in before
    assert main(["project", "--step", str(step_file(tmp_path / "step.json")), "--run", str(run.directory)]) == 0
    after = run.document.read_text()
    chapters = [after.index(heading) for heading in ("\n## Inference", "\n## Projection", "\n## Miscellaneous")]
    assert chapters == sorted(chapters)
    assert faults(run) == []


@pytest.mark.parametrize(
    ("keys", "value"),
    [(("rows", 1, "training_seconds"), 60.0), (("steps", 0, "images_per_second"), 1e6), (("rows", 0, "step"), 7)],
)
def test_a_number_that_its_factors_do_not_give_is_found(
    keys: tuple[str | int, ...], value: float, run: Run, tmp_path: Path
) -> None:
    main(["project", "--step", str(step_file(tmp_path / "step.json")), "--run", str(run.directory)])
    change_record(run, "projection.json", set_at(*keys, value=value))
    assert any("projection" in found.place for found in faults(run))


def test_a_document_that_projects_without_a_record_is_found(run: Run, tmp_path: Path) -> None:
    main(["project", "--step", str(step_file(tmp_path / "step.json")), "--run", str(run.directory)])
    (run.records / "projection.json").unlink()
    write_document(run, "runs/demo")
    assert any("records/projection.json is not there" in found.what for found in faults(run))
