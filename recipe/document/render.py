"""Render `recipe.md` for people and `recipe.json` for programs from the records of a run.

Rendering is a pure function of records, pinned configuration and logged rows: equal inputs give equal bytes. Only the
hashes of its own blocks are read back from a page. `templates/document.md.j2` orders the chapters, each in its file.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined

from recipe.config.identity import flatten
from recipe.document import blocks, commands, curves, formatting, latency, overview
from recipe.document.experiment_log import update_log_record
from recipe.document.formatting import Markdown
from recipe.document.recipe_json import as_json, recipe_claims
from recipe.document.run_data import RunData, Section, load, sections, source_changed
from recipe.errors import UserError
from recipe.run.directory import Run
from recipe.run.files import display_path, write_atomically
from recipe.run.records import RECORDS, EvaluationRecord, PreprocessingRecord

__all__ = ["RunData", "check_document", "render", "write_document"]

EPOCHS_SHOWN = 20
ROWS_SHOWN = 20  # of lists that can be thousands long, such as the shards of ImageNet
JOURNAL_SHOWN = 40
CHANGES_SHOWN = 5
ALL_CLASSES_UP_TO = 20
EXTREME_CLASSES = 5


def render(facts: RunData, existing: str | None) -> str:
    """The document with its generated blocks. All other text of `existing` is kept byte for byte.

    Raises `UserError` where a generated block of `existing` was edited by hand.
    """
    return blocks.merge_blocks(existing or "", generated_blocks(facts))


def write_document(run: Run, shown_run_dir: str) -> None:
    """Write recipe.md, recipe.json and the figures of a run. Raises `UserError` before the first file is written."""
    from recipe.document import figures  # importing matplotlib takes a second

    update_log_record(run, shown_run_dir)
    facts = load(run, shown_run_dir)
    document = render(facts, read_document(run))
    for name, content in figures.draw(facts).items():
        write_atomically(run.figures / name, content)
    write_atomically(run.json_file, json_file(facts))
    write_atomically(run.document, document.encode())


def check_document(run: Run) -> None:
    """Raise before a stage the errors of `write_document`: edited blocks, unreadable records or rows."""
    existing, facts = read_document(run), load(run, display_path(run.directory))
    if existing is not None and blocks.edited_blocks(blocks.split(existing)):
        render(facts, existing)


def read_document(run: Run) -> str | None:
    """The document as it is, line endings included."""
    if not run.document.exists():
        return None
    try:
        return run.content(run.document).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{display_path(run.document)} is not UTF-8 text: {error}") from error


def generated_blocks(facts: RunData) -> dict[str, str]:
    """Block id -> content, in the order of the template."""
    contents: dict[str, str] = {}

    def block(block_id: str, caller: Callable[[], str]) -> Markdown:
        contents[block_id] = compact(caller())
        return Markdown("")

    template = environment().get_template("document.md.j2")
    template.render(block=block, **context(facts))
    return contents


def compact(content: str) -> str:
    """Rendered text without trailing blanks, double blank lines, and blank lines at its ends.

    Code blocks do not change: `formatting.fenced` and the JSON block have no blank lines.
    """
    lines = "\n".join(line.rstrip() for line in content.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip("\n") + "\n"


@cache  # compiling the templates takes longer than rendering
def environment() -> Environment:
    """Undefined names raise, and output is escaped unless a filter made it markdown."""
    templates = Environment(
        loader=PackageLoader("recipe.document", "templates"),
        undefined=StrictUndefined,
        finalize=formatting.finalize,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(formatting.FILTERS)
    return templates


def context(facts: RunData) -> dict[str, Any]:
    training, evaluation = facts.training, facts.evaluation
    epochs = training.epochs if training else []
    states = sections(facts)
    warnings = overview.warnings(facts, states)
    return {
        "facts": facts,
        "title": title(facts),
        "sections": states,
        "warnings": [warning.text for warning in warnings],
        "serious_warnings": any(warning.is_serious for warning in warnings),
        "stages": overview.stages(facts),
        "environments": overview.environments(facts),
        "environment_in_brief": overview.environment_in_brief(facts),
        "hashes": overview.hashes(facts, ROWS_SHOWN),
        "source_changed": source_changed,
        "declared": lambda key: declared(facts, key) or Markdown("*unknown*"),
        "is_declared": lambda key: declared(facts, key) is not None,
        "papers": papers(facts),
        "journal_shown": JOURNAL_SHOWN,
        "changes_shown": CHANGES_SHOWN,
        "seeds_top1": seeds_top1(facts),
        "action_items": declared_items(facts, "description.action_items"),
        "commands": commands,
        "variables": overview.variables(facts),
        "accuracy": formatting.accuracy,
        "ilsvrc2012_verdict": ilsvrc2012_verdict,
        "epochs": epochs,
        "epochs_shown": curves.evenly(epochs, EPOCHS_SHOWN),
        "throughput": curves.throughput(training) if training else None,
        "rows_shown": ROWS_SHOWN,
        "schedule_rows": curves.schedule_rows(training.schedule) if training else [],
        "figures": curves.figure_texts(facts),
        "training_inputs": curves.training_inputs_text(training) if training else None,
        "mistakes": curves.mistakes_text(evaluation) if evaluation else None,
        "picture_captions": curves.picture_texts(facts.inference) if facts.inference else {},
        "latency_caption": curves.latency_text,
        "measured_latencies": latency.measured_rows(facts.timing),
        "published_latencies": latency.published_rows(facts.training.model.name if facts.training else ""),
        "latency_verdicts": latency.verdicts(facts.timing),
        "latency_file": latency.latency_file,
        "single_pictures": latency.single_pictures,
        "machine_title": latency.machine_title,
        "picture_files": sorted(facts.inference.outputs) if facts.inference else [],
        "class_tables": class_tables(evaluation) if evaluation else {},
        "recipe_json": recipe_json(facts),
    }


def title(facts: RunData) -> str:
    """The model and the data set, and whether it was verified to be ILSVRC2012."""
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
    """The evidence that these are the published images. Only the hashes of the archives prove their content."""
    if not preprocessing.is_ilsvrc2012:
        return "no"
    if preprocessing.archives and all(archive.is_published_md5 for archive in preprocessing.archives):
        return "yes, the archives have the published MD5"
    return "class list and counts match; this layout has no published hash of its content"


def declared(facts: RunData, key: str) -> Markdown | None:
    """The value of a `description` key; None where it is empty."""
    value = descriptions(facts).get(key)
    return formatting.text(value) if isinstance(value, str) and value.strip() else None


def descriptions(facts: RunData) -> dict[str, Any]:
    """The declared values that training pinned. Before training, those of the data set."""
    if facts.config is not None:
        return flatten(facts.config)
    return flatten({"data": {"description": facts.preprocessing.description}}) if facts.preprocessing else {}


def declared_items(facts: RunData, key: str) -> list[str]:
    values = descriptions(facts).get(key)
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def papers(facts: RunData) -> list[str]:
    """The papers of the experiment, the model and the data set, without duplicates."""
    keys = ("description.papers", "model.description.papers", "data.description.papers")
    return list(dict.fromkeys(paper for key in keys for paper in declared_items(facts, key)))


def seeds_top1(facts: RunData) -> tuple[int, float, float] | None:
    """(n, mean, standard deviation) of top-1 over the recipe's seeds; None where there is one run only."""
    counts = facts.seeds.evaluation if facts.seeds else None
    if counts is None or len(counts.correct_top1) < 2:
        return None
    shares = [correct / counts.images for correct in counts.correct_top1]
    return len(shares), statistics.mean(shares), statistics.stdev(shares)


