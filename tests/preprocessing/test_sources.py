"""Raw layouts and hostile archives: listings, and refusals by name."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder
from torchvision.datasets import imagenet as torchvision_imagenet

from recipe.config.schema import Expectation, Source
from recipe.errors import UserError
from recipe.preprocessing import imagenet
from recipe.preprocessing.archives import digests
from recipe.preprocessing.folders import folder_keys, look_alike_lines
from recipe.preprocessing.ilsvrc import check_ilsvrc2012, check_published_md5, read_devkit
from recipe.preprocessing.listing import Raw, Rows, listing_sha256, loss_lines
from recipe.preprocessing.pipeline import listing_line
from recipe.preprocessing.shard_writer import RawReader
from recipe.preprocessing.sources import find_raw
from tests.builders.images import jpeg
from tests.builders.layouts import (
    NAMES,
    VALIDATION_LABELS,
    WNIDS,
    Images,
    class_tar,
    data_config,
    devkit_members,
    tar_bytes,
    train_images,
    validation_images,
    write_devkit,
    write_extracted,
    write_extracted_with_devkit_folder,
    write_files,
    write_kaggle,
    write_official,
)

LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "ILSVRC2012, train: official tar and val: official tar": write_official,
    "ILSVRC2012, train: extracted folders and val: extracted folders": write_extracted,
    "flat": lambda raw_dir: write_extracted(raw_dir, is_flat=True),
    "devkit folder": write_extracted_with_devkit_folder,
    "ILSVRC2012, Kaggle": write_kaggle,
}


def listed(raw: Raw) -> dict[str, dict[str, tuple[int, bytes]]]:
    """Split -> key -> (label, bytes)."""
    reader = RawReader(raw.containers)
    return {
        split: {row["key"].decode(): (int(row["label"]), reader.read(row)) for row in rows}
        for split, rows in raw.rows.items()
    }


def expected() -> dict[str, dict[str, tuple[int, bytes]]]:
    """The expected listing of every layout of the small ILSVRC2012."""
    validation = zip(validation_images().items(), VALIDATION_LABELS, strict=True)
    return {
        "train": {key: (WNIDS.index(key[:9]), content) for key, content in train_images().items()},
        "val": {key: (label, content) for (key, content), label in validation},
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_lists_the_same_images_and_labels(tmp_path: Path, layout: str) -> None:
    raw = find_raw(data_config(LAYOUTS[layout](tmp_path), tmp_path / "out"))
    assert listed(raw) == expected()
    assert raw.class_ids == list(WNIDS)
    if "ILSVRC" in layout:
        assert raw.layout == layout
    if layout != "ILSVRC2012, train: extracted folders and val: extracted folders":
        assert raw.class_names.items() >= dict(zip(WNIDS, NAMES, strict=True)).items()


def test_labels_follow_torchvision_not_the_devkits_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T32: torchvision's own reader of the devkit is the oracle."""
    monkeypatch.setattr(torchvision_imagenet, "_verify_archive", lambda *_: None)
    monkeypatch.setattr(torchvision_imagenet, "extract_archive", extract)
    write_official(tmp_path)
    torchvision_imagenet.parse_devkit_archive(tmp_path)
    names, wnids = torchvision_imagenet.load_meta_file(tmp_path)
    ours, our_wnids = read_devkit(tmp_path)
    assert our_wnids == wnids
    assert {wnid: tuple(name.split(", ")) for wnid, name in ours.items()} == names
    rows = find_raw(data_config(tmp_path, tmp_path / "out")).rows["val"]
    assert rows["label"].tolist() == [sorted(WNIDS).index(wnid) for wnid in wnids]


def extract(path: str, target: str) -> None:
    """torchvision's extraction without the warning about filters."""
    with tarfile.open(path) as archive:
        archive.extractall(target, filter="data")


def test_one_tar_and_one_folder_mix(tmp_path: Path) -> None:
    write_official(tmp_path)
    (tmp_path / "ILSVRC2012_img_val.tar").unlink()
    for (key, content), label in zip(validation_images().items(), VALIDATION_LABELS, strict=True):
        write_files(tmp_path / "val" / WNIDS[label], {key: content})
    raw = find_raw(data_config(tmp_path, tmp_path / "out"))
    assert listed(raw) == expected()
    assert raw.layout == "ILSVRC2012, train: official tar and val: extracted folders"


# ---- what is missing --------------------------------------------------------------------------------


def test_without_raw_dir_the_message_names_it(tmp_path: Path) -> None:
    settings = data_config(tmp_path, tmp_path / "out")
    settings.raw_dir = None
    with pytest.raises(UserError, match=r"data.raw_dir is not given.*ILSVRC2012_img_train.tar.*image-net.org.*Kaggle"):
        find_raw(settings)


