"""A catalogue of tamperings with a finished run or a published recipe, most of them consistent.

Each changes one statement, then makes the page, its marks, the model card and recipe.json again from the changed
records, as somebody who has this checkout would. What is left is a contradiction between two records.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from recipe.config.identity import config_sha256, recipe_id
from recipe.document.blocks import Block, _new_block, content_sha256, split
from recipe.document.model_card import card, front_matter, split_front_matter
from recipe.document.recipe_json import as_json
from recipe.document.render import generated_blocks, json_file
from recipe.document.run_data import load
from recipe.run.directory import Run
from tests.builders.records import sha
from tests.builders.runs import forged, set_at

Change = Callable[[Any], object]
Tampering = Callable[[Path], object]


def document_of(folder: Path) -> Path:
    return next(folder / name for name in ("recipe.md", "README.md") if (folder / name).is_file())


def render_again(folder: Path) -> None:
    """The page with right marks, the model card and recipe.json, from the records as they are now."""
    facts, document = load(Run(folder), "runs/demo"), document_of(folder)
    generated, text = generated_blocks(facts), document.read_text()
    own_keys, body = split_front_matter(text, {})
    pieces = [
        _new_block(piece.id, generated[piece.id]).text if isinstance(piece, Block) else piece.text
        for piece in split(body)
    ]
    document.write_text(("" if body == text else front_matter(card(facts, "mit"), own_keys)) + "".join(pieces))
    (folder / "recipe.json").write_bytes(json_file(facts))


def edit_json(path: Path, change: Change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, indent=2) + "\n")


def records(**changes: Change | list[Change]) -> Tampering:
    """Change records by name, then render again."""

    def tamper(folder: Path) -> None:
        for name, change in changes.items():
            for path in sorted((folder / "records").glob("timing/*.json" if name == "timing" else f"{name}.json")):
                for one in change if isinstance(change, list) else [change]:
                    edit_json(path, one)
        render_again(folder)

    return tamper


def of(*keys: str | int, by: Callable[[Any], Any]) -> Change:
    """A change: the value under these keys becomes a function of itself."""

    def change(values: Any) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = by(values[keys[-1]])

    return change


def in_each(*keys: str | int, by: Callable[[Any], object]) -> Change:
    """A change of every entry of a list."""

    def change(values: Any) -> None:
        for key in keys:
            values = values[key]
        for entry in values:
            by(entry)

    return change


def more_right(values: Any, images: int = 1) -> None:
    """So many more images of an evaluation are right, in its classes too."""
    for row in values["per_class"]:
        room = min(images, row["correct_top5"] - row["correct_top1"])
        row["correct_top1"] += room
        values["correct_top1"] += room
        images -= room


def rotated_names(values: Any) -> None:
    names = [row["name"] for row in values["per_class"]]
    for row, name in zip(values["per_class"], names[1:] + names[:1], strict=True):
        row["name"] = name


def swapped_classes(values: Any) -> None:
    """The best and the worst class change their counts."""
    rows = sorted(values["per_class"], key=lambda row: row["correct_top1"])
    rows[0]["correct_top1"], rows[-1]["correct_top1"] = rows[-1]["correct_top1"], rows[0]["correct_top1"]


def other_view(values: Any) -> None:
    """Another crop in the protocol, its name included."""
    transform = values["protocol"]["transform"]
    old, transform["center_crop_pixels"] = transform["center_crop_pixels"], transform["center_crop_pixels"] - 8
    values["protocol"]["name"] = values["protocol"]["name"].replace(f"crop{old}", f"crop{old - 8}")


def better_everywhere(folder: Path) -> None:
    """More right in the evaluation, its exports and the last epoch, in the record and in its row."""
    records_of = folder / "records"
    edit_json(records_of / "evaluation.json", more_right)
    evaluation = json.loads((records_of / "evaluation.json").read_text())
    share = evaluation["correct_top1"] / evaluation["images"]

    def exports(values: Any) -> None:
        values["evaluated_correct_top1"] = values["eager_correct_top1"] = evaluation["correct_top1"]
        for entry in values["variants"]:
            entry["correct_top1"] += 1

    if (records_of / "serialization.json").exists():
        edit_json(records_of / "serialization.json", exports)
    edit_json(records_of / "training.json", set_at("epochs", -1, "validation_top1", value=share))
    edit_rows(folder, lambda row: row.update(top1_accuracy=share), last=True)
    edit_json(records_of / "journal.json", in_each("entries", by=lambda entry: entry.update(top1_accuracy=share)))
    render_again(folder)


def everything(folder: Path) -> None:
    """One more right wherever it is stated, the list of confused classes and the figures included."""
    from recipe.document import figures

    edit_json(folder / "records/evaluation.json", one_confused_less)
    better_everywhere(folder)
    for name, content in figures.draw(load(Run(folder), "runs/demo")).items():
        (folder / "figures" / name).write_bytes(content)


def one_confused_less(values: Any) -> None:
    """In the class that `more_right` would change."""
    row = next(row for row in values["per_class"] if row["correct_top1"] < row["correct_top5"])
    pair = next(pair for pair in values["confused_pairs"] if pair["label"] == row["name"])
    pair["images"] -= 1
    values["confused_pairs"].sort(key=lambda pair: -pair["images"])


def edit_rows(folder: Path, change: Change, last: bool = False) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows[-1:] if last else rows[1:2]:
        change(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(change: Change) -> Tampering:
    def tamper(folder: Path) -> None:
        edit_rows(folder, change)
        render_again(folder)

    return tamper


def best_epoch_in_both(folder: Path) -> None:
    """A better epoch in the middle, in the record and in its row."""
    edit_json(folder / "records/training.json", set_at("epochs", 0, "validation_top1", value=0.999))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["split"] == "validation")
    row.update(top1_accuracy=0.999, top5_accuracy=1.0)
    edit_json(folder / "records/training.json", set_at("epochs", 0, "validation_top5", value=1.0))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    render_again(folder)


def pinned(*keys: str, value: Any) -> Tampering:
    """Another value in config.yaml, with its hashes in every record."""

    def tamper(folder: Path) -> None:
        path = folder / "config.yaml"
        values = yaml.safe_load(path.read_text())
        set_at(*keys, value=value)(values)
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        for record in (folder / "records").rglob("*.json"):
            content = json.loads(record.read_text())
            if "config_sha256" in content and record.name != "preprocessing.json":
                content["config_sha256"] = config_sha256(values)
            if "recipe_id" in content:
                content["recipe_id"] = recipe_id(values)
            record.write_text(json.dumps(content))
        render_again(folder)

    return tamper


# Page


def page(change: Callable[[str], str], marks: bool = True) -> Tampering:
    """Change the text of the page. `marks` makes the hashes of its blocks fit again."""

    def tamper(folder: Path) -> None:
        document = document_of(folder)
        before = document.read_text()
        after = change(before)
        document.write_text(forged(after) if marks and after.count("<!-- recipe:begin") else after)

    return tamper


def headline(text: str) -> str:
    """Every accuracy of the headline is another one."""
    found = text.partition("top-1 **")[2].partition("**")[0]
    correct, images = (int(word.replace(",", "")) for word in found.partition("(")[2].rstrip(")").split(" of "))
    better = correct + max(1, (images - correct) // 2)
    return text.replace(found, f"{100 * better / images:.2f} % ({better:,} of {images:,})")


def line_with(start: str, change: Callable[[str], str]) -> Callable[[str], str]:
    """Change the first line that begins with these words."""

    def changed(text: str) -> str:
        line = next(line for line in text.splitlines() if line.startswith(start))
        return text.replace(line, change(line), 1)

    return changed


def digit(line: str) -> str:
    """The last digit of a line is another one."""
    at = max(place for place, letter in enumerate(line) if letter.isdigit())
    return line[:at] + str((int(line[at]) + 3) % 10) + line[at + 1 :]


RESULT = "\n## Result\n\nTop-1 of this recipe: **99.90 % (480 of 480)** (*measured*).\n\n"


def unknown_block(text: str) -> str:
    mark = f"<!-- recipe:begin result sha256={content_sha256(RESULT)} -->\n{RESULT}<!-- recipe:end result -->\n\n"
    return text.replace("<!-- recipe:begin legend", f"{mark}<!-- recipe:begin legend", 1)


def front(change: Callable[[str], str], mark: bool = True) -> Tampering:
    """Change the generated part of the model card."""

    def tamper(folder: Path) -> None:
        document = document_of(folder)
        head, begin, rest = document.read_text().partition("# recipe:begin card sha256=")
        digest, content = rest[:64], rest[65:].partition("# recipe:end card\n")[0]
        after = change(content)
        digest = content_sha256(after) if mark else digest
        document.write_text(f"{head}{begin}{digest}\n{after}{rest[65 + len(content) :]}")

    return tamper


def json_block(change: Change, hashes: bool = False) -> Tampering:
    def changed(text: str) -> str:
        before, _, rest = text.partition("```json\n")
        content, _, after = rest.partition("\n```")
        values = json.loads(content)
        change(values)
        if hashes:
            values |= {"config_sha256": config_sha256(values["config"]), "recipe_id": recipe_id(values["config"])}
        return f"{before}```json\n{as_json(values)}\n```{after}"

    return page(changed)


def twin(change: Change) -> Tampering:
    return lambda folder: edit_json(folder / "recipe.json", change)


def without_block(text: str) -> str:
    before, _, rest = text.partition("<!-- recipe:begin hashes")
    return before + rest.partition("<!-- recipe:end hashes -->\n")[2]


def twice(number: float) -> float:
    return number * 2


def eight_more(count: int) -> int:
    return count + 8


EVALUATION: dict[str, Tampering] = {
    "evaluation: one more image right": records(evaluation=more_right),
    "evaluation: more right, the exports' copy too": records(
        evaluation=more_right, serialization=of("evaluated_correct_top1", by=lambda count: count + 1)
    ),
    "evaluation: more right in evaluation, exports, last epoch, row and journal": better_everywhere,
    "evaluation: another loss": records(evaluation=of("loss", by=lambda loss: loss / 2)),
    "evaluation: names of the classes rotated": records(evaluation=rotated_names),
    "evaluation: two classes change their counts": records(evaluation=swapped_classes),
    "evaluation: another ID of a class": records(evaluation=set_at("per_class", 1, "class_id", value="n00000001")),
    "evaluation: other normalisation": records(
        evaluation=set_at("protocol", "transform", "mean", value=[0.5, 0.5, 0.5])
    ),
    "evaluation: other pixels, name kept": records(
        evaluation=of("protocol", "transform", "resize_short_side_pixels", by=eight_more)
    ),
    "evaluation: another view, name included": records(evaluation=other_view),
    "evaluation: averaged weights": records(evaluation=set_at("protocol", "weights", value="moving average")),
    "evaluation: another decoder": records(evaluation=set_at("protocol", "decoder", value="pillow")),
    "evaluation: another precision": records(evaluation=set_at("protocol", "precision", value="bf16")),
    "evaluation: another batch size": records(evaluation=of("protocol", "batch_size", by=eight_more)),
    "evaluation: more epochs": records(
        evaluation=[set_at("protocol", "epochs_completed", value=90), set_at("protocol", "epochs", value=90)]
    ),
    "evaluation: another checkpoint": records(evaluation=set_at("protocol", "checkpoint", value="step-00000001.pt")),
    "evaluation: arithmetic not deterministic": records(
        evaluation=of("protocol", "arithmetic", "deterministic_algorithms", by=lambda value: not value)
    ),
    "evaluation: a pair of classes confused more often": records(
        evaluation=of("confused_pairs", 0, "images", by=eight_more)
    ),
    "evaluation: a mistake of a class that is not": records(evaluation=set_at("mistakes", 0, "label", value="cat")),
    "evaluation: the margin of a mistake": records(evaluation=of("mistakes", -1, "margin", by=eight_more)),
    "evaluation: ten times faster": records(evaluation=of("evaluation_seconds", by=lambda seconds: seconds / 10)),
}
TRAINING: dict[str, Tampering] = {
    "training: weight decay": records(
        training=in_each("parameter_groups", by=lambda group: group["settings"].update(weight_decay=1e-3))
    ),
    "training: weight decay of norms": records(
        training=set_at("parameter_groups", 1, "settings", "weight_decay", value=1e-4)
    ),
    "training: momentum": records(
        training=in_each("parameter_groups", by=lambda group: group["settings"].update(momentum=0.95))
    ),
    "training: nesterov": records(
        training=in_each("parameter_groups", by=lambda group: group["settings"].update(nesterov=True))
    ),
    "training: optimizer": records(training=set_at("optimizer", value="Lamb")),
    "training: label smoothing": records(training=of("loss", "label_smoothing", by=lambda value: value + 0.05)),
    "training: loss": records(training=set_at("loss", "class", value="BinaryCrossEntropy")),
    "training: peak of the learning rate": records(
        training=of("schedule", "points", by=lambda points: [[step, 2 * rate] for step, rate in points])
    ),
    "training: one point of the learning rate": records(training=of("schedule", "points", -2, 1, by=twice)),
    "training: warm-up": records(training=of("schedule", "warmup_steps", by=eight_more)),
    "training: scale of the crops": records(training=set_at("augmentation", "scale", value=[0.08, 1.0])),
    "training: pixels of the crops": records(training=of("augmentation", "random_resized_crop_pixels", by=eight_more)),
    "training: flips": records(training=set_at("augmentation", "horizontal_flip_probability", value=0.0)),
    "training: mixup that was not": records(training=set_at("augmentation", "mixup_alpha", value=0.2)),
    "training: normalisation": records(training=set_at("augmentation", "std", value=[1.0, 1.0, 1.0])),
    "training: accumulation": records(training=of("loader", "accumulation_steps", by=twice)),
    "training: images per batch norm": records(training=of("loader", "batch_norm_batch_size", by=twice)),
    "training: left out images": records(training=of("loader", "images_left_out_per_epoch", by=eight_more)),
    "training: decoder": records(training=set_at("loader", "decoder", value="pillow")),
    "training: order": records(training=set_at("loader", "order", value="quasi_random")),
    "training: precision": records(training=set_at("precision", "forward_and_backward", value="bf16")),
    "training: compiled": records(training=of("precision", "compiled", by=lambda value: not value)),
    "training: deterministic": records(
        training=of("precision", "deterministic_algorithms", by=lambda value: not value)
    ),
    "training: averaging that was not": records(
        training=set_at("averaging", value={"kind": "exponential moving average", "decay": 0.999})
    ),
    "training: processes": records(training=set_at("processes", value=8)),
    "training: best epoch": records(training=of("best_epoch", by=lambda epoch: epoch % 2 + 1)),
    "training: seconds": records(training=of("training_seconds", by=lambda seconds: seconds / 10)),
    "training: seconds of validation": records(training=of("validation_seconds", by=lambda seconds: seconds / 10)),
    "training: seconds of all epochs": records(
        training=[
            of("training_seconds", by=lambda seconds: seconds / 10),
            in_each("epochs", by=lambda epoch: epoch.update(seconds=epoch["seconds"] / 10)),
        ]
    ),
    "training: accuracy of an epoch": records(training=set_at("epochs", 0, "validation_top1", value=0.5)),
    "training: accuracy of an epoch and its row": best_epoch_in_both,
    "training: learning rate of an epoch": records(training=of("epochs", 0, "learning_rate", by=twice)),
    "training: parameters, in the groups too": records(
        training=[of("model", "parameters", by=eight_more), of("parameter_groups", 0, "parameters", by=twice)]
    ),
    "training: classes": records(training=of("model", "classes", by=eight_more)),
    "training: a norm that starts at zero": records(
        training=of("model", "zero_initialised_norms", by=lambda count: 0 if count else 16)
    ),
    "training: given weights": records(training=set_at("model", "initial_weights", value="given")),
    "training: another network": records(training=set_at("model", "name", value="resnet101")),
    "training: seed": records(training=of("seed", by=eight_more)),
    "training: a setting in its command": records(
        training=of("provenance", "command", by=lambda command: f"{command} optimization.epochs=90")
    ),
    "training: protocol of its validation": records(
        training=of("validation_protocol", by=lambda name: f"{name}-average")
    ),
    "training: a row's learning rate": rows(lambda row: row.update(learning_rate=row["learning_rate"] * 2)),
    "training: a row's loss": rows(lambda row: row.update(loss=row["loss"] / 2, train_loss=row.get("train_loss"))),
    "training: a row's speed": rows(lambda row: row.update(images_per_second=row["images_per_second"] * 3)),
    "training: another experiment in its command": records(
        training=of("provenance", "command", by=lambda command: command.replace("experiment=", "experiment=other_"))
    ),
    "evaluation: five runs": records(evaluation=set_at("runs", value=5)),
    "training: a row's images": rows(lambda row: row.update(images_seen=row["images_seen"] + 32)),
    "training: a row's seconds": rows(lambda row: row.update(seconds=1e6)),
    "configuration: learning rate, with its hashes": pinned("optimization", "learning_rate", value=0.4),
    "configuration: weight decay, with its hashes": pinned("optimization", "weight_decay", value=0.123),
    "configuration: crop of the evaluation, with its hashes": pinned("evaluation", "crop_pixels", value=16),
    "configuration: data settings, with its hashes": pinned("data", "images_per_shard", value=999),
    "configuration: mixup, with its hashes": pinned("augmentation", "mixup", "mixup_alpha", value=0.2),
}
MACHINES: dict[str, Tampering] = {
    "machine: an accelerator in training": records(
        training=of("provenance", "hardware", by=lambda machine: machine | {"accelerator": "NVIDIA H200"})
    ),
    "machine: an accelerator, counted": records(
        training=of(
            "provenance", "hardware", by=lambda machine: machine | {"accelerator": "NVIDIA H200", "accelerators": 8}
        )
    ),
    "machine: an accelerator in the evaluation": records(
        evaluation=of("provenance", "hardware", by=lambda machine: machine | {"accelerator": "NVIDIA H200"})
    ),
    "machine: processor of the training": records(training=set_at("provenance", "hardware", "processor", value="VAX")),
    "machine: version of torch": records(training=set_at("provenance", "versions", "torch", value="1.13.0")),
    "machine: threads": records(training=set_at("determinism_context", "CPU threads", value=64)),
    "machine: source in its context": records(training=set_at("determinism_context", "the source", value="0" * 16)),
    "code: source of the training": records(
        training=[set_at("provenance", name, value="0" * 64) for name in ("source_sha256", "source_sha256_at_end")]
    ),
    "code: changed during the training": records(training=set_at("provenance", "source_sha256_at_end", value="0" * 64)),
}
OTHERS: dict[str, Tampering] = {
    "data: images of a class": records(
        preprocessing=of("splits", "train", "images_per_class_min", by=lambda count: count - 1)
    ),
    "data: images of a split": records(preprocessing=of("splits", "train", "images", by=eight_more)),
    "data: validation images of the classes": records(
        preprocessing=of(
            "splits", "val", "images_per_class", by=lambda counts: [counts[0] + 1, counts[1] - 1, *counts[2:]]
        )
    ),
    "data: number of classes": records(preprocessing=of("class_count", by=eight_more)),
    "data: name of an example": records(preprocessing=set_at("label_examples", 0, "name", value="cat")),
    "data: list of classes": records(preprocessing=set_at("class_list_sha256", value="0" * 64)),
    "data: another data set": records(preprocessing=set_at("data_set", value="imagenet")),
    "data: is ILSVRC2012": records(preprocessing=set_at("is_ilsvrc2012", value=True)),
    "data: an MD5 that was published": records(preprocessing=set_at("archives", 0, "is_published_md5", value=True)),
    "data: grey images": records(preprocessing=of("splits", "train", "grey_images", by=eight_more)),
    "data: widths": records(
        preprocessing=of("splits", "train", "width_percentiles", 0, by=lambda pixels: pixels * 100)
    ),
    "data: shards": records(preprocessing=of("splits", "train", "shards", by=eight_more)),
    "data: hash of the raw images": records(preprocessing=set_at("splits", "train", "raw_sha256", value="0" * 64)),
    "exports: PyTorch counts": records(serialization=of("eager_correct_top1", by=lambda count: count - 10)),
    "exports: evaluated count": records(serialization=of("evaluated_correct_top1", by=eight_more)),
    "exports: accuracy of a file": records(
        serialization=of("variants", -1, "correct_top1", by=lambda count: count - 4)
    ),
    "exports: changed images hidden": records(serialization=of("variants", -1, "flips", by=eight_more)),
    "exports: tolerance": records(serialization=set_at("settings", "fp32_tolerance", value=0.5)),
    "exports: error above its tolerance": records(
        serialization=set_at("variants", 0, "relative_logit_error", value=0.5)
    ),
    "exports: limit in words": records(serialization=set_at("variants", 0, "limit", value="logits within 1e-09")),
    "exports: hash of a file": records(serialization=set_at("variants", 0, "sha256", value="0" * 64)),
    "exports: another checkpoint": records(serialization=set_at("checkpoint", value="step-00000001.pt")),
    "pictures: the name of a guess": records(
        inference=lambda values: next(iter(values["pictures"][0]["guesses"].values()))[0].update(name="cat")
    ),
    "pictures: a probability": records(
        inference=lambda values: next(iter(values["pictures"][0]["guesses"].values()))[-1].update(probability=0.99)
    ),
    "pictures: classes": records(inference=of("class_count", by=eight_more)),
    "latencies: a median": records(timing=of("cells", 0, "p50_milliseconds", by=lambda value: value / 2)),
    "latencies: images per second": records(timing=of("cells", 0, "images_per_second", by=twice)),
    "latencies: pixels": records(timing=of("crop_pixels", by=eight_more)),
    "latencies: noise": records(timing=set_at("noise_floor", value=0.0)),
    "journal: accuracy": records(
        journal=in_each("entries", by=lambda entry: entry.update(top1_accuracy=0.999) if entry["top1_accuracy"] else 0)
    ),
    "publication: rows": records(publication=of("metric_rows_kept", by=lambda count: count - 1)),
}
PAGE: dict[str, Tampering] = {
    "page: headline by hand": page(headline, marks=False),
    "page: headline": page(headline),
    "page: seconds of training": page(line_with("| Training |", digit)),
    "page: an epoch": page(line_with("| 1 | ", digit)),
    "page: a class": page(line_with("| 0 | `", lambda line: line.replace(" of ", "0 of ", 1))),
    "page: hash of the weights": page(
        line_with("| **Weights** |", lambda line: line.replace("`a", "`b").replace("`0", "`1"))
    ),
    "page: hardware": page(line_with("| **Hardware** |", lambda line: line.replace("2 cores", "64 cores"))),
    "page: weight decay": page(line_with("| Parameters: weights", digit)),
    "page: alternative text of a figure": page(line_with("![Accuracy over", digit)),
    "page: title": page(lambda text: text.replace("(not ILSVRC2012)\n", "(ILSVRC2012)\n")),
    "page: a block that no template has": page(unknown_block),
    "page: a result in the legend": page(
        lambda text: text.replace(
            "<!-- recipe:end legend", "> Top-1 is 99.90 % (479 of 480).\n<!-- recipe:end legend", 1
        )
    ),
    "page: a marker without a hash": page(
        lambda text: text.replace(
            "<!-- recipe:begin legend", f"<!-- recipe:begin result -->\n{RESULT}\n<!-- recipe:begin legend", 1
        )
    ),
    "page: a block removed": page(without_block),
    "page: a claim of the JSON block": json_block(
        of("claims", "evaluation", "correct_top1", by=lambda count: count + 1)
    ),
    "page: a setting of the JSON block, with its hashes": json_block(
        set_at("config", "optimization", "learning_rate", value=0.4), hashes=True
    ),
    "page: the commit of the JSON block": json_block(set_at("code", "commit", value="d" * 40)),
    "twin: a claim": twin(of("claims", "evaluation", "correct_top1", by=lambda count: count + 1)),
    "twin: a record": twin(of("records", "evaluation", "correct_top1", by=lambda count: count + 1)),
    "twin: the last row": twin(set_at("metrics", "last", "validation", "top1_accuracy", value=0.999)),
    "twin: a key of nobody": twin(set_at("result", value=0.999)),
    "twin: a latency": twin(
        lambda values: next(iter(values["timing"].values()), {"cells": [{}]})["cells"][0].update(noise=0.0)
    ),
    "twin: a stale section": twin(set_at("sections", "performance_metrics", "state", value="stale")),
    "figures: one removed": lambda folder: (folder / "figures/loss.png").unlink(),
    "figures: mistakes of another run": lambda folder: shutil.copy(
        folder / "figures/accuracy.png", folder / "figures/mistakes.png"
    ),
}
CARD: dict[str, Tampering] = {
    "card: accuracy by hand": front(lambda text: text.replace("value: 0.9", "value: 0.99"), mark=False),
    "card: accuracy": front(lambda text: text.replace("value: 0.9", "value: 0.99")),
    "card: counts": front(lambda text: text.replace("Top-1 accuracy, 4", "Top-1 accuracy, 47")),
    "card: data set": front(lambda text: text.replace("name: demo (not ILSVRC2012)", "name: ILSVRC/imagenet-1k")),
    "card: a key of people twice": lambda folder: document_of(folder).write_text(
        document_of(folder).read_text().replace("# recipe:end card\n", "# recipe:end card\nmetrics: [perfect]\n", 1)
    ),
    "card: its marks removed": lambda folder: document_of(folder).write_text(
        "---\n" + document_of(folder).read_text().split("\n", 2)[2].replace("# recipe:end card\n", "", 1)
    ),
}
FIGURES: dict[str, Tampering] = {  # drawn again with `check --execute`
    "figures: accuracy of another run": lambda folder: shutil.copy(
        folder / "figures/loss.png", folder / "figures/accuracy.png"
    ),
}


def other_predictions(folder: Path) -> None:
    """One more right in the predictions, with their hash, in the evaluation and in its class."""
    [path] = [path for path in (folder / "predictions").glob("*.npz") if "-onnx-" not in path.name]
    arrays = dict(np.load(path))
    row = int(np.flatnonzero(arrays["top5"][:, 0] != arrays["label"])[0])
    others = [index for index in arrays["top5"][row] if index != arrays["label"][row]]
    arrays["top5"][row] = [arrays["label"][row], *others][: arrays["top5"].shape[1]]
    np.savez(path, **arrays)
    records(evaluation=set_at("outputs", f"predictions/{path.name}", value=sha(path.read_bytes())))(folder)


PREDICTIONS: dict[str, Tampering] = {  # counted again with `check --execute`
    "predictions: one more right, with their hash": other_predictions,
    "predictions: a confused pair of other classes": records(
        evaluation=of(
            "confused_pairs", 0, by=lambda pair: pair | {"predicted": pair["label"], "label": pair["predicted"]}
        )
    ),
}
BUILT: dict[str, Tampering] = {  # built again with `check --execute`
    "model: parameters and their group": records(
        training=[of("model", "parameters", by=eight_more), of("parameter_groups", 0, "parameters", by=eight_more)]
    ),
    "model: architecture": records(training=set_at("model", "architecture_sha256", value="0" * 64)),
    "model: momentum of batch norm": records(training=set_at("model", "batch_norm", "momentum", value=0.01)),
    "model: modules": records(training=of("model", "modules", "Conv2d", by=eight_more)),
    "model: initial weights": records(
        training=[
            set_at("model", "initial_weights_sha256", value="0" * 64),
            set_at("inputs", "initial weights", value="0" * 64),
        ]
    ),
    "model: pixels of the augmentation": records(training=set_at("augmentation_sha256", value="0" * 64)),
    "model: pixels of the evaluation": records(evaluation=set_at("protocol", "transform_sha256", value="0" * 64)),
}
CONSISTENT: dict[str, Tampering] = {"everything: one more right in every record, page and figure": everything}
TAMPERINGS = EVALUATION | TRAINING | MACHINES | OTHERS | PAGE | CARD | FIGURES | PREDICTIONS | BUILT | CONSISTENT
