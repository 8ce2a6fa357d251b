"""Latencies of pictures on this machine, with their distribution.

Three things are timed for each batch size: preprocessing (from a file's bytes to pixels), the model (from pixels to
logits), and both together. The model is the eager network, the compiled one, and every provider of onnxruntime. Cells
are visited in rounds, so that a machine that slows down slows all of them down. Each cell is measured as two
interleaved halves: their difference is noise, and a smaller difference between cells means nothing.
"""

from __future__ import annotations

import copy
import hashlib
import io
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image
from torch import Tensor, nn

from recipe.config.identity import to_dict
from recipe.config.schema import Config, Precision, TimedBackend, Variant
from recipe.data.transforms import Normalisation
from recipe.distributed import World, arithmetic_switches, device_versions, hardware_of
from recipe.errors import UserError
from recipe.evaluation import Predict, predictor
from recipe.inference.classifier import Classifier
from recipe.inference.export import Evaluated, load_evaluated
from recipe.inference.onnx_file import OnnxModel, read_onnx
from recipe.run.directory import Run
from recipe.run.files import display_path, redact_paths
from recipe.run.progress import ProgressPrinter
from recipe.run.provenance import Stage
from recipe.run.records import BOTH, MODEL, PREPROCESSING, Absent, Hardware, Latency, Setting, TimingRecord

TIMING_ROUNDS = 4  # two halves, alternating: the same quantity, measured twice
WARMUP_CALLS = 3
REPEATS_BEYOND = 5  # a percentile needs so many repeats beyond it
QUANTILES = 51  # kept for the figure
NO_PROVIDERS = ("AzureExecutionProvider",)  # a remote service, not hardware
REFERENCE = "torchvision's own way, eager"
CLOCKS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu", "pstate")


@dataclass
class Cell:
    """One entry of the table: a callable and the duration of each call."""

    backend: str
    precision: str
    what: str
    batch_size: int
    call: Callable[[], object]
    on_gpu: bool = False
    rounds: list[list[float]] = field(default_factory=list)  # milliseconds

    def measure(self, seconds: float) -> None:
        times: list[float] = []
        until = time.perf_counter() + seconds
        while not times or time.perf_counter() < until:
            times.append(milliseconds_on_gpu(self.call) if self.on_gpu else milliseconds(self.call))
        self.rounds.append(times)

    def latency(self) -> Latency:
        every = np.array([value for times in self.rounds for value in times])
        median = float(np.median(every))
        return Latency(
            backend=self.backend,
            precision=self.precision,
            what=self.what,
            batch_size=self.batch_size,
            repeats=len(every),
            p50_milliseconds=percentile(every, 0.50),
            p90_milliseconds=percentile(every, 0.90),
            p99_milliseconds=percentile(every, 0.99),
            images_per_second=round(1000 * self.batch_size / median, 2),
            noise=round(self.noise(), 4),
            histogram_milliseconds=[round(float(v), 4) for v in np.quantile(every, np.linspace(0, 1, QUANTILES))],
        )

    def noise(self) -> float:
        """The relative difference between the medians of alternate rounds."""
        even, odd = (statistics.median(value for times in self.rounds[start::2] for value in times) for start in (0, 1))
        return abs(even - odd) / min(even, odd)


def percentile(values: np.ndarray, share: float) -> float | None:
    """None with fewer than five values beyond it, since one outlier would decide it."""
    if len(values) * (1 - share) < REPEATS_BEYOND - 1e-9:
        return None
    return round(float(np.quantile(values, share)), 4)


def milliseconds(call: Callable[[], object]) -> float:
    """Wall time of a call that returns its result on the host."""
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def milliseconds_on_gpu(call: Callable[[], object]) -> float:
    """Time between CUDA events around a call, the device idle before and after."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


# ---- what is measured -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """The input of all cells: a run's evaluated network and exported files, and one picture."""

    run: Run
    config: Config
    world: World
    checkpoint: Evaluated
    model: nn.Module  # on this process's device
    classifier: Classifier  # for its preprocessing
    content: bytes  # of the picture's file
    absent: list[Absent] = field(default_factory=list)

    def pixels(self, batch_size: int) -> Tensor:
        """A batch of the picture, preprocessed from the file's bytes one after the other: uint8 [N, 3, H, W]."""
        return torch.stack([self.classifier.pixels(self.content) for _ in range(batch_size)])


