"""Records of a run that agree with one another; changes are keyword arguments."""

from __future__ import annotations

import hashlib
import math
from typing import Any

from recipe.config import identity as configuration
from recipe.config.schema import config_from_pinned
from recipe.data.manifest import data_settings
from recipe.document.run_data import RunData
from recipe.run.metric_rows import EPOCH_FIELDS
from recipe.run.records import (
    Absent,
    Archive,
    ClassCounts,
    ClassifiedPicture,
    Epoch,
    EvaluationRecord,
    Guess,
    Hardware,
    LabelExample,
    Latency,
    LoaderFacts,
    ModelFacts,
    ParameterGroup,
    PreprocessingRecord,
    Protocol,
    Provenance,
    Schedule,
    Session,
    SplitFacts,
    TimingRecord,
    TrainingRecord,
    TreeState,
    UnusualImage,
)
from tests.builders.configs import compose_config

COMMIT = "3b18e512dba79e4c8300dd08aeb37f8e728b8dad"


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A nested configuration with other values."""
    return base | {
        key: merged(base[key], value) if isinstance(value, dict) and key in base else value
        for key, value in changes.items()
    }


CHANGES: dict[str, Any] = {
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
    "optimization": {"epochs": 8, "batch_size": 32, "learning_rate": 0.1, "warmup_start_factor": 0.0},
}
CONFIG = merged(compose_config("experiment=demo").pinned.values, CHANGES)


EPOCHS, STEPS_PER_EPOCH = 8, 37
SECONDS = (28.668, 24.065, 2.4)  # of the first epoch, of every other one, of a validation


LOGGED = (20, STEPS_PER_EPOCH)  # steps of an epoch that end a train row


def sha(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def provenance(command: str, **changes: Any) -> Provenance:
    values: dict[str, Any] = {
        "command": command,
        "commit": COMMIT,
        "tree_at_start": TreeState(state="clean"),
        "tree_at_end": TreeState(state="clean"),
        "source_sha256": sha("source"),
        "source_sha256_at_end": sha("source"),
        "started": "2026-11-23T21:00:00Z",
        "seconds": 234.8,
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
        images_per_class=[images // 12] * 12,
        raw_sha256=sha(f"raw {images}"),
        shards=math.ceil(images / 250),
        shard_bytes=images * 5210,
        width_percentiles=[72, 80, 118, 156, 160],
        height_percentiles=[72, 79, 117, 157, 160],
        grey_images=3,
    )


def preprocessing_record(**changes: Any) -> PreprocessingRecord:
    values: dict[str, Any] = {
        "config_sha256": configuration.sha256_of(data_settings(config_from_pinned(CONFIG).data)),
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
        "class_list_sha256": sha("\n".join(f"d{index:08d}" for index in range(12))),
        "label_convention": "class index = position among the sorted class IDs, from 0",
        "label_examples": [
            LabelExample(key=f"d0000000{index}_1", index=index, class_id=f"d0000000{index}", name=name)
            for index, name in enumerate(("rings", "stripes", "checks"))
        ],
        "validation_split": "the archive ILSVRC2012_img_val.tar",
        "shard_order": "shuffled with seed 0",
        "stored_as": "original JPEG bytes",
        "unusual_images": {"CMYK": 1, "grayscale": 6},
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


PLAIN_SGD: dict[str, Any] = {"nesterov": False, "dampening": 0, "maximize": False}
NORMALISATION: dict[str, Any] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
SWITCHES: dict[str, Any] = {"deterministic_algorithms": True, "cudnn_benchmark": False, "tf32_matmul": False}


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
            initial_weights="random",
            initial_weights_sha256=sha("initial"),
        ),
        "loss": {"class": "CrossEntropyLoss", "label_smoothing": 0.1, "reduction": "mean"},
        "optimizer": "SGD",
        "parameter_groups": [
            ParameterGroup(
                name="weights",
                tensors=54,
                parameters=23_479_488,
                settings={"momentum": 0.9, "weight_decay": 5e-05} | PLAIN_SGD,
            ),
            ParameterGroup(
                name="norms and biases",
                tensors=107,
                parameters=53_132,
                settings={"momentum": 0.9, "weight_decay": 0.0} | PLAIN_SGD,
            ),
        ],
        "schedule": Schedule(
            steps=steps,
            steps_per_epoch=STEPS_PER_EPOCH,
            warmup_steps=STEPS_PER_EPOCH,
            points=[(step, learning_rate(step)) for step in range(0, steps, 3)],
        ),
        "augmentation": {
            "random_resized_crop_pixels": 64,
            "scale": [0.35, 1.0],
            "ratio": [0.75, 4 / 3],
            "interpolation": "bilinear",
            "antialias": True,
            "horizontal_flip_probability": 0.5,
        }
        | NORMALISATION,
        "augmentation_sha256": sha("augmentation"),
        "averaging": {"kind": "none"},
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
        "precision": {
            "forward_and_backward": "fp32",
            "weights": "float32",
            "channels_last": True,
            "compiled": False,
            "gradient_scaler": False,
        }
        | SWITCHES,
        "processes": 1,
        "backend": "none",
        "sessions": [session()],
        "epochs": epoch_records(),
        "training_seconds": SECONDS[0] + 7 * SECONDS[1],
        "validation_seconds": 8 * SECONDS[2],
        "images_seen": EPOCHS * 1184,
        "peak_accelerator_memory_gib": None,
        "skipped_steps": 0,
        "validation_protocol": "resize72-crop64-bilinear",
        "best_epoch": 8,
        "selection": "the last checkpoint",
    }
    return TrainingRecord(**{**values, **changes})


def epoch_records(epochs: int = EPOCHS) -> list[Epoch]:
    """What the validation rows say of each epoch, and what it cost; the first one is cold."""
    return [
        Epoch(
            seconds=SECONDS[at > 0],
            images_per_second=round(1184 / SECONDS[at > 0], 2),
            data_wait_fraction=0.021 if at > 0 else 0.064,
            validation_seconds=SECONDS[2],
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
            arithmetic=SWITCHES,
            epochs_completed=8,
            epochs=8,
            name="resize72-crop64-bilinear",
            transform={
                "resize_short_side_pixels": 72,
                "center_crop_pixels": 64,
                "interpolation": "bilinear",
                "antialias": True,
            }
            | NORMALISATION,
            transform_sha256=sha("transform"),
            decoder="nvimgcodec",
            precision="fp32",
            batch_size=64,
            checkpoint="step-00000296.pt",
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
        took = SECONDS[epoch > 1]
        end = round(SECONDS[0] + (epoch - 1) * SECONDS[1] + epoch * SECONDS[2], 3)
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
                    "images_per_second": round(1184 / took, 2),
                    "data_wait_fraction": 0.02 + 0.05 * (done < 40),
                    "seconds": round(end - SECONDS[2] - took * (1 - step / STEPS_PER_EPOCH), 3),
                }
            )
        rows.append(
            {
                "split": "validation",
                "epoch": epoch,
                "step": epoch * STEPS_PER_EPOCH,
                "images_seen": epoch * STEPS_PER_EPOCH * 32,
                "loss": 2.4 - (2.4 - 0.8312) * (epoch / epochs) ** 0.5,
                "top1_accuracy": 0.1 + (431 / 480 - 0.1) * (epoch / epochs) ** 0.7,
                "top5_accuracy": 476 / 480,
                "learning_rate": rows[-1]["learning_rate"],
                "images_per_second": 199.0,
                "data_wait_fraction": None,
                "seconds": end,
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


REFERENCE = "torchvision's own way, eager"


def cell(backend: str, what: str, median: float | None, precision: str = "fp32", batch_size: int = 1) -> Latency:
    return Latency(
        backend=backend,
        precision=precision,
        what=what,
        batch_size=batch_size,
        repeats=200 if median else 4,
        p50_milliseconds=median,
        p90_milliseconds=median and 1.5 * median,
        p99_milliseconds=None,
        images_per_second=round(1000 * batch_size / (median or 20.0), 2),
        noise=0.012,
        histogram_milliseconds=[0.5 * (median or 20.0), median or 20.0, 2 * (median or 20.0)],
    )


def timing(machine: str = "nvidia-h200", weights: str = "weights", **changes: Any) -> TimingRecord:
    hardware = Hardware(processor="AMD EPYC", cores=2, memory_gib=16.0, accelerator="NVIDIA H200", accelerators=1)
    if machine != "nvidia-h200":
        hardware = Hardware(processor="Intel | Core", cores=8, memory_gib=16.0)
    values: dict[str, Any] = {
        "config_sha256": facts().training.config_sha256,  # type: ignore[union-attr]
        "settings": {"seconds_per_cell": 2.0},
        "provenance": provenance("python -m recipe.stages.infer run_dir=runs/demo", hardware=hardware),
        "inputs": {"weights": facts().evaluation.inputs["weights"] if weights == "weights" else weights},  # type: ignore[union-attr]
        "machine": machine,
        "threads": 2,
        "image": "puppy.jpg",
        "image_sha256": sha("puppy"),
        "image_pixels": [480, 400],
        "crop_pixels": 64,
        "arithmetic": {"tf32_convolution": True},
        "clock": {"driver_version": "580.1"},
        "noise_floor": 0.012,
        "reference": REFERENCE,
        "cells": [
            cell("Pillow, torchvision", "preprocessing", 2.0),
            cell("eager", "model", 8.0),
            cell("eager", "both", 10.0),
            cell("onnxruntime CPU", "model", 3.0),
            cell("onnxruntime CPU", "both", 5.0),
            cell("onnxruntime CPU", "both", 4.0, "int8"),
            cell("eager", "both", None, batch_size=32),
            cell(REFERENCE, "both", 12.5),
        ],
        "absent": [Absent(backend="compiled, fp32", reason="no compiler | here")],
    }
    return TimingRecord(**{**values, **changes})


def picture(name: str, label: str | None) -> ClassifiedPicture:
    guess = Guess(index=0, class_id="n1", name="zebra | $stripes$", probability=0.25)
    return ClassifiedPicture(
        picture=name, sha256=sha(name), label=label, guesses={"step.pt": [guess], "m.onnx": [guess]}
    )
