"""A complete recipe without a training: records that agree, files with their hashes, the document that they give."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import safetensors.numpy

from recipe.document.blocks import content_sha256
from recipe.document.recipe_json import as_json
from recipe.document.render import write_document
from recipe.run.directory import Run
from recipe.run.files import write_atomically
from recipe.run.provenance import commit, source_sha256
from recipe.run.records import ClassCounts, Guess, InferenceRecord, Provenance, SerializationRecord, VariantFacts
from tests.builders import records
from tests.builders.records import CONFIG, metric_rows, preprocessing_record, sha, training_record

CLASSES, IMAGES_PER_CLASS = 12, 40
CORRECT = [40, 38, 33, 36, 37, 40, 31, 39, 34, 36, 35, 32]
CORRECT_TOP5 = [40, 40, 40, 39, 40, 40, 38, 40, 40, 40, 39, 40]
PREDICTIONS = "predictions/resize72-crop64-bilinear.npz"
WEIGHTS = {
    "layer.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "norm.num_batches_tracked": np.array(296, dtype=np.int64),
}


def here(command: str, **changes: Any) -> Provenance:
    """A stage that ran on the code of this checkout."""
    source = source_sha256()
    known: dict[str, Any] = {"commit": commit(), "source_sha256": source, "source_sha256_at_end": source}
    return records.provenance(command, **{**known, **changes})


def predictions(correct: list[int] = CORRECT, within_5: list[int] = CORRECT_TOP5) -> bytes:
    """A file in which so many images of each class are right."""
    label = np.repeat(np.arange(CLASSES), IMAGES_PER_CLASS)
    top = (label[:, None] + np.arange(1, 6)) % CLASSES  # all wrong
    for index in range(CLASSES):
        first = index * IMAGES_PER_CLASS
        top[first : first + within_5[index], 4] = index
        rows = slice(first, first + correct[index])
        top[rows, 4] = top[rows, 0]
        top[rows, 0] = index
    buffer = io.BytesIO()
    keys = np.array([f"v_{number:05d}" for number in range(len(label))])
    np.savez(buffer, key=keys, label=label, top5=top, margin=np.zeros(len(label), np.float32))
    return buffer.getvalue()


def evaluation_of(weights: str, content: bytes) -> Any:
    names = records.evaluation_record().per_class
    rows = [
        ClassCounts(
            index=index,
            class_id=f"d{index:08d}",
            name=names[index].name,
            images=IMAGES_PER_CLASS,
            correct_top1=CORRECT[index],
            correct_top5=CORRECT_TOP5[index],
        )
        for index in range(CLASSES)
    ]
    return records.evaluation_record(
        provenance=here("python evaluate.py run_dir=runs/demo", started="2026-11-23T22:00:00Z"),
        inputs={"manifest": sha("manifest"), "weights": weights},
        outputs={PREDICTIONS: sha(content)},
        correct_top5=sum(CORRECT_TOP5),
        per_class=rows,
    )


def serialization_record(weights: str, config_sha256: str, files: dict[str, bytes]) -> SerializationRecord:
    model = files["onnx/model-fp32.onnx"]
    entry = VariantFacts(
        variant="fp32",
        file="onnx/model-fp32.onnx",
        bytes=len(model),
        sha256=sha(model),
        nodes={"Conv": 53},
        conversion={"method": "torch.onnx.export, dynamo"},
        relative_logit_error=1e-7,
        limit="logits within 1e-05 of the largest one",
        correct_top1=sum(CORRECT),
        correct_top5=sum(CORRECT_TOP5),
        flips=0,
        flip_examples=[],
        images_per_second=572.2,
    )
    return SerializationRecord(
        config_sha256=config_sha256,
        settings=CONFIG["serialization"] | {"variants": ["fp32"]},
        provenance=here(
            "python serialize.py run_dir=runs/demo serialization.variants=[fp32]", started="2026-11-23T22:10:00Z"
        ),
        inputs={"weights": weights, "manifest": sha("manifest")},
        outputs={name: sha(content) for name, content in files.items()},
        checkpoint="step-00000296.pt",
        protocol="resize72-crop64-bilinear",
        provider="CPUExecutionProvider",
        opset=20,
        input_shape=["batch", "3", "64", "64"],
        images=CLASSES * IMAGES_PER_CLASS,
        largest_logit=9.5,
        eager_correct_top1=sum(CORRECT),
        eager_correct_top5=sum(CORRECT_TOP5),
        eager_images_per_second=198.6,
        evaluated_correct_top1=sum(CORRECT),
        variants=[entry],
        properties=["classes"],
    )


def inference_record(weights: str, config_sha256: str) -> InferenceRecord:
    guess = Guess(index=0, class_id="d00000000", name="rings", probability=0.25)
    return InferenceRecord(
        config_sha256=config_sha256,
        provenance=here("python -m recipe.stages.infer run_dir=runs/demo", started="2026-11-23T22:20:00Z"),
        inputs={"weights": weights, "manifest": sha("manifest")},
        outputs={},
        class_count=CLASSES,
        label_convention=preprocessing_record().label_convention,
        pictures=[msgspec.structs.replace(records.picture("puppy.jpg", None), guesses={"step-00000296.pt": [guess]})],
    )


def complete_run(directory: Path, weights_sha256: Callable[[Path], str]) -> Run:
    """Every stage, as if it had run; `weights_sha256` says which hash the weights' file has."""
    run = write_run(directory)
    write_atomically(run.checkpoints / "step-00000296.safetensors", safetensors.numpy.save(WEIGHTS))
    write_atomically(run.checkpoints / "step-00000296.pt", b"a checkpoint")
    write_atomically(run.checkpoints / "step-00000296.pt.sha256", f"{sha(b'a checkpoint')}\n".encode())
    weights = weights_sha256(run.checkpoints / "step-00000296.safetensors")
    content, exported = predictions(), "predictions/resize72-crop64-bilinear-onnx-fp32.npz"
    files = {"onnx/model-fp32.onnx": b"a model", exported: predictions()}
    for name, each in {PREDICTIONS: content, **files}.items():
        write_atomically(directory / name, each)
    training = training_record(
        provenance=here("python train.py experiment=demo"),
        outputs={"weights": weights, "checkpoint": sha("checkpoint")},
    )
    preprocessed = here("python preprocess.py experiment=demo", started="2026-11-23T20:00:00Z")
    run.write(preprocessing_record(provenance=preprocessed))
    run.write(training)
    run.write(evaluation_of(weights, content))
    run.write(serialization_record(weights, training.config_sha256, files))
    run.write(inference_record(weights, training.config_sha256))
    timed = here("python -m recipe.stages.infer run_dir=runs/demo", started="2026-11-23T22:20:00Z")
    run.write_timing(records.timing(weights=weights, provenance=timed))
    (run.directory / "tensorboard").mkdir()
    write_document(run, "runs/demo")
    return run


