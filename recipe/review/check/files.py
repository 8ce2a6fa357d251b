"""Level *executed*: what can be measured again without torch: hashes, counts from predictions, figures."""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recipe.config.identity import canonical_json
from recipe.document.facts import Facts
from recipe.errors import UserError
from recipe.files import RECORD_BYTES_MAX, WEIGHTS_BYTES_MAX, opened, read_file
from recipe.records import ClassCounts
from recipe.review.check.document import difference_of, inside, output_findings
from recipe.review.findings import Finding, Kind, Level, listed
from recipe.run import Run

ARRAYS = ("key", "label", "top5")
PREDICTED_KINDS = {("U", label, top) for label in "iu" for top in "iu"}
AGAIN = "take the file from where the run was made, or run its stage again"


def executed_findings(facts: Facts, run: Run) -> list[Finding]:
    """Everything that is cheap to measure again."""
    return [
        *output_findings(facts, run, Level.executed),
        *checkpoint_findings(run),
        *weights_findings(facts, run),
        *prediction_findings(facts, run),
        *figure_findings(facts, run),
    ]


def checkpoint_findings(run: Run) -> list[Finding]:
    """Each checkpoint has the SHA-256 that was written beside it."""
    found = []
    for path in sorted(run.checkpoints.glob("step-????????.pt")):
        what = checkpoint_fault(run, path)
        if what is not None:
            found.append(Finding(Level.executed, f"checkpoints/{path.name}", what, AGAIN))
    return found


def checkpoint_fault(run: Run, path: Path) -> str | None:
    beside = path.with_name(f"{path.name}.sha256")
    try:
        known = run.content(beside).decode("ascii", "replace").split() if beside.exists() else []
    except UserError as error:
        return str(error)
    return difference_of(path, known, "written beside it")


def weights_findings(facts: Facts, run: Run) -> list[Finding]:
    """The released weights are those that training ended with."""
    if facts.training is None:
        return []
    files = sorted(run.checkpoints.glob("step-????????.safetensors"))
    if not files:
        what = "no released weights in this folder: their hash was not computed again"
        return [Finding(Level.executed, "checkpoints", what, kind=Kind.cannot_tell)]
    recorded = facts.training.outputs.get("weights")
    place = f"checkpoints/{files[-1].name}"
    try:
        computed = weights_sha256(files[-1])
    except UserError as error:
        return [Finding(Level.executed, place, str(error), AGAIN)]
    if computed == recorded:
        return []
    what = f"its weights have the hash {computed[:16]}, training recorded {str(recorded)[:16]}"
    return [Finding(Level.executed, place, what, AGAIN)]


def weights_sha256(path: Path) -> str:
    """What `recipe.model.weights_sha256` gives, from a file of safetensors and without torch."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(read_file(path, "it", WEIGHTS_BYTES_MAX))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"it is no file of weights: {error}") from error
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(canonical_json([name, f"torch.{tensor.dtype.name}", list(tensor.shape)]))
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()


def prediction_findings(facts: Facts, run: Run) -> list[Finding]:
    """Counted again from the predictions of every image, each record's counts are what it says."""
    found, absent = [], []
    for record, file, images, counts, per_class in counted(facts):
        path = inside(run.directory, file)
        if path is None or not path.is_file():
            absent.append(file)
            continue
        try:
            found += recounted(record, file, read_predictions(path), images, counts, per_class)
        except UserError as error:
            found.append(Finding(Level.executed, file, str(error), AGAIN))
    if absent:
        what = f"not in this folder, so that nothing was counted again: {listed(absent)}"
        found.append(Finding(Level.executed, "predictions", what, kind=Kind.cannot_tell))
    return found


Counted = tuple[str, str, int, tuple[int, int], list[ClassCounts]]


