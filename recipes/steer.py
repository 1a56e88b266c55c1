"""Steer a classifier's features through its null space towards other prompts, at a fixed image score and at equal effort.

accelerate launch recipes/steer.py --config configs/steer_demo.yaml
accelerate launch recipes/steer.py --config configs/steer_pixels_scenes.yaml      (several classifiers, attacked in pixels)

pixel options: --attack pixels --help
"""

from __future__ import annotations

from collections.abc import Sequence

from singreg.evaluation.steer import Steering, SteeringBench, dry_run
from singreg.evaluation.steer_config import parse_steer
from singreg.evaluation.steer_pixels import attack_pixels
from singreg.evaluation.steer_pixels_config import asks_for_pixels
from singreg.workbench.run import Run, explained, make_accelerator


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, build, fit two translators, measure, steer, report."""
    if asks_for_pixels(arguments):
        attack_pixels(arguments, description=__doc__ or "")
        return
    config = parse_steer(arguments, description=__doc__ or "")
    accelerator = make_accelerator(seed=config.seed)
    with explained():
        run = Run(config, accelerator, "steer")
        if config.dry_run:
            dry_run(config, SteeringBench.build(config, accelerator))
            return
        run.check()
        bench = SteeringBench.build(config, accelerator)
        run.open()
    with run.guarded():
        job = Steering(run, config, bench)
        job.fit_translators()
        job.measure()
        job.steer()
        job.report()
    accelerator.end_training()


if __name__ == "__main__":
    main()
