"""The report of `watch`: the verdict on a run beside its reference, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from recipe.document.formatting import on_one_line
from recipe.review.watch.reference import Watched, check_same_data, check_same_settings, phases_of, same_run
from recipe.review.watch.statistics import (
    ALPHA,
    ON_TRACK,
    POWER,
    WATCHED_METRICS,
    Band,
    Deviation,
    Judgement,
    Numbers,
    Seeds,
    judge,
)
from recipe.run.records import SeedsRecord


@dataclass(frozen=True)
class Watch:
    """A reference, and the family-wise error for judging runs by it."""

    reference: SeedsRecord
    alpha: float = ALPHA

    def judge(self, watched: Watched) -> Judgement:
        """The verdict. Raises `UserError` if the run is of another recipe or other data."""
        check_same_settings(self.reference, watched.config, watched.steps_per_epoch, watched.name)
        check_same_data(self.reference, watched)
        phases = phases_of(self.reference)
        seeds = {
            name: np.array([seed.epochs[name] for seed in self.reference.runs], np.float64) for name in WATCHED_METRICS
        }
        run = {name: by_epoch(watched.seed.epochs, name, len(phases)) for name in WATCHED_METRICS}
        judgement = judge(Seeds(seeds, phases), run, self.alpha)
        for seed in self.reference.runs:
            if same_run(seed, watched.seed):
                reason = f"every value so far is that of reference seed {seed.seed}, digit by digit"
                return Judgement(ON_TRACK, reason, judgement.epoch, judgement.comparisons, judgement.bands)
        return judgement


def by_epoch(columns: Mapping[str, Sequence[Any]], name: str, epochs: int) -> Numbers:
    """A column of a run as an array over all epochs, NaN for missing values."""
    values = np.full(epochs, np.nan)
    for epoch, value in zip(columns.get("epoch", []), columns.get(name, []), strict=True):
        values[epoch - 1] = np.nan if value is None else value
    return values


def as_text(watch: Watch, watched: Watched, judgement: Judgement) -> str:
    """The headline, the deviations, the newest epoch of every metric, and the assumptions."""
    epochs, metrics = len(phases_of(watch.reference)), len(judgement.bands)
    lines = [
        f"{judgement.verdict}: {on_one_line(watched.name)}, epoch {judgement.epoch} of {epochs}; {judgement.reason}",
        f"  reference: recipe {watch.reference.recipe_id[:12]}, n = {len(watch.reference.runs)}",
        *(f"  {deviation_line(deviation)}" for deviation in judgement.since),
    ]
    at = judgement.epoch - 1
    if metrics and judgement.epoch:
        lines.append(f"  {'metric':<17}{'run':>9}{'mean':>9}{'sd':>9}{'allowed':>11}{'detectable':>12}")
    for name, band in judgement.bands.items() if judgement.epoch else ():
        value = by_epoch(watched.seed.epochs, name, epochs)[at]
        line = f"  {name:<17}{value:>9.4f}{band.mean[at]:>9.4f}"
        if np.isnan(band.limit[at]):
            lines.append(f"{line}  not judged: the seeds are all equal")
        else:
            detectable = f"± {band.detectable(judgement.epoch):.4f}"
            lines.append(f"{line}{band.sd[at]:>9.4f}{f'± {band.limit[at]:.4f}':>11}{detectable:>12}")
    lines += [f"  note: {note}" for note in notes(watch, watched)]
    if metrics:
        lines.append(
            f"  family-wise error {watch.alpha:g} over {epochs} epochs x {metrics} metrics of the training, two-sided; "
            f"a deviation as large as `detectable` is found at this epoch with a probability of {POWER:g}"
        )
    return "\n".join(lines)


def in_short(judgement: Judgement) -> str:
    """One line: the deviations, or the smallest deviation of validation that would have been found."""
    if judgement.since:
        return "; ".join(deviation_line(deviation) for deviation in judgement.since)
    band = judgement.bands.get("validation_top1")
    if band is None or not judgement.epoch or np.isnan(band.limit[judgement.epoch - 1]):
        return judgement.reason
    detectable = f"{band.detectable(judgement.epoch):.4f}"
    return f"{judgement.reason}; of validation_top1, ± {detectable} would be found with a probability of {POWER:g}"


def deviation_line(deviation: Deviation) -> str:
    return (
        f"{deviation.metric} since epoch {deviation.epoch}: {deviation.value:.4f}, where the reference has "
        f"{deviation.mean:.4f} ± {deviation.limit:.4f} ({deviation.difference:+.4f})"
    )


def notes(watch: Watch, watched: Watched) -> list[str]:
    """Differences that no setting shows."""
    lines = []
    images, seeds = watched.seed.batch_norm_batch_size, watch.reference.runs
    others = sorted({seed.batch_norm_batch_size for seed in seeds if seed.batch_norm_batch_size not in (None, images)})
    if images is not None and others:
        lines.append(
            f"batch norm sees {images} images at a time in the run, {', '.join(map(str, others))} in the reference: no "
            "other setting says so"
        )
    sources = {seed.source_sha256 for seed in seeds if seed.source_sha256}
    if len(sources) > 1:
        lines.append(f"the reference seeds were trained by {len(sources)} states of the code")
    return lines


def as_json_line(watch: Watch, watched: Watched, judgement: Judgement) -> str:
    report = {
        "verdict": judgement.verdict,
        "reason": judgement.reason,
        "run": watched.name,
        "recipe_id": watch.reference.recipe_id,
        "seeds": len(watch.reference.runs),
        "epoch": judgement.epoch,
        "epochs": len(phases_of(watch.reference)),
        "family_wise_error": watch.alpha,
        "comparisons": judgement.comparisons,
        "power": POWER,
        "since": [asdict(deviation) for deviation in judgement.since],
        "metrics": {name: band_at(band, judgement.epoch) for name, band in judgement.bands.items()},
        "notes": notes(watch, watched),
    }
    return json.dumps(report)


def band_at(band: Band, epoch: int) -> dict[str, float | None]:
    """The band at the newest epoch, none before the first. Null: it cannot be judged."""
    if epoch == 0:
        return {}
    names = ("mean", "sd", "degrees_of_freedom", "limit")
    values = {name: float(getattr(band, name)[epoch - 1]) for name in names} | {"detectable": band.detectable(epoch)}
    return {name: value if np.isfinite(value) else None for name, value in values.items()}
