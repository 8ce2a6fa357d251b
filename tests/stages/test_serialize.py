"""Exported models: they agree with the eager one or are refused, have equal bytes, and are self-contained."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from recipe.config.schema import Backend, Config, Variant
from recipe.distributed import start_world
from recipe.errors import UserError
from recipe.inference import export
from recipe.inference.classifier import Classifier
from recipe.inference.latency import REPEATS_BEYOND, machine_name, measure_timing, percentile
from recipe.inference.onnx_file import OnnxModel
from recipe.inference.parity import ParityError
from recipe.models.build import restored_model
from recipe.models.checkpoint import checkpoint_files, load_checkpoint
from recipe.run.directory import Run
from recipe.run.files import CHECKOUT
from recipe.run.records import EvaluationRecord, Hardware, Interface, SerializationRecord
from recipe.stages import serialize as serialization
from recipe.stages.evaluate import evaluate_run
from recipe.stages.serialize import serialize_run
from recipe.training.loop import train
from tests.builders.configs import SMALL_DEMO, compose_config

pytestmark = pytest.mark.process

Sabotage = Callable[[pytest.MonkeyPatch], None]


def fp32_only(config: Config, run_dir: Path) -> Config:
    """A copy of the run without exports. Exports one file, which is quick."""
    run = Run(config.run_dir)
    for path in (run.config, *run.records.glob("*.json"), *run.checkpoints.iterdir()):
        if path.name != "serialization.json":
            target = run_dir / path.relative_to(run.directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return replace(config, run_dir=str(run_dir), serialization=replace(config.serialization, variants=[Variant.fp32]))


# ---- a clean export ---------------------------------------------------------------------------------


def test_fp32_puts_every_image_into_the_class_of_the_eager_model(record: SerializationRecord) -> None:
    fp32 = record.variants[0]
    assert (fp32.variant, fp32.flips) == ("fp32", 0)
    assert fp32.relative_logit_error <= 1e-5
    assert (fp32.correct_top1, fp32.correct_top5) == (record.eager_correct_top1, record.eager_correct_top5)


def test_every_variant_is_evaluated_on_every_image(record: SerializationRecord, config: Config) -> None:
    assert [entry.variant for entry in record.variants] == ["fp32", "fp16", "int8"]
    for entry in record.variants:
        predictions = np.load(Run(config.run_dir).predictions / f"{record.protocol}-onnx-{entry.variant}.npz")
        assert len(set(predictions["key"].tolist())) == record.images == 48
        assert int((predictions["top5"][:, 0] == predictions["label"]).sum()) == entry.correct_top1
        assert entry.flips >= len(entry.flip_examples)


def test_evaluating_an_exported_file_gives_the_recorded_counts(record: SerializationRecord, config: Config) -> None:
    for entry in record.variants:
        asked = replace(config.evaluation, backend=Backend.onnx, variant=Variant(entry.variant))
        found = evaluate_run(replace(config, evaluation=asked))
        assert found is not None
        assert found.protocol.name == f"{record.protocol}-onnx-{entry.variant}"
        assert found.protocol.backend == "onnxruntime CPUExecutionProvider"
        assert (found.correct_top1, found.correct_top5) == (entry.correct_top1, entry.correct_top5)
    mine = Run(config.run_dir).read(EvaluationRecord)
    assert mine is not None
    assert mine.protocol.backend == "torch", "the recipe's own result stays that of its weights"


def test_exporting_again_gives_the_same_bytes(record: SerializationRecord, config: Config) -> None:
    again = serialize_run(config)
    assert again.outputs == record.outputs


def test_the_file_is_complete_and_names_no_path(record: SerializationRecord, config: Config) -> None:
    for entry in record.variants:
        path = Run(config.run_dir).onnx_file(entry.variant)
        content = path.read_bytes()
        onnx.checker.check_model(onnx.load_model_from_string(content), full_check=True)
        assert [sibling.name for sibling in path.parent.iterdir() if sibling.suffix != ".onnx"] == []
        for forbidden in (str(CHECKOUT), sys.prefix, str(path.parent), "site-packages"):
            assert forbidden.encode() not in content


def test_the_file_contains_classes_preprocessing_and_accuracy(record: SerializationRecord, config: Config) -> None:
    run = Run(config.run_dir)
    evaluation = run.read(EvaluationRecord)
    assert evaluation is not None
    told = OnnxModel(run.onnx_file("fp32").read_bytes(), "the file").metadata
    assert [(entry.id, entry.name) for entry in told.interface.classes] == [
        (row.class_id, row.name) for row in evaluation.per_class
    ]
    assert (told.interface.resize_pixels, told.interface.crop_pixels) == (28, 24)
    assert told.weights_sha256 == evaluation.inputs["weights"]
    assert told.accuracy.correct_top1 == evaluation.correct_top1
    assert told.accuracy.protocol == evaluation.protocol.name


def test_any_batch_size_runs(record: SerializationRecord, config: Config) -> None:
    model = OnnxModel(Run(config.run_dir).onnx_file("fp32").read_bytes(), "the file")
    images = serialization.noise_images(24)
    whole = model(images)
    for size in (1, 2, 7):
        torch.testing.assert_close(model(images[:size]), whole[:size], rtol=0, atol=1e-4 * float(whole.abs().max()))


# ---- the gate ---------------------------------------------------------------------------------------


def with_export(make: Callable[[nn.Module, Interface], onnx.ModelProto]) -> Sabotage:
    return lambda patch: patch.setattr(serialization, "export_fp32", make)


class Swapped(nn.Module):
    """Blue first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images.flip(1))
        return logits


