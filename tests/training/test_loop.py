"""Training on a small data set: continuing, finishing, refusing, stopping."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from recipe.config.identity import config_sha256
from recipe.errors import NonFiniteError, UserError
from recipe.evaluation import Predict, Predictions
from recipe.models.build import weights_sha256
from recipe.models.checkpoint import checkpoint_files, load_checkpoint, save_checkpoint
from recipe.run.directory import Run
from recipe.run.metric_rows import EPOCH_FIELDS
from recipe.run.records import PreprocessingRecord
from recipe.stages.evaluate import evaluate_run
from recipe.training import checkpointing, loop
from recipe.training.build import Training
from tests.builders.configs import compose_config
from tests.builders.ranks import spawn_ranks, use_next_port
from tests.builders.training import Killed, assert_same_tensors, last_state, train, train_killed_in_epoch

Words = Callable[..., list[str]]
AVERAGED = ["optimization.ema.decay=0.9", "optimization.epochs=3"]


def compare_continued_with_uninterrupted(words: list[str], run_dir: str) -> bool | None:
    """Weights, average, momentum and batch-norm statistics of both are equal, and the record says exact."""
    whole, cut = [*words, f"run_dir={run_dir}/whole"], [*words, f"run_dir={run_dir}/cut"]
    loop.train(compose_config(*whole))
    for epoch in (1, 2):
        use_next_port()
        train_killed_in_epoch(cut, epoch)
    use_next_port()
    record = loop.train(compose_config(*cut))
    before, after = last_state(whole), last_state(cut)
    for part in ("model", "average", "optimizer"):
        assert_same_tensors(before[part], after[part])
    return record.sessions[-1].is_exact if record is not None else None


def test_a_killed_run_continues_bit_by_bit(smoke: Words, tmp_path: Path) -> None:
    assert compare_continued_with_uninterrupted(smoke(*AVERAGED), str(tmp_path)) is True


def test_a_killed_run_of_a_published_recipe_continues_bit_by_bit(smoke: Words, tmp_path: Path) -> None:
    """The draws of stochastic depth, the two moments of LAMB and the start of torchvision's average go on as well."""
    pytest.importorskip("timm", reason="the extra `lamb` brings timm, which is not installed")
    words = smoke(
        *AVERAGED,
        *("model.blur_pool=true", "model.stochastic_depth=0.5", "optimization.optimizer=lamb"),
        *("optimization.learning_rate=0.005", "optimization.weight_decay=0.02", "optimization.warmup_epochs=1"),
        *("optimization.ema.form=torchvision", "optimization.ema.precise_bn_images=50"),
        "optimization.loss=binary_cross_entropy",
    )
    assert compare_continued_with_uninterrupted(words, str(tmp_path)) is True


def test_a_killed_run_of_three_processes_continues_bit_by_bit(smoke: Words, tmp_path: Path) -> None:
    results = spawn_ranks(3, compare_continued_with_uninterrupted, smoke(*AVERAGED), str(tmp_path))
    assert results == [True, None, None]


NOT_TIMES = ("split", "epoch", "step", "images_seen", "loss", "top1_accuracy", "top5_accuracy", "learning_rate")


