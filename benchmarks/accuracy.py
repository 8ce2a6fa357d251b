"""Accuracy of this pipeline beside a plain loop, same network and budget: python benchmarks/accuracy.py DATA_DIR

DATA_DIR holds `train/` and `val/` with class folders of image files (CIFAR-10, say). Both train `small` with SGD, a
cosine and the usual random resized crop and flip; the plain loop is what torchvision's tutorials write: `ImageFolder`,
`DataLoader`, `v2` transforms, normalisation in the loader. Per seed one run of each; n, mean and sd are printed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from recipe.config.compose import to_config  # noqa: E402
from recipe.config.schema import Config  # noqa: E402
from recipe.models.build import build_model  # noqa: E402

WORDS = [
    "experiment=smoke",
    "data=cifar10",
    "optimization.label_smoothing=0.0",
    "optimization.warmup_epochs=1",
    "augmentation.crop_pixels=32",
    "augmentation.scale_min=0.35",
    "evaluation.resize_pixels=32",
    "evaluation.crop_pixels=32",
    "evaluation.batch_size=100",
]


def main() -> None:
    """Train both for every seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--train-per-class", type=int, default=500)
    parser.add_argument("--val-per-class", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        subset(arguments, place / "images")
        words = [
            *WORDS,
            f"optimization.epochs={arguments.epochs}",
            f"optimization.batch_size={arguments.batch}",
            f"optimization.learning_rate={arguments.learning_rate}",
            f"data.raw_dir={place / 'images'}",
            f"data.directory={place / 'data'}",
        ]
        script("preprocess.py", [*words, f"run_dir={place / 'first'}"])
        found: dict[str, list[float]] = {"this pipeline": [], "plain loop": []}
        for seed in arguments.seeds:
            for name, run in (("this pipeline", ours), ("plain loop", plain)):
                started = time.perf_counter()
                found[name].append(run(words, seed, place))
                print(
                    f"{name}, seed {seed}: {found[name][-1]:.2%} in {time.perf_counter() - started:.0f} s", flush=True
                )
    for name, values in found.items():
        spread = f"sd {statistics.stdev(values):.2%}" if len(values) > 1 else "spread unknown"
        print(f"{name}: n = {len(values)}, mean {statistics.mean(values):.2%}, {spread}")


def subset(arguments: argparse.Namespace, target: Path) -> None:
    """The first images of every class by name, as copies."""
    for split, count in (("train", arguments.train_per_class), ("val", arguments.val_per_class)):
        for folder in sorted((arguments.images / split).iterdir()):
            (target / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                shutil.copy(file, target / split / folder.name)


def script(name: str, words: list[str]) -> None:
    """A command of the pipeline; its output is shown where it fails."""
    done = subprocess.run([sys.executable, str(CHECKOUT / name), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def ours(words: list[str], seed: int, place: Path) -> float:
    """Top-1 of the last checkpoint, by evaluate.py."""
    run_dir = place / f"run-{seed}"
    script("train.py", [*words, f"run_dir={run_dir}", f"seed={seed}"])
    script("evaluate.py", [f"run_dir={run_dir}", f"data.directory={place / 'data'}"])
    record = json.loads((run_dir / "records" / "evaluation.json").read_text())
    return float(record["correct_top1"] / record["images"])


def plain(words: list[str], seed: int, place: Path) -> float:
    """Top-1 of the plain loop."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CHECKOUT / "conf")):
        config = to_config(compose("config", words))
    torch.manual_seed(seed)
    random.seed(seed)
    torch.set_num_threads(config.trainer.torch_threads or torch.get_num_threads())  # as the pipeline
    train, val = loaders(config, place)
    model = build_model(config.model, 10, seed)
    settings, steps = config.optimization, len(train)
    optimizer = torch.optim.SGD(
        model.parameters(), settings.learning_rate, settings.momentum, weight_decay=settings.weight_decay
    )
    loss_of = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    for epoch in range(settings.epochs):
        model.train()
        for step, (images, labels) in enumerate(train):
            set_rate(optimizer, settings.learning_rate, epoch + step / steps, settings.epochs)
            loss = loss_of(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.inference_mode():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in val)
    return right / len(val.dataset)  # type: ignore[arg-type]


def set_rate(optimizer: torch.optim.Optimizer, peak: float, epoch: float, epochs: int) -> None:
    """A linear warm-up over one epoch, then a cosine to zero."""
    rate = peak * epoch if epoch < 1 else peak * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / (epochs - 1)))
    for group in optimizer.param_groups:
        group["lr"] = rate


def loaders(config: Config, place: Path) -> tuple[DataLoader, DataLoader]:  # type: ignore[type-arg]
    """Torchvision's own parts, with the numbers of the configuration."""
    settings = config.augmentation
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.data.mean, config.data.std)]
    crop = v2.RandomResizedCrop(settings.crop_pixels, (settings.scale_min, settings.scale_max), antialias=True)
    train = ImageFolder(str(place / "images" / "train"), v2.Compose([crop, v2.RandomHorizontalFlip(), *finish]))
    val = ImageFolder(str(place / "images" / "val"), v2.Compose([v2.Resize(32, antialias=True), *finish]))
    size = config.optimization.batch_size
    return DataLoader(train, size, shuffle=True, drop_last=True, num_workers=1), DataLoader(val, 100)


if __name__ == "__main__":
    main()
