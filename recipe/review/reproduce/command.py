"""`reproduce`: run a recipe again from its document alone, and judge each of its claims.

The document may come from anybody. Only its one JSON block is read. The configuration is checked value by value, paths
come from this machine, and the stages are this project's own functions. No command, address or path of the document is
used. Before anything runs, the differences from this checkout are shown and the user is asked.
"""

from __future__ import annotations

import hashlib
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import torchvision
from torchvision.models import list_models

from recipe.config.schema import Config, Source
from recipe.data.manifest import copy_record, manifest_sha256
from recipe.distributed import launch
from recipe.document.render import write_document
from recipe.document.run_data import load
from recipe.errors import UserError
from recipe.preprocessing.pipeline import preprocess
from recipe.review.opening import open_recipe
from recipe.review.reproduce.adapt import AdaptedConfig, adapt_to_machine, changed_words, checkout_differences
from recipe.review.reproduce.judge import DIFFERS, judge_claims, overall_verdict, reproduction_page
from recipe.review.reproduce.parse import ClaimedData, Recipe, parse_config, parse_recipe, shown
from recipe.run.directory import Run, append_to_journal
from recipe.run.environment import machine
from recipe.run.files import display_path, portable_path, write_atomically
from recipe.run.launcher import launched
from recipe.run.provenance import Stage
from recipe.run.records import ReproductionRecord
from recipe.stages.evaluate import evaluate_run
from recipe.stages.serialize import serialize_run
from recipe.training.loop import train

CLAIMS = {"preprocess": "data", "train": "training", "evaluate": "evaluation", "serialize": "serialization"}  # by stage
DOCUMENT_HASH_FILE = "reproduces"  # in the run directory: the SHA-256 of the document
REPORT = "reproduction.md"
RUN_NAME_DIGITS = 12  # of that hash


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", help="a recipe document, or the folder of a run or of a published recipe")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--raw-dir", help="the folder of the raw data (the demo draws its own)")
    parser.add_argument("--data-dir", help="the preprocessed data set, or a folder for it (default: in the run)")
    parser.add_argument("--run-dir", help="a new folder (default: runs/reproduction-<hash of the document>)")
    parser.add_argument("--weights", help="the file of initial weights, if the recipe starts from one")
    parser.add_argument(
        "--stages", nargs="+", choices=CLAIMS, help="stages to run (default: all that the recipe claims)"
    )


def run(arguments: Namespace) -> int:
    """1: a claim is wrong, else 0."""
    if launched().is_elastic:
        raise UserError("reproduce starts its own processes: run it without torchrun")
    plan = plan_reproduction(arguments)
    _show(plan)
    _ask(plan, arguments)
    record = run_plan(plan)
    for claim in record.claims:
        print(f"{claim.level:<24}  {claim.claim}: {shown(claim.why, 300)}")
    print(f"wrote {display_path(plan.run_dir / REPORT)}")
    print(shown(record.verdict, 500))
    return 1 if any(claim.level == DIFFERS for claim in record.claims) else 0


@dataclass(frozen=True)
class ReproductionPlan:
    """Every decision, made before anything is written."""

    document: Path
    document_sha256: str
    recipe: Recipe
    adapted: AdaptedConfig
    stages: list[str]
    differences: list[str]
    data: str  # where it comes from, in words

    @property
    def config(self) -> Config:
        return self.adapted.config

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)


# ---- before the work ----------------------------------------------------------------------------------


def plan_reproduction(arguments: Namespace) -> ReproductionPlan:
    """Read the document and decide. Raises `UserError` for everything that would stop the work later."""
    subject = open_recipe(arguments.path)
    if subject.document_path is None or subject.document is None:
        raise UserError(f"{subject.name} has no document; give recipe.md or README.md")
    identity = subject.required_block()
    recipe, config = parse_recipe(identity), parse_config(identity)
    check_known_network(config)
    digest = hashlib.sha256(subject.document.encode()).hexdigest()
    run_dir = chosen_run_dir(arguments.run_dir, digest)
    stages = chosen_stages(arguments.stages, recipe)
    data_dir, raw_dir, words = chosen_data(arguments, config, claimed_data(recipe), run_dir, stages)
    config = replace(config, model=replace(config.model, weights=chosen_weights(arguments.weights, config)))
    return ReproductionPlan(
        document=subject.document_path,
        document_sha256=digest,
        recipe=recipe,
        adapted=adapt_to_machine(config, recipe, run_dir, data_dir, raw_dir),
        stages=stages,
        differences=checkout_differences(config, recipe),
        data=words,
    )


