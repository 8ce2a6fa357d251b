"""The evaluator: every image once, integer counts, equal predictions on any number of processes (T1-T5, T10)."""

from __future__ import annotations

import io
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipe.config.schema import Config, Precision
from recipe.data.batches import Batch, EvaluationBatches
from recipe.data.decoding import build_decoder
from recipe.data.loader import ThreadedLoader
from recipe.data.shards import open_split
from recipe.data.transforms import Normalisation, build_evaluation_transform
from recipe.distributed import World, start_world
from recipe.evaluation import (
    Predictions,
    class_table,
    collect,
    concatenate,
    evaluate,
    predictions_file,
    predictor,
    protocol_name,
    view_name,
)
from recipe.models.build import build_model
from tests.builders.configs import compose_config
from tests.builders.ranks import spawn_ranks

ALONE = World(0, 1, 0, 1, torch.device("cpu"), "none")
IMAGES = 47  # a prime: no number of processes and no batch size divides it


def logits_of(images: int, classes: int) -> NDArray[np.float32]:
    return np.random.default_rng(images * classes).normal(size=(images, classes)).astype(np.float32)


def predictions_of(logits: NDArray[np.float32], labels: NDArray[np.int64], batch_size: int = 10) -> Predictions:
    """The result of `evaluate` for these logits, in batches in reverse order."""
    indices = np.arange(len(labels))
    batches = [
        Batch(torch.from_numpy(logits[part]), torch.from_numpy(labels[part]), torch.from_numpy(part))
        for part in np.split(indices, range(batch_size, len(labels), batch_size))
    ]
    return evaluate(lambda images: images, reversed(batches))


def same(one: Predictions, other: Predictions) -> bool:
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        and getattr(one, field.name).dtype == getattr(other, field.name).dtype
        for field in fields(Predictions)
    )


# ---- counts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "classes"), [(53, 12), (20, 5), (31, 1000)])
def test_counts_margins_and_losses_are_those_of_numpy(images: int, classes: int) -> None:
    logits = logits_of(images, classes)
    labels = np.random.default_rng(1).integers(0, classes, images)
    found = predictions_of(logits, labels)
    ranks = (logits > logits[np.arange(images), labels][:, None]).sum(axis=1)  # classes above the label
    assert np.array_equal(found.correct(1), ranks < 1)
    assert np.array_equal(found.correct(5), ranks < 5)
    assert found.accuracy(5) == int((ranks < 5).sum()) / images
    assert np.array_equal(found.top, np.argsort(-logits, axis=1)[:, :5])
    ordered = np.sort(logits, axis=1)
    np.testing.assert_array_equal(found.margins, ordered[:, -1] - ordered[:, -2])
    wide = logits.astype(np.float64)
    losses = np.log(np.exp(wide).sum(axis=1)) - wide[np.arange(images), labels]
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
    assert found.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert np.array_equal(found.indices, np.arange(images))
    assert np.array_equal(found.labels, labels)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_with_fewer_than_five_classes_every_label_is_in_the_top_five(classes: int) -> None:
    labels = np.arange(20) % classes
    found = predictions_of(logits_of(20, classes), labels)
    assert found.top.shape == (20, classes)
    assert found.accuracy(5) == 1.0
    assert np.array_equal(found.correct(1), logits_of(20, classes).argmax(axis=1) == labels)


def test_one_class_has_no_margin() -> None:
    found = predictions_of(logits_of(3, 1), np.zeros(3, np.int64))
    assert found.margins.tolist() == [0, 0, 0]
    assert found.accuracy(1) == 1.0


def test_uneven_batches_weigh_by_images_not_by_batches() -> None:
    """T4: the mean of batch means would be 0.75."""
    logits = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    found = predictions_of(logits, np.array([0, 1, 1]), batch_size=2)
    assert found.accuracy(1) == 2 / 3


