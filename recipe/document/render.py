"""From records to pages: `recipe.md` for people and `recipe.json`, its twin, for programs.

Rendering is a pure function of the records, the pinned configuration and the logged rows, so equal inputs give equal
bytes; nothing is ever read back from a page but the hashes of its own blocks. `template.md.j2` reads as the
document and alone knows the order of its sections.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any, NamedTuple

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined

from recipe.config.identity import flatten
from recipe.document import blocks, commands, dynamics, formatting, latency
from recipe.document.claims import as_json, identity
from recipe.document.facts import Facts, Section, gather, sections, source_changed
from recipe.document.formatting import Markdown
from recipe.document.history import keep_history
from recipe.errors import UserError
from recipe.records import EvaluationRecord, PreprocessingRecord, ProjectionRecord
from recipe.run import Run, shown_path, write_atomically

__all__ = ["Facts", "check_document", "render", "write_document"]

EPOCHS_SHOWN = 20
ROWS_SHOWN = 20  # of lists that can be thousands long, such as the shards of ImageNet
JOURNAL_SHOWN = 40
CHANGES_SHOWN = 5
ALL_CLASSES_UP_TO = 20
EXTREME_CLASSES = 5


class Declared(NamedTuple):
    """What a person said under a `description` key, and its kind: *declared*, or *unknown* where nothing was said."""

    text: Markdown
    kind: Markdown


def render(facts: Facts, existing: str | None) -> str:
    """The document: generated blocks anew, everything else in `existing` byte for byte.

    Raises `UserError` where a generated block of `existing` was edited by hand.
    """
    return blocks.merge(existing or "", generated_blocks(facts))


def write_document(run: Run, shown_run_dir: str) -> None:
    """Write recipe.md, recipe.json and the figures of a run; nothing is written where the document refuses."""
    from recipe.document import figures, inference_figures  # matplotlib: a second that a reader of pages need not wait

    keep_history(run, shown_run_dir)
    facts = gather(run, shown_run_dir)
    document = render(facts, read_document(run))
    drawn = figures.draw(facts.training, facts.metrics)
    drawn |= inference_figures.draw_inference(facts.inference, facts.timing)
    for name, content in drawn.items():
        write_atomically(run.figures / name, content)
    write_atomically(run.twin, twin(facts))
    write_atomically(run.document, document.encode())


def check_document(run: Run) -> None:
    """Refuse before the work, not after it, where `write_document` would: edited blocks, unreadable records or rows."""
    existing, facts = read_document(run), gather(run, shown_path(run.directory))
    if existing is not None and blocks.edited_blocks(blocks.split(existing)):
        render(facts, existing)


def read_document(run: Run) -> str | None:
    """The document as it is, line endings included."""
    if not run.document.exists():
        return None
    try:
        return run.content(run.document).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{shown_path(run.document)} is not UTF-8 text: {error}") from error


def generated_blocks(facts: Facts) -> dict[str, str]:
    """Block id -> content, in the order of the template."""
    contents: dict[str, str] = {}

    def block(block_id: str, caller: Callable[[], str]) -> Markdown:
        contents[block_id] = compact(caller())
        return Markdown("")

    template = environment().get_template("template.md.j2")
    template.render(block=block, **context(facts))
    return contents


def compact(content: str) -> str:
    """What a template leaves behind, tidied: no trailing blanks, no double blank lines, one blank line at each end.

    Blank lines in code blocks are not touched, since `formatting.fenced` and the JSON block hold none.
    """
    lines = "\n".join(line.rstrip() for line in content.split("\n"))
    return "\n" + re.sub(r"\n{3,}", "\n\n", lines).strip("\n") + "\n\n"


@cache  # compiling the template takes longer than all else of a document
def environment() -> Environment:
    """Undefined names stop, and everything is escaped that no filter has made into markdown."""
    made = Environment(
        loader=PackageLoader("recipe.document", "."),
        undefined=StrictUndefined,
        finalize=formatting.shown,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(formatting.FILTERS)
    return made


def context(facts: Facts) -> dict[str, Any]:
    """Everything that the template may name."""
    training, evaluation = facts.training, facts.evaluation
    rows = dynamics.epoch_rows(training, facts.metrics) if training else []
    return {
        "facts": facts,
        "projection": facts.projection,
        "title": title(facts),
        "sections": sections(facts),
        "source_changed": source_changed,
        "declared": lambda key: declared(facts, key),
        "papers": papers(facts),
        "journal_shown": JOURNAL_SHOWN,
        "changes_shown": CHANGES_SHOWN,
        "seeds_top1": seeds_top1(facts),
        "action_items": declared_items(facts, "description.action_items"),
        "commands": commands,
        "accuracy": formatting.accuracy,
        "ilsvrc2012_verdict": ilsvrc2012_verdict,
        "epochs": rows,
        "epochs_shown": dynamics.evenly(rows, EPOCHS_SHOWN),
        "throughput": dynamics.throughput(training) if training else None,
        "rows_shown": ROWS_SHOWN,
        "schedule_rows": dynamics.schedule_rows(training.schedule) if training else [],
        "figures": dynamics.figure_names(training, facts.metrics) if training else [],
        "measured_latencies": latency.measured_rows(facts.timing),
        "published_latencies": latency.published_rows(facts.training.model.name if facts.training else ""),
        "latency_verdicts": latency.verdicts(facts.timing),
        "latency_file": latency.latency_file,
        "machine_title": latency.machine_title,
        "picture_files": sorted(facts.inference.outputs) if facts.inference else [],
        "class_tables": class_tables(evaluation) if evaluation else {},
        "recipe_json": recipe_json(facts),
    }


def title(facts: Facts) -> str:
    """What was trained on what; data that were not verified to be ILSVRC2012 say so."""
    values = flatten(facts.config or {})
    model = facts.training.model.name if facts.training else str(values.get("model.name", ""))
    model = re.sub(r"^resnet(\d+)$", r"ResNet-\1", model)
    if facts.preprocessing is None:
        data = str(values.get("data.name", ""))
    else:
        verdict = "ILSVRC2012" if facts.preprocessing.is_ilsvrc2012 else "not ILSVRC2012"
        data = f"{facts.preprocessing.data_set} ({verdict})"
    return f"{model} on {data}" if model and data else f"Data set {data}" if data else facts.name


def ilsvrc2012_verdict(preprocessing: PreprocessingRecord) -> str:
    """How far it was checked that these are the published images; only the archives' hashes prove their content."""
    if not preprocessing.is_ilsvrc2012:
        return "no"
    if preprocessing.archives and all(archive.is_published_md5 for archive in preprocessing.archives):
        return "yes, the archives have the published MD5"
    return "class list and counts match; this layout has no published hash of its content"