def test_an_absent_or_empty_raw_dir_is_refused_with_the_accepted_layouts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.raw_dir=.*nowhere is not a folder.*image-net.org"):
        find_raw(data_config(tmp_path / "nowhere", tmp_path / "out"))
    with pytest.raises(UserError, match=r"no training images in .*looked for ILSVRC2012_img_train.tar"):
        find_raw(data_config(tmp_path, tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("ILSVRC2012_img_val.tar", "no validation images in"),
        ("ILSVRC2012_devkit_t12.tar.gz", "the devkit is needed for the labels of the validation images"),
        ("ILSVRC2012_img_train.tar", "no training images in"),
    ],
)
def test_a_missing_archive_is_named(tmp_path: Path, name: str, sentence: str) -> None:
    write_official(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=sentence):
        find_raw(data_config(tmp_path, tmp_path / "out"))


def test_kaggle_without_its_labels(tmp_path: Path) -> None:
    (write_kaggle(tmp_path) / "LOC_val_solution.csv").unlink()
    with pytest.raises(UserError, match=r"LOC_val_solution.csv is missing"):
        find_raw(data_config(tmp_path, tmp_path / "out"))


# ---- hostile and damaged archives -------------------------------------------------------------------


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A member that is not a regular file."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def with_member(member: tarfile.TarInfo, content: bytes = b"") -> bytes:
    """A validation tar of one good image and one other member."""
    stream = io.BytesIO(tar_bytes([("ILSVRC2012_val_00000001.JPEG", jpeg("a"))]))
    with tarfile.open(fileobj=stream, mode="a") as archive:
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


NEXT = "ILSVRC2012_val_00000002.JPEG"
HOSTILE = {
    "climbs": (tarfile.TarInfo("../ILSVRC2012_val_00000002.JPEG"), b"x", r"'\.\./ILSVRC\S+ of \S+val.tar is not named"),
    "absolute": (tarfile.TarInfo(f"/{NEXT}"), b"x", "is not named"),
    "newline": (tarfile.TarInfo(f"{NEXT}\n"), b"x", "is not named"),
    "symlink": (special(NEXT, tarfile.SYMTYPE, "/etc/passwd"), b"", "is not a regular file"),
    "hardlink": (special(NEXT, tarfile.LNKTYPE, "ILSVRC2012_val_00000001.JPEG"), b"", "is not a regular file"),
    "device": (special(NEXT, tarfile.CHRTYPE), b"", "is not a regular file"),
    "fifo": (special(NEXT, tarfile.FIFOTYPE), b"", "is not a regular file"),
    "folder": (special(NEXT, tarfile.DIRTYPE), b"", "is not a regular file"),
    "duplicate": (tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG"), b"x", "occurs twice"),
    "wrong name": (tarfile.TarInfo("n01440764_1.JPEG"), b"x", "is not named"),
    "large": (tarfile.TarInfo(NEXT), bytes(20_000_001), "has 20000001 bytes, more than the 20000000"),
    "beyond the truth": (tarfile.TarInfo("ILSVRC2012_val_00000007.JPEG"), b"x", "no line in the devkit's ground truth"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_validation_tar_stops_with_the_member(tmp_path: Path, case: str) -> None:
    member, content, sentence = HOSTILE[case]
    write_official(tmp_path)
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(with_member(member, content))
    with pytest.raises(UserError, match=sentence):
        find_raw(data_config(tmp_path, tmp_path / "out"))


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        (
            [("n01440764.tar", tar_bytes([("n02085620_1.JPEG", b"x")]))],
            "n02085620_1.JPEG does not belong in n01440764",
        ),
        ([("n01440764.tar", tar_bytes([("../n01440764_1.JPEG", b"x")]))], "is not named"),
        ([("../n01440764.tar", b"x")], "is not named"),
        ([("n01440764.tar", class_tar("n01440764", train_images()))] * 2, "occurs twice"),
        ([("n01440764.tar", b"this is no archive" * 100)], "n01440764.tar in .* is not a complete tar"),
        ([("n01440764.tar", b"")], "is not a complete tar|does not belong|no images|is not named"),
    ],
)
def test_a_hostile_training_tar_stops(tmp_path: Path, members: list[tuple[str, bytes]], sentence: str) -> None:
    write_official(tmp_path)
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(members))
    with pytest.raises(UserError, match=sentence):
        find_raw(data_config(tmp_path, tmp_path / "out"))


@pytest.mark.parametrize("cut", [0, 100, 513, 2048, -10240, -9000])
def test_a_cut_archive_never_passes_for_a_small_one(tmp_path: Path, cut: int) -> None:
    path = write_official(tmp_path) / "ILSVRC2012_img_val.tar"
    content = path.read_bytes()
    end = len(content.rstrip(b"\0"))
    end += -end % 512  # the images end here, two empty blocks say so
    path.write_bytes(content[:end] if cut == -10240 else content[: end - 512] if cut == -9000 else content[:cut])
    with pytest.raises(UserError, match=r"ILSVRC2012_img_val.tar is not a complete tar archive"):
        find_raw(data_config(tmp_path, tmp_path / "out"))


