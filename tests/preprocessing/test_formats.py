"""Images of all common formats, detected by content and stored in one way."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from recipe.config.schema import Corrupt, Source
from recipe.data.images import RejectedImageError, Rules, store
from recipe.data.shards import open_split
from recipe.errors import UserError
from recipe.inference.pictures import pixels_of
from recipe.preprocessing.pipeline import preprocess
from recipe.run.files import CHECKOUT
from tests.builders.images import encoded, jpeg, pixels, png_header_of
from tests.builders.layouts import config, write_files

KEEP = Rules(keeps_png=True, resize_short_side=None, quality=90)
FORMATS = {"WEBP": "WebP", "BMP": "BMP", "TIFF": "TIFF", "GIF": "GIF", "AVIF": "AVIF", "JPEG2000": "JPEG 2000"}
FRAMES: dict[str, Any] = {"save_all": True, "append_images": [pixels("second")]}
SHORTS = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)


def shown(content: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """RGB as torchvision's ImageFolder sees it: the oracle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("form", FORMATS)
def test_a_picture_of_another_format_is_stored_losslessly(form: str) -> None:
    content = encoded(pixels("a"), form)
    stored = store(content, False, KEEP)
    assert (stored.unusual, stored.done, stored.extension) == (FORMATS[form], "stored as lossless RGB PNG", "png")
    assert np.array_equal(shown(stored.content), shown(content))
    small = store(content, False, Rules(keeps_png=True, resize_short_side=15, quality=90))
    assert (small.width, small.height, small.done) == (20, 15, "stored as resized RGB JPEG")
    assert np.array_equal(pixels_of(content, False).permute(1, 2, 0).numpy(), shown(content))


def tiff(array: np.ndarray[Any, Any]) -> bytes:
    return encoded(Image.fromarray(array), "TIFF")


def tiff_of_16_bits() -> bytes:
    """An RGB TIFF: Pillow reads it but does not write it."""
    samples = np.arange(2 * 3 * 3, dtype="<u2").reshape(2, 3, 3) * 3000
    entries = [
        *((256, 4, 1, 3), (257, 4, 1, 2), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 300)),
        *((277, 3, 1, 3), (278, 4, 1, 2), (279, 4, 1, samples.nbytes)),
    ]
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return (head.ljust(200, b"\0") + struct.pack("<3H", 16, 16, 16)).ljust(300, b"\0") + samples.tobytes()


NAMED = {
    "WebP with transparency": encoded(pixels("a", channels=4), "WEBP"),
    "AVIF with transparency": encoded(pixels("a", channels=4), "AVIF"),
    "TIFF with transparency": encoded(pixels("a", channels=4), "TIFF"),
    "GIF with transparency": encoded(Image.new("RGBA", (8, 8), (1, 2, 3, 0)), "GIF"),
    "CMYK TIFF": encoded(pixels("a").convert("CMYK"), "TIFF"),
    "WebP with several frames": encoded(pixels("a"), "WEBP", **FRAMES),
    "AVIF with several frames": encoded(pixels("a"), "AVIF", **FRAMES),
    "TIFF with several frames": encoded(pixels("a"), "TIFF", **FRAMES),
    "GIF with several frames": encoded(pixels("a"), "GIF", **FRAMES),
    "JPEG 2000 of 16 bits": encoded(Image.fromarray(SHORTS), "JPEG2000"),
    "TIFF of 16 bits": tiff(SHORTS),
    "TIFF": encoded(pixels("a").convert("1"), "TIFF"),
}


@pytest.mark.parametrize("what", NAMED)
def test_properties_lost_in_rgb_are_named(what: str) -> None:
    stored = store(NAMED[what], False, KEEP)
    assert stored.unusual == what
    if "16 bits" not in what:
        assert np.array_equal(shown(stored.content), shown(NAMED[what]))
    else:
        assert np.array_equal(shown(stored.content)[:, :, 0], SHORTS >> 8)


def test_colours_of_16_bits_keep_their_high_byte() -> None:
    stored = store(tiff_of_16_bits(), False, KEEP)
    assert stored.unusual == "TIFF of 16 bits"
    assert shown(stored.content).ravel().tolist() == [value * 3000 >> 8 for value in range(18)]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (tiff(np.ones((4, 4), dtype=np.float32)), "floating-point samples"),
        (tiff(np.ones((4, 4), dtype=np.int32)), "samples of 32 bits"),
        (encoded(Image.new("LAB", (4, 4)), "TIFF"), "CIELAB colours"),
    ],
)
def test_samples_without_an_agreed_white_are_refused_by_name(content: bytes, why: str) -> None:
    with pytest.raises(RejectedImageError, match=f"it has {why}: 8 or 16 bits of grey or RGB are read"):
        store(content, False, KEEP)
    with pytest.raises(UserError, match=why):
        pixels_of(content, apply_orientation=True)


