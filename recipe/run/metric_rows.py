"""Rows of metrics.jsonl: their type, reading, and missing ones."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import chain, takewhile
from typing import Annotated, BinaryIO, Literal, NamedTuple

import msgspec

from recipe.errors import UserError

LONGEST_ROW_BYTES = 10_000
BYTES_MAX = 256 * 2**20  # of a file: 700,000 rows
GAPS_SHOWN = 3
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Number = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]  # finite
SplitName = Literal["train", "validation"]


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of metrics.jsonl. Accuracies are fractions, `epoch` counts from 1, `step` counts completed steps."""

    split: SplitName  # train: since the previous row. validation: the full set, after an epoch
    epoch: Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
    step: Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
    images_seen: Count
    loss: Number
    top1_accuracy: Number
    top5_accuracy: Number
    learning_rate: Number  # of the last step
    images_per_second: Number
    data_wait_fraction: Number | None
    seconds: Number  # of training, validation included, since the run began
    stalled_fraction: Number | None = None  # of the main thread, with a GPU (`recipe.training.metric_log.StallProbe`)
    train_loss: Number | None = None  # of validation rows: these three are means over the training images of the epoch
    train_top1_accuracy: Number | None = None
    train_top5_accuracy: Number | None = None

    @property
    def place(self) -> Place:
        return Place(self.split, self.epoch, self.step)


EPOCH_FIELDS = {  # of `recipe.run.records.Epoch` -> of the validation row that ends the epoch
    "epoch": "epoch",
    "learning_rate": "learning_rate",
    "train_loss": "train_loss",
    "train_top1": "train_top1_accuracy",
    "train_top5": "train_top5_accuracy",
    "validation_loss": "loss",
    "validation_top1": "top1_accuracy",
    "validation_top5": "top5_accuracy",
}


class Place(NamedTuple):
    split: SplitName
    epoch: int
    step: int


def read_rows(lines: BinaryIO, where: str) -> Iterator[Row]:
    """The rows of an open file, without the unfinished last line of a killed run.

    Raises `UserError` with the number of the first line that is not a row. `where` is the name of the file.
    """
    for number, line in enumerate(iter(lambda: lines.readline(LONGEST_ROW_BYTES), b""), start=1):
        is_complete = line.endswith(b"\n")
        if not is_complete and len(line) < LONGEST_ROW_BYTES:
            return
        if line.strip():
            yield _parse_row(line, is_complete, f"line {number} of {where}")


def _parse_row(line: bytes, is_complete: bool, where: str) -> Row:
    try:
        if not is_complete:
            raise ValueError(f"it is longer than {LONGEST_ROW_BYTES} bytes")
        return msgspec.json.decode(line, type=Row)
    except (ValueError, RecursionError) as error:  # msgspec's own are ValueErrors too
        raise UserError(
            f"{where} is not a row of metrics ({str(error)[:200]}); put the file back from a copy, or delete the line: "
            "its row then counts as missing"
        ) from error


def planned_places(steps: int, steps_per_epoch: int, log_every_steps: int, validated_epochs: int) -> Iterator[Place]:
    """The places of all rows of the first `steps` steps, in order."""
    for epoch in range(1, (steps - 1) // steps_per_epoch + 2):
        first = (epoch - 1) * steps_per_epoch
        batches = chain(range(log_every_steps, steps_per_epoch, log_every_steps), (steps_per_epoch,))
        logged = takewhile(lambda step: step <= steps, (first + batch for batch in batches))
        yield from (Place("train", epoch, step) for step in logged)
        if epoch <= validated_epochs:
            yield Place("validation", epoch, first + steps_per_epoch)


def missing_rows(present: set[Place], planned: Iterable[Place]) -> str | None:
    """A sentence about the planned rows that are absent: "3 rows are missing from metrics.jsonl (steps 3 to 9)"."""
    count, gaps = 0, []  # (first, last) step of each gap
    is_open = False
    for place in planned:
        if place in present:
            is_open = False
            continue
        if not is_open:
            gaps.append((place.step, place.step))
        gaps[-1] = (gaps[-1][0], place.step)
        count, is_open = count + 1, True
    if not gaps:
        return None
    ranges = [f"step {first}" if first == last else f"steps {first} to {last}" for first, last in gaps[:GAPS_SHOWN]]
    more = [f"{len(gaps) - GAPS_SHOWN} more gaps"] if len(gaps) > GAPS_SHOWN else []
    rows = "1 row is" if count == 1 else f"{count:,} rows are"
    return f"{rows} missing from metrics.jsonl ({', '.join(ranges + more)})"