def check_known_network(config: Config) -> None:
    """Raise `UserError` for a network that does not exist, before the data are made."""
    if config.model.name != "small" and config.model.name not in list_models(module=torchvision.models):
        raise UserError(f"model.name={shown(config.model.name)} is not a network of this version of torchvision")


def chosen_run_dir(asked: str | None, digest: str) -> Path:
    """A new folder, or that of an unfinished reproduction of this document."""
    run_dir = Path(asked or Path("runs", f"reproduction-{digest[:RUN_NAME_DIGITS]}"))
    if not run_dir.exists():
        return run_dir
    document_hash = run_dir / DOCUMENT_HASH_FILE
    if not document_hash.is_file() or document_hash.read_text(errors="replace").strip() != digest:
        if run_dir.is_dir() and not any(run_dir.iterdir()):
            return run_dir
        raise UserError(
            f"{display_path(run_dir)} is not a reproduction of this document; give a new folder as --run-dir"
        )
    if Run(run_dir).read(ReproductionRecord) is not None:
        raise UserError(
            f"{display_path(run_dir)} has a finished reproduction of this document, see {REPORT} in it; to do it "
            "again, give a new folder as --run-dir"
        )
    return run_dir


def chosen_stages(asked: list[str] | None, recipe: Recipe) -> list[str]:
    """The stages that were asked for, else those that the recipe claims, in their order."""
    claimed = [stage for stage, claim in CLAIMS.items() if getattr(recipe.claims, claim) is not None]
    absent = [stage for stage in asked or [] if stage not in claimed]
    if absent:
        raise UserError(f"the recipe has no claims about the stage {absent[0]}: nothing to compare")
    return [stage for stage in claimed if asked is None or stage in asked]


def claimed_data(recipe: Recipe) -> ClaimedData:
    if recipe.claims.data is None:
        raise UserError("the recipe does not say on which data set it was trained (claims.data)")
    return recipe.claims.data


def chosen_data(
    arguments: Namespace, config: Config, claimed: ClaimedData, run_dir: Path, stages: list[str]
) -> tuple[Path, Path | None, str]:
    """(processed folder, raw folder, words): the recipe's data set if it is here, else a folder to make it in."""
    known = [Path(arguments.data_dir)] if arguments.data_dir else [run_dir / "data", Path("data", config.data.name)]
    for directory in known:
        try:
            is_the_recipes = manifest_sha256(directory) == claimed.manifest_sha256
        except (UserError, OSError):
            is_the_recipes = False
        if is_the_recipes:
            return directory, None, f"{display_path(directory)} has the recipe's manifest"
    if "preprocess" not in stages:
        raise UserError(
            f"no data set with the manifest {claimed.manifest_sha256[:16]} was found (looked in "
            f"{', '.join(display_path(directory) for directory in known)}): give --data-dir, or the stage "
            "preprocess too"
        )
    if arguments.raw_dir is None and config.data.source is not Source.demo:
        expected = ", ".join(
            f"{split.images:,} images of {shown(name)} with the hash {split.raw_sha256[:16]}"
            for name, split in claimed.splits.items()
        )
        raise UserError(
            f"the recipe was trained on {shown(claimed.data_set)} ({expected}), which was not found: give the folder "
            "of the raw data as --raw-dir, or the preprocessed data set as --data-dir"
        )
    raw_dir = Path(arguments.raw_dir) if arguments.raw_dir else run_dir / "raw"
    words = "drawn" if arguments.raw_dir is None else f"from {display_path(raw_dir)}"
    return known[0], raw_dir, f"{words}, into {display_path(known[0])}"


def chosen_weights(asked: str | None, config: Config) -> str | None:
    """The file of initial weights. Training compares its hash with the recipe's."""
    if config.model.weights_sha256 is not None and asked is None:
        raise UserError(
            f"the recipe starts from the weights {shown(config.model.weights_sha256)}: give their file as --weights"
        )
    if config.model.weights_sha256 is None and asked is not None:
        raise UserError("--weights was given, but the recipe starts from random weights")
    return asked


