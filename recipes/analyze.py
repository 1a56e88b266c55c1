"""Analyse one classifier: what its null space holds, by model, class, concept and image, beside the level of chance.

accelerate launch recipes/analyze.py --config configs/analyze_demo.yaml
"""

from __future__ import annotations

from collections.abc import Sequence

from singreg.evaluation.analyze import Analysis, AnalysisBench, dry_run
from singreg.evaluation.analyze_config import parse_analyze
from singreg.workbench.run import Run, explained, make_accelerator


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, build, fit translators, measure model level, describe concepts and images, report."""
    config = parse_analyze(arguments, description=__doc__ or "")
    accelerator = make_accelerator(seed=config.seed)
    with explained():
        run = Run(config, accelerator, "analyze")
        if config.dry_run:
            dry_run(config, AnalysisBench.build(config, accelerator))
            return
        run.check()
        bench = AnalysisBench.build(config, accelerator)
        run.open()
    with run.guarded():
        job = Analysis(run, config, bench)
        job.fit_translators()
        job.measure()
        job.describe()
        job.report()
    accelerator.end_training()


if __name__ == "__main__":
    main()
