"""Level *executed*: hashes, counts and figures, measured again."""

from __future__ import annotations

import os
from collections.abc import Iterator

from recipe.document.run_data import RunData
from recipe.errors import UserError
from recipe.review.check.document import output_findings
from recipe.review.findings import Finding, Kind, Level, first_few
from recipe.review.outputs import counted_predictions, file_fault, path_inside
from recipe.run.directory import Run
from recipe.run.files import WEIGHTS_BYTES_MAX

AGAIN = "take the file from where the run was made, or run its stage again"


def executed_findings(facts: RunData, run: Run) -> list[Finding]:
    """Everything that is cheap to measure again."""
    return [
        *output_findings(facts, run, Level.executed),
        *checkpoint_findings(run),
        *weights_findings(facts, run),
        *prediction_findings(facts, run),
        *figure_findings(facts, run),
    ]


def checkpoint_findings(run: Run) -> Iterator[Finding]:
    """Checkpoints whose SHA-256 is not the one written beside them."""
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
    """Counts of records that are others in the predictions of every image."""
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
        what = f"not in this folder, so that nothing was counted again: {first_few(absent)}"
        yield Finding(Level.executed, "predictions", what, kind=Kind.cannot_tell)


def figure_findings(facts: RunData, run: Run) -> list[Finding]:
    """Figures that are others when drawn again from the records."""
    from recipe.document import figures

    drawn = figures.draw(facts.training, facts.metrics)
    drawn |= figures.draw_inference(facts.inference, facts.timing)
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
