"""The statistics of `watch`: prediction intervals for one more run, from seeds of the same recipe. No files.

A run is compared with n reference seeds after each epoch and in each metric, by the prediction interval of one more
run, mean +- t s sqrt(1 + 1/n). s is pooled over neighbouring epochs of the same phase of the schedule, or is that of
the epoch if this is larger. The degrees of freedom of t are reduced for the autocorrelation and the unequal variances
of the epochs (Satterthwaite). They are capped by an upper bound on the kurtosis of the residuals: on real seeds the
plain pooled band broke its stated error (benchmarks/results/convergence.md has both). All epochs and metrics of a
training share one family-wise error (Bonferroni), so that looking at every epoch costs no more.

Intervals are two-sided: a run that is too good too early has started from something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from recipe.review.findings import CANNOT_TELL

ALPHA = 0.05  # family-wise
POWER = 0.9
FEWEST_SEEDS = 3
WATCHED_METRICS = ("train_loss", "train_top1", "validation_loss", "validation_top1")
WINDOW_SHARE = 1 / 6  # of the training: 15 epochs of 90
KURTOSIS_ERRORS = 3.0  # standard errors above the measured kurtosis
CHI_SQUARED_POINTS = 2000
ON_TRACK, OFF_TRACK = "ON TRACK", "OFF TRACK"
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Seeds:
    """The reference: an array [seeds, epochs] for each metric, and the phase of the schedule of each epoch."""

    values: Mapping[str, Numbers]
    phases: Sequence[int]

    @property
    def count(self) -> int:
        return len(next(iter(self.values.values())))

    @property
    def epochs(self) -> int:
        return len(self.phases)


@dataclass(frozen=True)
class Band:
    """The prediction interval of one more run in one metric, arrays over epochs. NaN limits: cannot be judged."""

    mean: Numbers
    sd: Numbers  # pooled
    degrees_of_freedom: Numbers
    quantiles: Numbers  # of t
    seeds: int

    @property
    def scale(self) -> Numbers:
        """The standard deviation of the difference between one more run and the mean of the seeds."""
        return self.sd * float(np.sqrt(1 + 1 / self.seeds))

    @property
    def limit(self) -> Numbers:
        """The largest deviation inside the interval."""
        return self.quantiles * self.scale

    def detectable(self, epoch: int) -> float:
        """The smallest deviation that is found with a probability of `POWER` after `epoch` (from 1)."""
        at = epoch - 1
        return detectable_shift(float(self.quantiles[at]), float(self.degrees_of_freedom[at])) * float(self.scale[at])


@dataclass(frozen=True)
class Deviation:
    """A value outside its band."""

    metric: str
    epoch: int
    value: float
    mean: float
    limit: float

    @property
    def difference(self) -> float:
        """Signed: the run minus the reference."""
        return self.value - self.mean


@dataclass(frozen=True)
class Judgement:
    """The verdict at the newest epoch. `since`: the first deviation of each metric, the earliest first."""

    verdict: str
    reason: str
    epoch: int  # completed by the run
    comparisons: int  # that share the family-wise error
    bands: Mapping[str, Band] = field(default_factory=dict)
    since: Sequence[Deviation] = ()


def phases(epochs: int, ends: Sequence[float]) -> list[int]:
    """The phase of the schedule at the end of each epoch. Phases end after `ends` (the warm-up, each fall)."""
    return [sum(epoch > end for end in {*ends}) for epoch in range(1, epochs + 1)]


def neighbours(phase_of: Sequence[int], epoch: int) -> list[int]:
    """The epochs, counted from 0, with a variance that is pooled with that of `epoch`."""
    reach = max(1, int(len(phase_of) * WINDOW_SHARE / 2))
    window = range(max(0, epoch - reach), min(len(phase_of), epoch + reach + 1))
    return [other for other in window if phase_of[other] == phase_of[epoch]]


def lag_correlation(residuals: Numbers) -> float:
    """The lag-1 autocorrelation of residuals [seeds, epochs], clipped to 0..1."""
    spread = residuals.std(axis=0)
    scaled = residuals[:, spread > 0] / spread[spread > 0]
    if scaled.shape[1] < 2:
        return 0.0
    return float(np.clip(np.mean(scaled[:, 1:] * scaled[:, :-1]), 0.0, 1.0))


def pooled(values: Numbers, phase_of: Sequence[int]) -> tuple[Numbers, Numbers]:
    """Standard deviation and degrees of freedom at each epoch, from values [seeds, epochs]."""
    seeds, epochs = values.shape
    variances = values.var(axis=0, ddof=1)
    correlation = lag_correlation(values - values.mean(axis=0))
    sd, degrees = np.empty(epochs), np.empty(epochs)
    for epoch in range(epochs):
        window = np.array(neighbours(phase_of, epoch))
        sd[epoch] = np.sqrt(max(variances[epoch], variances[window].mean()))
        count = effective_count(variances[window], np.abs(window[:, None] - window[None, :]), correlation)
        degrees[epoch] = (seeds - 1) * count
    spreads = sd > 0
    if not spreads.any():
        return sd, degrees
    scaled = (values - values.mean(axis=0))[:, spreads] / sd[spreads]
    return sd, np.minimum(degrees, tail_degrees(scaled, correlation))


def tail_degrees(scaled: Numbers, correlation: float) -> float:
    """The degrees of freedom of the heaviest-tailed t that scaled residuals [seeds, epochs] do not rule out.

    t has the excess kurtosis 6 / (degrees - 4), measured with an error. A long training with many seeds gets Gaussian
    tails, a short one does not.
    """
    seeds, epochs = scaled.shape
    excess = float((scaled**4).mean() / (scaled**2).mean() ** 2) - 3
    square = min(correlation**2, 1 - 1 / (2 * epochs))  # correlated through and through, they are worth one epoch
    error = np.sqrt(24 / ((seeds - 1) * epochs) * (1 + square) / (1 - square))
    most = excess + KURTOSIS_ERRORS * float(error)
    return 4 + 6 / most if most > 0 else float("inf")


def effective_count(variances: Numbers, distances: Numbers, correlation: float) -> float:
    """The number of uncorrelated epochs of equal variance with the same certainty of the pooled one (Satterthwaite).

    Epochs are correlated as correlation ** distance. The covariance of squares of Gaussians is the square of that.
    """
    if not variances.any():
        return 1.0
    return float(variances.sum() ** 2 / (variances @ correlation ** (2 * distances) @ variances))


def bands(seeds: Seeds, alpha: float = ALPHA) -> dict[str, Band]:
    """The band of every metric, none with fewer than three seeds. All epochs and metrics share the error `alpha`."""
    if seeds.count < FEWEST_SEEDS:
        return {}
    level = alpha / (seeds.epochs * len(seeds.values))
    return {name: band(values, seeds.phases, level) for name, values in seeds.values.items()}


def band(values: Numbers, phase_of: Sequence[int], level: float) -> Band:
    """The band of one metric, values [seeds, epochs], two-sided at `level` in each epoch."""
    from scipy import stats

    sd, degrees = pooled(values, phase_of)
    sd = np.where(sd > 0, sd, np.nan)
    quantiles = np.asarray(stats.t.isf(level / 2, degrees), dtype=np.float64)
    return Band(values.mean(axis=0), sd, degrees, quantiles, len(values))


@cache
def detectable_shift(quantile: float, degrees_of_freedom: float, power: float = POWER) -> float:
    """The true shift, in standard deviations of the difference, that |t| > `quantile` finds with `power`.

    Noncentral t, (z + shift) / sqrt(v), with v chi-squared over its degrees of freedom: the mean over v of normal
    probabilities. scipy's noncentral t is NaN for the far quantiles that three seeds need.
    """
    from scipy import optimize, stats

    chances = (np.arange(CHI_SQUARED_POINTS) + 0.5) / CHI_SQUARED_POINTS
    v = stats.chi2.ppf(chances, degrees_of_freedom) / degrees_of_freedom
    bound = quantile * np.sqrt(v)

    def missed(shift: float) -> float:
        inside = stats.norm.cdf(bound - shift) - stats.norm.cdf(-bound - shift)
        return float(inside.mean() - (1 - power))

    return float(optimize.brentq(missed, 0.0, 10 * quantile + 10))


def judge(seeds: Seeds, run: Mapping[str, Numbers], alpha: float = ALPHA) -> Judgement:
    """The verdict on a run: its values by metric and epoch, NaN for epochs to come."""
    found = bands(seeds, alpha)
    epoch = max((last_epoch(values) for values in run.values()), default=0)
    comparisons = seeds.epochs * len(found)
    if not found:
        few = f"{seeds.count} reference {'seed' if seeds.count == 1 else 'seeds'}: a spread needs {FEWEST_SEEDS}"
        return Judgement(CANNOT_TELL, few, epoch, comparisons)
    can_judge = any(np.any(~np.isnan(run[name] - own.limit)) for name, own in found.items())
    deviations = [first for name, own in found.items() if (first := first_deviation(name, run[name], own)) is not None]
    if epoch == 0:
        return Judgement(CANNOT_TELL, "no epoch is completed yet", epoch, comparisons, found)
    if not can_judge:
        return Judgement(CANNOT_TELL, "the reference seeds are all equal: no spread", epoch, comparisons, found)
    if deviations:
        deviations.sort(key=lambda deviation: deviation.epoch)
        return Judgement(OFF_TRACK, "outside of what the reference seeds allow", epoch, comparisons, found, deviations)
    return Judgement(ON_TRACK, "inside of what the reference seeds allow", epoch, comparisons, found)


def last_epoch(values: Numbers) -> int:
    """The newest epoch with a value, counted from 1. Without any: 0."""
    present = np.flatnonzero(~np.isnan(values))
    return int(present[-1]) + 1 if present.size else 0


def first_deviation(metric: str, values: Numbers, own: Band) -> Deviation | None:
    outside = np.flatnonzero(np.abs(values - own.mean) > own.limit)  # NaN compares as inside
    if not outside.size:
        return None
    at = int(outside[0])
    return Deviation(metric, at + 1, float(values[at]), float(own.mean[at]), float(own.limit[at]))