def measure_timing(run: Run, config: Config, world: World, picture: Path, command: str | None = None) -> TimingRecord:
    """Measure every cell that runs on this machine. The others are recorded with their reason.

    `command` repeats the measurement if the command line of this process does not.
    """
    print("preparing the measurement of latencies", file=sys.stderr, flush=True)
    stage = Stage(run.directory, command)
    bench = _bench(run, config, world, picture)
    cells = _warmed_up(list(_cells(bench)), bench.absent)
    with ProgressPrinter("measuring latency", TIMING_ROUNDS * len(cells), "cells") as progress:
        for _ in range(TIMING_ROUNDS):
            for cell in cells:
                cell.measure(config.timing.seconds_per_cell / TIMING_ROUNDS)
                progress.add(1)
    return timing_record(bench, stage, cells, picture)


def _bench(run: Run, config: Config, world: World, picture: Path) -> Bench:
    checkpoint = load_evaluated(run)
    classifier = Classifier(lambda images: images, checkpoint.interface, checkpoint.where)
    layout = torch.channels_last if world.device.type == "cuda" else torch.contiguous_format
    model = checkpoint.model.to(world.device, memory_format=layout)  # type: ignore[call-overload]
    return Bench(run, config, world, checkpoint, model, classifier, picture.read_bytes())


def _cells(bench: Bench) -> Iterator[Cell]:
    """Preprocessing, then every backend, then the reference: the code that torchvision's users write."""
    for size in bench.config.timing.batch_sizes:
        yield Cell("Pillow, torchvision", "uint8", PREPROCESSING, size, lambda size=size: bench.pixels(size))  # type: ignore[misc]
    wanted = bench.config.timing.backends
    if TimedBackend.eager in wanted:
        for precision in _precisions(bench):
            yield from _pair(bench, "eager", precision.value, _eager(bench, bench.model, precision))
    if TimedBackend.compiled in wanted:
        yield from _compiled(bench)
    if TimedBackend.onnxruntime in wanted:
        yield from _onnxruntime(bench)
    yield Cell(REFERENCE, "fp32", BOTH, 1, _torchvisions_own_way(bench))


def _precisions(bench: Bench) -> list[Precision]:
    """fp32, and on a GPU the faster half precision."""
    if bench.world.device.type == "cpu":
        return [Precision.fp32]
    has_bf16 = torch.cuda.get_device_capability(bench.world.device) >= (8, 0)
    return [Precision.fp32, Precision.bf16 if has_bf16 else Precision.fp16]


def _eager(bench: Bench, model: nn.Module, precision: Precision) -> Predict:
    device = bench.world.device
    normalisation = Normalisation(bench.checkpoint.interface.mean, bench.checkpoint.interface.std, device)
    predict = predictor(model, normalisation, precision, device, channels_last=device.type == "cuda")
    return predict if device.type == "cpu" else lambda images: predict(images).cpu()


def _pair(
    bench: Bench, backend: str, precision: str, predict: Predict, sizes: list[int] | None = None
) -> Iterator[Cell]:
    """The model alone, and with preprocessing, for every batch size."""
    on_gpu = bench.world.device.type == "cuda" and "onnxruntime" not in backend
    for size in sizes if sizes is not None else bench.config.timing.batch_sizes:
        ready = bench.pixels(size)
        yield Cell(backend, precision, MODEL, size, lambda ready=ready: predict(ready), on_gpu)  # type: ignore[misc]
        yield Cell(backend, precision, BOTH, size, lambda size=size: predict(bench.pixels(size)))  # type: ignore[misc]


def _compiled(bench: Bench) -> Iterator[Cell]:
    """torch.compile, on a GPU with CUDA graphs. Every batch size is compiled again, so there are few."""
    mode = "reduce-overhead" if bench.world.device.type == "cuda" else "default"
    for precision in _precisions(bench):
        model: nn.Module = torch.compile(bench.model, dynamic=False, mode=mode)  # type: ignore[assignment]
        sizes = bench.config.timing.compiled_batch_sizes
        yield from _pair(bench, "compiled", precision.value, _eager(bench, model, precision), sizes)


def _onnxruntime(bench: Bench) -> Iterator[Cell]:
    """Every exported file on every provider of this onnxruntime."""
    providers = [name for name in onnxruntime.get_available_providers() if name not in NO_PROVIDERS]
    for variant in Variant:
        path = bench.run.onnx_file(variant.value)
        if not path.exists():
            here = display_path(bench.run.directory)
            missing = f"{path.name} is not there: `python serialize.py run_dir={here}` makes it"
            bench.absent.append(Absent(backend=f"onnxruntime, {variant.value}", reason=missing))
            continue
        for provider in providers:
            yield from _provider_cells(bench, path, provider, variant.value)