def wrong_mean(model: nn.Module, interface: Interface) -> onnx.ModelProto:
    return export.export_fp32(model, msgspec.structs.replace(interface, mean=[0.5, 0.5, 0.5]))


def wrong_eps(model: nn.Module, interface: Interface) -> onnx.ModelProto:
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3  # TensorFlow's
    return export.export_fp32(other, interface)


def swapped_channels(model: nn.Module, interface: Interface) -> onnx.ModelProto:
    return export.export_fp32(Swapped(model), interface)


def batch_statistics(model: nn.Module, interface: Interface) -> onnx.ModelProto:
    """The logits of train mode."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    return export.export_fp32(other, interface)


def wrong_resize(patch: pytest.MonkeyPatch) -> None:
    real = serialization.metadata

    def lying(*arguments: Any) -> Any:
        told = real(*arguments)
        return msgspec.structs.replace(told, interface=msgspec.structs.replace(told.interface, resize_pixels=32))

    patch.setattr(serialization, "metadata", lying)


@pytest.mark.parametrize(
    "sabotage",
    [
        pytest.param(with_export(wrong_mean), id="wrong mean"),
        pytest.param(wrong_resize, id="wrong resize"),
        pytest.param(with_export(wrong_eps), id="wrong batch-norm eps"),
        pytest.param(with_export(swapped_channels), id="swapped channels"),
        pytest.param(with_export(batch_statistics), id="train mode"),
    ],
)
def test_a_sabotaged_export_is_caught_and_leaves_nothing(
    sabotage: Sabotage, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = fp32_only(config, tmp_path / "run")
    sabotage(monkeypatch)
    with pytest.raises(UserError) as caught:
        serialize_run(mine)
    if isinstance(caught.value, ParityError):
        assert "does not agree with the eager one" in str(caught.value)
        assert "ILSVRC2012_val_" in str(caught.value), "it names an image"
        assert caught.value.exit_code == 70
    assert not list((tmp_path / "run").rglob("*.onnx*"))
    assert Run(mine.run_dir).read(SerializationRecord) is None


def test_a_clean_export_passes_five_times_of_five(config: Config, tmp_path: Path) -> None:
    mine = fp32_only(config, tmp_path / "run")
    assert len({serialize_run(mine).outputs["onnx/model-fp32.onnx"] for _ in range(5)}) == 1


def test_a_variant_that_loses_too_much_is_refused(config: Config, tmp_path: Path) -> None:
    mine = fp32_only(config, tmp_path / "run")
    limits = replace(mine.serialization, variants=list(Variant), int8_accuracy_drop_max=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serialization, "to_int8", lambda graph, images, reduce_range: zeroed(graph))
        with pytest.raises(ParityError, match=r"the int8 model does not agree .*allowed: top-1 at most 0.00%"):
            serialize_run(replace(mine, serialization=limits))
    assert not list((tmp_path / "run").rglob("*.onnx*"))


def zeroed(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A model that knows nothing: every weight of its head is zero."""
    other = export.copy_of(graph)
    for entry in other.graph.initializer:
        if entry.name.startswith("model.head"):
            entry.raw_data = bytes(len(entry.raw_data))
    return other