def declared(facts: Facts, key: str) -> Declared:
    """A `description` key."""
    value = descriptions(facts).get(key)
    if not isinstance(value, str) or not value.strip():
        return Declared(Markdown(formatting.NOTHING), Markdown("*unknown*"))
    return Declared(formatting.text(value), Markdown("*declared*"))


def descriptions(facts: Facts) -> dict[str, Any]:
    """What people declared: as training pinned it, and before that what preprocessing knew of its data set."""
    if facts.config is not None:
        return flatten(facts.config)
    return flatten({"data": {"description": facts.preprocessing.description}}) if facts.preprocessing else {}


def declared_items(facts: Facts, key: str) -> list[str]:
    """A `description` key that holds a list."""
    values = descriptions(facts).get(key)
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def papers(facts: Facts) -> list[str]:
    """Of the experiment, the model and the data set, each once."""
    keys = ("description.papers", "model.description.papers", "data.description.papers")
    return list(dict.fromkeys(paper for key in keys for paper in declared_items(facts, key)))


def seeds_top1(facts: Facts) -> tuple[int, float, float] | None:
    """(n, mean, standard deviation) of top-1 over the recipe's seeds; None where there is one run only."""
    if facts.seeds is None or len(facts.seeds.runs) < 2:
        return None
    shares = [run.correct_top1 / facts.seeds.images for run in facts.seeds.runs]
    return len(shares), statistics.mean(shares), statistics.stdev(shares)


def class_tables(evaluation: EvaluationRecord) -> dict[str, list[Any]]:
    """Caption -> rows: all classes where they are few, else the best and the worst."""
    if len(evaluation.per_class) <= ALL_CLASSES_UP_TO:
        return {"All classes": list(evaluation.per_class)}
    ranked = sorted(evaluation.per_class, key=lambda row: (-row.correct_top1 / max(row.images, 1), row.index))
    return {"Best five classes": ranked[:EXTREME_CLASSES], "Worst five classes": ranked[-EXTREME_CLASSES:]}


def projection_page(record: ProjectionRecord) -> str:
    """The section of a projection, alone."""
    return compact(environment().get_template("projection.md.j2").render(projection=record)).strip("\n")


def recipe_json(facts: Facts) -> Markdown:
    """The block from which a program can run the recipe again, and test its claims."""
    return Markdown(as_json(identity(facts)))


def twin(facts: Facts) -> bytes:
    """The machine-readable twin of the document: the same facts, sorted keys."""
    records = {
        "preprocessing": facts.preprocessing,
        "training": facts.training,
        "evaluation": facts.evaluation,
        "serialization": facts.serialization,
        "inference": facts.inference,
        "fingerprint": facts.fingerprint,
        "journal": facts.journal,
        "seeds": facts.seeds,
        "reproduction": facts.reproduction,
        "publication": facts.publication,
        "projection": facts.projection,
        "energy": facts.energy,
    }
    content = {
        **identity(facts),
        "name": facts.name,
        "records": {name: msgspec.to_builtins(record) for name, record in records.items()},
        "timing": {record.machine: msgspec.to_builtins(record) for record in facts.timing},
        "metrics": metrics_summary(facts),
        "sections": {name: section_json(section) for name, section in sections(facts).items()},
    }
    return msgspec.json.format(msgspec.json.encode(content, order="sorted"), indent=2) + b"\n"


def metrics_summary(facts: Facts) -> dict[str, Any]:
    """How much was logged, and its last rows; all rows are in metrics.jsonl."""
    by_split = {split: [row for row in facts.metrics if row["split"] == split] for split in ("train", "validation")}
    epochs = dynamics.epoch_rows(facts.training, facts.metrics) if facts.training else []
    return {
        "rows": len(facts.metrics),
        "last": {split: rows[-1] if rows else None for split, rows in by_split.items()},
        "epochs": [asdict(row) for row in epochs],
    }


def section_json(section: Section) -> dict[str, Any]:
    return {"state": section.state, "reasons": list(section.reasons)}