def measured_rows(words: list[str]) -> list[list[object]]:
    """Everything in the rows but times."""
    return [[row[name] for name in NOT_TIMES] for row in Run(compose_config(*words).run_dir).metric_rows()]


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_validation_that_fails_costs_no_training(
    epoch: int, moment: str, smoke: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it is over and its row is written: its result is in no checkpoint yet, and comes again."""
    more = (*AVERAGED, "optimization.ema.precise_bn_images=50")
    whole, cut = smoke(*more, run="whole"), smoke(*more, run="cut")
    uninterrupted = train(whole)
    validate = loop.validate

    def failing_validation(training: Training, predict: Predict) -> None:
        if training.progress.epoch + 1 == epoch and moment == "before":
            raise Killed
        validate(training, predict)
        if training.progress.epoch + 1 == epoch:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(loop, "validate", failing_validation)
        with pytest.raises(Killed):
            loop.train(compose_config(*cut))
    progress = last_state(cut)["progress"]
    assert (progress["epoch"], progress["batch"], progress["step"]) == (epoch - 1, 4, 4 * epoch)  # type: ignore[index]
    record = train(cut)
    assert [session.first_step for session in record.sessions] == [0, 4 * epoch]
    assert (record.outputs, record.best_epoch, record.images_seen) == (
        uninterrupted.outputs,
        uninterrupted.best_epoch,
        uninterrupted.images_seen,
    )
    assert [epoch.epoch for epoch in record.epochs] == [1, 2, 3]
    for name in EPOCH_FIELDS:
        assert [getattr(epoch, name) for epoch in record.epochs] == [
            getattr(epoch, name) for epoch in uninterrupted.epochs
        ]
    assert measured_rows(cut) == measured_rows(whole)
    for part in ("model", "average", "optimizer"):
        assert_same_tensors(last_state(whole)[part], last_state(cut)[part])


def test_an_epoch_is_saved_once_before_its_validation(smoke: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    save, validate = checkpointing.save_checkpoint, loop.validate

    def noting_save(directory: Path, step: int, content: dict[str, object]) -> Path:
        events.append(f"saved {step}")
        return save(directory, step, content)

    def noting_validation(training: Training, predict: Predict) -> None:
        events.append("validated")
        validate(training, predict)

    monkeypatch.setattr(checkpointing, "save_checkpoint", noting_save)
    monkeypatch.setattr(loop, "validate", noting_validation)
    record = train(smoke("trainer.save_every_steps=2"))
    assert events == ["saved 2", "saved 4", "validated", "saved 6", "saved 8", "validated"]
    assert record.validation_seconds == pytest.approx(
        sum(epoch.validation_seconds for epoch in record.epochs), abs=0.01
    )


@pytest.mark.parametrize("best", [1, 2, 3])
def test_the_best_epoch_is_kept_and_can_be_evaluated(best: int, smoke: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the last one, whose validation comes after the last checkpoint."""
    words = smoke("optimization.epochs=3", "trainer.keep_checkpoints=1")
    with monkeypatch.context() as patched:
        epochs = iter([epoch for epoch in (1, 2, 3) for _ in ("top1_accuracy", "top5_accuracy")])
        patched.setattr(Predictions, "accuracy", lambda found, within: 0.9 if next(epochs) == best else 0.1)
        record = train(words)
    assert record.best_epoch == best
    kept = [path.stem for path in checkpoint_files(Run(compose_config(*words).run_dir).checkpoints)]
    assert kept == sorted({f"step-{4 * best:08d}", "step-00000012"})
    evaluation = evaluate_run(compose_config(*words, "evaluation.checkpoint=best"))
    assert evaluation is not None
    assert evaluation.protocol.epochs_completed == best
    assert evaluation.inputs["weights"] == record.outputs["best weights"]


def test_before_the_first_validation_there_is_no_best_epoch(smoke: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing_validation(training: Training, predict: Predict) -> None:
        raise Killed

    monkeypatch.setattr(loop, "validate", failing_validation)
    with pytest.raises(Killed):
        train(smoke())
    with pytest.raises(UserError, match=r"evaluation\.checkpoint=best does not exist yet"):
        evaluate_run(compose_config(*smoke("evaluation.checkpoint=best")))


def test_rows_and_events_after_the_checkpoint_are_cut(smoke: Words) -> None:
    words = smoke("optimization.epochs=3", "trainer.log_every_steps=1")
    train_killed_in_epoch(words, 1)
    run = Run(compose_config(*words).run_dir)
    assert [row["step"] for row in run.metric_rows() if row["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    train(words)
    assert [row["step"] for row in run.metric_rows() if row["split"] == "train"] == list(range(1, 13))
    assert scalars(run, "train/loss") == [row["loss"] for row in run.metric_rows() if row["split"] == "train"]


ROWS_BEFORE_STEP_6 = 7  # one a step, and the validation of the first epoch


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ([], "7 rows are missing from metrics.jsonl (steps 1 to 6)"),
        ([0, 1, 4, 5, 6], "2 rows are missing from metrics.jsonl (steps 3 to 4)"),
        ([0, 1, 2, 3, 5, 6], "1 row is missing from metrics.jsonl (step 4)"),
        ([1, 2, 2, 4, 5], "3 rows are missing from metrics.jsonl (step 1, step 4, step 6)"),
        ([0, 1, 1, 2, 3, 4, 5, 6, 6], None),
        ([6, 5, 4, 3, 2, 1, 0], None),
    ],
    ids=["all", "in the middle", "a validation", "some, one twice", "none, two twice", "none, in another order"],
)
def test_a_continuation_says_for_good_which_of_its_rows_are_missing(
    kept: list[int], said: str | None, smoke: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    words = smoke("trainer.log_every_steps=1", "trainer.save_every_steps=2")
    train_killed_in_epoch(words, 1, step_in_epoch=3)
    run = Run(compose_config(*words).run_dir)
    lines = run.metrics.read_text().splitlines(keepends=True)
    before = run.metric_rows()[:ROWS_BEFORE_STEP_6]
    run.metrics.write_text("".join([*(lines[number] for number in kept), *lines[ROWS_BEFORE_STEP_6:]]))
    record = train(words)
    assert record.sessions[-1].note == "continued at step 6" + (f"; {said}" if said else "")
    assert (f"warning: {said}; training goes on" in capsys.readouterr().err) == bool(said)
    after = run.metric_rows()
    assert after[: len(set(kept))] == [before[number] for number in sorted(set(kept))]
    assert [row["step"] for row in after[len(set(kept)) :]] == [7, 8, 8]


def test_no_row_is_missed_before_the_first_checkpoint(smoke: Words, capsys: pytest.CaptureFixture[str]) -> None:
    words = smoke("trainer.log_every_steps=1")
    train_killed_in_epoch(words, 0)
    assert len(Run(compose_config(*words).run_dir).metric_rows()) == 2
    assert train(words).sessions[-1].note == "from the beginning"
    assert "missing" not in capsys.readouterr().err


def test_a_line_that_is_not_a_row_stops_a_continuation_with_a_sentence(smoke: Words) -> None:
    words = smoke("trainer.log_every_steps=1")
    train_killed_in_epoch(words, 1)
    run = Run(compose_config(*words).run_dir)
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join([lines[0], '{"split": "train", "epoch": 1}\n', *lines[2:]]))
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl is not a row"):
        train(words)
    run.metrics.write_text("".join([lines[0], *lines[2:]]))  # as the sentence advises
    assert "1 row is missing from metrics.jsonl (step 2)" in train(words).sessions[-1].note


def scalars(run: Run, tag: str) -> list[float]:
    """The scalars that TensorBoard's own reader finds."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (path,) = run.tensorboard.iterdir()
    events = [value for event in EventFileLoader(str(path)).Load() for value in event.summary.value if value.tag == tag]
    return [pytest.approx(event.tensor.float_val[0], rel=1e-6) for event in events]


def test_a_finished_run_is_recognised(smoke: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    record = train(smoke())
    monkeypatch.setattr(loop, "build_training", None)
    assert train(smoke()) == record


def test_a_run_killed_before_its_record_gets_one(smoke: Words) -> None:
    record = train(smoke())
    run = Run(compose_config(*smoke()).run_dir)
    (run.records / "training.json").unlink()
    before, again = measured_rows(smoke()), train(smoke())
    assert (again.outputs, again.best_epoch) == (record.outputs, record.best_epoch)
    for name in EPOCH_FIELDS:
        assert [getattr(epoch, name) for epoch in again.epochs] == [getattr(epoch, name) for epoch in record.epochs]
    assert measured_rows(smoke()) == before


def test_another_configuration_is_refused_with_the_difference(smoke: Words) -> None:
    train(smoke())
    with pytest.raises(UserError, match=r"optimization.momentum: 0.9 -> 0.8"):
        train(smoke("optimization.momentum=0.8"))


def test_start_over_moves_the_old_run_aside(smoke: Words, tmp_path: Path) -> None:
    train(smoke())
    record = train(smoke("optimization.momentum=0.8", "trainer.start_over=true"))
    assert record.parameter_groups[0].settings["momentum"] == 0.8
    assert (tmp_path / "run.old-1" / "records" / "training.json").exists()


def test_the_configuration_is_pinned_without_machine_facts(smoke: Words) -> None:
    record = train(smoke("loader.threads=3"))
    stored = yaml.safe_load(Run(compose_config(*smoke()).run_dir).config.read_text())
    assert config_sha256(stored) == record.config_sha256
    assert "threads" not in stored["loader"]
    assert "directory" not in stored["data"]


def test_the_data_chapter_is_copied_into_the_run(smoke: Words, data_directory: Path) -> None:
    train(smoke())
    mine = Run(compose_config(*smoke()).run_dir).read(PreprocessingRecord)
    assert json.loads((data_directory / "preprocessing.json").read_text())["outputs"] == mine.outputs  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(smoke: Words) -> None:
    words = smoke("optimization.learning_rate=1e30", "optimization.warmup_epochs=0")
    with pytest.raises(NonFiniteError, match=r"optimization\.learning_rate=1e"):
        train(words)
    assert not checkpoint_files(Run(compose_config(*words).run_dir).checkpoints)


def test_number_of_threads_changes_nothing(smoke: Words) -> None:
    hashes = {
        train(smoke(f"loader.threads={threads}", run=f"threads{threads}")).outputs["weights"] for threads in (1, 3)
    }
    assert len(hashes) == 1


def test_another_seed_gives_other_weights_but_the_same_recipe(smoke: Words) -> None:
    one, two = (train(smoke(f"seed={seed}", run=f"seed{seed}")) for seed in (1, 2))
    assert one.outputs["weights"] != two.outputs["weights"]
    assert one.recipe_id == two.recipe_id
    assert one.loader.order_sha256 != two.loader.order_sha256


def test_given_weights_are_named_by_their_content(smoke: Words, tmp_path: Path) -> None:
    first = train(smoke(run="first"))
    state = load_checkpoint(checkpoint_files(tmp_path / "first" / "checkpoints")[-1])
    torch.save(state["model"], tmp_path / "given.pt")
    second = train(smoke(f"model.weights={tmp_path / 'given.pt'}", run="second"))
    assert second.inputs["initial weights"] == first.outputs["weights"]
    assert str(tmp_path) not in (tmp_path / "second" / "config.yaml").read_text()


def test_accumulation_is_recorded_and_reaches_the_same_sizes(smoke: Words) -> None:
    loader = train(smoke("trainer.max_micro_batch_size=8")).loader
    assert (loader.global_batch_size, loader.accumulation_steps, loader.batch_norm_batch_size) == (24, 3, 8)


def test_a_network_with_dropout_continues_exactly_too(smoke: Words, tmp_path: Path) -> None:
    words = smoke(
        "model=torchvision",
        "model.name=squeezenet1_1",
        "augmentation.crop_pixels=32",
        "optimization.epochs=3",
        "evaluation.crop_pixels=32",
        "evaluation.resize_pixels=32",
        "optimization.learning_rate=0.001",
    )
    assert compare_continued_with_uninterrupted(words, str(tmp_path)) is True


def test_the_last_weights_are_written_as_safetensors_too(smoke: Words, tmp_path: Path) -> None:
    record = train(smoke("optimization.ema.decay=0.9"))
    (path,) = (tmp_path / "run" / "checkpoints").glob("*.safetensors")
    assert path.stem == checkpoint_files(path.parent)[-1].stem
    assert weights_sha256(load_file(path)) == record.outputs["weights"]
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"weights_sha256": record.outputs["weights"]}


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("optimizer", {}),
        ("optimizer", {"state": {}, "param_groups": []}),
        ("optimizer", {"state": {0: {"momentum_buffer": torch.zeros(3, 3)}}, "param_groups": None}),
        ("progress", {"epoch": 1, "step": 2, "best_step": 0, "epochs": 7}),
        ("progress", {"epoch": 1, "step": 2, "best_step": 0, "training_seconds": "x"}),
        ("model", {"a": torch.zeros(2)}),
    ],
)
def test_an_entry_that_training_never_wrote_stops_a_continuation_in_one_sentence(
    entry: str, value: dict[str, object], smoke: Words
) -> None:
    words = smoke("optimization.epochs=2")
    train_killed_in_epoch(words, 1)
    (path,) = checkpoint_files(Run(compose_config(*words).run_dir).checkpoints)
    state = load_checkpoint(path)
    if value.get("param_groups", 0) is None:
        value = value | {"param_groups": state["optimizer"]["param_groups"]}
    save_checkpoint(path.parent, state["progress"]["step"], {**state, entry: value})
    with pytest.raises(UserError, match=f"the entry '{entry}' of the checkpoint of step .*trainer.start_over=true"):
        train(words)