def test_without_an_evaluation_the_command_is_named(config: Config, tmp_path: Path) -> None:
    mine = fp32_only(config, tmp_path / "run")
    (tmp_path / "run" / "records" / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"run `python evaluate\.py run_dir=.*` first"):
        serialize_run(mine)


def test_another_protocol_than_the_models_own_is_not_carried(config: Config, tmp_path: Path) -> None:
    mine = fp32_only(config, tmp_path / "run")
    evaluate_run(replace(mine, evaluation=replace(mine.evaluation, resize_pixels=40)))
    with pytest.raises(UserError, match=r"evaluated by the protocol resize40-.* its own is resize28-"):
        serialize_run(mine)


def test_the_accuracy_of_two_views_is_not_carried_by_a_file_that_sees_one(config: Config, tmp_path: Path) -> None:
    mine = fp32_only(config, tmp_path / "run")
    flipped = replace(mine, evaluation=replace(mine.evaluation, flip=True))
    found = evaluate_run(flipped)
    assert found is not None
    assert found.protocol.name == "resize28-crop24-bilinear-flip"
    assert found.protocol.transform["views"] == "the image and its mirror image, logits averaged"
    with pytest.raises(UserError, match=r"bilinear-flip, which averages .* evaluation\.flip=false` first") as refused:
        serialize_run(flipped)
    assert "\n" not in str(refused.value)
    evaluate_run(mine)
    assert serialize_run(flipped).protocol == "resize28-crop24-bilinear"


