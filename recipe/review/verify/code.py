"""Does this checkout still do what the recipe says? For the project's own CI, on the day that it no longer does.

The experiment is composed anew and compared value by value; then the recipe's own configuration runs through today's
code for ten small steps (`recipe.training.fingerprint`), so that a change of code shows where no setting changed.
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

from recipe.config.compose import config_from_overrides
from recipe.config.identity import RUNTIME_KEYS, differences
from recipe.document.commands import EXPERIMENTS
from recipe.document.formatting import on_one_line
from recipe.errors import UserError
from recipe.provenance import source_sha256
from recipe.records import Fingerprint
from recipe.review.check.code import SCRIPTS
from recipe.review.opening import Subject, contradictions, open_subject
from recipe.review.reproduce.parse import parse_config
from recipe.review.verify.trace import CANNOT_TELL, Difference, compared, stored_fingerprint
from recipe.run import CHECKOUT
from recipe.training.fingerprint import take_fingerprint

LARGEST_COUNT = 10**8
PLAIN_SETTING = re.compile(r"^[a-z_][a-z_0-9.]*=[^$]*$")  # no ++key, ~key, hydra.key, interpolation


def describe(parser: ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("path", help="a run, a published recipe, or its document")
    parser.add_argument("--json", action="store_true", help="for programs")


def answer(arguments: Namespace) -> int:
    """Compare; 1 where something has changed."""
    subject = open_subject(arguments.path)
    found = list(drifted(subject))
    changed = [difference for difference in found if difference.kind != CANNOT_TELL]
    same_source = code_of(subject).get("source_sha256") == source_sha256()
    if arguments.json:
        rows = [vars(difference) for difference in found]
        print(json.dumps({"same_source": same_source, "findings": rows}, indent=2))
        return int(bool(changed))
    for difference in found:
        print(on_one_line(f"{difference.kind}: {difference.line()}"))
    source = "the very source of the recipe" if same_source else "other source than the recipe's"
    print(f"{len(changed)} findings; this checkout is {source}")
    return int(bool(changed))


def drifted(subject: Subject) -> Iterator[Difference]:
    """Every difference between the recipe and this checkout."""
    config = parse_config(subject.claims())
    for line in contradictions(subject.claims()):
        yield Difference("the document", line, "another one")
    yield from unimportable()
    yield from recomposed(subject, config.pinned.values)
    stored = stored_fingerprint(subject)
    yield from compared(stored, fingerprint_here(subject))


def fingerprint_here(subject: Subject) -> Fingerprint:
    """The recipe's configuration through this checkout's code."""
    claims = subject.claims().get("claims")
    training, data = (claims.get("training"), claims.get("data")) if isinstance(claims, dict) else (None, None)
    steps_per_epoch = counted(subject, training, "steps_per_epoch")
    classes = counted(subject, data, "classes")
    return take_fingerprint(parse_config(subject.claims()), steps_per_epoch, classes)


def counted(subject: Subject, claims: Any, name: str) -> int:
    """A claimed number that shapes what is computed."""
    value = claims.get(name) if isinstance(claims, dict) else None
    if type(value) is not int or not 1 <= value <= LARGEST_COUNT:
        raise UserError(
            f"{subject.name} claims {name}={value!r:.100}, which must be a number from 1 to {LARGEST_COUNT}"
        )
    return value


def recomposed(subject: Subject, recipe: dict[str, Any]) -> Iterator[Difference]:
    """The recorded command's experiment, composed from today's files."""
    words = recorded_overrides(subject)
    if not any(word.startswith("experiment=") for word in words):
        words = (
            [f"experiment={recipe['name']}", *words] if (EXPERIMENTS / f"{recipe['name']}.yaml").is_file() else words
        )
    try:
        here = config_from_overrides(words)
    except UserError as error:
        yield Difference("the recorded command", shlex.join(words), f"refused: {error}")
        return
    model = replace(here.model, weights_sha256=recipe["model"]["weights_sha256"])  # of a file that conf/ does not name
    here = replace(here, model=model)
    swept = swept_keys(subject)
    for line in differences(recipe, here.pinned.values):
        key, _, change = line.partition(": ")
        if key in swept:
            continue
        theirs, _, ours = change.partition(" -> ")
        yield Difference(f"configuration {key}", theirs, ours)


def typed_settings(subject: Subject) -> list[str]:
    """The settings of the recorded training command, facts of the machine left out; it is a stranger's text."""
    command = code_of(subject).get("command")
    try:
        words = shlex.split(command) if isinstance(command, str) else []
    except ValueError:
        return []
    settings = [word for word in words if PLAIN_SETTING.match(word) and not word.startswith("hydra")]
    return [word for word in settings if word.partition("=")[0] not in RUNTIME_KEYS]


def recorded_overrides(subject: Subject) -> list[str]:
    """Those that are not swept over."""
    return [word for word in typed_settings(subject) if word.partition("=")[0] not in swept_keys(subject)]


def swept_keys(subject: Subject) -> set[str]:
    """Keys of a multirun's command, such as seed=1,2,3: which value was this run's, its configuration says."""
    words = (word.partition("=") for word in typed_settings(subject))
    return {key for key, _, value in words if "," in value and value[0] not in "[{"}


def code_of(subject: Subject) -> dict[str, Any]:
    """What the document says of the code that trained."""
    code = subject.claims().get("code")
    return code if isinstance(code, dict) else {}


def unimportable() -> Iterator[Difference]:
    """Entry points that do not even load: the founding example's could not be compiled."""
    for script in SCRIPTS:
        try:
            specification = importlib.util.spec_from_file_location(script.removesuffix(".py"), CHECKOUT / script)
            assert specification is not None
            assert specification.loader is not None
            specification.loader.exec_module(importlib.util.module_from_spec(specification))
        except Exception as error:  # whatever stands in it
            yield Difference(f"entry point {script}", "loads", f"{type(error).__name__}: {error}")
