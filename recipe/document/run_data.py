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

from recipe.config import config_sha256
from recipe.document.curves import MetricRow
from recipe.files import printable
from recipe.records import (
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
from recipe.run import Run

LaterRecord = SerializationRecord | InferenceRecord | TimingRecord
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


Attempt = Callable[[Path, Callable[[], Any]], Any]  # reads one file, given its path and how to read it


def load(run: Run, shown_run_dir: str, attempt: Attempt = lambda path, read: read()) -> RunData:
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


def sections(facts: RunData) -> dict[str, Section]:
    """The state of every section that a stage fills."""
    data = Section(PRESENT if facts.preprocessing else NOT_MEASURED)
    training = section(facts.training, training_reasons(facts))
    return {
        "raw_data": data,
        "processing_methods": data,
        "optimization_methods": training,
        "dynamics": training,
        "outputs": training,
        "performance_metrics": section(facts.evaluation, evaluation_reasons(facts)),
        "inference_code": section(facts.inference, later_reasons(facts, facts.inference)),
        "timing_information": section(facts.timing or None, timing_reasons(facts)),
        "serialization": section(facts.serialization, later_reasons(facts, facts.serialization)),
    }


def section(record: object | None, reasons: list[str]) -> Section:
    if record is None:
        return Section(NOT_MEASURED)
    return Section(STALE if reasons else PRESENT, tuple(reasons))


def training_reasons(facts: RunData) -> list[str]:
    """The inputs of training that have changed since."""
    if facts.training is None:
        return []
    return data_reasons(facts, facts.training) + config_reasons(facts, facts.training)


def evaluation_reasons(facts: RunData) -> list[str]:
    """The inputs of the evaluation that have changed since.

    Training may release several sets of weights (last, best, averaged): evaluating any of them is sound, and so is an
    earlier checkpoint, which the document calls one.
    """
    if facts.evaluation is None:
        return []
    reasons = []
    protocol = facts.evaluation.protocol
    if facts.training is not None and protocol.epochs_completed == protocol.epochs:
        measured = facts.evaluation.inputs.get("weights")
        trained = {digest for name, digest in facts.training.outputs.items() if "weights" in name}
        if measured not in trained:
            now = facts.training.outputs.get("weights")
            reasons.append(f"it measured the weights {short(measured)}, training has since left {short(now)}")
    return reasons + data_reasons(facts, facts.evaluation) + config_reasons(facts, facts.evaluation)


def later_reasons(facts: RunData, record: SerializationRecord | InferenceRecord | None) -> list[str]:
    """The inputs of exported files or of the notebook that have changed since."""
    if record is None:
        return []
    return weights_reasons(facts, record) + data_reasons(facts, record) + config_reasons(facts, record)


def timing_reasons(facts: RunData) -> list[str]:
    """The machines with latencies of other weights."""
    return [
        f"on {record.machine}, {reason}"
        for record in facts.timing
        for reason in weights_reasons(facts, record) + config_reasons(facts, record)
    ]


def weights_reasons(facts: RunData, record: LaterRecord) -> list[str]:
    """Whether a later stage used other weights than the evaluation."""
    if facts.evaluation is None:
        return []
    used, now = record.inputs.get("weights"), facts.evaluation.inputs.get("weights")
    if used == now:
        return []
    return [f"it used the weights {short(used)}, the evaluation has since measured {short(now)}"]


def data_reasons(facts: RunData, record: TrainingRecord | EvaluationRecord | LaterRecord) -> list[str]:
    if facts.preprocessing is None:
        return []
    used, now = record.inputs.get("manifest"), facts.preprocessing.outputs.get("manifest")
    return [] if used == now else [f"it used data with manifest {short(used)}, the data set now has {short(now)}"]


def config_reasons(facts: RunData, record: TrainingRecord | EvaluationRecord | LaterRecord) -> list[str]:
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
    """The first digits of a hash."""
    return digest[:12] if digest else "(no hash recorded)"
