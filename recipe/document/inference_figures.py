"""The Inference chapter as pictures: what a model says about a picture, and how long it takes.

The notebook shows the same bytes that the document links.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from recipe.document.figures import TRAIN, VALIDATION, legend, png, tidy
from recipe.document.latency import latency_file, machine_title, single_pictures
from recipe.records import ClassifiedPicture, InferenceRecord, TimingRecord

THUMBNAIL_INCHES = (2.6, 2.6)
SHEET_COLUMNS = 4
FILE_COLOURS = (TRAIN, VALIDATION, "#e9a23b", "#6b7280", "#7b5ea7", "#3b8f5a", "#a0522d")
NAME_LETTERS = 28  # of a class, on an axis


def draw_inference(inference: InferenceRecord | None, timing: Sequence[TimingRecord]) -> dict[str, bytes]:
    """File name -> PNG, for every figure that follows from the records alone."""
    drawn = {latency_file(record): latency_png(record) for record in timing if single_pictures(record)}
    if inference is not None and inference.pictures:
        drawn["guesses.png"] = guesses_png(inference.pictures[0])
    return drawn


def guesses_png(found: ClassifiedPicture) -> bytes:
    """The best classes of a picture as bars, one colour for each file of the model."""
    return png(partial(_draw_guesses, found=found))


def latency_png(record: TimingRecord) -> bytes:
    """For single pictures, preprocessing included: the share of calls that took at most so long."""
    return png(partial(_draw_latency, record=record))


def thumbnail_png(pixels: NDArray[np.uint8]) -> bytes:
    """A picture, uint8 [3, H, W], small."""
    return png(partial(_draw_thumbnail, pixels=pixels), THUMBNAIL_INCHES)


def sheet_png(found: Sequence[ClassifiedPicture], pixels: Sequence[NDArray[np.uint8]]) -> bytes:
    """Pictures of the data set, each with its class and the model's first guess."""
    rows = -(-len(found) // SHEET_COLUMNS)
    return png(partial(_draw_sheet, found=found, pixels=pixels, rows=rows), (7.2, 2.1 * rows))


def _draw_guesses(figure: Figure, found: ClassifiedPicture) -> None:
    axes = tidy(figure.add_subplot(), "probability", "")
    best = next(iter(found.guesses.values()))
    height = 0.8 / len(found.guesses)
    for number, (file, guesses) in enumerate(found.guesses.items()):
        by_class = {guess.index: guess.probability for guess in guesses}
        places = [place + number * height for place in range(len(best))]
        axes.barh(
            places,
            [by_class.get(guess.index, 0.0) for guess in best],
            height,
            color=FILE_COLOURS[number % len(FILE_COLOURS)],
            label=file,
        )
    middle = 0.4 - height / 2
    axes.set_yticks([place + middle for place in range(len(best))], [shortened(guess.name) for guess in best])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title(f"{found.picture}: the best {len(best)} classes", fontsize=10)
    legend(axes, "lower right")


def _draw_latency(figure: Figure, record: TimingRecord) -> None:
    axes = tidy(figure.add_subplot(), "milliseconds for one picture, preprocessing included", "calls (%)")
    cells = single_pictures(record)
    for number, cell in enumerate(cells):
        shares = np.linspace(0, 100, len(cell.histogram_milliseconds))
        label = f"{cell.backend}, {cell.precision}"
        axes.plot(cell.histogram_milliseconds, shares, color=FILE_COLOURS[number % len(FILE_COLOURS)], label=label)
    axes.set_xlim(0, 1.6 * max(np.quantile(cell.histogram_milliseconds, 0.9) for cell in cells))
    axes.set_ylim(0, 100)
    axes.set_title(machine_title(record), fontsize=10)
    legend(axes, "lower right")


def _draw_thumbnail(figure: Figure, pixels: NDArray[np.uint8]) -> None:
    axes = figure.add_subplot()
    axes.imshow(pixels.transpose(1, 2, 0))
    axes.set_axis_off()


def _draw_sheet(
    figure: Figure, found: Sequence[ClassifiedPicture], pixels: Sequence[NDArray[np.uint8]], rows: int
) -> None:
    for number, (picture, image) in enumerate(zip(found, pixels, strict=True), start=1):
        axes = figure.add_subplot(rows, SHEET_COLUMNS, number)
        axes.imshow(image.transpose(1, 2, 0))
        axes.set_axis_off()
        guess = next(iter(picture.guesses.values()))[0]
        is_right = guess.name == picture.label
        axes.set_title(
            f"{shortened(picture.label or '?', 22)}\n→ {shortened(guess.name, 18)}, {guess.probability:.0%}",
            fontsize=8,
            color="black" if is_right else VALIDATION,
        )


def shortened(name: str, letters: int = NAME_LETTERS) -> str:
    """A class name that fits beside its bar; matplotlib would take dollars for mathematics."""
    name = name.replace("$", r"\$")
    return name if len(name) <= letters else f"{name[: letters - 1]}…"
