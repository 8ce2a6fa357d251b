"""Processed data -> weights in a run directory: python train.py experiment=demo"""

from functools import partial

import hydra
from omegaconf import DictConfig

from recipe.config.compose import job_config, one_job, run_command
from recipe.distributed import launch
from recipe.document.render import check_document, write_document
from recipe.review.watch.command import training_watch
from recipe.run.directory import Run
from recipe.run.files import display_path, portable_path
from recipe.training.fingerprint import leave_fingerprint
from recipe.training.loop import train


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    """Train the experiment, or continue it, and write its document."""
    with one_job():
        config = job_config(composed)
        run = Run(config.run_dir)
        if not config.trainer.start_over:  # which moves the document aside as it is
            check_document(run)
        record = launch(partial(train, after_validation=training_watch(config)), config)
        if record is not None:  # the first process
            leave_fingerprint(run, config, record)
            write_document(run, portable_path(config.run_dir))
            print(f"finished after {record.schedule.steps} steps; wrote {display_path(run.document)}")
            print(f"weights_sha256 {record.outputs['weights']}")


if __name__ == "__main__":
    run_command(main)