def _provider_cells(bench: Bench, path: Path, provider: str, variant: str) -> Iterator[Cell]:
    backend = f"onnxruntime {provider.removesuffix('ExecutionProvider')}"
    try:
        model = OnnxModel(read_onnx(path, path.name), path.name, provider, torch.get_num_threads())
    except UserError as error:
        bench.absent.append(Absent(backend=f"{backend}, {variant}", reason=str(error)))
        return
    if model.provider != provider:
        bench.absent.append(
            Absent(backend=f"{backend}, {variant}", reason="onnxruntime lists this provider but fell back to another")
        )
        return
    if model.metadata.weights_sha256 != bench.checkpoint.weights_sha256:
        bench.absent.append(Absent(backend=f"{backend}, {variant}", reason=f"{path.name} is of other weights"))
        return
    yield from _pair(bench, backend, variant, model)


def _torchvisions_own_way(bench: Bench) -> Callable[[], Tensor]:
    """The code of torchvision's users: Pillow, the preset of `ResNet50_Weights`, the eager network, one picture."""
    from torchvision.transforms._presets import ImageClassification

    preset = ImageClassification(
        crop_size=bench.checkpoint.interface.crop_pixels,
        resize_size=bench.checkpoint.interface.resize_pixels,
        mean=tuple(bench.checkpoint.interface.mean),
        std=tuple(bench.checkpoint.interface.std),
    )
    device = bench.world.device
    model = copy.deepcopy(bench.model).to(memory_format=torch.contiguous_format)

    def classify() -> Tensor:
        with torch.inference_mode(), Image.open(io.BytesIO(bench.content)) as image:
            logits: Tensor = model(preset(image.convert("RGB"))[None].to(device)).softmax(1).cpu()
        return logits

    return classify


def _warmed_up(cells: list[Cell], absent: list[Absent]) -> list[Cell]:
    """The cells that run, after a few untimed calls: caches, cuDNN's choice, compilation."""
    ready = []
    with ProgressPrinter("warming up and compiling", len(cells), "cells") as progress:
        for cell in cells:
            if reason := _reason_not_to_run(cell):
                named = f"{cell.backend}, {cell.precision}, {cell.what}, batch {cell.batch_size}"
                absent.append(Absent(backend=named, reason=reason))
            else:
                ready.append(cell)
            progress.add(1)
    return ready


def _reason_not_to_run(cell: Cell) -> str | None:
    try:
        for _ in range(WARMUP_CALLS):
            cell.call()
    except Exception as error:  # a compiler that is missing, a provider without its libraries: anything can come
        return redact_paths(" ".join(str(error).split()) or type(error).__name__)[:300]
    return None


# ---- the record -------------------------------------------------------------------------------------


def timing_record(bench: Bench, stage: Stage, cells: list[Cell], picture: Path) -> TimingRecord:
    machine = hardware_of(bench.world)
    latencies = [cell.latency() for cell in cells]
    with Image.open(picture) as image:
        size = list(image.size)
    return TimingRecord(
        config_sha256=bench.checkpoint.training.config_sha256,
        settings=to_dict(bench.config.timing),
        provenance=stage.finish(machine, {"onnxruntime": onnxruntime.__version__} | device_versions(bench.world)),
        inputs={"weights": bench.checkpoint.weights_sha256, **_file_hashes(bench)},
        machine=machine_name(machine),
        threads=torch.get_num_threads(),
        image=picture.name,
        image_sha256=hashlib.sha256(bench.content).hexdigest(),
        image_pixels=size,
        crop_pixels=bench.checkpoint.interface.crop_pixels,
        arithmetic=arithmetic_switches(),
        clock=clock_facts(bench.world),
        noise_floor=round(statistics.median(latency.noise for latency in latencies), 4),
        reference=REFERENCE,
        cells=latencies,
        absent=bench.absent,
    )


def _file_hashes(bench: Bench) -> dict[str, str]:
    paths = [path for variant in Variant if (path := bench.run.onnx_file(variant.value)).exists()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def machine_name(machine: Hardware) -> str:
    """A file name for a kind of machine: the accelerator, or the processor with its usable cores."""
    name = machine.accelerator or f"{machine.processor} {machine.cores} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:64] or "unknown"


def clock_facts(world: World) -> dict[str, Setting]:
    """Driver, clocks and power of a GPU, or the clock of a processor core."""
    if world.device.type == "cuda":
        return gpu_clock_facts(world.local_rank)
    found = re.search(r"^cpu MHz\s*:\s*([\d.]+)", _text_of(Path("/proc/cpuinfo")), re.MULTILINE)
    return {"processor_mhz_at_the_end": round(float(found[1]))} if found else {}


def gpu_clock_facts(index: int) -> dict[str, Setting]:
    """From nvidia-smi. Empty if it is missing or fails."""
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(CLOCKS, (word.strip() for word in done.stdout.split(",")), strict=False))


def _text_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
