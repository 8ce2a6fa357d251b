"""verify and drift on a real run: no finding without a change, and every damaged link is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipe.__main__ import main
from recipe.document.render import write_document
from recipe.errors import UserError
from recipe.review.check.pairs import pair_findings
from recipe.review.opening import RecordReader, open_recipe
from recipe.review.verify import code as drift
from recipe.review.verify.files import BROKEN, HOLDS, NOT_HERE, Link, links
from recipe.review.verify.trace import TraceDifference, trace_here
from recipe.run.directory import Run
from recipe.run.records import TrainingRecord
from recipe.stages.evaluate import evaluate_run
from recipe.training.fingerprint import leave_fingerprint
from recipe.training.loop import train
from recipe.training.optim import LearningRate
from tests.builders.configs import SMALL_DEMO, compose_config
from tests.builders.tamperings import PREDICTIONS

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def finished(data_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained and evaluated, with its document, its data and its raw archives beside it."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(data_directory, folder / "data")
    shutil.copytree(data_directory.parent / "raw", folder / "raw")
    words = ["experiment=smoke", *SMALL_DEMO, f"data.directory={folder / 'data'}", "optimization.batch_size=24"]
    config = compose_config(*words, "optimization.epochs=1", f"run_dir={folder / 'run'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["train.py", *words[:-2], "optimization.epochs=1", "optimization.batch_size=24"])
        record = train(config)
        assert record is not None
        run = Run(config.run_dir)
        leave_fingerprint(run, config, record)
        evaluate_run(config)
        write_document(run, "runs/smoke")
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def chain_of(folder: Path) -> list[Link]:
    return list(links(open_recipe(folder / "run"), folder / "raw", folder / "data"))


def broken(folder: Path) -> list[str]:
    return [link.name for link in chain_of(folder) if link.state == BROKEN]


def test_every_link_of_a_fresh_run_holds(finished: Path) -> None:
    chain = chain_of(finished)
    assert {link.state for link in chain} == {HOLDS}, [link.line() for link in chain if link.state != HOLDS]
    names = " ".join(link.name for link in chain)
    for part in ("raw ", "data manifest.json", "data train-", "index", "weights step-", "predictions/", "metrics of"):
        assert part in names


def flip(path: Path) -> None:
    """One bit of one byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("raw/ILSVRC2012_img_train.tar", "raw ILSVRC2012_img_train.tar"),
        ("data/manifest.json", "data manifest.json"),
        ("data/train-00000.tar", "data train-00000.tar"),
        ("data/train.index.npy", "data train.index.npy"),
        ("data/val.keys.npy", "data val.keys.npy"),
        ("run/checkpoints/step-*.pt", "weights step-"),
        ("run/checkpoints/step-*.safetensors", "weights step-"),
        ("run/predictions/*.npz", "predictions/"),
    ],
)
def test_a_flipped_byte_is_named(copy: Path, pattern: str, named: str) -> None:
    (path,) = copy.glob(pattern)
    flip(path)
    found = broken(copy)
    assert any(name.startswith(named) for name in found), found
    others = "data " if path.name == "manifest.json" else "metrics of"  # the manifest has the hashes of its files
    assert all(name.startswith((named, others)) for name in found), found
    assert found[0].startswith(named)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_record_that_was_edited_contradicts_its_neighbours(copy: Path) -> None:
    edit(copy / "run/records/evaluation.json", lambda record: record.update(correct_top1=record["correct_top1"] + 1))
    names = broken(copy)
    for place in ("metrics of", "records/evaluation.json, correct_top1", "recipe.md, JSON block"):
        assert any(name.startswith(place) for name in names), place
    edit(copy / "run/records/training.json", lambda record: record.update(outputs={"weights": "0" * 64}))
    assert "evaluation read the weights" in broken(copy)


def test_a_configuration_that_was_edited_is_named(copy: Path) -> None:
    path = copy / "run/config.yaml"
    path.write_text(path.read_text().replace("label_smoothing: 0.1", "label_smoothing: 0.2"))
    assert "config.yaml" in broken(copy)


def test_files_that_are_not_there_break_nothing(copy: Path) -> None:
    shutil.rmtree(copy / "raw")
    shutil.rmtree(copy / "data")
    shutil.rmtree(copy / "run/checkpoints")
    assert broken(copy) == []
    assert NOT_HERE in {link.state for link in chain_of(copy)}


def test_outputs_outside_the_run_are_not_looked_at(copy: Path) -> None:
    edit(copy / "run/records/evaluation.json", lambda record: record["outputs"].update({"../../secret": "0" * 64}))
    assert "../../secret" in broken(copy)


def test_a_fresh_run_contradicts_nothing(finished: Path) -> None:
    assert not list(pair_findings(RecordReader(Run(finished / "run")).facts()))


