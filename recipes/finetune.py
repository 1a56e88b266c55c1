"""Fine-tune a classifier with SingLoss and report AS/IS before and after, next to a plain fine-tuning control.

accelerate launch recipes/finetune.py --config configs/demo.yaml
"""

from __future__ import annotations

from collections.abc import Sequence

from singreg.training.config import parse_finetune
from singreg.training.experiment import Experiment
from singreg.training.finetuning import Finetuning, dry_run
from singreg.training.stages import FinetuneRun
from singreg.workbench.run import explained, make_accelerator


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, build, measure before, train both arms, measure after, report."""
    config = parse_finetune(arguments, description=__doc__ or "")
    accelerator = make_accelerator(
        seed=config.seed, mixed_precision=config.training.mixed_precision, accumulation=config.training.accumulation
    )
    with explained():
        run = FinetuneRun(config, accelerator)
        if config.dry_run:
            dry_run(Experiment.build(config, accelerator))
            return
        run.check()
        experiment = Experiment.build(config, accelerator)
        run.open()
    with run.guarded():
        job = Finetuning(run, experiment)
        job.measure_before()
        for arm in ["control", "sing"] if config.training.control else ["sing"]:
            job.train_and_measure(arm)
        job.report()
    accelerator.end_training()


if __name__ == "__main__":
    main()
