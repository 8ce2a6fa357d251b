"""The figures of a document, as PNG files: equal records give equal bytes.

The background is white, for GitHub's light and dark mode. Figures are drawn without pyplot, whose state is global, and
in matplotlib's default style. The notebook shows the same bytes that the document links.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from typing import Literal, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from recipe.document.curves import Points, evenly, figure_names, points
from recipe.document.formatting import percent
from recipe.document.latency import latency_file, machine_title, single_pictures
from recipe.document.run_data import MetricRow, RunData
from recipe.run.records import (
    ClassifiedPicture,
    Latency,
    PreprocessingRecord,
    SeedsRecord,
    TimingRecord,
    TrainingRecord,
)

SIZE_INCHES = (7.2, 3.4)
DOTS_PER_INCH = 100
TRAIN, VALIDATION, OTHER = "#0b6e99", "#d1495b", "#6b7280"
LOGGED_DOTS = 40  # few enough to leave the schedule visible
WITH_THOUSANDS, PLAIN_NUMBER = "{x:,.0f}", "{x:g}"
BARS_MAX = 40  # classes
THUMBNAIL_INCHES = (2.6, 2.6)
SHEET_COLUMNS = 4
COLORS = (TRAIN, VALIDATION, "#e9a23b", "#6b7280", "#7b5ea7", "#3b8f5a", "#a0522d")
CLASS_NAME_LETTERS = 28  # on an axis


def draw(facts: RunData) -> dict[str, bytes]:
    """File name -> PNG of every figure that the records give."""
    drawers: dict[str, Callable[[Figure], None]] = {}
    training, metrics = facts.training, facts.metrics
    if facts.preprocessing is not None:
        drawers["images_per_class"] = partial(draw_images_per_class, data=facts.preprocessing)
    if training is not None:
        drawers["accuracy"] = partial(draw_accuracy, training=training, seeds=facts.seeds)
        drawers["loss"] = partial(draw_loss, training=training, metrics=metrics)
        drawers["learning_rate"] = partial(draw_learning_rate, training=training, metrics=metrics)
        drawers["throughput"] = partial(draw_throughput, metrics=metrics)
    if facts.inference is not None and facts.inference.pictures:
        drawers["guesses"] = partial(_draw_guesses, picture=facts.inference.pictures[0])
    drawn = {f"{name}.png": png(drawers[name]) for name in figure_names(facts)}
    return drawn | {latency_file(record): latency_png(record) for record in facts.timing if single_pictures(record)}


def png(drawer: Callable[[Figure], None], size_inches: tuple[float, float] = SIZE_INCHES) -> bytes:
    with style.context("default"):
        figure = Figure(figsize=size_inches, dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        drawer(figure)
        content = BytesIO()
        figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def guesses_png(picture: ClassifiedPicture) -> bytes:
    """The best classes of a picture as bars, one color for each file of the model."""
    return png(partial(_draw_guesses, picture=picture))


def latency_png(record: TimingRecord) -> bytes:
    """The cumulative distribution of latencies of single pictures, preprocessing included."""
    return png(partial(_draw_latency, record=record))


def thumbnail_png(pixels: NDArray[np.uint8]) -> bytes:
    """A small picture of uint8 pixels [3, H, W]."""
    return png(lambda figure: show_pixels(figure.add_subplot(), pixels), THUMBNAIL_INCHES)


class Tile(NamedTuple):
    """A picture of a sheet with two lines above it."""

    pixels: NDArray[np.uint8]  # [3, H, W]
    name: str
    below: str  # second line
    is_wrong: bool = False


def sheet_png(tiles: Sequence[Tile]) -> bytes:
    """Pictures in rows of four."""
    rows = -(-len(tiles) // SHEET_COLUMNS)
    return png(partial(_draw_sheet, tiles=tiles, rows=rows), (7.2, 2.1 * rows))


def draw_images_per_class(figure: Figure, data: PreprocessingRecord) -> None:
    """A bar for each of a few classes in their order, else a curve over the sorted classes."""
    axes = tidy(figure.add_subplot(), "class index", "images")
    for color, (name, split) in zip(COLORS, data.splits.items(), strict=False):
        counts = split.images_per_class
        if len(counts) > BARS_MAX:
            axes.set_xlabel("classes, from the most images to the fewest")
            axes.plot(sorted(counts, reverse=True), color=color, label=name)
        else:
            axes.bar(range(len(counts)), counts, color=color, label=name, width=0.8 if color == COLORS[0] else 0.5)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(WITH_THOUSANDS)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes, "lower right")


def draw_accuracy(figure: Figure, training: TrainingRecord, seeds: SeedsRecord | None) -> None:
    axes = tidy(figure.add_subplot(), "epoch", "accuracy (%)")
    train, top1, top5 = (
        [(epoch.epoch, 100 * getattr(epoch, name)) for epoch in training.epochs]
        for name in ("train_top1", "validation_top1", "validation_top5")
    )
    if seeds is not None and len(seeds.runs) > 1:
        least, most = (
            [100 * end(values) for values in zip(*(run.epochs["validation_top1"] for run in seeds.runs), strict=False)]
            for end in (min, max)
        )
        label = f"validation top-1 of {len(seeds.runs)} seeds, lowest to highest"
        axes.fill_between(range(1, len(least) + 1), least, most, color=VALIDATION, alpha=0.25, linewidth=0, label=label)
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
    # A row counts completed steps. Its rate is that of the last one, whose number, from 0, is one less.
    logged = [(step - 1, rate) for step, rate in points(metrics, "train", "step", "learning_rate")]
    line(axes, evenly(logged, LOGGED_DOTS), VALIDATION, "logged while training", "o")
    axes.xaxis.set_major_formatter(WITH_THOUSANDS)
    axes.set_ylim(bottom=0)
    legend(axes)


def draw_throughput(figure: Figure, metrics: Sequence[MetricRow]) -> None:
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
    """Distributions side by side, on a logarithmic axis that ends after the slowest call but one in ten."""
    axes = tidy(figure.add_subplot(), "milliseconds for one picture, preprocessing included", "calls (%)")
    cells = single_pictures(record)
    for number, cell in enumerate(cells):
        shares = np.linspace(0, 100, len(cell.histogram_milliseconds))
        label = f"{cell.backend}, {cell.precision}"
        axes.plot(cell.histogram_milliseconds, shares, color=COLORS[number % len(COLORS)], label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(PLAIN_NUMBER)
    axes.xaxis.set_minor_formatter(PLAIN_NUMBER if _decades(cells) < 1.5 else "")
    axes.tick_params(axis="x", which="both", labelsize=9)
    axes.set_ylim(0, 100)
    axes.set_title(machine_title(record), fontsize=10)
    figure.legend(loc="outside right center", fontsize=8).get_frame().set_linewidth(0)


def _decades(cells: Sequence[Latency]) -> float:
    values = [value for cell in cells for value in cell.histogram_milliseconds if value > 0]
    return float(np.log10(max(values) / min(values))) if values else 0.0


def show_pixels(axes: Axes, pixels: NDArray[np.uint8]) -> None:
    axes.imshow(pixels.transpose(1, 2, 0))
    axes.set_axis_off()


def _draw_sheet(figure: Figure, tiles: Sequence[Tile], rows: int) -> None:
    for number, tile in enumerate(tiles, start=1):
        axes = figure.add_subplot(rows, SHEET_COLUMNS, number)
        show_pixels(axes, tile.pixels)
        title = "\n".join(fitting(words, 22) for words in (tile.name, tile.below) if words)
        axes.set_title(title, fontsize=8, color=VALIDATION if tile.is_wrong else "black")


def fitting(name: str, letters: int = CLASS_NAME_LETTERS) -> str:
    """A class name of at most so many letters. Dollars are escaped, since matplotlib reads them as mathematics."""
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