def class_tables(evaluation: EvaluationRecord) -> dict[str, list[Any]]:
    """Caption -> rows: all classes where they are few, else the best and the worst."""
    if len(evaluation.per_class) <= ALL_CLASSES_UP_TO:
        return {"All classes": list(evaluation.per_class)}
    ranked = sorted(evaluation.per_class, key=lambda row: (-row.correct_top1 / max(row.images, 1), row.index))
    return {"Best five classes": ranked[:EXTREME_CLASSES], "Worst five classes": ranked[-EXTREME_CLASSES:]}


def recipe_json(facts: RunData) -> Markdown:
    """The JSON block, from which a program can run the recipe again and test its claims."""
    return Markdown(as_json(recipe_claims(facts)))


def json_file(facts: RunData) -> bytes:
    """The content of recipe.json, with sorted keys."""
    content = {
        **recipe_claims(facts),
        "name": facts.name,
        "records": {name: msgspec.to_builtins(getattr(facts, name)) for name in RECORDS},
        "timing": {record.machine: msgspec.to_builtins(record) for record in facts.timing},
        "metrics": metrics_summary(facts),
        "sections": {name: section_json(section) for name, section in sections(facts).items()},
    }
    return msgspec.json.format(msgspec.json.encode(content, order="sorted"), indent=2) + b"\n"


def metrics_summary(facts: RunData) -> dict[str, Any]:
    """The number of logged rows, the last ones and the epochs. All rows are in metrics.jsonl."""
    by_split = {split: [row for row in facts.metrics if row["split"] == split] for split in ("train", "validation")}
    return {
        "rows": len(facts.metrics),
        "last": {split: rows[-1] if rows else None for split, rows in by_split.items()},
    }


def section_json(section: Section) -> dict[str, Any]:
    return {"state": section.state, "reasons": list(section.reasons)}
