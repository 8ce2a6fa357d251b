"""The figures of a document, as PNG files: equal records give equal bytes.

The background is white, for GitHub's light and dark mode. Figures are drawn without pyplot, whose state is global, and
in matplotlib's default style. The notebook shows the same bytes that the document links.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from typing import Literal

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from recipe.document.curves import MetricRow, Points, evenly, figure_names, points
from recipe.document.formatting import percent
from recipe.document.latency import latency_file, machine_title, single_pictures
from recipe.run.records import ClassifiedPicture, InferenceRecord, TimingRecord, TrainingRecord

SIZE_INCHES = (7.2, 3.4)
DOTS_PER_INCH = 100
TRAIN, VALIDATION, OTHER = "#0b6e99", "#d1495b", "#6b7280"
LOGGED_DOTS = 40  # few enough to leave the schedule visible
WITH_THOUSANDS = "{x:,.0f}"
THUMBNAIL_INCHES = (2.6, 2.6)
SHEET_COLUMNS = 4
COLORS = (TRAIN, VALIDATION, "#e9a23b", "#6b7280", "#7b5ea7", "#3b8f5a", "#a0522d")
CLASS_NAME_LETTERS = 28  # on an axis


def draw(training: TrainingRecord | None, metrics: Sequence[MetricRow]) -> dict[str, bytes]:
    """File name -> PNG of the training dynamics, for every figure that has data."""
    if training is None:
        return {}
    return {
        f"{name}.png": png(partial(DRAWERS[name], training=training, metrics=metrics))
        for name in figure_names(training, metrics)
    }


def png(drawer: Callable[[Figure], None], size_inches: tuple[float, float] = SIZE_INCHES) -> bytes:
    with style.context("default"):
        figure = Figure(figsize=size_inches, dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        drawer(figure)
        content = BytesIO()
        figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def draw_inference(inference: InferenceRecord | None, timing: Sequence[TimingRecord]) -> dict[str, bytes]:
    """File name -> PNG of the latencies of each machine, and of the first picture's classes."""
    drawn = {latency_file(record): latency_png(record) for record in timing if single_pictures(record)}
    if inference is not None and inference.pictures:
        drawn["guesses.png"] = guesses_png(inference.pictures[0])
    return drawn


def guesses_png(picture: ClassifiedPicture) -> bytes:
    """The best classes of a picture as bars, one color for each file of the model."""
    return png(partial(_draw_guesses, picture=picture))


def latency_png(record: TimingRecord) -> bytes:
    """The cumulative distribution of latencies of single pictures, preprocessing included."""
    return png(partial(_draw_latency, record=record))


def thumbnail_png(pixels: NDArray[np.uint8]) -> bytes:
    """A small picture of uint8 pixels [3, H, W]."""
    return png(lambda figure: show_pixels(figure.add_subplot(), pixels), THUMBNAIL_INCHES)


def sheet_png(pictures: Sequence[ClassifiedPicture], pixels: Sequence[NDArray[np.uint8]]) -> bytes:
    """Pictures of the data set, each with its class and the model's first guess."""
    rows = -(-len(pictures) // SHEET_COLUMNS)
    return png(partial(_draw_sheet, pictures=pictures, pixels=pixels, rows=rows), (7.2, 2.1 * rows))


def draw_accuracy(figure: Figure, training: TrainingRecord, metrics: Sequence[MetricRow]) -> None:
    axes = tidy(figure.add_subplot(), "epoch", "accuracy (%)")
    train, top1, top5 = (
        [(epoch.epoch, 100 * getattr(epoch, name)) for epoch in training.epochs]
        for name in ("train_top1", "validation_top1", "validation_top5")
    )
    line(axes, train, TRAIN, "train top-1 (augmented images, mean of the epoch)", "o-")
    line(axes, top1, VALIDATION, "validation top-1", "o-")
    line(axes, top5, VALIDATION, "validation top-5", "--")
    result = percent(top1[-1][1] / 100)
    axes.annotate(result, top1[-1], (0, 6), textcoords="offset points", ha="right", color=VALIDATION)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes)


def draw_loss(figure: Figure, training: TrainingRecord, metrics: Sequence[MetricRow]) -> None:
    axes = tidy(figure.add_subplot(), "epoch", "loss (nats)")
    steps_per_epoch = training.schedule.steps_per_epoch
    train = [(step / steps_per_epoch, loss) for step, loss in points(metrics, "train", "step", "loss")]
    line(axes, train, TRAIN, "train, as optimised", "-")
    line(axes, points(metrics, "validation", "epoch", "loss"), VALIDATION, "validation", "o-")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes)


