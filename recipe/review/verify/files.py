"""The chain of hashes: raw images -> shards -> checkpoint -> exported files -> predictions -> metrics.

Each link compares a file, hashed again, with its record. A file that is not here breaks nothing. The chain shows that
files and records belong together, not that the records are true: a forger can compute hashes too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from recipe.config.identity import config_sha256
from recipe.data.manifest import MANIFEST, read_manifest
from recipe.data.shards import is_file_with
from recipe.document.run_data import RunData
from recipe.errors import UserError
from recipe.models.build import weights_sha256
from recipe.models.checkpoint import eval_weights, load_checkpoint
from recipe.models.pretrained import read_weights
from recipe.review.check.document import contradictions_of
from recipe.review.check.files import counted_predictions, file_fault, path_inside, recorded_outputs
from recipe.review.opening import OpenedRecipe, RecordReader
from recipe.run.directory import Run
from recipe.run.files import WEIGHTS_BYTES_MAX, display_path
from recipe.run.records import PreprocessingRecord

HOLDS, BROKEN, NOT_HERE = "holds", "BROKEN", "not here"


class Link(msgspec.Struct, frozen=True):
    name: str
    state: str
    detail: str

    def line(self) -> str:
        return f"{self.state:<9} {self.name}: {self.detail}"


def links(recipe: OpenedRecipe, raw_dir: Path | None, data_dir: Path | None) -> Iterator[Link]:
    """Every link that a file or two records can show, and the contradictions of the document."""
    if recipe.run is None:
        yield from document_links(recipe, None, set())
        return
    reader = RecordReader(recipe.run)
    facts = reader.facts()
    yield from (Link(finding.place, BROKEN, finding.what) for finding in reader.findings)
    if facts.preprocessing is not None:
        yield from data_links(facts.preprocessing, raw_dir, data_dir)
    yield from record_links(facts)
    yield from checkpoint_links(recipe.run, facts)
    for _, name, digest in recorded_outputs(facts):
        yield output_link(recipe.run, name, digest)
    yield from metric_links(recipe.run, facts)
    yield from document_links(recipe, facts, {finding.place for finding in reader.findings})


def document_links(recipe: OpenedRecipe, facts: RunData | None, unreadable: set[str]) -> Iterator[Link]:
    """The page, its JSON block and the records, beside each other."""
    wrong = contradictions_of(recipe, facts, unreadable)
    yield from (Link(finding.place, BROKEN, finding.what) for finding in wrong)
    if recipe.block is None:
        yield Link("document", NOT_HERE, "no JSON block")
    elif not wrong:
        yield Link("document", HOLDS, "it is that of the records" if facts else "its markers and hashes")


def data_links(record: PreprocessingRecord, raw_dir: Path | None, data_dir: Path | None) -> Iterator[Link]:
    """The raw archives, the manifest, the shards, and the index files by the manifest."""
    for archive in record.archives:
        yield file_link(f"raw {archive.name}", raw_dir, archive.name, archive.sha256)
    if not record.archives:
        yield Link("raw images", NOT_HERE, "they were in folders: preprocessing again compares each one")
    for name, digest in record.outputs.items():
        file = MANIFEST if name == "manifest" else name
        yield file_link(f"data {file}", data_dir, file, digest)
    if data_dir is None or not (data_dir / MANIFEST).is_file():
        return
    try:
        manifest = read_manifest(data_dir)
    except UserError as error:
        yield Link(f"data {MANIFEST}", BROKEN, str(error))
        return
    for name, split in manifest.splits.items():
        for part, digest in (("index", split.index_sha256), ("keys", split.keys_sha256)):
            yield file_link(f"data {name}.{part}.npy", data_dir, f"{name}.{part}.npy", digest)


def file_link(name: str, folder: Path | None, file: str, digest: str) -> Link:
    """A file in a folder of the user's own: links there are trusted. The file's name may come from anybody."""
    leads_out = os.path.isabs(file) or os.path.normpath(file).startswith("..") or "\0" in file
    path = None if folder is None or leads_out else folder / file
    if path is None or not path.is_file():
        return Link(name, NOT_HERE, f"SHA-256 should be {digest[:16]}")
    if is_file_with(path, digest):
        return Link(name, HOLDS, f"SHA-256 {digest[:16]}")
    return Link(name, BROKEN, f"{display_path(path)} is not the file with SHA-256 {digest[:16]} that the record names")


def record_links(facts: RunData) -> Iterator[Link]:
    """Each stage read the output of the stage before it. config.yaml is the configuration of the training."""
    manifest = facts.preprocessing.outputs.get("manifest") if facts.preprocessing else None
    outputs = facts.training.outputs.items() if facts.training else ()
    weights = {digest for name, digest in outputs if "weights" in name}
    for record, stage in (
        (facts.training, "training"),
        (facts.evaluation, "evaluation"),
        (facts.serialization, "export"),
    ):
        if record is not None and manifest is not None:
            yield equal_link(f"{stage} read the data set", record.inputs.get("manifest"), {manifest})
        if record is not None and stage != "training" and weights:
            yield equal_link(f"{stage} read the weights", record.inputs.get("weights"), weights)
    if facts.training is not None:
        digest = None if facts.config is None else config_sha256(facts.config)
        yield equal_link("config.yaml", digest, {facts.training.config_sha256})


def equal_link(name: str, digest: str | None, written: set[str]) -> Link:
    if digest in written:
        return Link(name, HOLDS, digest[:16] if digest else "")
    return Link(name, BROKEN, f"{str(digest)[:16]}, but written was {', '.join(sorted(one[:16] for one in written))}")


def checkpoint_links(run: Run, facts: RunData) -> Iterator[Link]:
    """The weights of the last checkpoint and of the file for release, by the hash of their tensors."""
    if facts.training is None:
        return
    recorded = facts.training.outputs.get("weights")
    readers: dict[str, Callable[[Path], dict[str, Any]]] = {
        "pt": lambda path: eval_weights(load_checkpoint(path)),
        "safetensors": lambda path: read_weights(path, "file").tensors,
    }
    for suffix, read in readers.items():
        path = run.checkpoints / f"step-{facts.training.schedule.steps:08d}.{suffix}"
        name = f"weights {path.name}"
        if not os.path.exists(path):
            yield Link(name, NOT_HERE, f"its tensors should have SHA-256 {str(recorded)[:16]}")
            continue
        try:
            run.check_readable(path, WEIGHTS_BYTES_MAX)
            digest = weights_sha256(read(path))
        except UserError as error:
            yield Link(name, BROKEN, str(error))
            continue
        if digest == recorded:
            yield Link(name, HOLDS, f"SHA-256 of its tensors {digest[:16]}")
        else:
            yield Link(name, BROKEN, f"its tensors have SHA-256 {digest[:16]}, training recorded {str(recorded)[:16]}")


def output_link(run: Run, name: str, digest: str) -> Link:
    path = path_inside(run.directory, name)
    if path is None:
        return Link(name, BROKEN, "it is outside the run")
    if not os.path.exists(path):
        return Link(name, NOT_HERE, f"SHA-256 should be {digest[:16]}")
    if fault := file_fault(path, {digest}, "that the record names"):
        return Link(name, BROKEN, f"{fault}, {digest[:16]}")
    return Link(name, HOLDS, f"SHA-256 {digest[:16]}")


def metric_links(run: Run, facts: RunData) -> Iterator[Link]:
    """The counts of each record, counted again in the predictions that are here."""
    for counted in counted_predictions(facts):
        name = f"metrics of {counted.metric}"
        path = path_inside(run.directory, counted.file)
        if path is None or not os.path.exists(path):
            continue
        try:
            faults = counted.faults(path)
        except UserError as error:
            yield Link(name, BROKEN, f"{display_path(path)}: {error}")
            continue
        if faults:
            yield Link(name, BROKEN, f"{display_path(path)}: {'; '.join(faults)}")
        else:
            counts = f"{counted.correct_top1} and {counted.correct_top5} of {counted.images}"
            yield Link(name, HOLDS, f"{counts}, counted in {path.name}")
