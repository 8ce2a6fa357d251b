"""What a recipe would take on GPUs of a measured kind: python -m recipe project experiment=NAME --step FILE

Nothing is measured here and nothing is guessed: every factor comes from a file that `benchmarks/step.py` or
`benchmarks/loading.py` left, and a recipe whose step is not the one that was measured is refused. The answer is a
section with the arithmetic line by line; `--run` adds it to the document of a run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import msgspec

from recipe.config.compose import config_from_overrides
from recipe.config.identity import flatten
from recipe.config.schema import Config, Expectation
from recipe.data.imagenet import IMAGES
from recipe.data.loading import derive_layout
from recipe.data.shards import read_manifest
from recipe.document.arithmetic import projected_again
from recipe.document.render import check_document, projection_page, write_document
from recipe.errors import UserError
from recipe.provenance import Stage, machine, shown_argument
from recipe.records import MeasuredEvaluation, MeasuredLoading, MeasuredStep, Projected, ProjectionRecord
from recipe.run import Run, recorded_path, shown_path

Found = TypeVar("Found")
OURS = "this project"
LOADER = "ours-processes"  # of benchmarks/loading.py: the default beside a GPU
KINDS = {"original": "original files", "small": "re-encoded to short side 256"}
LOADING_PIXELS = 224  # that benchmarks/loading.py crops to
# What a step costs follows from these; of all else that shapes a step, benchmarks/step.py takes the defaults.
STEP_KEYS = (
    *("model.name", "model.norm", "model.blur_pool", "model.stochastic_depth"),
    *("optimization.optimizer", "optimization.loss", "optimization.averaging.decay"),
    *("augmentation.erasing.probability", "augmentation.mixing.mixup_alpha", "augmentation.mixing.cutmix_alpha"),
    *("trainer.channels_last", "trainer.deterministic"),
)


@dataclass(frozen=True)
class Measurement:
    """A file of benchmarks/, read."""

    path: Path
    values: dict[str, Any]
    sha256: str

    @property
    def name(self) -> str:
        return recorded_path(self.path)


def describe(parser: argparse.ArgumentParser) -> None:
    """The command line of this verb."""
    parser.description = "What a recipe would take on GPUs of a measured kind: a projection, with its arithmetic."
    parser.add_argument("words", nargs="*", metavar="key=value", help="as for train.py; the reference by default")
    parser.add_argument("--step", nargs="+", type=Path, required=True, metavar="FILE", help="of benchmarks/step.py")
    parser.add_argument("--loading", type=Path, metavar="FILE", help="of benchmarks/loading.py, on the same machine")
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8], help="how many; 1 and 8 by default")
    parser.add_argument("--dollars-per-gpu-hour", type=float, metavar="X", help="a price; without one there is no cost")
    parser.add_argument("--run", metavar="RUN", help="add it to the document of this run")


def answer(arguments: argparse.Namespace) -> int:
    """Print the section, or add it to a run's document."""
    config = config_from_overrides(arguments.words)
    if arguments.run is None:
        with TemporaryDirectory() as nowhere:  # where the patch of a modified tree would go
            print(projection_page(projection(config, arguments, Stage(Path(nowhere)))))
        return 0
    run = Run(arguments.run)
    if not run.records.is_dir():
        raise UserError(f"--run {arguments.run} holds no run")
    check_document(run)
    run.write(projection(config, arguments, Stage(run.directory, retyped(arguments))))
    write_document(run, recorded_path(run.directory))
    print(f"wrote {shown_path(run.document)}")
    return 0


def retyped(arguments: argparse.Namespace) -> str:
    """The command, which is this process's own only where it was typed."""
    words = [*arguments.words, "--step", *map(str, arguments.step)]
    words += ["--loading", str(arguments.loading)] if arguments.loading else []
    words += ["--gpus", *map(str, arguments.gpus)]
    price = arguments.dollars_per_gpu_hour
    words += ["--dollars-per-gpu-hour", f"{price:g}"] if price is not None else []
    return " ".join(["python -m recipe project", *map(shown_argument, [*words, "--run", arguments.run])])


