"""Raw images -> shards, index and manifest in the data directory: python preprocess.py experiment=demo"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from recipe.config.compose import job_config, one_job, run_command
from recipe.data.manifest import copy_record
from recipe.document.render import check_document, write_document
from recipe.preprocessing.pipeline import preprocess
from recipe.run.directory import Run, append_to_journal
from recipe.run.files import display_path, portable_path
from recipe.run.launcher import launched


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    """Preprocess the experiment's data set and begin its document."""
    with one_job():
        config, launch = job_config(composed), launched()
        if not launch.is_rank0:  # under torchrun: make a share of the shards, rank 0 writes the run
            preprocess(config, launch)
            return
        run = Run(config.run_dir)
        check_document(run)
        append_to_journal(run, "preprocess", "started", name=config.name)
        record = preprocess(config, launch)
        copy_record(run, Path(config.data.directory), record)
        append_to_journal(run, "preprocess", "ended", manifest=record.outputs["manifest"])
        write_document(run, portable_path(config.run_dir))
        print(f"wrote {display_path(run.document)}")
        print(f"manifest_sha256 {record.outputs['manifest']}")


if __name__ == "__main__":
    run_command(main)