@pytest.mark.parametrize("form", ["EPS", "PDF", "ICO", "PPM", "TGA", "PCX", "SGI"])
def test_other_readers_of_pillow_are_not_used(form: str) -> None:
    """The reader of EPS starts Ghostscript."""
    content = encoded(pixels("a"), form)
    with pytest.raises(RejectedImageError, match="it is none of JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF, JPEG 2000"):
        store(content, False, KEEP)
    with pytest.raises(UserError, match="it is none of JPEG, PNG, WebP"):
        pixels_of(content, apply_orientation=True)


def test_a_format_that_this_pillow_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda feature: feature != "avif")
    monkeypatch.setitem(Image.OPEN, "AVIF", (lambda *_: pytest.fail("not installed"), lambda head: "not installed"))
    with pytest.raises(RejectedImageError, match="it is AVIF, which this build of Pillow cannot read"):
        store(encoded(pixels("a"), "AVIF"), False, KEEP)


def write_mixed_classes(raw: Path) -> dict[str, bytes]:
    """Write two classes of images in different formats. Returns key -> content."""
    images = {
        "cat/photo%2Ejfif": ("photo.jfif", jpeg("a")),
        "cat/photo%2Ejpe": ("photo.jpe", jpeg("b")),
        "cat/upper": ("upper.JPG", jpeg("c")),
        "cat/bare": ("bare", jpeg("d")),
        "cat/IMG_1%2Ebak": ("IMG_1.bak", jpeg("e")),
        "dog/w": ("w.webp", encoded(pixels("f"), "WEBP")),
        "dog/b": ("b.bmp", encoded(pixels("g"), "BMP")),
        "dog/t": ("t.tif", encoded(pixels("h"), "TIFF")),
        "dog/g": ("g.gif", encoded(pixels("i"), "GIF")),
        "dog/v": ("v.avif", encoded(pixels("j"), "AVIF")),
        "dog/j": ("j.jp2", encoded(pixels("k"), "JPEG2000")),
        "dog/wrong": ("wrong.jpg", encoded(pixels("l"), "WEBP")),
        "dog/nameless": ("nameless", encoded(pixels("m"), "BMP")),
        "dog/nameless%2Edata": ("nameless.data", encoded(pixels("n"), "AVIF")),
        "dog/nameless2": ("nameless2", encoded(pixels("o"), "JPEG2000")),
        "dog/nameless3": ("nameless3", encoded(pixels("p"), "TIFF")),
        "dog/nameless4": ("nameless4", encoded(pixels("q"), "GIF")),
    }
    for key, (name, content) in images.items():
        write_files(raw / key.partition("/")[0], {name: content}, "")
    preview = encoded(pixels("r"), "TIFF")  # the part of a raw photograph that Pillow would see
    others = {"notes.txt": b"cats", "index": b"BM is a word", "README": b"II", "raw.dng": preview, "raw.NEF": preview}
    write_files(raw / "cat", others, "")
    return {key: content for key, (_, content) in images.items()}


def test_a_folder_of_all_formats_is_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_mixed_classes(tmp_path / "raw")
    os.mkfifo(tmp_path / "raw" / "cat" / "pipe")
    record = preprocess(config(tmp_path / "raw", tmp_path / "out", source=Source.folder, validation_fraction=0.2))
    stored = {}
    for name in ("train", "val"):
        split = open_split(tmp_path / "out", name)
        stored |= {split.key(i): split.read(i) for i in range(len(split))}
    assert stored.keys() == images.keys()
    for key, content in images.items():
        assert np.array_equal(shown(stored[key]), shown(content)), key
    assert record.unusual_images == {"AVIF": 2, "BMP": 2, "GIF": 2, "JPEG 2000": 2, "TIFF": 2, "WebP": 2}
    said = capsys.readouterr().err
    assert "converted: 12; skipped: 0" in said


@pytest.mark.parametrize("name", ["nameless", "picture.webp", "picture.data"])
def test_images_beside_or_below_class_folders_are_seen_under_any_name(tmp_path: Path, name: str) -> None:
    for class_id in ("cat", "dog"):
        write_files(tmp_path / class_id, {f"{n}": jpeg(f"{class_id}{n}") for n in range(9)})
    (tmp_path / "cat" / "more").mkdir()
    (tmp_path / "cat" / "more" / name).write_bytes(encoded(pixels("below"), "WEBP"))
    with pytest.raises(UserError, match="has images inside a class folder"):
        preprocess(config(tmp_path, tmp_path.with_name("out"), source=Source.folder))
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / name).write_bytes(encoded(pixels("flat"), "WEBP"))
    with pytest.raises(UserError, match="itself has images, such as"):
        preprocess(config(tmp_path / "flat", tmp_path.with_name("out"), source=Source.folder))


