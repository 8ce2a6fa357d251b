"""Level *resolvable*: the code and the commands that the records name.

A commit that this history does not have is not a finding: the clone may be shallow, the commit squashed or rebased. The
hash of the source identifies the code then.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

from recipe.config.identity import flatten
from recipe.config.schema import schema_keys
from recipe.document.run_data import RunData, source_changed
from recipe.errors import UserError
from recipe.review.findings import Finding, Kind, Level, first_few, shorten
from recipe.run import provenance
from recipe.run.directory import Run
from recipe.run.provenance import SOURCES, NoCommitError, committed_files, contents, sha256_of_sources, source_sha256
from recipe.run.records import STAGES, Provenance

SHA1 = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
SCRIPTS = tuple(program for program in STAGES.values() if program.endswith(".py"))
MODULES = tuple(program for program in STAGES.values() if program not in SCRIPTS)
REPRODUCE = ["-m", "recipe", "reproduce"]
OVERRIDE = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[A-Za-z_][\w./@:-]*)(?P<equals>=)?")
SHELL = re.compile(r"[;|&<>`\n]|\$\(")  # outside quotes, in a command that should only start one program


# Code


def code_findings(facts: RunData, run: Run) -> list[Finding]:
    """For every stage: the same code from start to end, identified by a commit, a patch or at least its hash."""
    findings: list[Finding] = []
    for name, record in facts.stages():
        place, provenance = f"records/{name}.json, provenance", record.provenance
        source = provenance.source_sha256
        if source_changed(provenance):
            what = "the source changed during the stage, so the code of its result is unknown"
            findings.append(Finding(Level.resolvable, place, what, "run the stage again; do not edit code meanwhile"))
        if not SHA256.fullmatch(source):
            what = f"source_sha256 {shorten(source)} is not a SHA-256: the code is not identified"
            findings.append(Finding(Level.well_formed, place, what, "run the stage again"))
        patch = provenance.tree_at_start.patch_sha256
        findings += patch_findings(patch, run) if patch else commit_findings(place, provenance)
    return list(dict.fromkeys(findings))


def patch_findings(patch: str, run: Run) -> list[Finding]:
    """The patch of a modified tree is there with its hash."""
    name = f"records/patches/{patch[:16]}.patch"
    mend = "take the file from where the run was made; without it the code of this stage is lost"
    if not SHA256.fullmatch(patch):
        return [Finding(Level.well_formed, name, f"{shorten(patch)} is not a SHA-256", mend)]
    path = run.directory / name
    if not path.exists():
        return [Finding(Level.resolvable, name, "a stage ran on a modified tree, and its patch is missing", mend)]
    try:
        content = run.content(path)
    except UserError as error:
        return [Finding(Level.resolvable, name, str(error), mend)]
    if hashlib.sha256(content).hexdigest() != patch:
        return [Finding(Level.resolvable, name, "its SHA-256 is not the recorded one", mend)]
    return []


def commit_findings(place: str, provenance: Provenance) -> list[Finding]:
    """The recorded commit contains the recorded source."""
    commit, recorded = provenance.commit, provenance.source_sha256
    if commit is None:
        what = f"no commit was recorded; the code is identified by its source SHA-256 {recorded[:16]} alone"
        return [Finding(Level.resolvable, place, what, kind=Kind.cannot_tell)]
    if not SHA1.fullmatch(commit) and not SHA256.fullmatch(commit):
        what = f"{shorten(commit)} is not the name of a commit"
        return [Finding(Level.well_formed, place, what, "run the stage again in a git checkout")]
    there = source_sha256_at(commit)
    if there is None:
        is_here = "that of this checkout" if recorded == source_sha256_here() else "which is not this checkout's"
        what = (
            f"commit {commit[:12]} is not in this history (shallow, rewritten, or never pushed), or lists its source "
            f"in another way; its code is known by the source SHA-256 {recorded[:16]}, {is_here}"
        )
        return [Finding(Level.resolvable, place, what, "fetch the complete history to look", Kind.cannot_tell)]
    if there != recorded:
        what = f"commit {commit[:12]} contains source {there[:16]}, the stage ran on {recorded[:16]}"
        return [Finding(Level.resolvable, place, what, "run the stage again from a commit")]
    return []


@cache
def source_sha256_here() -> str:
    return source_sha256()


@cache
def source_sha256_at(commit: str) -> str | None:
    """The source hash of a commit, from git's objects. None without git, or if the commit has another rule for sources.

    The objects are read directly: `git archive` and `git checkout` would obey the attributes of the commit, and these
    can leave files out, change their bytes and start filters.
    """
    try:
        files = committed_files(commit)
        names = sorted(filter(is_source, files), key=lambda name: Path(name).parts)
        sources = contents(files[name] for name in names)
    except NoCommitError:
        return None
    rule = re.search(r"^SOURCES = .*$", inspect.getsource(provenance), re.MULTILINE)
    if rule is None or not any(rule[0].encode() in source for source in sources):
        return None
    return sha256_of_sources(zip(names, sources, strict=True))


def is_source(name: str) -> bool:
    """Whether one of the globs of `SOURCES` matches."""
    patterns = (re.escape(glob).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*") for glob in SOURCES)
    return any(re.fullmatch(pattern, name) for pattern in patterns)


# Commands


def command_findings(facts: RunData, config: dict[str, Any] | None) -> list[Finding]:
    """Every recorded command is one that this pipeline has, with keys that it or the recipe knows."""
    keys = {*schema_keys(), *flatten(config or {})}
    return [
        Finding(
            Level.resolvable,
            f"records/{name}.json, provenance.command",
            what,
            "run the stage again, by a command that works",
        )
        for name, record in facts.stages()
        for what in command_faults(record.provenance.command, keys)
    ]


def command_faults(command: str, keys: set[str]) -> list[str]:
    """The reasons why a command cannot be typed."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        return [f"{shorten(command)!r} is not a shell command: {error}"]
    if SHELL.search(unquoted(command)):
        return [f"{shorten(command)!r} does more than start one program"]
    given = arguments_of(words)
    if given is None:
        return [f"{shorten(command)!r} starts none of {', '.join(SCRIPTS + MODULES)}"]
    unknown = [word for word in given if not is_known(word, keys)]
    return [f"{shorten(command)!r} names what no configuration knows: {first_few(unknown)}"] if unknown else []


