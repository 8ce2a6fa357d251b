"""The document as a whole: what it says about a run, how it keeps up with the run's records, what it refuses."""

import hashlib
import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from recipe.config import identity as configuration
from recipe.document import figures, render
from recipe.document.render import check_document, generated_blocks, json_file, write_document
from recipe.document.run_data import RunData, sections
from recipe.errors import UserError
from recipe.run.directory import Run
from recipe.run.files import CHECKOUT
from recipe.run.metric_rows import EPOCH_FIELDS
from recipe.run.records import (
    Archive,
    ClassCounts,
    Epoch,
    EvaluationRecord,
    Hardware,
    LabelExample,
    LeftOut,
    LoaderFacts,
    ModelFacts,
    ParameterGroup,
    PreprocessingRecord,
    Protocol,
    Provenance,
    Schedule,
    Session,
    SplitFacts,
    TrainingRecord,
    TreeState,
    UnusualImage,
)

COMMIT = "3b18e512dba79e4c8300dd08aeb37f8e728b8dad"
CONFIG: dict[str, Any] = {
    "name": "demo",
    "seed": 0,
    "description": {
        "summary": "Shows the whole pipeline on a data set that the project draws itself",
        "hardware": "2 CPU cores",
        "expected_time": "about 4 minutes",
        "expected_accuracy": "85 % top-1 or better",
        "expected_source": "",
        "papers": [],
        "action_items": [],
    },
    "data": {
        "name": "demo",
        "source": "demo",
        "expect": "nothing",
        "description": {
            "summary": "Drawn textures and shapes of 12 classes, for seeing the whole pipeline work in minutes",
            "origin": "Drawn by recipe/preprocessing/demo.py; no photograph and no person in it",
            "licence": "That of this project (MIT)",
            "access": "Nothing is downloaded; preprocess.py draws it",
            "labels": "One label an image, the class that was drawn",
            "test_set": "Drawn by the same code from other random numbers than the training images",
            "biases": "Easy by construction; says nothing about photographs",
            "adding_samples": "",
            "papers": [],
        },
    },
    "model": {
        "name": "resnet50",
        "zero_init_last_norm": True,
        "description": {
            "summary": "ResNet-50 v1.5 (post-activation bottlenecks, stride on the 3x3 convolution)",
            "papers": ["He et al., Deep Residual Learning for Image Recognition, arXiv 1512.03385"],
        },
    },
    "optimization": {"epochs": 8, "batch_size": 32, "learning_rate": 0.1},
}
EPOCHS, STEPS_PER_EPOCH = 8, 37
LOGGED = (20, STEPS_PER_EPOCH)  # steps of an epoch that end a train row


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def provenance(command: str, **changes: Any) -> Provenance:
    values: dict[str, Any] = {
        "command": command,
        "commit": COMMIT,
        "tree_at_start": TreeState(state="clean"),
        "tree_at_end": TreeState(state="clean"),
        "source_sha256": sha("source"),
        "source_sha256_at_end": sha("source"),
        "started": "2026-11-23T21:00:00Z",
        "seconds": 214.8,
        "hardware": Hardware(processor="AMD EPYC 9534 64-Core Processor", cores=2, memory_gib=15.6),
        "versions": {"python": "3.11.9", "system": "Linux x86_64", "torch": "2.15.0", "torchvision": "0.30.0"},
        "environment": {"OMP_NUM_THREADS": "2"},
    }
    return Provenance(**{**values, **changes})


def split_facts(images: int) -> SplitFacts:
    return SplitFacts(
        images=images,
        classes=12,
        images_per_class_min=images // 12,
        images_per_class_max=images // 12,
        raw_sha256=sha(f"raw {images}"),
        shards=math.ceil(images / 250),
        shard_bytes=images * 5210,
        width_percentiles=[72, 80, 118, 156, 160],
        height_percentiles=[72, 79, 117, 157, 160],
        grey_images=3,
    )


