"""What a document is made of: the files of one run, and what follows from comparing them.

Records form a chain by their hashes (raw images -> shards -> weights -> metrics). A section is *stale* where its
record was made from something that is no longer there, and *not measured* where its stage has not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.config.identity import config_sha256
from recipe.document.dynamics import MetricRow
from recipe.records import (
    EnergyRecord,
    EvaluationRecord,
    Fingerprint,
    InferenceRecord,
    JournalRecord,
    PreprocessingRecord,
    Provenance,
    PublicationRecord,
    ReproductionRecord,
    SeedsRecord,
    SerializationRecord,
    TimingRecord,
    TrainingRecord,
)
from recipe.run import Run, printable

LaterRecord = SerializationRecord | InferenceRecord | TimingRecord
PRESENT, STALE, NOT_MEASURED = "present", "stale", "not measured"


@dataclass(frozen=True)
class Facts:
    """Everything that the document may say; `config` and each record are None until their stage has run."""

    name: str
    run_dir: str  # as commands name it
    config: dict[str, Any] | None
    preprocessing: PreprocessingRecord | None
    training: TrainingRecord | None
    evaluation: EvaluationRecord | None
    metrics: Sequence[MetricRow]
    serialization: SerializationRecord | None = None
    other_evaluations: Sequence[EvaluationRecord] = ()  # of exported models and of published weights
    inference: InferenceRecord | None = None
    timing: Sequence[TimingRecord] = ()  # one for each machine
    fingerprint: Fingerprint | None = None
    journal: JournalRecord | None = None
    seeds: SeedsRecord | None = None
    reproduction: ReproductionRecord | None = None
    publication: PublicationRecord | None = None
    energy: EnergyRecord | None = None


@dataclass(frozen=True)
class Section:
    """Whether a section of the document can be relied on, and if not, why."""

    state: str
    reasons: tuple[str, ...] = ()


def gather(run: Run, shown_run_dir: str) -> Facts:
    """Read the files of a run; `shown_run_dir` serves until a document was written, which records its own.

    So the page of a run that was moved, copied or is looked at from another folder stays what its records give.
    """
    config = run.read_config()
    publication, journal = run.read(PublicationRecord), run.read(JournalRecord)
    recorded = publication.run_dir if publication else journal.run_dir if journal else None
    run_dir = shown_run_dir if recorded is None else recorded
    folder = Path(run_dir).name or printable(run.directory.absolute().name)
    return Facts(
        name=str(config["name"]) if config else folder,
        run_dir=run_dir,
        config=config,
        preprocessing=run.read(PreprocessingRecord),
        training=run.read(TrainingRecord),
        evaluation=run.read(EvaluationRecord),
        metrics=run.metric_rows(),
        serialization=run.read(SerializationRecord),
        other_evaluations=run.read_all(run.other_evaluations, EvaluationRecord),
        inference=run.read(InferenceRecord),
        timing=run.read_all(run.timing, TimingRecord),
        fingerprint=run.read(Fingerprint),
        journal=journal,
        seeds=run.read(SeedsRecord),
        reproduction=run.read(ReproductionRecord),
        publication=publication,
        energy=run.read(EnergyRecord),
    )


def sections(facts: Facts) -> dict[str, Section]:
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


def training_reasons(facts: Facts) -> list[str]:
    """Why the training record no longer belongs to what lies beside it."""
    if facts.training is None:
        return []
    return data_reasons(facts, facts.training) + config_reasons(facts, facts.training)


def evaluation_reasons(facts: Facts) -> list[str]:
    """Why the evaluation record no longer belongs to what lies beside it.

    Training may put out several sets of weights (last, best, averaged): evaluating any of them is sound, and so is an
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


def later_reasons(facts: Facts, record: SerializationRecord | InferenceRecord | None) -> list[str]:
    """Why exported files, or the notebook's answers, no longer belong to the weights that were evaluated."""
    if record is None:
        return []
    return weights_reasons(facts, record) + data_reasons(facts, record) + config_reasons(facts, record)


def timing_reasons(facts: Facts) -> list[str]:
    """The machines whose latencies are of other weights."""
    return [
        f"on {record.machine}, {reason}"
        for record in facts.timing
        for reason in weights_reasons(facts, record) + config_reasons(facts, record)
    ]


def weights_reasons(facts: Facts, record: LaterRecord) -> list[str]:
    """Why a record of a stage after the evaluation is not of the weights that were evaluated."""
    if facts.evaluation is None:
        return []
    used, now = record.inputs.get("weights"), facts.evaluation.inputs.get("weights")
    if used == now:
        return []
    return [f"it used the weights {short(used)}, the evaluation has since measured {short(now)}"]


def data_reasons(facts: Facts, record: TrainingRecord | EvaluationRecord | LaterRecord) -> list[str]:
    if facts.preprocessing is None:
        return []
    used, now = record.inputs.get("manifest"), facts.preprocessing.outputs.get("manifest")
    return [] if used == now else [f"it used data with manifest {short(used)}, the data set now has {short(now)}"]


def config_reasons(facts: Facts, record: TrainingRecord | EvaluationRecord | LaterRecord) -> list[str]:
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
    """The first digits of a hash: enough to tell two apart."""
    return digest[:12] if digest else "(no hash recorded)"
