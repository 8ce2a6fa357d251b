"""The means of an epoch: counted while training, saved with every checkpoint, the same as the log's."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from typing import Any

import pytest

from recipe.errors import UserError
from recipe.models.checkpoint import checkpoint_files, load_checkpoint, save_checkpoint
from recipe.run.directory import Run
from recipe.run.records import Epoch
from recipe.training import loop
from tests.builders.configs import compose_config
from tests.builders.ranks import spawn_ranks, use_next_port

Words = Callable[..., list[str]]
STEPS_PER_EPOCH = 9
LONG = [
    "optimization.epochs=2",
    "optimization.batch_size=12",
    "trainer.log_every_steps=4",  # rows of 4, 4 and 1 steps: weights count
    "trainer.timeout_seconds=60",
]
MEANS = ("learning_rate", "train_loss", "train_top1", "train_top5", "validation_loss", "validation_top1")


def train_stopped(words: list[str], step: int) -> None:
    """Train, ask every process to stop after this step, leave with 75."""
    take_step = loop.take_step

    def stopping_step(training: Any, batches: Any) -> None:
        take_step(training, batches)
        if training.progress.step == step:
            signal.raise_signal(signal.SIGTERM)

    loop.take_step = stopping_step  # not monkeypatch: this also runs in spawned processes
    use_next_port()
    try:
        with pytest.raises(SystemExit) as end:
            loop.train(compose_config(*words))
    finally:
        loop.take_step = take_step
    assert end.value.code == 75


def epochs_of(words: list[str], stops: tuple[int, ...] = ()) -> list[Epoch]:
    """The recorded epochs after stops at these steps, on rank 0. Empty on the others."""
    for step in stops:
        train_stopped(words, step)
    use_next_port()
    record = loop.train(compose_config(*words))
    return record.epochs if record is not None else []


def logged_means(words: list[str]) -> dict[str, list[float]]:
    """Means of the train rows of each epoch, weighted by the images of each."""
    rows = [row for row in Run(compose_config(*words).run_dir).metric_rows() if row["split"] == "train"]
    seen = [0, *(row["images_seen"] for row in rows)]
    images = [after - before for before, after in itertools.pairwise(seen)]
    means: dict[str, list[float]] = {"learning_rate": [], "train_loss": [], "train_top1": [], "train_top5": []}
    for epoch in (1, 2):
        of_epoch = [(row, count) for row, count in zip(rows, images, strict=True) if row["epoch"] == epoch]
        means["learning_rate"].append(of_epoch[-1][0]["learning_rate"])
        for name, key in (("loss", "loss"), ("top1", "top1_accuracy"), ("top5", "top5_accuracy")):
            total = sum(row[key] * count for row, count in of_epoch)
            means[f"train_{name}"].append(total / sum(count for _, count in of_epoch))
    return means


def columns(epochs: list[Epoch], names: tuple[str, ...] = MEANS) -> dict[str, list[float]]:
    return {name: [getattr(epoch, name) for epoch in epochs] for name in names}


def compare_with_log_and_interrupted(words: list[str], run_dir: str) -> dict[str, list[float]] | None:
    """The means of an uninterrupted run, after comparing them with its log and with a run that was stopped."""
    plain, stopped = [*words, f"run_dir={run_dir}/plain"], [*words, f"run_dir={run_dir}/stopped"]
    epochs = epochs_of(plain)
    # within a row, after a row, after the last step of an epoch, and twice within the second epoch
    again = epochs_of(stopped, stops=(3, 4, 9, 11, 16))
    if not epochs:
        return None
    assert columns(again) == columns(epochs)
    assert [epoch.epoch for epoch in again] == [1, 2]
    for run in (plain, stopped):
        for name, values in logged_means(run).items():
            assert columns(epochs)[name] == pytest.approx(values, rel=1e-12), name
    return columns(epochs)


def test_the_means_of_an_epoch_are_those_of_the_log_also_after_stops(smoke: Words, tmp_path: Any) -> None:
    assert compare_with_log_and_interrupted(smoke(*LONG), str(tmp_path))


def test_the_means_of_an_epoch_are_the_same_for_any_number_of_processes(smoke: Words, tmp_path: Any) -> None:
    words = smoke(*LONG, "model.norm=none")  # without batch norm processes change the order of sums only
    one = compare_with_log_and_interrupted(words, str(tmp_path / "one"))
    two = spawn_ranks(2, compare_with_log_and_interrupted, words, str(tmp_path / "two"))[0]
    assert one is not None
    for name in ("learning_rate", "train_loss", "train_top5", "validation_loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    assert two["train_top1"] == pytest.approx(one["train_top1"], abs=2 / (STEPS_PER_EPOCH * 12))  # two close calls


def test_lost_rows_change_no_mean(smoke: Words) -> None:
    """A run that lost its log before a kill still has the counts of its steps."""
    words, other = smoke(*LONG), smoke(*LONG, run="other")
    train_stopped(words, 11)
    Run(compose_config(*words).run_dir).metrics.unlink()
    assert columns(epochs_of(words)) == columns(epochs_of(other))


def test_a_validation_row_equals_the_record(smoke: Words) -> None:
    words = smoke(*LONG)
    epochs = epochs_of(words)
    rows = [row for row in Run(compose_config(*words).run_dir).metric_rows() if row["split"] == "validation"]
    for epoch, row in zip(epochs, rows, strict=True):
        assert [row["train_loss"], row["train_top1_accuracy"], row["train_top5_accuracy"], row["loss"]] == [
            *(epoch.train_loss, epoch.train_top1, epoch.train_top5, epoch.validation_loss)
        ]


def test_a_checkpoint_of_the_format_before_is_refused(smoke: Words, capsys: pytest.CaptureFixture[str]) -> None:
    words = smoke(*LONG)
    train_stopped(words, 3)
    [path] = checkpoint_files(Run(compose_config(*words).run_dir).checkpoints)
    save_checkpoint(path.parent, 3, load_checkpoint(path) | {"format": "checkpoint/1"})
    with pytest.raises(UserError, match="no valid checkpoint is left"):
        loop.train(compose_config(*words))
    assert "step-00000003.pt is not of format 'checkpoint/2'" in capsys.readouterr().err
