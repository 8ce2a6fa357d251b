"""Every experiment of the book trains some real steps: its own ingredients, on a small network and small images."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from recipe.config.identity import to_dict
from recipe.config.schema import Config
from recipe.document.render import write_document
from recipe.run.directory import Run
from recipe.run.files import CHECKOUT
from recipe.run.records import EvaluationRecord, TrainingRecord
from recipe.stages.evaluate import evaluate_run
from recipe.training.loop import train
from tests.builders.configs import SMALL_DEMO, compose_config

pytestmark = pytest.mark.process

EXPERIMENTS = sorted(path.stem for path in (CHECKOUT / "conf" / "experiment").glob("*.yaml"))
BOOK = [name for name in EXPERIMENTS if name.startswith("resnet50_")]
SMALLER = [  # sizes only: what makes the recipe stays
    *SMALL_DEMO,
    "data=demo",
    "model.name=resnet18",
    "trainer.accelerator=cpu",
    "trainer.precision=fp32",
    "trainer.max_micro_batch_size=24",
    "loader.threads=2",
    "optimization.batch_size=24",
    "optimization.epochs=1",
    "optimization.warmup_epochs=0.5",
    "optimization.step_epochs=[]",
    "optimization.ema.every_steps=1",
    "augmentation.crop_pixels=32",
    "augmentation.mixup.group_size=8",
    "augmentation.progressive_resizing.start_epoch=0",
    "augmentation.progressive_resizing.end_epoch=1",
    "augmentation.progressive_resizing.multiple=8",
    "evaluation.resize_pixels=36",
    "evaluation.crop_pixels=32",
    "evaluation.batch_size=16",
]


def smaller(name: str, data_directory: Path, run_dir: Path) -> Config:
    whole = compose_config(f"experiment={name}")
    rate = whole.optimization.learning_rate * 24 / whole.optimization.batch_size
    words = [f"optimization.learning_rate={rate}"]
    if whole.augmentation.progressive_resizing.first_pixels is not None:
        words.append("augmentation.progressive_resizing.first_pixels=24")
    return compose_config(
        f"experiment={name}", *SMALLER, *words, f"data.directory={data_directory}", f"run_dir={run_dir}"
    )


@pytest.fixture(scope="module")
def trained(
    data_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Config, TrainingRecord, str]]:
    """Every experiment with its record and its document, after evaluation."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in BOOK:
            directory = tmp_path_factory.mktemp(name)
            patch.chdir(directory)
            config = smaller(name, data_directory, directory / "run")
            record = train(config)
            assert record is not None
            evaluate_run(config)
            write_document(Run(config.run_dir), f"runs/{name}")
            found[name] = (config, record, Run(config.run_dir).document.read_text())
    return found


@pytest.mark.parametrize("name", BOOK)
def test_it_trains(name: str, trained: dict[str, tuple[Config, TrainingRecord, str]]) -> None:
    config, record, _ = trained[name]
    assert record.schedule.steps == 4
    assert all(math.isfinite(epoch.train_loss + epoch.validation_loss) for epoch in record.epochs)
    assert record.outputs["weights"] != record.inputs["initial weights"]
    measured = Run(config.run_dir).read(EvaluationRecord)
    assert measured is not None
    assert measured.protocol.name.endswith(("-flip", "-flip-average")) == config.evaluation.flip


def test_the_ingredients_of_a_recipe_are_read_back(
    trained: dict[str, tuple[Config, TrainingRecord, str]],
) -> None:
    v2, rsb, mosaic, fast = (
        trained[name][1]
        for name in ("resnet50_torchvision_v2", "resnet50_rsb_a3", "resnet50_mosaic_mild", "resnet50_fast_16")
    )
    assert v2.augmentation["policy"] == "TrivialAugment, wide"
    assert (v2.augmentation["mixup_alpha"], v2.augmentation["erasing_probability"]) == (0.2, 0.1)
    assert (v2.loader.images_per_epoch, v2.loader.unique_images_per_epoch) == (96, 24)
    assert rsb.optimizer == "Lamb"
    assert rsb.augmentation["policy_magnitude"] == 0.6
    assert "Binary" in str(mosaic.loss["class"])
    assert mosaic.augmentation["random_resized_crop_pixels"] == 24
    assert any("Blur" in kind for kind in fast.model.modules)
    assert trained["resnet50_fast_16"][0].evaluation.flip


def test_documents_of_two_recipes_differ_in_the_right_sections(
    trained: dict[str, tuple[Config, TrainingRecord, str]],
) -> None:
    plain, v2 = (trained[name][2] for name in ("resnet50_imagenet", "resnet50_torchvision_v2"))

    def section(document: str, begin: str, end: str) -> str:
        return document[document.index(begin) : document.index(end)]

    hyperparameters = [section(page, "#### Hyperparameters", "#### Outputs") for page in (plain, v2)]
    assert "mixup_alpha" not in hyperparameters[0]
    assert "mixup_alpha" in hyperparameters[1]
    assert "different ones" in hyperparameters[1]
    data = [section(page, "## Data", "<!-- recipe:begin optimization_methods") for page in (plain, v2)]
    assert data[0] == data[1], "both used the same data set"


@pytest.mark.parametrize(
    ("child", "parent"), [("resnet50_fast_16", "resnet50_fast_88"), ("resnet50_fast_32", "resnet50_fast_88")]
)
def test_a_child_differs_from_its_parent_only_where_it_says_so(child: str, parent: str) -> None:
    one, other = (to_dict(compose_config(f"experiment={name}")) for name in (child, parent))
    for key in ("name", "run_dir", "description"):
        one.pop(key), other.pop(key)
    for config in (one, other):
        config["optimization"].pop("epochs")
        config["augmentation"]["progressive_resizing"].pop("start_epoch")
        config["augmentation"]["progressive_resizing"].pop("end_epoch")
    assert one == other
