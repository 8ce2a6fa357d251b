"""An exported ONNX file: its metadata, and a session that computes logits.

The file is self-contained: graph, weights, and in `metadata_props` the classes, the preprocessing, the hashes of its
origins and the accuracy of the model. No external data, no path, no date.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from recipe.config.identity import canonical_json
from recipe.errors import UserError
from recipe.run.files import read_file
from recipe.run.records import Interface, Record

INPUT, OUTPUT = "images", "logits"
CPU_PROVIDER = "CPUExecutionProvider"
ONNX_BYTES_MAX = 2**31  # a protobuf cannot be longer
FATAL_ONLY = 4  # onnxruntime's own log: its errors are raised as well


class TrainingCode(Record, frozen=True, kw_only=True):
    """The code that trained the weights, not the code that exported them."""

    commit: str | None
    tree: str  # the state of a `TreeState`
    source_sha256: str


class MeasuredAccuracy(Record, frozen=True, kw_only=True):
    """The eager model's, from the evaluation record."""

    protocol: str
    precision: str
    epochs_completed: int  # by these weights
    epochs: int  # of the complete training
    images: int
    correct_top1: int
    correct_top5: int


class Metadata(Record, frozen=True, kw_only=True):
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
    licence: str  # declared for the data set, or empty
    versions: dict[str, str]  # of what exported it


def to_properties(metadata: Metadata) -> dict[str, str]:
    """Metadata as the strings that ONNX stores: text as it is, everything else as JSON."""
    values: dict[str, Any] = msgspec.to_builtins(metadata)
    return {name: value if isinstance(value, str) else canonical_json(value).decode() for name, value in values.items()}


def from_properties(properties: dict[str, str], where: str) -> Metadata:
    """Read back and validate the metadata of a file that may come from somebody else."""
    fields = {field.name: field for field in msgspec.structs.fields(Metadata)}
    try:
        values = {
            name: text if fields[name].type is str else msgspec.json.decode(text)
            for name, text in properties.items()
            if name in fields
        }
        metadata = msgspec.convert(values, Metadata)
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError) as error:
        raise UserError(f"{where} was not exported by serialize.py, or is damaged: {error}") from error
    if metadata.format != Metadata.__struct_defaults__[0]:
        raise UserError(f"{where} has format {metadata.format!r}, this code reads {Metadata.__struct_defaults__[0]!r}")
    return metadata


class OnnxModel:
    """A file in a session of onnxruntime: a `Predict` with metadata.

    Raises `UserError` for a file that is damaged, reads other files, or contradicts itself.
    """

    def __init__(self, content: bytes, where: str, provider: str = CPU_PROVIDER, threads: int | None = None) -> None:
        self.where = where
        self.metadata = described(content, where)
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.load_model_format", "ONNX")  # as it was looked at
        options.log_severity_level = FATAL_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(content, options, providers=[provider])
        except Exception as error:  # onnxruntime has a class of its own for every kind of damage
            raise UserError(f"{where} cannot be opened by onnxruntime: {_reason(error)}") from error
        self.provider: str = self.session.get_providers()[0]
        self._check_own_shapes()

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 logits [N, classes]."""
        try:
            (logits,) = self.session.run([OUTPUT], {INPUT: np.ascontiguousarray(images.numpy())})
        except Exception as error:  # of a graph that does not fit its own description, about anything
            raise UserError(f"{self.where} cannot be run by onnxruntime: {_reason(error)}") from error
        shape = (len(images), len(self.metadata.interface.classes))
        if not isinstance(logits, np.ndarray) or logits.dtype != np.float32 or logits.shape != shape:
            found = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, np.ndarray) else type(logits).__name__
            raise UserError(f"{self.where} gives {found} where float32 logits {list(shape)} were promised")
        return torch.from_numpy(logits)

    def _check_own_shapes(self) -> None:
        """Raise `UserError` unless inputs and outputs of the graph fit the metadata, as far as shapes are fixed."""
        interface = self.metadata.interface
        crop = interface.crop_pixels
        for what, found, wanted in (
            ("input", self.session.get_inputs(), (INPUT, "tensor(uint8)", [None, 3, crop, crop])),
            ("output", self.session.get_outputs(), (OUTPUT, "tensor(float)", [None, len(interface.classes)])),
        ):
            name, kind, shape = wanted
            is_promised = len(found) == 1 and (found[0].name, found[0].type) == (name, kind) and _fits(found[0], shape)
            if not is_promised:
                shown = ", ".join(f"{one.name[:50]} {one.type} {one.shape}" for one in found[:3])[:200]
                raise UserError(
                    f"{self.where} describes its {what} as {name} {kind} {['batch', *shape[1:]]}, its graph has {shown}"
                )


def _fits(found: Any, wanted: list[int | None]) -> bool:
    """Whether a shape fits the wanted one. A named dimension fits any size."""
    return len(found.shape) == len(wanted) and all(
        wish is None or not isinstance(size, int) or size == wish
        for size, wish in zip(found.shape, wanted, strict=True)
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def described(content: bytes, where: str) -> Metadata:
    """Read the metadata before anything of the file is run. Raises `UserError` for one that would read other files."""
    try:
        model = onnx.load_model_from_string(content)
        external = next((tensor.name for tensor in tensors_of(model) if is_external(tensor)), None)
        properties = [(entry.key, entry.value) for entry in model.metadata_props]
    except Exception as error:  # protobuf's own classes, and others from its fields
        raise UserError(f"{where} cannot be opened: it is not an ONNX file, or a damaged one") from error
    if external is not None:
        raise UserError(
            f"{where} keeps the tensor {external[:100]!r} in another file, which is never read: save it as one file"
        )
    if len(dict(properties)) < len(properties):
        raise UserError(f"{where} was not exported by serialize.py, or is damaged: it describes a property twice")
    return from_properties(dict(properties), where)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether onnxruntime would look for the tensor's numbers outside of the model."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL or len(tensor.external_data) > 0


def tensors_of(message: Any) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: in graphs, nodes, functions, sparse ones and training."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for inner in [value] if hasattr(value, "ListFields") else value:
            if isinstance(inner, onnx.TensorProto):
                yield inner
            else:
                yield from tensors_of(inner)


def onnx_protocol(eager: str, variant: str) -> str:
    """The name of an exported model's metric, from that of the eager one."""
    return f"{eager}-onnx-{variant}"


def read_onnx(path: Path, where: str) -> bytes:
    """The bytes of a file of at most `ONNX_BYTES_MAX`."""
    return read_file(path, where, ONNX_BYTES_MAX)
