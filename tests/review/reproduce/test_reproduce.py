"""From the document alone: everything else is deleted, and the same bits come out."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from recipe.__main__ import main
from recipe.config.schema import Config
from recipe.data.manifest import copy_record
from recipe.document import figures
from recipe.document.publish import publish
from recipe.document.render import write_document
from recipe.document.run_data import load
from recipe.preprocessing.pipeline import preprocess
from recipe.review.findings import CANNOT_TELL
from recipe.review.reproduce import command as reproduce
from recipe.review.reproduce.judge import BIT_EXACT, DIFFERS, EVALUATION_EQUAL
from recipe.run.directory import Run
from recipe.run.records import EvaluationRecord, JournalRecord, ReproductionRecord, TrainingRecord
from recipe.stages.evaluate import evaluate_run
from recipe.training.loop import train
from tests.builders.configs import SMALL_DEMO, compose_config

pytestmark = pytest.mark.process


@contextmanager
def quickly() -> Iterator[pytest.MonkeyPatch]:
    """Without figures: they take most of the time of so small a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *_: {})
        yield patch


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing in it but the document of a run that was preprocessed, trained and evaluated there."""
    folder = tmp_path_factory.mktemp("emitted")
    with quickly() as patch:
        patch.chdir(folder)
        config = compose_config(
            *("experiment=smoke", *SMALL_DEMO, "optimization.batch_size=24", "seed=5", "evaluation.batch_size=48"),
            *("name=mine", "data.raw_dir=raw", "data.directory=data", "trainer.torch_threads=2"),
        )
        emit(config)
        shutil.copy(Run(config.run_dir).document, "recipe.md")
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
    assert [path.name for path in folder.iterdir()] == ["recipe.md"]
    return folder / "recipe.md"


def emit(config: Config) -> None:
    """The work of the three scripts."""
    run = Run(config.run_dir)
    copy_record(run, Path(config.data.directory), preprocess(config))
    train(config)
    evaluate_run(config)
    write_document(run, config.run_dir)


@pytest.fixture(scope="module")
def reproduced(emitted: Path) -> tuple[Run, int]:
    """The reproduction, beside the document, and its exit code."""
    with quickly() as patch:
        patch.chdir(emitted.parent)
        code = main(["reproduce", "recipe.md", "--yes"])
        [directory] = Path("runs").glob("reproduction-*")
    return Run(emitted.parent / directory), code


def record(run: Run) -> ReproductionRecord:
    found = run.read(ReproductionRecord)
    assert found is not None
    return found


def test_the_document_alone_gives_the_same_bits(emitted: Path, reproduced: tuple[Run, int]) -> None:
    run, code = reproduced
    found = record(run)
    levels = {claim.claim: claim.level for claim in found.claims}
    assert code == 0
    assert levels["trained weights"] == BIT_EXACT
    assert set(levels.values()) == {BIT_EXACT, EVALUATION_EQUAL}
    assert found.determinism_context == []
    assert found.machine["torch_threads"] == 2
    training = run.read(TrainingRecord)
    assert training is not None
    assert training.outputs["weights"] in emitted.read_text()
    assert found.verdict.startswith(BIT_EXACT)


def test_the_report_names_the_document_and_nothing_is_written_elsewhere(
    emitted: Path, reproduced: tuple[Run, int]
) -> None:
    run, _ = reproduced
    digest = hashlib.sha256(emitted.read_bytes()).hexdigest()
    assert record(run).document_sha256 == digest
    assert digest in (run.directory / reproduce.REPORT).read_text()
    assert run.directory.name == f"reproduction-{digest[:12]}"
    assert digest in run.document.read_text()
    assert {path.name for path in emitted.parent.iterdir()} == {"recipe.md", "runs"}
    assert {path.name for path in (emitted.parent / "runs").iterdir()} == {"journal.jsonl", run.directory.name}
    history = run.read(JournalRecord)
    assert history is not None
    assert [entry.stage for entry in history.entries] == ["preprocess", "train", "evaluate"]


def test_a_run_can_be_published_and_reproduced_from_its_page(
    reproduced: tuple[Run, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For any state of the developer's tree. The figures are the real ones."""
    monkeypatch.chdir(reproduced[0].directory.parent.parent)
    run = Run(reproduced[0].directory.relative_to(Path.cwd()))
    folder = publish(run, tmp_path / "recipes" / "mine", allow_modified=True)
    published, facts = load(Run(folder), "x"), load(run, str(run.directory))
    assert replace(published, publication=None) == facts
    page = (folder / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", page) if "://" not in link]
    assert {"figures/accuracy.png", "metrics.jsonl"} <= set(links)
    assert not [link for link in links if not (folder / link).is_file()]
    assert not list(folder.rglob("*.pt")) + list(folder.rglob("*.safetensors"))
    with pytest.raises(SystemExit):
        main(["reproduce", str(folder)])
    assert "differs from this checkout" in capsys.readouterr().out


def in_folder(emitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(emitted.parent)


def test_a_finished_reproduction_is_not_done_again(
    emitted: Path, reproduced: tuple[Run, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_folder(emitted, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        main(["reproduce", "recipe.md", "--yes"])
    assert stopped.value.code == 2
    assert "has a finished reproduction" in capsys.readouterr().err


def altered(emitted: Path, tmp_path: Path, change: Callable[[dict], None]) -> Path:  # type: ignore[type-arg]
    """Another document, with changed claims."""
    before, _, rest = emitted.read_text().partition("```json\n")
    block, _, after = rest.partition("\n```\n")
    values = json.loads(block)
    change(values)
    path = tmp_path / "altered.md"
    path.write_text(f"{before}```json\n{json.dumps(values)}\n```\n{after}")
    return path


def test_a_claim_that_is_not_true_is_found(
    emitted: Path, reproduced: tuple[Run, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the data that are here, only one stage. Other circumstances are reported."""

    def lie(block: dict) -> None:  # type: ignore[type-arg]
        block["claims"]["training"]["order_sha256"] = "0" * 64
        block["determinism_context"]["the processor"] = "another"

    path = altered(emitted, tmp_path, lie)
    data = reproduced[0].directory / "data"
    with quickly():
        words = ("--data-dir", str(data), "--stages", "train", "--run-dir", "again")
        code = main(["reproduce", str(path), "--yes", *words])
    assert code == 1
    printed = capsys.readouterr().out
    assert "has the recipe's manifest" in printed
    found = record(Run("again"))
    assert found.verdict == f"{DIFFERS}: order of the images, first two epochs"
    levels = {claim.claim: claim.level for claim in found.claims}
    assert levels["evaluation"] == CANNOT_TELL
    assert Run("again").read(EvaluationRecord) is None
    assert found.stages == ["train"]
    assert found.determinism_context[0].startswith("the processor: another there, ")


def test_other_raw_images_stop_before_training(
    emitted: Path, reproduced: tuple[Run, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lie(block: dict) -> None:  # type: ignore[type-arg]
        block["claims"]["data"]["manifest_sha256"] = "0" * 64
        block["claims"]["data"]["splits"]["train"]["raw_sha256"] = "1" * 64

    path = altered(emitted, tmp_path, lie)
    raw = reproduced[0].directory / "raw"
    with pytest.raises(SystemExit) as stopped:
        main(["reproduce", str(path), "--yes", "--run-dir", "again", "--raw-dir", str(raw)])
    assert stopped.value.code == 2
    assert "the raw data are not the recipe's: train should be" in capsys.readouterr().err
    assert Run("again").read(TrainingRecord) is None
