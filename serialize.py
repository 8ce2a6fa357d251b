"""A run's evaluated weights -> ONNX files: python serialize.py run_dir=runs/demo"""

import hydra
from omegaconf import DictConfig

from recipe.config.compose import one_job, run_command, stage_config
from recipe.document.render import check_document, write_document
from recipe.run.directory import Run
from recipe.run.files import display_path, portable_path
from recipe.stages.serialize import serialize_run


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(_composed: DictConfig) -> None:
    """Export the variants, compare each with PyTorch, and add the result to the run's document."""
    with one_job():
        config = stage_config(own_group="serialization")
        run = Run(config.run_dir)
        check_document(run)
        record = serialize_run(config)
        write_document(run, portable_path(config.run_dir))
        for entry in record.variants:
            print(
                f"{entry.variant}: top-1 {entry.correct_top1 / record.images:.2%} (PyTorch "
                f"{record.eager_correct_top1 / record.images:.2%}), {entry.flips} of {record.images} predictions "
                f"differ, logits within {entry.relative_logit_error:.1e} of the largest: {entry.file}"
            )
        print(f"wrote {display_path(run.document)}")


if __name__ == "__main__":
    run_command(main)
