"""The exported file as such: the metadata that a stranger needs, and a session that asks it for logits.

One file holds everything: graph, weights, and under `metadata_props` the classes, how pixels are made, the hashes of
what it came from and the accuracy of the model. No external data, no path, no date.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import torch
from torch import Tensor

from recipe.config import canonical_json
from recipe.errors import UserError
from recipe.records import Interface, Record

INPUT, OUTPUT = "images", "logits"
CPU_PROVIDER = "CPUExecutionProvider"
FILE_BYTES_MAX = 2**31  # a protobuf cannot be longer
FATAL_ONLY = 4  # onnxruntime's own log; its errors are raised as well


class TrainingCode(Record, frozen=True, kw_only=True):
    """The code that trained the weights, not the code that exported them."""

    commit: str | None
    tree: str  # the state of a `TreeState`
    source_sha256: str


class MeasuredAccuracy(Record, frozen=True, kw_only=True):
    """Of the eager model, from the evaluation record."""

    protocol: str
    precision: str
    epochs_completed: int  # by these weights
    epochs: int  # of the whole training
    images: int
    correct_top1: int
    correct_top5: int


class Metadata(Record, frozen=True, kw_only=True):
    """What an exported file says about itself."""

    format: str = "recipe-onnx/1"
    name: str
    variant: str
    interface: Interface
    input: str = f"{INPUT}: uint8 RGB [batch, 3, crop, crop] in [0, 255]; cast and normalisation are inside the graph"
    output: str = f"{OUTPUT}: float32 [batch, classes], before softmax"
    config_sha256: str
    recipe_id: str
    weights_sha256: str
    manifest_sha256: str
    training: TrainingCode
    accuracy: MeasuredAccuracy
    licence: str  # declared for the data set; empty where nobody said
    versions: dict[str, str]  # of what exported it


def to_properties(metadata: Metadata) -> dict[str, str]:
    """Metadata as the strings that ONNX holds: text as it is, everything else as JSON."""
    values: dict[str, Any] = msgspec.to_builtins(metadata)
    return {name: value if isinstance(value, str) else canonical_json(value).decode() for name, value in values.items()}


def from_properties(properties: dict[str, str], where: str) -> Metadata:
    """Read back and validate; a file from a stranger may hold anything."""
    fields = {field.name: field for field in msgspec.structs.fields(Metadata)}
    try:
        values = {
            name: text if fields[name].type is str else msgspec.json.decode(text)
            for name, text in properties.items()
            if name in fields
        }
        metadata = msgspec.convert(values, Metadata)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise UserError(f"{where} was not exported by serialize.py, or is damaged: {error}") from error
    if metadata.format != Metadata.__struct_defaults__[0]:
        raise UserError(f"{where} has format {metadata.format!r}, this code reads {Metadata.__struct_defaults__[0]!r}")
    return metadata


class OnnxModel:
    """A file in a session of onnxruntime: a `Predict`, and what it says about itself."""

    def __init__(self, content: bytes, where: str, provider: str = CPU_PROVIDER, threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = FATAL_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(content, options, providers=[provider])
        except Exception as error:  # onnxruntime has a class of its own for every kind of damage
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{where} cannot be opened by onnxruntime: {reason}") from error
        self.metadata = from_properties(self.session.get_modelmeta().custom_metadata_map, where)
        self.provider: str = self.session.get_providers()[0]

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 logits [N, classes]."""
        (logits,) = self.session.run([OUTPUT], {INPUT: np.ascontiguousarray(images.numpy())})
        return torch.from_numpy(logits)


def onnx_protocol(eager: str, variant: str) -> str:
    """The name of an exported model's metric, from that of the eager one."""
    return f"{eager}-onnx-{variant}"


def read_onnx(path: Path, where: str) -> bytes:
    """The bytes of a file, which hold all of it: external data beside it is never looked for."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise UserError(f"{where} is larger than an ONNX file without external data can be")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}") from error
