"""Level *executed*: the files that stages left in a run, with hashes, counts and figures computed again."""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recipe.config.schema import config_from_pinned
from recipe.document.run_data import RunData
from recipe.errors import UserError
from recipe.review.check.pairs import view_of
from recipe.review.findings import Finding, Kind, Level, first_few, shorten
from recipe.run.directory import Run
from recipe.run.files import RECORD_BYTES_MAX, WEIGHTS_BYTES_MAX, is_inside, opened
from recipe.run.records import EvaluationRecord

RESTORE = "take the file from version control, or run its stage again"
AGAIN = "take the file from where the run was made, or run its stage again"
CLASSES_MAX = 100_000  # of a network that is built again
ARRAYS = ("key", "label", "top5")
ARRAY_KINDS = {("U", label, top) for label in "iu" for top in "iu"}


def path_inside(folder: Path, name: str) -> Path | None:
    """The file of this name. None if it is outside the folder: a record may come from anybody."""
    path = folder / name
    return path if not os.path.isabs(name) and is_inside(path, folder) else None


def file_fault(path: Path, hashes: Container[str], where: str) -> str | None:
    """A fault if the SHA-256 of a file is not one of `hashes` (recorded `where`), else None."""
    try:
        with opened(path, "it", WEIGHTS_BYTES_MAX) as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
    except UserError as error:
        return str(error)
    return None if digest in hashes else f"its SHA-256 is not the one {where}"


@dataclass(frozen=True)
class CountedPredictions:
    """A file of predictions and the counts that a record claims for it."""

    record: str
    metric: str  # the evaluation's protocol, or the exported variant
    file: str
    images: int
    correct_top1: int
    correct_top5: int
    evaluation: EvaluationRecord | None = None  # None: of an exported file

    def faults(self, path: Path) -> list[str]:
        """The counts that differ in the file. Raises `UserError` for an unreadable file."""
        key, label, top = read_predictions(path)
        is_top1, is_top5 = ((top[:, :within] == label[:, None]).any(axis=1) for within in (1, 5))
        faults = ["it has an image twice"] if len(np.unique(key)) != len(key) else []
        for name, count, claimed in (
            ("images", len(label), self.images),
            ("correct_top1", int(is_top1.sum()), self.correct_top1),
            ("correct_top5", int(is_top5.sum()), self.correct_top5),
        ):
            if count != claimed:
                faults.append(f"{name} is {count:,}, records/{self.record}.json has {claimed:,}")
        for row in self.evaluation.per_class if self.evaluation else ():
            of_class = label == row.index
            counts = (int(of_class.sum()), int((of_class & is_top1).sum()), int((of_class & is_top5).sum()))
            if counts != (row.images, row.correct_top1, row.correct_top5):
                faults.append(f"class {row.index} has {counts}, records/{self.record}.json has other counts")
        return faults + (mistake_faults(self.evaluation, key, label, top[:, 0]) if self.evaluation else [])


def mistake_faults(
    record: EvaluationRecord, key: NDArray[Any], label: NDArray[np.int64], best: NDArray[np.int64]
) -> list[str]:
    """Confused pairs and mistakes of a record that are not in the predictions. Two classes may have one name."""
    names = {row.index: row.name for row in record.per_class}
    counts = Counter(zip(label[label != best].tolist(), best[label != best].tolist(), strict=True))
    pairs = {(names.get(one), names.get(other), count) for (one, other), count in counts.items()}
    rows = zip(key.tolist(), label.tolist(), best.tolist(), strict=True)
    shown = {one.key for one in record.mistakes}
    taken = {name: (names.get(one), names.get(other)) for name, one, other in rows if name in shown}
    faults = [
        f"{shorten(pair.label)} taken for {shorten(pair.predicted)} is not there {pair.images} times"
        for pair in record.confused_pairs
        if (pair.label, pair.predicted, pair.images) not in pairs
    ]
    return faults + [
        f"{shorten(one.key)} is another mistake"
        for one in record.mistakes
        if taken.get(one.key) != (one.label, one.predicted)
    ]


def counted_predictions(facts: RunData) -> Iterator[CountedPredictions]:
    for record in (facts.evaluation, *facts.other_evaluations):
        for file in record.outputs if record is not None else ():
            if record is not None and file.endswith(".npz"):
                protocol = record.protocol.name
                name = "evaluation" if record is facts.evaluation else f"evaluations/{protocol}"
                counts = (record.images, record.correct_top1, record.correct_top5)
                yield CountedPredictions(name, protocol, file, *counts, record)
    exported = facts.serialization
    for entry in exported.variants if exported is not None else ():
        for file in exported.outputs if exported is not None else ():
            if exported is not None and file.endswith(f"-onnx-{entry.variant}.npz"):
                counts = (exported.images, entry.correct_top1, entry.correct_top5)
                yield CountedPredictions("serialization", entry.variant, file, *counts)


