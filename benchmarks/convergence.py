"""How often does `watch` cry wolf, and when does it see a fault? `python benchmarks/convergence.py ROWS`

ROWS is what `benchmarks/seeds.py` left (rows.jsonl), or the file of results that this script made of it. Sound seeds
are split into reference and test runs, once in the order of their numbers and many times at random; every fault is
judged by the same references. Beside `watch` stand its first version, whose error was not what it stated, and the naive
band. Writes `results/convergence.json` (all rows) and `results/convergence.md` (the tables).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))

from recipe.review.watch.statistics import ALPHA, WATCHED_METRICS, Seeds, bands, lag_correlation, neighbours, phases  # noqa: E402
from recipe.run.metric_rows import EPOCH_FIELDS  # noqa: E402

RESULTS = CHECKOUT / "benchmarks" / "results"
REFERENCE_COUNTS = (3, 5, 10, 20)
TEST_SEEDS = 60
SPLITS = 500
FIRST_UNSEEN = 43  # the method was mended on the sound seeds before this one; later ones had not been trained yet
DIGITS = 6  # significant, of a stored value
EPOCHS, WARMUP_EPOCHS = 10, 2
PHASES = phases(EPOCHS, [WARMUP_EPOCHS])
Numbers = NDArray[np.float64]
Limits = Callable[[Numbers], tuple[Numbers, Numbers]]  # seeds [n, metrics, epochs] -> mean and limit [metrics, epochs]


def main() -> None:
    """Read, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="rows.jsonl of seeds.py, or results/convergence.json")
    parser.add_argument("--splits", type=int, default=SPLITS)
    arguments = parser.parse_args()
    runs = read(arguments.rows)
    clean = as_array([run for run in runs if run["fault"] is None])
    faults = {
        name: as_array([run for run in runs if run["fault"] == name])
        for name in dict.fromkeys(run["fault"] for run in runs)
        if name is not None
    }
    RESULTS.mkdir(exist_ok=True)
    lines = [json.dumps(run, separators=(",", ":")) for run in runs]
    (RESULTS / "convergence.json").write_text('{"runs":[\n' + ",\n".join(lines) + "\n]}\n")
    page = "\n".join(
        [*introduction(runs), *false_alarm_tables(clean, arguments.splits), *fault_table(clean, faults), *course(clean)]
    )
    (RESULTS / "convergence.md").write_text(page + "\n")
    print(page)