def preprocessing_record(**changes: Any) -> PreprocessingRecord:
    values: dict[str, Any] = {
        "config_sha256": sha("data settings"),
        "provenance": provenance("python preprocess.py experiment=demo", seconds=9.31),
        "inputs": {"raw": sha("raw")},
        "outputs": {"manifest": sha("manifest"), "index": sha("index")},
        "data_set": "demo",
        "layout": "official tars",
        "raw_path": "data/raw/demo",
        "processed_path": "data/demo",
        "expectation": "nothing",
        "is_ilsvrc2012": False,
        "archives": [
            Archive(
                name=f"ILSVRC2012_img_{split}.tar",
                bytes=6_123_520,
                md5="9e107d9d372bb6826bd81d3542a419d6",
                sha256=sha(split),
                is_published_md5=None,
            )
            for split in ("train", "val")
        ],
        "splits": {"train": split_facts(1200), "validation": split_facts(480)},
        "class_count": 12,
        "class_list_sha256": sha("classes"),
        "label_convention": "class index = position among the sorted class IDs, from 0",
        "label_examples": [
            LabelExample(key=f"d0000000{index}_1", index=index, class_id=f"d0000000{index}", name=name)
            for index, name in enumerate(("rings", "stripes", "checks"))
        ],
        "validation_split": "the archive ILSVRC2012_img_val.tar",
        "shard_order": "shuffled with seed 0",
        "stored_as": "original JPEG bytes",
        "unusual_images": {"CMYK": 1, "grey": 6},
        "unusual_examples": [
            UnusualImage(split="train", key="d00000001_7", what="CMYK JPEG", done="stored as lossless RGB")
        ],
        "rejected": [],
        "decoded_with": "Pillow 13",
        "processes": 2,
        "images_per_second": 612.4,
        "continued_shards": 0,
    }
    return PreprocessingRecord(description={"licence": "MIT"}, **{**values, **changes})


def session(**changes: Any) -> Session:
    known: dict[str, Any] = {"is_exact": None, "note": "", "source": "0" * 16, "batch_norm_batch_size": 32}
    return Session(started="2026-11-23T21:00:00Z", first_step=0, processes=1, **(known | changes))


def training_record(config: dict[str, Any] = CONFIG, **changes: Any) -> TrainingRecord:
    steps = EPOCHS * STEPS_PER_EPOCH
    values: dict[str, Any] = {
        "config_sha256": configuration.config_sha256(config),
        "recipe_id": configuration.recipe_id(config),
        "provenance": provenance("python train.py experiment=demo"),
        "inputs": {"manifest": sha("manifest")},
        "outputs": {"weights": sha("weights"), "checkpoint": sha("checkpoint")},
        "seed": 0,
        "model": ModelFacts(
            name="resnet50",
            class_name="ResNet",
            classes=12,
            parameters=23_532_620,
            architecture_sha256=sha("model"),
            modules={"Conv2d": 53, "BatchNorm2d": 53, "ReLU": 17, "Linear": 1},
            batch_norm={"eps": 1e-05, "momentum": 0.1},
            zero_initialised_norms=16,
            initial_weights="random, seed 0",
            initial_weights_sha256=sha("initial"),
        ),
        "loss": {"name": "CrossEntropyLoss", "label_smoothing": 0.1},
        "optimizer": "SGD",
        "parameter_groups": [
            ParameterGroup(
                name="decayed",
                tensors=54,
                parameters=23_479_488,
                settings={"momentum": 0.9, "weight_decay": 5e-05, "nesterov": False},
            ),
            ParameterGroup(
                name="norms and biases",
                tensors=107,
                parameters=53_132,
                settings={"momentum": 0.9, "weight_decay": 0.0, "nesterov": False},
            ),
        ],
        "schedule": Schedule(
            steps=steps,
            steps_per_epoch=STEPS_PER_EPOCH,
            warmup_steps=STEPS_PER_EPOCH,
            points=[(step, learning_rate(step)) for step in range(0, steps, 3)],
        ),
        "augmentation": {
            "random_resized_crop": {"pixels": 64, "scale": [0.35, 1.0], "ratio": [0.75, 4 / 3]},
            "flip_probability": 0.5,
        },
        "augmentation_sha256": sha("augmentation"),
        "averaging": {"decay": 0.0},
        "loader": LoaderFacts(
            images_per_epoch=1184,
            unique_images_per_epoch=1184,
            images_left_out_per_epoch=16,
            global_batch_size=32,
            images_per_forward=32,
            batch_norm_batch_size=32,
            accumulation_steps=1,
            decoder="nvimgcodec",
            threads_per_process=2,
            first_indices=[811, 92, 1043, 5],
            order_sha256=sha("order"),
        ),
        "precision": {"autocast": "fp32", "channels_last": True, "compile": False, "tf32": False},
        "processes": 1,
        "backend": "none",
        "sessions": [session()],
        "epochs": epoch_records(),
        "training_seconds": 197.4,
        "validation_seconds": 19.2,
        "images_seen": EPOCHS * 1184,
        "peak_accelerator_memory_gib": None,
        "skipped_steps": 0,
        "validation_protocol": "top1-resize72-crop64-bilinear",
        "best_epoch": 8,
        "selection": "the last checkpoint",
    }
    return TrainingRecord(**{**values, **changes})