def test_a_damaged_header_in_the_middle_never_ends_the_list(tmp_path: Path) -> None:
    path = write_official(tmp_path) / "ILSVRC2012_img_val.tar"
    content = bytearray(path.read_bytes())
    at = content.index(b"ILSVRC2012_val_00000003.JPEG")
    content[at + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a complete tar archive"):
        find_raw(data_config(tmp_path, tmp_path / "out"))


@pytest.mark.parametrize(
    "content",
    [
        b"no gzip",
        gzip.compress(b"no tar" * 1000, mtime=0),
        gzip.compress(tar_bytes(devkit_members()), mtime=0)[:-500],
        gzip.compress(tar_bytes((name, b"garbage") for name, _ in devkit_members()), mtime=0),
    ],
    ids=["no gzip", "no tar", "cut off", "garbage"],
)
def test_a_damaged_devkit_stops(tmp_path: Path, content: bytes) -> None:
    write_official(tmp_path)
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(content)
    with pytest.raises(UserError, match="devkit"):
        find_raw(data_config(tmp_path, tmp_path / "out"))


# ---- folders ----------------------------------------------------------------------------------------


def write_folder(root: Path, classes: dict[str, Images]) -> Path:
    """<class>/<file>."""
    for class_id, files in classes.items():
        write_files(root / class_id, files, suffix="")
    return root


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    cats = {f"{n}.jpg": jpeg(f"cat {n}") for n in range(20)} | {"notes.txt": b"", ".DS_Store": b""}
    write_folder(tmp_path, {"dog": {f"{n}.PNG": jpeg(f"dog {n}") for n in range(20)}, "cat": cats, ".git": {}})
    raw = find_raw(data_config(tmp_path, tmp_path / "out", source=Source.folder, validation_fraction=0.3))
    assert raw.class_ids == ["cat", "dog"]
    assert {reason: found.examples for reason, found in raw.left_out.items()} == {
        "hidden": [".git"],
        "not an image of this layout (.txt)": ["cat/notes.txt"],
    }
    held_out = raw.rows["val"]["key"].tolist()
    everything = [*raw.rows["train"]["key"].tolist(), *held_out]
    assert sorted(everything) == sorted(f"{c}/{n}".encode() for c in ("cat", "dog") for n in range(20))
    assert sorted(held_out) == sorted(key for key in everything if int(sha256(key).hexdigest()[:16], 16) / 2**64 < 0.3)
    assert raw.validation_split == "held out by the SHA-256 of the keys, a fraction of 0.3"


def test_the_order_of_classes_is_that_of_imagefolder(tmp_path: Path) -> None:
    names = ["Zebra", "apple", "10", "9", "Äpfel", "b c"]
    write_folder(tmp_path / "train", {name: {"1.jpg": jpeg(name)} for name in names})
    write_folder(tmp_path / "val", {name: {"1.jpg": jpeg(name)} for name in names[:3]})
    raw = find_raw(data_config(tmp_path, tmp_path / "out", source=Source.folder))
    assert raw.class_ids == ImageFolder(str(tmp_path / "train")).classes
    assert raw.validation_split == "given with the raw data, in val/"
    labels = {row["key"].decode(): int(row["label"]) for row in raw.rows["train"]}
    assert labels["b%20c/1"] == raw.class_ids.index("b c")
    assert labels["%C3%84pfel/1"] == raw.class_ids.index("Äpfel")


def test_keys_have_no_dots_and_do_not_collide() -> None:
    names = ["a.jpg", "a.png", "a.jpg.png", "b.c.JPEG", "x~y.jpeg", "x%7Ey.jpg", "..jpg", "jpg", "b.webp", "a.data"]
    keys = folder_keys("some.class", names)
    assert len(set(keys.values())) == len(keys)
    assert not any("." in key for key in keys.values())
    assert {name: key.removeprefix("some%2Eclass/") for name, key in keys.items()} == {
        "a.jpg": "a%2Ejpg",
        "a.png": "a%2Epng",
        "a.jpg.png": "a%2Ejpg%2Epng",
        "b.c.JPEG": "b%2Ec",
        "x~y.jpeg": "x%7Ey",
        "x%7Ey.jpg": "x%257Ey",
        "..jpg": "%2E",
        "jpg": "jpg",
        "b.webp": "b",
        "a.data": "a%2Edata",
    }


def test_file_names_that_are_not_unicode(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": {"1.jpg": jpeg("1")}})
    (tmp_path / "train" / "a" / os.fsdecode(b"\xff.jpg")).write_bytes(jpeg("ff"))
    write_folder(tmp_path / "val", {"a": {"1.jpg": jpeg("1")}})
    raw = find_raw(data_config(tmp_path, tmp_path / "out", source=Source.folder))
    assert listed(raw)["train"] == {"a/%FF": (0, jpeg("ff")), "a/1": (0, jpeg("1"))}


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        ({}, "no images were found"),
        ({"a": {"notes.txt": b""}}, r"no images were found in .*, only 1 x not an image of this layout \(\.txt\)"),
        ({"a": {"1.jpg": b"x"}}, "data.validation_fraction=0.1 of 1 images leaves 0 for validation"),
        ({"a": {f"{n}.jpg": b"x" for n in range(60)}, "b": {}}, "class 'b' has no training images"),
    ],
)
def test_a_folder_that_is_not_a_data_set(tmp_path: Path, classes: dict[str, Images], sentence: str) -> None:
    write_folder(tmp_path, classes)
    with pytest.raises(UserError, match=sentence):
        find_raw(data_config(tmp_path, tmp_path / "out", source=Source.folder))


