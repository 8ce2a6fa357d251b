"""`verify`: the chain of hashes as far as the files are there, and the trace of the code, in a minute."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path

import msgspec

from recipe.config.compose import config_from_overrides
from recipe.config.schema import NAME
from recipe.document.commands import EXPERIMENTS
from recipe.document.formatting import on_one_line
from recipe.errors import UserError
from recipe.review.opening import OpenedRecipe, dict_or_empty, open_recipe
from recipe.review.verify.files import BROKEN, NOT_HERE, links
from recipe.review.verify.trace import UNDECIDED, compare_traces, stored_trace, trace_here

LEADING_DIFFERENCES = 3  # of a trace: the others follow from them


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", help="a run, a published recipe, or its document")
    parser.add_argument("--raw-dir", type=Path, help="the raw archives (default: those of the experiment)")
    parser.add_argument("--data-dir", type=Path, help="the processed data (default: those of the experiment)")
    parser.add_argument("--skip", choices=("chain", "trace"), help="the part to leave out")
    parser.add_argument("--strict", action="store_true", help="fail for files that are not here and CANNOT TELL, too")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: Namespace) -> int:
    """1: a link is broken or the trace differs, else 0."""
    recipe = open_recipe(arguments.path, warns=False)
    raw_dir, data_dir = data_places(recipe)
    skip = arguments.skip
    chain = [] if skip == "chain" else list(links(recipe, arguments.raw_dir or raw_dir, arguments.data_dir or data_dir))
    clock = time.perf_counter()
    differences = [] if skip == "trace" else compare_traces(stored_trace(recipe), trace_here(recipe))
    seconds = time.perf_counter() - clock
    changed = [difference for difference in differences if difference.kind != UNDECIDED]
    is_strict, unsure = arguments.strict, any(link.state == NOT_HERE for link in chain) or differences != changed
    code = int(bool(changed) or any(link.state == BROKEN for link in chain) or (is_strict and unsure))
    if arguments.json:
        trace = None if skip == "trace" else msgspec.to_builtins(differences)
        print(json.dumps({"chain": msgspec.to_builtins(chain), "trace": trace}, indent=2))
        return code
    for link in chain:
        print(on_one_line(link.line()))
    counts = Counter(link.state for link in chain)
    summary = ", ".join(f"{count} {state}" for state, count in counts.items())
    print(f"chain: {summary or 'a document alone: no files to compare'}")
    if skip == "trace":
        return code
    for difference in [*changed[:LEADING_DIFFERENCES], *(one for one in differences if one.kind == UNDECIDED)]:
        print(on_one_line(f"{difference.kind}: {difference.line()}"))
    if len(changed) > LEADING_DIFFERENCES:
        print(f"... and {len(changed) - LEADING_DIFFERENCES} more")
    verdict = (
        "differs: this code does not do what the recipe's did" if changed else "matches: this code does what it did"
    )
    print(f"trace {verdict} ({len(stored_trace(recipe).steps)} steps, {seconds:.0f} s)")
    return code


def data_places(recipe: OpenedRecipe) -> tuple[Path | None, Path | None]:
    """(raw, processed) data by this checkout's file of the experiment, or None."""
    name = str(dict_or_empty((recipe.block or {}).get("config")).get("name"))
    if not NAME.fullmatch(name) or not (EXPERIMENTS / f"{name}.yaml").is_file():
        return None, None
    try:
        data = config_from_overrides([f"experiment={name}"]).data
    except UserError:
        return None, None
    return (Path(data.raw_dir) if data.raw_dir else None), Path(data.directory)