def _show(plan: ReproductionPlan) -> None:
    recipe = plan.recipe
    print(f"document     {display_path(plan.document)}, SHA-256 {plan.document_sha256}")
    print(f"recipe       {plan.config.name}, recipe_id {recipe.recipe_id[:16]}, seed {plan.config.seed}")
    epochs, batch_size = plan.config.optimization.epochs, plan.config.optimization.batch_size
    work = f"{epochs} epochs, batches of {batch_size} images of {plan.config.augmentation.crop_pixels} pixels"
    print(f"stages       {', '.join(plan.stages)}; {work}")
    print(f"data         {plan.data}")
    print(f"run_dir      {display_path(plan.run_dir)}")
    print("machine      " + ", ".join(f"{name} {value}" for name, value in plan.adapted.machine.items()))
    for heading, lines in (
        ("not as it was there", plan.adapted.notes),
        ("differs from this checkout", plan.differences),
    ):
        if lines:
            print(f"{heading}:")
            print("\n".join(f"  - {shown(line, 400)}" for line in lines))
    sys.stdout.flush()


def _ask(plan: ReproductionPlan, arguments: Namespace) -> None:
    """Raise `UserError` unless the user agrees."""
    if arguments.yes:
        return
    if not sys.stdin.isatty():
        raise UserError("cannot ask without a terminal: read the lines above, then add --yes")
    if input("Run it? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("not run")


# ---- the work -----------------------------------------------------------------------------------------


def run_plan(plan: ReproductionPlan) -> ReproductionRecord:
    run = Run(plan.run_dir)
    write_atomically(run.directory / DOCUMENT_HASH_FILE, f"{plan.document_sha256}\n".encode())
    stage = Stage(run.directory)
    for name in plan.stages:
        print(f"--- {name}", flush=True)
        run_stage(name, plan, run)
        if name != plan.stages[-1]:
            write_document(run, portable_path(run.directory))
    record = judge_run(plan, run, stage)
    write_atomically(run.directory / REPORT, reproduction_page(record).encode())
    run.write(record)
    write_document(run, portable_path(run.directory))
    return record


def run_stage(name: str, plan: ReproductionPlan, run: Run) -> None:
    if name == "preprocess":
        _preprocess(plan, run)
    elif name == "train":
        launch(train, plan.config)
    elif name == "evaluate":
        launch(evaluate_run, plan.config)
    else:
        serialize_run(plan.config)


def _preprocess(plan: ReproductionPlan, run: Run) -> None:
    """Make the data set unless it is here. Raises `UserError` for one of other images, before hours of training."""
    config = plan.config
    if config.data.raw_dir is None:
        return
    append_to_journal(run, "preprocess", "started", name=config.name)
    record = preprocess(config)
    copy_record(run, Path(config.data.directory), record)
    append_to_journal(run, "preprocess", "ended", name=config.name, manifest=record.outputs["manifest"])
    for name, split in claimed_data(plan.recipe).splits.items():
        found = record.splits.get(name)
        if found is None or found.raw_sha256 != split.raw_sha256:
            was = f"{found.images:,} images with the hash {found.raw_sha256[:16]}" if found else "nothing"
            raise UserError(
                f"the raw data are not the recipe's: {shown(name)} should be {split.images:,} images with the hash "
                f"{split.raw_sha256[:16]}, found {was}; give the right folder as --raw-dir, and a new --run-dir"
            )


def judge_run(plan: ReproductionPlan, run: Run, stage: Stage) -> ReproductionRecord:
    facts = load(run, portable_path(run.directory))
    training = facts.training
    changed = changed_words(plan.recipe.determinism_context, training.determinism_context) if training else []
    claims = judge_claims(plan.recipe, facts, changed)
    return ReproductionRecord(
        document_sha256=plan.document_sha256,
        name=plan.config.name,
        recipe_id=plan.recipe.recipe_id,
        config_sha256=plan.recipe.config_sha256,
        provenance=stage.finish(training.provenance.hardware if training else machine()),
        machine=plan.adapted.machine,
        checkout=plan.differences,
        determinism_context=changed,
        stages=plan.stages,
        claims=claims,
        verdict=overall_verdict(claims),
    )
