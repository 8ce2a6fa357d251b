"""The example notebook: run as a user would, with the names of the data set and its measurements in the recipe."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import nbformat
import numpy as np
import pytest

from recipe.config.schema import Config
from recipe.data.manifest import read_manifest
from recipe.data.shards import open_split
from recipe.inference.classifier import Classifier
from recipe.run.directory import Run
from recipe.run.files import CHECKOUT
from recipe.run.records import ClassifiedPicture, EvaluationRecord, InferenceRecord, SerializationRecord, TimingRecord
from recipe.stages.infer import NOTEBOOK, PARAMETERS, SAMPLES, Demonstration, sample_indices, with_words
from tests.builders.commands import run_python

pytestmark = pytest.mark.process

QUICK = ["timing.seconds_per_cell=0.04", "timing.batch_sizes=[1,2]", "timing.backends=[eager,onnxruntime]"]


def words_of(config: Config, run_dir: str | Path | None = None) -> list[str]:
    return [f"run_dir={run_dir or config.run_dir}", f"data.directory={config.data.directory}", *QUICK]


def run_notebook(words: list[str], cwd: Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(CHECKOUT))
        return run_python("-m", "recipe.stages.infer", *words, cwd=cwd)


@pytest.fixture(scope="session")
def executed(record: SerializationRecord, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run after the notebook's command, given in another folder than the checkout."""
    before = NOTEBOOK.read_bytes()
    done = run_notebook(words_of(config), tmp_path_factory.mktemp("elsewhere"))
    assert done.returncode == 0, done.stderr
    assert NOTEBOOK.read_bytes() == before, "the checkout's own file stays as it is"
    run = Run(config.run_dir)
    assert done.stdout.endswith(f"wrote {run.notebook} and {run.document}\n")
    return run


def inference_of(run: Run) -> InferenceRecord:
    record = run.read(InferenceRecord)
    assert record is not None
    return record


# ---- the committed file -----------------------------------------------------------------------------


def committed() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]


def test_the_notebook_is_committed_without_outputs() -> None:
    notebook = committed()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert [cell.id for cell in notebook.cells if PARAMETERS in cell.metadata.get("tags", [])] == ["words"]


def test_the_words_go_into_their_own_cell_only() -> None:
    before, after = committed(), with_words(committed(), ["run_dir=runs/it's", 'name="x"'])
    changed = [new for old, new in zip(before.cells, after.cells, strict=True) if old.source != new.source]
    assert [cell.id for cell in changed] == ["words"]
    found: dict[str, Any] = {}
    exec(changed[0].source, found)
    assert found["words"] == ["run_dir=runs/it's", 'name="x"']


# ---- run by `make inference` ------------------------------------------------------------------------


