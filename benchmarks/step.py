"""Images per second of a training step of ResNet-50, beside its peers: python benchmarks/step.py

A step is forward, loss, backward and update on synthetic images that lie on the device already, so that no loader is
measured. Peers are written after their own training scripts: torchvision's reference as shipped (fp16 autocast with a
gradient scaler, contiguous, the loss fetched at every step) and in bf16 channels-last; timm's, eager and compiled. A
peer that is not installed is listed as absent. All take turns in each round, so that a machine that slows down slows
all of them down; what is printed is the median over rounds with the smallest and the largest.

Two floors stand beside them: the arithmetic of the step at the measured rate of a matrix product, and one write and one
read of everything that the backward pass needs at the measured bandwidth of a copy.

`--batches 128 512` measures other batches too and says which is the best of each contestant; `--evaluation-pixels 224`
adds the forward pass of an evaluation; `--profile` says which kernels the time of our own steps goes to. It runs on a
CPU at a small size, to see that it works; the file of such a table says `cpu` in its name:

    python benchmarks/step.py --batch 4 --batches 2 8 --pixels 64 --rounds 2 --steps 1 --precision fp32 --profile
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet50

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from recipe.config.compose import to_config  # noqa: E402
from recipe.config.schema import Config  # noqa: E402
from recipe.data.batches import Batch  # noqa: E402
from recipe.data.transforms import Normalisation  # noqa: E402
from recipe.distributed import World, arithmetic_switches, device_versions, hardware_of, memory_format, start_world  # noqa: E402
from recipe.evaluation import predictor  # noqa: E402
from recipe.inference.latency import clock_facts, machine_name  # noqa: E402
from recipe.models.build import build_model  # noqa: E402
from recipe.run.environment import shown_argument, versions  # noqa: E402
from recipe.run.files import write_atomically  # noqa: E402
from recipe.run.provenance import commit, tree_state  # noqa: E402
from recipe.run.records import now  # noqa: E402
from recipe.training.optim import build_loss, build_optimizer  # noqa: E402
from recipe.training.step import TrainStep, compiled  # noqa: E402

RESULTS = CHECKOUT / "benchmarks" / "results"
CLASSES = 1000
MATRIX = 8192  # side of the matrices of the measured rate
COPY_BYTES = 2**31
OURS = "this project"
PROFILED_STEPS = 3
RANGES = ("Optimizer.", "Torch-Compiled", "CompiledFunction", "ProfilerStep", "## ")
# Kernels by their names, and operators where there are no kernels (on a CPU); the first group that fits. A kernel that
# the compiler fused is named after all that is in it, and counts as normalisation where that is among it.
KERNELS = {
    "normalisation, with what is fused to it": r"batch_norm|bn_fw|bn_bw|batchnorm",
    "optimizer": r"multi_tensor|fused_sgd|_foreach|sgd",
    "convolution and matrix products": r"conv(?!ert)|xmma|implicit|wgrad|dgrad|gemm|cutlass|addmm|aten::mm|nvjet",
    "pooling": r"pool",
    "loss and accuracy": r"softmax|nll|topk|sort|cross_entropy",
    "copies and layouts": r"memcpy|memset|copy|nchwtonhwc|nhwctonchw|transpose",
    "elementwise": r"elementwise|triton_poi|relu|threshold|aten::(add|mul|sub|div|fill|zero)",
    "reductions": r"reduce|triton_(red|per)|aten::(sum|mean)",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Contestant:
    """One way to make a step, and how fast it was in each round."""

    name: str
    settings: str
    step: Callable[[], object] | None
    images_per_second: list[float] = field(default_factory=list)
    warmup_seconds: float = 0.0
    absent: str = ""


@dataclass
class Results:
    """What was measured: contestants by batch, and beside them what is ours alone."""

    by_batch: dict[int, list[Contestant]]
    floors: dict[str, float]
    evaluation: dict[str, Any] | None = None
    profile: dict[str, dict[str, float]] = field(default_factory=dict)  # contestant -> group -> milliseconds of a step


def main() -> None:
    """Measure, print the table with the ratios last, and write it to benchmarks/results/."""
    arguments = parsed()
    words = [f"trainer.precision={arguments.precision}", "trainer.gpus=null"]
    with initialize_config_dir(version_base="1.3", config_dir=str(CHECKOUT / "conf")):
        config = to_config(compose("config", words))
    with start_world(config.trainer) as world:
        sizes = dict.fromkeys([*arguments.batches, arguments.batch])  # the table's own batch last: it is profiled
        by_batch = {size: contest(config, world, at_batch(arguments, size)) for size in sizes}
        results = Results(by_batch, measured_floors(config, world, arguments))
        if arguments.evaluation_pixels:
            results.evaluation = evaluation_pass(config, world, arguments)
        if arguments.profile:
            results.profile = profiles(by_batch[arguments.batch], world)
        report(results, world, arguments)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[], help="others, in which the best one is looked for"
    )
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--steps", type=int, default=20, help="in one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp16", "fp32"], help="of this project")
    parser.add_argument("--only", nargs="*", default=[], help="words that a contestant's name has to hold, any of them")
    parser.add_argument("--evaluation-pixels", type=int, default=0, help="also the forward pass of an evaluation")
    parser.add_argument("--profile", action="store_true", help="also which kernels our own steps spend their time in")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.main_batch = arguments.batch
    return arguments


def at_batch(arguments: argparse.Namespace, batch: int) -> argparse.Namespace:
    return argparse.Namespace(**vars(arguments) | {"batch": batch})


def contest(config: Config, world: World, arguments: argparse.Namespace) -> list[Contestant]:
    """All contestants at one batch; what they held is free afterwards but for the last one's, which may be profiled."""
    torch.compiler.reset()  # else the second batch would be compiled for any size, which is slower
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    contestants = build(config, world, arguments)
    warm_up(contestants, world)
    measure(contestants, world, arguments)
    if arguments.batch != arguments.main_batch:
        for contestant in contestants:
            contestant.step = None
    return contestants


