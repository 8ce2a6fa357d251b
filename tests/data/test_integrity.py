"""Damage that decoders ignore: refused if pixels are lost, recorded if not, never printed."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipe.config.schema import Corrupt, Source
from recipe.data.images import DamagedImageError, Rules, store
from recipe.data.manifest import read_manifest
from recipe.data.shards import open_split
from recipe.errors import UserError
from recipe.preprocessing import imagenet
from recipe.preprocessing.archives import digests
from recipe.preprocessing.pipeline import preprocess
from tests.builders.images import encoded, jpeg
from tests.builders.layouts import config, train_images, write_files, write_official

KEEP = Rules(keeps_png=True, resize_short_side=None, quality=90)
END, ADOBE_OF_NOBODY = b"\xff\xd9", b"\xff\xee\x00\x0eAdobe\x00\x64\0\0\0\0\x07"


def picture() -> Image.Image:
    """An image with thousands of bytes of coefficients."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    return Image.fromarray(noise).resize((200, 150), Image.Resampling.BICUBIC)


PLAIN = encoded(picture())
NOISE = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)), quality=85)
RESTARTS = encoded(picture(), restart_marker_blocks=5)
EVERYWHERE, RESTART_MARKERS = encoded(picture(), restart_marker_blocks=1), range(0xD0, 0xD8)
PROGRESSIVE = encoded(picture(), progressive=True)
SOS = PLAIN.index(b"\xff\xda")
SCANS = [found.start() for found in re.finditer(b"\xff\xda", PROGRESSIVE)]
HALF = len(PLAIN) // 2


def places(content: bytes, marker: int) -> list[int]:
    return [found.start() for found in re.finditer(re.escape(bytes([0xFF, marker])), content)]


def with_stray(content: bytes, at: list[int], stray: bytes = b"a dozen bytes") -> bytes:
    """Insert stray bytes before each of the positions."""
    for place in sorted(at, reverse=True):
        content = content[:place] + stray + content[place:]
    return content


def with_jfif_version(content: bytes, major: int) -> bytes:
    at = content.index(b"JFIF\0") + 5
    return content[:at] + bytes([major]) + content[at + 1 :]


def with_adobe_code(content: bytes) -> bytes:
    """Replace the JFIF marker, which would decide the colours."""
    return content[:2] + ADOBE_OF_NOBODY + content[20:]


def with_scan_parameters(content: bytes) -> bytes:
    end = SOS + 2 + int.from_bytes(content[SOS + 2 : SOS + 4])
    return content[: end - 3] + bytes(3) + content[end:]


