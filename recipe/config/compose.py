"""Compose a `Config` from the command line and `conf/`. The only module that imports Hydra.

Training composes `conf/` and pins the result. Later stages read the pinned configuration and take only their own group
and settings of the machine from the command line. Another value for a pinned key is an error with both values.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipe.config.identity import RUNTIME_KEYS, flatten, new_name, unflatten
from recipe.config.schema import PATHS, Config, config_from_pinned, schema_keys
from recipe.errors import CONTROLS, UserError, how_to_continue
from recipe.run.directory import JOURNAL, Run
from recipe.run.environment import remember_typed_words, typed_words
from recipe.run.files import CHECKOUT, disk_errors, display_path
from recipe.run.launcher import launched, report_ignored
from recipe.run.terminal import protect_streams, report_user_errors

FAILED_JOBS = "RECIPE_FAILED_JOBS"  # environment variable: the file in which the jobs of a multirun note failures

ConfigStore.instance().store(name="schema", node=Config)


def run_command(main: Callable[[], None]) -> None:
    """Run a script's `main` and print errors in the command line in one line each."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra shortens the traceback of a programming error
    remember_typed_words()
    with report_user_errors(), _explaining(), _failures_named():
        launched()  # raises `UserError` before anything is written
        report_ignored()
        sys.argv[1:] = _without_unusable_values(_paths_quoted(sys.argv[1:]))
        main()


@contextmanager
def one_job() -> Iterator[None]:
    """Report errors of a script's `main` in one line. In a multirun an error ends this job only.

    A signal ends the multirun. Under torchrun any error does, since all processes have to run the same job. A job in a
    process of a Hydra launcher ends alone.
    """
    protect_streams()
    if HydraConfig.get().mode != RunMode.MULTIRUN or launched().is_elastic:
        with report_user_errors():
            yield
        return
    try:
        with _explaining():
            yield
    except UserError as error:
        _note_failure(*_this_job(), error.exit_code, str(error))
    except SystemExit as end:
        if sys.argv[0] == typed_words()[0]:
            raise
        _note_failure(*_this_job(), end.code if isinstance(end.code, int) else 1, f"stopped; {how_to_continue()}")
    except Exception as error:
        traceback.print_exc()
        _note_failure(*_this_job(), 1, f"{type(error).__name__}: {error}")


def _this_job() -> tuple[int, str]:
    """(number in the multirun, swept values)."""
    words = " ".join(f"{override.key_or_group}={override.get_value_element_as_str()}" for override in _swept())
    return HydraConfig.get().job.num, words


def _note_failure(job: int, words: str, exit_code: int, reason: str) -> None:
    """Print the reason and store it for the end of the multirun."""
    reason = CONTROLS.sub("�", reason)
    print(f"error: {reason}", file=sys.stderr, flush=True)
    note = {"job": job, "words": words, "exit_code": exit_code, "reason": reason}
    notes = Path(os.environ[FAILED_JOBS])
    with disk_errors(notes):
        notes.parent.mkdir(parents=True, exist_ok=True)
        with notes.open("a") as handle:
            handle.write(json.dumps(note) + "\n")


@contextmanager
def _failures_named() -> Iterator[None]:
    """List the failed jobs at the end of a multirun and exit with the code of the first."""
    notes = Path(JOURNAL.parent, f"failed-jobs-{os.getpid()}.jsonl").absolute()
    notes.unlink(missing_ok=True)  # of a killed process with the same ID
    os.environ[FAILED_JOBS] = str(notes)
    failed: list[dict[str, Any]] = []
    try:
        yield
    finally:
        if notes.exists():
            failed = sorted(map(json.loads, notes.read_text().splitlines()), key=lambda note: note["job"])
            notes.unlink()
            print(f"{len(failed)} of the jobs failed:", file=sys.stderr)
            for note in failed:
                print(f"  {note['words']} (exit code {note['exit_code']}): {note['reason']}", file=sys.stderr)
    if failed:
        raise SystemExit(failed[0]["exit_code"])


@contextmanager
def _explaining() -> Iterator[None]:
    try:
        yield
    except HydraException as error:
        raise UserError(_explained(error)) from error


def _explained(error: HydraException) -> str:
    """Hydra's message on one line, without its advice and search path, with the key that was probably meant."""
    reasons = [str(error), str(error.__cause__ or "")]
    text = " ".join(" ".join(reasons).split())
    text = re.sub(
        r"To append to your config use \S+ ?|Config search path:.*|(full_key:|object_type=|reference_type=)\s*\S+",
        "",
        text,
    )
    unknown = re.search(r"override '([\w.]+)'", text)
    return text.strip() + (hint(unknown[1]) if unknown else "")


