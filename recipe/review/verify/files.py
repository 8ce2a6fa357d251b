"""The chain of hashes, computed anew: raw images -> shards -> checkpoint -> exported files -> predictions -> metrics.

Each link says whether its file is the one that the record names; a file that is not here breaks nothing and says so.
The chain shows that files and records belong together, not that the records are true: a forger can compute hashes too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.checkpoint import load_checkpoint, released_weights
from recipe.config.identity import config_sha256
from recipe.data.shards import MANIFEST, is_file_with, read_manifest
from recipe.document.claims import identity
from recipe.document.facts import Facts
from recipe.errors import UserError
from recipe.files import WEIGHTS_BYTES_MAX
from recipe.model import weights_sha256
from recipe.records import EvaluationRecord, SerializationRecord
from recipe.review.check.document import difference_of, inside, is_there
from recipe.review.check.files import read_predictions
from recipe.review.opening import Subject
from recipe.review.reading import Reader
from recipe.run import Run, shown_path
from recipe.weights import read_weights

HOLDS, BROKEN, ABSENT = "holds", "BROKEN", "not here"


@dataclass(frozen=True)
class Link:
    """One step of the chain."""

    name: str
    state: str
    detail: str

    def line(self) -> str:
        """For a person."""
        return f"{self.state:<9} {self.name}: {self.detail}"


def links(subject: Subject, raw_dir: Path | None, data_dir: Path | None) -> Iterator[Link]:
    """Every link that a file or two records can show."""
    if subject.run is None:
        return
    reader = Reader(subject.run)
    facts = reader.facts()
    yield from (Link(finding.place, BROKEN, finding.what) for finding in reader.findings)
    if facts.preprocessing is not None:
        yield from raw_links(facts, raw_dir)
        yield from shard_links(facts, data_dir)
    yield from record_links(facts)
    yield from configuration_links(facts)
    yield from checkpoint_links(subject.run, facts)
    for record in (facts.evaluation, *facts.other_evaluations, facts.serialization, facts.inference):
        if record is not None:
            yield from output_links(subject.run, record.outputs)
    yield from metric_links(subject.run, facts)
    yield from document_links(subject, facts)


def raw_links(facts: Facts, raw_dir: Path | None) -> Iterator[Link]:
    """The archives as they were found."""
    assert facts.preprocessing is not None
    for archive in facts.preprocessing.archives:
        yield file_link(f"raw {archive.name}", below(raw_dir, archive.name), archive.sha256)
    if not facts.preprocessing.archives:
        yield Link("raw images", ABSENT, "they lay in folders: preprocessing again compares each one")


def shard_links(facts: Facts, data_dir: Path | None) -> Iterator[Link]:
    """The manifest, and each shard by what the record says of it."""
    assert facts.preprocessing is not None
    for name, digest in facts.preprocessing.outputs.items():
        file = MANIFEST if name == "manifest" else name
        yield file_link(f"data {file}", below(data_dir, file), digest)
    if data_dir is not None and (data_dir / MANIFEST).is_file():
        yield from index_links(data_dir)


def index_links(data_dir: Path) -> Iterator[Link]:
    """The index files, by what the manifest says of them."""
    try:
        manifest = read_manifest(data_dir)
    except UserError as error:
        yield Link(f"data {MANIFEST}", BROKEN, str(error))
        return
    for name, split in manifest.splits.items():
        for part, digest in (("index", split.index_sha256), ("keys", split.keys_sha256)):
            file = f"{name}.{part}.npy"
            yield file_link(f"data {file}", below(data_dir, file), digest)


def below(folder: Path | None, name: str) -> Path | None:
    """The file of this name in a folder of the reader's own, whose links are theirs; the name is a stranger's."""
    leads_out = os.path.isabs(name) or os.path.normpath(name).startswith("..") or "\0" in name
    return None if folder is None or leads_out else folder / name


def file_link(name: str, path: Path | None, digest: str) -> Link:
    """A file by the hash of its content."""
    if path is None or not os.path.isfile(path):
        return Link(name, ABSENT, f"SHA-256 should be {digest[:16]}")
    if is_file_with(path, digest):
        return Link(name, HOLDS, f"SHA-256 {digest[:16]}")
    return Link(name, BROKEN, f"{shown_path(path)} is not the file with SHA-256 {digest[:16]} that the record names")


def record_links(facts: Facts) -> Iterator[Link]:
    """What one stage read is what the stage before it wrote."""
    data = facts.preprocessing.outputs.get("manifest") if facts.preprocessing else None
    weights = set(facts.training.outputs.values()) if facts.training else set()
    for record, stage in (
        (facts.training, "training"),
        (facts.evaluation, "evaluation"),
        (facts.serialization, "export"),
    ):
        if record is None:
            continue
        if data is not None:
            yield equal_link(f"{stage} read the data set", record.inputs.get("manifest"), {data})
        if stage != "training" and weights:
            yield equal_link(f"{stage} read the weights", record.inputs.get("weights"), weights)


def configuration_links(facts: Facts) -> Iterator[Link]:
    """config.yaml is what training ran with."""
    if facts.training is not None:
        found = None if facts.config is None else config_sha256(facts.config)
        yield equal_link("config.yaml", found, {facts.training.config_sha256})


def equal_link(name: str, found: str | None, wanted: set[str]) -> Link:
    """Two records about one thing."""
    if found in wanted:
        return Link(name, HOLDS, f"{found[:16]}" if found else "")
    return Link(name, BROKEN, f"{str(found)[:16]}, but what was left is {', '.join(sorted(w[:16] for w in wanted))}")


def checkpoint_links(run: Run, facts: Facts) -> Iterator[Link]:
    """The weights inside the checkpoints, and those for release."""
    if facts.training is None:
        return
    wanted = facts.training.outputs.get("weights")
    name = f"step-{facts.training.schedule.steps:08d}"
    yield weights_link(run, f"{name}.pt", wanted, lambda path: released_weights(load_checkpoint(path)))
    yield weights_link(run, f"{name}.safetensors", wanted, lambda path: read_weights(path, "file").tensors)


def weights_link(run: Run, file: str, wanted: str | None, read: Callable[[Path], dict[str, Any]]) -> Link:
    """A file of weights by the hash of its tensors."""
    name, path = f"weights {file}", run.checkpoints / file
    if not is_there(path):
        return Link(name, ABSENT, f"its tensors should have SHA-256 {str(wanted)[:16]}")
    try:
        run.require_readable(path, WEIGHTS_BYTES_MAX)
        found = weights_sha256(read(path))
    except UserError as error:
        return Link(name, BROKEN, str(error))
    if found == wanted:
        return Link(name, HOLDS, f"SHA-256 of its tensors {found[:16]}")
    return Link(name, BROKEN, f"its tensors have SHA-256 {found[:16]}, training left {str(wanted)[:16]}")


def output_links(run: Run, outputs: dict[str, str]) -> Iterator[Link]:
    """Files that a stage left in the run."""
    for name, digest in outputs.items():
        path = inside(run.directory, name)
        if path is None:
            yield Link(name, BROKEN, "it lies outside the run")
        elif is_there(path) and (other := difference_of(path, {digest}, "that the record names")):
            yield Link(name, BROKEN, f"{other}, {digest[:16]}")
        else:
            yield file_link(name, path, digest)


def metric_links(run: Run, facts: Facts) -> Iterator[Link]:
    """The counts, from the predictions and from the classes."""
    for record in (facts.evaluation, *facts.other_evaluations):
        if record is not None:
            yield from counted(run, record)
    if facts.serialization is not None:
        yield from exported(run, facts.serialization)


def counted(run: Run, record: EvaluationRecord) -> Iterator[Link]:
    name = f"metrics of {record.protocol.name}"
    claimed = (record.images, record.correct_top1, record.correct_top5)
    sums = tuple(sum(getattr(row, k) for row in record.per_class) for k in ("images", "correct_top1", "correct_top5"))
    if sums != claimed:
        yield Link(name, BROKEN, f"the classes sum to {sums}, the record says {claimed}")
        return
    for file in record.outputs:
        if file.endswith(".npz"):
            yield from counts_links(name, inside(run.directory, file), claimed)


def exported(run: Run, record: SerializationRecord) -> Iterator[Link]:
    for entry in record.variants:
        for file in record.outputs:
            if file.endswith(f"-{entry.variant}.npz"):
                claimed = (record.images, entry.correct_top1, entry.correct_top5)
                yield from counts_links(f"metrics of {entry.variant}", inside(run.directory, file), claimed)


def counts_links(name: str, path: Path | None, claimed: tuple[int, int, int]) -> Iterator[Link]:
    """Images and hits within 1 and 5, counted again, where the file is here."""
    if path is None or not is_there(path):
        return
    try:
        _, labels, best = read_predictions(path)
    except UserError as error:
        yield Link(name, BROKEN, f"{shown_path(path)}: {error}")
        return
    hits = best == labels[:, None]
    found = (len(labels), int(hits[:, 0].sum()), int(hits.sum()))
    if found == claimed:
        yield Link(name, HOLDS, f"{found[1]} and {found[2]} of {found[0]}, counted in {path.name}")
    else:
        yield Link(name, BROKEN, f"{shown_path(path)} gives {found}, the record says {claimed}")


def document_links(subject: Subject, facts: Facts) -> Iterator[Link]:
    """The document's block says what the records say."""
    if subject.identity is None:
        yield Link("document", ABSENT, "no JSON block")
        return
    wanted = json.loads(json.dumps(identity(facts)))
    wrong = sorted(key for key in wanted if wanted[key] != subject.identity.get(key))
    yield (
        Link("document", BROKEN, f"its block differs from the records in {', '.join(wrong)}")
        if wrong
        else Link("document", HOLDS, "its block is that of the records")
    )
