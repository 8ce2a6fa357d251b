"""The facts of ILSVRC2012 against independent sources."""

from __future__ import annotations

from hashlib import sha256

from torchvision.datasets import imagenet as torchvision_imagenet

from recipe.preprocessing import imagenet

FIRST_AND_LAST = ("n01440764", "n15075141")


def test_names_and_md5_sums_are_those_of_torchvision() -> None:
    assert dict(torchvision_imagenet.ARCHIVE_META.values()) == imagenet.PUBLISHED_MD5


def test_the_class_list_hash_is_over_lines() -> None:
    assert imagenet.class_list_sha256(["a", "b"]) == sha256(b"a\nb").hexdigest()


def test_names_need_the_full_list_of_classes() -> None:
    assert imagenet.published_class_names(FIRST_AND_LAST) == {}


def test_the_known_unusual_images_are_expected() -> None:
    cmyk = [("train", f"n00000000_{number}", "CMYK JPEG") for number in range(22)]
    known = [*cmyk, ("val", "ILSVRC2012_val_00019877", "CMYK JPEG"), ("train", "n02105855_2933", "PNG not named .png")]
    assert imagenet.unexpected(known) == []
    assert imagenet.unexpected(known[1:]) == ["CMYK training images: found 21, known are 22"]
    assert len(imagenet.unexpected([])) == 3
    endless = ("val", "ILSVRC2012_val_00000001", "JPEG without an end marker")
    assert imagenet.unexpected([*known, endless]) == [
        "other converted images: found ['ILSVRC2012_val_00000001: JPEG without an end marker'], known are []"
    ]
