"""Compare several classifiers on the same pictures, in one or more vision-language spaces: one table, one figure, one order.

accelerate launch recipes/compare.py --config configs/compare_demo.yaml
"""

from __future__ import annotations

from collections.abc import Sequence

from singreg.evaluation.compare import Comparing, dry_run
from singreg.evaluation.compare_bench import CompareBench
from singreg.evaluation.compare_config import parse_compare
from singreg.workbench.run import Run, explained, make_accelerator


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, look at every head, embed in every space, measure every model, compare, report."""
    config = parse_compare(arguments, description=__doc__ or "")
    accelerator = make_accelerator(seed=config.seed)
    with explained():
        run = Run(config, accelerator, "compare")
        if config.dry_run:
            dry_run(config, CompareBench.build(config, accelerator))
            return
        run.check()
        bench = CompareBench.build(config, accelerator)
        run.open()
    with run.guarded():
        job = Comparing(run, config, bench)
        job.measure()
        job.report()
    accelerator.end_training()


if __name__ == "__main__":
    main()