def test_a_name_that_promises_an_image_is_held_to_it(tmp_path: Path) -> None:
    for class_id in ("cat", "dog"):
        write_files(tmp_path / "raw" / class_id, {f"{n}": jpeg(f"{class_id}{n}") for n in range(9)})
    (tmp_path / "raw" / "cat" / "not.webp").write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match=r"not\.webp is corrupt: it is none of JPEG, PNG, WebP"):
        preprocess(config(tmp_path / "raw", tmp_path / "out", source=Source.folder))


# ---- sizes ------------------------------------------------------------------------------------------


def test_a_too_large_image_names_the_setting_or_is_left_out(tmp_path: Path) -> None:
    for class_id in ("cat", "dog"):
        write_files(tmp_path / "raw" / class_id, {f"{n}": jpeg(f"{class_id}{n}") for n in range(9)}, ".jpg")
    (tmp_path / "raw" / "cat" / "large.jpg").write_bytes(encoded(pixels("large", 400, 300)))
    changes: dict[str, Any] = {"source": Source.folder, "max_pixels": 119_999}
    said = (
        r"cat/large\.jpg cannot be stored: it is too large: 400 x 300 pixels, while data\.max_pixels=119999; "
        r"raise data\.max_pixels, or leave such images out .* data\.on_corrupt=skip"
    )
    with pytest.raises(UserError, match=said) as refused:
        preprocess(config(tmp_path / "raw", tmp_path / "out", **changes))
    assert "corrupt:" not in str(refused.value)
    record = preprocess(config(tmp_path / "raw", tmp_path / "out", on_corrupt=Corrupt.skip, **changes))
    assert [(found.key, found.what) for found in record.rejected] == [
        ("cat/large", "it is too large: 400 x 300 pixels, while data.max_pixels=119999")
    ]
    with pytest.raises(UserError, match="max_pixels: 119999 -> 120000"):
        preprocess(
            config(tmp_path / "raw", tmp_path / "out", on_corrupt=Corrupt.skip, **(changes | {"max_pixels": 120_000}))
        )


def test_the_limit_is_the_caller_s_above_pillow_s_own_too() -> None:
    bomb = png_header_of(20_000, 20_000)
    with pytest.raises(RejectedImageError, match="it is too large: 20000 x 20000 pixels"):
        store(bomb, True, KEEP)
    with pytest.raises(RejectedImageError, match="bytes of its rows"):
        store(bomb, True, Rules(keeps_png=True, resize_short_side=None, quality=90, max_pixels=400_000_000))


def test_an_image_too_long_for_jpeg_is_not_made_smaller() -> None:
    """At half the length it would still have 70,000 pixels: libjpeg writes 65,500."""
    content = encoded(Image.new("RGB", (140_000, 20), (10, 20, 30)), "PNG")
    stored = store(content, True, Rules(keeps_png=True, resize_short_side=10, quality=90))
    assert (stored.content, stored.width, stored.height) == (content, 140_000, 20)


def test_png_of_many_times_its_file_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    image = Image.fromarray(noise).resize((400, 400), Image.Resampling.BICUBIC)
    for class_id in ("cat", "dog"):
        write_files(tmp_path / "raw" / class_id, {f"{n}": encoded(image, "WEBP", quality=1) for n in range(9)}, ".webp")
    preprocess(config(tmp_path / "raw", tmp_path / "out", source=Source.folder))
    assert "warning: images that became lossless PNG take" in capsys.readouterr().err


WITHOUT_DAMAGED = """
import sys
from pathlib import Path
from recipe.config.schema import Corrupt, Source
from recipe.preprocessing.pipeline import preprocess
from tests.builders.layouts import config
if __name__ == "__main__":
    preprocess(config(sys.argv[1], Path(sys.argv[2]), source=Source.folder, on_corrupt=Corrupt.skip, processes=1))
"""


@pytest.mark.process
def test_libraries_below_pillow_print_nothing(tmp_path: Path) -> None:
    """libtiff prints messages of its own libjpeg."""
    for class_id in ("cat", "dog"):
        write_files(tmp_path / "raw" / class_id, {f"{n}": jpeg(f"{class_id}{n}") for n in range(9)})
    broken = bytearray(encoded(pixels("t", 200, 150), "TIFF", compression="jpeg"))
    at = broken.index(b"\xff\xdb")
    broken[at + 1] = 0xEC  # removes the quantisation tables
    (tmp_path / "raw" / "cat" / "broken.tif").write_bytes(broken)
    (tmp_path / "script.py").write_text(WITHOUT_DAMAGED)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path / "raw", tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert "skipped: 1" in done.stderr
    assert "JPEGLib" not in done.stderr
