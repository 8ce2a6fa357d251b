"""The inference stage: `inference.ipynb` shows a run's model on pictures, from every file, and its latency.

`python -m recipe.stages.infer run_dir=runs/demo` executes the notebook without a browser. It reads the run's pinned
configuration and writes records and the document, as every stage does. The executed copy goes into the run.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from recipe.config.compose import stage_config_from_overrides
from recipe.config.schema import Config, Precision, Variant
from recipe.data.manifest import check_same_dataset, open_dataset
from recipe.data.shards import Split, open_split
from recipe.distributed import World, device_versions, hardware_of, start_world
from recipe.document.figures import Tile, guesses_png, latency_png, sheet_png, thumbnail_png
from recipe.document.render import check_document, write_document
from recipe.errors import DiskError, UserError
from recipe.inference.classifier import Classifier
from recipe.inference.export import load_evaluated
from recipe.inference.latency import measure_timing
from recipe.inference.onnx_file import OnnxModel
from recipe.inference.pictures import bytes_of, pixels_of
from recipe.run.directory import Run, append_to_journal
from recipe.run.environment import shown_argument
from recipe.run.files import CHECKOUT, display_path, portable_path, redact_paths, write_atomically
from recipe.run.provenance import Stage
from recipe.run.records import ClassifiedPicture, Guess, InferenceRecord, TimingRecord
from recipe.run.terminal import report_user_errors

NOTEBOOK = CHECKOUT / "inference.ipynb"
PARAMETERS = "parameters"  # tag of the cell that names the run
ANSI_COLORS = re.compile(r"\x1b\[[0-9;]*m")  # of a traceback
SAMPLES = 8  # validation images, each of another class
CLASSES_NAMED = 20


class Demonstration:
    """A run's evaluated checkpoint and its exported files. `words` are the arguments of `python evaluate.py`.

    Raises `UserError` if the run was not trained and evaluated.
    """

    def __init__(self, words: list[str]) -> None:
        self.config = stage_config_from_overrides(words, own_group="timing")
        self.command = " ".join(["python -m recipe.stages.infer", *(shown_argument(word) for word in words)])
        self.run = Run(self.config.run_dir)
        check_document(self.run)
        self.stage = Stage(self.run.directory, self.command)
        self.checkpoint = load_evaluated(self.run)
        self.world = world_of(self.config)
        self.classifiers = self._classifiers()
        self.classified: dict[str, ClassifiedPicture] = {}
        self.pictures: dict[str, bytes] = {}  # file name in figures/ -> PNG
        append_to_journal(self.run, "inference", "started", name=self.config.name)

    def _classifiers(self) -> dict[str, Classifier]:
        """File name -> classifier: of the checkpoint and of each exported file."""
        checkpoint = self.run.checkpoints / self.checkpoint.evaluation.protocol.checkpoint
        exported = [path for variant in Variant if (path := self.run.onnx_file(variant.value)).exists()]
        classifiers = {checkpoint.name: Classifier.load(checkpoint, device=self.world.device.type)}
        for path in exported:
            classifiers[path.name] = Classifier.load(path, device="cpu")
            model = classifiers[path.name].predict
            if isinstance(model, OnnxModel) and model.metadata.weights_sha256 != self.checkpoint.weights_sha256:
                raise UserError(
                    f"{path.name} has other weights than those that were evaluated: "
                    f"run `python serialize.py run_dir={shlex.quote(display_path(self.run.directory))}` again"
                )
        return classifiers

    def about(self) -> str:
        """The model, its accuracy, its files and its classes, in five lines."""
        evaluation, interface = self.checkpoint.evaluation, self.checkpoint.interface
        names = [entry.name for entry in interface.classes]
        some = ", ".join(names[:CLASSES_NAMED]) + (", ..." if len(names) > CLASSES_NAMED else "")
        device = hardware_of(self.world).accelerator or hardware_of(self.world).processor
        return "\n".join(
            [
                f"{self.config.name}: {self.config.model.name} trained on {self.config.data.name}, in "
                f"{display_path(self.run.directory)}",
                f"top-1 {evaluation.correct_top1 / evaluation.images:.2%} ({evaluation.correct_top1} of "
                f"{evaluation.images} validation images, {evaluation.protocol.name})",
                f"files: {', '.join(self.classifiers)}; computed on {device}",
                f"{len(names)} classes: {some}",
                "A picture of anything else is still put into one of them: the model has no class for 'none of these'.",
            ]
        )

    def classify(self, picture: Path, label: str | None = None) -> ClassifiedPicture:
        """The five best classes of a picture, from every file of the model."""
        content, _ = bytes_of(picture, self.config.data.max_pixels)
        return self._classify(picture.name, content, label, apply_orientation=True)

    def _classify(self, name: str, content: bytes, label: str | None, apply_orientation: bool) -> ClassifiedPicture:
        pixels = pixels_of(content, apply_orientation, self.config.data.max_pixels, name)
        guesses: dict[str, list[Guess]] = {file: classify(pixels) for file, classify in self.classifiers.items()}
        sha256 = hashlib.sha256(content).hexdigest()
        self.classified[name] = ClassifiedPicture(picture=name, sha256=sha256, label=label, guesses=guesses)
        return self.classified[name]

    def show(self, picture: ClassifiedPicture) -> bytes:
        """The best classes of a picture as a bar chart, PNG."""
        return guesses_png(picture)

    def show_picture(self, picture: Path) -> bytes:
        """The picture as a small PNG for the document. Its metadata, which may name a place, is left out."""
        pixels = pixels_of(picture, apply_orientation=True, max_pixels=self.config.data.max_pixels)
        self.pictures[f"{picture.stem}.png"] = thumbnail_png(pixels.numpy())
        return self.pictures[f"{picture.stem}.png"]

    def show_samples(self) -> bytes:
        """Validation images with their class and the model's first guess, as one PNG."""
        split, labels = self._validation_split(), self.checkpoint.interface.classes
        chosen = sample_indices(split.labels, len(labels))
        largest = self.config.data.max_pixels
        pixels = [pixels_of(split.read(index), False, largest, split.where(index)).numpy() for index in chosen]
        classified = [
            self._classify(split.key(index), split.read(index), labels[int(split.labels[index])].name, False)
            for index in chosen
        ]
        guesses = [next(iter(found.guesses.values()))[0] for found in classified]
        self.pictures["samples.png"] = sheet_png(
            [
                Tile(image, found.label or "?", f"→ {guess.name}, {guess.probability:.0%}", guess.name != found.label)
                for image, found, guess in zip(pixels, classified, guesses, strict=True)
            ]
        )
        return self.pictures["samples.png"]

    def _validation_split(self) -> Split:
        data = self.config.data
        _, manifest_hash = open_dataset(data)
        check_same_dataset(self.checkpoint.where, self.checkpoint.manifest_sha256, manifest_hash, data)
        return open_split(data.directory, "val")

    def measure_latency(self, picture: Path) -> TimingRecord:
        """Measure the latencies of this machine and write their record."""
        record = measure_timing(self.run, self.config, self.world, picture, self.command)
        self.run.write_timing(record)
        return record

    def show_latency(self, record: TimingRecord) -> bytes:
        return latency_png(record)

    def write(self) -> Path:
        """Write the record of the classified pictures, their figures and the document."""
        outputs = {f"figures/{name}": hashlib.sha256(content).hexdigest() for name, content in self.pictures.items()}
        for name, content in self.pictures.items():
            write_atomically(self.run.figures / name, content)
        interface = self.checkpoint.interface
        self.run.write(
            InferenceRecord(
                config_sha256=self.checkpoint.training.config_sha256,
                provenance=self.stage.finish(hardware_of(self.world), device_versions(self.world)),
                inputs={"weights": self.checkpoint.weights_sha256, "manifest": self.checkpoint.manifest_sha256},
                outputs=outputs,
                class_count=len(interface.classes),
                label_convention=interface.label_convention,
                pictures=list(self.classified.values()),
            )
        )
        append_to_journal(self.run, "inference", "ended")
        write_document(self.run, portable_path(self.config.run_dir))
        return self.run.document