def unquoted(command: str) -> str:
    """The command without its quoted parts. `$RAW_DIR` in double quotes is a path, `$(...)` a program."""
    without_single = re.sub(r"'[^']*'", "", command)
    return re.sub(r'"(?:[^"\\`$]|\\.|\$(?!\())*"', "", without_single)


def arguments_of(words: list[str]) -> list[str] | None:
    """The words after the script or module. None if another program is started."""
    if not words or words[0] not in ("python", "torchrun"):
        return None
    at = 1
    while at < len(words) and words[0] == "torchrun" and words[at].startswith("-"):
        at += 1
    if words[at : at + 1] == ["-m"] and words[at + 1 : at + 2] and words[at + 1] in MODULES:
        return words[at + 2 :]
    if words[at : at + len(REPRODUCE)] == REPRODUCE:  # a recipe and flags, no settings
        return []
    return words[at + 1 :] if at < len(words) and words[at] in SCRIPTS else None


def is_known(word: str, keys: set[str]) -> bool:
    """Whether a word of a command line is a flag, a group, an experiment of this checkout or a known key."""
    if word.startswith("-"):
        return True
    found = OVERRIDE.match(word)
    if found is None or not (found["equals"] or found["sign"] == "~"):
        return False
    key = found["key"]
    is_setting = any(f"{name}.".startswith(f"{key}.") for name in keys)  # or a group of them
    return is_setting or key == "experiment" or key.startswith(("hydra.", "hydra/"))
