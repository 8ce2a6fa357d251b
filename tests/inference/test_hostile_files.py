"""Untrusted exported files and checkpoints: `Classifier` refuses them with one clear line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from recipe.config.schema import Backend, Config
from recipe.errors import NonFiniteError, UserError
from recipe.inference.classifier import Classifier
from recipe.inference.export import load_evaluated
from recipe.inference.pictures import pixels_of
from recipe.models.checkpoint import checkpoint_files, load_checkpoint, save_checkpoint
from recipe.run.directory import Run
from recipe.run.records import SerializationRecord
from recipe.stages.evaluate import evaluate_run

PICTURE = np.zeros((40, 40, 3), dtype=np.uint8)
OnnxChange = Callable[[onnx.ModelProto], object]


@pytest.fixture
def model(record: SerializationRecord, config: Config) -> onnx.ModelProto:
    """An honest file, to be changed."""
    return onnx.load(Run(config.run_dir).onnx_file("fp32"))


def refusal(model: onnx.ModelProto | bytes, name: str = "hostile.onnx") -> str:
    Path(name).write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    with pytest.raises(UserError) as refused:
        Classifier.load(name)(PICTURE)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_honest_file_is_used(model: onnx.ModelProto) -> None:
    Path("honest.onnx").write_bytes(model.SerializeToString())
    assert len(Classifier.load("honest.onnx")(PICTURE)) == 5


# ---- numbers in other files ---------------------------------------------------------------------------


def elsewhere(tensor: TensorProto) -> TensorProto:
    """The tensor with its numbers in a file of the current directory."""
    content = numpy_helper.to_array(tensor).tobytes()
    Path("beside.bin").write_bytes(content)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "beside.bin"), ("offset", "0"), ("length", str(len(content)))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def initializer(model: onnx.ModelProto) -> None:
    elsewhere(max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data)))


def constant(model: onnx.ModelProto) -> None:
    tensor = elsewhere(numpy_helper.from_array(np.zeros(4, np.float32), "hidden"))
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))


def subgraph(model: onnx.ModelProto) -> None:
    tensor = elsewhere(numpy_helper.from_array(np.zeros(4, np.float32), "hidden"))
    output = helper.make_tensor_value_info("inner", TensorProto.FLOAT, [4])
    graph = helper.make_graph([], "inner", [], [output], initializer=[tensor])
    model.graph.node.append(helper.make_node("If", ["c"], ["unused"], then_branch=graph, else_branch=graph))


def function(model: onnx.ModelProto) -> None:
    tensor = elsewhere(numpy_helper.from_array(np.zeros(4, np.float32), "hidden"))
    node = helper.make_node("Constant", [], ["inner"], value=tensor)
    model.functions.append(helper.make_function("x", "f", [], ["inner"], [node], model.opset_import))


def sparse(model: onnx.ModelProto) -> None:
    values = elsewhere(numpy_helper.from_array(np.zeros(1, np.float32), "hidden"))
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


def training(model: onnx.ModelProto) -> None:
    tensor = elsewhere(numpy_helper.from_array(np.zeros(4, np.float32), "hidden"))
    model.training_info.add().algorithm.initializer.append(tensor)


def several(model: onnx.ModelProto) -> None:
    tensor = elsewhere(numpy_helper.from_array(np.zeros(4, np.float32), "hidden"))
    node = helper.make_node("Constant", [], ["unused"])
    node.attribute.append(AttributeProto(name="values", type=AttributeProto.TENSORS, tensors=[tensor]))
    model.graph.node.append(node)


def entries_alone(model: onnx.ModelProto) -> None:
    initializer(model)
    for tensor in model.graph.initializer:
        tensor.ClearField("data_location")


@pytest.mark.parametrize(
    "change", [initializer, constant, subgraph, function, sparse, training, several, entries_alone]
)
def test_numbers_in_another_file_are_never_read(change: OnnxChange, model: onnx.ModelProto) -> None:
    change(model)
    assert "in another file, which is never read" in refusal(model)


# ---- what a file says about itself ---------------------------------------------------------------------


def with_property(model: onnx.ModelProto, name: str, value: str) -> onnx.ModelProto:
    (entry,) = (entry for entry in model.metadata_props if entry.key == name)
    entry.value = value
    return model


def interface_of(model: onnx.ModelProto) -> dict[str, Any]:
    (text,) = (entry.value for entry in model.metadata_props if entry.key == "interface")
    values: dict[str, Any] = json.loads(text)
    return values


CLASS = {"id": "x", "name": "x"}


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_pixels": 8},
        {"crop_pixels": 4000, "resize_pixels": 4000},
        {"crop_pixels": -1},
        {"crop_pixels": 10**30},
        {"crop_pixels": "24"},
        {"classes": [CLASS]},
        {"classes": [CLASS] * 13},
        {"classes": []},
        {"classes": {"a": 1}},
        {"interpolation": "os.system"},
        {"mean": []},
        {"std": [0.0, 0.0, 0.0]},
        {"std": [1e999, 1.0, 1.0]},
    ],
)
def test_an_interface_that_contradicts_its_graph_is_refused(changes: dict[str, Any], model: onnx.ModelProto) -> None:
    assert refusal(with_property(model, "interface", json.dumps(interface_of(model) | changes)))


@pytest.mark.parametrize("name", ["interface", "accuracy", "training", "versions", "format"])
@pytest.mark.parametrize("value", ["[" * 10**5 + "]" * 10**5, '{"a":' * 10**5, "", "null", "\ud7ff", "NaN", "[1]"])
def test_invalid_metadata_are_refused_in_one_line(name: str, value: str, model: onnx.ModelProto) -> None:
    assert refusal(with_property(model, name, value))


def test_a_repeated_property_is_refused(model: onnx.ModelProto) -> None:
    model.metadata_props.append(model.metadata_props[0])
    assert "twice" in refusal(model)


def test_metadata_that_are_not_text_are_refused_in_one_line(model: onnx.ModelProto) -> None:
    content = model.SerializeToString()
    assert refusal(content.replace(b"recipe-onnx/1", b"\xff\xfeipe-onnx/1"))


def wrong_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "other"


def two_outputs(model: onnx.ModelProto) -> None:
    model.graph.output.append(model.graph.output[0])


def other_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "NoSuchOperator"


def at_run_time(model: onnx.ModelProto) -> None:
    """The shapes are unknown until the graph runs, and then wrong."""
    last = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["kept" if name == last else name for name in node.output]
    model.graph.initializer.append(numpy_helper.from_array(np.array([7, -1], np.int64), "shape"))
    model.graph.node.append(helper.make_node("Reshape", ["kept", "shape"], [last]))
    for dimension, name in zip(model.graph.output[0].type.tensor_type.shape.dim, "ab", strict=True):
        dimension.dim_param = name


def enormous(model: onnx.ModelProto) -> None:
    last = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["kept" if name == last else name for name in node.output]
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**30, 2**20, 12], np.int64), "shape"))
    model.graph.node.append(helper.make_node("Expand", ["kept", "shape"], [last]))


@pytest.mark.parametrize("change", [wrong_output, two_outputs, other_operator, at_run_time, enormous])
def test_a_graph_that_is_another_than_it_says_is_refused(change: OnnxChange, model: onnx.ModelProto) -> None:
    change(model)
    assert refusal(model)


def poisoned(model: onnx.ModelProto) -> onnx.ModelProto:
    bias = next(tensor for tensor in model.graph.initializer if "head.bias" in tensor.name)
    bias.CopyFrom(numpy_helper.from_array(np.full(bias.dims, np.nan, np.float32), bias.name))
    return model


def test_logits_that_are_not_finite_are_refused(model: onnx.ModelProto) -> None:
    assert "not finite" in refusal(poisoned(model))


@pytest.mark.parametrize("name", ["x.onnx", "x.pt"])
def test_pipes_and_devices_are_refused_at_once(name: str) -> None:
    os.mkfifo(name)
    Path("zero.onnx").symlink_to("/dev/zero")
    Path("x.pt.sha256").write_text("0" * 64)
    for path in (name, "zero.onnx"):
        with pytest.raises(UserError, match="pipe or a device"):
            Classifier.load(path)
    os.mkfifo("picture")
    with pytest.raises(UserError, match="pipe or a device"):
        pixels_of("picture", apply_orientation=False)


# ---- evaluation and export leave a run as it was --------------------------------------------------------


def files(run: Run) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(run.directory.rglob("*")) if path.is_file()}


@pytest.fixture
def copied(record: SerializationRecord, config: Config, tmp_path: Path) -> Config:
    """A copy of the run, to be poisoned."""
    shutil.copytree(config.run_dir, tmp_path / "copy")
    return replace(config, run_dir=str(tmp_path / "copy"))


def test_an_exported_model_without_numbers_leaves_no_record(copied: Config) -> None:
    run = Run(copied.run_dir)
    path = run.onnx_file("fp32")
    path.write_bytes(poisoned(onnx.load(path)).SerializeToString())
    before = files(run)
    with pytest.raises(NonFiniteError, match="logits that are not finite for") as refused:
        evaluate_run(replace(copied, evaluation=replace(copied.evaluation, backend=Backend.onnx)))
    assert refused.value.exit_code == 65
    assert files(run) == before


@pytest.mark.parametrize("protocol", ["../../outside", "/tmp/outside", "a/b", ".hidden", "a\0b", ""])
def test_a_protocol_of_a_file_is_not_part_of_a_path(protocol: str, copied: Config) -> None:
    run = Run(copied.run_dir)
    path = run.onnx_file("fp32")
    model = onnx.load(path)
    accuracy = json.loads(next(entry.value for entry in model.metadata_props if entry.key == "accuracy"))
    with_property(model, "accuracy", json.dumps(accuracy | {"protocol": protocol}))
    path.write_bytes(model.SerializeToString())
    before = files(run)
    if protocol:
        with pytest.raises(UserError, match="cannot name a file"):
            evaluate_run(replace(copied, evaluation=replace(copied.evaluation, backend=Backend.onnx)))
        assert files(run) == before


# ---- entries of a checkpoint ---------------------------------------------------------------------------


def with_checkpoint(config: Config, change: Callable[[dict[str, Any]], object]) -> Path:
    """The run's last checkpoint with a change, and a right checksum."""
    (*_, path) = checkpoint_files(Run(config.run_dir).checkpoints)
    state = load_checkpoint(path)
    change(state)
    del state["format"]
    step = int(path.stem.removeprefix("step-"))
    path.unlink()
    return save_checkpoint(path.parent, step, state)


