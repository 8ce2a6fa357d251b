"""Is this run on track? `python -m recipe watch RUN --against RECIPE ...`, and `reference=RECIPE` while training.

The run is compared with seeds of the same recipe at every epoch that it has completed. Exit codes: 0 ON TRACK, 1 OFF
TRACK, 3 CANNOT TELL, 2 where the two cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

from recipe.config.schema import Config
from recipe.errors import UserError
from recipe.review.watch.reference import open_reference, open_watched, phases_of, refuse_differences, watched_run
from recipe.review.watch.report import Watch, as_json, as_text, in_short
from recipe.review.watch.statistics import ALPHA, CANNOT_TELL, FEWEST_SEEDS, METRICS, OFF_TRACK, ON_TRACK
from recipe.run import Run

EXIT_CODES = {ON_TRACK: 0, OFF_TRACK: 1, CANNOT_TELL: 3}


def describe(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("run", help="a run directory, finished or not; or a recipe")
    parser.add_argument(
        "--against",
        nargs="+",
        required=True,
        metavar="RECIPE",
        help="seeds of the same recipe: runs, published recipes, files of dynamics",
    )
    parser.add_argument("--alpha", type=float, default=ALPHA, help=f"family-wise error, default {ALPHA}")
    parser.add_argument(
        "--prior-sd",
        action="append",
        default=[],
        metavar="METRIC=SD",
        help=f"a declared sd, used where there are fewer than {FEWEST_SEEDS} seeds; metrics: {', '.join(METRICS)}",
    )
    parser.add_argument("--follow", type=float, metavar="SECONDS", help="look again until it ends or is off track")
    parser.add_argument("--json", action="store_true", help="for programs: one line of JSON for each look")


def answer(arguments: argparse.Namespace) -> int:
    """Print the verdict; returns its exit code."""
    if not 0 < arguments.alpha < 1:
        raise UserError(f"--alpha {arguments.alpha} cannot be: an error is between 0 and 1")
    if arguments.follow is not None and not 0 < arguments.follow < float("inf"):
        raise UserError(f"--follow {arguments.follow} cannot be: give the seconds between two looks")
    watch = Watch(open_reference(arguments.against), arguments.alpha, dict(map(prior, arguments.prior_sd)))
    epochs = len(phases_of(watch.reference))
    shown_epoch = -1
    while True:
        watched = open_watched(arguments.run)
        judgement = watch.judge(watched)
        if judgement.epoch != shown_epoch:
            print(
                as_json(watch, watched, judgement) if arguments.json else as_text(watch, watched, judgement), flush=True
            )
            shown_epoch = judgement.epoch
        if arguments.follow is None or judgement.verdict == OFF_TRACK or judgement.epoch == epochs:
            return EXIT_CODES[judgement.verdict]
        time.sleep(arguments.follow)


def prior(word: str) -> tuple[str, float]:
    """`validation_top1=0.001` as a metric and its standard deviation."""
    name, _, value = word.partition("=")
    try:
        sd = float(value)
    except ValueError:
        sd = 0.0
    if name not in METRICS or not 0 < sd < float("inf"):
        raise UserError(
            f"--prior-sd {word} cannot be: give METRIC=SD, a positive number for one of {', '.join(METRICS)}"
        )
    return name, sd


@dataclass(frozen=True)
class TrainingWatch:
    """What `reference=` adds to training: one line after each validation. It never stops a run."""

    watch: Watch

    def __call__(self, run: Run) -> None:
        """Say how the run goes; what goes wrong here is said and costs nothing."""
        try:
            watched = watched_run(run)
            judgement = self.watch.judge(watched)
        except Exception as error:  # whatever it is, hours of training are worth more
            print(f"warning: the reference cannot judge this run: {error}", file=sys.stderr, flush=True)
            return
        print(f"epoch {judgement.epoch}  {judgement.verdict}: {in_short(judgement)}", flush=True)


def training_watch(config: Config) -> TrainingWatch | None:
    """The collaborator of a training with a reference; raises `UserError` before any work where it is of no use."""
    if config.reference is None:
        return None
    from recipe.model import with_known_weights  # torch, which the verb does without

    reference = open_reference([config.reference])
    refuse_differences(reference, with_known_weights(config).pinned.values, None, f"the run {config.name}")
    return TrainingWatch(Watch(reference))