def counted(facts: Facts) -> Iterator[Counted]:
    """(record, predictions file, images, correct within 1 and 5, classes) of everything that was counted."""
    for record in (facts.evaluation, *facts.other_evaluations):
        for file in record.outputs if record is not None else ():
            if record is not None and file.endswith(".npz"):
                name = "evaluation" if record is facts.evaluation else f"evaluations/{record.protocol.name}"
                yield name, file, record.images, (record.correct_top1, record.correct_top5), record.per_class
    exported = facts.serialization
    for entry in exported.variants if exported is not None else ():
        for file in exported.outputs if exported is not None else ():
            if exported is not None and file.endswith(f"-onnx-{entry.variant}.npz"):
                yield "serialization", file, exported.images, (entry.correct_top1, entry.correct_top5), []


def read_predictions(path: Path) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """(keys, labels, best classes); raises `UserError` for what is no predictions file. Nothing is unpickled."""
    try:
        with opened(path, "it", RECORD_BYTES_MAX) as handle, zipfile.ZipFile(handle) as archive:
            key, label, top = (read_array(archive, f"{name}.npy") for name in ARRAYS)
    except UserError:
        raise
    except Exception as error:  # zip, zlib and numpy raise about anything for damaged bytes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"it is not a file of predictions: {reason}") from error
    is_whole = label.ndim == 1 and top.ndim == 2 and top.shape[1] >= 1 and key.shape == label.shape == top.shape[:1]
    if not is_whole or (key.dtype.kind, label.dtype.kind, top.dtype.kind) not in PREDICTED_KINDS:
        raise UserError("its arrays are not those of predictions")
    return key, label, top


def read_array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """An array that is as large as its entry, which is looked at before memory is taken."""
    size = archive.getinfo(name).file_size
    if size > RECORD_BYTES_MAX:
        raise UserError(f"{name} unpacks to {size:,} bytes; at most {RECORD_BYTES_MAX:,} are read")
    with archive.open(name) as entry:
        version = np.lib.format.read_magic(entry)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read_header(entry)
    if math.prod(shape) * kind.itemsize > size:
        raise UserError(f"{name} claims the shape {shape} of {kind.name[:50]}, which its {size:,} bytes do not hold")
    with archive.open(name) as entry:
        return np.lib.format.read_array(entry, allow_pickle=False)


def recounted(
    record: str,
    file: str,
    predictions: tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]],
    images: int,
    counts: tuple[int, int],
    per_class: list[ClassCounts],
) -> list[Finding]:
    key, label, top = predictions
    hits = [(top[:, :within] == label[:, None]).any(axis=1) for within in (1, 5)]
    wrong = []
    if len(np.unique(key)) != len(key):
        wrong.append("it holds an image twice")
    for name, computed, recorded in (
        ("images", len(label), images),
        ("correct_top1", int(hits[0].sum()), counts[0]),
        ("correct_top5", int(hits[1].sum()), counts[1]),
    ):
        if computed != recorded:
            wrong.append(f"{name} is {computed:,}, records/{record}.json has {recorded:,}")
    for row in per_class:
        mine = label == row.index
        again = (int(mine.sum()), int((mine & hits[0]).sum()), int((mine & hits[1]).sum()))
        if again != (row.images, row.correct_top1, row.correct_top5):
            wrong.append(f"class {row.index} has {again}, records/{record}.json says otherwise")
    return [Finding(Level.executed, file, f"counted again, {listed(wrong)}", AGAIN)] if wrong else []


def is_file_of(run: Run, path: Path, content: bytes) -> bool:
    try:
        return run.content(path) == content
    except UserError:
        return False


def figure_findings(facts: Facts, run: Run) -> list[Finding]:
    """Drawn again from the records, the figures are the same; another matplotlib draws all of them otherwise."""
    from recipe.document import figures, inference_figures

    drawn = figures.draw(facts.training, facts.metrics)
    drawn |= inference_figures.draw_inference(facts.inference, facts.timing)
    there = [name for name in drawn if os.path.lexists(run.figures / name)]
    wrong = [name for name in there if not is_file_of(run, run.figures / name, drawn[name])]
    if not wrong:
        return []
    if len(wrong) == len(there):
        what = "drawn again, every figure has other bytes: another version of matplotlib, or other records"
        return [Finding(Level.executed, "figures", what, kind=Kind.cannot_tell)]
    return [
        Finding(Level.executed, f"figures/{name}", "it is not what the records give, drawn again", AGAIN)
        for name in wrong
    ]
