"""From the command line to a `Config`: the only place, besides `config`, that knows Hydra.

Training composes `conf/` and pins what it got. Later stages read the pinned configuration and take from the
command line only their own group and facts of the machine; a pinned key given another value stops, with both values.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipe.config import MACHINE_FACTS, PATHS, Config, known_keys, leaves, typed
from recipe.environment import remember_typed_words, typed_words
from recipe.errors import CONTROLS, UserError, how_to_continue, one_clear_sentence
from recipe.launcher import launched, report_ignored
from recipe.run import CHECKOUT, JOURNAL, Run, disk_errors, shown_path
from recipe.streams import protect_streams

FAILED_JOBS = "RECIPE_FAILED_JOBS"  # environment variable: the file in which the jobs of a multirun note failures


def run_command(main: Callable[[], None]) -> None:
    """Run a script's `main`; what Hydra has to say about a command line becomes one sentence too."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra would cut the traceback of a programming error short
    remember_typed_words()
    with one_clear_sentence(), _explaining(), _failures_named():
        launched()  # refuses here, before anything is written
        report_ignored()
        sys.argv[1:] = _without_unusable_values(_paths_quoted(sys.argv[1:]))
        main()


@contextmanager
def one_job() -> Iterator[None]:
    """The body of a script's `main`: an error is one sentence, and in a multirun it ends this job only.

    A signal ends the multirun, and so does any error under torchrun, whose processes have to stay together. A job that
    a launcher of Hydra has sent elsewhere ends alone in any case.
    """
    protect_streams()
    if HydraConfig.get().mode != RunMode.MULTIRUN or launched().is_elastic:
        with one_clear_sentence():
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
    """Its number in the multirun, and its own values."""
    words = " ".join(f"{override.key_or_group}={override.get_value_element_as_str()}" for override in _swept())
    return HydraConfig.get().job.num, words


def _note_failure(job: int, words: str, exit_code: int, reason: str) -> None:
    """Say it now, and keep it for the end of the multirun."""
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
    """At the end of a multirun name the jobs that failed, and exit with the code of the first of them."""
    notes = Path(JOURNAL.parent, f"failed-jobs-{os.getpid()}.jsonl").absolute()
    notes.unlink(missing_ok=True)  # of a killed process with the same number
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
    """Hydra's reason on one line, without its advice to add an unknown key and its search path; and a near miss."""
    reasons = [str(error), str(error.__cause__ or "")]
    text = " ".join(" ".join(reasons).split())
    text = re.sub(
        r"To append to your config use \S+ ?|Config search path:.*|(full_key:|object_type=|reference_type=)\s*\S+",
        "",
        text,
    )
    unknown = re.search(r"override '([\w.]+)'", text)
    near = difflib.get_close_matches(unknown[1], known_keys(), 1) if unknown else []
    return text.strip() + (f"; did you mean {near[0]}?" if near else "")


def composed_config(composed: DictConfig) -> Config:
    """The configuration of preprocess.py and train.py; a multirun gets a directory for each of its values."""
    config = typed(composed)
    suffix = swept_suffix()
    if suffix:
        config.run_dir = f"{config.run_dir}-{suffix}"
    return config


def swept_suffix() -> str:
    """What tells this job of a multirun from its sisters, such as `seed-1`; empty outside a multirun."""
    return "-".join(
        f"{override.key_or_group}-{override.get_value_element_as_str()}".replace("/", "_")
        for override in _swept()
        if override.key_or_group != "run_dir"
    )


def _swept() -> list[Override]:
    """This job's own values of what a multirun goes through."""
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return []
    words = [word for word in _paths_quoted(typed_words()[1:]) if "=" in word and not word.startswith("-")]
    typed_overrides = _parsed(words)
    swept = {override.key_or_group for override in typed_overrides if override.is_sweep_override()}
    swept |= set(hydra.sweeper.get("params") or {})
    return [override for override in _parsed(_task_words()) if override.key_or_group in swept]


def measured_config(composed: DictConfig) -> Config:
    """The configuration of evaluate.py: the run's own; published weights can be measured without any run."""
    if composed.evaluation.weights is not None and Run(composed.run_dir).read_config() is None:
        return composed_config(composed)
    return pinned_config(own_group="evaluation")