def test_weights_that_are_not_finite_leave_the_run_as_it_was(copied: Config) -> None:
    path = with_checkpoint(copied, lambda state: state["model"]["head.bias"].fill_(float("nan")))
    run = Run(copied.run_dir)
    before = files(run)
    for stage in (lambda: evaluate_run(copied), lambda: Classifier.load(path)):
        with pytest.raises(NonFiniteError, match=r"weights that are not finite: head\.bias"):
            stage()
    assert files(run) == before


ENTRIES = ["config", "config_sha256", "interface", "manifest_sha256", "progress", "model", "average", "optimizer"]


@pytest.mark.parametrize("value", [None, 7, "x", [], {}, {"a": {"b": 1}}, torch.zeros(2)], ids=str)
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_checkpoint_with_another_entry_is_refused_in_one_line(entry: str, value: Any, copied: Config) -> None:
    if (entry, value) == ("average", None) or (entry == "optimizer" and isinstance(value, dict)):
        return  # this run has no average, and training restores the optimizer
    if entry.endswith("sha256") and value == "x":
        return  # a hash like any other: of another data set
    path = with_checkpoint(copied, lambda state: state.update({entry: value}))
    for stage in (lambda: evaluate_run(copied), lambda: Classifier.load(path)):
        with pytest.raises(UserError) as refused:
            stage()
        assert "\n" not in str(refused.value)
    if entry != "config":
        with pytest.raises(UserError):
            load_evaluated(Run(copied.run_dir))


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_checkpoint_without_an_entry_is_refused_in_one_line(entry: str, copied: Config) -> None:
    path = with_checkpoint(copied, lambda state: state.pop(entry))
    with pytest.raises(UserError, match="was not written by training"):
        Classifier.load(path)


