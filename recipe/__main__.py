"""The verbs of the document: python -m recipe check runs/demo, or, installed, recipe check runs/demo.

Each verb is a module with two functions: `add_arguments(parser)` adds its arguments, `run(arguments)` does the work and
returns the exit code. 0: nothing was found; 1: something was; 2: it could not be done, said in one sentence.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from recipe.errors import DiskError
from recipe.run.terminal import output_failure, protect_streams, report_user_errors

VERBS: dict[str, tuple[str, str]] = {
    "check": ("recipe.review.check.command", "is a recipe complete, readable and in agreement with itself?"),
    "drift": ("recipe.review.verify.code", "does this checkout still do what the recipe says?"),
    "verify": (
        "recipe.review.verify.command",
        "do the files belong together, and does this code do what the recipe's did?",
    ),
    "diff": (
        "recipe.review.diff.command",
        "the differences of two recipes, the likeliest causes of another accuracy first",
    ),
    "watch": ("recipe.review.watch.command", "is a run on track, beside seeds of the same recipe?"),
    "reproduce": ("recipe.review.reproduce.command", "run a recipe again from its document, and judge its claims"),
    "doctor": ("recipe.stages.doctor", "what bounds the speed of an experiment on this machine?"),
    "publish": (
        "recipe.document.publish",
        "write a run's recipe as a folder to commit: page, model card, records; its row in README.md",
    ),
}
PROGRAM = "python -m recipe"


def main(words: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code."""
    protect_streams(patience_seconds=None)  # a verb's output is its work
    with report_user_errors():
        arguments = _parse_arguments(sys.argv[1:] if words is None else list(words))
        code = int(importlib.import_module(VERBS[arguments.verb][0]).run(arguments))
        failure = output_failure()
        if failure is not None and not isinstance(failure, BrokenPipeError):  # `| head` has read enough
            raise DiskError(f"the answer could not be printed: {failure.strerror}")
        return code


def _parse_arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(PROGRAM, description="What a reader does with a recipe.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    asked = words[0] if words else None
    for verb, (module, line) in VERBS.items():
        described = verbs.add_parser(verb, help=line, description=line)
        if verb == asked:  # only the module that is needed: several of them load torch
            importlib.import_module(module).add_arguments(described)
    return parser.parse_args(words)


def console() -> None:
    raise SystemExit(main())


if __name__ == "__main__":
    console()
