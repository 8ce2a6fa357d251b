"""The dynamics as pictures: light PNG files with equal bytes for equal inputs.

Numbers are kept beside them (metrics.jsonl), since a picture resolves a third of a point of accuracy at best. The
background is white, so that they read in GitHub's light and dark mode. Figures are drawn without pyplot, whose
state is global, and under matplotlib's default style, whatever the user's own style is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from typing import Literal

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from recipe.document.curves import MetricRow, Points, evenly, figure_names, points
from recipe.document.formatting import percent
from recipe.records import TrainingRecord

SIZE_INCHES = (7.2, 3.4)
DOTS_PER_INCH = 100
TRAIN, VALIDATION, OTHER = "#0b6e99", "#d1495b", "#6b7280"
LOGGED_DOTS = 40  # few enough to see the schedule beneath them
WITH_THOUSANDS = "{x:,.0f}"


def draw(training: TrainingRecord | None, metrics: Sequence[MetricRow]) -> dict[str, bytes]:
    """File name -> PNG, for every figure that has something to show."""
    if training is None:
        return {}
    return {
        f"{name}.png": png(partial(DRAWERS[name], training=training, metrics=metrics))
        for name in figure_names(training, metrics)
    }


def png(drawer: Callable[[Figure], None], size_inches: tuple[float, float] = SIZE_INCHES) -> bytes:
    """What `drawer` draws, as a file's bytes."""
    with style.context("default"):
        figure = Figure(figsize=size_inches, dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        drawer(figure)
        content = BytesIO()
        figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


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


def scaled(pairs: Points, factor: float) -> Points:
    return [(x, factor * y) for x, y in pairs]


def line(axes: Axes, pairs: Points, color: str, label: str, form: str) -> None:
    """One labelled series; nothing where there is nothing to show."""
    if pairs:
        axes.plot(*zip(*pairs, strict=True), form, color=color, label=label, linewidth=1.4, markersize=3.5)


def legend(axes: Axes, place: Literal["best", "lower right"] = "best") -> None:
    """A legend, where there is a series to name."""
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