def test_running_it_leaves_its_pictures_in_the_run(executed: Run) -> None:
    notebook = json.loads(executed.notebook.read_text())
    pictures = [
        output
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 4, "the puppy, the bars, samples of the data set, the latencies"
    for name in inference_of(executed).outputs:
        assert (executed.directory / name).read_bytes().startswith(b"\x89PNG")


def test_no_text_of_it_names_this_machine(executed: Run, config: Config) -> None:
    for path in (executed.notebook, executed.records / "inference.json", *executed.timing.iterdir()):
        for forbidden in (str(CHECKOUT), sys.prefix, str(Path(config.run_dir).parent), str(Path.home()) + "/"):
            assert forbidden not in path.read_text(), path


def test_it_adds_itself_to_the_recipe(executed: Run) -> None:
    document = executed.document.read_text()
    chapter = document[document.index("## Inference") : document.index("### Serialization")]
    assert "Not measured yet" not in chapter
    assert "![puppy](figures/puppy.png)" in chapter
    for link in re.findall(r"\]\(([^)]+)\)", chapter):
        assert (executed.directory / link).is_file(), link
    record = inference_of(executed)
    assert record.provenance.command.startswith("python -m recipe.stages.infer run_dir=")
    assert document.count(record.provenance.command) >= 3, "run again, where it ran, its code"
    best = record.pictures[0].guesses["model-fp32.onnx"][0]
    assert f"{best.name} {100 * best.probability:.2f} %" in chapter


def test_every_file_of_the_model_is_asked_and_the_fp32_ones_agree(executed: Run) -> None:
    puppy = inference_of(executed).pictures[0]
    checkpoint, *exported = puppy.guesses
    assert (puppy.picture, puppy.label) == ("puppy.jpg", None)
    assert checkpoint.endswith(".pt")
    assert exported == ["model-fp32.onnx", "model-fp16.onnx", "model-int8.onnx"]
    ours, theirs = puppy.guesses[checkpoint], puppy.guesses["model-fp32.onnx"]
    assert [guess.index for guess in ours] == [guess.index for guess in theirs]
    assert [g.probability for g in ours] == pytest.approx([g.probability for g in theirs], abs=1e-4)


def test_the_second_run_measures_this_machine_again_and_keeps_the_others(executed: Run, config: Config) -> None:
    (mine,) = executed.read_all(executed.timing, TimingRecord)
    other = msgspec.structs.replace(mine, machine="nvidia-v100")
    executed.write_timing(other)
    try:
        shown = Demonstration(words_of(config))
        shown.measure_latency(CHECKOUT / "puppy.jpg")
        here, there = executed.read_all(executed.timing, TimingRecord)
        assert (here.machine, there) == (mine.machine, other)
        assert here.provenance.started >= mine.provenance.started
        assert here.cells != mine.cells
    finally:
        (executed.timing / "nvidia-v100.json").unlink()


# ---- names: an off-by-one cannot pass ---------------------------------------------------------------


def wrong_names(pictures: list[ClassifiedPicture], run: Run, config: Config) -> list[str]:
    """Guesses with another name than the predicted class of the evaluation."""
    evaluation = run.read(EvaluationRecord)
    assert evaluation is not None
    predictions = np.load(run.predictions / f"{evaluation.protocol.name}.npz")
    classes = read_manifest(config.data.directory).classes
    wrong = []
    for found in pictures:
        if found.label is not None:
            (row,) = np.flatnonzero(predictions["key"] == found.picture)
            if found.label != classes[int(predictions["label"][row])].name:
                wrong.append(f"{found.picture} is called {found.label}")
            checkpoint = next(iter(found.guesses.values()))
            expected = [(classes[k].id, classes[k].name) for k in predictions["top5"][row].tolist()]
            said = [(guess.class_id, guess.name) for guess in checkpoint]
            wrong += [f"{found.picture}: {a} for {b}" for a, b in zip(said, expected, strict=True) if a != b]
    return wrong


def test_the_notebooks_names_are_those_of_the_data_set(executed: Run, config: Config) -> None:
    pictures = inference_of(executed).pictures
    assert sum(found.label is not None for found in pictures) == SAMPLES
    assert wrong_names(pictures, executed, config) == []


def test_names_off_by_one_are_found(executed: Run, config: Config, tmp_path: Path) -> None:
    classify = Classifier.load(next(executed.checkpoints.glob("*.pt")))
    names = classify.interface.classes
    classify.interface = msgspec.structs.replace(classify.interface, classes=[*names[1:], names[0]])
    split = open_split(config.data.directory, "val")
    index = sample_indices(split.labels, len(names))[0]
    sabotaged = ClassifiedPicture(
        picture=split.key(index),
        sha256="",
        label=names[int(split.labels[index])].name,
        guesses={"step.pt": classify(split.read(index))},
    )
    assert len(wrong_names([sabotaged], executed, config)) >= 4, "of five; two equally likely classes may swap"


def test_samples_are_of_classes_that_are_spread_over_the_list() -> None:
    labels = np.repeat(np.arange(1000), 3)[::-1]
    chosen = sample_indices(labels, 1000)
    assert [int(labels[index]) for index in chosen] == [0, 143, 285, 428, 571, 714, 856, 999]
    assert sample_indices(np.array([0, 2, 2]), 3) == [0, 1], "a class without images is left out"


# ---- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run_dir=nowhere"], "is not a run: train it first"),
        (["--help"], "'--help' is not a setting"),
        (["run_dir=nowhere", "timing.sizes=[1]"], "timing.sizes"),
        (["timing.seconds_per_cell=-1"], "is not a run"),
    ],
)
def test_wrong_words_are_one_sentence(words: list[str], expected: str, tmp_path: Path) -> None:
    done = run_notebook(words, tmp_path)
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_key_of_the_run_cannot_be_changed(executed: Run, config: Config) -> None:
    done = run_notebook([*words_of(config), "seed=7"])
    assert (done.returncode, "seed: 0 -> 7" in done.stderr) == (2, True)


def test_files_of_other_weights_are_refused_from_within_the_notebook(
    executed: Run, config: Config, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(executed.directory, run.directory)
    before = run.document.read_bytes()
    stranger = run.onnx_file("fp32")
    told = read_properties(stranger)
    write_properties(stranger, told | {"weights_sha256": "0" * 64})
    done = run_notebook(words_of(config, run.directory))
    assert done.returncode == 2
    assert "model-fp32.onnx has other weights than those that were evaluated" in done.stderr.splitlines()[-1]
    assert run.document.read_bytes() == before


def read_properties(path: Path) -> dict[str, str]:
    import onnx

    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def write_properties(path: Path, properties: dict[str, str]) -> None:
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, properties)
    onnx.save(model, path)


def test_a_run_without_exported_files_is_shown_from_its_checkpoint(
    executed: Run, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(executed.directory, run.directory, ignore=shutil.ignore_patterns("*.onnx"))
    shown = Demonstration(words_of(config, run.directory))
    assert [Path(name).suffix for name in shown.classifiers] == [".pt"]
    assert "12 classes" in shown.about()
    timing = shown.measure_latency(CHECKOUT / "puppy.jpg")
    assert {missing.backend for missing in timing.absent} == {f"onnxruntime, {v}" for v in ("fp32", "fp16", "int8")}
    assert all("serialize.py" in missing.reason for missing in timing.absent)