def projection(config: Config, arguments: argparse.Namespace, stage: Stage) -> ProjectionRecord:
    """The record; raises `UserError` where a measurement is not of this recipe's step."""
    require_plain_numbers(arguments)
    refuse_other_steps(config)
    files = [measurement(path, "contestants") for path in arguments.step]
    steps = [step for file in files for step in read(file, partial(measured_steps, config))]
    if not steps:
        raise UserError(why_none(config, files))
    kinds = sorted({step.accelerator for step in steps})
    if len(kinds) > 1:
        raise UserError(f"--step: the files are of different machines ({', '.join(kinds)}): give those of one")
    loading = [measurement(arguments.loading, "kinds")] if arguments.loading else []
    loaders = [found for file in loading for found in read(file, partial(measured_loading, config, files[0]))]
    evaluations = [found for file in files for found in read(file, partial(measured_evaluations, config))]
    train_images, validation_images, source = image_counts(config)
    record = ProjectionRecord(
        config_sha256=config.pinned.config_sha256,
        provenance=stage.finish(machine()),
        inputs={file.name: file.sha256 for file in [*files, *loading]},
        name=config.name,
        settings=[word for word in arguments.words if not word.startswith(("experiment=", "run_dir="))],
        train_images=train_images,
        validation_images=validation_images,
        images_from=source,
        epochs=config.optimization.epochs,
        batch_size=config.optimization.batch_size,
        steps=steps,
        evaluation=next(iter(evaluations), None),
        loading=next(iter(loaders), None),
        dollars_per_accelerator_hour=arguments.dollars_per_gpu_hour,
        rows=[wanted(config, count) for count in dict.fromkeys(arguments.gpus)],
    )
    return with_rows(record)


def wanted(config: Config, accelerators: int) -> Projected:
    """A row before its arithmetic."""
    layout = derive_layout(config.optimization, config.trainer, accelerators)
    return Projected(
        accelerators=accelerators,
        images_per_forward=layout.images_per_forward,
        step=0,
        training_seconds=0.0,
        validation_seconds=None,
        accelerator_hours=0.0,
        dollars=None,
        loader_images_per_second=0.0,
        loader_cores=None,
    )


def with_rows(record: ProjectionRecord) -> ProjectionRecord:
    return msgspec.structs.replace(record, rows=projected_again(record))


def require_plain_numbers(arguments: argparse.Namespace) -> None:
    price = arguments.dollars_per_gpu_hour
    if price is not None and not (math.isfinite(price) and price > 0):
        raise UserError(f"--dollars-per-gpu-hour {price} cannot be: it must be a number above 0")
    for count in arguments.gpus:
        if count < 1:
            raise UserError(f"--gpus {count} cannot be: it must be 1 or more")


# ---- the recipe -------------------------------------------------------------------------------------


def refuse_other_steps(config: Config) -> None:
    """Stop for a recipe whose step is not the plain one that benchmarks/step.py makes."""
    if config.augmentation.progressive.first_pixels is not None:
        raise UserError(
            f"{config.name} changes the size of its images from epoch to epoch "
            f"(augmentation.progressive.first_pixels={config.augmentation.progressive.first_pixels}), and a step was "
            "measured at one size only: it is not projected"
        )
    here, plain = flatten(config.pinned.values), flatten(config_from_overrides([]).pinned.values)
    for key in STEP_KEYS:
        if here[key] != plain[key]:
            raise UserError(
                f"{key}={here[key]} of {config.name} makes another step than benchmarks/step.py measures "
                f"({key}={plain[key]}): it is not projected"
            )


def image_counts(config: Config) -> tuple[int, int, str]:
    """Training and validation images, and where these numbers are from."""
    if config.data.expect is Expectation.ilsvrc2012:
        return IMAGES["train"], IMAGES["val"], "published, ILSVRC2012 (arXiv 1409.0575)"
    splits = read_manifest(config.data.directory).splits
    return splits["train"].images, splits["val"].images, f"the manifest of the data set {config.data.name}"


def step_name(config: Config) -> str:
    """The contestant of benchmarks/step.py that steps as this configuration does."""
    trainer = config.trainer
    graphs = ", CUDA graphs" if trainer.cuda_graphs else ""
    return f"{OURS}, compiled{graphs}" if trainer.compile else f"{OURS}, eager"


# ---- the measurements -------------------------------------------------------------------------------