@pytest.mark.parametrize(
    "changes", [{"best_step": "x"}, {"best_step": -1}, {"epoch": "x"}, {"epoch": None}, {"best_step": 2**70}]
)
def test_impossible_progress_is_refused_in_one_line(changes: dict[str, Any], copied: Config) -> None:
    with_checkpoint(copied, lambda state: state["progress"].update(changes))
    with pytest.raises(UserError):
        evaluate_run(replace(copied, evaluation=replace(copied.evaluation, checkpoint="best")))


@pytest.mark.parametrize(
    "changes", [{"name": 7}, {"name": "os.system"}, {"norm": []}, {"stochastic_depth": "x"}, {"blur_pool": 3}]
)
def test_an_unknown_network_is_refused_in_one_line(changes: dict[str, Any], copied: Config) -> None:
    path = with_checkpoint(copied, lambda state: state["config"]["model"].update(changes))
    with pytest.raises(UserError):
        Classifier.load(path)


def test_a_foreign_checksum_file_is_bounded(copied: Config) -> None:
    (*_, path) = checkpoint_files(Run(copied.run_dir).checkpoints)
    beside = path.with_name(f"{path.name}.sha256")
    assert hashlib.sha256(path.read_bytes()).hexdigest() in beside.read_text()
    beside.unlink()
    beside.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="pipe or a device"):
        load_checkpoint(path)