def epoch_records(epochs: int = EPOCHS) -> list[Epoch]:
    """What the validation rows say of each epoch, and what it cost; the first one is cold."""
    return [
        Epoch(
            seconds=24.1 if at > 0 else 28.7,
            images_per_second=49.2 if at > 0 else 41.3,
            data_wait_fraction=0.021 if at > 0 else 0.064,
            validation_seconds=2.4,
            **{name: row[field] for name, field in EPOCH_FIELDS.items()},
        )
        for at, row in enumerate(row for row in metric_rows(epochs) if row["split"] == "validation")
    ]


def learning_rate(step: int) -> float:
    if step < STEPS_PER_EPOCH:
        return 0.1 * step / STEPS_PER_EPOCH
    share = (step - STEPS_PER_EPOCH) / ((EPOCHS - 1) * STEPS_PER_EPOCH)
    return 0.05 * (1 + math.cos(math.pi * share))


def evaluation_record(config: dict[str, Any] = CONFIG, **changes: Any) -> EvaluationRecord:
    names = (
        "rings",
        "stripes",
        "checks",
        "dots",
        "waves",
        "stars",
        "crosses",
        "spirals",
        "grids",
        "moons",
        "bars",
        "leaves",
    )
    correct = [40, 38, 33, 36, 37, 40, 31, 39, 34, 36, 35, 32]
    values: dict[str, Any] = {
        "config_sha256": configuration.config_sha256(config),
        "provenance": provenance("python evaluate.py run_dir=runs/demo", seconds=6.2),
        "inputs": {"manifest": sha("manifest"), "weights": sha("weights")},
        "outputs": {"predictions": sha("predictions")},
        "published": {},
        "protocol": Protocol(
            backend="torch",
            arithmetic={"deterministic_algorithms": True},
            epochs_completed=90,
            epochs=90,
            name="top1-resize72-crop64-bilinear",
            transform={"resize_pixels": 72, "crop_pixels": 64, "interpolation": "bilinear", "antialias": True},
            transform_sha256=sha("transform"),
            decoder="nvimgcodec",
            precision="fp32",
            batch_size=64,
            checkpoint="last",
            weights="as trained",
        ),
        "images": 480,
        "correct_top1": sum(correct),
        "correct_top5": 476,
        "loss": 0.8312,
        "per_class": [
            ClassCounts(
                index=index,
                class_id=f"d{index:08d}",
                name=name,
                images=40,
                correct_top1=correct[index],
                correct_top5=40,
            )
            for index, name in enumerate(names)
        ],
        "processes": 1,
        "evaluation_seconds": 2.41,
        "images_per_second": 199.2,
    }
    return EvaluationRecord(**{**values, **changes})


def metric_rows(epochs: int = EPOCHS) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        for step in LOGGED:
            done = (epoch - 1) * STEPS_PER_EPOCH + step
            progress = done / (epochs * STEPS_PER_EPOCH)
            rows.append(
                {
                    "split": "train",
                    "epoch": epoch,
                    "step": done,
                    "images_seen": done * 32,
                    "loss": 2.5 - 1.6 * progress**0.5,
                    "top1_accuracy": 0.1 + 0.75 * progress**0.6,
                    "top5_accuracy": 0.9,
                    "learning_rate": learning_rate(done - 1),
                    "images_per_second": 49.0 - 6 * (done < 40) + done % 3,
                    "data_wait_fraction": 0.02 + 0.05 * (done < 40),
                    "seconds": 25.0 * epoch,
                }
            )
        rows.append(
            {
                "split": "validation",
                "epoch": epoch,
                "step": epoch * STEPS_PER_EPOCH,
                "images_seen": epoch * STEPS_PER_EPOCH * 32,
                "loss": 2.4 - 1.5 * (epoch / epochs) ** 0.5,
                "top1_accuracy": 0.1 + 0.7979 * (epoch / epochs) ** 0.7,
                "top5_accuracy": 0.99,
                "learning_rate": rows[-1]["learning_rate"],
                "images_per_second": 199.0,
                "data_wait_fraction": None,
                "seconds": 27.4 * epoch,
                **{f"train_{name}": mean_of(rows[-2:], name) for name in ("loss", "top1_accuracy", "top5_accuracy")},
            }
        )
    return rows


def mean_of(rows: list[dict[str, Any]], name: str) -> float:
    """The mean over the steps of an epoch, from its train rows."""
    steps = [LOGGED[0], LOGGED[1] - LOGGED[0]]
    return sum(row[name] * count for row, count in zip(rows, steps, strict=True)) / sum(steps)