def test_the_class_table_adds_up_and_is_right_class_by_class() -> None:
    logits, labels = logits_of(200, 9), np.random.default_rng(2).integers(0, 8, 200)  # class 8 has no image
    found = predictions_of(logits, labels)
    table = class_table(found, [(f"n{index}", f"class {index}") for index in range(9)])
    assert [row.index for row in table] == list(range(9))
    assert (table[3].class_id, table[3].name) == ("n3", "class 3")
    for row in table:
        mine = labels == row.index
        best = np.argsort(-logits[mine], axis=1)
        assert row.images == mine.sum()
        assert row.correct_top1 == (best[:, 0] == row.index).sum()
        assert row.correct_top5 == (best[:, :5] == row.index).any(axis=1).sum()
    assert sum(row.images for row in table) == 200
    assert sum(row.correct_top1 for row in table) == found.correct(1).sum()
    assert sum(row.correct_top5 for row in table) == found.correct(5).sum()
    assert table[8].images == table[8].correct_top5 == 0


# ---- putting processes together ---------------------------------------------------------------------


def part(indices: list[int]) -> Predictions:
    whole = predictions_of(logits_of(20, 6), np.arange(20) % 6)
    return Predictions(*(getattr(whole, field.name)[indices] for field in fields(Predictions)))


def test_parts_in_any_order_merge_to_the_same_result() -> None:
    whole = part(list(range(20)))
    assert same(concatenate([part([5, 19, 0]), part([1, 2, 3, 4]), part(list(range(6, 19)))]), whole)
    collected = collect(part(list(range(20))[::-1]), ALONE, 20)
    assert collected is not None
    assert same(collected, whole)


@pytest.mark.parametrize("indices", [[*range(19)], [*range(20), 7], [*range(19), 7], [*range(1, 20)], []])
def test_a_missing_or_repeated_image_is_refused(indices: list[int]) -> None:
    with pytest.raises(AssertionError, match="left out or counted twice"):
        collect(part(indices), ALONE, 20)


# ---- the predictions file ---------------------------------------------------------------------------


def test_the_predictions_file_is_plain_arrays_with_deterministic_bytes() -> None:
    predictions, keys = part(list(range(20))), [f"val_{index:03d}" for index in range(20)]
    content = predictions_file(predictions, keys)
    assert content == predictions_file(part(list(range(20))), list(keys))
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        assert set(stored) == {"key", "label", "top5", "margin"}
        assert stored["key"].tolist() == keys
        assert np.array_equal(stored["label"], predictions.labels)
        assert np.array_equal(stored["top5"], predictions.top)
        assert np.array_equal(stored["margin"], predictions.margins)


def test_one_changed_prediction_changes_the_file() -> None:
    predictions, keys = part(list(range(20))), [str(index) for index in range(20)]
    other = replace(predictions, margins=np.nextafter(predictions.margins, np.float32(9)))
    assert predictions_file(predictions, keys) != predictions_file(other, keys)


# ---- names ------------------------------------------------------------------------------------------


def test_a_metrics_name_says_pixels_weights_and_checkpoint() -> None:
    """T10, T11: protocols have different names."""
    view = build_evaluation_transform(compose_config("evaluation.resize_pixels=256").evaluation).name
    assert protocol_name(view, is_average=False) == "resize256-crop224-bilinear"
    assert protocol_name(view, is_average=True) == "resize256-crop224-bilinear-average"
    assert protocol_name(view, is_average=False, checkpoint="best") == "resize256-crop224-bilinear-best"
    assert protocol_name(view, is_average=True, checkpoint="step-00000012").endswith("-average-step-00000012")


def test_flipped_views_are_named() -> None:
    """T10: before the weights and the checkpoint, since it is part of the view."""
    view = build_evaluation_transform(compose_config("evaluation.resize_pixels=256").evaluation)
    assert view_name(view, flip=False) == "resize256-crop224-bilinear"
    assert protocol_name(view_name(view, flip=True), is_average=False) == "resize256-crop224-bilinear-flip"
    assert protocol_name(view_name(view, flip=True), True, "best") == "resize256-crop224-bilinear-flip-average-best"


# ---- the predictor ----------------------------------------------------------------------------------


