"""Mixup, cutmix, erasing and repeated augmentation: torchvision's results, for any division of a global batch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torchvision.transforms import v2

from recipe.config.schema import Config
from recipe.data.augment.crop import Augmentation, ProgressiveResizing, build_augmentation
from recipe.data.augment.mixup import (
    BatchPlace,
    Erasing,
    GroupMix,
    Mixing,
    MixParameters,
    Rectangle,
    dominant_labels,
    mix,
    mix_parameters,
    predecessors,
    soft_targets,
)
from recipe.data.batches import Batch, BatchLayout, TrainingBatches
from recipe.data.decoding import EncodedImage, WholeImage, decoded
from recipe.data.loader import ThreadedLoader
from recipe.errors import UserError
from tests.builders.configs import compose_config
from tests.builders.ranks import spawn_ranks
from tests.builders.training import ALONE, network, step_of

PIXELS, CLASSES = 20, 10
NOTHING = Rectangle(0, 0, 0, 0)
MIXED = [
    "augmentation.mixup.mixup_alpha=0.2",
    "augmentation.mixup.cutmix_alpha=1.0",
    "augmentation.repeated_augmentation=2",
]
ERASED = "augmentation.random_erasing.probability=0.5"


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(count, 3, PIXELS, PIXELS, generator=generator).to(memory_format=torch.channels_last)
    return pictures, torch.randint(0, CLASSES, (count,), generator=generator)


def parameters_of(groups: list[GroupMix], size: int) -> MixParameters:
    drawn = [group for group in groups for _ in range(size)]
    return MixParameters(
        torch.empty(0, 4, dtype=torch.int64),
        torch.tensor([draw.lam for draw in drawn]),
        torch.tensor([draw.rectangle for draw in drawn]),
        torch.tensor([draw.weight for draw in drawn]),
        predecessors(len(drawn), size),
    )


# ---- under the same draw ------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixup_is_torchvisions(share: float) -> None:
    pictures, labels = images(8)
    parameters = parameters_of([GroupMix(share, NOTHING, share)], 8)
    oracle = v2.MixUp(num_classes=CLASSES)
    given = {"lam": share, "labels": labels, "batch_size": 8}
    torch.testing.assert_close(mix(pictures, parameters), oracle.transform(pictures, given))
    torch.testing.assert_close(soft_targets(labels, parameters, CLASSES), oracle.transform(labels, given))


def test_cutmix_is_torchvisions() -> None:
    pictures, labels = images(8)
    weight = 1 - 6 * 9 / PIXELS**2
    parameters = parameters_of([GroupMix(1.0, Rectangle(2, 5, 8, 14), weight)], 8)
    oracle = v2.CutMix(num_classes=CLASSES)
    given = {"box": (5, 2, 14, 8), "lam_adjusted": weight, "labels": labels, "batch_size": 8}
    assert torch.equal(mix(pictures, parameters), oracle.transform(pictures, given))
    torch.testing.assert_close(soft_targets(labels, parameters, CLASSES), oracle.transform(labels, given))


def test_groups_are_mixed_separately_and_the_memory_layout_stays() -> None:
    pictures, labels = images(8)
    groups = [GroupMix(0.3, NOTHING, 0.3), GroupMix(1.0, NOTHING, 1.0)]
    whole = mix(pictures, parameters_of(groups, 4))
    assert whole.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(whole[:4], mix(pictures[:4], parameters_of(groups[:1], 4)))
    assert torch.equal(whole[4:], pictures[4:])
    targets = soft_targets(labels, parameters_of(groups, 4), CLASSES)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))


def test_erasing_sets_a_rectangle_to_zero_as_torchvision_does() -> None:
    pictures, _ = images(2)
    erased = torch.tensor([[3, 4, 9, 15], [0, 0, 0, 0]])
    empty = torch.empty(0)
    found = mix(pictures, MixParameters(erased, empty, empty, empty, torch.empty(0, dtype=torch.int64)))
    expected = v2.functional.erase(pictures[0], 3, 4, 6, 11, torch.zeros(1))
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], pictures[1])
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_training_accuracy_counts_the_heavier_class() -> None:
    labels = torch.tensor([1, 2])
    assert dominant_labels(labels, parameters_of([GroupMix(0.7, NOTHING, 0.7)], 2)).tolist() == [1, 2]
    assert dominant_labels(labels, parameters_of([GroupMix(0.3, NOTHING, 0.3)], 2)).tolist() == [2, 1]
    assert dominant_labels(labels, None) is labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_are_smoothed_once(smoothing: float) -> None:
    """T29: cross entropy with mixed and then smoothed targets, in closed form."""
    _, labels = images(4)
    parameters = parameters_of([GroupMix(0.4, NOTHING, 0.4)], 4)
    logits = torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(1))
    mixed = 0.4 * nn.functional.one_hot(labels, CLASSES) + 0.6 * nn.functional.one_hot(labels.roll(1), CLASSES)
    target = (1 - smoothing) * mixed + smoothing / CLASSES
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    found = nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, soft_targets(labels, parameters, CLASSES))
    torch.testing.assert_close(found, expected)


# ---- the draws ----------------------------------------------------------------------------------------


def test_shares_are_of_the_beta_distribution() -> None:
    mixing = Mixing(seed=3, mixup_alpha=0.4)
    shares = [mixing.draw(0, batch, group, PIXELS).lam for batch in range(100) for group in range(20)]
    assert stats.kstest(shares, stats.beta(0.4, 0.4).cdf).pvalue > 1e-3


def test_cutmix_rectangles_are_distributed_as_torchvisions() -> None:
    mixing = Mixing(seed=3, cutmix_alpha=1.0)
    mine = [mixing.draw(0, batch, group, 64).weight for batch in range(100) for group in range(20)]
    torch.manual_seed(0)
    oracle = v2.CutMix(alpha=1.0, num_classes=CLASSES)
    blank = torch.zeros(2, 3, 64, 64)
    assert stats.ks_2samp(mine, [oracle.make_params([blank])["lam_adjusted"] for _ in range(2000)]).pvalue > 1e-3


def test_both_share_the_groups_and_the_probability_leaves_some_alone() -> None:
    both = Mixing(seed=1, mixup_alpha=0.2, cutmix_alpha=1.0, switch_probability=0.25, probability=0.5)
    drawn = [both.draw(0, batch, 0, 64) for batch in range(4000)]
    cut = sum(draw.rectangle != NOTHING for draw in drawn)
    alone = sum(draw == GroupMix(1.0, NOTHING, 1.0) for draw in drawn)
    assert abs(cut - 500) < 100  # some rectangles are empty: their sides round to 0
    assert abs(alone - 2000) < 200


def test_erasing_is_distributed_as_torchvisions() -> None:
    erasing = Erasing(seed=1, probability=1.0)
    areas = []
    for index in range(2000):
        top, left, bottom, right = erasing.draw(0, index, 0, 64)
        areas.append((bottom - top) * (right - left))
    torch.manual_seed(0)
    oracle = v2.RandomErasing(p=1.0)
    theirs = [oracle.make_params([torch.zeros(3, 64, 64)]) for _ in range(2000)]
    assert stats.ks_2samp(areas, [found["h"] * found["w"] for found in theirs]).pvalue > 1e-3
    rare = replace(erasing, probability=0.1)
    hits = sum(rare.draw(0, index, 0, 64) != NOTHING for index in range(4000))
    assert abs(hits - 400) < 100


def test_every_part_of_the_key_matters_and_nothing_else() -> None:
    mixing, erasing = Mixing(seed=1, mixup_alpha=1.0), Erasing(seed=1, probability=1.0)
    shares = {mixing.draw(e, b, g, 64).lam for e in range(3) for b in range(3) for g in range(3)}
    shares |= {replace(mixing, seed=2).draw(0, 0, 0, 64).lam}
    assert len(shares) == 28
    assert mixing.draw(1, 2, 0, 64) == mixing.draw(1, 2, 0, 64)
    rectangles = {erasing.draw(e, i, c, 640) for e in range(2) for i in range(3) for c in range(2)}
    assert len(rectangles) == 12


def test_a_group_size_that_does_not_divide_a_forward_pass_is_refused() -> None:
    mixing = Mixing(seed=1, mixup_alpha=1.0, group_size=8)
    indices = np.arange(12)
    with pytest.raises(UserError, match=r"augmentation\.mixup\.group_size=8 does not divide the 12 images"):
        mix_parameters(mixing, Erasing(), BatchPlace(0, 0, 0, 64), indices, np.zeros_like(indices))


# ---- the same global batch, however it is divided -----------------------------------------------------


class Numbers:
    """A split with the value k in image k."""

    def __init__(self, count: int) -> None:
        self.labels = np.arange(count, dtype=np.uint32) % CLASSES
        self.count = count

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> bytes:
        return index.to_bytes(4, "little")


class Stripes:
    """Stands in for a decoder."""

    name = "stripes"

    def open(self, content: bytes) -> EncodedImage:
        value = int.from_bytes(content, "little")
        rows = torch.arange(PIXELS).view(1, -1, 1) * (value % 7 + 1)
        stripes = (rows + torch.arange(PIXELS).view(1, 1, -1) + value).expand(3, -1, -1) % 256
        return WholeImage(stripes.to(torch.uint8))


def configuration(*words: str) -> Config:
    return compose_config(
        "experiment=smoke",
        "trainer.precision=fp32",
        "augmentation.crop_pixels=20",
        "optimization.batch_size=48",
        "loader.threads=1",
        *words,
    )


def global_batches(config: Config, layout: BatchLayout) -> list[Batch]:
    """The global batches of one epoch, merged from all ranks and accumulation steps."""
    augmentation = build_augmentation(config.augmentation, config.seed)
    ranks = []
    for rank in range(layout.processes):
        threads = ThreadedLoader(Numbers(100), Stripes(), config.loader, ALONE)  # type: ignore[arg-type]
        ranks.append(list(TrainingBatches(threads, augmentation, layout, rank, config.seed).epoch(1)))
        threads.close()
    wholes = []
    for steps in zip(*ranks, strict=True):
        parts = [steps[rank][step] for step in range(layout.accumulation_steps) for rank in range(layout.processes)]
        blends = [mix(part.images.float(), part.mix_parameters) for part in parts]
        targets = [soft_targets(part.labels, part.mix_parameters, CLASSES) for part in parts]
        wholes.append(Batch(torch.cat(blends), torch.cat(targets), torch.cat([part.indices for part in parts])))
    return wholes


@pytest.mark.parametrize("layout", [BatchLayout(48, 2, 1), BatchLayout(48, 3, 1), BatchLayout(48, 1, 2)])
def test_mixing_and_erasing_do_not_depend_on_the_number_of_processes(layout: BatchLayout) -> None:
    config = configuration(*MIXED, ERASED, "augmentation.auto_augment.policy=trivial_augment")
    for one, other in zip(global_batches(config, BatchLayout(48, 1, 1)), global_batches(config, layout), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


def test_repeated_augmentation_repeats_every_image_in_different_views() -> None:
    config = configuration("augmentation.repeated_augmentation=4")
    augmentation = build_augmentation(config.augmentation, 0)
    threads = ThreadedLoader(Numbers(100), Stripes(), config.loader, ALONE)  # type: ignore[arg-type]
    batches = TrainingBatches(threads, augmentation, BatchLayout(48, 1, 1), 0, 0)
    (first,), (second,) = batches.epoch(0)
    facts = batches.facts()
    threads.close()
    for batch in (first, second):
        assert sorted(np.bincount(np.unique(batch.indices, return_inverse=True)[1]).tolist()) == [4] * 12
        copies = batch.images[batch.indices == batch.indices[0]]
        assert len({copy.numpy().tobytes() for copy in copies}) == 4
        assert all(a != b for a, b in zip(batch.indices, batch.indices[1:], strict=False)), "neighbours differ"
    assert not set(first.indices.tolist()) & set(second.indices.tolist())
    assert (facts.images_per_epoch, facts.unique_images_per_epoch) == (96, 24)
    with pytest.raises(
        UserError, match=r"augmentation\.repeated_augmentation=5 does not divide optimization\.batch_size=48"
    ):
        TrainingBatches(threads, replace(augmentation, repeats=5), BatchLayout(48, 1, 1), 0, 0)


# ---- sizes by epoch -----------------------------------------------------------------------------------


def ffcvs_size(epoch: int, low: int, high: int, start: int, end: int) -> int:
    """`get_resolution` of ffcv-imagenet: linear between two ends, rounded."""
    if epoch <= start:
        return low
    if epoch >= end:
        return high
    share = (epoch - start) / (end - start)
    return int(np.round((low + share * (high - low)) / 32)) * 32


@pytest.mark.parametrize(("start", "end", "epochs"), [(65, 76, 88), (11, 13, 16), (23, 28, 32)])
def test_sizes_grow_as_ffcvs(start: int, end: int, epochs: int) -> None:
    resizing = ProgressiveResizing(160, start, end, 32)
    assert [resizing.pixels(epoch, 192) for epoch in range(epochs)] == [
        ffcvs_size(epoch, 160, 192, start, end) for epoch in range(epochs)
    ]


def test_views_and_the_record_have_the_sizes_of_their_epochs() -> None:
    config = configuration(
        "augmentation.progressive_resizing.first_pixels=12",
        "augmentation.progressive_resizing.start_epoch=1",
        "augmentation.progressive_resizing.end_epoch=3",
        "augmentation.progressive_resizing.multiple=4",
    )
    augmentation = build_augmentation(config.augmentation, 0)
    image = decoded((3).to_bytes(4, "little"), Stripes())
    sizes = [tuple(augmentation(image, epoch, 0).shape) for epoch in range(4)]
    assert sizes == [(3, 12, 12), (3, 12, 12), (3, 16, 16), (3, 20, 20)]
    expected = ["12 from epoch 1", "16 from epoch 3", "20 from epoch 4"]
    assert augmentation.facts(4)["random_resized_crop_pixels"] == expected
    assert augmentation.facts(2)["random_resized_crop_pixels"] == 12


def test_the_record_names_only_active_methods() -> None:
    def keys(*words: str) -> set[str]:
        return set(build_augmentation(configuration(*words).augmentation, 0).facts(1))

    plain = keys()
    assert keys("augmentation.auto_augment.policy=rand_augment") - plain >= {"policy", "policy_magnitude"}
    assert keys(ERASED) - plain == {"erasing_probability", "erasing_scale", "erasing_ratio"}
    assert keys(*MIXED) - plain >= {"mixup_alpha", "cutmix_alpha", "mixing_group_images", "repeats_in_a_global_batch"}


# ---- one step, however it is divided ------------------------------------------------------------------


def stepped(processes: int, words: list[str]) -> dict[str, Any]:
    """The weights of a model without norm after two steps, on one rank of `processes`."""
    import os

    from recipe.distributed import start_world

    config = configuration(*words, "optimization.learning_rate=0.1")
    config = replace(config, trainer=replace(config.trainer, gpus=None))
    with start_world(config.trainer) as world:
        layout = BatchLayout(48, world.size, 1)
        augmentation: Augmentation = build_augmentation(config.augmentation, config.seed)
        threads = ThreadedLoader(Numbers(100), Stripes(), config.loader, world)  # type: ignore[arg-type]
        batches = TrainingBatches(threads, augmentation, layout, world.rank, config.seed)
        from recipe.training.step import replicate

        model = network(config)
        example = torch.zeros(1, 3, PIXELS, PIXELS, dtype=torch.float64)
        train_step = step_of(config, model, world, replicate(model, world, example, config.trainer.precision))
        for step in batches.epoch(0):
            train_step(step, 0.1)
        threads.close()
    assert os.environ.get("WORLD_SIZE", "1") == str(processes)
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}


@pytest.mark.process
@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_mixed_erased_steps_are_those_of_one_process(processes: int) -> None:
    words: list[Any] = [*MIXED, ERASED]
    expected = stepped(1, words)
    for found in spawn_ranks(processes, stepped, processes, words):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-11)
    plain = stepped(1, [])
    assert any(not math.isclose(float(plain[n].sum()), float(expected[n].sum())) for n in plain)
