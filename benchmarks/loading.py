"""Images per second of loaders, side by side: RandomResizedCrop 224 and flip, batches of 256, from a warm cache.

    python benchmarks/loading.py --images DIR

DIR holds JPEG files, in any folders. They are measured as they are and as `preprocess.py` re-encodes them to a short
side of 256 pixels; all loaders of JPEGs read the very same bytes. Each loader lives in a process of its own and runs an
epoch at a time, by turns with the others, so that a machine that is shared slows all of them alike; medians, with the
least and the most. A peer that is not installed is listed as absent. The table ends with the ratios, and goes to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

BATCH, PIXELS = 256, 224
KINDS = {"original": "original files", "small": "re-encoded to short side 256"}
PEERS = {
    "ours-processes": "this project, processes (the default beside a GPU)",
    "ours-threads": "this project, threads (the default on a CPU)",
    "same-decoder": "DataLoader of processes, the same decoder",
    "torchvision": "torchvision ImageFolder + DataLoader",
    "timm": "timm loader",
    "webdataset": "webdataset + DataLoader",
    "dali": "DALI on the CPU (decodes the crop only)",
    "ffcv": "FFCV, the same JPEG bytes",
    "ffcv-default": "FFCV, its ImageNet default (half raw, 500 px)",
}
PACKAGES = (
    "torch",
    "torchvision",
    "nvidia-nvimgcodec-cu13",
    "timm",
    "webdataset",
    "nvidia-dali-cuda130",
    "ffcv",
    "pillow",
    "numpy",
)


# ---- the bytes --------------------------------------------------------------------------------------


def composed(*words: str) -> Any:
    """The configuration that these words give."""
    from hydra import compose, initialize_config_dir

    from recipe.config.compose import to_config

    with initialize_config_dir(version_base="1.3", config_dir=str(CHECKOUT / "conf")):
        return to_config(compose("config", list(words)))


def prepare(images: Path, work: Path, wanted: int) -> dict[str, int]:
    """Shards and plain folders of both kinds of images, FFCV's files where it is installed; returns bytes on disk."""
    from recipe.data.shards import open_split
    from recipe.preprocessing.pipeline import preprocess

    sources = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    copies = -(-wanted // len(sources))
    for number in range(copies * len(sources)):
        source, copy = sources[number % len(sources)], number // len(sources)
        link(source, work / "raw" / "train" / f"class{number % 10}" / f"{number % len(sources):05d}-{copy}.jpg")
    for number, source in enumerate(sources[:10]):
        link(source, work / "raw" / "val" / f"class{number % 10}" / f"{number:05d}.jpg")
    for kind in KINDS:
        words = ["data=folder", f"data.raw_dir={work / 'raw'}", f"data.directory={work / kind}", f"data.name={kind}"]
        words += [
            "data.images_per_shard=500",
            "data.processes=2",
            *(["data.resize_short_side=256"] * (kind == "small")),
        ]
        preprocess(composed(*words))
        split = open_split(work / kind, "train")
        for index in range(len(split)):
            file = work / f"{kind}-files" / f"class{split.labels[index]}" / f"{index:06d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(split.read(index))
        for peer in ("ffcv", "ffcv-default"):
            subprocess.run([*command("write", peer, kind, work)], check=False, capture_output=True)
    return {str(path.relative_to(work)): size_on_disk(path) for path in sorted(work.iterdir()) if path.name != "raw"}


def link(source: Path, target: Path) -> None:
    """The same file under another name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source.resolve())


def size_on_disk(path: Path) -> int:
    """Bytes of a file or of all files of a folder; 0 where nothing was written."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def write_ffcv(peer: str, kind: str, work: Path) -> None:
    """A .beton of the same bytes, or as FFCV's ImageNet example makes them."""
    import types

    import numpy as np
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.writer import DatasetWriter
    from PIL import Image

    files = sorted((work / f"{kind}-files").rglob("*.jpg"))

    class Files:
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            label = int(files[index].parent.name.removeprefix("class"))
            if peer == "ffcv-default":
                return Image.open(files[index]).convert("RGB"), label
            return files[index], label

    def encode(self: Any, destination: Any, path: Any, malloc: Any) -> None:
        content = np.fromfile(path, dtype=np.uint8)
        with Image.open(path) as image:
            destination["mode"], destination["width"], destination["height"] = IMAGE_MODES["jpg"], *image.size
        destination["data_ptr"], storage = malloc(content.nbytes)
        storage[:] = content

    field = RGBImageField(write_mode="proportion", max_resolution=500, compress_probability=0.5, jpeg_quality=90)
    if peer == "ffcv":
        field.encode = types.MethodType(encode, field)
    began = time.perf_counter()
    writer = DatasetWriter(str(work / f"{peer}-{kind}.beton"), {"image": field, "label": IntField()}, num_workers=2)
    writer.from_indexed_dataset(Files())
    print(json.dumps({"images_per_second": len(files) / (time.perf_counter() - began)}))


# ---- the loaders ------------------------------------------------------------------------------------

Epochs = Callable[[], Iterator[int]]  # images of each batch of one more epoch


def ours(kind: str, work: Path, cores: int, processes: int) -> Epochs:
    import torch

    from recipe.data.augment.crop import build_augmentation
    from recipe.data.batches import BatchLayout, TrainingBatches
    from recipe.data.shards import open_split
    from recipe.data.worker_pool import open_loaders
    from recipe.distributed import World

    config = composed(f"loader.workers={processes}", f"loader.threads={cores}")
    world = World(0, 1, 0, 1, torch.device("cpu"), "none")
    context = open_loaders([open_split(work / kind, "train")], config.loader, world)
    (decoding,) = context.__enter__()
    batches = TrainingBatches(decoding, build_augmentation(config.augmentation, 0), BatchLayout(BATCH, 1, 1), 0, 0)
    numbers = iter(range(10**6))
    HELD.append(context)

    def epoch() -> Iterator[int]:
        for (batch,) in batches.epoch(next(numbers)):
            yield len(batch.images)

    return epoch


HELD: list[Any] = []  # contexts that live as long as the process


def from_loader(loader: Any) -> Epochs:
    return lambda: (len(batch[0]) for batch in loader)


def torch_loader(dataset: Any, cores: int, **options: Any) -> Epochs:
    from torch.utils.data import DataLoader

    return from_loader(
        DataLoader(dataset, BATCH, num_workers=cores, persistent_workers=True, prefetch_factor=2, **options)
    )


def torchvision_loader(kind: str, work: Path, cores: int) -> Epochs:
    from torchvision import datasets, transforms

    steps = [transforms.RandomResizedCrop(PIXELS), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    dataset = datasets.ImageFolder(str(work / f"{kind}-files"), transforms.Compose(steps))
    return torch_loader(dataset, cores, shuffle=True, drop_last=True)


def same_decoder_loader(kind: str, work: Path, cores: int) -> Epochs:
    import torch
    from torchvision.transforms import v2

    from recipe.config.schema import Decoder
    from recipe.data.decoding import build_decoder, decoded
    from recipe.data.shards import open_split

    split, decoder = open_split(work / kind, "train"), build_decoder(Decoder.nvimgcodec)
    steps = v2.Compose([v2.RandomResizedCrop(PIXELS, antialias=True), v2.RandomHorizontalFlip()])

    class Images(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(split)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return steps(decoded(split.read(index), decoder)), int(split.labels[index])

    return torch_loader(Images(), cores, shuffle=True, drop_last=True)


def timm_loader(kind: str, work: Path, cores: int) -> Epochs:
    from timm.data import ImageDataset, create_loader

    options = {"color_jitter": None, "interpolation": "bilinear", "use_prefetcher": False, "num_workers": cores}
    dataset = ImageDataset(str(work / f"{kind}-files"))
    return from_loader(create_loader(dataset, (3, PIXELS, PIXELS), BATCH, is_training=True, **options))


def webdataset_loader(kind: str, work: Path, cores: int) -> Epochs:
    import webdataset
    from torchvision import transforms

    steps = [transforms.RandomResizedCrop(PIXELS), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    shards = [str(path) for path in sorted((work / kind).glob("train-*.tar"))]
    dataset = webdataset.WebDataset(shards, shardshuffle=100).shuffle(1000).decode("pil").to_tuple("jpg", "cls")
    dataset = dataset.map_tuple(lambda image: transforms.Compose(steps)(image.convert("RGB")), lambda label: label)
    dataset = dataset.batched(BATCH, partial=False)
    return from_loader(webdataset.WebLoader(dataset, batch_size=None, num_workers=cores, persistent_workers=True))


def dali_loader(kind: str, work: Path, cores: int) -> Epochs:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=cores, device_id=None, prefetch_queue_depth=2, seed=0)
    def pipeline() -> Any:
        content, labels = fn.readers.file(file_root=str(work / f"{kind}-files"), random_shuffle=True, name="files")
        images = fn.decoders.image_random_crop(content, device="cpu", output_type=types.RGB)
        images = fn.resize(images, size=(PIXELS, PIXELS), interp_type=types.INTERP_TRIANGULAR)
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    built = pipeline()
    built.build()
    batches = built.reader_meta("files")["epoch_size"] // BATCH
    for _ in range(4):
        built.run()

    def epoch() -> Iterator[int]:
        for number in range(batches + 3):  # what was made while others ran comes first, and does not count
            built.run()
            yield BATCH if number >= 3 else -1

    return epoch


def ffcv_loader(peer: str, kind: str, work: Path, cores: int) -> Epochs:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    image = [RandomResizedCropRGBImageDecoder((PIXELS, PIXELS)), RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
    pipelines = {"image": image, "label": [IntDecoder(), ToTensor()]}
    options = {"order": OrderOption.RANDOM, "os_cache": True, "drop_last": True, "pipelines": pipelines}
    return from_loader(Loader(str(work / f"{peer}-{kind}.beton"), BATCH, cores, batches_ahead=3, **options))


def build(peer: str, kind: str, work: Path, cores: int) -> Epochs:
    """The loader of a peer; raises ImportError where it is absent."""
    if peer.startswith("ours"):
        return ours(kind, work, cores, cores if peer == "ours-processes" else 0)
    if peer.startswith("ffcv"):
        return ffcv_loader(peer, kind, work, cores)
    plain = {
        "torchvision": torchvision_loader,
        "same-decoder": same_decoder_loader,
        "timm": timm_loader,
        "webdataset": webdataset_loader,
        "dali": dali_loader,
    }
    return plain[peer](kind, work, cores)


# ---- one process a loader ---------------------------------------------------------------------------


def serve(peer: str, kind: str, work: Path, cores: int) -> None:
    """Run an epoch for every line that comes in and say how fast it was."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        epoch = build(peer, kind, work, cores)
        consume(epoch)
    except Exception as error:
        print(json.dumps({"absent": f"{type(error).__name__}: {error}"}), file=answers)
        return
    print(json.dumps({"ready": True}), file=answers)
    for _ in sys.stdin:
        print(json.dumps(consume(epoch) | {"memory_bytes": memory_of_tree()}), file=answers)
    os._exit(0)


def consume(epoch: Epochs) -> dict[str, float]:
    """One epoch; the clocks start anew at batches that do not count.

    On a machine that is shared, images per second tell how many threads ask for a core; the processor's time for an
    image tells what it costs, and the cores divided by it how fast it can be.
    """
    began, spent, images = time.perf_counter(), processor_seconds_of_tree(), 0
    for count in epoch():
        if count < 0:
            began, spent = time.perf_counter(), processor_seconds_of_tree()
        else:
            images += count
    seconds, spent = time.perf_counter() - began, processor_seconds_of_tree() - spent
    return {"images_per_second": images / seconds, "processor_ms_per_image": 1000 * spent / images}


def tree() -> Iterator[Path]:
    """This process and all below it, in /proc."""
    waiting = [os.getpid()]
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        try:
            for thread in (process / "task").iterdir():
                waiting += map(int, (thread / "children").read_text().split())
        except OSError:
            continue
        yield process


def memory_of_tree() -> int:
    """Proportional set size, bytes: shared pages are counted once."""
    lines = [line for process in tree() for line in (process / "smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def processor_seconds_of_tree() -> float:
    """Time on the processor so far, of user and system."""
    ticks = sum(sum(map(int, (process / "stat").read_text().rsplit(")")[-1].split()[11:13])) for process in tree())
    return ticks / os.sysconf("SC_CLK_TCK")


def command(*words: Any) -> list[str]:
    """This script in another role."""
    return [sys.executable, str(Path(__file__).resolve()), *map(str, words)]


class Contestant:
    """A loader in its process."""

    def __init__(self, peer: str, kind: str, work: Path, cores: int) -> None:
        words = command("serve", peer, kind, work, "--cores", cores)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        self.peer, self.memory_bytes = peer, 0
        self.rates: list[float] = []
        self.costs: list[float] = []  # milliseconds of a processor for an image
        self.absent: str | None = self.heard().get("absent")

    def heard(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"absent": "its process ended"}

    def run(self) -> None:
        """One more epoch."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        found = self.heard()
        if "absent" in found:
            self.absent = found["absent"]
            return
        self.rates.append(found["images_per_second"])
        self.costs.append(found["processor_ms_per_image"])
        self.memory_bytes = found["memory_bytes"]

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def contest(kind: str, work: Path, cores: int, rounds: int, peers: list[str]) -> list[Contestant]:
    """All peers, by turns."""
    contestants = []
    for peer in peers:
        contestants.append(Contestant(peer, kind, work, cores))
        print(f"  {kind}: {peer}: {contestants[-1].absent or 'ready'}", file=sys.stderr, flush=True)
    for number in range(rounds):
        for contestant in contestants if number % 2 == 0 else contestants[::-1]:
            if contestant.absent is None:
                contestant.run()
                print(f"  {kind} {number}: {contestant.peer} {contestant.rates[-1:]}", file=sys.stderr, flush=True)
    for contestant in contestants:
        contestant.end()
    return contestants


# ---- the table --------------------------------------------------------------------------------------


def summary(contestants: list[Contestant]) -> list[dict[str, Any]]:
    """A row for each loader; ratios are of the rates of the same round."""
    base = contestants[0]
    rows = []
    for contestant in contestants:
        row: dict[str, Any] = {"peer": contestant.peer, "absent": contestant.absent}
        if contestant.rates:
            ratios = [ours / theirs for ours, theirs in zip(base.rates, contestant.rates, strict=False)]
            costs = [theirs / ours for ours, theirs in zip(base.costs, contestant.costs, strict=False)]
            row |= {
                "images_per_second": [round(rate, 1) for rate in contestant.rates],
                "median": round(statistics.median(contestant.rates), 1),
                "memory_mib": round(contestant.memory_bytes / 2**20),
                "ratio_of_ours": [round(ratio, 3) for ratio in ratios],
                "ratio_median": round(statistics.median(ratios), 3),
                "processor_ms_per_image": [round(cost, 4) for cost in contestant.costs],
                "processor_ratio_of_ours": [round(ratio, 3) for ratio in costs],
                "processor_ratio_median": round(statistics.median(costs), 3),
            }
        rows.append(row)
    return rows


def table(result: dict[str, Any]) -> str:
    """The markdown page."""
    lines = [f"# Loaders, {result['processor']}, {result['cores']} cores, {result['date']}", ""]
    lines += [f"`{result['command']}`: {result['images']:,} training images ({result['distinct']} different ones),", ""]
    lines[-2] += (
        f" RandomResizedCrop {PIXELS} + flip, batches of {BATCH}, warm cache, {result['rounds']} rounds by turns"
    )
    lines += ["Load of the machine at the start: " + result["load"] + ".", ""]
    for kind, rows in result["kinds"].items():
        lines += [f"## {KINDS[kind]} ({result['mean_bytes'][kind]:,.0f} bytes an image)", ""]
        heads = ["Loader", "images/s, median (least to most)", "memory, MiB", "ratio of ours, by the clock"]
        heads += ["processor, ms an image", "ratio of ours, by processor time"]
        lines += ["| " + " | ".join(heads) + " |", "|:--|--:|--:|--:|--:|--:|"]
        for row in rows:
            name = PEERS[row["peer"]]
            if row["absent"]:
                lines.append(f"| {name} | absent: {row['absent'][:80]} | | | | |")
                continue
            rates, ratios = row["images_per_second"], row["ratio_of_ours"]
            costs, cost = row["processor_ratio_of_ours"], statistics.median(row["processor_ms_per_image"])
            lines.append(
                f"| {name} | {row['median']:,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) | {row['memory_mib']:,} "
                f"| {row['ratio_median']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {cost:.3f} "
                f"| {row['processor_ratio_median']:.2f} ({min(costs):.2f} to {max(costs):.2f}) |"
            )
        lines.append("")
    lines += ["## Bytes on disk", "", "| What | MB |", "|:--|--:|"]
    lines += [f"| {name} | {size / 1e6:,.0f} |" for name, size in result["bytes_on_disk"].items()]
    lines += ["", "Versions: " + ", ".join(f"{name} {number}" for name, number in result["versions"].items()) + "."]
    lines += ["", "## Ratios", ""]
    for kind, rows in result["kinds"].items():
        for what, by in (("ratio_median", "the clock"), ("processor_ratio_median", "processor time")):
            lines.append(f"- {KINDS[kind]}, by {by}: {told_ratios(rows, what)}")
    return "\n".join(lines) + "\n"


def told_ratios(rows: list[dict[str, Any]], what: str) -> str:
    """The ratios that count: FFCV on the same bytes, torchvision, and whoever else is best, on these bytes or not."""
    found = {row["peer"]: row[what] for row in rows if not row["absent"]}
    theirs = {peer: ratio for peer, ratio in found.items() if not peer.startswith("ours") and peer != "same-decoder"}
    same_bytes = {peer: ratio for peer, ratio in theirs.items() if peer != "ffcv-default"}
    told = [f"{found[peer]:.2f} x {peer}" for peer in ("ffcv", "torchvision") if peer in found]
    for peers, whose in ((same_bytes, "the best peer on the same bytes"), (theirs, "the best peer on any bytes")):
        best = min(peers, key=lambda peer: peers[peer], default=None)
        told += [f"{peers[best]:.2f} x {whose} ({best})"] if best else []
    return ", ".join(told)


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of the packages that do the work."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def measure(arguments: argparse.Namespace) -> None:
    """Everything, into benchmarks/results/."""
    from recipe.run.environment import processor_name, usable_cores

    cores = arguments.cores or usable_cores()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    work = Path(arguments.work or tempfile.mkdtemp(prefix="loading-"))
    try:
        sizes = json.loads((work / "sizes.json").read_text()) if (work / "sizes.json").exists() else {}
        if not sizes:
            sizes = prepare(Path(arguments.images), work, arguments.at_least)
            (work / "sizes.json").write_text(json.dumps(sizes))
        peers = arguments.peers.split(",") if arguments.peers else list(PEERS)
        kinds = {}
        for kind in KINDS:
            kinds[kind] = summary(contest(kind, work, cores, arguments.rounds, peers))
        images = sum(1 for _ in (work / "small-files").rglob("*.jpg"))
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    result = {
        "command": "python benchmarks/loading.py --images DIR",
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor_name(),
        "cores": cores,
        "load": load,
        "python": platform.python_version(),
        "versions": installed(PACKAGES),
        "rounds": arguments.rounds,
        "images": images,
        "distinct": sum(1 for path in Path(arguments.images).rglob("*") if path.suffix.lower() in (".jpeg", ".jpg")),
        "mean_bytes": {kind: sizes[f"{kind}-files"] / images for kind in KINDS},
        "bytes_on_disk": sizes,
        "kinds": kinds,
    }
    name = f"loading-{cores}-cores-{result['processor'].lower().replace(' ', '-')[:40]}"
    page = table(result)
    print(page)
    if arguments.keep:
        arguments.results.mkdir(parents=True, exist_ok=True)
        (arguments.results / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (arguments.results / f"{name}.md").write_text(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--images", help="a folder of JPEG files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, help="workers of each loader (default: the cores of this machine)")
    parser.add_argument("--at-least", type=int, default=4096, help="images of an epoch; few ones are repeated")
    parser.add_argument("--peers", help="only these, by comma: " + ", ".join(PEERS))
    parser.add_argument("--work", help="a folder to keep the prepared bytes in")
    parser.add_argument("--results", type=Path, default=CHECKOUT / "benchmarks" / "results")
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="print only")
    arguments = parser.parse_args()
    if arguments.role[:1] == ["serve"]:
        _, peer, kind, work = arguments.role
        serve(peer, kind, Path(work), arguments.cores)
    elif arguments.role[:1] == ["write"]:
        _, peer, kind, work = arguments.role
        write_ffcv(peer, kind, Path(work))
    elif arguments.images:
        measure(arguments)
    else:
        parser.error("give --images DIR")


if __name__ == "__main__":
    main()
