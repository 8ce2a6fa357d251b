"""python -m recipe publish RUN: a run's recipe as a folder to commit, `recipes/<name>/`, and its row in README.md.

The folder's README.md is both a page and a model card. Figures, records, the pinned configuration and the logged rows
are beside it. Weights, checkpoints and TensorBoard's events are left out. Code without a commit and stale sections are
refused, or, if allowed, named on the page.

The files are written into a new folder that replaces the published one in one step.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from recipe.config.schema import NAME
from recipe.document import blocks, figures
from recipe.document.formatting import Markdown, accuracy, code, hardware, percent, table, text, without_commit
from recipe.document.model_card import LICENCE, readme
from recipe.document.recipe_json import columns
from recipe.document.render import check_document, json_file, read_document, seeds_top1
from recipe.document.run_data import STALE, MetricRow, RunData, load, sections
from recipe.errors import UserError
from recipe.run.directory import Run
from recipe.run.files import disk_errors, display_path, portable_path, write_atomically
from recipe.run.provenance import NoCommitError, modified_files
from recipe.run.records import (
    RECORDS,
    EvaluationRecord,
    PreprocessingRecord,
    PublicationRecord,
    Record,
    SeedCounts,
    SeedRun,
    SeedsRecord,
    TimingRecord,
    TrainingRecord,
    to_json,
)

README, RECIPES = "README.md", Path("recipes")
METRIC_ROWS_MAX = 5000  # more are thinned
FIGURE = re.compile(r"\]\((figures/[^)\s]+)\)")
TABLE_BLOCK = "published_recipes"
TABLE_HEAD = ("Recipe", "Data", "Top-1 (*measured*)", "Top-5 (*measured*)", "Runs", "Protocol", "Hardware", "Weights")
NOT_SOURCE = (str(RECIPES), README)  # changed by publishing itself
LONGEST_ADDRESS = 2000
LICENCES = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")


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
        return display_path(self.run.directory)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="the directory of a run that was trained and evaluated")
    parser.add_argument("--output", help="the folder to write; recipes/<name> by default")
    parser.add_argument("--artefacts", metavar="URL", help="where weights and exported files are, https only")
    parser.add_argument("--licence", default=LICENCE, help=f"of the model, as the Hub spells it; {LICENCE} by default")
    parser.add_argument("--seeds", nargs="+", metavar="RUN", default=[], help="runs of this recipe with other seeds")
    parser.add_argument("--allow-modified", action="store_true", help="publish what did not run on a clean commit")
    parser.add_argument("--allow-stale", action="store_true", help="publish sections whose inputs have changed since")


def run(arguments: Namespace) -> int:
    output = publish(
        Run(arguments.run),
        Path(arguments.output) if arguments.output else None,
        artefacts=arguments.artefacts,
        licence=arguments.licence,
        seeds=[Run(path) for path in arguments.seeds],
        allow_modified=arguments.allow_modified,
        allow_stale=arguments.allow_stale,
    )
    files = [path for path in output.rglob("*") if path.is_file()]
    where = display_path(output)
    print(f"wrote {where}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1000:,.0f} kB")
    page = page_with_table(output)
    if page is not None:
        print(f"wrote the table of published recipes in {page}")
    print("next:")
    print(f"  git add {where}{f' {page}' if page is not None else ''}")
    print(f'  git commit -m "Publish the recipe {output.name}"')
    return 0


def publish(
    run: Run,
    output: Path | None = None,
    *,
    artefacts: str | None = None,
    licence: str = LICENCE,
    seeds: Sequence[Run] = (),
    allow_modified: bool = False,
    allow_stale: bool = False,
) -> Path:
    """Write the folder of a published recipe and its row in README.md. Raises `UserError`, with nothing written, for
    what should not be published."""
    main, others = finished_run(run), [finished_run(other) for other in seeds]
    output = output or RECIPES / main.facts.name
    check_address(artefacts)
    check_licence(licence)
    for other in others:
        check_same_recipe(main, other)
    check_own_folder(output, main)
    page = page_with_table(output)
    if page is not None:
        with_table(page)  # an edited table is refused before the work
    code = [*stage_problems(main.facts), *seed_problems(main, others), *tree_problems(NOT_SOURCE)]
    allowed = check_allowed(allow_modified, "--allow-modified", code)
    allowed += check_allowed(allow_stale, "--allow-stale", list(stale_problems(main.facts)))
    rows = main.facts.metrics
    publication = PublicationRecord(
        run_dir=main.facts.run_dir,
        artefacts=artefacts,
        allowed=allowed,
        metric_rows=len(rows),
        metric_rows_kept=len(thinned(rows)),
    )
    records = [publication, *filter(None, [published_seeds(main, others, Run(output))])]
    with replaced_folder(output) as folder:
        fill(folder, main, output, records, licence)
    if page is not None:
        write_atomically(page, with_table(page))
    return output


# ---- what is refused --------------------------------------------------------------------------------


def finished_run(run: Run) -> FinishedRun:
    """Read a run. Raises `UserError` where it is not finished, or where a generated block of its page was edited."""
    where = display_path(run.directory)
    if not run.records.is_dir():
        raise UserError(f"{where} contains no run")
    check_document(run)
    facts = load(run, portable_path(run.directory))
    if facts.publication is not None:
        raise UserError(f"{where} is a published recipe already; give the run that it was made of")
    if facts.config is None or facts.training is None or facts.preprocessing is None:
        raise UserError(f"{where} was not trained yet: run `python train.py run_dir={where}` with its experiment")
    if facts.evaluation is None:
        raise UserError(f"{where} was not evaluated yet: run `python evaluate.py run_dir={where}`")
    if not NAME.fullmatch(facts.name):
        raise UserError(f"{where} has a name that cannot name a folder")
    return FinishedRun(run, facts, facts.preprocessing, facts.training, facts.evaluation)


def check_allowed(is_allowed: bool, flag: str, problems: list[str]) -> list[str]:
    """The problems that were allowed. Raises `UserError` where there are some and they were not."""
    if problems and not is_allowed:
        raise UserError(f"not published: {'; '.join(problems)}. To publish it all the same, and say so, add {flag}")
    return problems


def stage_problems(facts: RunData) -> Iterator[str]:
    """Every stage whose code has no commit, or changed while it ran."""
    for stage, record in facts.stages():
        provenance = record.provenance
        states = (provenance.tree_at_start, provenance.tree_at_end)
        if any(state.state == "modified" or state.patch_sha256 for state in states):
            yield f"{stage} ran on a modified tree"
        else:
            unknown = (without_commit(state) for state in states if state.state not in ("clean", "untracked"))
            yield from (f"{stage} ran on code without a commit: {why}" for why in dict.fromkeys(unknown))
        if provenance.source_sha256 != provenance.source_sha256_at_end:
            yield f"the source changed during {stage}"


def tree_problems(outside: tuple[str, ...]) -> Iterator[str]:
    """The working tree now, but for `outside`."""
    try:
        modified = modified_files(outside)
    except NoCommitError as error:
        yield f"no commit names the code of this checkout: {without_commit(error.tree)}"
        return
    if modified:
        yield f"the working tree is modified now ({', '.join(modified[:3])}{', ...' if len(modified) > 3 else ''})"


def stale_problems(facts: RunData) -> Iterator[str]:
    """Sections whose inputs have changed since."""
    for name, section in sections(facts).items():
        if section.state == STALE:
            yield f"the section {name} is stale ({'; '.join(section.reasons)})"


def check_address(address: str | None) -> None:
    """An https address without credentials, in one word."""
    if address is None:
        return
    try:
        parts = urlsplit(address) if address.isprintable() and len(address) <= LONGEST_ADDRESS else None
    except ValueError:
        parts = None
    if parts is None or parts.scheme != "https" or not parts.hostname or re.search(r'[\s<>"`\\|()\[\]]', address):
        raise UserError(f"--artefacts {address!r} cannot be: it must be an address that begins with https://")
    if "@" in parts.netloc:
        raise UserError("--artefacts contains a user name or a password: leave it out, the page is for everyone")


def check_licence(licence: str) -> None:
    """A name as the Hub spells licences."""
    if not LICENCES.fullmatch(licence):
        raise UserError(f"--licence {licence!r} cannot be: it must be a name of the Hub's list, such as {LICENCE}")


def check_own_folder(output: Path, main: FinishedRun) -> None:
    """A new folder, an empty one, or a published recipe of the same recipe_id."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    before = Run(output)
    is_published = output.is_dir() and before.read(PublicationRecord) is not None
    training = before.read(TrainingRecord) if is_published else None
    if training is None:
        raise UserError(f"{display_path(output)} is there and contains no published recipe; give another --output")
    if training.recipe_id != main.training.recipe_id:
        raise UserError(
            f"{display_path(output)} contains another recipe (recipe_id {training.recipe_id[:16]}, this run's is "
            f"{main.training.recipe_id[:16]}); give another --output"
        )