def pinned_config(own_group: str) -> Config:
    """The configuration of a stage after training: the run's own, with `own_group` and machine facts from here.

    Raises `UserError` where the run directory holds none, and where the command line contradicts it.
    """
    return _pinned_config(_task_words(), own_group)


def _task_words() -> list[str]:
    """What Hydra was given; unresolved, since a path may hold what looks like a reference."""
    words = OmegaConf.to_container(HydraConfig.get().overrides.task)
    assert isinstance(words, list)
    return [str(word) for word in words]


def config_of(words: list[str]) -> Config:
    """The configuration that these words describe, outside Hydra's scripts."""
    words = _settings(words)
    with initialize_config_dir(version_base="1.3", config_dir=str(CHECKOUT / "conf")), _explaining():
        return typed(compose("config", words))


def _settings(words: list[str]) -> list[str]:
    wrong = [word for word in words if word.startswith("-") or "=" not in word]
    if wrong:
        raise UserError(f"{wrong[0]!r} is no setting: only key=value can be given here")
    return _paths_quoted(words)


def pinned_config_of(words: list[str], own_group: str) -> Config:
    """The same outside Hydra's scripts, in a notebook: `words` are what would stand on the command line."""
    words = _settings(words)
    with initialize_config_dir(version_base="1.3", config_dir=str(CHECKOUT / "conf")), _explaining():
        return _pinned_config(words, own_group)


def composed_outside(words: list[str]) -> Config:
    """What these words compose, outside Hydra's scripts."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CHECKOUT / "conf")), _explaining():
        return typed(compose("config", _paths_quoted(words)))


def _pinned_config(given: list[str], own_group: str) -> Config:
    run = Run(_run_dir(given))
    pinned = run.read_config()
    if pinned is None:
        raise UserError(
            f"{shown_path(run.directory)} holds no run: train it first, with `python train.py "
            f"run_dir={shown_path(run.directory)}` and the experiment that you want"
        )
    composed = compose("config", [*_experiment(given, pinned["name"]), *_without_experiment(given, pinned["name"])])
    mine = {key for key in _keys(given, composed) if key in MACHINE_FACTS or key.startswith(f"{own_group}.")}
    _refuse_contradictions(_keys(given, composed) - mine, composed, pinned)
    _must_be_whole(pinned, composed, shown_path(run.config))
    try:
        merged = OmegaConf.merge(composed, _without(pinned, mine))
    except OmegaConfBaseException as error:
        raise UserError(f"{shown_path(run.config)}, key {error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(merged, DictConfig)
    return typed(merged)


def _must_be_whole(stored: dict[str, Any], composed: DictConfig, where: str) -> None:
    """A missing value must not become today's default for yesterday's run."""
    schema = leaves(OmegaConf.to_container(composed)).keys() - set(MACHINE_FACTS)  # type: ignore[arg-type]
    found = leaves(stored).keys()
    if schema != found:
        wrong = [
            *(f"{key} is missing" for key in sorted(schema - found)),
            *(f"{key} is unknown" for key in sorted(found - schema)),
        ]
        raise UserError(
            f"{where} does not fit this version of the code ({'; '.join(wrong)}): "
            "use the commit that the run was trained with"
        )


def _experiment(given: list[str], name: str) -> list[str]:
    """The experiment's file, for the machine facts that it suggests; a run may also have a name of its own."""
    words = zip(given, _parsed(given), strict=True)
    named = [word for word, override in words if override.key_or_group == "experiment"]
    known = GlobalHydra.instance().config_loader().get_group_options("experiment")
    return named or ([f"experiment={name}"] if name in known else [])


def _run_dir(given: list[str]) -> str:
    return str(compose("config", given).run_dir)


def _without_unusable_values(words: list[str]) -> list[str]:
    """A multirun's words without the values that Hydra cannot compose, such as a group's option that does not exist.

    Hydra would refuse all of the multirun for one; here each counts as a failed job. Where no value of a key is left,
    the words stay as they are.
    """
    if not _is_multirun(words):
        return words
    settings = [word for word in words if "=" in word and not word.startswith(("-", "hydra"))]
    sweeps = {
        word: override for word, override in zip(settings, _parsed(settings), strict=True) if override.is_choice_sweep()
    }
    fixed = [word for word in settings if word not in sweeps]
    kept = list(words)
    for word, override in sweeps.items():
        key, usable, refused = word.partition("=")[0], [], {}
        for value in override.sweep_string_iterator():
            try:
                with initialize_config_dir(version_base="1.3", config_dir=str(CHECKOUT / "conf")):
                    compose("config", [*fixed, f"{key}={value}"])
                usable.append(value)
            except HydraException as error:
                refused[value] = _explained(error)
        if not usable:
            return words
        for value, reason in refused.items():
            _note_failure(-1, f"{key}={value}", UserError.exit_code, reason)
        kept[kept.index(word)] = f"{key}={','.join(usable)}"
    return kept


