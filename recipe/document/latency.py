"""The table of latencies: measured on each machine, and published for a V100.

Published figures are of ResNet-50 at 224 pixels and printed for that model only, with their source. They were measured
in other ways (means instead of medians, no preprocessing, a server in between), as the row says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recipe.run.records import BOTH, MODEL, Latency, TimingRecord

NVIDIA = "NVIDIA DeepLearningExamples, ResNet-50 v1.5"


@dataclass(frozen=True)
class MeasuredRow:
    """Latency of single pictures on a machine by a backend: of the model alone, and with preprocessing."""

    record: TimingRecord
    backend: str
    precision: str
    model: Latency | None
    both: Latency | None

    @property
    def repeats(self) -> str:
        return ", ".join(f"{cell.repeats:,}" for cell in (self.model, self.both) if cell is not None)


@dataclass(frozen=True)
class PublishedRow:
    """A published latency of one picture, in milliseconds, in the source's statistics."""

    hardware: str
    backend: str
    precision: str
    model: str | None
    both: str | None  # preprocessing included
    source: str


@dataclass(frozen=True)
class Verdict:
    """The fastest backends from a picture's bytes to the answer, and the reference of the same run."""

    record: TimingRecord
    reference_milliseconds: float
    fastest_fp32: Latency | None
    fastest: Latency | None


PUBLISHED = (
    PublishedRow(
        "V100 16 GB", "PyTorch, eager", "fp32", "mean 10.37, p95 10.81, p99 11.73", None, f"{NVIDIA} for PyTorch"
    ),
    PublishedRow(
        "V100 16 GB", "PyTorch, eager", "AMP", "mean 12.78, p95 13.27, p99 14.36", None, f"{NVIDIA} for PyTorch"
    ),
    PublishedRow("V100 16 GB", "MXNet", "fp16", "mean 3.48, p95 3.68, p99 3.86", None, f"{NVIDIA} for MXNet"),
    PublishedRow(
        "V100 32 GB",
        "onnxruntime with TensorRT, in a Triton server, its client included",
        "fp16",
        "mean 2.84, p95 3.05, p99 3.14",
        None,
        f"{NVIDIA} for PyTorch, Triton deployment",
    ),
    PublishedRow(
        "V100",
        "TensorFlow 1.8, session.run",
        "fp32",
        None,
        "11: mean of 20, rounded to 1 ms",
        "the example of yahoo/ml-reproducibility-guidelines, 2018",
    ),
)


def machine_title(record: TimingRecord) -> str:
    machine = record.provenance.hardware
    return machine.accelerator or f"{machine.processor}, {machine.cores} cores"


def single_pictures(record: TimingRecord) -> list[Latency]:
    return [cell for cell in record.cells if cell.what == BOTH and cell.batch_size == 1]


def measured_rows(timing: Sequence[TimingRecord]) -> list[MeasuredRow]:
    """A row for each machine, backend and precision with a batch of one, in the order of measurement."""
    rows = []
    for record in timing:
        single = {(c.backend, c.precision, c.what): c for c in record.cells if c.batch_size == 1}
        for backend, precision in dict.fromkeys((b, p) for b, p, what in single if what in (MODEL, BOTH)):
            model, both = (single.get((backend, precision, what)) for what in (MODEL, BOTH))
            rows.append(MeasuredRow(record, backend, precision, model, both))
    return rows


def published_rows(model: str) -> tuple[PublishedRow, ...]:
    return PUBLISHED if model == "resnet50" else ()


def verdicts(timing: Sequence[TimingRecord]) -> list[Verdict]:
    """A verdict for each machine on which the reference was measured."""
    compared = []
    for record in timing:
        single = [cell for cell in single_pictures(record) if cell.p50_milliseconds is not None]
        reference = next((c.p50_milliseconds for c in single if c.backend == record.reference), None)
        if reference is not None:
            ours = sorted(
                (c for c in single if c.backend != record.reference), key=lambda cell: cell.p50_milliseconds or 0.0
            )
            fp32 = next((c for c in ours if c.precision == "fp32"), None)
            compared.append(Verdict(record, reference, fp32, ours[0] if ours else None))
    return compared


def latency_file(record: TimingRecord) -> str:
    return f"latency-{record.machine}.png"