def read_predictions(path: Path) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """Keys [images], labels [images] and best classes [images, k]. Raises `UserError`."""
    try:
        with opened(path, "it", RECORD_BYTES_MAX) as handle, zipfile.ZipFile(handle) as archive:
            key, label, top = (_read_array(archive, f"{name}.npy") for name in ARRAYS)
    except UserError:
        raise
    except Exception as error:  # zip, zlib and numpy raise about anything for damaged bytes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"it is not a file of predictions: {reason}") from error
    fits = label.ndim == 1 and top.ndim == 2 and top.shape[1] >= 1 and key.shape == label.shape == top.shape[:1]
    if not fits or (key.dtype.kind, label.dtype.kind, top.dtype.kind) not in ARRAY_KINDS:
        raise UserError("its arrays are not those of predictions")
    return key, label, top


def _read_array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """An array of the archive. Its size is compared with that of the entry before memory is taken."""
    size = archive.getinfo(name).file_size
    if size > RECORD_BYTES_MAX:
        raise UserError(f"{name} unpacks to {size:,} bytes; at most {RECORD_BYTES_MAX:,} are read")
    with archive.open(name) as entry:
        version = np.lib.format.read_magic(entry)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read_header(entry)
    if math.prod(shape) * kind.itemsize > size:
        raise UserError(f"{name} claims the shape {shape} of {kind.name[:50]}, but has {size:,} bytes")
    with archive.open(name) as entry:
        return np.lib.format.read_array(entry, allow_pickle=False)


def executed_findings(facts: RunData, run: Run) -> list[Finding]:
    """All findings that are cheap to measure again."""
    return [
        *output_findings(facts, run, Level.executed),
        *checkpoint_findings(run),
        *weights_findings(facts, run),
        *prediction_findings(facts, run),
        *figure_findings(facts, run),
        *built_findings(facts),
    ]


def built_findings(facts: RunData) -> Iterator[Finding]:
    """The network and the pixels of both transforms, made again from the configuration.

    Another torch or other instructions of the processor may round, draw or resize in another way.
    """
    import torch

    from recipe.data.augment.crop import build_augmentation
    from recipe.data.transforms import build_evaluation_transform
    from recipe.models.build import build_model, model_facts

    training, evaluation, place = facts.training, facts.evaluation, "records/training.json, model"
    if training is None or facts.config is None:
        return
    context = training.determinism_context
    here = {"torch": str(torch.__version__), "its instructions": torch.backends.cpu.get_cpu_capability()}
    other = [name for name, value in here.items() if context.get(name) != value]
    if other:
        what = f"built elsewhere, and not built again: {first_few([f'{name} {context.get(name)}' for name in other])}"
        yield Finding(Level.executed, place, what, kind=Kind.cannot_tell)
        return
    try:
        config = config_from_pinned(facts.config)
        network, classes = config.model, min(training.model.classes, CLASSES_MAX)
        model = build_model(network, classes, config.seed, config.optimization.bce.init_head_bias)
    except UserError as error:
        yield Finding(Level.executed, place, f"it cannot be built again: {error}", kind=Kind.cannot_tell)
        return
    built = model_facts(model, network, classes)
    is_given = network.weights_sha256 is not None
    of_start = ("initial_weights", "initial_weights_sha256", "zero_initialised_norms", "alterations")
    pairs = [
        (f"{place}.{name}", getattr(training.model, name), getattr(built, name))
        for name in built.__struct_fields__
        if not (is_given and name in of_start)
    ]
    pixels = build_augmentation(config.augmentation, config.seed).fingerprint()
    pairs.append(("records/training.json, augmentation_sha256", training.augmentation_sha256, pixels))
    if evaluation is not None and evaluation.protocol.name.startswith(view_of(config)):
        view = build_evaluation_transform(config.evaluation).fingerprint()
        pairs.append(("records/evaluation.json, transform_sha256", evaluation.protocol.transform_sha256, view))
    for where, value, expected in pairs:
        if value != expected:
            what = f"it is {shorten(value)}, built again {shorten(expected)}"
            yield Finding(Level.executed, where, what, AGAIN)


