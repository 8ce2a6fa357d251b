"""A run directory -> top-1 and top-5 on all validation images: python evaluate.py run_dir=runs/demo"""

import hydra
from omegaconf import DictConfig

from recipe.config.compose import evaluation_config, one_job, run_command
from recipe.distributed import launch
from recipe.document.render import check_document, write_document
from recipe.models.pretrained import published_config
from recipe.run.directory import Run
from recipe.run.files import display_path, portable_path
from recipe.stages.evaluate import evaluate_run


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    """Evaluate the run's checkpoint, an exported model or published weights, and add the metrics to the document."""
    with one_job():
        config = evaluation_config(composed)
        if config.evaluation.weights is not None:
            config = published_config(config)
        run = Run(config.run_dir)
        check_document(run)
        record = launch(evaluate_run, config)
        if record is not None:  # the first process
            write_document(run, portable_path(config.run_dir))
            for within, correct in ((1, record.correct_top1), (5, record.correct_top5)):
                share = f"{correct / record.images:.2%} ({correct} of {record.images})"
                published = record.published.get(f"top{within}_accuracy")
                beside = "" if published is None else f"; published {published:.3%}"
                print(f"top-{within} {share}, {record.protocol.name}{beside}")
            print(f"wrote {display_path(run.document)}")


if __name__ == "__main__":
    run_command(main)