def world_of(config: Config) -> World:
    """One process in fp32, on a GPU if there is one, also one without the precision of the training."""
    with start_world(replace(config.trainer, gpus=None, precision=Precision.fp32)) as world:
        return world


def sample_indices(labels: np.ndarray, class_count: int) -> list[int]:
    """The first image of each of eight classes, spread over the list of classes."""
    chosen = np.unique(np.linspace(0, class_count - 1, min(SAMPLES, class_count)).round().astype(int))
    return [int(np.flatnonzero(labels == label)[0]) for label in chosen if (labels == label).any()]


# ---- the notebook without a browser -------------------------------------------------------------------


def main(words: list[str]) -> None:
    """Execute the notebook on the run that `words` name."""
    import nbformat

    with report_user_errors():
        run = Run(stage_config_from_overrides(words, own_group="timing").run_dir)
        check_document(run)
        notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
        print(f"executing {NOTEBOOK.name} on {display_path(run.directory)}", file=sys.stderr, flush=True)
        executed = execute(with_words(notebook, words))
        write_atomically(run.notebook, nbformat.writes(executed).encode())  # type: ignore[no-untyped-call]
        print(f"wrote {display_path(run.notebook)} and {display_path(run.document)}")


def with_words(notebook: Any, words: list[str]) -> Any:
    cells = [cell for cell in notebook.cells if PARAMETERS in cell.metadata.get("tags", [])]
    assert len(cells) == 1, f"{NOTEBOOK.name} has {len(cells)} cells with the tag {PARAMETERS}"
    cells[0].source = f"words = {words!r}"
    return notebook