def introduction(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What was trained, and how to do it again."""
    seconds = [run["processor_seconds"] for run in runs]
    return [
        "# What `watch` makes of real runs",
        "",
        f"{len(runs)} runs of the network `small` on a subset of CIFAR-10 (60 training and 30 validation images of",
        "each class, the first by name, as JPEG; crops of 12 pixels, batches of 30), 10 epochs with a warm-up of 2 and",
        f"a cosine; 4 metrics, 40 comparisons. A run took {np.mean(seconds):.1f} s of one processor ({min(seconds)} to",
        f"{max(seconds)}). All rows:",
        "[convergence.json](convergence.json).",
        "",
        "```bash",
        "python benchmarks/seeds.py cifar10.zip work      # trains what is missing; work/rows.jsonl",
        "python benchmarks/convergence.py work/rows.jsonl # this page",
        "```",
        "",
        "What holds here was shown for this recipe and this many epochs, and for no other.",
        "",
    ]


def read(path: Path) -> list[dict[str, Any]]:
    """Every run with its epochs as columns, in the order of fault and seed."""
    text = path.read_text()
    if text.startswith('{"runs"'):
        return list(json.loads(text)["runs"])
    runs = [compact(json.loads(line)) for line in text.splitlines()]
    names = list(dict.fromkeys(run["fault"] for run in runs))
    return sorted(runs, key=lambda run: (run["fault"] is not None, names.index(run["fault"]), run["seed"]))


def compact(line: dict[str, Any]) -> dict[str, Any]:
    """One run with its epochs as columns instead of its rows."""
    rows = [row for row in line["rows"] if row["split"] == "validation"]
    values = {name: [row[EPOCH_FIELDS[name]] for row in rows] for name in WATCHED_METRICS}
    kept = {name: line[name] for name in ("fault", "seed", "recipe_id", "weights_sha256", "processor_seconds")}
    return kept | {name: [float(f"{value:.{DIGITS}g}") for value in values[name]] for name in WATCHED_METRICS}


def as_array(runs: Sequence[dict[str, Any]]) -> Numbers:
    """[runs, metrics, epochs]; NaN where a run ended early."""
    found = np.full((len(runs), len(WATCHED_METRICS), EPOCHS), np.nan)
    for at, run in enumerate(runs):
        for metric, name in enumerate(WATCHED_METRICS):
            found[at, metric, : len(run[name])] = run[name]
    return found


def ours(seeds: Numbers) -> tuple[Numbers, Numbers]:
    """The band of `watch`."""
    values = {name: seeds[:, metric] for metric, name in enumerate(WATCHED_METRICS)}
    found = list(bands(Seeds(values, PHASES)).values())
    return np.array([band.mean for band in found]), np.array([band.limit for band in found])


def first_version(seeds: Numbers) -> tuple[Numbers, Numbers]:
    """Gaussian theory: the pooled sd alone, degrees of freedom for correlated epochs of equal spread."""
    limits = np.empty(seeds.shape[1:])
    level = ALPHA / limits.size
    for metric, values in enumerate(seeds.swapaxes(0, 1)):
        correlation = lag_correlation(values - values.mean(axis=0))
        for epoch in range(EPOCHS):
            window = np.array(neighbours(PHASES, epoch))
            squares = correlation ** (2 * np.abs(window[:, None] - window[None, :]))
            quantile = stats.t.isf(level / 2, (len(seeds) - 1) / squares.mean())
            limits[metric, epoch] = quantile * np.sqrt(values[:, window].var(axis=0, ddof=1).mean())
    return seeds.mean(axis=0), limits * np.sqrt(1 + 1 / len(seeds))


def naive(seeds: Numbers) -> tuple[Numbers, Numbers]:
    """Mean +- 3 sd of each epoch."""
    return seeds.mean(axis=0), 3 * seeds.std(axis=0, ddof=1)


METHODS: dict[str, Limits] = {"watch": ours, "its first version": first_version, "mean ± 3 sd": naive}


def alarms(runs: Numbers, seeds: Numbers, method: Limits) -> NDArray[np.int64]:
    """For each run the first epoch outside of the band, in any metric; 0: none."""
    mean, limit = method(seeds)
    outside = (np.abs(runs - mean) > limit).any(axis=1)
    return np.where(outside.any(axis=1), outside.argmax(axis=1) + 1, 0)


def false_alarm_tables(clean: Numbers, splits: int) -> list[str]:
    """How many sound runs are called off track."""
    first_test = max(REFERENCE_COUNTS)
    return [
        f"## False alarms: {len(clean)} sound seeds",
        "",
        "References are the first n seeds. Beside each count stands the exact 95 % interval of the rate; `watch`",
        f"states at most {ALPHA:.0%} for a whole training. Its first version was plain theory (pooled sd, Gaussian",
        f"tails) and broke that; it was mended on seeds 0 to {FIRST_UNSEEN - 1}, before the later ones were trained,",
        "and not touched since.",
        "",
        f"Tests are seeds {first_test} to {len(clean) - 1}:",
        "",
        *split_table(clean, first_test),
        "",
        f"Of these, the ones that the mended method had not seen, seeds {FIRST_UNSEEN} to {len(clean) - 1}:",
        "",
        *split_table(clean, FIRST_UNSEEN),
        "",
        *random_split_table(clean, splits),
    ]


def header(first: str) -> list[str]:
    """The head of a table with a column for each method."""
    return [f"| {first} | " + " | ".join(METHODS) + " |", "|--:|" + "--:|" * len(METHODS)]


def split_table(clean: Numbers, first_test: int) -> list[str]:
    """Counts of alarms among the seeds from `first_test` on."""
    lines, tests = header("n"), clean[first_test:]
    for count in REFERENCE_COUNTS:
        found = [int((alarms(tests, clean[:count], method) > 0).sum()) for method in METHODS.values()]
        lines.append(f"| {count} | " + " | ".join(with_interval(number, len(tests)) for number in found) + " |")
    return lines


def with_interval(count: int, total: int) -> str:
    """A count with the exact binomial interval of its rate."""
    interval = stats.binomtest(count, total).proportion_ci(method="exact")
    return f"{count} of {total} ({100 * interval.low:.1f} to {100 * interval.high:.1f} %)"


def random_split_table(clean: Numbers, splits: int) -> list[str]:
    """The same over random splits, which share their runs: their mean is an estimate, their spread no interval."""
    generator = np.random.default_rng(0)
    lines = [
        f"{splits} random splits into n references and up to {TEST_SEEDS} tests of the rest: mean rate (5 % and 95 %",
        "quantile over splits; they share their runs, so the quantiles show how much the choice of references matters",
        "and are no confidence interval).",
        "",
        *header("n"),
    ]
    for count in REFERENCE_COUNTS:
        rates: dict[str, list[float]] = {name: [] for name in METHODS}
        for _ in range(splits):
            order = generator.permutation(len(clean))
            tests = clean[order[count : count + TEST_SEEDS]]
            for name, method in METHODS.items():
                rates[name].append(float((alarms(tests, clean[order[:count]], method) > 0).mean()))
        lines.append(f"| {count} | " + " | ".join(mean_rate(found) for found in rates.values()) + " |")
    return lines


def mean_rate(rates: Sequence[float]) -> str:
    """A mean with the quantiles over splits, in percent."""
    low, high = 100 * np.quantile(rates, [0.05, 0.95])
    return f"{100 * np.mean(rates):.1f} % ({low:.0f} to {high:.0f})"


def fault_table(clean: Numbers, faults: dict[str, Numbers]) -> list[str]:
    """The epoch of the first alarm for each faulty run."""
    ours_columns = " | ".join(f"watch, n = {count}" for count in REFERENCE_COUNTS)
    lines = [
        "",
        f"## Faults: epoch of the first alarm, of {EPOCHS}, for each seed; – is missed",
        "",
        "References are the first n sound seeds. The naive band's alarms mean little: it calls sound runs off track as",
        "often as the tables above say. Effect: mean difference of the last validation top-1 from the sound runs, in",
        "points.",
        "",
        f"| Fault | {ours_columns} | mean ± 3 sd, n = 5 | mean ± 3 sd, n = 20 | Effect |",
        "|:--|" + "--:|" * (len(REFERENCE_COUNTS) + 3),
    ]
    top1 = WATCHED_METRICS.index("validation_top1")
    for name, runs in faults.items():
        cells = [shown(alarms(runs, clean[:count], ours)) for count in REFERENCE_COUNTS]
        cells += [shown(alarms(runs, clean[:count], naive)) for count in (5, 20)]
        effect = 100 * (runs[:, top1, -1].mean() - clean[:, top1, -1].mean())
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {effect:+.1f} |")
    return lines


def shown(epochs: NDArray[np.int64]) -> str:
    """`3, 4, –`."""
    return ", ".join(str(epoch) if epoch else "–" for epoch in epochs)


def course(clean: Numbers) -> list[str]:
    """How sound runs went: mean and sd of each epoch."""
    lines = ["", "## The sound runs: mean (sd) by epoch", "", "| Epoch | " + " | ".join(WATCHED_METRICS) + " |"]
    lines.append("|--:|" + "--:|" * len(WATCHED_METRICS))
    for epoch in range(EPOCHS):
        cells = [f"{values.mean():.4f} ({values.std(ddof=1):.4f})" for values in clean[:, :, epoch].T]
        lines.append(f"| {epoch + 1} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