def hint(key: str) -> str:
    """The end of a message about an unknown key: its new name or a similar key."""
    if name := new_name(key):
        return f"; it is now {name}"
    similar = difflib.get_close_matches(key, schema_keys(), 1)
    return f"; did you mean {similar[0]}?" if similar else ""


def to_config(composed: DictConfig) -> Config:
    """Convert Hydra's result to a `Config`. Raises `UserError` with the key."""
    return _known_config(_plain_values(composed, throw_on_missing=True))


def _known_config(values: dict[str, Any]) -> Config:
    unknown = sorted(flatten(values).keys() - set(schema_keys()))
    if unknown:
        way_out = hint(unknown[0]) or "; `python train.py --cfg job` prints all of them"
        raise UserError(f"{unknown[0]} is not a setting{way_out}")
    return Config(**values)


def _plain_values(composed: DictConfig, throw_on_missing: bool = False) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(composed, resolve=True, enum_to_str=True, throw_on_missing=throw_on_missing)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'conf/'}: {str(error).splitlines()[0]}") from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def job_config(composed: DictConfig) -> Config:
    """The configuration of preprocess.py and train.py. Each job of a multirun has its own run directory."""
    config, suffix = to_config(composed), swept_suffix()
    return replace(config, run_dir=f"{config.run_dir}-{suffix}") if suffix else config


def swept_suffix() -> str:
    """The swept values of this job of a multirun, such as `seed-1`. Empty outside a multirun."""
    return "-".join(
        f"{override.key_or_group}-{override.get_value_element_as_str()}".replace("/", "_")
        for override in _swept()
        if override.key_or_group != "run_dir"
    )


def _swept() -> list[Override]:
    """This job's values of the keys that a multirun sweeps over."""
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return []
    words = [word for word in _paths_quoted(typed_words()[1:]) if "=" in word and not word.startswith("-")]
    typed_overrides = _parse_overrides(words)
    swept = {override.key_or_group for override in typed_overrides if override.is_sweep_override()}
    swept |= set(hydra.sweeper.get("params") or {})
    return [override for override in _parse_overrides(_task_words()) if override.key_or_group in swept]


def evaluation_config(composed: DictConfig) -> Config:
    """The configuration of evaluate.py: that of the run, or composed for published weights without a run."""
    if composed.evaluation.weights is not None and Run(composed.run_dir).read_config() is None:
        return job_config(composed)
    return stage_config(own_group="evaluation")


def stage_config(own_group: str) -> Config:
    """The pinned configuration of the run, with `own_group` and settings of the machine from the command line.

    Raises `UserError` if the run directory has none or the command line contradicts it.
    """
    return _pinned_config(_task_words(), own_group)


def _task_words() -> list[str]:
    """The overrides that Hydra received, unresolved, since a path may contain `${`."""
    words = OmegaConf.to_container(HydraConfig.get().overrides.task)
    assert isinstance(words, list)
    return [str(word) for word in words]


def config_from_overrides(words: list[str]) -> Config:
    """Compose a configuration from overrides (`key=value`) outside of Hydra's scripts."""
    with _hydra():
        return to_config(compose("config", _settings(words)))


@contextmanager
def _hydra() -> Iterator[None]:
    conf = CHECKOUT / "conf"
    if not conf.is_dir():  # installed as a wheel
        raise UserError(
            "the package is installed without conf/ and its scripts: work in a checkout, with "
            "`pip install --editable .`"
        )
    with initialize_config_dir(version_base="1.3", config_dir=str(conf)), _explaining():
        yield


def _settings(words: list[str]) -> list[str]:
    wrong = [word for word in words if word.startswith("-") or "=" not in word]
    if wrong:
        raise UserError(f"{wrong[0]!r} is not a setting: only key=value can be given here")
    return _paths_quoted(words)


def stage_config_from_overrides(words: list[str], own_group: str) -> Config:
    """`stage_config` outside of Hydra's scripts, in a notebook: `words` are overrides (`key=value`)."""
    with _hydra():
        return _pinned_config(_settings(words), own_group)


def _pinned_config(given: list[str], own_group: str) -> Config:
    run = Run(str(compose("config", given).run_dir))
    stored = run.read_config()
    if stored is None:
        raise UserError(
            f"{display_path(run.directory)} is not a run: train it first, with `python train.py "
            f"run_dir={display_path(run.directory)}` and the experiment that you want"
        )
    pinned = flatten(stored)  # the run's data set has its folder below data/, unless `given` names another
    words = [f"data.name={pinned.get('data.name')}", *_with_experiment(given, stored["name"])]
    composed = flatten(_plain_values(compose("config", words)))
    given_keys = _keys(given, composed)
    mine = {key for key in given_keys if key in RUNTIME_KEYS or key.startswith(f"{own_group}.")}
    changed = [
        f"{key}: {pinned.get(key)} -> {composed[key]}"
        for key in sorted(given_keys - mine)
        if pinned.get(key) != composed[key]
    ]
    if changed:
        raise UserError(
            f"the run was trained with another configuration ({'; '.join(changed)}); leave these keys out, "
            "or train another run with them"
        )
    try:
        config_from_pinned(stored)  # a missing value must not become the current default
    except UserError as error:
        raise UserError(
            f"{display_path(run.config)} does not fit this version of the code ({error}): "
            "use the commit that the run was trained with"
        ) from error
    kept = {key: value for key, value in pinned.items() if key not in mine}
    return _known_config(unflatten(composed | kept))


