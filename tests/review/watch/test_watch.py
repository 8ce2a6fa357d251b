"""The verb `watch`, and `reference=` while training: verdicts, refusals, hostile input."""

from __future__ import annotations

import copy
import json
import pickle
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from recipe.__main__ import main
from recipe.config.identity import recipe_id
from recipe.errors import UserError
from recipe.review.watch.command import TrainingWatch, training_watch
from recipe.review.watch.reference import open_reference, watched_run
from recipe.review.watch.statistics import OFF_TRACK, ON_TRACK, WATCHED_METRICS
from recipe.run.directory import Run
from recipe.run.records import SeedRun, SeedsRecord, to_json
from recipe.training import loop
from tests.builders.configs import compose_config

EPOCHS, STEPS_PER_EPOCH, SPREAD = 6, 4, 0.01
Values = dict[str, list[Any]]


def configuration(*words: str, seed: int = 0) -> dict[str, Any]:
    return compose_config("experiment=smoke", f"optimization.epochs={EPOCHS}", f"seed={seed}", *words).pinned.values


CONFIG = configuration()


def course(seed: int, spread: float = SPREAD, epochs: int = EPOCHS) -> Values:
    """The course of a seed: falling losses, rising accuracies, a little noise of its own."""
    noise = np.random.default_rng(seed).normal(0, spread, (len(WATCHED_METRICS), epochs))
    trend = np.linspace(2.0, 1.0, epochs)
    signs = {name: -0.4 if "top1" in name else 1.0 for name in WATCHED_METRICS}
    values = {
        name: (0.9 * ("top1" in name) + sign * trend + noise[at]).tolist()
        for at, (name, sign) in enumerate(signs.items())
    }
    return {"epoch": list(range(1, epochs + 1)), **values}


def seed_run(seed: int, epochs: Values | None = None, **changes: Any) -> SeedRun:
    values = {
        "seed": seed,
        "weights_sha256": f"{seed:064x}",
        "source_sha256": "a" * 64,
        "batch_norm_batch_size": 96,
        "raw_sha256": {"train": "b" * 64},
        "epochs": epochs or course(seed),
    }
    return SeedRun(**{**values, **changes})


def seeds_record(count: int, config: dict[str, Any] = CONFIG, **changes: Any) -> SeedsRecord:
    plain = {key: value for key, value in config.items() if key != "seed"}
    values = {
        "recipe_id": recipe_id(plain),
        "config": plain,
        "steps_per_epoch": STEPS_PER_EPOCH,
        "runs": [seed_run(seed) for seed in range(count)],
    }
    return SeedsRecord(**{**values, **changes})


def write_reference(count: int = 5, name: str = "seeds.json", **changes: Any) -> str:
    Path(name).write_bytes(to_json(seeds_record(count, **changes)))
    return name


def metric_lines(values: Values, epoch: int) -> list[dict[str, Any]]:
    step = epoch * STEPS_PER_EPOCH
    common = {"epoch": epoch, "step": step, "images_seen": 96 * step, "top5_accuracy": 0.9, "seconds": 1.0}
    common |= {"images_per_second": 9.0, "data_wait_fraction": 0.1}
    measured = {
        split: {"loss": values[f"{split}_loss"][epoch - 1], "top1_accuracy": values[f"{split}_top1"][epoch - 1]}
        for split in ("train", "validation")
    }
    measured["validation"] |= {f"train_{name}": value for name, value in measured["train"].items()}
    return [{"split": split, "learning_rate": 0.1, **common, **row} for split, row in measured.items()]


