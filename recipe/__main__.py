"""The command line for recipes: python -m recipe check runs/demo, or, installed, recipe check runs/demo.

Each verb is a module with `add_arguments(parser)` and `run(arguments)`, which returns the exit code: 0 if nothing was
found, 1 for a finding, 2 for an error in the arguments or the input.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from recipe.errors import DiskError
from recipe.run.terminal import output_failure, protect_streams, report_user_errors

VERBS: dict[str, tuple[str, str]] = {
    "check": ("recipe.review.check.command", "check that a recipe is complete and does not contradict itself"),
    "drift": ("recipe.review.verify.code", "check that this checkout still trains as the recipe's code did"),
    "verify": (
        "recipe.review.verify.command",
        "check that the files belong together and that this code trains as the recipe's code did",
    ),
    "diff": (
        "recipe.review.diff.command",
        "compare two recipes, the likeliest causes of another accuracy first",
    ),
    "watch": ("recipe.review.watch.command", "compare a run with seeds of the same recipe while it trains"),
    "reproduce": ("recipe.review.reproduce.command", "run a recipe again from its document and judge its claims"),
    "doctor": ("recipe.stages.doctor", "measure what bounds the speed of an experiment on this machine"),
    "publish": (
        "recipe.document.publish",
        "write a run's recipe as a folder to commit: page, model card, records and a row in README.md",
    ),
}
PROGRAM = "python -m recipe"


def main(words: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    protect_streams(patience_seconds=None)  # the output is the result of the command
    with report_user_errors():
        arguments = _parse_arguments(sys.argv[1:] if words is None else list(words))
        code = int(importlib.import_module(VERBS[arguments.verb][0]).run(arguments))
        failure = output_failure()
        if failure is not None and not isinstance(failure, BrokenPipeError):  # `| head` has read enough
            raise DiskError(f"the output could not be written: {failure.strerror}")
        return code


def _parse_arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(PROGRAM, description="Check, compare, reproduce and publish recipes.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    asked = words[0] if words else None
    for verb, (module, line) in VERBS.items():
        described = verbs.add_parser(verb, help=line, description=line)
        if verb == asked:  # the other modules are not imported: several of them load torch
            importlib.import_module(module).add_arguments(described)
    return parser.parse_args(words)


def console() -> None:
    raise SystemExit(main())


if __name__ == "__main__":
    console()