def draw_learning_rate(figure: Figure, training: TrainingRecord, metrics: Sequence[MetricRow]) -> None:
    axes = tidy(figure.add_subplot(), "optimizer step", "learning rate")
    line(axes, list(training.schedule.points), TRAIN, "schedule, evaluated", "-")
    # A row counts completed steps and holds the rate of the last of them, whose number, from 0, is one less.
    logged = [(step - 1, rate) for step, rate in points(metrics, "train", "step", "learning_rate")]
    line(axes, evenly(logged, LOGGED_DOTS), VALIDATION, "logged while training", "o")
    axes.xaxis.set_major_formatter(WITH_THOUSANDS)
    axes.set_ylim(bottom=0)
    legend(axes)


def draw_throughput(figure: Figure, training: TrainingRecord, metrics: Sequence[MetricRow]) -> None:
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    tidy(upper, "", "images / s")
    line(upper, points(metrics, "train", "step", "images_per_second"), TRAIN, "training throughput", ".-")
    upper.set_ylim(bottom=0, top=1.15 * max(y for _, y in points(metrics, "train", "step", "images_per_second")))
    legend(upper, "lower right")
    upper.yaxis.set_major_formatter(WITH_THOUSANDS)
    tidy(lower, "optimizer step", "waiting (%)")
    lower.xaxis.set_major_formatter(WITH_THOUSANDS)
    line(lower, scaled(points(metrics, "train", "step", "data_wait_fraction"), 100), OTHER, "waiting for data", ".-")
    lower.set_ylim(0, 100)
    legend(lower)


def _draw_guesses(figure: Figure, picture: ClassifiedPicture) -> None:
    axes = tidy(figure.add_subplot(), "probability", "")
    best = next(iter(picture.guesses.values()))
    height = 0.8 / len(picture.guesses)
    for number, (file, guesses) in enumerate(picture.guesses.items()):
        by_class = {guess.index: guess.probability for guess in guesses}
        places = [place + number * height for place in range(len(best))]
        axes.barh(
            places,
            [by_class.get(guess.index, 0.0) for guess in best],
            height,
            color=COLORS[number % len(COLORS)],
            label=file,
        )
    middle = 0.4 - height / 2
    axes.set_yticks([place + middle for place in range(len(best))], [fitting(guess.name) for guess in best])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title(f"{picture.picture}: the best {len(best)} classes", fontsize=10)
    legend(axes, "lower right")


def _draw_latency(figure: Figure, record: TimingRecord) -> None:
    axes = tidy(figure.add_subplot(), "milliseconds for one picture, preprocessing included", "calls (%)")
    cells = single_pictures(record)
    for number, cell in enumerate(cells):
        shares = np.linspace(0, 100, len(cell.histogram_milliseconds))
        label = f"{cell.backend}, {cell.precision}"
        axes.plot(cell.histogram_milliseconds, shares, color=COLORS[number % len(COLORS)], label=label)
    axes.set_xlim(0, 1.6 * max(np.quantile(cell.histogram_milliseconds, 0.9) for cell in cells))
    axes.set_ylim(0, 100)
    axes.set_title(machine_title(record), fontsize=10)
    legend(axes, "lower right")


def show_pixels(axes: Axes, pixels: NDArray[np.uint8]) -> None:
    axes.imshow(pixels.transpose(1, 2, 0))
    axes.set_axis_off()


def _draw_sheet(
    figure: Figure, pictures: Sequence[ClassifiedPicture], pixels: Sequence[NDArray[np.uint8]], rows: int
) -> None:
    for number, (picture, image) in enumerate(zip(pictures, pixels, strict=True), start=1):
        axes = figure.add_subplot(rows, SHEET_COLUMNS, number)
        show_pixels(axes, image)
        guess = next(iter(picture.guesses.values()))[0]
        axes.set_title(
            f"{fitting(picture.label or '?', 22)}\n→ {fitting(guess.name, 18)}, {guess.probability:.0%}",
            fontsize=8,
            color="black" if guess.name == picture.label else VALIDATION,
        )


def fitting(name: str, letters: int = CLASS_NAME_LETTERS) -> str:
    """A class name of at most so many letters; dollars are escaped, since matplotlib reads them as mathematics."""
    name = name.replace("$", r"\$")
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def scaled(pairs: Points, factor: float) -> Points:
    return [(x, factor * y) for x, y in pairs]


def line(axes: Axes, pairs: Points, color: str, label: str, form: str) -> None:
    """Plot one labelled series, unless it is empty."""
    if pairs:
        axes.plot(*zip(*pairs, strict=True), form, color=color, label=label, linewidth=1.4, markersize=3.5)


def legend(axes: Axes, place: Literal["best", "lower right"] = "best") -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=place).get_frame().set_linewidth(0)


def tidy(axes: Axes, x_label: str, y_label: str) -> Axes:
    """Axis labels with their units, a light grid, no box."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


DRAWERS = {
    "accuracy": draw_accuracy,
    "loss": draw_loss,
    "learning_rate": draw_learning_rate,
    "throughput": draw_throughput,
}
