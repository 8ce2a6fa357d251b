"""The demo: a small image set drawn by the project and packed like ILSVRC2012.

The demo runs the code that reads the real ImageNet, without a download. So the images of `painting` are written as the
three archives of the ILSVRC2012 release with their quirks: a tar of class tars, a flat validation tar, and a devkit
with ILSVRC2012_IDs in another order than the sorted WNIDs.

Each image is a pure function of (split, class, number), and archives have no time or owner, so drawing again gives the
same bytes.
"""

import contextlib
import gzip
import io
import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from scipy.io import savemat

from recipe.errors import UserError
from recipe.preprocessing.imagenet import DEVKIT_ARCHIVE, DEVKIT_FOLDER, TRAIN_ARCHIVE, VALIDATION_ARCHIVE
from recipe.preprocessing.painting import CLASS_NAMES, VERSION, jpeg
from recipe.run.files import display_path, temporary_sibling

DEMO_MARKER = "demo.json"
DRAWING = b"being drawn"
ARCHIVES = (TRAIN_ARCHIVE, VALIDATION_ARCHIVE, DEVKIT_ARCHIVE)
REAL_DATA = (*ARCHIVES, DEVKIT_FOLDER, "train", "val", "ILSVRC")  # in a raw_dir of the real images

_TRAIN, _VALIDATION, _SHUFFLE = range(3)  # first word of the seeds


# ---- the ILSVRC2012 layout -------------------------------------------------------------------------


def _wnid(class_index: int) -> str:
    return f"n9{class_index + 1:07d}"


def _ilsvrc_id(class_index: int) -> int:
    """A permutation of 1..12 that moves every class, to detect code that mistakes IDs for sorted WNIDs."""
    return (5 * class_index + 3) % len(CLASS_NAMES) + 1


def _validation_order(count: int) -> list[tuple[int, int]]:
    """(class, number) of each validation image, in the order of the file names."""
    pairs = [(index, number) for index in range(len(CLASS_NAMES)) for number in range(1, count + 1)]
    order = np.random.default_rng([VERSION, _SHUFFLE, count]).permutation(len(pairs))
    return [pairs[place] for place in order]


def _write_tar(stream: IO[bytes] | gzip.GzipFile, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar of equal bytes for equal members: TarInfo has no owner and time 0 by default."""
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _class_tars(count: int) -> Iterator[tuple[str, bytes]]:
    for index in range(len(CLASS_NAMES)):
        wnid, stream = _wnid(index), io.BytesIO()
        _write_tar(stream, ((f"{wnid}_{number}.JPEG", jpeg(_TRAIN, index, number)) for number in range(1, count + 1)))
        yield f"{wnid}.tar", stream.getvalue()


def _validation_images(count: int) -> Iterator[tuple[str, bytes]]:
    for place, (index, number) in enumerate(_validation_order(count), start=1):
        yield f"ILSVRC2012_val_{place:08d}.JPEG", jpeg(_VALIDATION, index, number)


# Readers such as torchvision's find columns by position.
_SYNSET_FIELDS = [
    *("ILSVRC2012_ID", "WNID", "words", "gloss"),
    *("num_children", "children", "wordnet_height", "num_train_images"),
]


def _synset(number: int, wnid: str, words: str, children: list[int], train_count: int) -> tuple[object, ...]:
    """A row of the devkit's table, with doubles as in MATLAB."""
    gloss, height = f"{words}, drawn by a program", float(bool(children))
    below = np.array(children, dtype=np.float64).reshape(1, -1)
    return (float(number), wnid, words, gloss, float(len(children)), below, height, float(train_count))


def _synsets(train_count: int) -> NDArray[np.void]:
    """The devkit's table in the order of the IDs: the classes, then their parent nodes as in the real one."""
    classes = sorted(range(len(CLASS_NAMES)), key=_ilsvrc_id)
    rows = [_synset(_ilsvrc_id(index), _wnid(index), CLASS_NAMES[index], [], train_count) for index in classes]
    rows.append(_synset(len(rows) + 1, "n99999999", "drawing", [_ilsvrc_id(index) for index in classes], 0))
    return np.array(rows, dtype=[(field, object) for field in _SYNSET_FIELDS]).reshape(-1, 1)


def _meta_mat(train_count: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "meta.mat"
        savemat(path, {"synsets": _synsets(train_count)}, oned_as="row")
        content = path.read_bytes()
    # The first 116 bytes are free text. savemat writes the date there.
    return b"MATLAB 5.0 MAT-file, drawn demonstration data".ljust(116) + content[116:]


def _devkit_files(train_count: int, validation_count: int) -> Iterator[tuple[str, bytes]]:
    folder = "ILSVRC2012_devkit_t12/data"
    truth = "".join(f"{_ilsvrc_id(index)}\n" for index, _ in _validation_order(validation_count))
    yield f"{folder}/meta.mat", _meta_mat(train_count)
    yield f"{folder}/ILSVRC2012_validation_ground_truth.txt", truth.encode()


# ---- writing ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream to a temporary file that is renamed to `path` when complete."""
    with temporary_sibling(path) as temporary:
        with temporary.open("wb") as stream:
            yield stream
        temporary.replace(path)


def _is_current(directory: Path, marker: str) -> bool:
    """True if all archives are complete: the marker is written after them."""
    path = directory / DEMO_MARKER
    complete = path.is_file() and all((directory / name).is_file() for name in ARCHIVES)
    return complete and path.read_text() == marker


def _check_no_real_data(directory: Path) -> None:
    """Raise `UserError` if the folder has real archives: they have the names of the drawn ones."""
    present = [name for name in REAL_DATA if (directory / name).exists()]
    if present and not _is_ours(directory / DEMO_MARKER):
        raise UserError(
            f"data.raw_dir={display_path(directory)} has {present[0]}, which the demo did not draw and would "
            "overwrite or mix with its own; leave data.raw_dir (RAW_DIR=) out, give another one, or name the "
            "experiment of these images: experiment=resnet50_imagenet"
        )


def _is_ours(path: Path) -> bool:
    """True for the marker of a finished or an interrupted drawing."""
    content = path.read_bytes() if path.is_file() else b""
    return content == DRAWING or b'"train_images_per_class"' in content


def _draw(directory: Path, train_count: int, validation_count: int) -> None:
    with _replacing(directory / TRAIN_ARCHIVE) as stream:
        _write_tar(stream, _class_tars(train_count))
    with _replacing(directory / VALIDATION_ARCHIVE) as stream:
        _write_tar(stream, _validation_images(validation_count))
    with _replacing(directory / DEVKIT_ARCHIVE) as stream, gzip.GzipFile("", "wb", fileobj=stream, mtime=0) as packed:
        _write_tar(packed, _devkit_files(train_count, validation_count))


def write_demo_archives(directory: Path, train_images_per_class: int, validation_images_per_class: int) -> None:
    """Draw the data set into `directory`, unless it is there already."""
    if min(train_images_per_class, validation_images_per_class) < 1:
        raise ValueError("the demo needs at least one training and one validation image per class")
    marker = json.dumps(
        {
            "version": VERSION,
            "train_images_per_class": train_images_per_class,
            "validation_images_per_class": validation_images_per_class,
        }
    )
    if _is_current(directory, marker):
        return
    directory.mkdir(parents=True, exist_ok=True)
    _check_no_real_data(directory)
    with _replacing(directory / DEMO_MARKER) as stream:
        stream.write(DRAWING)  # marks the files as ours, but not as complete
    _draw(directory, train_images_per_class, validation_images_per_class)
    with _replacing(directory / DEMO_MARKER) as stream:
        stream.write(marker.encode())
