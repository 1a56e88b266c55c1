"""How long the concept level takes and how much memory: N simulated features through removal, translation and scores.

OMP_NUM_THREADS=2 python tests/benchmarks/concept_speed.py

The default is 50,000 and 100,000 features (m = 2048), a 768-d space, 1,000 classes and 1,200 texts (the classes' and 200 more),
overall and by class. Each count runs in a process of its own, so that its peak memory is its own. Drawing the features and
their logits is timed apart: it stands for reading them from the cache. Processor seconds (of all threads) are printed too,
since wall seconds mean little on a machine that does other things.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from singreg.analysis.concepts import analyze_concepts
from singreg.analysis.features import STORED_BATCH, FeatureBatch
from singreg.nullspace import NullSpace
from singreg.translator import LinearTranslator

FEATURES, DIM, CLASSES, EXTRA = 2048, 768, 1000, 200


class Simulated:
    """Batches of features around class means, drawn one at a time; `seconds` is what drawing them took."""

    def __init__(self, count: int, weight: torch.Tensor) -> None:
        self.count, self.weight, self.seconds = count, weight, 0.0
        self.generator = torch.Generator().manual_seed(1)
        self.means = torch.randn(CLASSES, FEATURES, generator=self.generator)

    def __iter__(self) -> Iterator[FeatureBatch]:
        for start in range(0, self.count, STORED_BATCH):
            begin = time.perf_counter()
            indices = torch.arange(start, min(start + STORED_BATCH, self.count))
            labels = indices % CLASSES
            f = torch.randn(len(indices), FEATURES, generator=self.generator).add_(self.means[labels]).relu_()
            batch = FeatureBatch(f, f @ self.weight.T, torch.zeros(len(indices), DIM), labels, indices)
            self.seconds += time.perf_counter() - begin
            yield batch


def run(count: int) -> None:
    """Measure once and print seconds and peak memory."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(CLASSES, FEATURES, generator=g)
    translator = LinearTranslator(
        torch.randn(DIM, FEATURES, generator=g) / FEATURES**0.5, torch.randn(DIM, generator=g)
    )
    texts = torch.randn(CLASSES + EXTRA, DIM, generator=g)
    names = [f"class {place}" for place in range(CLASSES)]
    simulated = Simulated(count, weight)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin, work = time.perf_counter(), time.process_time()
    space = NullSpace.from_weight(weight)
    head = time.perf_counter() - begin
    concepts = [*names, *(f"concept {place}" for place in range(EXTRA))]
    found = analyze_concepts(simulated, concepts, texts, null_space=space, translator=translator, class_names=names)
    seconds, work = time.perf_counter() - begin, time.process_time() - work
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert found.images == count
    print(
        f"{count} features x {len(texts)} texts, {torch.get_num_threads()} threads: {seconds - simulated.seconds:.1f} s "
        f"(of which head {head:.1f} s; drawing the features {simulated.seconds:.1f} s besides; {work:.0f} processor seconds in all), "
        f"peak memory {peak / 1024:.0f} MiB (before the analysis {before / 1024:.0f} MiB)",
        flush=True,
    )


def main() -> None:
    """One process a count: N and 2N."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--count", type=int, default=50_000, help="features in the first run; the second has twice as many"
    )
    parser.add_argument("--alone", action="store_true", help="run --count only, in this process")
    arguments = parser.parse_args()
    if arguments.alone:
        run(arguments.count)
        return
    for count in (arguments.count, 2 * arguments.count):
        subprocess.run([sys.executable, __file__, "--count", str(count), "--alone"], check=True)


if __name__ == "__main__":
    main()
