"""Level *executed*: what can be measured again without torch: hashes, counts from predictions, figures."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recipe.config import canonical_json
from recipe.document.facts import Facts
from recipe.errors import UserError
from recipe.records import ClassCounts
from recipe.review.agreement import inside, output_findings, sha256_of_file
from recipe.review.findings import Finding, Kind, Level, listed
from recipe.run import Run

LARGEST_PREDICTIONS_BYTES = 2**30  # unpacked; ImageNet's are 8 MB
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
        beside = path.with_name(f"{path.name}.sha256")
        known = beside.read_text(encoding="ascii", errors="replace").split() if beside.is_file() else []
        if sha256_of_file(path) not in known:
            what = "its SHA-256 is not the one written beside it"
            found.append(Finding(Level.executed, f"checkpoints/{path.name}", what, AGAIN))
    return found


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
        tensors = load(path.read_bytes())
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
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST_PREDICTIONS_BYTES:
                raise UserError(f"it unpacks to more than {LARGEST_PREDICTIONS_BYTES >> 20} MiB")
        with np.load(path, allow_pickle=False) as content:
            key, label, top = content["key"], content["label"], content["top5"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError, MemoryError) as error:
        raise UserError(f"it is no file of predictions: {error}") from error
    is_whole = label.ndim == 1 and top.ndim == 2 and top.shape[1] >= 1 and len(key) == len(label) == len(top)
    if not is_whole or label.dtype.kind not in "iu" or top.dtype.kind not in "iu":
        raise UserError("its arrays are not those of predictions")
    return key, label, top


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


def figure_findings(facts: Facts, run: Run) -> list[Finding]:
    """Drawn again from the records, the figures are the same; another matplotlib draws all of them otherwise."""
    from recipe.document import figures, inference_figures

    drawn = figures.draw(facts.training, facts.metrics)
    drawn |= inference_figures.draw_inference(facts.inference, facts.timing)
    there = {name: run.figures / name for name in drawn if (run.figures / name).is_file()}
    wrong = [name for name, path in there.items() if path.read_bytes() != drawn[name]]
    if not wrong:
        return []
    if len(wrong) == len(there):
        what = "drawn again, every figure has other bytes: another version of matplotlib, or other records"
        return [Finding(Level.executed, "figures", what, kind=Kind.cannot_tell)]
    return [
        Finding(Level.executed, f"figures/{name}", "it is not what the records give, drawn again", AGAIN)
        for name in wrong
    ]