@pytest.mark.parametrize("name", PREDICTIONS)
def test_tampered_predictions_are_found(copy: Path, name: str) -> None:
    PREDICTIONS[name](copy / "run")
    assert broken(copy)


# ---- drift and the trace ---------------------------------------------------------------------------


def findings(folder: Path) -> list[TraceDifference]:
    return list(drift.code_differences(open_recipe(folder / "run")))


def test_a_fresh_recipe_has_not_drifted(finished: Path) -> None:
    assert findings(finished) == []


def test_a_document_alone_names_the_file_of_its_trace(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page has the hash only; with the file beside it, it is compared, and another file is refused."""
    shutil.copy(finished / "run/recipe.md", tmp_path / "alone.md")
    with pytest.raises(SystemExit, match="2"):
        main(["verify", "alone.md"])
    assert "records/fingerprint.json is not beside it" in capsys.readouterr().err
    assert main(["verify", "alone.md", "--skip", "trace"]) == 0
    (tmp_path / "records").mkdir()
    trace = (finished / "run/records/fingerprint.json").read_text()
    (tmp_path / "records/fingerprint.json").write_text(trace)
    assert main(["verify", "alone.md", "--skip", "chain"]) == 0
    assert "trace matches" in capsys.readouterr().out
    (tmp_path / "records/fingerprint.json").write_text(trace.replace('"parameters": ', '"parameters": 1'))
    with pytest.raises(SystemExit, match="2"):
        main(["verify", "alone.md"])
    assert "is not the one that the document names by its hash" in capsys.readouterr().err


def test_a_change_of_the_code_alone_is_drift(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LearningRate.__call__
    monkeypatch.setattr(LearningRate, "__call__", lambda self, step: original(self, step + 1))
    found = findings(finished)
    assert found
    assert found[0].what.startswith("learning rate at")


def test_a_change_of_a_setting_is_drift(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    composed = drift.config_from_overrides
    monkeypatch.setattr(drift, "config_from_overrides", lambda words: composed([*words, "optimization.momentum=0.8"]))
    assert [found.line() for found in findings(finished)] == [
        "configuration optimization.momentum: 0.9 in the recipe, 0.8 here"
    ]


def test_an_entry_point_that_does_not_load_is_drift(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for script in drift.SCRIPTS:
        (tmp_path / script).write_text("// Copyright\n")  # the founding example's own first line
    monkeypatch.setattr(drift, "CHECKOUT", tmp_path)
    found = list(drift.load_failures())
    assert len(found) == len(drift.SCRIPTS)
    assert "SyntaxError" in found[0].here


@pytest.mark.parametrize(
    ("command", "kept"),
    [
        ("python train.py experiment=smoke optimization.epochs=2", ["experiment=smoke", "optimization.epochs=2"]),
        ("python train.py experiment=smoke -m seed=1,2,3", ["experiment=smoke"]),
        ("python train.py run_dir=/etc hydra.run.dir=/tmp ++x=1 ~y trainer.gpus=8", []),
        ("python train.py name='${oc.env:HOME}'", []),
        ("python train.py 'unclosed", []),
        ("python train.py optimization.step_epochs=[2,4]", ["optimization.step_epochs=[2,4]"]),
    ],
)
def test_only_plain_settings_of_an_untrusted_command_are_used(finished: Path, command: str, kept: list[str]) -> None:
    subject = open_recipe(finished / "run")
    assert subject.block is not None
    subject.block["code"]["command"] = command
    assert drift.recorded_settings(subject)[0] == kept


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "37", 10**12, None])
def test_claimed_numbers_that_shape_the_work_are_checked(finished: Path, value: Any) -> None:
    subject = open_recipe(finished / "run")
    assert subject.block is not None
    subject.block["claims"]["training"]["steps_per_epoch"] = value
    with pytest.raises(ValueError, match="steps_per_epoch"):
        trace_here(subject)


@pytest.mark.parametrize("value", [[], "x", 1, {"training": []}, {"training": "x"}])
def test_claims_of_unknown_form_are_refused_in_one_line(finished: Path, value: Any) -> None:
    subject = open_recipe(finished / "run")
    assert subject.block is not None
    subject.block["claims"] = value
    with pytest.raises(UserError, match="claims steps_per_epoch=None"):
        trace_here(subject)


def test_a_fingerprint_is_left_only_by_the_code_that_trained(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(finished / "run")
    record = run.read(TrainingRecord)
    assert record is not None
    path = run.records / "fingerprint.json"
    before = path.read_bytes()
    monkeypatch.setattr("recipe.training.fingerprint.source_sha256", lambda: "0" * 64)
    monkeypatch.setattr("recipe.training.fingerprint.take_fingerprint", lambda *arguments: pytest.fail("other code"))
    leave_fingerprint(run, compose_config("experiment=smoke"), record)
    assert path.read_bytes() == before
