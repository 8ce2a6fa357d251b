"""Level *resolvable*: the records beside each other, by the table of pairs, their hashes and the logged rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from recipe.config.identity import config_sha256, differences, flatten
from recipe.document.run_data import STALE, RunData, sections
from recipe.review.check.checklist import HEADINGS
from recipe.review.check.code import SHA256
from recipe.review.check.pairs import pair_findings
from recipe.review.findings import Finding, Level, first_few
from recipe.run.metric_rows import Place, missing_rows, planned_places

MOST_ROWS = 1_000_000  # expected of a record, which may claim any number of steps
SECTIONS = HEADINGS | {
    "inference_code": "Inference / Code",
    "timing_information": "Inference / Timing information",
    "serialization": "Inference / Serialization",
}


def record_findings(facts: RunData) -> list[Finding]:
    """Pairs that contradict each other, texts that are not hashes, stale sections, lost rows, other weights."""
    return [
        *pair_findings(facts),
        *hash_findings(facts),
        *stale_findings(facts),
        *log_findings(facts),
        *energy_findings(facts),
    ]


def hash_findings(facts: RunData) -> list[Finding]:
    """Hashes of inputs and outputs that are not SHA-256."""
    findings = []
    for name, record in facts.stages():
        hashes = {**record.inputs, **getattr(record, "outputs", {})}
        wrong = [key for key, value in hashes.items() if not SHA256.fullmatch(value)]
        if wrong:
            place = f"records/{name}.json, inputs and outputs"
            what = f"no SHA-256 in {first_few(wrong)}"
            findings.append(Finding(Level.well_formed, place, what, "run the stage again"))
    return findings


MEND_CONFIG = "put config.yaml back as training pinned it: change nothing in it, train another run instead"


def stale_findings(facts: RunData) -> list[Finding]:
    """Stale sections: one finding for each reason, with all of its sections."""
    reasons: dict[str, list[str]] = {}
    for name, section in sections(facts).items():
        if section.state == STALE:
            for reason in section.reasons:
                reasons.setdefault(reason, []).append(SECTIONS.get(name, name))
    findings = []
    for reason, names in reasons.items():
        mend = MEND_CONFIG if "config.yaml" in reason else "run the stages of these sections again"
        findings.append(Finding(Level.resolvable, "section " + "; ".join(names), f"stale: {reason}", mend))
    return findings


def log_findings(facts: RunData) -> list[Finding]:
    """Rows that are missing from metrics.jsonl."""
    if facts.training is None:
        return []
    findings = []
    missing = missing_rows({Place(row["split"], row["epoch"], row["step"]) for row in facts.metrics}, promised(facts))
    if missing:
        findings.append(
            Finding(Level.resolvable, "metrics.jsonl", missing, "take the file from version control or a copy")
        )
    return findings


def promised(facts: RunData) -> Iterator[Place]:
    """The expected rows. A published recipe may keep one train row an epoch."""
    assert facts.training is not None, "the caller looked"
    schedule, publication = facts.training.schedule, facts.publication
    every = flatten(facts.config or {}).get("trainer.log_every_steps")
    is_thinned = publication is not None and publication.metric_rows_kept < publication.metric_rows
    if is_thinned or not (isinstance(every, int) and every >= 1):
        every = schedule.steps_per_epoch
    planned = planned_places(schedule.steps, schedule.steps_per_epoch, every, len(facts.training.epochs))
    return islice(planned, MOST_ROWS)


def energy_findings(facts: RunData) -> list[Finding]:
    """The recorded energy belongs to the weights that training left."""
    if facts.energy is None or facts.training is None:
        return []
    if facts.energy.inputs.get("weights") == facts.training.outputs.get("weights"):
        return []
    what = "it was spent on other weights than training left"
    return [Finding(Level.resolvable, "records/energy.json, inputs", what, "remove it, or train again")]


def config_findings(name: str, config: dict[str, Any], facts: RunData) -> list[Finding]:
    """The document's configuration is that of config.yaml."""
    if facts.config is None or config_sha256(facts.config) == config_sha256(config):
        return []
    changed = first_few(differences(config, facts.config))
    return [Finding(Level.resolvable, "config.yaml", f"it is not the configuration of {name}: {changed}", MEND_CONFIG)]