def facts(**changes: Any) -> RunData:
    values: dict[str, Any] = {
        "name": "demo",
        "run_dir": "runs/demo",
        "config": CONFIG,
        "preprocessing": preprocessing_record(),
        "training": training_record(),
        "evaluation": evaluation_record(),
        "metrics": metric_rows(),
    }
    return RunData(**{**values, **changes})


def document(existing: str | None = None, **changes: Any) -> str:
    return render.render(facts(**changes), existing)


def section(text: str, block_id: str) -> str:
    """The generated block of this id."""
    found = re.search(rf"<!-- recipe:begin {block_id} .*?<!-- recipe:end {block_id} -->", text, re.DOTALL)
    assert found, block_id
    return found[0]


def changed_blocks(before: RunData, after: RunData) -> set[str]:
    old, new = generated_blocks(before), generated_blocks(after)
    return {block_id for block_id in new if old[block_id] != new[block_id]}


def write_run(directory: Path) -> Run:
    run = Run(directory)
    run.write_config(CONFIG)
    for record in (preprocessing_record(), training_record(), evaluation_record()):
        run.write(record)
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in metric_rows()))
    return run


# What the guideline asks for

HEADINGS = [
    "# ResNet-50 on demo (not ILSVRC2012)",
    "## How to run it again",
    "## Data",
    "### Raw data",
    "#### Description",
    "#### Path",
    "### Processing methods",
    "#### Description",
    "#### Code",
    "#### Path",
    "## Training",
    "### Optimization methods",
    "#### Description",
    "#### Code",
    "#### Hyperparameters",
    "#### Dynamics",
    "#### Outputs",
    "### Performance metrics",
    "#### Target metrics",
    "#### Code",
    "## Inference",
    "### Code",
    "### Timing information",
    "### Serialization",
    "## Miscellaneous",
    "### Papers",
    "### Journal",
    "### Action items",
    "## The recipe for programs",
]


def headings(text: str) -> list[str]:
    return re.findall(r"^#{1,6} .*$", outside_code(text), re.MULTILINE)


def outside_code(text: str) -> str:
    return re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)


def test_every_heading_of_the_guideline_is_there_in_its_order() -> None:
    assert headings(document()) == HEADINGS


@pytest.mark.parametrize(
    "missing",
    [("evaluation",), ("training", "evaluation"), ("preprocessing",), ("preprocessing", "training", "evaluation")],
)
def test_headings_stay_where_stages_are_missing(missing: tuple[str, ...]) -> None:
    assert headings(document(**dict.fromkeys(missing)))[1:] == HEADINGS[1:]


def test_ilsvrc2012_is_named_only_where_it_was_verified() -> None:
    text = document(preprocessing=preprocessing_record(is_ilsvrc2012=True, data_set="imagenet"))
    assert "# ResNet-50 on imagenet (ILSVRC2012)\n" in text


@pytest.mark.parametrize(
    ("missing", "block_id", "command"),
    [
        ("preprocessing", "raw_data", "`python preprocess.py experiment=demo`"),
        ("training", "dynamics", "`python train.py experiment=demo`"),
        ("evaluation", "performance_metrics", "`python evaluate.py run_dir=runs/demo`"),
    ],
)
def test_a_missing_stage_names_its_command(missing: str, block_id: str, command: str) -> None:
    assert f"Not measured yet: run {command}." in section(document(**{missing: None}), block_id)


def test_later_chapters_say_that_this_release_lacks_them() -> None:
    assert "Not measured yet: run `python serialize.py run_dir=" in document()


def test_only_the_data_chapter_after_preprocessing_alone() -> None:
    text = document(config=None, training=None, evaluation=None, metrics=[], run_dir="runs/x", name="x")
    assert text.splitlines()[2] == "# Data set demo (not ILSVRC2012)"
    assert "| train | 1,200 | 12 |" in section(text, "raw_data")
    assert "`python train.py experiment=demo run_dir=runs/x`" in section(text, "optimization_methods")
    assert "figures/" not in text


def test_the_next_command_keeps_the_words_of_a_data_set_of_ones_own() -> None:
    """Its name has no file in conf/experiment; paths are quoted for the shell."""
    words = """data=folder data.raw_dir="$RAW_DIR" 'data.directory=my data (2)' name=mine 'run_dir=my runs/x y'"""
    text = document(
        config=None,
        name="mine",
        run_dir="my runs/x y",
        preprocessing=preprocessing_record(provenance=provenance(f"python preprocess.py {words}")),
        training=None,
        evaluation=None,
    )
    kept = words.partition(" 'run_dir")[0]
    assert f"`python train.py {kept} run_dir='my runs/x y'`" in section(text, "optimization_methods")


