"""Where the time of one training image goes: processor time of each part in one thread, by turns, medians.

python benchmarks/profile_image.py --images DIR
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torchvision.transforms.v2 import functional  # noqa: E402

from recipe.config.schema import MAX_PIXELS, Decoder  # noqa: E402
from recipe.data.augment.crop import Augmentation  # noqa: E402
from recipe.data.decoding import WholeImage, build_decoder, decoded  # noqa: E402
from recipe.data.images import Rules, store  # noqa: E402
from recipe.data.transforms import INTERPOLATIONS, empty_image  # noqa: E402

PIXELS = 224
AUGMENTATION = Augmentation(0, PIXELS, (0.08, 1.0), (3 / 4, 4 / 3), 0.5, next(iter(INTERPOLATIONS.values())))


def shrunk(content: bytes) -> bytes:
    """As preprocessing re-encodes; a picture that is small already keeps its bytes."""
    return store(content, is_named_png=False, rules=Rules(True, 256, quality=90, max_pixels=MAX_PIXELS)).content


def former_way(image: torch.Tensor, index: int, batch: torch.Tensor) -> None:
    """Crop, resize and mirror through torchvision, then into the batch."""
    crop = AUGMENTATION.random_crop(0, index, image.shape[-2], image.shape[-1])
    box = (crop.top, crop.left, crop.height, crop.width)
    cropped = functional.resized_crop(
        image, *box, [PIXELS, PIXELS], interpolation=AUGMENTATION.interpolation, antialias=True
    )
    batch.copy_(cropped.flip(-1) if crop.flip else cropped)


def parts_of(contents: list[bytes]) -> dict[str, Callable[[], Any]]:
    """Each part of the work, for all images."""
    decoder, pillow = build_decoder(Decoder.nvimgcodec), build_decoder(Decoder.pillow)
    out = empty_image((PIXELS, PIXELS))
    images = [decoded(content, decoder) for content in contents]
    crops = [
        AUGMENTATION.random_crop(0, index, image.shape[-2], image.shape[-1])[:4] for index, image in enumerate(images)
    ]

    def each(do: Callable[[int], Any]) -> Callable[[], None]:
        def all_of_them() -> None:
            for index in range(len(contents)):
                do(index)

        return all_of_them

    return {
        "decode all of it": each(lambda i: decoded(contents[i], decoder)),
        "decode all of it, Pillow": each(lambda i: decoded(contents[i], pillow)),
        "decode what the crop needs": each(lambda i: decoder.open(contents[i]).part(*crops[i])),
        "read the header": each(lambda i: decoder.open(contents[i]).size),
        "draw the crop": each(lambda i: AUGMENTATION.random_crop(0, i, 300, 400)),
        "crop, resize, mirror, copy: torchvision": each(lambda i: former_way(images[i], i, out)),
        "crop, resize, mirror, copy: now": each(lambda i: AUGMENTATION.write(WholeImage(images[i]), 0, i, 0, out)),
        "everything: whole picture, torchvision": each(lambda i: former_way(decoded(contents[i], decoder), i, out)),
        "everything: now": each(lambda i: AUGMENTATION.write(decoder.open(contents[i]), 0, i, 0, out)),
    }


def parity(contents: list[bytes]) -> dict[str, int]:
    """Largest difference of a pixel from Pillow and torchvision's transform with the same parameters."""
    decoder, pillow, worst, differing = build_decoder(Decoder.nvimgcodec), build_decoder(Decoder.pillow), 0, 0
    for index, content in enumerate(contents):
        ours, theirs = empty_image((PIXELS, PIXELS)), empty_image((PIXELS, PIXELS))
        AUGMENTATION.write(decoder.open(content), 0, index, 0, ours)
        former_way(decoded(content, pillow), index, theirs)
        difference = int((ours.int() - theirs.int()).abs().max())
        worst, differing = max(worst, difference), differing + (difference > 0)
    return {"images": len(contents), "largest_difference_levels": worst, "images_that_differ": differing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="a folder of JPEG files")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parity", type=int, default=500, help="images to compare with torchvision")
    parser.add_argument("--keep", help="write the JSON here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    paths = sorted(path for path in Path(arguments.images).rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    original = [path.read_bytes() for path in paths[: max(arguments.count, arguments.parity)]]
    result: dict[str, Any] = {
        "parity_with_torchvision": parity(original[: arguments.parity]),
        "parity_re_encoded": parity([shrunk(content) for content in original[: arguments.parity]]),
        "rounds": arguments.rounds,
    }
    for kind, contents in {"original": original, "small": [shrunk(c) for c in original[: arguments.count]]}.items():
        contents = contents[: arguments.count]
        parts = parts_of(contents)
        found: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(arguments.rounds):
            for name, do in parts.items():
                began = time.thread_time()
                do()
                found[name].append((time.thread_time() - began) / len(contents) * 1e6)
        result[kind] = {
            "mean_bytes": round(float(np.mean([len(content) for content in contents]))),
            "microseconds": {name: [round(min(v), 1), round(statistics.median(v), 1)] for name, v in found.items()},
        }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.keep:
        Path(arguments.keep).write_text(text + "\n")


if __name__ == "__main__":
    main()