def test_a_validation_class_without_training_images(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": {"1.jpg": b"x"}})
    write_folder(tmp_path / "val", {"a": {"1.jpg": b"x"}, "b": {"1.jpg": b"x"}})
    with pytest.raises(UserError, match="of class b, which has no training images"):
        find_raw(data_config(tmp_path, tmp_path / "out", source=Source.folder))


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_the_validation_folder_may_have_three_names(tmp_path: Path, name: str) -> None:
    for folder in ("train", name):
        write_folder(tmp_path / folder, {"a": {"1.jpg": b"x"}, "b": {"2.jpg": b"x"}})
    raw = find_raw(data_config(tmp_path, tmp_path / "out", source=Source.folder))
    assert raw.validation_split == f"given with the raw data, in {name}/"
    assert len(raw.rows["train"]) == len(raw.rows["val"]) == 2


def hide_images_one_level_deeper(root: Path) -> None:
    write_folder(root / "a", {"more": {"1.jpg": b"x"}})


def leave_a_dangling_link(root: Path) -> None:
    (root / "a" / "gone.jpg").symlink_to(root / "nowhere.jpg")


def hide_images_two_levels_deeper(root: Path) -> None:
    write_folder(root / "a" / "batch 1", {"more": {"1.PNG": b"x"}})


def put_an_image_beside_the_classes_of_train(root: Path) -> None:
    write_files(root / "train", {"1.jpg": b"x"}, "")
    for name in ("a", "b"):
        (root / name).rename(root / "train" / name)


def put_an_image_beside_the_classes_of_val(root: Path) -> None:
    put_an_image_beside_the_classes_of_train(root)
    write_folder(root, {"val/a": {"1.jpg": b"x"}})
    (root / "train" / "1.jpg").rename(root / "val" / "flat.jpg")


def put_all_images_flat(root: Path) -> None:
    for name, split in (("a", "train"), ("b", "val")):
        (root / name).rename(root / split)


def put_all_images_into_the_root(root: Path) -> None:
    (root / "a" / "1.jpg").rename(root / "1.jpg")
    for name in ("a", "b"):
        (root / name).rename(root / f".{name}")


def bring_two_validation_folders(root: Path) -> None:
    put_an_image_beside_the_classes_of_train(root)
    (root / "train" / "1.jpg").unlink()
    write_folder(root, {"val/a": {"1.jpg": b"x"}, "valid/a": {"1.jpg": b"x"}})


def make_a_class_a_link_to_itself(root: Path) -> None:
    (root / "a" / "self.jpg").symlink_to(root / "a" / "self.jpg")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (hide_images_one_level_deeper, r"a/more has images inside a class folder; flatten it"),
        (hide_images_two_levels_deeper, r"a/batch 1/more has images inside a class folder; flatten it"),
        (leave_a_dangling_link, r"gone.jpg is named like an image but is not a file"),
        (put_an_image_beside_the_classes_of_train, r"train itself has images, such as '1.jpg' \(1 in all\)"),
        (put_an_image_beside_the_classes_of_val, r"val itself has images, such as 'flat.jpg'"),
        (
            put_all_images_flat,
            r"train itself has .* \(30 in all\): move each into a folder of its class",
        ),
        (put_all_images_into_the_root, r" itself has images, such as '1.jpg'"),
        (bring_two_validation_folders, r"has both val/ and valid/; leave one of them"),
        (make_a_class_a_link_to_itself, r"cannot read .*self.jpg: .*symbolic links"),
    ],
)
def test_no_image_is_left_out_without_a_word(tmp_path: Path, spoil: Callable[[Path], None], sentence: str) -> None:
    write_folder(tmp_path, {"a": {f"{n}.jpg": b"x" for n in range(30)}, "b": {f"{n}.jpg": b"x" for n in range(30)}})
    spoil(tmp_path)
    with pytest.raises(UserError, match=sentence):
        find_raw(data_config(tmp_path, tmp_path / "out", source=Source.folder))


@pytest.mark.parametrize("split", ["", "test"])
def test_a_class_may_be_called_train(tmp_path: Path, split: str) -> None:
    write_folder(tmp_path, {name: {f"{n}.jpg": b"x" for n in range(30)} for name in ("bus", "train", *split.split())})
    raw = find_raw(data_config(tmp_path, tmp_path / "out", source=Source.folder))
    assert raw.class_ids == sorted(["bus", "train", *split.split()])


