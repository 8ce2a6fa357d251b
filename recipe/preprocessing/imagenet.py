"""Published facts about ILSVRC2012, for `data.expect=ilsvrc2012`.

Labels follow the sorted WNIDs: n01440764 (tench) is 0, n15075141 (toilet tissue) is 999. That is the order of
torchvision's, timm's and all published weights, and *not* the ILSVRC2012_ID of the devkit, used here only to read the
devkit's ground truth.

Sources: names and md5 sums from torchvision/datasets/imagenet.py (a test compares them with the installed one), counts
from Russakovsky et al., arXiv 1409.0575, table 2, the hash of the class list from timm's imagenet_synsets.txt (timm
1.0.31).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VALIDATION_ARCHIVE = "ILSVRC2012_img_val.tar"
DEVKIT_ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"
DEVKIT_FOLDER = "ILSVRC2012_devkit_t12"
PUBLISHED_MD5 = {
    TRAIN_ARCHIVE: "1d675b47d978889d74fa0da5fadfb00e",
    VALIDATION_ARCHIVE: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT_ARCHIVE: "fa75699e90414af021442c21a62c3abf",
}
IMAGES = {"train": 1_281_167, "val": 50_000}
VALIDATION_IMAGES_PER_CLASS = 50
CLASSES = 1000
CLASS_LIST_SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"

WORDNET_LABEL_CONVENTION = "position among the sorted WordNet IDs, counted from 0 (not the devkit's ILSVRC2012_ID)"
WHERE_TO_GET = (
    "register at image-net.org and download the ILSVRC2012 archives, or join the Kaggle competition "
    "imagenet-object-localization-challenge"
)

# The first validation labels of Caffe's ilsvrc12 val.txt (2013). Unlike counts, they detect another order of the
# classes, such as the devkit's, and a shifted ground truth.
FIRST_VALIDATION_LABELS = (65, 970, 230, 809, 516, 57)

# Known images with another format than their name. Every file is checked, so nothing depends on this
# list. A difference on ILSVRC2012 is printed. PNG: tensorflow/tpu's imagenet_to_gcs.py, which also lists
# the 22 CMYK training images. The one CMYK image of the validation set: pytorch/vision#6538.
KNOWN_PNG = ("n02105855_2933",)
KNOWN_CMYK_VALIDATION = ("ILSVRC2012_val_00019877",)
KNOWN_CMYK_TRAINING_IMAGES = 22
KNOWN_WARNINGS = ("stray bytes", "unknown Adobe code")  # of libjpeg, about images without damage


def class_list_sha256(class_ids: Sequence[str]) -> str:
    """SHA-256 of a list of classes in its order: one ID a line, without a final newline."""
    return hashlib.sha256("\n".join(class_ids).encode()).hexdigest()


def published_class_names(class_ids: Sequence[str]) -> dict[str, str]:
    """WNID -> name from torchvision's published weights for the 1000 classes. Empty for other classes."""
    if class_list_sha256(class_ids) != CLASS_LIST_SHA256:
        return {}
    from torchvision.models import ResNet50_Weights  # imports torch, which is not needed with a devkit

    return dict(zip(class_ids, ResNet50_Weights.IMAGENET1K_V2.meta["categories"], strict=True))


def unexpected(images: Sequence[tuple[str, str, str]]) -> list[str]:
    """Differences between the converted images (split, key, kind) of a full ILSVRC2012 and the known ones."""
    png = sorted(key for _, key, kind in images if kind.startswith("PNG"))
    cmyk_validation = sorted(key for split, key, kind in images if split == "val" and kind.startswith("CMYK"))
    cmyk_training = sum(split == "train" and kind.startswith("CMYK") for split, _, kind in images)
    others = sorted(
        f"{key}: {kind}" for _, key, kind in images if not kind.startswith(("PNG", "CMYK", *KNOWN_WARNINGS))
    )
    expectations: list[tuple[str, object, object]] = [
        ("PNG files named .JPEG", png, list(KNOWN_PNG)),
        ("CMYK validation images", cmyk_validation, list(KNOWN_CMYK_VALIDATION)),
        ("CMYK training images", cmyk_training, KNOWN_CMYK_TRAINING_IMAGES),
        ("other converted images", others, []),
    ]
    return [f"{what}: found {here}, known are {known}" for what, here, known in expectations if here != known]