def execute(notebook: Any) -> Any:
    """Run all cells in a kernel of this environment, and print their text while they run.

    Raises `UserError` with the message of a cell that failed.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from traitlets.config import Config as KernelConfig

    class PrintingClient(NotebookClient):
        def output(self, outs: list[Any], msg: dict[str, Any], display_id: str | None, cell_index: int) -> Any:
            if msg["msg_type"] == "stream":
                print(msg["content"]["text"], end="", file=sys.stderr, flush=True)
            return super().output(outs, msg, display_id, cell_index)

    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # else a kernel of the same name in the home directory goes first
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # else the kernel's debugger warns
    settings = KernelConfig({"KernelManager": {"transport": "ipc"}})  # no port that others could connect to
    with TemporaryDirectory() as sockets:
        os.environ["JUPYTER_RUNTIME_DIR"] = sockets
        client = PrintingClient(notebook, timeout=None, kernel_name="python3", record_timing=False, config=settings)
        try:
            return without_places(client.execute())
        except CellExecutionError as error:
            if error.ename in (UserError.__name__, DiskError.__name__):
                raise (DiskError if error.ename == DiskError.__name__ else UserError)(error.evalue) from None
            print(ANSI_COLORS.sub("", str(error)), file=sys.stderr)
            raise UserError(f"a cell of {NOTEBOOK.name} failed: {error.ename}: {error.evalue}") from None


def without_places(notebook: Any) -> Any:
    for cell in notebook.cells:
        if PARAMETERS in cell.metadata.get("tags", []):
            cell.source = redact_paths(cell.source)
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = redact_paths(output.text)
            if "text/plain" in output.get("data", {}):
                output.data["text/plain"] = redact_paths(output.data["text/plain"])
    return notebook


if __name__ == "__main__":
    main(sys.argv[1:])