def small_config(data_directory: Path) -> Config:
    return compose_config(
        "experiment=smoke",
        f"data.directory={data_directory}",
        "evaluation.batch_size=10",
        "trainer.torch_threads=1",
        "loader.threads=2",
        "model.zero_init_last_norm=false",
    )


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_predictor_is_the_model_in_evaluation_mode(precision: Precision, channels_last: bool) -> None:
    model = build_model(compose_config("experiment=smoke").model, 7, 0)
    normalisation = Normalisation([0.5] * 3, [0.25] * 3, torch.device("cpu"))
    images = torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = predictor(model, normalisation, precision, torch.device("cpu"), channels_last)(images)
    assert not model.training
    assert logits.dtype is torch.float32
    expected = model(normalisation(images)).detach()
    tolerance = 1e-5 if precision is Precision.fp32 else 0.05
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_flipped_views_are_the_mean_of_both_logits() -> None:
    model = build_model(replace(compose_config("experiment=smoke").model, zero_init_last_norm=False), 7, 0)
    normalisation = Normalisation([0.5] * 3, [0.25] * 3, torch.device("cpu"))
    images = torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    both = predictor(model, normalisation, Precision.fp32, torch.device("cpu"), channels_last=True, flip=True)
    mirrored = torch.from_numpy(np.ascontiguousarray(images.numpy()[..., ::-1]))
    with torch.inference_mode():
        expected = torch.stack([model(normalisation(views)) for views in (images, mirrored)]).mean(dim=0)
    torch.testing.assert_close(both(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both(mirrored), both(images), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(model(normalisation(images)), expected, atol=1e-3)


def evaluated_in(world: World, config: Config) -> Predictions | None:
    """The first images of the validation split, through a freshly initialised network."""
    split = open_split(config.data.directory, "val")
    split.index = split.index[:IMAGES]
    model = build_model(config.model, 12, config.seed)
    predict = predictor(
        model,
        Normalisation(config.data.mean, config.data.std, world.device),
        Precision.fp32,
        world.device,
        channels_last=True,
    )
    with closing(ThreadedLoader(split, build_decoder(config.loader.decoder), config.loader, world)) as threads:
        batches = EvaluationBatches(
            threads, build_evaluation_transform(config.evaluation), config.evaluation.batch_size, world
        )
        return collect(evaluate(predict, batches), world, IMAGES)


def evaluated_together(config: Config) -> tuple[Predictions | None, Predictions]:
    """The predictions of all processes together, and of this one alone."""
    with start_world(config.trainer) as world:
        return evaluated_in(world, config), evaluated_in(ALONE, config)  # type: ignore[return-value]


@pytest.mark.process
def test_one_two_and_three_processes_predict_the_same_to_the_last_bit(data_directory: Path) -> None:
    """T1-T3, T5: no padding, no dropped images, unequal numbers of batches, margins and losses included."""
    config = small_config(data_directory)
    found = {size: spawn_ranks(size, evaluated_together, config) for size in (2, 3)}
    alone = found[2][0][1]
    assert alone.images == IMAGES
    assert len(np.unique(alone.margins)) == IMAGES
    for size, ranks in found.items():
        together, *others = (whole for whole, _ in ranks)
        assert together is not None, size
        assert same(together, alone), size
        assert others == [None] * (size - 1)
        assert all(same(single, alone) for _, single in ranks)
    keys = [str(index) for index in range(IMAGES)]
    assert len({predictions_file(ranks[0][0], keys) for ranks in found.values()}) == 1


def test_logits_are_pure(data_directory: Path) -> None:
    """The same images give the same logits after any other prediction."""
    config = small_config(data_directory)
    model = build_model(config.model, 12, 0)
    predict = predictor(
        model,
        Normalisation(config.data.mean, config.data.std, torch.device("cpu")),
        Precision.fp32,
        torch.device("cpu"),
        channels_last=True,
    )
    images: Tensor = torch.randint(0, 256, (5, 3, 24, 24), dtype=torch.uint8)
    first = predict(images)
    predict(255 - images)
    assert torch.equal(first, predict(images))
