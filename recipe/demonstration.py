"""What `inference.ipynb` shows of a run: its model on pictures, from every file, and how long that takes.

The notebook is a stage like the others: it reads the run's pinned configuration, leaves records, and has the document
written. What it shows is what it recorded.
"""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np

from recipe.config.compose import stage_config_from_overrides
from recipe.config.schema import Config, Precision, Variant
from recipe.data.adoption import adopt_data_set, require_same_data_set
from recipe.data.shards import Split, open_split
from recipe.distributed import World, device_versions, hardware, start_world
from recipe.document.inference_figures import guesses_png, latency_png, sheet_png, thumbnail_png
from recipe.document.render import check_document, write_document
from recipe.errors import UserError
from recipe.inference.classifier import Classifier
from recipe.inference.evaluated import load_evaluated
from recipe.inference.onnx_file import OnnxModel
from recipe.inference.pictures import bytes_of, pixels_of
from recipe.inference.timing import measure_timing
from recipe.provenance import Stage, shown_argument
from recipe.records import ClassifiedPicture, Guess, InferenceRecord, TimingRecord
from recipe.run import Run, append_to_journal, recorded_path, shown_path, write_atomically

SAMPLES = 8  # of the validation set, each of another class
CLASSES_NAMED = 20
CHECKPOINT = "checkpoint"


class Demonstration:
    """A run's evaluated model, ready to be shown; `words` are what one would write behind `python evaluate.py`.

    Raises `UserError` where the run was not trained and evaluated; exported files are shown as far as there are any.
    """

    def __init__(self, words: list[str]) -> None:
        self.config = stage_config_from_overrides(words, own_group="timing")
        self.command = " ".join(["python -m recipe.notebook", *(shown_argument(word) for word in words)])
        self.run = Run(self.config.run_dir)
        check_document(self.run)
        self.stage = Stage(self.run.directory, self.command)
        self.subject = load_evaluated(self.run)
        self.world = world_of(self.config)
        self.classifiers = self._classifiers()
        self.classified: dict[str, ClassifiedPicture] = {}
        self.pictures: dict[str, bytes] = {}  # file name in figures/ -> PNG
        append_to_journal(self.run, "inference", "started", name=self.config.name)

    def _classifiers(self) -> dict[str, Classifier]:
        """From the checkpoint, and from each exported file that belongs to it."""
        checkpoint = self.run.checkpoints / self.subject.evaluation.protocol.checkpoint
        files = {CHECKPOINT: checkpoint} | {v.value: self.run.onnx_file(v.value) for v in Variant}
        found = {
            path.name: Classifier.load(path, device=self.world.device.type if name == CHECKPOINT else "cpu")
            for name, path in files.items()
            if path.exists()
        }
        for name, classifier in found.items():
            model = classifier.predict
            if isinstance(model, OnnxModel) and model.metadata.weights_sha256 != self.subject.weights_sha256:
                raise UserError(
                    f"{name} holds other weights than those that were evaluated: "
                    f"run `python serialize.py run_dir={shlex.quote(shown_path(self.run.directory))}` again"
                )
        return found

    def about(self) -> str:
        """Which model this is, how good it is, and what it can tell apart."""
        evaluation, interface = self.subject.evaluation, self.subject.interface
        names = [entry.name for entry in interface.classes]
        shown = ", ".join(names[:CLASSES_NAMED]) + (", ..." if len(names) > CLASSES_NAMED else "")
        device = hardware(self.world).accelerator or hardware(self.world).processor
        return "\n".join(
            [
                f"{self.config.name}: {self.config.model.name} trained on {self.config.data.name}, in "
                f"{shown_path(self.run.directory)}",
                f"top-1 {evaluation.correct_top1 / evaluation.images:.2%} ({evaluation.correct_top1} of "
                f"{evaluation.images} validation images, {evaluation.protocol.name})",
                f"files: {', '.join(self.classifiers)}; computed on {device}",
                f"{len(names)} classes: {shown}",
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
        found = ClassifiedPicture(
            picture=name, sha256=hashlib.sha256(content).hexdigest(), label=label, guesses=guesses
        )
        self.classified[name] = found
        return found

    def show(self, found: ClassifiedPicture) -> bytes:
        """A classified picture's guesses as a bar chart, PNG."""
        return guesses_png(found)

    def show_picture(self, picture: Path) -> bytes:
        """The picture as a small PNG without its metadata, which may name a place; the document shows it too."""
        pixels = pixels_of(picture, apply_orientation=True, max_pixels=self.config.data.max_pixels)
        self.pictures[f"{picture.stem}.png"] = thumbnail_png(pixels.numpy())
        return self.pictures[f"{picture.stem}.png"]

    def show_samples(self) -> bytes:
        """Validation images with their classes and what the model makes of them, as one sheet, PNG."""
        split, labels = self._validation_split(), self.subject.interface.classes
        chosen = sample_indices(split.labels, len(labels))
        largest = self.config.data.max_pixels
        pixels = [pixels_of(split.read(index), False, largest, split.where(index)).numpy() for index in chosen]
        found = [
            self._classify(split.key(index), split.read(index), labels[int(split.labels[index])].name, False)
            for index in chosen
        ]
        self.pictures["samples.png"] = sheet_png(found, pixels)
        return self.pictures["samples.png"]

    def _validation_split(self) -> Split:
        """The data set on which the model was evaluated."""
        data = self.config.data
        _, manifest_hash = adopt_data_set(data)
        require_same_data_set(self.subject.where, self.subject.manifest_sha256, manifest_hash, data)
        return open_split(data.directory, "val")

    def measure_latency(self, picture: Path) -> TimingRecord:
        """The table of this machine, measured now and kept in the run."""
        record = measure_timing(self.run, self.config, self.world, picture, self.command)
        self.run.write_timing(record)
        return record

    def show_latency(self, record: TimingRecord) -> bytes:
        """The distribution of the latencies, PNG."""
        return latency_png(record)

    def write(self) -> Path:
        """Leave what was classified in the run's records, and write its document anew."""
        outputs = {f"figures/{name}": hashlib.sha256(content).hexdigest() for name, content in self.pictures.items()}
        for name, content in self.pictures.items():
            write_atomically(self.run.figures / name, content)
        interface = self.subject.interface
        self.run.write(
            InferenceRecord(
                config_sha256=self.subject.training.config_sha256,
                provenance=self.stage.finish(hardware(self.world), device_versions(self.world)),
                inputs={"weights": self.subject.weights_sha256, "manifest": self.subject.manifest_sha256},
                outputs=outputs,
                class_count=len(interface.classes),
                label_convention=interface.label_convention,
                pictures=list(self.classified.values()),
            )
        )
        append_to_journal(self.run, "inference", "ended")
        write_document(self.run, recorded_path(self.config.run_dir))
        return self.run.document


def world_of(config: Config) -> World:
    """This process alone, on a GPU if there is one; fp32, so that a GPU without the training's precision serves too."""
    with start_world(replace(config.trainer, gpus=None, precision=Precision.fp32)) as world:
        return world


def sample_indices(labels: np.ndarray, class_count: int) -> list[int]:
    """The first image of each of eight classes that are spread over the list."""
    chosen = np.unique(np.linspace(0, class_count - 1, min(SAMPLES, class_count)).round().astype(int))
    return [int(np.flatnonzero(labels == label)[0]) for label in chosen if (labels == label).any()]