def test_accuracy_is_one_number_everywhere_with_its_counts() -> None:
    text = document()
    found = re.findall(r"89\.\d+ %(?: \([^)]*\))?", section(text, "summary") + section(text, "performance_metrics"))
    assert found == ["89.79 % (431 of 480)"] * 2
    assert "1 run: spread unknown" in section(text, "summary")
    assert "`top1-resize72-crop64-bilinear`" in section(text, "summary")


def test_what_people_say_is_marked_and_what_nobody_says_is_unknown() -> None:
    text = section(document(), "raw_data")
    assert "| Licence | That of this project (MIT) | *declared* |" in text
    assert "| Adding samples | – | *unknown* |" in text
    assert section(document(), "miscellaneous").count("*unknown*") == 1  # action items


@pytest.mark.parametrize(
    ("mutate", "printed"),
    [
        ({"optimizer": "AdamW"}, "`AdamW`"),
        ({"loss": {"label_smoothing": 0.25}}, "label_smoothing 0.25"),
        ({"averaging": {"decay": 0.9995}}, "| decay | 0.9995 |"),
        ({"seed": 12345}, "| Seed | 12345 |"),
        ({"processes": 6}, "| Processes | 6,"),
        ({"skipped_steps": 17}, "| 17 |"),
    ],
)
def test_hyperparameters_come_from_the_record(mutate: dict[str, Any], printed: str) -> None:
    assert printed not in document()
    assert printed in document(training=training_record(**mutate))


def test_alterations_of_the_network_are_shown_where_there_are_any() -> None:
    plain = training_record()
    altered = msgspec.structs.replace(plain.model, alterations={"blurred_convolutions": 6})
    assert "| Alterations |" not in document()
    assert "| Alterations | blurred_convolutions 6 |" in document(training=training_record(model=altered))