# ---- several seeds ----------------------------------------------------------------------------------


def check_same_recipe(main: FinishedRun, other: FinishedRun) -> None:
    """A run that differs in its seed only, measured in the same way. Raises `UserError` for any other."""
    for what, theirs, ours in (
        ("recipe_id", other.training.recipe_id, main.training.recipe_id),
        ("data set", other.training.inputs.get("manifest"), main.training.inputs.get("manifest")),
        ("protocol", other.evaluation.protocol.name, main.evaluation.protocol.name),
    ):
        if theirs != ours:
            raise UserError(f"{other.where} has another {what} than the run to publish ({theirs}, not {ours})")
    for problem in stale_problems(other.facts):
        raise UserError(f"{other.where}: {problem}")


def seed_problems(main: FinishedRun, others: Sequence[FinishedRun]) -> Iterator[str]:
    """Runs of other seeds that were trained by other code, or by code without a commit."""
    for other in others:
        if other.training.provenance.source_sha256 != main.training.provenance.source_sha256:
            yield f"{other.where} was trained by other code"
        for problem in stage_problems(other.facts):
            yield f"{other.where}: {problem}"


def published_seeds(main: FinishedRun, others: Sequence[FinishedRun], published: Run) -> SeedsRecord | None:
    """All runs of the recipe by seed, `main` among them. Where none are given, those that were published before."""
    if not others:
        before = published.read(SeedsRecord)
        if before is not None and seeds_record([main]).runs[0] not in before.runs:
            raise UserError(
                f"{display_path(published.directory)} gives {len(before.runs)} seeds, and this run is none of them: "
                "name them again with --seeds"
            )
        return before
    entries = sorted((main, *others), key=lambda entry: entry.training.seed)
    seeds = [entry.training.seed for entry in entries]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds: each run must have a seed of its own, found {', '.join(map(str, seeds))}")
    return seeds_record(entries)