def _with_experiment(given: list[str], name: str) -> list[str]:
    """The overrides with `experiment=name`, if there is one, for the settings of the machine in it.

    Raises `UserError` if the overrides name another experiment.
    """
    experiments = [override for override in _parse_overrides(given) if override.key_or_group == "experiment"]
    if experiments and compose("config", given).name != name:
        raise UserError(
            f"this run is of experiment={name}, not experiment={experiments[0].value()}; leave it out "
            "or give another run_dir"
        )
    known = GlobalHydra.instance().config_loader().get_group_options("experiment")
    return given if experiments or name not in known else [f"experiment={name}", *given]


def _without_unusable_values(words: list[str]) -> list[str]:
    """Remove values that Hydra cannot compose, such as an unknown option of a group, from a multirun's words.

    Hydra would refuse the multirun for one of them. Here each counts as a failed job. The words stay unchanged if no
    value of a key is left.
    """
    if not _is_multirun(words):
        return words
    settings = [word for word in words if "=" in word and not word.startswith(("-", "hydra"))]
    sweeps = {
        word: override
        for word, override in zip(settings, _parse_overrides(settings), strict=True)
        if override.is_choice_sweep()
    }
    fixed = [word for word in settings if word not in sweeps]
    kept = list(words)
    for word, override in sweeps.items():
        key, usable, refused = word.partition("=")[0], [], {}
        for value in override.sweep_string_iterator():
            try:
                with _hydra():
                    compose("config", [*fixed, f"{key}={value}"])
                usable.append(value)
            except UserError as error:
                refused[value] = str(error)
        if not usable:
            return words
        for value, reason in refused.items():
            _note_failure(-1, f"{key}={value}", UserError.exit_code, reason)
        kept[kept.index(word)] = f"{key}={','.join(usable)}"
    return kept


def _is_multirun(words: list[str]) -> bool:
    return any(word in ("-m", "--multirun", "hydra.mode=MULTIRUN") for word in words)


def _paths_quoted(words: list[str]) -> list[str]:
    """A command line with paths quoted for Hydra: its grammar uses spaces, commas and brackets.

    An existing path is quoted. Other values that Hydra reads as text, or as a sweep under -m, stay unchanged. So names
    may be quoted for Hydra, and `run_dir='runs/${name}-short'` works.
    """
    return [_path_quoted(word, _is_multirun(words)) for word in words]


def _path_quoted(word: str, is_multirun: bool) -> str:
    key, _, path = word.partition("=")
    if key.lstrip("+") not in PATHS or path in ("", "null"):
        return word
    if "\n" in path:
        raise UserError(f"{key}={path!r} contains a line break: rename the file or folder")
    if path == "???":  # to OmegaConf, a missing value
        return f"{key}=./???"
    if not os.path.exists(path) and _is_text(word, path, is_multirun):
        return word
    # A backslash is an escape only before `${` (for OmegaConf), a quote or the end (for Hydra).
    path = re.sub(r"(\\*)\$\{", r"\1\1\\${", path)
    path = re.sub(r"(\\*)'", r"\1\1\\'", path)
    path = re.sub(r"(\\+)$", r"\1\1", path)
    return f"{key}='{path}'"


def _is_text(word: str, path: str, is_multirun: bool) -> bool:
    """True if Hydra reads this value as text (plain, quoted or escaped) or as a sweep."""
    try:
        (override,) = _parse_overrides([word])
    except HydraException:
        return False
    if override.is_sweep_override():
        return is_multirun
    value = override.value()
    return isinstance(value, str) and (value == path or path[0] in "'\"" or "\\" in path)


def _parse_overrides(overrides: list[str]) -> list[Override]:
    return list(OverridesParser.create().parse_overrides(overrides))


def _keys(given: list[str], composed: Iterable[str]) -> set[str]:
    """The keys that the command line sets. A group sets all of its keys."""
    touched = {override.key_or_group.replace("/", ".") for override in _parse_overrides(given)} - {"experiment"}
    return {key for key in composed if any(f"{key}.".startswith(f"{word}.") for word in touched)}
