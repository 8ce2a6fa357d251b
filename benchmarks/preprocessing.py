"""Images per second, processor time and memory of preprocessing beside FFCV's writer, on the same images.

    python benchmarks/preprocessing.py --images DIR

DIR holds JPEG files, in any folders; a temporary tree of class folders links to them, repeated under other names where
more are wanted. Each way of making a data set runs in a process of its own with as many workers as the others, by
turns, from a warm cache; medians, with the least and the most. The clock runs around `preprocess` or around FFCV's
writer: starting the workers counts, importing packages in the first process does not. Processor seconds are those of
all processes. A peer that is not installed is listed as absent. Memory is watched in further runs, by the number of
images, since watching takes time.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from benchmarks.loading import installed, size_on_disk  # noqa: E402

SHORT_SIDE, QUALITY = 256, 90
CLASSES = 4  # one validation image each; validation images are never resized
CHUNK = 100  # images a worker takes at a time: FFCV's default, and our shards here
FLOOR_IMAGES = 200
MEMORY_SIZES = {"ours": (700, 2800, 8400), "ffcv": (700, 2800)}
SAMPLE_SECONDS = 0.25
WAYS = {
    "ours-original": "this project, original bytes kept, every image checked to its last coefficient",
    "ffcv-original": "FFCV's writer, `write_mode='jpg'`, original size (every image decoded and encoded again)",
    "ours-small": f"this project, re-encoded to short side {SHORT_SIDE}",
    "ffcv-small": "FFCV's writer, `write_mode='jpg'`, `max_resolution` for the same short side",
    "ffcv-copy": "FFCV's writer with a field of our own that copies the bytes (nothing decoded or checked)",
    "floor-decode": f"floor: Pillow decodes, one process, {FLOOR_IMAGES} images",
    "floor-small": f"floor: Pillow decodes, resizes, encodes, one process, {FLOOR_IMAGES} images",
}
PAIRS = {
    "original bytes kept": ("ours-original", "ffcv-original", 1.5),
    "re-encoded": ("ours-small", "ffcv-small", 1.0),
}
PACKAGES = ("pillow", "numpy", "torch", "ffcv", "opencv-python", "opencv-python-headless")


# ---- the images -------------------------------------------------------------------------------------


def jpegs(images: Path) -> list[Path]:
    """The JPEG files below a folder."""
    return sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))


def plant(sources: list[Path], tree: Path, count: int) -> None:
    """Class folders of so many images, the last `CLASSES` of them for validation."""
    for number in range(count):
        split = "train" if number < count - CLASSES else "val"
        target = tree / split / f"class{number % CLASSES}" / f"{number:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(sources[number % len(sources)].resolve())


def comparable_resolution(sources: list[Path]) -> int:
    """FFCV caps the long side: the cap that makes the short side of the median shape `SHORT_SIDE` pixels."""
    from PIL import Image

    shapes = []
    for source in sources:
        with Image.open(source) as image:
            shapes.append(max(image.size) / min(image.size))
    return round(SHORT_SIDE * statistics.median(shapes))


# ---- the ways, each in a process of its own ---------------------------------------------------------


def ours(way: str, tree: Path, target: Path, workers: int) -> Any:
    """`preprocess`, ready to start; its settings are composed before the clock runs."""
    from hydra import compose, initialize_config_dir

    from recipe.config.compose import to_config
    from recipe.preprocessing.pipeline import preprocess

    words = ["data=folder", f"data.raw_dir={tree}", f"data.directory={target}", f"data.name={way}"]
    words += [f"data.images_per_shard={CHUNK}", f"data.processes={workers}", f"data.jpeg_quality={QUALITY}"]
    words += [f"data.resize_short_side={SHORT_SIDE}"] * (way == "ours-small")
    with initialize_config_dir(version_base="1.3", config_dir=str(CHECKOUT / "conf")):
        config = to_config(compose("config", words))
    return lambda: preprocess(config)


def ffcv(way: str, tree: Path, target: Path, workers: int, resolution: int) -> Any:
    """FFCV's writer, ready to start."""
    import types

    import numpy as np
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.writer import DatasetWriter
    from PIL import Image

    files = jpegs(tree)

    class Files:
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            label = int(files[index].parent.name.removeprefix("class"))
            return files[index] if way == "ffcv-copy" else Image.open(files[index]).convert("RGB"), label

    def copy(self: Any, destination: Any, path: Any, malloc: Any) -> None:
        content = np.fromfile(path, dtype=np.uint8)
        with Image.open(path) as image:
            destination["mode"], destination["width"], destination["height"] = IMAGE_MODES["jpg"], *image.size
        destination["data_ptr"], storage = malloc(content.nbytes)
        storage[:] = content

    cap = resolution if way == "ffcv-small" else None
    field = RGBImageField(write_mode="jpg", max_resolution=cap, jpeg_quality=QUALITY)
    if way == "ffcv-copy":
        field.encode = types.MethodType(copy, field)

    def write() -> None:
        writer = DatasetWriter(str(target), {"image": field, "label": IntField()}, num_workers=workers)
        writer.from_indexed_dataset(Files(), chunksize=CHUNK)
        for process in multiprocessing.active_children():  # FFCV leaves them: their time counts once they are joined
            process.join()

    return write


