"""How a run goes beside its reference: judged, and said in words and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recipe.document.formatting import on_one_line
from recipe.records import Dynamics
from recipe.review.watch.reference import Watched, phases_of, refuse_differences, refuse_other_data, same_run
from recipe.review.watch.statistics import (
    ALPHA,
    METRICS,
    ON_TRACK,
    POWER,
    Band,
    Deviation,
    Judgement,
    Numbers,
    Seeds,
    judge,
)


@dataclass(frozen=True)
class Watch:
    """A reference and how it is to be used; called with a run it says how that one goes."""

    reference: Dynamics
    alpha: float = ALPHA
    priors: Mapping[str, float] = field(default_factory=dict)

    def judge(self, watched: Watched) -> Judgement:
        """The verdict; raises `UserError` where the run is of another recipe."""
        refuse_differences(self.reference, watched.config, watched.steps_per_epoch, watched.name)
        refuse_other_data(self.reference, watched)
        epochs = len(phases_of(self.reference))
        run = {name: by_epoch(watched.seed.epochs, name, epochs) for name in METRICS}
        judgement = judge(self.seeds(), run, self.alpha, self.priors)
        twin = next((seed for seed in self.reference.seeds if same_run(seed, watched.seed)), None)
        if twin is not None:
            reason = f"every value so far is that of reference seed {twin.seed}, digit by digit"
            return Judgement(ON_TRACK, reason, judgement.epoch, judgement.comparisons, judgement.bands)
        return judgement

    def seeds(self) -> Seeds:
        """The reference as arrays."""
        values = {
            name: np.array([seed.epochs[name] for seed in self.reference.seeds], dtype=np.float64) for name in METRICS
        }
        return Seeds(values, phases_of(self.reference))


def by_epoch(columns: Mapping[str, Sequence[Any]], name: str, epochs: int) -> Numbers:
    """A column of a run as an array over all epochs, NaN where it has no value."""
    values = np.full(epochs, np.nan)
    for epoch, value in zip(columns.get("epoch", []), columns.get(name, []), strict=True):
        values[epoch - 1] = np.nan if value is None else value
    return values


def as_text(watch: Watch, watched: Watched, judgement: Judgement) -> str:
    """The verdict for a person: a headline, what deviates, the newest epoch of every metric, what was assumed."""
    reference, seeds = watch.reference, len(watch.reference.seeds)
    epochs = len(phases_of(reference))
    lines = [
        f"{judgement.verdict}: {on_one_line(watched.name)}, epoch {judgement.epoch} of {epochs}; {judgement.reason}",
        f"  reference: recipe {reference.recipe_id[:12]}, n = {seeds}",
        *(f"  {deviation_line(deviation)}" for deviation in judgement.since),
        *table(judgement, watched, epochs),
        *(f"  note: {note}" for note in notes(watch, watched, judgement)),
    ]
    if judgement.bands:
        metrics = f"{len(judgement.bands)} {'metric' if len(judgement.bands) == 1 else 'metrics'}"
        lines.append(
            f"  family-wise error {watch.alpha:g} over {epochs} epochs x {metrics} of the whole training, "
            f"two-sided; a deviation as large as `detectable` is found at this epoch with a probability of {POWER:g}"
        )
    return "\n".join(lines)


def in_short(judgement: Judgement) -> str:
    """One line: what deviates, or else how large a deviation of validation could not hide."""
    if judgement.since:
        return "; ".join(deviation_line(deviation) for deviation in judgement.since)
    band = judgement.bands.get("validation_top1")
    if band is None or not judgement.epoch or np.isnan(band.limit[judgement.epoch - 1]):
        return judgement.reason
    seen = f"{band.detectable(judgement.epoch):.4f}"
    return f"{judgement.reason}; of validation_top1, ± {seen} would be found with a probability of {POWER:g}"


def deviation_line(deviation: Deviation) -> str:
    """Which metric, since when, by how much."""
    return (
        f"{deviation.metric} since epoch {deviation.epoch}: {deviation.value:.4f}, where the reference has "
        f"{deviation.mean:.4f} ± {deviation.limit:.4f} ({deviation.difference:+.4f})"
    )


def table(judgement: Judgement, watched: Watched, epochs: int) -> list[str]:
    """The newest epoch, a line for each metric that can be judged."""
    if not judgement.epoch or not judgement.bands:
        return []
    lines = [f"  {'metric':<17}{'run':>9}{'mean':>9}{'sd':>9}{'allowed':>11}{'detectable':>12}"]
    at = judgement.epoch - 1
    for name, band in judgement.bands.items():
        value = by_epoch(watched.seed.epochs, name, epochs)[at]
        if np.isnan(band.limit[at]):
            lines.append(f"  {name:<17}{value:>9.4f}{band.mean[at]:>9.4f}  not judged: the seeds are all equal")
            continue
        cells = f"{value:>9.4f}{band.mean[at]:>9.4f}{band.sd[at]:>9.4f}"
        lines.append(f"  {name:<17}{cells}{f'± {band.limit[at]:.4f}':>11}{f'± {band.detectable(at + 1):.4f}':>12}")
    return lines


def notes(watch: Watch, watched: Watched, judgement: Judgement) -> list[str]:
    """What a reader must know to trust the verdict."""
    found = [f"the sd of {name} is a declared prior" for name, band in judgement.bands.items() if band.is_prior]
    found += [
        f"--prior-sd {name} is not used: {len(watch.reference.seeds)} seeds are measured"
        for name in watch.priors
        if name in judgement.bands and not judgement.bands[name].is_prior
    ]
    ours, theirs = watched.seed.images_per_batch_norm, {seed.images_per_batch_norm for seed in watch.reference.seeds}
    if ours is not None and theirs - {None, ours}:
        others = ", ".join(
            str(count) for count in sorted(count for count in theirs - {None, ours} if count is not None)
        )
        found.append(
            f"batch norm sees {ours} images at a time in the run, {others} in the reference: no other setting says so"
        )
    sources = {seed.source_sha256 for seed in watch.reference.seeds if seed.source_sha256}
    if len(sources) > 1:
        found.append(f"the reference seeds were trained by {len(sources)} states of the code")
    return found


def as_json(watch: Watch, watched: Watched, judgement: Judgement) -> str:
    """The same for programs, on one line."""
    return json.dumps(
        {
            "verdict": judgement.verdict,
            "reason": judgement.reason,
            "run": watched.name,
            "recipe_id": watch.reference.recipe_id,
            "seeds": len(watch.reference.seeds),
            "epoch": judgement.epoch,
            "epochs": len(phases_of(watch.reference)),
            "family_wise_error": watch.alpha,
            "comparisons": judgement.comparisons,
            "power": POWER,
            "since": [
                {
                    "metric": deviation.metric,
                    "epoch": deviation.epoch,
                    "value": deviation.value,
                    "mean": deviation.mean,
                    "limit": deviation.limit,
                }
                for deviation in judgement.since
            ],
            "metrics": {name: band_json(band, judgement.epoch) for name, band in judgement.bands.items()},
            "notes": notes(watch, watched, judgement),
        }
    )


def band_json(band: Band, epoch: int) -> dict[str, Any]:
    """The band at the newest epoch; null where it cannot be judged, and for the infinite degrees of a prior."""
    columns = ("mean", "sd", "degrees_of_freedom", "limit")
    if epoch == 0:
        return {"is_prior": band.is_prior}
    values = {name: float(getattr(band, name)[epoch - 1]) for name in columns} | {"detectable": band.detectable(epoch)}
    return {name: value if np.isfinite(value) else None for name, value in values.items()} | {"is_prior": band.is_prior}