def test_the_json_block_holds_the_pinned_configuration() -> None:
    blocks = re.findall(r"^```json\n(.*?)^```$", document(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    block = json.loads(blocks[0])
    assert block["format"] == "recipe/1"
    assert block["config"] == CONFIG
    assert block["config_sha256"] == configuration.config_sha256(CONFIG)
    assert block["recipe_id"] == configuration.recipe_id(CONFIG)


def test_the_json_block_claims_what_the_records_hold() -> None:
    claims = json.loads(re.findall(r"^```json\n(.*?)^```$", document(), re.DOTALL | re.MULTILINE)[0])["claims"]
    evaluation, training = evaluation_record(), training_record()
    assert claims["evaluation"]["correct_top1"] == evaluation.correct_top1
    assert claims["training"]["weights_sha256"] == training.outputs["weights"]
    assert claims["training"]["epochs"]["epoch"] == [epoch.epoch for epoch in training.epochs]
    assert claims["data"]["splits"].keys() == preprocessing_record().splits.keys()


def test_many_epochs_are_thinned_out_and_said_so() -> None:
    text = section(document(training=training_record(epochs=epoch_records(90)), metrics=metric_rows(90)), "dynamics")
    rows = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    assert len(rows) == 20
    assert (rows[0], rows[-1]) == ("1", "90")
    assert "20 of 90 epochs, evenly chosen" in text


def test_long_lists_are_cut_and_said_so() -> None:
    shards = {"manifest": sha("manifest")} | {f"train-{number:06d}.tar": sha(str(number)) for number in range(1282)}
    rejected = [
        UnusualImage(split="train", key=f"n{number}", what="truncated", done="left out") for number in range(30)
    ]
    record = preprocessing_record(outputs=shards, rejected=rejected)
    text = section(document(preprocessing=record), "processing_methods")
    assert text.count("| SHA-256 of ") == 20
    assert "20 of 1,283 outputs; [records/preprocessing.json](records/preprocessing.json) holds all." in text
    assert text.count("| truncated |") == 20
    assert "20 of 30 rejected images;" in text


def test_many_classes_show_the_best_and_the_worst_five() -> None:
    classes = [
        ClassCounts(
            index=index,
            class_id=f"n{index:08d}",
            name=f"class {index}",
            images=50,
            correct_top1=index % 50,
            correct_top5=50,
        )
        for index in range(1000)
    ]
    text = section(document(evaluation=evaluation_record(per_class=classes)), "performance_metrics")
    assert len(re.findall(r"\| `n\d{8}` \|", text)) == 10
    assert "| Best five classes |" in text
    assert "| Worst five classes |" in text


def test_cold_and_warm_epochs_are_kept_apart() -> None:
    text = section(document(), "dynamics")
    assert "| Throughput, first (cold) epoch | 41.3 images/s |" in text
    assert "| Throughput, warm epochs | 49.2 images/s (median of 7) |" in text
    assert "2.10 % waiting for data, 97.90 % computing" in text


# The working tree


@pytest.mark.parametrize(
    ("state", "printed"),
    [
        (TreeState(state="clean"), f"clean at commit `{COMMIT}`"),
        (TreeState(state="untracked", untracked=["notes.txt"]), f"commit `{COMMIT}` with untracked files: `notes.txt`"),
        (
            TreeState(state="modified", patch_sha256=sha("patch")),
            f"**MODIFIED** after commit `{COMMIT}`: patch `records/patches/{sha('patch')[:16]}.patch`",
        ),
        (TreeState(state="no git"), "no git: the code is identified by its content only"),
        (
            TreeState(state="git refused", reason="detected dubious ownership in repository at '...'"),
            "git refused, because detected dubious ownership in repository at '...': the code is identified by its",
        ),
        (
            TreeState(state="not a repository of ours"),
            "not a repository of ours: the code is identified by its content only",
        ),
    ],
)
def test_states_of_the_tree(state: TreeState, printed: str) -> None:
    record = training_record(provenance=provenance("python train.py", tree_at_start=state, tree_at_end=state))
    assert printed in section(document(training=record), "summary")
    assert "source changed during the stage" not in document(training=record)


def test_a_modified_tree_is_patched_before_it_runs_again() -> None:
    state = TreeState(state="modified", patch_sha256=sha("patch"))
    record = training_record(provenance=provenance("python train.py", tree_at_start=state, tree_at_end=state))
    text = section(document(training=record), "run_again")
    assert f'git apply "$DOCUMENT"/records/patches/{sha("patch")[:16]}.patch\n' in text
    assert text.count(f"git checkout --force --detach {COMMIT}\n") == 3  # clean, patched, clean again


@pytest.mark.parametrize(
    "change",
    [
        {"source_sha256_at_end": sha("edited")},
        {"tree_at_end": TreeState(state="modified", patch_sha256=sha("patch"))},
    ],
)
def test_an_edit_during_the_stage_is_said(change: dict[str, Any]) -> None:
    text = document(training=training_record(provenance=provenance("python train.py", **change)))
    assert "**source changed during the stage**" in section(text, "summary")
    assert "**source changed during the stage**" in section(text, "optimization_methods")
    assert "**source changed during the stage**" not in section(text, "performance_metrics")


# The chain of hashes


@pytest.mark.parametrize(
    ("changes", "stale"),
    [
        ({}, set()),
        (
            {"preprocessing": preprocessing_record(outputs={"manifest": sha("other")})},
            {"optimization_methods", "dynamics", "outputs", "performance_metrics"},
        ),
        ({"config": {**CONFIG, "seed": 1}}, {"optimization_methods", "dynamics", "outputs", "performance_metrics"}),
        ({"training": training_record(outputs={"weights": sha("retrained")})}, {"performance_metrics"}),
        ({"training": training_record(outputs={"weights": sha("last"), "best_weights": sha("weights")})}, set()),
    ],
)
def test_stale_sections_are_headed_so_with_the_reason(changes: dict[str, Any], stale: set[str]) -> None:
    states = sections(facts(**changes))
    assert {name for name, state in states.items() if state.state == "stale"} == stale
    text = document(**changes)
    assert ("### Performance metrics (stale)" in text) == ("performance_metrics" in stale)
    assert ("### Optimization methods (stale)" in text) == ("optimization_methods" in stale)
    assert text.count("> **Stale**") == len(stale)


# Regeneration


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        ({"evaluation": evaluation_record(correct_top5=477)}, {"summary", "performance_metrics", "recipe"}),
        ({"preprocessing": preprocessing_record(images_per_second=1.0)}, {"processing_methods"}),
        ({"training": training_record(peak_accelerator_memory_gib=3.0)}, {"dynamics"}),
    ],
)
def test_a_stage_that_ran_again_changes_its_own_blocks_only(change: dict[str, Any], blocks: set[str]) -> None:
    assert changed_blocks(facts(), facts(**change)) == blocks


def test_equal_inputs_give_equal_bytes() -> None:
    assert document() == document()
    assert json_file(facts()) == json_file(facts())
    assert document(existing=document()) == document()


def test_blocks_of_later_stages_take_their_places_between_prose() -> None:
    first = document(evaluation=None)
    cut = first.replace(section(first, "performance_metrics") + "\n", "My own words.\r\n")
    text = document(existing=cut)
    places = [text.index(words) for words in ("end outputs", "begin performance_metrics", "My own words")]
    assert places == sorted(places)


