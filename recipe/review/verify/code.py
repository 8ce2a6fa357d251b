"""`drift`: does this checkout still do what a recipe says? For the CI of this project.

The experiment is composed again and compared value by value. Every entry point is loaded. Then the recipe's own
configuration runs through the code of today (`trace_here`): this shows changes that no setting shows.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec

from recipe.config.compose import config_from_overrides
from recipe.config.identity import RUNTIME_KEYS, differences
from recipe.document.commands import EXPERIMENTS
from recipe.document.formatting import on_one_line
from recipe.errors import UserError
from recipe.review.check.code import SCRIPTS
from recipe.review.opening import OpenedRecipe, contradictions, dict_or_empty, open_recipe
from recipe.review.reproduce.parse import parse_config
from recipe.review.verify.trace import UNDECIDED, TraceDifference, compare_traces, stored_trace, trace_here
from recipe.run.files import CHECKOUT
from recipe.run.provenance import source_sha256

PLAIN_SETTING = re.compile(r"^[a-z_][a-z_0-9.]*=[^$]*$")  # no ++key, ~key, hydra.key, interpolation


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", help="a run, a published recipe, or its document")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: Namespace) -> int:
    """1: something has changed, else 0."""
    recipe = open_recipe(arguments.path)
    findings = list(code_differences(recipe))
    changed = sum(difference.kind != UNDECIDED for difference in findings)
    same_source = claimed_code(recipe).get("source_sha256") == source_sha256()
    if arguments.json:
        print(json.dumps({"same_source": same_source, "findings": msgspec.to_builtins(findings)}, indent=2))
        return int(changed > 0)
    for difference in findings:
        print(on_one_line(f"{difference.kind}: {difference.line()}"))
    print(f"{changed} findings; this checkout is {'the' if same_source else 'not the'} source of the recipe")
    return int(changed > 0)


def code_differences(recipe: OpenedRecipe) -> Iterator[TraceDifference]:
    """Every difference between the recipe and this checkout."""
    block = recipe.required_block()
    config = parse_config(block)
    for line in contradictions(block):
        yield TraceDifference("the document", line, "another one")
    yield from load_failures()
    yield from config_changes(recipe, config.pinned.values)
    stored = stored_trace(recipe)
    yield from compare_traces(stored, trace_here(recipe))


def config_changes(recipe: OpenedRecipe, config: dict[str, Any]) -> Iterator[TraceDifference]:
    """The experiment of the recorded command, composed from the files of today, beside the recipe's configuration."""
    settings, swept = recorded_settings(recipe)
    has_experiment = any(word.startswith("experiment=") for word in settings)
    if not has_experiment and (EXPERIMENTS / f"{config['name']}.yaml").is_file():
        settings = [f"experiment={config['name']}", *settings]
    try:
        here = config_from_overrides(settings)
    except UserError as error:
        yield TraceDifference("the recorded command", shlex.join(settings), f"refused: {error}")
        return
    model = replace(here.model, weights_sha256=config["model"]["weights_sha256"])  # of a file that conf/ does not name
    for line in differences(config, replace(here, model=model).pinned.values):
        key, _, change = line.partition(": ")
        if key not in swept:
            theirs, _, ours = change.partition(" -> ")
            yield TraceDifference(f"configuration {key}", theirs, ours)


def recorded_settings(recipe: OpenedRecipe) -> tuple[list[str], set[str]]:
    """The settings of the recorded training command, without facts of the machine, and the keys that it swept over.

    The command may come from anybody. The value of a swept key, such as seed=1,2,3, is in the configuration.
    """
    command = claimed_code(recipe).get("command")
    try:
        words = shlex.split(command) if isinstance(command, str) else []
    except ValueError:
        return [], set()
    values = {word: word.partition("=") for word in words if PLAIN_SETTING.match(word) and not word.startswith("hydra")}
    settings = {word: (key, value) for word, (key, _, value) in values.items() if key not in RUNTIME_KEYS}
    swept = {key for key, value in settings.values() if "," in value and value[0] not in "[{"}
    return [word for word, (key, _) in settings.items() if key not in swept], swept


def claimed_code(recipe: OpenedRecipe) -> dict[str, Any]:
    return dict_or_empty(recipe.required_block().get("code"))


def load_failures() -> Iterator[TraceDifference]:
    """Entry points that do not load: that of the founding example could not be compiled."""
    for script in SCRIPTS:
        try:
            specification = importlib.util.spec_from_file_location(script.removesuffix(".py"), CHECKOUT / script)
            assert specification is not None
            assert specification.loader is not None
            specification.loader.exec_module(importlib.util.module_from_spec(specification))
        except Exception as error:  # a script may raise anything
            yield TraceDifference(f"entry point {script}", "loads", f"{type(error).__name__}: {error}")