def test_files_outside_every_split_are_reported(tmp_path: Path) -> None:
    classes = {name: {f"{n}.jpg": b"x" for n in range(30)} for name in ("a", "b")}
    write_folder(tmp_path / "train", classes)
    write_folder(tmp_path / "test", classes)
    write_files(tmp_path, {"overview.png": b"x", "README.md": b"x", ".DS_Store": b""}, "")
    settings = data_config(tmp_path, tmp_path / "out", source=Source.folder)
    raw = find_raw(settings)
    assert sum(len(rows) for rows in raw.rows.values()) == 60
    assert raw.validation_split.startswith("held out by the SHA-256 of the keys")
    assert listing_line(raw).endswith("left out: 3 x of no split, such as README.md")
    write_folder(tmp_path / "valid", classes)
    assert find_raw(settings).left_out["of no split"].examples == ["README.md", "overview.png", "test"]


def test_hidden_folders_and_links_that_name_no_image_are_left_alone(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": {f"{n}.jpg": b"x" for n in range(60)}, "a/.ipynb_checkpoints": {"1.jpg": b"x"}})
    (tmp_path / "a" / "notes").symlink_to(tmp_path / "nowhere")
    assert find_raw(data_config(tmp_path, tmp_path / "out", source=Source.folder)).class_ids == ["a"]


SYSTEM_NAMES = (
    *("._1.jpg", ".DS_Store", "__MACOSX", "@eaDir", "#recycle", "@Recycle", "lost+found", "$RECYCLE.BIN", "RECYCLER"),
    *("System Volume Information", "Thumbs.db", "ehthumbs.db", "desktop.ini", ".ipynb_checkpoints", "Icon\r"),
    *(".Spotlight-V100", ".Trashes", ".Trash-1000", ".fseventsd", "__pycache__", ".nfs000000000001", ".dropbox.cache"),
    *(".@__thumb", "THUMBS.DB", "Desktop.ini", "__macosx", "LOST+FOUND", ".fuse_hidden0001", "~$notes.docx"),
)


def leave_system_files_in(folder: Path, name: str) -> None:
    """Make a folder with a thumbnail for names without a suffix, else a file. A sidecar file is named like an image."""
    if "." in name.lstrip("."):
        (folder / name).write_bytes(b"x")
    else:
        write_files(folder / name / "deep", {"1.jpg": b"x"}, "")


@pytest.mark.parametrize("name", SYSTEM_NAMES)
@pytest.mark.parametrize("is_split", [True, False])
def test_files_of_operating_systems_are_skipped_everywhere(tmp_path: Path, name: str, is_split: bool) -> None:
    folders = ("train", "val") if is_split else (".",)
    for folder in folders:
        write_folder(tmp_path / folder, {c: {f"{n}.jpg": b"x" for n in range(60)} for c in ("a", "train")})
    settings = data_config(tmp_path, tmp_path / "out", source=Source.folder)
    before = find_raw(settings)
    places = [tmp_path, *(tmp_path / folder / c for folder in folders for c in (".", "a", "train"))]
    for place in dict.fromkeys(place.resolve() for place in places):
        leave_system_files_in(place, name)
    after = find_raw(settings)
    assert (after.class_ids, after.left_out, after.lost_images) == (["a", "train"], {}, {})
    assert listing_sha256(after.rows) == listing_sha256(before.rows)


@pytest.mark.parametrize("layout", [write_extracted, write_kaggle, write_extracted_with_devkit_folder])
def test_the_layouts_of_ilsvrc2012_pass_them_over_too(tmp_path: Path, layout: Callable[[Path], Path]) -> None:
    raw_dir = layout(tmp_path)
    before = find_raw(data_config(raw_dir, tmp_path / "out"))
    for folder in [path for path in raw_dir.rglob("*") if path.is_dir()]:
        for name in ("._n01440764_1.JPEG", "Thumbs.db", "@eaDir"):
            leave_system_files_in(folder, name)
    after = find_raw(data_config(raw_dir, tmp_path / "out"))
    assert listing_sha256(after.rows) == listing_sha256(before.rows)
    assert after.left_out == before.left_out == {}


def test_a_tar_of_a_mac_is_read_like_any_other(tmp_path: Path) -> None:
    """Its sidecars come before each file, in the outer archive and in the inner ones."""

    def with_sidecars(members: list[tuple[str, bytes]]) -> bytes:
        return tar_bytes(pair for name, content in members for pair in ((f"._{name}", b"x"), (name, content)))

    write_official(tmp_path)
    before = listed(find_raw(data_config(tmp_path, tmp_path / "out")))
    images = {wnid: [pair for pair in train_images().items() if pair[0].startswith(wnid)] for wnid in WNIDS}
    tars = [(f"{wnid}.tar", with_sidecars([(f"{k}.JPEG", c) for k, c in found])) for wnid, found in images.items()]
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(with_sidecars(tars))
    validation = [(f"{key}.JPEG", content) for key, content in validation_images().items()]
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(with_sidecars(validation))
    assert listed(find_raw(data_config(tmp_path, tmp_path / "out"))) == before


def test_unused_files_are_counted_by_reason_with_a_warning_of_lost_images(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_folder(tmp_path / split, {c: {"1.jpg": b"x", "readme.md": b"x"} for c in ("cat", "dog")})
    write_files(tmp_path / "train" / "cat", {f"{n}.heic": b"x" for n in range(4)} | {".2.jpg": b"x"}, "")
    write_files(tmp_path / "val" / "cat", {"0.svg": b"x"}, "")
    write_folder(tmp_path / "train" / "dog", {"notes": {"a.txt": b"x"}})
    write_files(tmp_path / "train", {"labels.csv": b"x"}, "")
    write_folder(tmp_path, {"test": {"1.jpg": b"x"}})
    raw = find_raw(data_config(tmp_path, tmp_path / "out", source=Source.folder))
    assert {reason: found.count for reason, found in raw.left_out.items()} == {
        "not an image of this layout (.heic)": 4,
        "not an image of this layout (.md)": 4,
        "not an image of this layout (.svg)": 1,
        "hidden": 1,
        "folders in a class folder": 1,
        "beside the class folders": 1,
        "of no split": 1,
    }
    examples = "train/cat/.2.jpg, train/cat/0.heic, train/cat/1.heic"
    assert list(loss_lines(raw)) == [f"warning: images of the class 'cat' that are left out: 6 ({examples}, ...)"]


def test_images_of_ilsvrc2012_of_other_names_are_lost_with_a_warning(tmp_path: Path) -> None:
    write_extracted(tmp_path)
    write_files(tmp_path / "train" / WNIDS[1], {f"{WNIDS[1]}_9.jpg": b"x", "more.png": b"x"}, "")
    (line,) = loss_lines(find_raw(data_config(tmp_path, tmp_path / "out")))
    assert line.startswith(f"warning: images of the class '{WNIDS[1]}' that are left out: 2 (train/{WNIDS[1]}/more.png")


def test_names_in_a_warning_cannot_move_the_terminal(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": {f"{n}.jpg": b"x" for n in range(60)}})
    (tmp_path / "cat" / os.fsdecode(b"1.\x1b[2J\n\xff")).write_bytes(b"x")
    (tmp_path / "cat" / os.fsdecode(b"\x1b[2J\n\xff.heic")).write_bytes(b"x")
    raw = find_raw(data_config(tmp_path, tmp_path / "out", source=Source.folder))
    for line in (listing_line(raw), *loss_lines(raw)):
        assert line.isprintable()


@pytest.mark.parametrize(
    "pair", [("caf\u00e9", "cafe\u0301"), ("\u212bngstrom", "\u00c5ngstrom"), ("\uac00", "\u1100\u1161")]
)
def test_one_name_in_two_spellings_of_unicode_is_refused(tmp_path: Path, pair: tuple[str, str]) -> None:
    write_folder(tmp_path, {name: {f"{n}.jpg": b"x" for n in range(30)} for name in pair})
    with pytest.raises(UserError, match="have the same name in two spellings of Unicode") as refused:
        find_raw(data_config(tmp_path, tmp_path / "out", source=Source.folder))
    assert all(ascii(name) in str(refused.value) for name in pair)


@pytest.mark.parametrize(
    "pair", [("Cat", "cat"), ("cat", "cat "), ("cat", "\u0441at"), ("\ufb01sh", "fish"), ("stra\u00dfe", "STRASSE")]
)
def test_names_that_look_alike_are_two_classes_with_a_warning(tmp_path: Path, pair: tuple[str, str]) -> None:
    write_folder(
        tmp_path, {name: {f"{n}.jpg": b"x" for n in range(30)} for name in (*pair, "dog", "resume", "r\u00e9sum\u00e9")}
    )
    raw = find_raw(data_config(tmp_path, tmp_path / "out", source=Source.folder))
    assert set(pair) < set(raw.class_ids)
    (line,) = look_alike_lines(raw.class_ids)
    names = ", ".join(map(ascii, sorted(pair)))
    assert line == f"warning: classes whose names look alike: {names}; merge those that are one class"


def test_a_validation_class_with_another_spelling_than_its_training_class(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/caf\u00e9": {"1.jpg": b"x"}, "val/cafe\u0301": {"1.jpg": b"x"}})
    with pytest.raises(
        UserError, match=r"give 'cafe\\u0301' and the training class 'caf\\xe9', which looks like it, one name"
    ):
        find_raw(data_config(tmp_path, tmp_path / "out", source=Source.folder))


@pytest.mark.parametrize("seconds", [-1_000_000_000, -1, 0, 4_000_000_000])
def test_files_may_be_older_than_the_clock(tmp_path: Path, seconds: int) -> None:
    write_folder(tmp_path, {"a": {f"{n}.jpg": b"x" for n in range(60)}})
    os.utime(tmp_path / "a" / "7.jpg", (seconds, seconds))
    raw = find_raw(data_config(tmp_path, tmp_path / "out", source=Source.folder))
    assert seconds * 10**9 in np.concatenate([rows["changed_ns"] for rows in raw.rows.values()])


def test_a_folder_without_permission_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patched, since tests may run as root, who can read everything."""
    write_folder(tmp_path, {"a": {f"{n}.jpg": b"x" for n in range(60)}})

    def forbidden(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("os.scandir", "pathlib.Path.is_dir"):
        with monkeypatch.context() as patch:
            patch.setattr(name, forbidden)
            with pytest.raises(UserError, match=r"cannot read .*: Permission denied"):
                find_raw(data_config(tmp_path, tmp_path / "out", source=Source.folder))


def test_the_listing_hash_depends_on_names_labels_and_sizes_only(tmp_path: Path) -> None:
    before = listing_sha256(find_raw(data_config(write_extracted(tmp_path / "extracted"), tmp_path)).rows)
    write_official(tmp_path)
    assert listing_sha256(find_raw(data_config(tmp_path, tmp_path)).rows) == before
    lines = [
        f"{split} {key} {label} {len(content)}\n"
        for split, images in expected().items()
        for key, (label, content) in sorted(images.items())
    ]
    assert before == sha256("".join(lines).encode()).hexdigest()


def test_a_class_never_loses_all_its_images_to_the_validation_set(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"c{n:02d}": {"only.jpg": b"x"} for n in range(40)})
    write_folder(tmp_path, {"many": {f"{n}.jpg": b"x" for n in range(60)}})
    raw = find_raw(data_config(tmp_path, tmp_path / "out", source=Source.folder))
    assert set(raw.rows["train"]["label"].tolist()) == set(range(41))
    alone = [f"c{n:02d}/only".encode() for n in range(40)]
    lost = [key for key in alone if int(sha256(key).hexdigest()[:16], 16) / 2**64 < 0.1]
    assert raw.validation_split == (
        f"held out by the SHA-256 of the keys, a fraction of 0.1; {len(lost)} classes that would have lost all their "
        "images keep one for training"
    )
    assert len(raw.rows["val"])


# ---- Imagenette (its host cannot be reached from here: a generated archive stands in) -----------------

IMAGENETTE = ("n01440764", "n03445777")


def imagenette_archive() -> bytes:
    """imagenette2.tgz with two of its classes."""
    members = [
        (f"imagenette2/{split}/{wnid}/{name}.JPEG", jpeg(name))
        for wnid in IMAGENETTE
        for split, name in (("train", f"{wnid}_1"), ("val", f"ILSVRC2012_val_0000{wnid[-4:]}"))
    ]
    return gzip.compress(tar_bytes(members), mtime=0)


def use_generated_imagenette(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Make torchvision expect this archive, without a download."""
    import hashlib

    from torchvision.datasets import Imagenette, utils

    def download(url: str, root: str | Path, filename: str | None = None, md5: str | None = None) -> None:
        target = Path(root) / (filename or Path(url).name)
        if not target.exists():
            target.write_bytes(content)
        assert utils.check_md5(str(target), md5)

    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    monkeypatch.setattr(Imagenette, "_ARCHIVES", {"full": ("https://nowhere.invalid/imagenette2.tgz", md5)})
    monkeypatch.setattr(utils, "download_url", download)
    monkeypatch.setattr(utils, "extract_archive", lambda path, target, remove_finished: extract(path, target))


@pytest.mark.parametrize("given", ["nothing", "archive", "folder"])
def test_imagenette(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    content = imagenette_archive()
    use_generated_imagenette(monkeypatch, content)
    if given != "nothing":
        (tmp_path / "imagenette2.tgz").write_bytes(content)
    if given == "folder":
        extract(str(tmp_path / "imagenette2.tgz"), str(tmp_path))
    settings = data_config(tmp_path, tmp_path / "out", source=Source.imagenette)
    raw = find_raw(settings)
    assert raw.class_ids == list(IMAGENETTE)
    assert raw.class_names == {"n01440764": "tench, Tinca tinca", "n03445777": "golf ball"}
    assert raw.rows["train"]["key"].tolist() == [f"{wnid}/{wnid}_1".encode() for wnid in IMAGENETTE]
    assert [path.name for path in raw.archives] == ["imagenette2.tgz"]
    monkeypatch.setattr("torchvision.datasets.utils.download_url", None)
    assert listed(find_raw(settings)) == listed(raw)


def test_an_interrupted_unpacking_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_generated_imagenette(monkeypatch, imagenette_archive())
    half = tmp_path / "unpacking" / "imagenette2" / "train" / IMAGENETTE[0]
    half.mkdir(parents=True)
    (half / f"{IMAGENETTE[0]}_1.JPEG").write_bytes(jpeg("x"))
    raw = find_raw(data_config(tmp_path, tmp_path / "out", source=Source.imagenette))
    assert len(raw.rows["train"]) == len(raw.rows["val"]) == len(IMAGENETTE)


def test_imagenette_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", unreachable)
    with pytest.raises(UserError, match=r"Imagenette could not be downloaded .* put it there"):
        find_raw(data_config(tmp_path, tmp_path / "out", source=Source.imagenette))


# ---- data.expect=ilsvrc2012 -------------------------------------------------------------------------


def fake_ilsvrc2012(monkeypatch: pytest.MonkeyPatch) -> Raw:
    """A listing with the counts, classes and first labels of ILSVRC2012 (the hash of the class list is replaced)."""
    class_ids = sorted(f"n{number:08d}" for number in range(1000))
    monkeypatch.setattr(imagenet, "CLASS_LIST_SHA256", imagenet.class_list_sha256(class_ids))
    rest = np.repeat(np.arange(1000), 50).tolist()
    for label in imagenet.FIRST_VALIDATION_LABELS:
        rest.remove(label)
    labels = {"train": np.zeros(1_281_167), "val": np.array([*imagenet.FIRST_VALIDATION_LABELS, *rest])}
    rows: dict[str, Rows] = {name: np.zeros(len(values), dtype=[("label", "<u4")]) for name, values in labels.items()}
    for name, values in labels.items():
        rows[name]["label"] = values
    return Raw("", "", "", False, class_ids=class_ids, rows=rows)


def test_the_real_counts_classes_and_labels_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    check_ilsvrc2012(fake_ilsvrc2012(monkeypatch))


def spoil_count(raw: Raw) -> None:
    raw.rows["train"] = raw.rows["train"][1:]


def spoil_validation_count(raw: Raw) -> None:
    raw.rows["val"] = raw.rows["val"][:-1]


def spoil_order(raw: Raw) -> None:
    raw.class_ids = raw.class_ids[::-1]


def spoil_classes(raw: Raw) -> None:
    raw.class_ids = raw.class_ids[:-1]


def spoil_labels(raw: Raw) -> None:
    raw.rows["val"]["label"] = (raw.rows["val"]["label"] + 1) % 1000


def spoil_balance(raw: Raw) -> None:
    raw.rows["val"]["label"][-1] = 0


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (spoil_count, "found 1,281,166 train images, ILSVRC2012 has 1,281,167"),
        (spoil_validation_count, "found 49,999 val images, ILSVRC2012 has 50,000"),
        (spoil_order, "the 1000 classes are not those of ILSVRC2012, or not in their order"),
        (spoil_classes, "found 999 classes, ILSVRC2012 has 1000"),
        (spoil_labels, r"the first validation labels are \(66, 971, .*the labels are mixed up"),
        (spoil_balance, "class n00000000 has 51 validation images, ILSVRC2012 has 50 in each"),
    ],
)
def test_each_violation_is_reported_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Raw], None], sentence: str
) -> None:
    raw = fake_ilsvrc2012(monkeypatch)
    spoil(raw)
    with pytest.raises(UserError, match=f"{sentence}.*data.expect=nothing"):
        check_ilsvrc2012(raw)