def test_an_altered_network_passes_the_gate(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blurred strides, stochastic depth and the recipe around them, from the first step to every exported file."""
    monkeypatch.chdir(tmp_path)
    words = (
        *("model.blur_pool=true", "model.stochastic_depth=0.2", "optimization.ema.form=torchvision"),
        *("optimization.ema.decay=0.99", "optimization.loss=binary_cross_entropy", "evaluation.flip=false"),
        *("optimization.bce.init_head_bias=true", "optimization.schedule=linear", "optimization.optimizer=sgdw"),
    )
    mine = compose_config(
        "experiment=smoke",
        *SMALL_DEMO,
        f"data.directory={config.data.directory}",
        f"run_dir={tmp_path / 'run'}",
        "optimization.batch_size=24",
        "serialization.int8_accuracy_drop_max=0.2",  # two epochs: logits are close, and quantising swaps classes
        *words,
    )
    trained = train(mine)
    assert trained is not None
    assert set(trained.model.alterations) == {
        *("blurred_convolutions", "blur_filter", "drop_probability_of_each_block", "bias_of_the_last_layer")
    }
    evaluate_run(mine)
    exported = serialize_run(mine)
    assert [entry.variant for entry in exported.variants] == ["fp32", "fp16", "int8"]
    assert exported.variants[0].flips == 0
    path = checkpoint_files(Run(mine.run_dir).checkpoints)[-1]
    kinds = {type(module).__name__ for module in restored_model(load_checkpoint(path), path.name).modules()}
    assert {"BlurredConv2d", "DropPathBatchNorm2d"} <= kinds
    weights_given = replace(mine, evaluation=replace(mine.evaluation, weights=str(path)))
    again, own = evaluate_run(weights_given), Run(mine.run_dir).read(EvaluationRecord)
    assert again is not None
    assert own is not None
    assert (again.correct_top1, again.inputs["weights"]) == (own.correct_top1, own.inputs["weights"])


def test_the_best_checkpoint_keeps_its_name_and_its_epoch(config: Config, tmp_path: Path) -> None:
    """T11: a model selected on the reported images says so, also exported."""
    mine = fp32_only(config, tmp_path / "run")
    best = evaluate_run(replace(mine, evaluation=replace(mine.evaluation, checkpoint="best")))
    assert best is not None
    assert serialize_run(mine).protocol == "resize28-crop24-bilinear-best"
    found = evaluate_run(replace(mine, evaluation=replace(mine.evaluation, backend=Backend.onnx)))
    assert found is not None
    assert found.protocol.name == "resize28-crop24-bilinear-best-onnx-fp32"
    assert found.protocol.epochs_completed == best.protocol.epochs_completed


# ---- the classifier ---------------------------------------------------------------------------------


def test_checkpoint_and_file_agree_and_name_the_classes_of_the_evaluation(
    record: SerializationRecord, config: Config
) -> None:
    """Names off by one would give another (index, name) than the per-class table, and another share of hits."""
    from recipe.data.shards import open_split

    run = Run(config.run_dir)
    evaluation = run.read(EvaluationRecord)
    assert evaluation is not None
    names = {row.index: row.name for row in evaluation.per_class}
    loaded = [
        Classifier.load(path, apply_orientation=False)
        for path in (run.onnx_file("fp32"), run.checkpoints / evaluation.protocol.checkpoint)
    ]
    split = open_split(config.data.directory, "val")
    predictions = np.load(run.predictions / f"{record.protocol}.npz")
    for position in range(len(split)):
        exported, eager = (classifier(split.read(position)) for classifier in loaded)
        assert [guess.index for guess in exported] == predictions["top5"][position].tolist()
        assert [guess.name for guess in exported] == [names[guess.index] for guess in eager]
        assert [guess.probability for guess in exported] == pytest.approx(
            [guess.probability for guess in eager], abs=1e-5
        )


def test_an_exported_file_needs_no_code_of_networks(record: SerializationRecord, config: Config) -> None:
    program = (
        "import sys; sys.modules['recipe.models.build'] = sys.modules['recipe.training'] = None; "
        "from recipe.inference.classifier import Classifier; import numpy; "
        "print(len(Classifier.load(sys.argv[1])(numpy.zeros((40, 30, 3), numpy.uint8))))"
    )
    path = str(Run(config.run_dir).onnx_file("fp32"))
    done = subprocess.run([sys.executable, "-c", program, path], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.stdout.strip() == "5", done.stderr


def test_a_checkpoint_alone_says_which_network_it_is(config: Config) -> None:
    path = checkpoint_files(Run(config.run_dir).checkpoints)[-1]
    state = load_checkpoint(path)
    assert type(restored_model(state, path.name)).__name__ == "SmallResNet"
    assert state["interface"]["resize_pixels"] == 28


@pytest.mark.parametrize("content", [b"", b"no model", bytes(1000)])
def test_another_kind_of_file_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.onnx") as refused:
        Classifier.load(tmp_path / "x.onnx")
    assert "\n" not in str(refused.value)


# ---- timing -----------------------------------------------------------------------------------------


def test_every_cell_is_measured_and_what_cannot_run_is_listed(
    record: SerializationRecord, config: Config, tmp_path: Path
) -> None:
    from PIL import Image

    picture = tmp_path / "picture.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(picture)
    quick = compose_config(
        "timing.seconds_per_cell=0.04", "timing.batch_sizes=[1,3]", "timing.backends=[eager,onnxruntime]"
    )
    config = replace(config, timing=quick.timing)
    with start_world(config.trainer) as world:
        timing = measure_timing(Run(config.run_dir), config, world, picture)
    cells = {(cell.backend, cell.precision, cell.what, cell.batch_size) for cell in timing.cells}
    for backend, precision in (("eager", "fp32"), ("onnxruntime CPU", "fp32"), ("onnxruntime CPU", "int8")):
        assert {(backend, precision, what, size) for what in ("model", "both") for size in (1, 3)} <= cells
    assert ("torchvision's own way, eager", "fp32", "both", 1) in cells
    assert all(cell.repeats >= 4 and cell.histogram_milliseconds[0] > 0 for cell in timing.cells)
    assert timing.absent == []


@pytest.mark.parametrize(
    ("repeats", "share", "is_there"), [(9, 0.5, False), (10, 0.5, True), (499, 0.99, False), (500, 0.99, True)]
)
def test_a_percentile_needs_repeats_beyond_it(repeats: int, share: float, is_there: bool) -> None:
    assert (percentile(np.arange(repeats, dtype=float), share) is not None) == is_there
    assert REPEATS_BEYOND == 5


def test_a_machine_is_named_by_its_accelerator_or_processor() -> None:
    plain = Hardware(processor="AMD EPYC 7B13", cores=2, memory_gib=1.0)
    assert machine_name(plain) == "amd-epyc-7b13-2-cores"
    assert machine_name(msgspec.structs.replace(plain, accelerator="NVIDIA H200")) == "nvidia-h200"