def floor(way: str, files: list[Path]) -> Any:
    """What the codecs alone cost, in one process."""
    from PIL import Image

    def run() -> None:
        for file in files:
            with Image.open(io.BytesIO(file.read_bytes())) as image:
                image.load()
                short = min(image.size)
                if way == "floor-small" and short > SHORT_SIDE:
                    width, height = (max(SHORT_SIDE, round(side * SHORT_SIDE / short)) for side in image.size)
                    small = image.resize((width, height), Image.Resampling.BILINEAR)
                    small.save(io.BytesIO(), "JPEG", quality=QUALITY)

    return run


def changed_levels(files: list[Path]) -> float:
    """How far FFCV's JPEG moves a pixel from the original image, mean absolute levels of 255."""
    import numpy as np
    from ffcv.fields.rgb_image import encode_jpeg
    from PIL import Image

    moved = []
    for file in files:
        before = np.asarray(Image.open(file).convert("RGB"))
        after = np.asarray(Image.open(io.BytesIO(encode_jpeg(before, QUALITY).tobytes())).convert("RGB"))
        moved.append(float(np.abs(before.astype(int) - after).mean()))
    return statistics.fmean(moved)


def run_once(way: str, tree: Path, target: Path, workers: int, resolution: int) -> dict[str, Any]:
    """One data set, timed."""
    files = jpegs(tree)
    try:
        if way.startswith("ours"):
            work = ours(way, tree, target, workers)
        elif way.startswith("ffcv"):
            work = ffcv(way, tree, target, workers, resolution)
        else:
            files = files[:: max(1, len(files) // FLOOR_IMAGES)][:FLOOR_IMAGES]
            work = floor(way, files)
    except ImportError as error:
        return {"absent": f"{type(error).__name__}: {error}"}
    began, spent = time.perf_counter(), sum(os.times()[:4])
    work()
    seconds, spent = time.perf_counter() - began, sum(os.times()[:4]) - spent
    found = {"images": len(files), "seconds": seconds, "processor_seconds": spent, "bytes": size_on_disk(target)}
    if way == "ffcv-original":
        found["changed_levels"] = changed_levels(files[:50])
    return found


# ---- from outside -----------------------------------------------------------------------------------


def tree_of(process: int) -> Iterator[Path]:
    """A process and all below it, in /proc."""
    waiting = [process]
    while waiting:
        path = Path(f"/proc/{waiting.pop()}")
        try:
            for thread in (path / "task").iterdir():
                waiting += map(int, (thread / "children").read_text().split())
        except OSError:
            continue
        yield path


def memory_of(process: int) -> int:
    """Proportional set size of a tree of processes, bytes: shared pages are counted once."""
    total = 0
    for path in tree_of(process):
        try:
            lines = (path / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


class Bench:
    """The temporary tree, and where data sets are made and removed again."""

    def __init__(self, work: Path, workers: int, resolution: int) -> None:
        self.work, self.workers, self.resolution = work, workers, resolution

    def run(self, way: str, tree: Path, watched: bool = False) -> dict[str, Any]:
        """One data set in a process of its own; it is removed afterwards."""
        target = self.work / "made"
        words = [sys.executable, str(Path(__file__).resolve()), "run", way, str(tree), str(target)]
        words += ["--workers", str(self.workers), "--resolution", str(self.resolution)]
        answer, errors, peak = self.work / "answer", self.work / "errors", 0
        with answer.open("w") as out, errors.open("w") as err:
            process = subprocess.Popen(words, stdout=out, stderr=err, cwd=CHECKOUT)
            while watched and process.poll() is None:
                peak = max(peak, memory_of(process.pid))
                time.sleep(SAMPLE_SECONDS)
            process.wait()
        if process.returncode:
            raise SystemExit(f"{way} failed: {errors.read_text()[-2000:]}")
        shutil.rmtree(target, ignore_errors=True)
        target.unlink(missing_ok=True)
        found: dict[str, Any] = json.loads(answer.read_text().splitlines()[-1])
        found |= {"load": round(os.getloadavg()[0], 1)} | ({"memory_bytes": peak} if watched else {})
        rate = "" if "absent" in found else f"{found['images'] / found['seconds']:.1f} images/s"
        print(f"  {way}: {found.get('absent', rate)}, load {found['load']}", file=sys.stderr, flush=True)
        return found


def contest(bench: Bench, tree: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """All ways by turns; one that is absent is tried once."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in list(WAYS) if number % 2 == 0 else list(WAYS)[::-1]:
            if not runs[way] or "absent" not in runs[way][0]:
                runs[way].append(bench.run(way, tree))
    return runs


def grown(bench: Bench, sources: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """The pairs once more, each with the numbers of images of `MEMORY_SIZES`, their memory watched."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for pair in PAIRS.values() for way in pair[:2]}
    for way, found in runs.items():
        for count in MEMORY_SIZES[way.partition("-")[0]]:
            tree = bench.work / f"raw-{count}"
            if not tree.exists():
                plant(sources, tree, count)
            if not found or "absent" not in found[0]:
                found.append(bench.run(way, tree, watched=True))
    return runs


# ---- the page ---------------------------------------------------------------------------------------


def rate(run: dict[str, Any]) -> float:
    """Images per second."""
    return float(run["images"] / run["seconds"])


def cost(run: dict[str, Any]) -> float:
    """Processor milliseconds for an image."""
    return float(1000 * run["processor_seconds"] / run["images"])


def told(values: list[float], digits: int) -> str:
    """The median, with the least and the most."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def ratios(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Ours over theirs in the same round, by the clock and by processor time; above 1: ours is faster."""
    found: dict[str, dict[str, Any]] = {}
    for name, (mine, theirs, wanted) in PAIRS.items():
        if "absent" in runs[theirs][0]:
            continue
        pairs = list(zip(runs[mine], runs[theirs], strict=True))
        found[name] = {
            "wanted": wanted,
            "by_clock": [rate(one) / rate(other) for one, other in pairs],
            "by_processor": [cost(other) / cost(one) for one, other in pairs],
        }
    return found


def speeds(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The table of the ways."""
    heads = ["Way", "images/s, median (least to most)", "processor, ms an image", "bytes stored an image"]
    lines = ["| " + " | ".join(heads) + " |", "|:--|--:|--:|--:|"]
    for way, name in WAYS.items():
        if "absent" in runs[way][0]:
            lines.append(f"| {name} | absent: {runs[way][0]['absent'][:80]} | | |")
            continue
        stored = statistics.median(run["bytes"] / run["images"] for run in runs[way])
        rates, costs = told([rate(run) for run in runs[way]], 1), told([cost(run) for run in runs[way]], 2)
        lines.append(f"| {name} | {rates} | {costs} | {f'{stored:,.0f}' if stored else '–'} |")
    for run in runs["ffcv-original"][:1]:
        if "changed_levels" in run:
            lines += ["", "FFCV's JPEG at the original size moves a pixel by"]
            lines[-1] += f" {run['changed_levels']:.2f} levels of 255 in the mean (50 images); ours keeps the bytes."
    return lines


def growth(memory: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The table of memory by the number of images."""
    lines = ["## Memory by the number of images", ""]
    lines += ["| Way | images | peak, MiB | processor, s |", "|:--|--:|--:|--:|"]
    for way, found in memory.items():
        for run in found:
            if "absent" not in run:
                lines.append(
                    f"| {WAYS[way]} | {run['images']:,} | {run['memory_bytes'] / 2**20:,.0f} "
                    f"| {run['processor_seconds']:.1f} |"
                )
    lines += ["", "One run each; all processes together, pages that they share counted once, seen every"]
    lines[-1] += f" {SAMPLE_SECONDS} s; what a process has imported is part of it."
    return lines


def page(result: dict[str, Any]) -> str:
    """The markdown page, the ratios last."""
    lines = [f"# Preprocessing, {result['processor']}, {result['workers']} workers, {result['date']}", ""]
    lines += [
        f"`{result['command']}`: {result['images']:,} images ({result['distinct']:,} different ones, mean "
        f"{result['mean_bytes']:,.0f} bytes), warm cache, {result['rounds']} rounds by turns, {CHUNK} images a shard "
        f"or chunk, JPEG quality {QUALITY}, FFCV's `max_resolution` {result['max_resolution']}. Load of the machine: "
        f"{result['load_least']} to {result['load_most']} on {result['cores']} cores.",
        "",
    ]
    lines += [*speeds(result["runs"]), "", *growth(result["memory"])]
    lines += ["", "Versions: " + ", ".join(f"{name} {number}" for name, number in result["versions"].items()) + "."]
    lines += ["", "## Ratios, ours over FFCV's writer", ""]
    for name, found in result["ratios"].items():
        lines.append(
            f"- {name} (wanted: {found['wanted']} x): {told(found['by_clock'], 2)} by the clock, "
            f"{told(found['by_processor'], 2)} by processor time"
        )
    return "\n".join(lines + ["- FFCV is absent: no ratios"] * (not result["ratios"])) + "\n"


def measure(arguments: argparse.Namespace) -> None:
    """Everything, into benchmarks/results/."""
    from recipe.run.environment import processor_name, usable_cores

    sources, workers = jpegs(Path(arguments.images)), arguments.workers or usable_cores()
    if not sources:
        raise SystemExit(f"--images {arguments.images}: no .jpg or .jpeg files in there")
    mean_bytes = statistics.fmean(len(source.read_bytes()) for source in sources)  # and the cache is warm
    resolution = comparable_resolution(sources)
    with tempfile.TemporaryDirectory(prefix="preprocessing-") as folder:
        bench = Bench(Path(folder), workers, resolution)
        plant(sources, bench.work / "raw", arguments.count)
        runs = contest(bench, bench.work / "raw", arguments.rounds)
        memory = grown(bench, sources)
    loads = [run["load"] for found in (*runs.values(), *memory.values()) for run in found]
    result = {
        "command": "python benchmarks/preprocessing.py --images DIR",
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor_name(),
        "cores": usable_cores(),
        "workers": workers,
        "load_least": min(loads),
        "load_most": max(loads),
        "python": platform.python_version(),
        "versions": installed(PACKAGES),
        "rounds": arguments.rounds,
        "images": arguments.count,
        "distinct": min(len(sources), arguments.count),
        "mean_bytes": mean_bytes,
        "max_resolution": resolution,
        "runs": runs,
        "memory": memory,
        "ratios": ratios(runs),
    }
    name = f"preprocessing-{workers}-cores-{str(result['processor']).lower().replace(' ', '-')[:40]}"
    output = Path(arguments.output or CHECKOUT / "benchmarks" / "results" / name)
    text = page(result)
    print(text)
    if arguments.keep:
        output.with_name(output.name + ".json").write_text(json.dumps(result, indent=1) + "\n")
        output.with_name(output.name + ".md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--images", help="a folder of JPEG files")
    parser.add_argument("--count", type=int, default=700, help="images of a data set; few ones are repeated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, help="processes of each way (default: the cores of this machine)")
    parser.add_argument("--output", help="where the results go, without .json and .md (default: benchmarks/results/)")
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="print only")
    parser.add_argument("--resolution", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role[:1] == ["run"]:
        _, way, tree, target = arguments.role
        print(json.dumps(run_once(way, Path(tree), Path(target), arguments.workers, arguments.resolution)))
    elif arguments.images:
        measure(arguments)
    else:
        parser.error("give --images DIR")


if __name__ == "__main__":
    main()
