"""Arms × seeds from one file: which null-space loss, edit or baseline does what, by the auditor; one table, one figure.

accelerate launch recipes/study.py --config configs/study_scenes.yaml
"""

from __future__ import annotations

from collections.abc import Sequence

from singreg.training.experiment import Experiment
from singreg.training.study import Study, dry_run
from singreg.training.study_config import parse_study
from singreg.training.study_store import StudyRun
from singreg.workbench.run import explained, make_accelerator


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, build, make and measure every arm that is not finished, report."""
    config = parse_study(arguments, description=__doc__ or "")
    accelerator = make_accelerator(
        seed=config.seed, mixed_precision=config.training.mixed_precision, accumulation=config.training.accumulation
    )
    with explained():
        run = StudyRun(config, accelerator, "study")
        run.check()
        experiment = Experiment.build(config, accelerator)
        if config.dry_run:
            dry_run(config, experiment)
            return
        study = Study(run, experiment)
        run.open()
    with run.guarded():
        study.run_arms()
        study.report()
    accelerator.end_training()


if __name__ == "__main__":
    main()
