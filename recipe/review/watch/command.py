"""`watch`: is a run on track? As a verb, and after each validation of a training with `reference=RECIPE`.

The run is compared with seeds of the same recipe at every epoch that it has completed. Exit codes: 0 ON TRACK, 1 OFF
TRACK, 3 CANNOT TELL, 2 for two that cannot be compared. `--save FILE` writes the epochs of these seeds, no means, into
one file for `--against` and `reference=`, such as `records/seeds.json` of a published recipe.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from recipe.config.schema import Config
from recipe.errors import UserError
from recipe.review.findings import CANNOT_TELL
from recipe.review.watch.reference import check_same_settings, open_reference, open_watched, phases_of, watched_run
from recipe.review.watch.report import Watch, as_json_line, as_text, in_short
from recipe.review.watch.statistics import ALPHA, OFF_TRACK, ON_TRACK
from recipe.run.directory import Run
from recipe.run.files import display_path, write_atomically
from recipe.run.records import to_json

EXIT_CODES = {ON_TRACK: 0, OFF_TRACK: 1, CANNOT_TELL: 3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", help="a run directory, finished or not, or a recipe")
    parser.add_argument(
        "--against",
        nargs="+",
        required=True,
        metavar="RECIPE",
        help="seeds of the same recipe: runs, published recipes, seeds.json files",
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="write these seeds into one file, .json")
    parser.add_argument("--alpha", type=float, default=ALPHA, help=f"family-wise error, default {ALPHA}")
    parser.add_argument("--follow", type=float, metavar="SECONDS", help="look again until the run ends or is off track")
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each look")


def run(arguments: argparse.Namespace) -> int:
    """Print the verdict and return its exit code. Without a run, only save the seeds."""
    if arguments.run is None and arguments.save is None:
        raise UserError("give a run to watch, or --save FILE to write the seeds of --against into one file")
    if not 0 < arguments.alpha < 1:
        raise UserError(f"--alpha {arguments.alpha} is invalid: must be between 0 and 1")
    if arguments.follow is not None and not 0 < arguments.follow < float("inf"):
        raise UserError(f"--follow {arguments.follow} is invalid: must be the seconds between two looks")
    watch = Watch(open_reference(arguments.against), arguments.alpha)
    if arguments.save is not None:
        if arguments.save.suffix != ".json":
            raise UserError(f"--save {arguments.save} is invalid: must end in .json")
        write_atomically(arguments.save, to_json(watch.reference))
        if not arguments.json:
            print(f"wrote {display_path(arguments.save)}: {len(watch.reference.runs)} seeds")
    if arguments.run is None:
        return 0
    epochs, printed_epoch = len(phases_of(watch.reference)), -1
    as_output = as_json_line if arguments.json else as_text
    while True:
        watched = open_watched(arguments.run)
        judgement = watch.judge(watched)
        if judgement.epoch != printed_epoch:
            print(as_output(watch, watched, judgement), flush=True)
            printed_epoch = judgement.epoch
        if arguments.follow is None or judgement.verdict == OFF_TRACK or judgement.epoch == epochs:
            return EXIT_CODES[judgement.verdict]
        time.sleep(arguments.follow)


@dataclass(frozen=True)
class TrainingWatch:
    """Prints one line after each validation of a training. It never stops a run."""

    watch: Watch

    def __call__(self, run: Run) -> None:
        """Print the verdict. An error is a warning."""
        try:
            judgement = self.watch.judge(watched_run(run))
        except Exception as error:  # hours of training are worth more than any error here
            print(f"warning: the reference cannot judge this run: {error}", file=sys.stderr, flush=True)
            return
        print(f"epoch {judgement.epoch}  {judgement.verdict}: {in_short(judgement)}", flush=True)


def training_watch(config: Config) -> TrainingWatch | None:
    """The watch of a training with a reference. Raises `UserError` if its recipe is another."""
    if config.reference is None:
        return None
    from recipe.models.build import resolve_weights  # torch, which the verb does without

    reference = open_reference([config.reference])
    check_same_settings(reference, resolve_weights(config)[0].pinned.values, None, f"the run {config.name}")
    return TrainingWatch(Watch(reference))