# ---- the contestants --------------------------------------------------------------------------------


def build(config: Config, world: World, arguments: argparse.Namespace) -> list[Contestant]:
    """Each on a network of its own; built one after the other, all kept."""
    made: list[tuple[str, str, Callable[[], Callable[[], object]]]] = [
        (f"{OURS}, eager", f"{arguments.precision}, channels-last", lambda: ours(config, world, arguments, False)),
        (f"{OURS}, compiled", f"{arguments.precision}, channels-last", lambda: ours(config, world, arguments, True)),
        *cuda_graphs(config, world, arguments),
        ("torchvision, as shipped", "fp16 autocast, contiguous", lambda: torchvisions(world, arguments, False)),
        ("torchvision, best", "bf16 autocast, channels-last", lambda: torchvisions(world, arguments, True)),
        ("timm, eager", "bf16 autocast, channels-last", lambda: timms(world, arguments, False)),
        ("timm, compiled", "bf16 autocast, channels-last", lambda: timms(world, arguments, True)),
    ]
    contestants = []
    for name, settings, make in made:
        if arguments.only and not any(word in name for word in arguments.only):
            continue
        try:
            contestants.append(Contestant(name, settings, make()))
        except ImportError as error:
            contestants.append(Contestant(name, settings, None, absent=str(error)))
    return contestants


def cuda_graphs(
    config: Config, world: World, arguments: argparse.Namespace
) -> list[tuple[str, str, Callable[[], Callable[[], object]]]]:
    """The compiled step as one graph, where the device knows such graphs."""
    if world.device.type != "cuda":
        return []
    settings = f"{arguments.precision}, channels-last"
    return [(f"{OURS}, compiled, CUDA graphs", settings, lambda: ours(config, world, arguments, True, True))]