HOSTILE = (
    "a|b <img src=x onerror=alert(1)> `code` **bold** [link](javascript:1) $x$\n"
    "<!-- recipe:end raw_data -->\n# Heading\n```\n| cell\r\n<!-- recipe:begin summary --> &lt;b&gt; "
    "\u202e\u2028 _i_"
)


def test_hostile_words_stay_words() -> None:
    config = json.loads(json.dumps(CONFIG))
    config["data"]["description"]["summary"] = config["description"]["summary"] = HOSTILE
    config["description"]["action_items"] = config["model"]["description"]["papers"] = [HOSTILE]
    patched = TreeState(state="untracked", untracked=[HOSTILE])
    records = {
        "preprocessing": preprocessing_record(
            data_set=HOSTILE,
            unusual_images={HOSTILE: 1},
            raw_path=HOSTILE,
            outputs={"manifest": sha("manifest"), HOSTILE: HOSTILE},
            rejected=[UnusualImage(split=HOSTILE, key=HOSTILE, what=HOSTILE, done=HOSTILE)],
            left_out={HOSTILE: LeftOut(count=1, examples=[HOSTILE])},
            lost_images={HOSTILE: LeftOut(count=1, examples=[HOSTILE])},
        ),
        "training": training_record(
            config,
            loss={HOSTILE: HOSTILE},
            optimizer=HOSTILE,
            augmentation={HOSTILE: [HOSTILE]},
            provenance=provenance(HOSTILE, tree_at_start=patched, tree_at_end=patched, commit=HOSTILE),
        ),
        "evaluation": evaluation_record(
            config,
            per_class=[ClassCounts(index=0, class_id=HOSTILE, name=HOSTILE, images=1, correct_top1=1, correct_top5=1)],
        ),
    }
    plain, text = document(), document(config=config, name=HOSTILE, run_dir=HOSTILE, **records)
    assert headings(text)[1:] == headings(plain)[1:]
    assert re.findall(r"^<!-- recipe:\w+ \w+", text, re.MULTILINE) == re.findall(
        r"^<!-- recipe:\w+ \w+", plain, re.MULTILINE
    )
    page = outside_code(text)
    assert not re.search(r"<(?!/?(details|summary|code)>|!-- recipe:(begin|end) )", page)
    assert page.count("[link") == page.count("\\[link\\](javascript:1)") > 0
    assert page.count("|b ") == page.count("a\\|b ") > 0
    assert_tables_are_even(page)
    assert document(existing=text) == plain