def measurement(path: Path, must_hold: str) -> Measurement:
    """Read a file of benchmarks/results/."""
    try:
        content = path.read_bytes()
        values = json.loads(content)
    except (OSError, ValueError) as error:
        raise UserError(f"{shown_path(path)} cannot be read as a measurement: {error}") from error
    if not isinstance(values, dict) or must_hold not in values:
        raise UserError(f"{shown_path(path)} is no measurement of that kind: it has no {must_hold!r}")
    return Measurement(path, values, hashlib.sha256(content).hexdigest())


def read(file: Measurement, look: Callable[[Measurement], Iterable[Found]]) -> list[Found]:
    """What is in a file; raises `UserError` where it is not as the benchmarks write it."""
    try:
        return list(look(file))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__} {error}"
        raise UserError(f"{file.name} is not as benchmarks/ writes such files: {what}") from error


def measured_steps(config: Config, file: Measurement) -> Iterator[MeasuredStep]:
    """The steps of a file that this recipe makes, one for each batch."""
    values, arguments = file.values, file.values["arguments"]
    if (arguments["pixels"], arguments["precision"]) != (
        config.augmentation.crop_pixels,
        config.trainer.precision.value,
    ):
        return
    by_batch: dict[str, Any] = values.get("batches") or {str(arguments["batch"]): values["contestants"]}
    for batch, contestants in by_batch.items():
        for contestant in contestants:
            speeds = contestant["images_per_second"]
            if contestant["name"] == step_name(config) and speeds:
                yield MeasuredStep(
                    file=file.name,
                    sha256=file.sha256,
                    accelerator=device_of(file),
                    measured=values["time"],
                    commit=values["commit"] or "unknown",
                    tree=values["tree"],
                    torch=values["versions"]["torch"],
                    step=contestant["name"],
                    precision=arguments["precision"],
                    pixels=arguments["pixels"],
                    batch_size=int(batch),
                    images_per_second=statistics.median(speeds),
                    least=min(speeds),
                    most=max(speeds),
                )


def device_of(file: Measurement) -> str:
    """What the step ran on: an accelerator, or a processor, which is said."""
    hardware = file.values["hardware"]
    return str(hardware["accelerator"] or f"{hardware['processor']}, {hardware['cores']} cores, no GPU")


def why_none(config: Config, files: Sequence[Measurement]) -> str:
    """What was measured, what is needed, and the command that measures it."""
    found = ", ".join(
        f"{file.values['arguments']['pixels']} pixels in {file.values['arguments']['precision']}" for file in files
    )
    pixels, precision = config.augmentation.crop_pixels, config.trainer.precision.value
    return (
        f"{config.name} trains at {pixels} pixels in {precision} ({step_name(config)}), and the step was measured at "
        f"{found}: measure it with `python benchmarks/step.py --pixels {pixels} --precision {precision}`"
    )


def measured_evaluations(config: Config, file: Measurement) -> Iterator[MeasuredEvaluation]:
    """The forward pass at this recipe's evaluation size, where one was measured; two views are not one."""
    found = file.values.get("evaluation")
    if found and found["pixels"] == config.evaluation.crop_pixels and not config.evaluation.flip:
        yield MeasuredEvaluation(
            file=file.name,
            pixels=found["pixels"],
            batch_size=found["batch"],
            images_per_second=statistics.median(found["images_per_second"]),
        )


def measured_loading(config: Config, step: Measurement, loading: Measurement) -> Iterator[MeasuredLoading]:
    """This project's loader, on the machine of the step; raises `UserError` for one of another machine."""
    machines = [(file["processor"], file["cores"]) for file in (loading.values, step.values["hardware"])]
    if machines[0] != machines[1]:
        told = " and ".join(f"{cores} cores of {processor}" for processor, cores in machines)
        raise UserError(f"--loading {loading.name}: loader and step were measured on different machines ({told})")
    kind = "original" if config.data.resize_short_side is None else "small"
    rows = [row for row in loading.values["kinds"][kind] if row["peer"] == LOADER and not row["absent"]]
    if not rows:
        raise UserError(f"--loading {loading.name} has no measurement of this project on {KINDS[kind]}")
    yield MeasuredLoading(
        file=loading.name,
        sha256=loading.sha256,
        measured=loading.values["date"],
        processor=loading.values["processor"],
        cores=loading.values["cores"],
        loader="this project, processes",
        images=KINDS[kind],
        pixels=LOADING_PIXELS,
        images_per_second=rows[0]["median"],
    )