LOST = {
    "cut": (PLAIN[:HALF], "it is truncated"),
    "cut, with an end marker": (PLAIN[:HALF] + END, "it is truncated"),
    "a tenth, with zeros to the full size": (
        NOISE[: len(NOISE) // 10] + bytes(len(NOISE) - len(NOISE) // 10),
        "zeros in the place of its end",
    ),
    "nine tenths, with zeros and an end marker": (
        NOISE[: len(NOISE) * 9 // 10] + bytes(2000) + END,
        "zeros in the place of its end",
    ),
    "cut near its end": (PLAIN[:-40] + END, "it is truncated"),
    "grey, cut": (encoded(picture().convert("L"))[:2000] + END, "it is truncated"),
    "CMYK, cut": (encoded(picture().convert("CMYK"))[:HALF] + END, "it is truncated"),
    "two views, the first cut": (
        encoded(picture(), "MPO", save_all=True, append_images=[picture()])[:HALF] + END,
        "it is truncated",
    ),
    "progressive, cut": (PROGRESSIVE[: SCANS[3] + 50] + END, "it is truncated"),
    "progressive, without its last scan": (PROGRESSIVE[: SCANS[-1]] + END, "its last scans are missing"),
    "progressive, with its first scan only": (PROGRESSIVE[: SCANS[1]] + END, "its last scans are missing"),
    "an interval between restarts": (
        RESTARTS[: places(RESTARTS, 0xD3)[0]] + RESTARTS[places(RESTARTS, 0xD4)[0] :],
        "found marker 0xd4 instead of RST3",
    ),
    "a restart marker": (
        RESTARTS[: places(RESTARTS, 0xD3)[0]] + RESTARTS[places(RESTARTS, 0xD3)[0] + 2 :],
        "found marker 0xd4 instead of RST3",
    ),
    "all eight restart markers in a row": (
        RESTARTS[: places(RESTARTS, 0xD0)[0]] + RESTARTS[places(RESTARTS, 0xD0)[1] :],
        "found marker 0xd9 instead of RST",
    ),
    # A harmless warning comes first, and a decoder reports no other.
    "stray bytes, then cut": (with_stray(PLAIN, [SOS])[:HALF] + END, "it is truncated"),
    "stray bytes at a restart, then cut": (
        with_stray(RESTARTS, places(RESTARTS, 0xD1)[:1])[: len(RESTARTS) // 2] + END,
        "it is truncated",
    ),
    "JFIF version, then cut": (with_jfif_version(PLAIN, 5)[:HALF] + END, "it is truncated"),
    "Adobe code, then cut": (with_adobe_code(PLAIN)[:HALF] + END, "it is truncated"),
    "Adobe code, stray bytes, then cut": (with_adobe_code(with_stray(PLAIN, [SOS]))[:HALF] + END, "it is truncated"),
    "scan parameters, then cut": (with_scan_parameters(PLAIN)[:HALF] + END, "it is truncated"),
    "stray bytes in many places": (
        with_stray(EVERYWHERE, [place for marker in RESTART_MARKERS for place in places(EVERYWHERE, marker)]),
        "stray bytes in more than 20 places",
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_a_jpeg_that_lost_pixels_is_refused(case: str) -> None:
    content, why = LOST[case]
    with pytest.raises(DamagedImageError, match=why):
        store(content, False, KEEP)
    with pytest.raises(DamagedImageError, match=why):
        store(content, False, Rules(keeps_png=False, resize_short_side=30, quality=90))


HARMLESS = {
    "before the end": (with_stray(PLAIN, places(PLAIN, 0xD9)[-1:]), "stray bytes in a JPEG"),
    "in the header": (with_stray(PLAIN, [SOS]), "stray bytes in a JPEG"),
    "before a restart": (with_stray(RESTARTS, places(RESTARTS, 0xD5)[:1]), "stray bytes in a JPEG"),
    "before a late restart of many": (with_stray(RESTARTS, places(RESTARTS, 0xD2)[-1:]), "stray bytes in a JPEG"),
    "before several": (with_stray(RESTARTS, places(RESTARTS, 0xD2)[:3]), "stray bytes in a JPEG"),
    "between scans": (with_stray(PROGRESSIVE, SCANS[2:5]), "stray bytes in a JPEG"),
    "fill bytes too": (with_stray(PLAIN, places(PLAIN, 0xD9)[-1:], b"a dozen bytes\xff\xff"), "stray bytes in a JPEG"),
    "Adobe code": (with_adobe_code(PLAIN), "unknown Adobe code in a JPEG"),
    "JFIF version": (with_jfif_version(PLAIN, 5), "unknown JFIF version in a JPEG"),
    "scan parameters": (with_scan_parameters(PLAIN), "unusual scan parameters in a JPEG"),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_a_jpeg_that_lost_nothing_is_stored_and_recorded(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    content, what = HARMLESS[case]
    stored = store(content, False, KEEP)
    assert (stored.unusual, stored.done) == (what, "stored as lossless RGB PNG")
    with Image.open(io.BytesIO(stored.content)) as now, Image.open(io.BytesIO(content)) as before:
        assert np.array_equal(np.asarray(now), np.asarray(before))
    assert capfd.readouterr().err == ""


def test_bytes_after_the_end_are_not_pixels() -> None:
    for content in (PLAIN + b"whatever", PLAIN + PLAIN, encoded(picture(), "MPO", save_all=True)):
        assert store(content, False, KEEP).content == content


def test_an_unusual_sampling_is_left_to_pillow() -> None:
    """simplejpeg reads the usual ones only."""
    content = encoded(picture().convert("L"))
    sampling = content.index(b"\xff\xc0") + 11
    unusual = content[:sampling] + b"\x31" + content[sampling + 1 :]  # of one component, without effect
    assert store(unusual, False, KEEP).content == unusual


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


ROWS = b"".join(b"\0" + bytes(row) for row in np.asarray(picture()).reshape(150, -1))
PACKED = zlib.compress(ROWS)


def png(*chunks: bytes, height: int = 150) -> bytes:
    """200 pixels wide, RGB."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 200, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks)


IEND = chunk(b"IEND", b"")
DATA = chunk(b"IDAT", PACKED)
LOST_PNG = {
    "no end": (png(DATA), "no IEND chunk"),
    "cut": (png(DATA)[:-300], "inside its IDAT chunk"),
    "one row": (png(chunk(b"IDAT", zlib.compress(ROWS[: 601 * 149])), IEND), "89549 of 90150 bytes of its rows"),
    "half of the rows": (png(chunk(b"IDAT", PACKED[: len(PACKED) // 2]), IEND), "bytes of its rows"),
    "checksum of the data": (png(DATA[:300] + bytes([DATA[300] ^ 1]) + DATA[301:], IEND), "checksum of its IDAT"),
    "checksum alone": (png(DATA[:-1] + bytes([DATA[-1] ^ 1]), IEND), "checksum of its IDAT chunk is wrong"),
    "checksum of the end": (png(DATA, IEND[:-1] + b"\0"), "checksum of its IEND chunk is wrong"),
    "checksum of the stream": (png(chunk(b"IDAT", PACKED[:-4] + b"none"), IEND), "incorrect data check"),
    "stream": (png(chunk(b"IDAT", PACKED[:500] + b"\xff" * 40 + PACKED[540:]), IEND), "its data are damaged"),
}


@pytest.mark.parametrize("case", LOST_PNG)
def test_a_png_that_lost_pixels_is_refused(case: str) -> None:
    content, why = LOST_PNG[case]
    with pytest.raises(DamagedImageError, match=why):
        store(content, True, KEEP)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (7, 3), (33, 70)])
def test_a_sound_png_of_any_kind_is_read(mode: str, size: tuple[int, int]) -> None:
    assert store(encoded(picture().convert(mode).resize(size), "PNG"), True, KEEP).width == size[0]


def interlaced(width: int, height: int) -> bytes:
    """An Adam7 PNG of black pixels, which Pillow does not write."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = b""
    for left, top, across, down in passes:
        columns = len(range(left, width, across))
        rows += bytes(1 + 3 * columns) * len(range(top, height, down)) if columns else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + IEND


@pytest.mark.parametrize("size", [(1, 1), (3, 9), (5, 2), (16, 16), (21, 13)])
def test_rows_of_an_interlaced_png_are_counted(size: tuple[int, int]) -> None:
    assert store(interlaced(*size), True, KEEP).content == interlaced(*size)
    larger = interlaced(*size).replace(chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 1)), b"")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", size[0], size[1] + 8, 8, 2, 0, 0, 1))
    with pytest.raises(DamagedImageError, match="bytes of its rows"):
        store(larger[:8] + header + larger[8:], True, KEEP)


@pytest.mark.parametrize("form", ["WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000"])
def test_decoders_of_other_formats_report_damage(form: str) -> None:
    content = encoded(picture(), form)
    for share in (0.2, 0.5, 0.8, 0.95):
        with pytest.raises(DamagedImageError):
            store(content[: int(share * len(content))], False, KEEP)


# ---- as a user meets it -----------------------------------------------------------------------------


def write_damaged_classes(raw: Path) -> None:
    for name in ("cat", "dog"):
        write_files(raw / name, {f"{n}": jpeg(f"{name}{n}") for n in range(20)}, ".jpg")
    write_files(
        raw / "cat", {"half": LOST["cut, with an end marker"][0], "stray": HARMLESS["before the end"][0]}, ".jpg"
    )
    write_files(raw / "dog", {"rows": LOST_PNG["one row"][0]}, ".png")


def test_damage_stops_with_the_name_or_is_left_out_and_listed(tmp_path: Path) -> None:
    write_damaged_classes(tmp_path / "raw")
    with pytest.raises(UserError, match=r"cat/half\.jpg is corrupt: it is truncated \(premature end of data segment\)"):
        preprocess(config(tmp_path / "raw", tmp_path / "out", source=Source.folder, images_per_shard=50))
    record = preprocess(config(tmp_path / "raw", tmp_path / "out", source=Source.folder, on_corrupt=Corrupt.skip))
    assert sorted(found.key for found in record.rejected) == ["cat/half", "dog/rows"]
    assert record.unusual_images == {"stray bytes in a JPEG": 1}


def test_damage_in_an_archive_with_the_published_checksum_is_kept_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was published with this damage, and all have trained on it."""
    raw = write_official(tmp_path / "raw", train=train_images() | {"n02085620_7": LOST["cut, with an end marker"][0]})
    with pytest.raises(UserError, match=r"n02085620_7 in .* is corrupt: it is truncated"):
        preprocess(config(raw, tmp_path / "unknown"))
    name = "ILSVRC2012_img_train.tar"
    (archive,) = digests([raw / name], {}, tmp_path / "cache")
    monkeypatch.setitem(imagenet.PUBLISHED_MD5, name, archive.md5)
    record = preprocess(config(raw, tmp_path / "out"))
    assert record.rejected == []
    found = "damaged JPEG: it is truncated (premature end of data segment)"
    assert record.unusual_images == {found: 1}
    assert [image.key for image in read_manifest(tmp_path / "out").converted] == ["n02085620_7"]
    (tmp_path / "out" / "train-00001.tar").unlink()
    preprocess(config(raw, tmp_path / "out"))  # also in a repair
    split = open_split(tmp_path / "out", "train")
    assert "n02085620_7" in {split.key(i) for i in range(len(split))}


def test_a_header_that_cannot_be_read_is_damage_of_its_format() -> None:
    for content, form in ((PLAIN[:20], "JPEG"), (encoded(picture(), "PNG")[:33], "PNG")):
        with pytest.raises(DamagedImageError, match=f"it is a damaged {form}"):
            store(content, False, KEEP)
