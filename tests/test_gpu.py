"""Tests on a GPU: bf16, a compiled step, pinned batches, the energy counter, CUDA events."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode

from recipe.config.schema import Config
from recipe.data.batches import EvaluationBatches
from recipe.data.shards import open_split
from recipe.data.transforms import EvaluationTransform, Normalisation
from recipe.data.worker_pool import open_loaders
from recipe.distributed import World, memory_format, start_world
from recipe.inference.latency import milliseconds, milliseconds_on_gpu
from recipe.models.build import build_model
from recipe.run.directory import Run
from recipe.training.optim import build_loss, build_optimizer
from recipe.training.record import EnergyMeter, accelerator_joules
from recipe.training.step import TrainStep, compiled
from tests.builders.configs import compose_config
from tests.builders.records import session
from tests.builders.training import global_batch, train

pytestmark = [pytest.mark.gpu, pytest.mark.process]

GPU = World(0, 1, 0, 1, torch.device("cuda", 0), "none")
ON_GPU = ("trainer.accelerator=cuda", "trainer.gpus=1", "trainer.deterministic=false")
VIEW = EvaluationTransform(40, 32, InterpolationMode.BILINEAR)


@pytest.fixture(autouse=True)
def default_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TF32 and the deterministic mode that an earlier training in this process may have left."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_bf16_trains_and_evaluates(smoke: Callable[..., list[str]]) -> None:
    words = smoke(*ON_GPU, "trainer.precision=bf16", "trainer.channels_last=true")
    record = train(words)
    assert record.precision["autocast"] == "bf16"
    assert record.provenance.hardware.accelerator is not None
    assert record.peak_accelerator_memory_gib is not None
    assert record.peak_accelerator_memory_gib > 0
    rows = Run(compose_config(*words).run_dir).metric_rows()
    assert {row["split"] for row in rows} == {"train", "validation"}
    assert all(math.isfinite(row["loss"]) for row in rows)


def weights_after_three_steps(config: Config) -> dict[str, Tensor]:
    with start_world(config.trainer) as world:
        model = build_model(config.model, 10, 0).to(world.device, memory_format=memory_format(config.trainer))  # type: ignore[call-overload]
        step = TrainStep(
            compiled(model, config.trainer),
            build_optimizer(config.optimization, model, world.device),
            build_loss(config.optimization),
            Normalisation(config.data.mean, config.data.std, world.device),
            config.trainer,
            world,
        )
        for number in range(3):
            step([global_batch(number)], 0.05)
        assert step.take_tally()[3] == 3 * len(global_batch().labels)
        return {name: value.detach().cpu() for name, value in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_a_compiled_step_in_channels_last_equals_the_eager_one() -> None:
    eager = weights_after_three_steps(compose_config("experiment=smoke", *ON_GPU, "trainer.channels_last=false"))
    fast = weights_after_three_steps(
        compose_config("experiment=smoke", *ON_GPU, "trainer.channels_last=true", "trainer.compile=true")
    )
    assert eager.keys() == fast.keys()
    for name, value in eager.items():
        torch.testing.assert_close(
            fast[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_pinned_batches_of_workers_have_the_pixels_of_threads(data_directory: Path) -> None:
    def batches(workers: int) -> list[tuple[Tensor, Tensor]]:
        words = ["experiment=smoke", f"loader.workers={workers}", "loader.threads=2"]
        with open_loaders([open_split(data_directory, "val")], compose_config(*words).loader, GPU) as (loader,):
            found = []
            for batch in EvaluationBatches(loader, VIEW, 7, GPU):
                assert batch.images.is_pinned()
                found.append((batch.images.to(GPU.device, non_blocking=True).cpu(), batch.labels.clone()))
            return found

    threads, workers = batches(0), batches(2)
    assert len(threads) == len(workers) > 1
    for expected, found in zip(threads, workers, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_the_energy_meter_reads_the_counter() -> None:
    if accelerator_joules() is None:
        pytest.skip("the driver of this GPU has no counter of energy")
    meter = EnergyMeter(GPU)
    matrix = torch.rand(2048, 2048, device=GPU.device)
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        torch.mm(matrix, matrix)
        torch.cuda.synchronize()
    record = meter.record([session()])
    assert record is not None
    assert record.accelerators == 1
    assert record.seconds >= 2
    assert 1 < record.joules < 5_000


def test_cuda_events_time_the_kernels() -> None:
    matrix = torch.rand(4096, 4096, device=GPU.device)

    def products(count: int) -> None:
        for _ in range(count):
            torch.mm(matrix, matrix)

    products(3)
    torch.cuda.synchronize()
    measured: list[float] = []
    wall = milliseconds(lambda: measured.append(milliseconds_on_gpu(lambda: products(50))))
    assert 0 < measured[0] <= wall
    assert milliseconds_on_gpu(lambda: products(1)) < measured[0] / 5
