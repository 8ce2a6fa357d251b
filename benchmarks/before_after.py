"""Is this code as fast as another commit's? Loading and preprocessing of both, by turns, on the same photographs.

    git clone . /tmp/before && git -C /tmp/before checkout c0f2f17
    python benchmarks/before_after.py /tmp/before --images DIR

Each checkout measures itself by its own benchmarks/loading.py and benchmarks/preprocessing.py. A ratio compares two
runs of the same round: above 1, this code is faster. Where other programs share the machine, the ratio by processor
time is the steadier one; a difference smaller than the spread of the rounds is none.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))
PREPARE = "import sys; from pathlib import Path; from benchmarks.loading import prepare; "
PREPARE += "prepare(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))"
LOADERS = {"ours-processes": "loading in processes", "ours-threads": "loading in threads"}
WRITERS = {"ours-original": "preprocessing, bytes kept", "ours-small": "preprocessing, re-encoded"}
Runs = dict[str, list[tuple[float, float]]]  # code -> (images per second, milliseconds of a processor per image)


def benchmark(checkout: Path, name: str) -> ModuleType:
    """A script of a checkout; the processes that it starts run that checkout's code."""
    specification = importlib.util.spec_from_file_location(
        f"{name}_{abs(hash(checkout))}", checkout / f"benchmarks/{name}.py"
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def loading(checkouts: dict[str, Path], images: Path, work: Path, arguments: argparse.Namespace) -> dict[str, Runs]:
    """Epochs of each kind of images and each loader."""
    results: dict[str, Runs] = {}
    scripts = {code: benchmark(checkout, "loading") for code, checkout in checkouts.items()}
    for code, checkout in checkouts.items():
        words = [sys.executable, "-c", PREPARE, str(images), str(work / code), str(arguments.epoch_images)]
        subprocess.run(words, cwd=checkout, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for kind, kind_name in scripts["after"].KINDS.items():
        for loader, name in LOADERS.items():
            contestants = {
                code: script.Contestant(loader, kind, work / code, arguments.cores) for code, script in scripts.items()
            }
            for number in range(arguments.rounds):
                for code in list(contestants)[:: 1 if number % 2 == 0 else -1]:
                    contestants[code].run()
            for code, contestant in contestants.items():
                contestant.end()
                if contestant.absent:
                    raise SystemExit(f"{code}: {name}: {contestant.absent}")
            results[f"{name}, {kind_name}"] = {
                code: list(zip(contestant.rates, contestant.costs, strict=True))
                for code, contestant in contestants.items()
            }
    return results


def preprocessing(
    checkouts: dict[str, Path], images: Path, work: Path, arguments: argparse.Namespace
) -> dict[str, Runs]:
    """Data sets of the same pictures, each made in a process of its own."""
    scripts = {code: benchmark(checkout, "preprocessing") for code, checkout in checkouts.items()}
    raw = work / "raw"
    scripts["after"].plant(scripts["after"].jpegs(images), raw, arguments.data_set_images)
    results: dict[str, Runs] = {}
    for way, name in WRITERS.items():
        runs: Runs = {code: [] for code in scripts}
        for number in range(arguments.rounds):
            for code in list(scripts)[:: 1 if number % 2 == 0 else -1]:
                (work / code).mkdir(exist_ok=True)
                run = scripts[code].Bench(work / code, arguments.cores, 0).run(way, raw)
                runs[code].append((scripts[code].rate(run), scripts[code].cost(run)))
        results[name] = runs
    return results


def shown(values: list[float], digits: int) -> str:
    """The median, with the least and the most."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def row(name: str, runs: Runs) -> str:
    """A line of the table."""
    rates = {code: [rate for rate, _ in pairs] for code, pairs in runs.items()}
    by_clock = [after / before for before, after in zip(rates["before"], rates["after"], strict=True)]
    pairs = zip(runs["before"], runs["after"], strict=True)
    by_processor = [before / after for (_, before), (_, after) in pairs]
    cells = [name, shown(rates["before"], 0), shown(rates["after"], 0), shown(by_clock, 2), shown(by_processor, 2)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the other commit")
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEG files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--epoch-images", type=int, default=1400)
    parser.add_argument("--data-set-images", type=int, default=700)
    parser.add_argument("--keep", type=Path, help="write the results here, as .json and .md")
    arguments = parser.parse_args()
    from recipe.run.environment import processor_name

    checkouts, load = {"before": arguments.before.resolve(), "after": CHECKOUT}, os.getloadavg()[0]
    commits = {
        code: subprocess.check_output(["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], text=True).strip()
        for code, checkout in checkouts.items()
    }
    with tempfile.TemporaryDirectory(prefix="before-after-") as folder:
        results = loading(checkouts, arguments.images, Path(folder), arguments)
        results |= preprocessing(checkouts, arguments.images, Path(folder), arguments)
    lines = [
        f"# {commits['after']} beside {commits['before']}, {processor_name()}, {arguments.cores} cores, "
        f"{time.strftime('%Y-%m-%d')}",
        "",
        f"`python benchmarks/before_after.py CHECKOUT --images DIR --rounds {arguments.rounds} --epoch-images "
        f"{arguments.epoch_images} --data-set-images {arguments.data_set_images}`, load {load:.1f} at the start and "
        f"{os.getloadavg()[0]:.1f} at the end. Images per second, median (least to most); ratios of the same round: "
        "above 1, this code is faster.",
        "",
        "| What | before | after | ratio by the clock | ratio by processor time |",
        "|:--|--:|--:|--:|--:|",
        *(row(name, runs) for name, runs in results.items()),
    ]
    page = "\n".join(lines) + "\n"
    print(page)
    if arguments.keep:
        content: dict[str, Any] = {"commits": commits, "runs": results}
        arguments.keep.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        arguments.keep.with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()
