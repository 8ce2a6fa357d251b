"""The files of one run, read for its document, and the state of each section.

Records form a chain by their hashes (raw images -> shards -> weights -> metrics). A section is *stale* if an input of
its record has changed since, and *not measured* if its stage has not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from recipe.config.identity import config_sha256
from recipe.run.directory import Run
from recipe.run.files import printable
from recipe.run.records import (
    RECORD_LISTS,
    RECORDS,
    EvaluationRecord,
    InferenceRecord,
    JournalRecord,
    Provenance,
    PublicationRecord,
    Records,
    SerializationRecord,
    TimingRecord,
    TrainingRecord,
)

MetricRow = dict[str, Any]
LaterRecord = TrainingRecord | EvaluationRecord | SerializationRecord | InferenceRecord | TimingRecord
PRESENT, STALE, NOT_MEASURED = "present", "stale", "not measured"


@dataclass(frozen=True, kw_only=True)
class RunData(Records):
    """The records of a run, its configuration and its logged rows: everything that its document can say."""

    name: str
    run_dir: str  # as commands name it
    config: dict[str, Any] | None  # None until training has pinned it
    metrics: Sequence[MetricRow]


@dataclass(frozen=True)
class Section:
    """The state of a section of the document, and the reasons if it is stale."""

    state: str
    reasons: tuple[str, ...] = ()


FileReader = Callable[[Path, Callable[[], Any]], Any]  # reads one file, given its path and how to read it


def load(run: Run, shown_run_dir: str, attempt: FileReader = lambda path, read: read()) -> RunData:
    """Read the files of a run, each through `attempt`, which may return None for one that cannot be read.

    `shown_run_dir` is used until a document records its own, so that the page of a run that was moved or copied stays
    the same.
    """
    config = attempt(run.config, run.read_config)
    records = {name: attempt(run.record_file(kind), partial(run.read, kind)) for name, kind in RECORDS.items()}
    for name, kind in RECORD_LISTS.items():
        found = [
            attempt(path, partial(run.read_record, path, kind)) for path in sorted(getattr(run, name).glob("*.json"))
        ]
        records[name] = [record for record in found if record is not None]
    publication: PublicationRecord | None = records["publication"]
    journal: JournalRecord | None = records["journal"]
    recorded = publication.run_dir if publication else journal.run_dir if journal else None
    run_dir = shown_run_dir if recorded is None else recorded
    folder = Path(run_dir).name or printable(run.directory.absolute().name)
    return RunData(
        name=str(config["name"]) if config else folder,
        run_dir=run_dir,
        config=config,
        metrics=attempt(run.metrics, run.metric_rows) or [],
        **records,
    )


Check = Callable[[RunData, LaterRecord], list[str]]


def sections(facts: RunData) -> dict[str, Section]:
    data = Section(PRESENT if facts.preprocessing else NOT_MEASURED)
    training = section(facts, [facts.training], data_reasons, config_reasons)
    evaluation = section(facts, [facts.evaluation], trained_reasons, data_reasons, config_reasons)
    inference, serialization = (
        section(facts, [record], weights_reasons, data_reasons, config_reasons)
        for record in (facts.inference, facts.serialization)
    )
    return {
        "raw_data": data,
        "processing_methods": data,
        "optimization_methods": training,
        "dynamics": training,
        "outputs": training,
        "performance_metrics": evaluation,
        "inference_code": inference,
        "timing_information": section(facts, facts.timing, weights_reasons, config_reasons),
        "serialization": serialization,
    }


def section(facts: RunData, records: Sequence[LaterRecord | None], *checks: Check) -> Section:
    """Present, stale for the reasons that `checks` give, or not measured."""
    present = [record for record in records if record is not None]
    reasons = [
        f"on {record.machine}, {reason}" if isinstance(record, TimingRecord) else reason
        for record in present
        for check in checks
        for reason in check(facts, record)
    ]
    return Section((STALE if reasons else PRESENT) if present else NOT_MEASURED, tuple(reasons))


def trained_reasons(facts: RunData, record: LaterRecord) -> list[str]:
    """Whether the evaluated weights are among those that training released, such as last, best or averaged.

    An evaluation of an earlier checkpoint is sound too. The document calls it one.
    """
    if facts.training is None or not isinstance(record, EvaluationRecord):
        return []
    measured = record.inputs.get("weights")
    released = {digest for name, digest in facts.training.outputs.items() if "weights" in name}
    if record.protocol.epochs_completed != record.protocol.epochs or measured in released:
        return []
    now = facts.training.outputs.get("weights")
    return [f"it measured the weights {short(measured)}, training has since left {short(now)}"]


def weights_reasons(facts: RunData, record: LaterRecord) -> list[str]:
    """Whether a stage after the evaluation used the evaluated weights."""
    if facts.evaluation is None:
        return []
    used, now = record.inputs.get("weights"), facts.evaluation.inputs.get("weights")
    return [] if used == now else [f"it used the weights {short(used)}, the evaluation has since measured {short(now)}"]


def data_reasons(facts: RunData, record: LaterRecord) -> list[str]:
    if facts.preprocessing is None:
        return []
    used, now = record.inputs.get("manifest"), facts.preprocessing.outputs.get("manifest")
    return [] if used == now else [f"it used data with manifest {short(used)}, the data set now has {short(now)}"]


def config_reasons(facts: RunData, record: LaterRecord) -> list[str]:
    if facts.config is None:
        return ["its configuration, config.yaml, is missing"]
    used, now = record.config_sha256, config_sha256(facts.config)
    return [] if used == now else [f"it ran with configuration {short(used)}, config.yaml is now {short(now)}"]


def source_changed(provenance: Provenance) -> bool:
    """Whether the code that a stage started with is not the code that it ended with."""
    start, end = provenance.tree_at_start, provenance.tree_at_end
    return (start.state, start.patch_sha256, provenance.source_sha256) != (
        end.state,
        end.patch_sha256,
        provenance.source_sha256_at_end,
    )


def short(digest: str | None) -> str:
    return digest[:12] if digest else "(no hash recorded)"