# Ways to damage a recipe


def change_record(run: Run, name: str, change: Callable[[Any], None]) -> None:
    """Edit the JSON of a record, as a person with an editor would."""
    path = run.records / name
    values = json.loads(path.read_bytes())
    change(values)
    path.write_text(json.dumps(values, indent=2) + "\n")


def change_document(run: Run, old: str, new: str, forges: bool = False) -> None:
    """Replace words of the document; a forger corrects the markers' hashes too."""
    text = run.document.read_text()
    assert old in text, old
    text = text.replace(old, new, 1)
    run.document.write_text(forged(text) if forges else text)


def forged(text: str) -> str:
    from recipe.document.blocks import Block, split

    pieces = split(text)
    return "".join(
        piece.text.replace(piece.sha256, content_sha256(piece.content), 1) if isinstance(piece, Block) else piece.text
        for piece in pieces
    )


def change_block(run: Run, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit the JSON block and correct its marker."""
    text = run.document.read_text()
    before, _, rest = text.partition("```json\n")
    content, _, after = rest.partition("\n```")
    values = json.loads(content)
    change(values)
    run.document.write_text(forged(f"{before}```json\n{as_json(values)}\n```{after}"))


def flip(path: Path) -> None:
    """Flip one bit of a file's middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def set_at(*keys: str | int, value: Any) -> Callable[[Any], None]:
    """A change: the value under these keys."""

    def change(values: Any) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return change


def write_run(directory: Path) -> Run:
    run = Run(directory)
    run.write_config(CONFIG)
    for record in (preprocessing_record(), training_record(), records.evaluation_record()):
        run.write(record)
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in metric_rows()))
    return run
