"""The files of a published recipe, and how they take the place of those that are there."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from recipe.document import figures, inference_figures
from recipe.document.curves import MetricRow
from recipe.document.model_card import readme
from recipe.document.publishable import Publishable
from recipe.document.render import json_file, read_document
from recipe.document.run_data import load
from recipe.errors import UserError
from recipe.files import disk_errors, display_path, write_atomically
from recipe.records import RECORDS, Record, TimingRecord, to_json
from recipe.run import Run

README = "README.md"
METRIC_ROWS_MAX = 5000  # more are thinned
FIGURE = re.compile(r"\]\((figures/[^)\s]+)\)")


@contextmanager
def replaced_folder(output: Path) -> Iterator[Path]:
    """A folder to fill; when the block ends without an error it takes the place of `output`, else nothing changes."""
    temporary, old = (output.with_name(f".{output.name}.{what}-{os.getpid()}") for what in ("tmp", "old"))
    with disk_errors(temporary):
        temporary.mkdir(parents=True)
    try:
        yield temporary
        with disk_errors(output):
            if output.exists():
                output.rename(old)
            try:
                temporary.rename(output)
            except OSError:
                if old.exists():
                    old.rename(output)
                raise
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def fill(folder: Path, main: Publishable, output: Path, records: Sequence[Record], licence: str) -> None:
    """Everything of the published recipe, page last: it is rendered from the records as they lie in the folder."""
    there = Run(folder)
    write_atomically(there.config, main.run.content(main.run.config))
    copy_records(main, there)
    copy_kept(output, there, main)
    for record in records:
        there.write(record)
    write_atomically(there.metrics, metric_lines(thinned(main.facts.metrics)))
    published = load(there, main.facts.run_dir)
    before = output / README
    text = readme(
        published,
        licence,
        read_document(main.run) or "",
        Run(output).content(before).decode() if before.exists() else None,
    )
    write_atomically(folder / README, text.encode())
    write_atomically(there.json_file, json_file(published))
    copy_figures(text, main, there)


def copy_records(main: Publishable, there: Run) -> None:
    """The records, each read and validated before; the patches that they name."""
    run = main.run
    sources = [run.record_file(kind) for kind in RECORDS.values()]
    sources += [*run.timing.glob("*.json"), *run.other_evaluations.glob("*.json")]
    for _, record in main.facts.stages():
        for state in (record.provenance.tree_at_start, record.provenance.tree_at_end):
            if state.patch_sha256 is not None:
                sources.append(run.patch_file(state.patch_sha256))
    for source in sources:
        if source.exists():
            write_atomically(there.directory / source.relative_to(run.directory), run.content(source))


def copy_kept(output: Path, there: Run, main: Publishable) -> None:
    """What lies in the published folder and is not this run's to replace: other machines' latencies, people's files."""
    before = Run(output)
    for record in before.read_all(before.timing, TimingRecord):
        target = there.timing_file(record.machine)
        if record.inputs.get("weights") == main.evaluation.inputs.get("weights") and not target.exists():
            write_atomically(target, to_json(record))
    generated = {README, before.config.name, before.metrics.name, before.json_file.name, before.records.name}
    for source in sorted(output.rglob("*")):
        name = source.relative_to(output)
        if source.is_file() and not source.is_symlink() and name.parts[0] not in generated:
            write_atomically(there.directory / name, before.content(source))


def copy_figures(text: str, main: Publishable, there: Run) -> None:
    """The figures that the page shows, drawn anew where they are drawn from records."""
    facts = main.facts
    drawn = figures.draw(facts.training, facts.metrics)
    drawn |= inference_figures.draw_inference(facts.inference, there.read_all(there.timing, TimingRecord))
    for link in sorted(set(FIGURE.findall(text))):
        name = Path(link).name
        source, target = main.run.figures / name, there.figures / name
        if name in drawn:
            write_atomically(target, drawn[name])
        elif source.exists():
            write_atomically(target, main.run.content(source))
        elif not target.is_file():
            raise UserError(f"{display_path(source)} is missing, and the page shows it: run the stage that makes it")


def thinned(rows: Sequence[MetricRow]) -> list[MetricRow]:
    """The rows; of more than `METRIC_ROWS_MAX` only the last of training and of validation in each epoch."""
    if len(rows) <= METRIC_ROWS_MAX:
        return list(rows)
    last = {(row["epoch"], row["split"]): row for row in rows}
    return list(last.values())


def metric_lines(rows: Sequence[MetricRow]) -> bytes:
    """As the run writes them."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
