"""`check` finds nothing in a complete recipe, and each kind of damage at its level and place."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipe.__main__ import main
from recipe.document.render import write_document
from recipe.review.check import code as sources
from recipe.review.check.command import check
from recipe.review.findings import Finding, Kind, Level
from recipe.review.opening import open_recipe
from recipe.run.directory import Run
from recipe.run.files import CHECKOUT, portable_path
from recipe.run.provenance import commit
from tests.builders.runs import (
    CORRECT,
    CORRECT_TOP5,
    PREDICTIONS,
    change_block,
    change_document,
    change_record,
    flip,
    predictions,
    set_at,
    sha,
)

Damage = Callable[[Run], Any]


def findings(run: Run, executes: bool = False) -> list[Finding]:
    return check(open_recipe(run.directory), executes).findings


def of_kind(found: list[Finding], kind: Kind = Kind.finding) -> list[Finding]:
    return [one for one in found if one.kind is kind]


# A whole recipe


def test_a_complete_recipe_has_no_findings_and_missing_statements_are_notes(run: Run) -> None:
    report = check(open_recipe(run.directory), executes=True)
    found = [one for one in report.findings if "not built again" not in one.what]  # these records are of no machine
    assert not [one for one in found if one.kind is not Kind.note]
    assert {one.level for one in found} == {Level.present}
    unknown = {item["item"] for item in report.items if item["state"] != "present"}
    assert unknown == {
        "schema for adding samples",
        "number of runs and spread",
        "tolerance: when a second run is on track",
        "expected result and its source",
        "action items",
    }


def test_a_published_folder_and_the_document_alone_are_recipes_too(run: Run, tmp_path: Path) -> None:
    """Without the large files fewer things are checked. This is reported and not a failure."""
    published = tmp_path / "published"
    published.mkdir()
    for name in ("records", "figures"):
        shutil.copytree(run.directory / name, published / name)
    for name in ("config.yaml", "metrics.jsonl", "recipe.json"):
        shutil.copy(run.directory / name, published / name)
    shutil.copy(run.document, published / "README.md")
    found = check(open_recipe(published)).findings
    assert not of_kind(found)
    assert any("onnx/model-fp32.onnx" in one.what for one in of_kind(found, Kind.cannot_tell))

    alone = tmp_path / "alone.md"
    shutil.copy(run.document, alone)
    found = check(open_recipe(alone)).findings
    assert not of_kind(found)
    assert any("no records" in one.what for one in of_kind(found, Kind.cannot_tell))


@pytest.mark.process
def test_it_needs_no_torch_and_less_than_two_seconds(run: Run) -> None:
    program = (
        "import sys, time; sys.modules['torch'] = None; from recipe.__main__ import main; "
        f"code = main(['check', {str(run.directory)!r}]); "
        "assert code < 2 and 'matplotlib' not in sys.modules; print(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 2


@pytest.mark.parametrize(
    ("name", "command", "kind"),
    [
        ("inference.json", "python -m recipe.stages.infer run_dir=", Kind.finding),
        ("serialization.json", "python serialize.py run_dir=", Kind.note),  # asked for where the deployed form differs
    ],
)
def test_a_stage_that_was_not_run_is_named_by_its_command(run: Run, name: str, command: str, kind: Kind) -> None:
    (run.records / name).unlink()
    run.document.unlink()
    write_document(run, "runs/demo")
    found = [one for one in findings(run) if one.what.startswith("not measured yet")]
    assert [one.kind for one in found] == [kind]
    assert command in found[0].mend


Move = Callable[[Path, Path], Path]
MOVES: dict[str, Move] = {
    "copied": lambda run, elsewhere: Path(shutil.copytree(run, elsewhere)),
    "linked": lambda run, elsewhere: (elsewhere.symlink_to(run), elsewhere)[1],
    "left": lambda run, elsewhere: run,
    "named with a slash": lambda run, elsewhere: Path(f"{run}/"),
    "named by its document": lambda run, elsewhere: run / "recipe.md",
    "moved": lambda run, elsewhere: run.rename(elsewhere),  # the last one
}


@pytest.mark.parametrize("is_outside", [False, True], ids=["inside", "outside"])
def test_an_untouched_run_is_without_finding_wherever_it_is(
    is_outside: bool, run: Run, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("inference.json", "serialization.json"):  # their commands name the run
        (run.records / name).unlink()
    run.document.unlink()
    if is_outside:
        monkeypatch.chdir(tmp_path_factory.mktemp("away"))
    write_document(run, portable_path(run.directory))
    word = 'run_dir="$RUN_DIR"' if is_outside else "run_dir=demo"
    assert f"Not measured yet: run `python serialize.py {word}`" in run.document.read_text()
    for name, move in MOVES.items():
        path = move(run.directory, tmp_path_factory.mktemp("elsewhere") / "other name")
        for folder in (CHECKOUT, tmp_path_factory.getbasetemp()):
            monkeypatch.chdir(folder)
            found = of_kind(check(open_recipe(path)).findings)
            assert not [one for one in found if not one.what.startswith("not measured yet")], (name, folder)


def test_a_data_set_without_a_training_is_without_finding_where_it_is_moved(run: Run, tmp_path: Path) -> None:
    for path in (run.config, run.metrics, run.document, run.json_file):
        path.unlink()
    for path in run.records.iterdir():
        if path.name not in ("preprocessing.json", "journal.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_document(run, portable_path(run.directory))
    moved = run.directory.rename(tmp_path / "moved")
    assert not [one for one in findings(Run(moved)) if "not what the records give" in one.what]


def test_a_twin_of_an_older_version_may_lack_a_field_that_has_a_default(run: Run) -> None:
    values = json.loads(run.json_file.read_text())
    for record in ("training", "evaluation"):
        for state in ("tree_at_start", "tree_at_end"):
            del values["records"][record]["provenance"][state]["reason"]
    run.json_file.write_text(json.dumps(values))
    assert not of_kind(findings(run))
    del values["records"]["training"]["provenance"]["commit"]
    values["records"]["evaluation"]["provenance"]["tree_at_end"]["state"] = "clean enough"
    run.json_file.write_text(json.dumps(values))
    [found] = of_kind(findings(run))
    assert "records.training" in found.what
    assert "records.evaluation" in found.what


# Damage: how, the level, where it has to be found


def evaluation(*keys: str | int, value: Any) -> Damage:
    return lambda run: change_record(run, "evaluation.json", set_at(*keys, value=value))


def training(*keys: str | int, value: Any) -> Damage:
    return lambda run: change_record(run, "training.json", set_at(*keys, value=value))


def remove_block(run: Run) -> None:
    text = run.document.read_text()
    before, _, rest = text.partition("<!-- recipe:begin raw_data")
    run.document.write_text(before + rest.partition("<!-- recipe:end raw_data -->\n")[2])


def edit_config(run: Run) -> None:
    run.config.write_text(run.config.read_text().replace("learning_rate: 0.1", "learning_rate: 0.01"))


def last_row(run: Run) -> None:
    lines = run.metrics.read_text().splitlines()
    row = json.loads(lines[-1]) | {"top1_accuracy": 0.9}
    run.metrics.write_text("\n".join([*lines[:-1], json.dumps(row), ""]))


def row_of_epoch_3(run: Run) -> None:
    lines = run.metrics.read_text().splitlines()
    lines[8] = json.dumps(json.loads(lines[8]) | {"train_top1_accuracy": 0.9})
    run.metrics.write_text("\n".join([*lines, ""]))


def lost_rows(first: int, last: int) -> Callable[[Run], None]:
    def lose(run: Run) -> None:
        lines = run.metrics.read_text().splitlines(keepends=True)
        run.metrics.write_text("".join(lines[:first] + lines[last:]))

    return lose


def replace_predictions(run: Run) -> None:
    """Other predictions, with their hash in the record: only counting shows it."""
    content = predictions([CORRECT[0] - 1, *CORRECT[1:]], CORRECT_TOP5)
    (run.directory / PREDICTIONS).write_bytes(content)
    change_record(run, "evaluation.json", set_at("outputs", PREDICTIONS, value=sha(content)))


def grow_without_end(run: Run) -> None:
    layers = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    run.config.write_text(f"name: demo\na0: &a0 [x]\n{layers}")


JSON = r"recipe\.md, JSON block"
COMMAND = r"records/training\.json, provenance\.command"
MODIFIED = {"state": "modified", "untracked": [], "untracked_files": 0, "patch_sha256": "5" * 64}
DAMAGE: dict[str, tuple[Damage, Level, str]] = {
    "a section removed": (remove_block, Level.present, r"section Data / Raw data"),
    "the document removed": (lambda run: run.document.unlink(), Level.present, "demo$"),
    "a block edited": (
        lambda run: change_document(run, "89.79 %", "91.79 %"),
        Level.well_formed,
        r"block summary \(line 1\)",
    ),
    "a block edited and its marker forged": (
        lambda run: change_document(run, "89.79 %", "91.79 %", forges=True),
        Level.resolvable,
        r"block summary",
    ),
    "a marker removed": (
        lambda run: change_document(run, "<!-- recipe:end outputs -->\n", ""),
        Level.well_formed,
        r"recipe\.md$",
    ),
    "an unknown item that the guideline asks for": (
        lambda run: change_document(
            run, "| Licence | That of this project (MIT) |", "| Licence | *unknown* |", forges=True
        ),
        Level.present,
        "block raw_data",
    ),
    "the JSON block broken": (
        lambda run: change_document(run, '"format": "recipe/1"', '"format": "recipe/1', forges=True),
        Level.well_formed,
        JSON,
    ),
    "a claim changed": (
        lambda run: change_block(run, set_at("claims", "evaluation", "correct_top1", value=432)),
        Level.resolvable,
        rf"{JSON}, claims\.evaluation\.correct_top1",
    ),
    "a claim removed": (
        lambda run: change_block(run, set_at("claims", "evaluation", value=None)),
        Level.resolvable,
        rf"{JSON}, claims\.evaluation",
    ),
    "the code of the claims changed": (
        lambda run: change_block(run, set_at("code", "source_sha256", value="0" * 64)),
        Level.resolvable,
        rf"{JSON}, code\.source_sha256",
    ),
    "the document's configuration changed": (
        lambda run: change_block(run, set_at("config", "optimization", "learning_rate", value=0.01)),
        Level.resolvable,
        rf"{JSON}$",
    ),
    "recipe.json changed": (
        lambda run: run.json_file.write_text(
            run.json_file.read_text().replace('"correct_top1": 431', '"correct_top1": 432')
        ),
        Level.resolvable,
        r"^recipe\.json",
    ),
    "config.yaml edited": (edit_config, Level.resolvable, r"^config\.yaml$"),
    "config.yaml that grows without end": (grow_without_end, Level.well_formed, r"^config\.yaml$"),
    "a count changed": (
        evaluation("correct_top1", value=430),
        Level.resolvable,
        r"records/evaluation\.json, correct_top1",
    ),
    "a class's count changed": (
        evaluation("per_class", 3, "correct_top1", value=35),
        Level.resolvable,
        r"records/evaluation\.json, correct_top1",
    ),
    "more right than images": (
        evaluation("per_class", 3, "correct_top5", value=41),
        Level.resolvable,
        r"per_class\.3\.correct_top5",
    ),
    "another number of images seen": (training("images_seen", value=9471), Level.resolvable, "images_seen"),
    "another number of parameters": (training("model", "parameters", value=1), Level.resolvable, "parameter_groups"),
    "a record removed": (
        lambda run: (run.records / "evaluation.json").unlink(),
        Level.resolvable,
        r"records/evaluation\.json",
    ),
    "a record cut off": (
        lambda run: (run.records / "serialization.json").write_text('{"format": "serialization/1",'),
        Level.well_formed,
        r"records/serialization\.json",
    ),
    "a number that is not finite": (
        lambda run: (run.records / "evaluation.json").write_text(
            (run.records / "evaluation.json").read_text().replace('"loss": 0.8312', '"loss": 1e999')
        ),
        Level.well_formed,
        r"records/evaluation\.json",
    ),
    "a training without steps": (
        training("schedule", "steps_per_epoch", value=0),
        Level.well_formed,
        r"records/training\.json",
    ),
    "a number that nothing counts to": (
        evaluation("images", value=10**60),
        Level.well_formed,
        r"records/evaluation\.json",
    ),
    "a field of the wrong type": (training("seed", value="0"), Level.well_formed, r"records/training\.json"),
    "a row of no numbers": (
        lambda run: run.metrics.write_text('{"split": "train", "epoch": "1", "step": 1, "loss": 1}\n'),
        Level.well_formed,
        r"metrics\.jsonl",
    ),
    "the mean of an epoch": (
        lambda run: change_record(run, "training.json", set_at("epochs", 2, "train_loss", value=0.5)),
        Level.resolvable,
        r"records/training\.json, epochs, 3",
    ),
    "a row of an epoch in the middle": (row_of_epoch_3, Level.resolvable, r"records/training\.json, epochs, 3"),
    "rows lost in the middle": (lost_rows(3, 5), Level.resolvable, r"metrics\.jsonl"),
    "one row lost": (lost_rows(1, 2), Level.resolvable, r"metrics\.jsonl"),
    "all rows lost": (lambda run: run.metrics.unlink(), Level.resolvable, r"metrics\.jsonl"),
    "the last row changed": (last_row, Level.resolvable, r"records/training\.json, epochs, 8"),
    "an evaluation of other weights": (
        evaluation("inputs", "weights", value="0" * 64),
        Level.resolvable,
        "section Training / Performance metrics",
    ),
    "a hash that is none": (evaluation("inputs", "weights", value="abc"), Level.well_formed, "evaluation"),
    "an edit during the stage": (
        training("provenance", "source_sha256_at_end", value="1" * 64),
        Level.resolvable,
        r"records/training\.json, provenance",
    ),
    "a patch that is gone": (
        training("provenance", "tree_at_start", value=MODIFIED),
        Level.resolvable,
        r"records/patches/5{16}\.patch",
    ),
    "an unknown key": (
        training("provenance", "command", value="python train.py optimization.epoch=9"),
        Level.resolvable,
        COMMAND,
    ),
    "a quote that is not closed": (
        training("provenance", "command", value="python train.py 'seed=1"),
        Level.resolvable,
        COMMAND,
    ),
    "another program": (training("provenance", "command", value="curl example.org"), Level.resolvable, COMMAND),
    "a second program": (
        training("provenance", "command", value='python train.py "run_dir=$(id)"'),
        Level.resolvable,
        COMMAND,
    ),
    "a figure removed": (
        lambda run: (run.figures / "loss.png").unlink(),
        Level.resolvable,
        r"recipe\.md, line \d+",
    ),
    "a figure that is none": (
        lambda run: (run.figures / "loss.png").write_text("<svg/>"),
        Level.well_formed,
        r"figures/loss\.png",
    ),
    "a bit of the predictions flipped": (
        lambda run: flip(run.directory / PREDICTIONS),
        Level.resolvable,
        r"predictions/.*\.npz",
    ),
    "an output outside of the recipe": (
        evaluation("outputs", value={"../../secret": "0" * 64}),
        Level.well_formed,
        r"records/evaluation\.json, outputs",
    ),
    "a bit of the exported model flipped": (
        lambda run: flip(run.onnx_file("fp32")),
        Level.executed,
        r"onnx/model-fp32\.onnx",
    ),
    "a bit of the weights flipped": (
        lambda run: flip(run.checkpoints / "step-00000296.safetensors"),
        Level.executed,
        r"checkpoints/step-00000296\.safetensors",
    ),
    "a bit of the checkpoint flipped": (
        lambda run: flip(run.checkpoints / "step-00000296.pt"),
        Level.executed,
        r"checkpoints/step-00000296\.pt",
    ),
    "other predictions with their hash": (replace_predictions, Level.executed, r"predictions/.*\.npz"),
    "a figure of another run": (
        lambda run: shutil.copy(run.figures / "accuracy.png", run.figures / "loss.png"),
        Level.executed,
        r"figures/loss\.png",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_at_its_level_and_place(run: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    damage, level, place = DAMAGE[name]
    if "figure" not in name:  # drawing takes longer than all else
        monkeypatch.setattr("recipe.review.check.files.figure_findings", lambda facts, run: [])
    damage(run)
    found = of_kind(findings(run, executes=level is Level.executed))
    hits = [one for one in found if one.level is level and re.search(place, one.place)]
    assert hits, found
    assert all(one.mend for one in hits), "every finding says how it is mended"


@pytest.mark.parametrize("name", [name for name, (_, level, _) in DAMAGE.items() if level is Level.executed])
def test_faults_of_content_need_execute(run: Run, name: str) -> None:
    DAMAGE[name][0](run)
    measured = [one for one in findings(run) if one.level is Level.executed]
    assert not measured


# Which code ran


def test_an_unknown_commit_is_not_a_failure(run: Run) -> None:
    """A shallow clone, or a squashed branch: the source hash identifies the code."""
    for name in ("preprocessing", "training", "evaluation", "serialization", "inference"):
        changes = {"commit": "1234567890" * 4, "source_sha256": "a" * 64, "source_sha256_at_end": "a" * 64}
        change_record(run, f"{name}.json", lambda values, changes=changes: values["provenance"].update(changes))
    found = [one for one in findings(run) if one.place.startswith("records/training.json, provenance")]
    assert [one.kind for one in found] == [Kind.cannot_tell]
    assert "123456789012" in found[0].what
    assert "aaaaaaaaaaaaaaaa" in found[0].what


def test_a_commit_with_other_source_is_found(run: Run) -> None:
    if commit() is None:
        pytest.skip("no git checkout")
    change_record(run, "training.json", set_at("provenance", "source_sha256", value="b" * 64))
    change_record(run, "training.json", set_at("provenance", "source_sha256_at_end", value="b" * 64))
    found = [one for one in findings(run) if one.place == "records/training.json, provenance"]
    assert [(one.kind, one.level) for one in found] == [(Kind.finding, Level.resolvable)]


def test_the_source_of_a_commit_is_hashed_as_the_working_tree_is(tmp_path: Path, monkeypatch: Any) -> None:
    """From git's objects alone: attributes of the commit leave nothing out, change no byte and start no program."""
    for name in (
        "recipe/__init__.py",
        "recipe/a.py",
        "recipe/b/c.py",
        "recipe/b-a.py",
        "conf/x/y.yaml",
        "train.py",
        "notes.txt",
        "t/x.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"content of {name}\n")
    (tmp_path / "recipe" / "run").mkdir()
    shutil.copy(CHECKOUT / "recipe" / "run" / "provenance.py", tmp_path / "recipe" / "run")
    (tmp_path / "recipe" / "a.py").write_text("commit = '$Format:%H$'\nname = '$Id$'\n")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", str(tmp_path)]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    attributes = "recipe/b/* export-ignore\n*.py export-subst ident text eol=crlf filter=evil\n"
    (tmp_path / ".gitattributes").write_text(attributes)
    ran = tmp_path.parent / f"{tmp_path.name}-ran"
    for words in (
        ["config", "filter.evil.smudge", f"touch '{ran}'; cat"],
        ["add", ".gitattributes"],
        ["commit", "-qm", "y"],
    ):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr("recipe.run.provenance.CHECKOUT", tmp_path)
    sources.source_sha256_at.cache_clear()
    head = commit()
    assert head is not None
    assert sources.source_sha256_at(head) == sources.source_sha256()
    assert not ran.exists()
    (tmp_path / "notes.txt").write_text("no source")
    assert sources.source_sha256_at(head) == sources.source_sha256()
    (tmp_path / "recipe" / "a.py").write_text("changed")
    assert sources.source_sha256_at(head) != sources.source_sha256()
    sources.source_sha256_at.cache_clear()


@pytest.mark.parametrize(
    "command",
    [
        "python preprocess.py experiment=demo 'data.raw_dir=\"$RAW_DIR\"'",
        'python preprocess.py data.raw_dir="$RAW_DIR"',
        "torchrun --nnodes=4 --nproc-per-node=8 train.py optimization.epochs=18 trainer.gpus=8",
        "python train.py -m seed=1,2,3 hydra/launcher=submitit_slurm",
        "python train.py ++model.name=resnet18 ~data.description.papers data=imagenet",
        "python -m recipe.stages.infer run_dir=runs/demo timing.seconds_per_cell=0.1",
        'python train.py experiment=demo run_dir="$RUN_DIR" reference="$REFERENCE"',
        'python -m recipe reproduce "$RECIPE" --run-dir "$RUN_DIR" --yes',
        "python -m recipe reproduce recipes/demo --stages train evaluate --yes",
    ],
)
def test_recorded_commands_give_no_finding(command: str) -> None:
    assert sources.command_faults(command, set(sources.schema_keys())) == []


# The command


def test_exit_codes_and_json(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(run.directory), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["format"] == "check/1"
    assert report["counts"]["finding"] == 0
    edit_config(run)
    assert main(["check", str(run.directory), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert {"level", "place", "what", "mend", "kind"} == set(report["findings"][0])
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(run.directory / "absent")])
    assert stopped.value.code == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["theirs.md", "theirs"])
def test_a_document_of_another_pipeline_is_refused_in_one_sentence(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("theirs").mkdir()
    for file in (Path("theirs.md"), Path("theirs", "README.md")):
        file.write_text("# ResNet-50\n\nTrained on ImageNet for 90 epochs.\n\n```json\n{}\n```\n")
    with pytest.raises(SystemExit) as stopped:
        main(["check", path])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} was not written by this pipeline")
    assert error.count("\n") == 1


def test_a_hostile_document_cannot_steer_the_terminal(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07\u202e"
    change_record(run, "training.json", set_at("provenance", "command", value=f"python train.py {evil}=1"))
    change_record(run, "evaluation.json", set_at("outputs", value={f"x/{evil}": "0" * 64}))
    run.document.write_text(run.document.read_text() + "\n[x](\x1b[2Jgone.md)\n")
    assert main(["check", str(run.directory)]) == 1
    printed = capsys.readouterr().out
    assert not set("\x1b\x07\u202e") & set(printed)
    assert "gone.md" in printed


def test_a_document_of_nothing_but_brackets_stops_with_a_sentence(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    run.json_file.write_text(deep)
    (run.records / "evaluation.json").write_text(deep)
    run.document.write_text(f"```json\n{deep}\n```\n" + run.document.read_text())
    assert main(["check", str(run.directory)]) == 1
    assert "Traceback" not in capsys.readouterr().err
