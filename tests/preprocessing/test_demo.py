"""The drawn data set is reproducible, varied, and packed like the ILSVRC2012 release."""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import imagenet

from recipe.errors import UserError
from recipe.preprocessing import demo

TRAIN_COUNT, VALIDATION_COUNT = 4, 3
ARCHIVES = (demo.TRAIN_ARCHIVE, demo.VALIDATION_ARCHIVE, demo.DEVKIT_ARCHIVE)

Devkit = tuple[dict[str, str], list[str]]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "made by the writer"
    demo.write_demo_archives(directory, TRAIN_COUNT, VALIDATION_COUNT)
    return directory


@pytest.fixture
def devkit(archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Devkit:
    """The devkit as read by torchvision: the name of each WNID, the WNID of each validation image."""
    content = (archives / demo.DEVKIT_ARCHIVE).read_bytes()
    (tmp_path / demo.DEVKIT_ARCHIVE).write_bytes(content)
    digest = hashlib.md5(content).hexdigest()
    monkeypatch.setitem(imagenet.ARCHIVE_META, "devkit", (demo.DEVKIT_ARCHIVE, digest))
    imagenet.parse_devkit_archive(tmp_path)
    names, validation_wnids = imagenet.load_meta_file(tmp_path)
    return {wnid: ", ".join(words) for wnid, words in names.items()}, validation_wnids


def members(content: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        streams = {member.name: archive.extractfile(member) for member in archive}
        return {name: stream.read() for name, stream in streams.items() if stream}


def train_images(directory: Path) -> dict[str, bytes]:
    class_tars = members((directory / demo.TRAIN_ARCHIVE).read_bytes())
    return {name: image for content in class_tars.values() for name, image in members(content).items()}


def validation_images(directory: Path) -> dict[str, bytes]:
    return members((directory / demo.VALIDATION_ARCHIVE).read_bytes())


def redness(image: bytes) -> float:
    """The mean difference of red and blue. 0 for a grey image."""
    red, _, blue = np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).mean(axis=(0, 1))
    return float(red - blue)


def test_drawing_twice_gives_the_same_bytes(archives: Path, tmp_path: Path) -> None:
    demo.write_demo_archives(tmp_path, TRAIN_COUNT, VALIDATION_COUNT)
    assert {path.name for path in tmp_path.iterdir()} == {*ARCHIVES, demo.DEMO_MARKER}
    for path in archives.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_an_image_does_not_depend_on_how_many_are_drawn(archives: Path, tmp_path: Path) -> None:
    demo.write_demo_archives(tmp_path, 1, 1)
    few, many = train_images(tmp_path), train_images(archives)
    assert few == {name: many[name] for name in few}
    assert set(validation_images(tmp_path).values()) < set(validation_images(archives).values())


def test_no_two_images_are_the_same(archives: Path) -> None:
    images = [*train_images(archives).values(), *validation_images(archives).values()]
    assert len(set(images)) == len(images) == (TRAIN_COUNT + VALIDATION_COUNT) * len(demo.CLASS_NAMES)


def test_images_are_jpegs_of_varied_size_and_some_are_grey(archives: Path) -> None:
    images = [Image.open(io.BytesIO(content)) for content in train_images(archives).values()]
    for image in images:
        image.load()
    assert {image.format for image in images} == {"JPEG"}
    assert {image.mode for image in images} == {"RGB", "L"}
    assert all(72 <= side <= 200 for image in images for side in image.size)
    assert len({image.size for image in images}) > 0.8 * len(images)
    assert {image.width > image.height for image in images} == {True, False}


def test_train_tar_has_one_tar_per_class_in_order(archives: Path) -> None:
    class_tars = members((archives / demo.TRAIN_ARCHIVE).read_bytes())
    assert list(class_tars) == [f"n9{place:07d}.tar" for place in range(1, len(demo.CLASS_NAMES) + 1)]
    for name, content in class_tars.items():
        wnid = name.removesuffix(".tar")
        assert list(members(content)) == [f"{wnid}_{number}.JPEG" for number in range(1, TRAIN_COUNT + 1)]


def test_validation_tar_is_flat_numbered_and_shuffled(archives: Path, devkit: Devkit) -> None:
    count = VALIDATION_COUNT * len(demo.CLASS_NAMES)
    names = [f"ILSVRC2012_val_{place:08d}.JPEG" for place in range(1, count + 1)]
    assert list(validation_images(archives)) == names
    assert devkit[1] != sorted(devkit[1])


def test_torchvision_reads_names_and_balanced_ground_truth(devkit: Devkit) -> None:
    names, validation_wnids = devkit
    assert tuple(names[wnid] for wnid in sorted(names)) == demo.CLASS_NAMES
    assert Counter(validation_wnids) == dict.fromkeys(names, VALIDATION_COUNT)


@pytest.mark.parametrize(
    ("name", "sign"), [("ocean waves", -1), ("snowflake", -1), ("sunset", 1), ("brick wall", 1), ("honeycomb", 1)]
)
def test_ground_truth_names_the_drawn_classes(archives: Path, devkit: Devkit, name: str, sign: int) -> None:
    """Checked by colour only: water and night are bluish, fire, bricks and honey reddish."""
    names, validation_wnids = devkit
    labelled = zip(validation_wnids, validation_images(archives).values(), strict=True)
    tints = [sign * redness(image) for wnid, image in labelled if names[wnid] == name]
    assert len(tints) == VALIDATION_COUNT
    assert min(tints) > -1
    assert max(tints) > 20


def test_ids_do_not_follow_the_wnids(archives: Path, devkit: Devkit) -> None:
    """IDs read as positions among the sorted WNIDs make every label wrong."""
    files = members((archives / demo.DEVKIT_ARCHIVE).read_bytes())
    truth = files["ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"].decode().split()
    places = {wnid: place for place, wnid in enumerate(sorted(devkit[0]), start=1)}
    assert all(int(number) != places[wnid] for number, wnid in zip(truth, devkit[1], strict=True))
    assert {int(number) for number in truth} == set(places.values())


def test_torchvision_data_set_accepts_all_three_archives(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, (name, _) in list(imagenet.ARCHIVE_META.items()):
        content = (archives / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        monkeypatch.setitem(imagenet.ARCHIVE_META, key, (name, hashlib.md5(content).hexdigest()))
    train = imagenet.ImageNet(tmp_path, split="train")
    validation = imagenet.ImageNet(tmp_path, split="val")
    assert tuple(words for (words,) in train.classes) == demo.CLASS_NAMES
    assert torch.bincount(torch.tensor(train.targets)).tolist() == [TRAIN_COUNT] * len(demo.CLASS_NAMES)
    assert validation[0][0].mode == "RGB"


def test_archives_carry_no_clock_or_owner(archives: Path) -> None:
    for name in ARCHIVES:
        with tarfile.open(archives / name) as archive:
            stamps = {(member.mtime, member.uid, member.gid, member.uname) for member in archive}
        assert stamps == {(0, 0, 0, "")}
    assert (archives / demo.DEVKIT_ARCHIVE).read_bytes()[4:8] == bytes(4)
    meta = members((archives / demo.DEVKIT_ARCHIVE).read_bytes())["ILSVRC2012_devkit_t12/data/meta.mat"]
    assert meta[:116].decode().strip() == "MATLAB 5.0 MAT-file, drawn demonstration data"


def test_a_current_set_is_left_alone_and_any_other_is_redrawn(tmp_path: Path) -> None:
    demo.write_demo_archives(tmp_path, 1, 1)
    train = tmp_path / demo.TRAIN_ARCHIVE
    os.utime(train, (1, 1))
    demo.write_demo_archives(tmp_path, 1, 1)
    assert train.stat().st_mtime == 1
    demo.write_demo_archives(tmp_path, 2, 1)
    assert len(train_images(tmp_path)) == 2 * len(demo.CLASS_NAMES)


@pytest.mark.parametrize("lost", ARCHIVES)
def test_a_missing_file_is_drawn_again(tmp_path: Path, lost: str) -> None:
    demo.write_demo_archives(tmp_path, 1, 1)
    before = (tmp_path / lost).read_bytes()
    (tmp_path / lost).unlink()
    demo.write_demo_archives(tmp_path, 1, 1)
    assert (tmp_path / lost).read_bytes() == before


def test_an_interrupted_redraw_leaves_no_marker_and_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo.write_demo_archives(tmp_path, 1, 1)

    def power_cut(count: int) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(demo, "_validation_images", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        demo.write_demo_archives(tmp_path, 2, 1)
    assert {path.name for path in tmp_path.iterdir()} == {*ARCHIVES, demo.DEMO_MARKER}
    monkeypatch.undo()
    demo.write_demo_archives(tmp_path, 2, 1)  # and continues, since the files are ours
    assert len(train_images(tmp_path)) == 2 * len(demo.CLASS_NAMES)


@pytest.mark.parametrize("marker", [None, "{}", "notes on a demo"])
@pytest.mark.parametrize("name", [*ARCHIVES, "train", "ILSVRC"])
def test_data_of_another_user_is_never_overwritten(tmp_path: Path, name: str, marker: str | None) -> None:
    """`make preprocess RAW_DIR=/data/ilsvrc2012` without an experiment, in any layout."""
    (tmp_path / name).write_bytes(b"the real one")
    if marker is not None:
        (tmp_path / demo.DEMO_MARKER).write_text(marker)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=rf"has {name}, which the demo did not draw.*experiment=resnet50_imagenet"):
        demo.write_demo_archives(tmp_path, 1, 1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_marker_has_the_drawn_counts(archives: Path) -> None:
    assert json.loads((archives / demo.DEMO_MARKER).read_text()) == {
        "version": demo.VERSION,
        "train_images_per_class": TRAIN_COUNT,
        "validation_images_per_class": VALIDATION_COUNT,
    }


@pytest.mark.parametrize("counts", [(0, 1), (1, 0)])
def test_an_empty_set_is_refused(tmp_path: Path, counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        demo.write_demo_archives(tmp_path, *counts)