def test_md5_and_sha256_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    path = tmp_path / "ILSVRC2012_img_val.tar"
    path.write_bytes(b"x" * 10_000_000)
    md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    found = digests([path], {path.name: md5}, tmp_path / "cache.json")
    assert (found[0].md5, found[0].sha256) == (md5, hashlib.sha256(path.read_bytes()).hexdigest())
    assert found[0].is_published_md5 is True
    check_published_md5(found)
    monkeypatch.setattr("recipe.preprocessing.archives.md5_and_sha256", None)
    assert digests([path], {path.name: md5}, tmp_path / "cache.json") == found
    monkeypatch.undo()
    monkeypatch.setitem(imagenet.PUBLISHED_MD5, path.name, md5)
    path.write_bytes(b"y" * 10_000_000)
    changed = digests([path], {path.name: md5}, tmp_path / "cache.json")
    with pytest.raises(UserError, match=rf"{path.name} has md5 {changed[0].md5}, published is {md5}.*expect=nothing"):
        check_published_md5(changed)


def test_expectations_are_checked_before_archives_are_read(tmp_path: Path) -> None:
    from recipe.preprocessing.pipeline import preprocess
    from tests.builders.layouts import config

    write_devkit(write_official(tmp_path / "raw"))
    with pytest.raises(UserError, match=r"found 3 classes, ILSVRC2012 has 1000; with data.expect=nothing"):
        preprocess(config(tmp_path / "raw", tmp_path / "out", expect=Expectation.ilsvrc2012))
    assert not (tmp_path / "out" / "manifest.json").exists()
