"""Loading the evaluated checkpoint of a run, and making the bytes of ONNX files from it.

fp32 is made by torch's exporter, fp16 and int8 from that graph. uint8 pixels go in: the cast and the normalisation are
part of the graph, since a wrong mean or BGR for RGB is the commonest error of a deployment. Equal weights give equal
bytes: the exporter's notes about this machine (hundreds of paths in stack traces) are removed. `parity` judges the
result.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import Tensor, nn

from recipe.errors import UserError
from recipe.inference.onnx_file import INPUT, OUTPUT
from recipe.models.build import restored_model, weights_sha256
from recipe.models.checkpoint import eval_weights, interface_of, load_checkpoint
from recipe.run.directory import Run
from recipe.run.files import display_path
from recipe.run.records import EvaluationRecord, Interface, Setting, TrainingRecord


@dataclass(frozen=True)
class Evaluated:
    """The network with its weights on the CPU, its interface and its records."""

    where: str  # the checkpoint's file
    model: nn.Module  # in evaluation mode
    interface: Interface
    weights_sha256: str
    manifest_sha256: str  # of the data set that it was trained on
    training: TrainingRecord
    evaluation: EvaluationRecord


def load_evaluated(run: Run) -> Evaluated:
    """Load the checkpoint of the evaluation record. Raises `UserError` with the command to run first, or again."""
    here = display_path(run.directory)
    training, evaluation = run.read(TrainingRecord), run.read(EvaluationRecord)
    if training is None:
        raise UserError(f"{here} has no finished training: run `python train.py run_dir={here}` first")
    if evaluation is None:
        raise UserError(
            f"{here} has no evaluation, and a model of unknown accuracy is not used: "
            f"run `python evaluate.py run_dir={here}` first"
        )
    path = run.checkpoints / evaluation.protocol.checkpoint
    where, state = display_path(path), load_checkpoint(path)
    weights = weights_sha256(eval_weights(state))
    if weights != evaluation.inputs.get("weights"):
        raise UserError(
            f"{where} has other weights than those that were evaluated: run `python evaluate.py run_dir={here}` again"
        )
    return Evaluated(
        where=where,
        model=restored_model(state, where).eval(),
        interface=interface_of(state, where),
        weights_sha256=weights,
        manifest_sha256=state["manifest_sha256"],
        training=training,
        evaluation=evaluation,
    )


EXAMPLE_BATCH = 2  # 1 was taken for a constant by earlier exporters (pytorch#157621)
OPSET = 20
NORMALISATION_OPERATORS = ("Cast", "Sub", "Div")  # before the first convolution: int8 leaves them in fp32


class Deployable(nn.Module):
    """The network with its normalisation in front: uint8 [N, 3, H, W] -> logits [N, classes]."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, interface: Interface) -> None:
        super().__init__()
        self.model = model
        for name, values in (("mean", interface.mean), ("std", interface.std)):
            self.register_buffer(name, torch.tensor(values).mul(255).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """The same arithmetic as `Normalisation` followed by the model."""
        logits: Tensor = self.model((images - self.mean) / self.std)
        return logits


def export_fp32(model: nn.Module, interface: Interface) -> onnx.ModelProto:
    """The graph for a batch of any size. The exporter folds batch norms into their convolutions."""
    deployable = Deployable(model, interface).eval()
    size = interface.crop_pixels
    example = torch.zeros(EXAMPLE_BATCH, 3, size, size, dtype=torch.uint8)
    program = torch.onnx.export(
        deployable,
        (example,),
        dynamo=True,
        external_data=False,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        verbose=False,
    )
    assert program is not None, "with dynamo=True the exporter returns the program"
    return stripped(program.model_proto)


def stripped(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Remove stack traces and other notes of the exporter: they contain paths of this machine."""
    del graph.metadata_props[:]
    del graph.graph.metadata_props[:]
    parts = (graph.graph.node, graph.graph.value_info, graph.graph.input, graph.graph.output, graph.graph.initializer)
    for part in parts:
        for entry in part:
            del entry.metadata_props[:]
            entry.doc_string = ""
    return graph


def to_fp16(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Convert weights and activations to half precision, the normalisation included. Input and output stay."""
    converted: onnx.ModelProto = convert_float_to_float16(copy_of(graph), keep_io_types=True)
    return stripped(converted)


def to_int8(graph: onnx.ModelProto, calibration: Iterator[Tensor], reduce_range: bool) -> onnx.ModelProto:
    """Static quantisation (QDQ), weights per channel, ranges of activations from the calibration images."""
    with tempfile.TemporaryDirectory() as directory, quiet_quantisation():
        target = Path(directory, "int8.onnx")
        quantize_static(
            copy_of(graph),
            str(target),
            Reader(calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=normalisation_nodes(graph),
        )
        return stripped(onnx.load_model_from_string(target.read_bytes()))


def fp16_facts() -> dict[str, Setting]:
    return {"method": "weights and activations converted; input and output left as they are"}


def int8_facts(images: int, reduce_range: bool) -> dict[str, Setting]:
    return {
        "method": "static quantisation, QDQ, signed weights per channel, unsigned activations between their extremes",
        "calibration_training_images": images,
        "weights_of_7_bits": reduce_range,
    }


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: Iterator[Tensor]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, object] | None:
        images = next(self.batches, None)
        return None if images is None else {INPUT: images.contiguous().numpy()}


def normalisation_nodes(graph: onnx.ModelProto) -> list[str]:
    """The names of the nodes before the first convolution."""
    names = []
    for node in graph.graph.node:
        if node.op_type not in NORMALISATION_OPERATORS:
            break
        names.append(node.name)
    return names


def copy_of(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy, since the converters modify their input."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    return copy


def with_properties(graph: onnx.ModelProto, properties: dict[str, str]) -> bytes:
    """The file's bytes, with the metadata in the order of its names."""
    onnx.helper.set_model_props(graph, dict(sorted(properties.items())))
    onnx.checker.check_model(graph, full_check=True)
    content: bytes = graph.SerializeToString(deterministic=True)
    return content


@contextmanager
def quiet_quantisation() -> Iterator[None]:
    """The quantiser advises a shape inference that this graph went through already, on the root logger."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