def ours(
    config: Config, world: World, arguments: argparse.Namespace, is_compiled: bool, has_graphs: bool = False
) -> Callable[[], object]:
    """The pipeline's own step, from its own parts, on uint8 images as the loader hands them over."""
    config = replace(config, trainer=replace(config.trainer, compile=is_compiled, cuda_graphs=has_graphs))
    model = build_model(config.model, CLASSES, config.seed).to(world.device)
    model = model.to(memory_format=memory_format(config.trainer))  # type: ignore[call-overload]
    optimizer = build_optimizer(config.optimization, model, world.device)
    stepped = compiled(model, config.trainer)
    normalisation = Normalisation(config.data.mean, config.data.std, world.device)
    train_step = TrainStep(stepped, optimizer, build_loss(config.optimization), normalisation, config.trainer, world)
    images = torch.randint(0, 256, shape(arguments), dtype=torch.uint8, device=world.device)
    batch = Batch(images, labels(world, arguments), torch.arange(arguments.batch))
    return lambda: train_step([batch], 0.1)


def torchvisions(world: World, arguments: argparse.Namespace, is_best: bool) -> Callable[[], object]:
    """After `train_one_epoch` of its references/classification: two metrics and the loss are fetched at every step."""
    device, layout = world.device, torch.channels_last if is_best else torch.contiguous_format
    model = resnet50().to(device, memory_format=layout).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    loss_of = nn.CrossEntropyLoss()
    dtype = torch.bfloat16 if is_best or device.type == "cpu" else torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    images = torch.randn(shape(arguments), device=device).to(memory_format=layout)
    target = labels(world, arguments)

    def step() -> None:
        with torch.autocast(device.type, dtype):
            output = model(images)
            loss = loss_of(output, target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        top5 = output.topk(5, 1).indices.t().eq(target[None])
        loss.item(), top5[:1].sum().item(), top5.sum().item()

    return step


def timms(world: World, arguments: argparse.Namespace, is_compiled: bool) -> Callable[[], object]:
    """After `train_one_epoch` of its train.py, `--amp --amp-dtype bfloat16 --channels-last`."""
    import timm
    from timm.optim import create_optimizer_v2

    device = world.device
    model = timm.create_model("resnet50", num_classes=CLASSES).to(device, memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=2e-5, momentum=0.9)
    stepped = torch.compile(model) if is_compiled else model
    loss_of = nn.CrossEntropyLoss()
    images = torch.randn(shape(arguments), device=device).to(memory_format=torch.channels_last)
    target = labels(world, arguments)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(stepped(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def shape(arguments: argparse.Namespace) -> tuple[int, int, int, int]:
    return arguments.batch, 3, arguments.pixels, arguments.pixels


def labels(world: World, arguments: argparse.Namespace) -> Tensor:
    return torch.randint(0, CLASSES, (arguments.batch,), device=world.device)


# ---- measuring --------------------------------------------------------------------------------------


def warm_up(contestants: list[Contestant], world: World) -> None:
    """Compilation and cuDNN's choice; a contestant that fails is listed."""
    for contestant in contestants:
        if contestant.step is None:
            continue
        started = time.perf_counter()
        try:
            for _ in range(3):
                contestant.step()
            synchronise(world)
        except Exception as error:  # out of memory, no compiler: the others go on
            contestant.step, contestant.absent = None, " ".join(str(error).split())[:200]
        contestant.warmup_seconds = round(time.perf_counter() - started, 1)
        print(f"{contestant.name}: ready after {contestant.warmup_seconds} s {contestant.absent}", flush=True)
        gc.collect()


def measure(contestants: list[Contestant], world: World, arguments: argparse.Namespace) -> None:
    """Rounds in which everybody takes a turn."""
    for _ in range(arguments.rounds):
        for contestant in contestants:
            if contestant.step is not None:
                seconds = timed(contestant.step, arguments.steps, world)
                contestant.images_per_second.append(arguments.batch * arguments.steps / seconds)


def timed(call: Callable[[], object], repeats: int, world: World) -> float:
    """Seconds from an idle device to an idle device: CUDA events on a GPU, the clock on a CPU."""
    call()
    synchronise(world)
    if world.device.type == "cpu":
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def synchronise(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def measured_floors(config: Config, world: World, arguments: argparse.Namespace) -> dict[str, float]:
    """What no step can undercut on this machine without doing less, in milliseconds, and what they follow from."""
    flops, saved_bytes = counted(config, world, arguments)
    rate, bandwidth = matrix_rate(world, arguments), copy_bandwidth(world)
    return {
        "flops_per_step": flops,
        "saved_bytes_per_step": saved_bytes,
        "matrix_flops_per_second": rate,
        "copy_bytes_per_second": bandwidth,
        "arithmetic_floor_milliseconds": 1000 * flops / rate,
        "memory_floor_milliseconds": 1000 * 2 * saved_bytes / bandwidth,
    }


def counted(config: Config, world: World, arguments: argparse.Namespace) -> tuple[float, float]:
    """FLOPs of a step and bytes that its backward pass needs, counted on two images and scaled to the batch."""
    few = argparse.Namespace(**vars(arguments) | {"batch": 2})
    step, seen = ours(config, world, few, False), set[int]()
    total = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        if tensor.shape[:1] == (2,) and tensor.data_ptr() not in seen:  # activations; weights do not grow with it
            seen.add(tensor.data_ptr())
            total += tensor.numel() * tensor.element_size()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        step()
    return counter.get_total_flops() * arguments.batch / 2, total * arguments.batch / 2


def matrix_rate(world: World, arguments: argparse.Namespace) -> float:
    """FLOP/s of a large product of random matrices, in this project's precision."""
    size = MATRIX if world.device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=world.device).to(DTYPES[arguments.precision]) for _ in range(2))
    for _ in range(3):
        a @ b
    return 10 * 2 * size**3 / timed(lambda: a @ b, 10, world)


def copy_bandwidth(world: World) -> float:
    """Bytes read and written a second by a copy on the device."""
    count = COPY_BYTES if world.device.type == "cuda" else 2**26
    source = torch.zeros(count, dtype=torch.uint8, device=world.device)
    target = torch.empty_like(source)
    return 10 * 2 * count / timed(lambda: target.copy_(source), 10, world)


def evaluation_pass(config: Config, world: World, arguments: argparse.Namespace) -> dict[str, Any]:
    """Images per second of what an evaluation computes, from uint8 on the device to logits there; eager, as it runs."""
    size = (arguments.batch, 3, arguments.evaluation_pixels, arguments.evaluation_pixels)
    model = build_model(config.model, CLASSES, config.seed).to(world.device)
    model = model.to(memory_format=memory_format(config.trainer))  # type: ignore[call-overload]
    normalisation = Normalisation(config.data.mean, config.data.std, world.device)
    trainer = config.trainer
    predict = predictor(model, normalisation, trainer.precision, world.device, trainer.channels_last)
    images = torch.randint(0, 256, size, dtype=torch.uint8, device=world.device)
    for _ in range(3):
        predict(images)
    seconds = [timed(lambda: predict(images), arguments.steps, world) for _ in range(arguments.rounds)]
    speeds = [round(arguments.batch * arguments.steps / value, 1) for value in seconds]
    return {"pixels": arguments.evaluation_pixels, "batch": arguments.batch, "images_per_second": speeds}


# ---- the profile ------------------------------------------------------------------------------------


def profiles(contestants: list[Contestant], world: World) -> dict[str, dict[str, float]]:
    """Of each step of ours that runs."""
    return {c.name: profiled(c.step, world) for c in contestants if c.step is not None and c.name.startswith(OURS)}


def profiled(step: Callable[[], object], world: World) -> dict[str, float]:
    """Milliseconds of one step by group of kernels, on a CPU by group of operators, largest first."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = world.device.type == "cuda"
    step()
    synchronise(world)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        for _ in range(PROFILED_STEPS):
            step()
        synchronise(world)
    groups: dict[str, float] = {}
    for event in found.key_averages():
        is_kernel = event.device_type != torch.autograd.DeviceType.CPU
        is_range = getattr(event, "is_user_annotation", False) or event.key.startswith(RANGES)  # of other kernels' time
        if is_kernel == on_gpu and not is_range:
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            group = kernel_group(event.key)
            groups[group] = groups.get(group, 0.0) + microseconds / 1000 / PROFILED_STEPS
    return {name: round(value, 3) for name, value in sorted(groups.items(), key=lambda pair: -pair[1])}


def kernel_group(name: str) -> str:
    """The first group whose pattern the name of a kernel or an operator holds."""
    return next((group for group, pattern in KERNELS.items() if re.search(pattern, name.lower())), "other")


# ---- the report -------------------------------------------------------------------------------------


def report(results: Results, world: World, arguments: argparse.Namespace) -> None:
    """The table as text and as JSON, by machine."""
    machine = hardware_of(world)
    device = "cpu-" if world.device.type == "cpu" else ""
    name = f"step-{device}{machine_name(machine)}-{arguments.batch}x{arguments.pixels}"
    with TemporaryDirectory() as nowhere:  # where the patch of a modified tree would go
        tree = tree_state(Path(nowhere)).state
    facts: dict[str, Any] = {
        "command": " ".join(["python benchmarks/step.py", *map(shown_argument, sys.argv[1:])]),
        "time": now(),
        "commit": commit(),
        "tree": tree,
        "hardware": msgspec.to_builtins(machine),
        "versions": versions() | device_versions(world),
        "arithmetic": arithmetic_switches(),
        "clock": clock_facts(world),
        "arguments": {key: value for key, value in vars(arguments).items() if key not in ("results", "main_batch")},
        "floors": results.floors,
        "contestants": [as_json(contestant) for contestant in results.by_batch[arguments.batch]],
        "batches": {str(size): [as_json(one) for one in found] for size, found in results.by_batch.items()},
        "evaluation": results.evaluation,
        "profile": results.profile,
    }
    text = table(results, facts)
    print(text)
    write_atomically(arguments.results / f"{name}.json", json.dumps(facts, indent=2).encode() + b"\n")
    write_atomically(arguments.results / f"{name}.md", text.encode() + b"\n")


def as_json(contestant: Contestant) -> dict[str, Any]:
    """A contestant without what it calls."""
    return {
        "name": contestant.name,
        "settings": contestant.settings,
        "images_per_second": [round(value, 1) for value in contestant.images_per_second],
        "warmup_seconds": contestant.warmup_seconds,
        "absent": contestant.absent,
    }


def table(results: Results, facts: dict[str, Any]) -> str:
    """Rows, floors, and the ratios last."""
    batch, pixels = facts["arguments"]["batch"], facts["arguments"]["pixels"]
    contestants = results.by_batch[batch]
    machine, used = facts["hardware"], facts["versions"]
    on_cpu = "" if machine["accelerator"] else " **A CPU: these speeds say nothing of a GPU.**"
    return "\n".join(
        [
            f"# A training step of ResNet-50, batch {batch}, {pixels} pixels",
            "",
            f"{machine['accelerator'] or machine['processor']}, torch {used['torch']}, {facts['clock']}; "
            f"{facts['time']}, commit {facts['commit']} ({facts['tree']}).{on_cpu}",
            "",
            "| Step | Arithmetic | Images/s, median | smallest to largest | ms | Share of the larger floor |",
            "|:--|:--|--:|--:|--:|--:|",
            *(row(contestant, results.floors, batch) for contestant in contestants),
            "",
            *floor_lines(results.floors),
            *best_batch_lines(results.by_batch),
            *evaluation_lines(results.evaluation),
            *profile_lines(results.profile),
            *ratio_lines([contestant for contestant in contestants if contestant.images_per_second]),
        ]
    )


def best_batch_lines(by_batch: dict[int, list[Contestant]]) -> list[str]:
    """Median images per second of every contestant at every batch, its best one in bold."""
    if len(by_batch) < 2:
        return []
    sizes = sorted(by_batch)
    lines = [
        "| Images/s, median | " + " | ".join(f"batch {size}" for size in sizes) + " | Best batch |",
        "|:--|" + "--:|" * (len(sizes) + 1),
    ]
    for name in [contestant.name for contestant in by_batch[sizes[0]]]:
        found = {size: one for size in sizes for one in by_batch[size] if one.name == name}
        medians = {
            size: statistics.median(one.images_per_second) for size, one in found.items() if one.images_per_second
        }
        best = max(medians, key=lambda size: medians[size], default=None)
        cells = [shown_speed(medians.get(size), is_best=size == best) for size in sizes]
        lines.append(f"| {name} | {' | '.join(cells)} | {best or '–'} |")
    return [*lines, ""]


def shown_speed(speed: float | None, is_best: bool) -> str:
    text = "absent" if speed is None else f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"
    return f"**{text}**" if is_best else text


def evaluation_lines(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    speeds = found["images_per_second"]
    return [
        f"The forward pass of an evaluation at {found['pixels']} pixels, batch {found['batch']}, data on the device: "
        f"{statistics.median(speeds):,.1f} images/s ({min(speeds):,.1f} to {max(speeds):,.1f}).",
        "",
    ]


def profile_lines(profile: dict[str, dict[str, float]]) -> list[str]:
    """The share of each group; what is not kernel time (the device waiting) is not in it."""
    lines: list[str] = []
    for name, groups in profile.items():
        total = sum(groups.values()) or 1.0
        lines += [f"| {name}: where its time goes | ms a step | share |", "|:--|--:|--:|"]
        lines += [f"| {group} | {value:.2f} | {value / total:.0%} |" for group, value in groups.items()]
        lines.append("")
    return lines


def row(contestant: Contestant, floors: dict[str, float], batch: int) -> str:
    speeds = contestant.images_per_second
    if not speeds:
        return f"| {contestant.name} | {contestant.settings} | absent: {contestant.absent} | | | |"
    milliseconds = 1000 * batch / statistics.median(speeds)
    floor = max(floors["arithmetic_floor_milliseconds"], floors["memory_floor_milliseconds"])
    return (
        f"| {contestant.name} | {contestant.settings} | {statistics.median(speeds):,.0f} | "
        f"{min(speeds):,.0f} to {max(speeds):,.0f} | {milliseconds:.2f} | {floor / milliseconds:.0%} |"
    )


def floor_lines(floors: dict[str, float]) -> list[str]:
    arithmetic, memory = floors["arithmetic_floor_milliseconds"], floors["memory_floor_milliseconds"]
    tflop, rate = floors["flops_per_step"] / 1e12, floors["matrix_flops_per_second"] / 1e12
    gigabytes, bandwidth = floors["saved_bytes_per_step"] / 1e9, floors["copy_bytes_per_second"] / 1e12
    return [
        f"Arithmetic floor: {arithmetic:.2f} ms, {tflop:.3f} TFLOP at {rate:.1f} TFLOP/s.",
        f"Memory floor: {memory:.2f} ms, {gigabytes:.2f} GB written and read at {bandwidth:.3f} TB/s.",
        "",
    ]


def ratio_lines(there: list[Contestant]) -> list[str]:
    """The faster of ours over each peer, round by round."""
    mine = [contestant for contestant in there if contestant.name.startswith(OURS)]
    if not mine:
        return []
    best = max(mine, key=lambda contestant: statistics.median(contestant.images_per_second))
    lines = []
    for peer in there:
        if peer not in mine:
            ratios = [a / b for a, b in zip(best.images_per_second, peer.images_per_second, strict=True)]
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
            lines.append(f"{best.name} / {peer.name}: {statistics.median(ratios):.3f} ({spread})")
    return lines


if __name__ == "__main__":
    main()