def write_run(values: Values, epochs: int = EPOCHS, config: dict[str, Any] = CONFIG, name: str = "run") -> str:
    run = Run(name)
    run.write_config(config)
    rows = [row for epoch in range(1, epochs + 1) for row in metric_lines(values, epoch)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def write_document(seed: int, folder: str, **changes: Any) -> str:
    """A document alone, from an unknown source."""
    training = {"steps_per_epoch": STEPS_PER_EPOCH, "weights_sha256": "c" * 64, "epochs": course(seed)} | changes
    block = {"format": "recipe/1", "config": CONFIG | {"seed": seed}, "claims": {"training": training}}
    Path(folder).mkdir()
    Path(folder, "README.md").write_text(f"# A recipe\n\n```json\n{json.dumps(block)}\n```\n")
    return folder


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a verb, one line."""
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def shifted(values: Values, metric: str, since: int, by: float) -> Values:
    changed = copy.deepcopy(values)
    changed[metric] = [value + by * (at + 1 >= since) for at, value in enumerate(values[metric])]
    return changed


def test_a_run_like_the_others_is_on_track(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", write_run(course(77), epochs=4), "--against", write_reference()]) == 0
    printed = capsys.readouterr().out
    assert "ON TRACK: run, epoch 4 of 6" in printed
    assert "family-wise error 0.05 over 6 epochs x 4 metrics" in printed
    assert "n = 5" in printed


def test_a_deviation_is_named_with_its_metric_its_epoch_and_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(shifted(course(77), "validation_loss", since=3, by=0.5), epochs=5)
    assert main(["watch", run, "--against", write_reference(), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == OFF_TRACK
    [deviation] = found["since"]
    assert (deviation["metric"], deviation["epoch"]) == ("validation_loss", 3)
    assert deviation["value"] - deviation["mean"] == pytest.approx(0.5, abs=5 * SPREAD)
    assert 0 < deviation["limit"] < found["metrics"]["validation_loss"]["detectable"]
    main(["watch", run, "--against", "seeds.json"])
    assert "validation_loss since epoch 3" in capsys.readouterr().out


def test_an_epoch_counts_when_it_was_validated() -> None:
    run = Run(write_run(course(77), epochs=2))
    wild = metric_lines(shifted(course(77), "train_loss", 3, 9.0), epoch=3)[0]
    with run.metrics.open("a") as handle:
        handle.write(json.dumps(wild) + "\n")
    assert main(["watch", "run", "--against", write_reference()]) == 0


def test_two_seeds_cannot_tell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", write_run(course(77)), "--against", write_reference(2)]) == 3
    assert "CANNOT TELL: run, epoch 6 of 6; 2 reference seeds: a spread needs 3" in capsys.readouterr().out


def test_a_run_that_was_counted_before_is_not_counted_again() -> None:
    documents = [write_document(seed, f"seed-{seed}") for seed in (1, 2)]
    copies = [write_document(1, f"copy-{number}", weights_sha256=f"{number:064x}") for number in range(3)]
    assert len(open_reference([*documents, *copies]).runs) == 2


def test_documents_and_published_seeds_make_one_reference(capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_document(0, "published")
    Run(folder).write(seeds_record(4))  # seed 0 again, and three more
    found = open_reference([folder])
    assert sorted(seed.seed for seed in found.runs) == [0, 1, 2, 3]
    assert main(["watch", "--against", folder, write_document(9, "other"), "--save", "all.json"]) == 0
    assert capsys.readouterr().out == "wrote all.json: 5 seeds\n"
    assert open_reference(["all.json"]).runs == open_reference([folder, "other"]).runs
    assert main(["watch", write_run(course(77)), "--against", "all.json", "--save", "again.json"]) == 0
    assert Path("again.json").read_bytes() == Path("all.json").read_bytes()


def test_neither_run_nor_file_and_a_file_of_another_name_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give a run to watch, or --save FILE" in refused(["watch", "--against", write_reference()], capsys)
    words = ["watch", "--against", write_reference(), "--save", "dynamics.txt"]
    assert "--save dynamics.txt is invalid" in refused(words, capsys)
    assert not Path("dynamics.txt").exists()


def test_published_seeds_must_be_of_the_recipe_beside_them() -> None:
    folder = write_document(0, "published")
    Run(folder).write(seeds_record(4, recipe_id="0" * 64))
    with pytest.raises(UserError, match="it was edited"):
        open_reference([folder])
    Run(folder).write(seeds_record(4, config=configuration("optimization.learning_rate=0.3")))
    with pytest.raises(UserError, match="whose recipe is another one: optimization"):
        open_reference([folder])


def test_a_document_can_be_judged_too() -> None:
    assert main(["watch", write_document(77, "published"), "--against", write_reference()]) == 0


def test_the_same_run_again_is_on_track_by_its_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", write_run(course(1), epochs=3), "--against", write_reference(2)]) == 0
    assert "reference seed 1, digit by digit" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["optimization.learning_rate=0.3", "data.mean=[0.5,0.5,0.5]", "model.norm=none"])
def test_another_recipe_is_refused_with_the_difference(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    key, _, value = word.partition("=")
    run = write_run(course(77), config=configuration(word))
    error = refused(["watch", run, "--against", write_reference()], capsys)
    assert f"{key}: " in error
    assert f"-> {value.replace(',', ', ')}" in error


@pytest.mark.parametrize(
    "word",
    [
        "seed=7",
        "name=other",
        "data.name=other",
        "description.summary=other",
        "timing.seconds_per_cell=9",
        "trainer.keep_checkpoints=9",
    ],
)
def test_what_cannot_change_training_is_no_difference(word: str) -> None:
    run = write_run(course(77), config=configuration(word))
    assert main(["watch", run, "--against", write_reference()]) == 0


def test_other_step_counts_and_other_images_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(course(77))
    error = refused(["watch", run, "--against", write_reference(steps_per_epoch=5)], capsys)
    assert "4 steps an epoch, the reference 5" in error
    mixed = [seed_run(1), seed_run(2, raw_sha256={"train": "d" * 64})]
    assert "saw other images" in refused(["watch", run, "--against", write_reference(runs=mixed)], capsys)


def test_other_batches_of_batch_norm_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_document(77, "published", batch_norm_batch_size=32)
    main(["watch", folder, "--against", write_reference()])
    assert "batch norm sees 32 images at a time in the run, 96 in the reference" in capsys.readouterr().out


def test_following_ends_with_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    epochs = iter(range(2, EPOCHS + 1))
    monkeypatch.setattr(time, "sleep", lambda seconds: write_run(course(77), epochs=next(epochs)))
    assert main(["watch", write_run(course(77), 1), "--against", write_reference(), "--follow", "5", "--json"]) == 0
    seen = [json.loads(line)["epoch"] for line in capsys.readouterr().out.splitlines()]
    assert seen == list(range(1, EPOCHS + 1))


def test_following_ends_where_it_is_off_track(monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = iter(range(2, EPOCHS + 1))
    off = shifted(course(77), "train_loss", since=3, by=1.0)
    monkeypatch.setattr(time, "sleep", lambda seconds: write_run(off, epochs=next(epochs)))
    assert main(["watch", write_run(off, 1), "--against", write_reference(), "--follow", "5"]) == 1
    assert next(epochs) == 4


@pytest.mark.parametrize(
    "words",
    [
        ["--alpha", "0"],
        ["--alpha", "nan"],
        ["--follow", "-1"],
    ],
)
def test_impossible_words_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert words[1] in refused(["watch", write_run(course(77)), "--against", write_reference(), *words], capsys)


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no seeds": lambda found: found["runs"].clear(),
    "text for a number": lambda found: found["runs"][0]["epochs"]["train_loss"].__setitem__(0, "1.0"),
    "a truth value": lambda found: found["runs"][0]["epochs"]["train_loss"].__setitem__(0, True),
    "a hole": lambda found: found["runs"][0]["epochs"]["train_loss"].__setitem__(0, None),
    "no float": lambda found: found["runs"][0]["epochs"]["train_loss"].__setitem__(0, 10**400),
    "a missing epoch": lambda found: found["runs"][0]["epochs"]["train_loss"].pop(),
    "a missing column": lambda found: found["runs"][0]["epochs"].pop("validation_top1"),
    "epochs out of order": lambda found: found["runs"][0]["epochs"]["epoch"].reverse(),
    "no steps": lambda found: found.update(steps_per_epoch=0),
    "another format": lambda found: found.update(format="seeds/9"),
    "an unknown field": lambda found: found.update(command="rm -r ."),
    "an edited configuration": lambda found: found["config"]["optimization"].update(learning_rate=9.0),
    "no configuration": lambda found: found.update(config={}, recipe_id=recipe_id({})),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_of_dynamics_is_refused_in_one_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(to_json(seeds_record(4)))
    HOSTILE[name](found)
    Path("bad.json").write_text(json.dumps(found))
    refused(["watch", write_run(course(77)), "--against", "bad.json"], capsys)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"NaN", b"[" * 100_000, b'{"format": "seeds/2"}', b"{}"])
def test_a_file_that_is_none_is_refused(content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.json").write_bytes(content)
    refused(["watch", write_run(course(77)), "--against", "bad.json"], capsys)


def test_deep_nesting_and_huge_trainings_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    run, text = write_run(course(77)), to_json(seeds_record(3)).decode()
    Path("bad.json").write_text(
        text.replace('"config": {', '"config": {"deep": ' + "[" * 50_000 + "]" * 50_000 + ",", 1)
    )
    refused(["watch", run, "--against", "bad.json"], capsys)
    config = configuration("optimization.epochs=1000000000")
    refused(["watch", run, "--against", write_reference(config=config)], capsys)


def test_foreign_text_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    config = copy.deepcopy(CONFIG)
    config["model"]["\x1b[2Jevil"] = "\x1b]0;title\x07"
    error = refused(["watch", write_run(course(77)), "--against", write_reference(config=config)], capsys)
    assert "evil" in error
    assert error.isprintable() or set(error) - set(map(chr, range(32))) == set(error) - {"\n"}


@pytest.mark.parametrize("value", ['"high"', "NaN", "1e999", "true", "null"])
def test_rows_that_no_training_wrote_are_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(write_run(course(77)))
    lines = run.metrics.read_text().splitlines()
    lines[3] = lines[3].replace(f'"loss": {json.loads(lines[3])["loss"]}', f'"loss": {value}')
    run.metrics.write_text("\n".join(lines) + "\n")
    refused(["watch", "run", "--against", write_reference()], capsys)


def test_a_document_without_training_is_no_reference(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("empty", "README.md").write_text('```json\n{"format": "recipe/1", "claims": 3, "config": {}}\n```\n')
    assert "no finished training" in refused(["watch", write_run(course(77)), "--against", "empty"], capsys)
    refused(["watch", "nowhere", "--against", write_reference()], capsys)


# ---- while training


def reference_of(words: list[str], spread: float = SPREAD) -> str:
    """A reference of the recipe that `words` make, with artificial seeds."""
    config = compose_config(*words).pinned.values
    values = [course(seed, spread, config["optimization"]["epochs"]) for seed in range(5)]
    seeds = [seed_run(at, own, raw_sha256={}) for at, own in enumerate(values)]
    return str(Path(write_reference(config=config, runs=seeds)).absolute())


def test_training_says_how_it_goes_and_ends_with_the_same_bits(
    smoke: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = loop.train(compose_config(*smoke(run="plain")))
    for name, spread, verdict in (("wide", 5.0, ON_TRACK), ("narrow", SPREAD, OFF_TRACK)):
        config = compose_config(*smoke(f"reference={reference_of(smoke(), spread)}", run=name))
        record = loop.train(config, pickle.loads(pickle.dumps(partial(training_watch(config)))))  # type: ignore[arg-type]
        assert record is not None
        assert plain is not None
        assert record.outputs["weights"] == plain.outputs["weights"]
        assert record.config_sha256 == plain.config_sha256
        assert capsys.readouterr().out.count(f"  {verdict}: ") == config.optimization.epochs


def test_a_reference_of_another_recipe_stops_before_any_work(smoke: Callable[..., list[str]]) -> None:
    reference = reference_of(smoke("optimization.epochs=3"))
    with pytest.raises(UserError, match=r"optimization.epochs: 3 -> 2"):
        training_watch(compose_config(*smoke(f"reference={reference}")))
    assert training_watch(compose_config(*smoke())) is None


def test_nothing_that_the_watch_meets_ends_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = training_watch(
        compose_config("experiment=smoke", f"optimization.epochs={EPOCHS}", f"reference={write_reference()}")
    )
    assert isinstance(watch, TrainingWatch)
    monkeypatch.setattr("recipe.review.watch.command.watched_run", lambda run: 1 / 0)
    watch(Run("run"))
    assert "warning: the reference cannot judge this run: division by zero" in capsys.readouterr().err


def test_a_real_run_tells_of_its_images_and_weights(smoke: Callable[..., list[str]]) -> None:
    words = smoke("optimization.epochs=1")
    record = loop.train(compose_config(*words))
    assert record is not None
    watched = watched_run(Run(compose_config(*words).run_dir))
    assert watched.steps_per_epoch == record.schedule.steps_per_epoch
    assert watched.seed.weights_sha256 == record.outputs["weights"]
    assert watched.seed.raw_sha256.keys() == {"train", "val"}
    assert watched.seed.epochs["epoch"] == [1]
    as_reference = open_reference([compose_config(*words).run_dir])  # from its records: no document was written
    assert as_reference.runs == [msgspec.structs.replace(watched.seed, seed=0)]