def absent_files(place: str, names: list[str]) -> list[Finding]:
    if not names:
        return []
    what = f"not in this folder, and not checked: {first_few(sorted(set(names)))}"
    return [Finding(Level.resolvable, place, what, kind=Kind.cannot_tell)]


def output_findings(facts: RunData, run: Run, level: Level) -> list[Finding]:
    """Recorded files with another SHA-256. Exported models are large: at the level *executed* only."""
    findings, absent = [], []
    for record, name, digest in recorded_outputs(facts):
        if name.startswith("onnx/") != (level is Level.executed):
            continue
        path = path_inside(run.directory, name)
        if path is None:
            what = f"it names {shorten(name)}, which is not a file of the recipe"
            findings.append(Finding(Level.well_formed, f"records/{record}, outputs", what, RESTORE))
        elif not os.path.exists(path):
            absent.append(name)
        elif fault := file_fault(path, {digest}, f"in records/{record}"):
            findings.append(Finding(level, name, fault, RESTORE))
    return findings + absent_files("recorded outputs", absent)


def recorded_outputs(facts: RunData) -> Iterator[tuple[str, str, str]]:
    """(record, file, SHA-256) of every output that is a file of the recipe."""
    for name, record in facts.stages():
        for file, digest in getattr(record, "outputs", {}).items():
            if "/" in file:
                yield f"{name}.json", file, digest


def checkpoint_findings(run: Run) -> Iterator[Finding]:
    """Checkpoints with another SHA-256 than the one written beside them."""
    for path in sorted(run.checkpoints.glob("step-????????.pt")):
        beside = path.with_name(f"{path.name}.sha256")
        try:
            known = run.content(beside).decode("ascii", "replace").split() if beside.exists() else []
            fault = file_fault(path, known, "written beside it")
        except UserError as error:
            fault = str(error)
        if fault is not None:
            yield Finding(Level.executed, f"checkpoints/{path.name}", fault, AGAIN)


def weights_findings(facts: RunData, run: Run) -> Iterator[Finding]:
    """Released weights that are not those that training ended with."""
    from recipe.models.build import weights_sha256  # loads torch
    from recipe.models.pretrained import read_weights

    files = sorted(run.checkpoints.glob("step-????????.safetensors"))
    if facts.training is None:
        return
    if not files:
        what = "no released weights in this folder: their hash was not computed again"
        yield Finding(Level.executed, "checkpoints", what, kind=Kind.cannot_tell)
        return
    path, recorded = files[-1], facts.training.outputs.get("weights")
    try:
        run.check_readable(path, WEIGHTS_BYTES_MAX)
        digest = weights_sha256(read_weights(path, "file").tensors)
    except UserError as error:
        yield Finding(Level.executed, f"checkpoints/{path.name}", str(error), AGAIN)
        return
    if digest != recorded:
        what = f"its weights have the hash {digest[:16]}, training recorded {str(recorded)[:16]}"
        yield Finding(Level.executed, f"checkpoints/{path.name}", what, AGAIN)


def prediction_findings(facts: RunData, run: Run) -> Iterator[Finding]:
    """Counts of records that differ from those of the predictions file."""
    absent = []
    for counted in counted_predictions(facts):
        path = path_inside(run.directory, counted.file)
        if path is None or not path.is_file():
            absent.append(counted.file)
            continue
        try:
            faults = counted.faults(path)
            what = f"counted again, {first_few(faults)}" if faults else ""
        except UserError as error:
            what = str(error)
        if what:
            yield Finding(Level.executed, counted.file, what, AGAIN)
    if absent:
        what = f"not in this folder, and not counted again: {first_few(absent)}"
        yield Finding(Level.executed, "predictions", what, kind=Kind.cannot_tell)


def figure_findings(facts: RunData, run: Run) -> list[Finding]:
    """Figures that differ if drawn again from the records."""
    from recipe.document import figures

    drawn = figures.draw(facts)
    there = [name for name in drawn if os.path.lexists(run.figures / name)]
    changed = []
    for name in there:
        try:
            is_equal = run.content(run.figures / name) == drawn[name]
        except UserError:
            is_equal = False
        if not is_equal:
            changed.append(name)
    if changed and len(changed) == len(there):
        what = "drawn again, every figure has other bytes: another version of matplotlib, or other records"
        return [Finding(Level.executed, "figures", what, kind=Kind.cannot_tell)]
    what = "it is not what the records give, drawn again"
    return [Finding(Level.executed, f"figures/{name}", what, AGAIN) for name in changed]
