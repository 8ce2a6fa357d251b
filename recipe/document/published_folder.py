"""The files of a published recipe, and the table of all published recipes in README.md.

The files are written into a new folder, which then takes the place of the published one: a reader sees the old recipe
or the new one, and nothing in between.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from recipe.document import blocks, figures
from recipe.document.curves import MetricRow
from recipe.document.formatting import Markdown, accuracy, code, hardware, percent, table, text
from recipe.document.model_card import readme
from recipe.document.render import json_file, read_document, seeds_top1
from recipe.document.run_data import RunData, load
from recipe.errors import UserError
from recipe.run.directory import Run
from recipe.run.files import disk_errors, display_path, write_atomically
from recipe.run.records import (
    RECORDS,
    EvaluationRecord,
    PreprocessingRecord,
    PublicationRecord,
    Record,
    TimingRecord,
    TrainingRecord,
    to_json,
)

README, RECIPES = "README.md", Path("recipes")
METRIC_ROWS_MAX = 5000  # more are thinned
FIGURE = re.compile(r"\]\((figures/[^)\s]+)\)")
TABLE_BLOCK = "published_recipes"
TABLE_HEAD = ("Recipe", "Data", "Top-1 (*measured*)", "Top-5 (*measured*)", "Runs", "Protocol", "Hardware", "Weights")


@dataclass(frozen=True)
class FinishedRun:
    """A run with the records that a published recipe cannot do without."""

    run: Run
    facts: RunData
    data: PreprocessingRecord
    training: TrainingRecord
    evaluation: EvaluationRecord

    @property
    def where(self) -> str:
        """The run's path for a person."""
        return display_path(self.run.directory)


# ---- the folder -------------------------------------------------------------------------------------


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


def fill(folder: Path, main: FinishedRun, output: Path, records: Sequence[Record], licence: str) -> None:
    """All files of the published recipe; the page is rendered from the records that were copied."""
    copy = Run(folder)
    write_atomically(copy.config, main.run.content(main.run.config))
    copy_records(main, copy)
    copy_kept(output, copy, main)
    for record in records:
        copy.write(record)
    write_atomically(copy.metrics, metric_lines(thinned(main.facts.metrics)))
    published = load(copy, main.facts.run_dir)
    before = output / README
    page = readme(
        published,
        licence,
        read_document(main.run) or "",
        Run(output).content(before).decode() if before.exists() else None,
    )
    write_atomically(folder / README, page.encode())
    write_atomically(copy.json_file, json_file(published))
    copy_figures(page, main, copy)


def copy_records(main: FinishedRun, copy: Run) -> None:
    """The records, which were read and validated before, and the patches that they name."""
    run = main.run
    sources = [run.record_file(kind) for kind in RECORDS.values()]
    sources += [*run.timing.glob("*.json"), *run.other_evaluations.glob("*.json")]
    for _, record in main.facts.stages():
        for state in (record.provenance.tree_at_start, record.provenance.tree_at_end):
            if state.patch_sha256 is not None:
                sources.append(run.patch_file(state.patch_sha256))
    for source in sources:
        if source.exists():
            write_atomically(copy.directory / source.relative_to(run.directory), run.content(source))


def copy_kept(output: Path, copy: Run, main: FinishedRun) -> None:
    """Files of the published folder that stay: latencies of other machines, and people's files."""
    before = Run(output)
    for record in before.read_all(before.timing, TimingRecord):
        target = copy.timing_file(record.machine)
        if record.inputs.get("weights") == main.evaluation.inputs.get("weights") and not target.exists():
            write_atomically(target, to_json(record))
    generated = {README, before.config.name, before.metrics.name, before.json_file.name, before.records.name}
    for source in sorted(output.rglob("*")):
        name = source.relative_to(output)
        if source.is_file() and not source.is_symlink() and name.parts[0] not in generated:
            write_atomically(copy.directory / name, before.content(source))


def copy_figures(page: str, main: FinishedRun, copy: Run) -> None:
    """The figures that the page shows, drawn from the records where they can be."""
    facts = main.facts
    drawn = figures.draw(facts.training, facts.metrics)
    drawn |= figures.draw_inference(facts.inference, copy.read_all(copy.timing, TimingRecord))
    for link in sorted(set(FIGURE.findall(page))):
        name = Path(link).name
        source, target = main.run.figures / name, copy.figures / name
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


# ---- the table of published recipes -----------------------------------------------------------------


def page_with_table(output: Path) -> Path | None:
    """The README.md with a table that lists this folder; None for a folder elsewhere, or without such a page."""
    page = Path(README)
    if output.absolute().parent != RECIPES.absolute() or not page.is_file():
        return None
    return page if f"<!-- recipe:begin {TABLE_BLOCK} ".encode() in page.read_bytes() else None


def with_table(page: Path) -> bytes:
    """The page with the table that the records of `recipes/` beside it give; raises `UserError` for an edited table."""
    folders = published_folders(page.parent / RECIPES)
    rows = [table_row(folder) for folder in folders]
    content = table(TABLE_HEAD, rows) if rows else "No recipe is published yet."
    before = page.read_bytes().decode(errors="surrogateescape")
    return blocks.merge_blocks(before, {TABLE_BLOCK: f"\n{content}\n\n"}).encode(errors="surrogateescape")


def published_folders(recipes: Path) -> list[Path]:
    """By name; raises `UserError` for a folder that `publish` did not write."""
    folders = sorted(path for path in recipes.glob("*") if path.is_dir() and not path.name.startswith("."))
    for folder in folders:
        if Run(folder).read(PublicationRecord) is None:
            raise UserError(f"{display_path(folder)} holds no published recipe: publish it, or move it away")
    return folders


def table_row(folder: Path) -> tuple[str, ...]:
    """A recipe in one line, from its records."""
    facts = load(Run(folder), "")
    evaluation, training, data = facts.evaluation, facts.training, facts.preprocessing
    if evaluation is None or training is None or data is None or facts.publication is None:
        raise UserError(f"{display_path(folder)} lacks a record: publish it again")
    artefacts, weights = facts.publication.artefacts, code(training.outputs["weights"][:12])
    return (
        f"[{text(facts.name)}]({RECIPES.name}/{folder.name}/{README})",
        text(data.data_set),
        accuracy(evaluation.correct_top1, evaluation.images),
        accuracy(evaluation.correct_top5, evaluation.images),
        runs_and_spread(facts),
        code(evaluation.protocol.name),
        hardware(training.provenance.hardware),
        f"[{weights}]({artefacts})" if artefacts else weights,
    )


def runs_and_spread(facts: RunData) -> Markdown:
    """How many runs there are, and how far they are apart."""
    top1 = seeds_top1(facts)
    if top1 is None:
        return Markdown("1, spread unknown")
    return Markdown(f"{top1[0]} seeds, top-1 {percent(top1[1])} ± {percent(top1[2])} (mean ± standard deviation)")
