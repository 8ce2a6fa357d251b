"""A run takes a preprocessed data set as its own: same settings, and a copy of the Data chapter.

Data belongs to the data directory, the configuration to the run: many experiments share one data set, and each of
their documents has the whole Data chapter.
"""

from __future__ import annotations

from pathlib import Path

from recipe.config.identity import differences
from recipe.config.schema import DataConfig
from recipe.data.processing import RECORD, data_settings
from recipe.data.shards import Manifest, manifest_sha256, read_manifest
from recipe.errors import UserError
from recipe.provenance import PATCHES
from recipe.records import PreprocessingRecord, from_json
from recipe.run import Run, shown_path, write_atomically


def adopt_data_set(data: DataConfig, run: Run | None = None) -> tuple[Manifest, str]:
    """The manifest of `data.directory` and its hash; copies the preprocessing record into `run`, if one is given.

    Raises `UserError` where there is no data set, or one that was made with other settings.
    """
    manifest = read_manifest(data.directory)
    changed = differences(manifest.settings, data_settings(data))
    if changed:
        raise UserError(
            f"{shown_path(data.directory)} was made with other settings ({'; '.join(changed)}); "
            "give the same ones, or preprocess into another data.directory"
        )
    digest = manifest_sha256(data.directory)
    if run is not None:
        bring_record(run, Path(data.directory), _record(Path(data.directory), digest))
    return manifest, digest


def require_same_data_set(what: str, trained_on: str, found: str, data: DataConfig) -> None:
    """Weights are measured on the data set that they were trained on; both are given as hashes of manifests."""
    if trained_on != found:
        raise UserError(
            f"{what} was trained on another data set (manifest {trained_on[:16]}) than "
            f"{shown_path(data.directory)} holds ({found[:16]}); give data.directory= of the right one"
        )


def bring_record(run: Run, directory: Path, record: PreprocessingRecord) -> None:
    """Copy the Data chapter's record into a run, with the patches that it names."""
    run.write(record)
    for tree in (record.provenance.tree_at_start, record.provenance.tree_at_end):
        if tree.patch_sha256 is not None:
            patch = run.patch_file(tree.patch_sha256)
            if (directory / PATCHES / patch.name).exists():  # the hash says enough where somebody removed it
                write_atomically(patch, (directory / PATCHES / patch.name).read_bytes())


def _record(directory: Path, digest: str) -> PreprocessingRecord:
    path = directory / RECORD
    if not path.exists():
        raise UserError(
            f"{shown_path(path)} is missing: run `python preprocess.py` again, which makes the data set anew"
        )
    record = from_json(path.read_bytes(), PreprocessingRecord, shown_path(path))
    if record.outputs.get("manifest") != digest:
        raise UserError(
            f"{shown_path(path)} belongs to another manifest than the one beside it: run `python preprocess.py` again"
        )
    return record