def _is_multirun(words: list[str]) -> bool:
    return any(word in ("-m", "--multirun", "hydra.mode=MULTIRUN") for word in words)


def _paths_quoted(words: list[str]) -> list[str]:
    """A command line with its paths quoted for Hydra, whose grammar has its own use for spaces, commas and brackets.

    What exists under a name as typed is meant by it. Any other value that Hydra reads as text, or as values to sweep
    over under -m, is left as it is: so names may be quoted for Hydra, and `run_dir='runs/${name}-short'` works.
    """
    return [_path_quoted(word, _is_multirun(words)) for word in words]


def _path_quoted(word: str, is_multirun: bool) -> str:
    key, _, path = word.partition("=")
    if key.lstrip("+") not in PATHS or path in ("", "null"):
        return word
    if "\n" in path:
        raise UserError(f"{key}={path!r} holds a line break: rename the file or folder")
    if path == "???":  # to OmegaConf, a missing value
        return f"{key}=./???"
    if not os.path.exists(path) and _is_text(word, path, is_multirun):
        return word
    # A backslash is an escape only where backslashes end in `${` (for OmegaConf), a quote or the end (for Hydra).
    path = re.sub(r"(\\*)\$\{", r"\1\1\\${", path)
    path = re.sub(r"(\\*)'", r"\1\1\\'", path)
    path = re.sub(r"(\\+)$", r"\1\1", path)
    return f"{key}='{path}'"


def _is_text(word: str, path: str, is_multirun: bool) -> bool:
    """Whether Hydra reads this value as the text that it is, as quoted or escaped text, or as a sweep."""
    try:
        (override,) = _parsed([word])
    except HydraException:
        return False
    if override.is_sweep_override():
        return is_multirun
    value = override.value()
    return isinstance(value, str) and (value == path or path[0] in "'\"" or "\\" in path)


def _parsed(overrides: list[str]) -> list[Override]:
    return list(OverridesParser.create().parse_overrides(overrides))


def _without_experiment(given: list[str], pinned_name: str) -> list[str]:
    """The other overrides; an experiment may be named again, but not another one."""
    for override in _parsed(given):
        if override.key_or_group == "experiment" and compose("config", given).name != pinned_name:
            raise UserError(
                f"this run is of experiment={pinned_name}, not experiment={override.value()}; leave it out "
                "or give another run_dir"
            )
    return [word for word, override in zip(given, _parsed(given), strict=True) if override.key_or_group != "experiment"]


def _keys(given: list[str], composed: DictConfig) -> set[str]:
    """Every value that the command line touched; a group stands for all of its values."""
    everything = leaves(OmegaConf.to_container(composed))  # type: ignore[arg-type]
    touched = {override.key_or_group.replace("/", ".") for override in _parsed(given)} - {"experiment"}
    return {key for key in everything if any(key == word or key.startswith(f"{word}.") for word in touched)}


def _refuse_contradictions(keys: set[str], composed: DictConfig, pinned: dict[str, Any]) -> None:
    ours = leaves(OmegaConf.to_container(composed, resolve=True))  # type: ignore[arg-type]
    theirs = leaves(pinned)
    changed = [
        f"{key}: {theirs.get(key)} -> {_plain(ours[key])}"
        for key in sorted(keys)
        if _plain(ours[key]) != theirs.get(key)
    ]
    if changed:
        raise UserError(
            f"the run was trained with another configuration ({'; '.join(changed)}); leave these keys out, "
            "or train another run with them"
        )


def _plain(value: Any) -> Any:
    """Enums as the words that YAML holds."""
    return getattr(value, "value", value)


def _without(pinned: dict[str, Any], keys: set[str]) -> DictConfig:
    """The pinned values but for those that this command gives anew."""
    kept = OmegaConf.create({})
    for key, value in leaves(pinned).items():
        if key not in keys:
            OmegaConf.update(kept, key, value)
    return kept