def assert_tables_are_even(text: str) -> None:
    """Every row of a table has as many cells as its header; no row stands outside a table."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert len(set(cells)) == 1, table
        assert re.fullmatch(r"\|(:?-+:?\|)+", table.splitlines()[1]), table


def test_tables_are_whole() -> None:
    assert_tables_are_even(document())
    for missing in ("preprocessing", "training", "evaluation"):
        assert_tables_are_even(document(**{missing: None}))


def test_no_trailing_blanks_and_no_double_blank_lines() -> None:
    text = document()
    assert not re.search(r"[ \t]$", text, re.MULTILINE)
    assert "\n\n\n" not in text


# The files


def test_written_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    write_document(run, "runs/demo")
    text = run.document.read_text()
    assert text == document()
    drawn = sorted(path.name for path in run.figures.iterdir())
    assert drawn == ["accuracy.png", "learning_rate.png", "loss.png", "throughput.png"]
    assert sorted(re.findall(r"\]\(figures/(.*?)\)", text)) == drawn
    for content in (text, run.json_file.read_text()):
        assert str(CHECKOUT) not in content
        assert str(tmp_path) not in content


def test_the_twin_holds_the_same_facts() -> None:
    values = json.loads(json_file(facts()))
    assert values["format"] == "recipe/1"
    assert values["config"] == CONFIG
    assert msgspec.convert(values["records"]["training"], TrainingRecord) == training_record()
    assert values["sections"]["performance_metrics"] == {"state": "present", "reasons": []}
    assert values["sections"]["serialization"]["state"] == "not measured"
    assert list(values) == sorted(values)
    assert values["metrics"]["last"]["validation"]["top1_accuracy"] == pytest.approx(0.8979)


def test_what_people_wrote_survives_further_stages(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    (run.records / "evaluation.json").unlink()
    write_document(run, "runs/demo")
    run.document.write_bytes(run.document.read_bytes() + b"\r\n## My notes\r\n\r\n| a |\r\n|---|\r\n")
    run.write(evaluation_record())
    check_document(run)
    write_document(run, "runs/demo")
    content = run.document.read_bytes()
    assert content.endswith(b"\r\n## My notes\r\n\r\n| a |\r\n|---|\r\n")
    assert b"89.79 %" in content


def test_an_edited_block_is_refused_before_and_after_the_work(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    check_document(run)
    write_document(run, "runs/demo")
    check_document(run)
    edited = run.document.read_text().replace("89.79 %", "99.79 %")
    run.document.write_text(edited)
    for refused in (lambda: check_document(run), lambda: write_document(run, "runs/demo")):
        with pytest.raises(UserError, match=r"(?s)block 'summary'.*\n-.*99\.79 %.*\n\+.*89\.79 %"):
            refused()
    assert run.document.read_text() == edited


def test_a_document_that_is_no_text_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.document.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        check_document(run)


def test_the_document_needs_no_torch() -> None:
    script = (
        "import sys, recipe.document.render; assert not {'torch', 'torchvision', 'matplotlib.pyplot'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, check=True)


# Figures


def test_figures_are_light_deterministic_and_without_traces() -> None:
    drawn = figures.draw(training_record(), metric_rows(90))
    assert drawn == figures.draw(training_record(), metric_rows(90))
    for content in drawn.values():
        assert len(content) < 60_000
        assert png_chunks(content) <= {b"IHDR", b"pHYs", b"IDAT", b"IEND"}


def png_chunks(content: bytes) -> set[bytes]:
    kinds, position = set(), 8
    while position < len(content):
        (length,) = struct.unpack(">I", content[position : position + 4])
        kinds.add(content[position + 4 : position + 8])
        position += 12 + length
    return kinds


def test_figures_do_not_follow_the_users_style(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, 'tests/document'); import test_document as t; "
        "drawn = t.figures.draw(t.training_record(), t.metric_rows()); "
        "print({name: t.hashlib.sha256(content).hexdigest() for name, content in drawn.items()})"
    )
    (tmp_path / "matplotlibrc").write_text("figure.dpi: 33\naxes.facecolor: black\nfont.size: 30\n")
    printed = [
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=CHECKOUT,
            check=True,
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin", "HOME": str(tmp_path), **environment},
        ).stdout
        for environment in ({}, {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc")})
    ]
    assert printed[0] == printed[1]


def test_rows_with_holes_are_drawn_as_far_as_they_go_and_change_no_epoch() -> None:
    empty = [
        {**row, **dict.fromkeys(("loss", "top1_accuracy", "top5_accuracy", "data_wait_fraction"))}
        for row in metric_rows()
    ]
    assert set(figures.draw(training_record(), empty)) == {"accuracy.png", "learning_rate.png", "throughput.png"}
    assert figures.draw(training_record(), []).keys() == {"accuracy.png", "learning_rate.png"}
    assert figures.draw(None, []) == {}
    row = "| 1 | 0.0973 | 2.0153 | 27.94 % | 1.8697 | 28.61 % | 99.00 % | 41.3 | 6.40 % | 28.7 |"
    assert row in document()
    assert row in document(metrics=empty)
    assert row in document(metrics=[])


def test_the_commands_are_a_shell_script() -> None:
    script = re.search(r"```bash\n(.*?)```", section(document(), "run_again"), re.DOTALL)
    assert script
    subprocess.run(["bash", "-n"], input=script[1], text=True, check=True)
    assert script[1].splitlines() == [
        'git clone "$REPOSITORY" recipe && cd recipe',
        f"git checkout --force --detach {COMMIT}",
        "make setup && . .venv/bin/activate",
        "python preprocess.py experiment=demo",
        "python train.py experiment=demo",
        "python evaluate.py run_dir=runs/demo",
    ]


@pytest.mark.parametrize(
    ("given", "printed"),
    [
        ('data.directory="$DATA_DIR" seed=3', ' data.directory="$DATA_DIR"'),
        ("data.directory=sets/mine", " data.directory=sets/mine"),
        ("'data.directory=my sets/a' seed=3", " 'data.directory=my sets/a'"),
        ("data.directory=x;id", ""),
        ("data.directory=$(id)", ""),
        ("seed=3", ""),
    ],
)
def test_a_later_stage_is_given_the_data_set_that_training_was_given(given: str, printed: str) -> None:
    record = training_record(provenance=provenance(f"python train.py experiment=demo {given}"))
    text = section(document(training=record, evaluation=None, run_dir=".../demo"), "performance_metrics")
    assert f'run `python evaluate.py run_dir="$RUN_DIR"{printed}`' in text


def test_a_command_that_ran_several_stages_stands_once() -> None:
    command = "python -m recipe reproduce recipe.md --yes"
    records = {"preprocessing": preprocessing_record, "training": training_record, "evaluation": evaluation_record}
    made = {name: make(provenance=provenance(command)) for name, make in records.items()}
    assert section(document(**made), "run_again").count(command) == 1