def seeds_record(entries: Sequence[FinishedRun]) -> SeedsRecord:
    first = entries[0]
    return SeedsRecord(
        recipe_id=first.training.recipe_id,
        config={key: value for key, value in (first.facts.config or {}).items() if key != "seed"},
        steps_per_epoch=first.training.schedule.steps_per_epoch,
        runs=[
            SeedRun(
                seed=entry.training.seed,
                weights_sha256=entry.evaluation.inputs["weights"],
                source_sha256=entry.training.provenance.source_sha256,
                batch_norm_batch_size=entry.training.loader.batch_norm_batch_size,
                raw_sha256={name: split.raw_sha256 for name, split in entry.data.splits.items()},
                epochs=columns(entry.training.epochs),
            )
            for entry in entries
        ],
        evaluation=SeedCounts(
            protocol=first.evaluation.protocol.name,
            images=first.evaluation.images,
            correct_top1=[entry.evaluation.correct_top1 for entry in entries],
            correct_top5=[entry.evaluation.correct_top5 for entry in entries],
        ),
    )


# ---- the folder -------------------------------------------------------------------------------------


@contextmanager
def replaced_folder(output: Path) -> Iterator[Path]:
    """A folder to fill. When the block ends without an error it takes the place of `output`, else nothing changes."""
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
    """All files of the published recipe. The page is rendered from the records that were copied."""
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
    copy_figures(page, published, main, copy)


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


def copy_figures(page: str, facts: RunData, main: FinishedRun, copy: Run) -> None:
    """The figures that the page shows, drawn from the published records where they can be."""
    drawn = figures.draw(facts)
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
    """The rows. Of more than `METRIC_ROWS_MAX` only the last of training and of validation in each epoch."""
    if len(rows) <= METRIC_ROWS_MAX:
        return list(rows)
    last = {(row["epoch"], row["split"]): row for row in rows}
    return list(last.values())


def metric_lines(rows: Sequence[MetricRow]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# ---- the table of published recipes -----------------------------------------------------------------


def page_with_table(output: Path) -> Path | None:
    """The README.md with a table that lists this folder; None for a folder elsewhere, or without such a page."""
    page = Path(README)
    if output.absolute().parent != RECIPES.absolute() or not page.is_file():
        return None
    return page if f"<!-- recipe:begin {TABLE_BLOCK} ".encode() in page.read_bytes() else None


def with_table(page: Path) -> bytes:
    """The page with the table that the records of `recipes/` beside it give. Raises `UserError` for an edited table."""
    folders = published_folders(page.parent / RECIPES)
    rows = [table_row(folder) for folder in folders]
    content = table(TABLE_HEAD, rows) if rows else "No recipe is published yet."
    before = page.read_bytes().decode(errors="surrogateescape")
    return blocks.merge_blocks(before, {TABLE_BLOCK: f"\n{content}\n\n"}).encode(errors="surrogateescape")


def published_folders(recipes: Path) -> list[Path]:
    """By name. Raises `UserError` for a folder that `publish` did not write."""
    folders = sorted(path for path in recipes.glob("*") if path.is_dir() and not path.name.startswith("."))
    for folder in folders:
        if Run(folder).read(PublicationRecord) is None:
            raise UserError(f"{display_path(folder)} contains no published recipe: publish it, or move it away")
    return folders


def table_row(folder: Path) -> tuple[str, ...]:
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
