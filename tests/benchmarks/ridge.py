"""Ridge regression by `RidgeStatistics` against scikit-learn's `Ridge`: time, peak memory, and whether the coefficients agree.

OMP_NUM_THREADS=1 python tests/benchmarks/ridge.py --rows 100000 --features 2048 --targets 768

Features and targets lie on disk in float32. Ours reads them in chunks, as a training loop would hand them over; scikit-learn
needs them in memory, in float64 for coefficients that mean something to 1e-6 (--dtype float32 for its quick way). Each fit is a
process of its own, in turn; memory is the peak above what it held after the imports. λ is the same number for both: scikit-learn's alpha
is our relative ridge times the mean of the centred scatter's diagonal. Aim: 2 times faster, a tenth of the memory, 1e-6.

--ridges 15 fits as many λ, as choosing one needs: ours from one pass and one eigendecomposition, scikit-learn one after the other.
Both compute the same products in float64, so with a single λ (the default) what is saved is half of Σ f fᵀ and the copies.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from paired import machine, memory_mib, ratio_line

CHUNK = 2048
RIDGE = 0.01


def write_data(folder: Path, rows: int, features: int, targets: int) -> None:
    """features.npy (N, m) and targets.npy (N, n): correlated features, and a noisy linear map of them."""
    g = torch.Generator().manual_seed(0)
    mix = torch.eye(features) + 0.5 * torch.randn(features, features, generator=g) / features**0.5
    matrix = torch.randn(targets, features, generator=g) / features**0.5
    shapes = {"features": features, "targets": targets}
    files = {
        n: np.lib.format.open_memmap(folder / f"{n}.npy", mode="w+", dtype=np.float32, shape=(rows, w))
        for n, w in shapes.items()
    }
    for start in range(0, rows, CHUNK):
        f = (torch.randn(min(CHUNK, rows - start), features, generator=g) @ mix).relu_()
        files["features"][start : start + len(f)] = f
        files["targets"][start : start + len(f)] = f @ matrix.T + torch.randn(len(f), targets, generator=g)


def ridges(count: int) -> list[float]:
    """The relative ridges fitted, the compared one last."""
    return [RIDGE * 10 ** (place / 4) for place in range(count)][::-1]


def ours(folder: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(A (n, m), a (n,)) from one pass over the files in chunks, read and not mapped: mapped pages would count as memory."""
    from singreg.ridge import RidgeStatistics

    sources = []
    for name in ("features", "targets"):
        file = open(folder / f"{name}.npy", "rb")  # noqa: SIM115  (open while it streams)
        version = np.lib.format.read_magic(file)
        assert version == (1, 0)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        sources.append((file, shape, dtype))
    (rows, m), n = sources[0][1], sources[1][1][1]
    statistics = RidgeStatistics(m, n)
    for start in range(0, rows, CHUNK):
        size = min(CHUNK, rows - start)
        f, z = (
            torch.from_numpy(np.fromfile(file, dtype, size * shape[1]).reshape(size, -1))
            for file, shape, dtype in sources
        )
        statistics.update(f, z)
    if count == 1:
        solution = statistics.solve(RIDGE)
    else:
        path = statistics.path()
        for ridge in ridges(count):
            solution = path.solve(ridge)
    return solution.matrix.numpy(), solution.offset.numpy()


def scikit_learn(folder: Path, scatter: float, dtype: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The same by `sklearn.linear_model.Ridge` with its default solver."""
    from sklearn.linear_model import Ridge

    # The cast goes by way of a map, so that the float32 array is not held beside the float64 one.
    f, z = (np.array(np.load(folder / f"{name}.npy", mmap_mode="r"), dtype=dtype) for name in ("features", "targets"))
    for ridge in ridges(count):
        fitted = Ridge(alpha=ridge * scatter).fit(f, z)
    return fitted.coef_, fitted.intercept_


def alone(kind: str, folder: Path, dtype: str, count: int) -> None:
    """One fit in this process; its figures go to KIND.json and its coefficients to KIND.npz."""
    from sklearn.linear_model import Ridge  # noqa: F401  (both sides pay for both imports before they are timed)

    import singreg.ridge  # noqa: F401

    _ = torch.randn(64, 64) @ torch.randn(64, 64)
    baseline, wall, work = memory_mib(peak=False), time.perf_counter(), time.process_time()
    scatter = json.loads((folder / "scatter.json").read_text())
    matrix, offset = ours(folder, count) if kind == "ours" else scikit_learn(folder, scatter, dtype, count)
    figures = {
        "wall": time.perf_counter() - wall,
        "work": time.process_time() - work,
        "memory": memory_mib(peak=True) - baseline,
    }
    np.savez(folder / f"{kind}.npz", matrix=matrix, offset=offset)
    (folder / f"{kind}.json").write_text(json.dumps(figures))


def scatter_mean(folder: Path) -> float:
    """tr(S)/m of the centred scatter, in float64, chunk by chunk: what turns a relative ridge into scikit-learn's alpha."""
    f = np.load(folder / "features.npy", mmap_mode="r")
    total, square = np.zeros(f.shape[1]), np.zeros(f.shape[1])
    for start in range(0, len(f), CHUNK):
        chunk = f[start : start + CHUNK].astype(np.float64)
        total += chunk.sum(0)
        square += (chunk * chunk).sum(0)
    return float((square - total**2 / len(f)).mean())


def compare(folder: Path, pairs: int, dtype: str, count: int) -> None:
    """Both in turn, and what they say."""
    measured = []
    options = ["--folder", str(folder), "--dtype", dtype, "--ridges", str(count)]
    for _ in range(pairs):
        for kind in ("ours", "sklearn"):
            subprocess.run([sys.executable, __file__, "--alone", kind, *options], check=True)
        measured.append([json.loads((folder / f"{kind}.json").read_text()) for kind in ("sklearn", "ours")])
    for kind, key in (("clock", "wall"), ("processor seconds", "work")):
        print(
            ratio_line(
                f"scikit-learn ({dtype}) / ours, {kind}", [(theirs[key], mine[key]) for theirs, mine in measured]
            )
        )
    theirs, mine = (max(pair[place]["memory"] for pair in measured) for place in (0, 1))
    share = f"{mine / theirs:.3f}" if theirs > 1 else "too little to compare"
    print(
        f"peak memory above the imports: scikit-learn {theirs:.0f} MiB, ours {mine:.0f} MiB, ours / scikit-learn {share}"
    )
    a, b = np.load(folder / "ours.npz"), np.load(folder / "sklearn.npz")
    for name in ("matrix", "offset"):
        difference = a[name] - b[name]
        relative = np.linalg.norm(difference) / np.linalg.norm(a[name])
        largest = np.abs(difference).max() / np.abs(a[name]).max()
        print(f"{name}: relative difference {relative:.2e} (norm), {largest:.2e} (largest entries)", flush=True)


def main() -> None:
    """Write the data, fit in turn, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--targets", type=int, default=768)
    parser.add_argument("--ridges", type=int, default=1, help="how many λ are fitted")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64", help="scikit-learn's arithmetic")
    parser.add_argument(
        "--folder", type=Path, help="where the data (4 N (m + n) bytes) go while it runs; default a temporary one"
    )
    parser.add_argument("--alone", choices=["ours", "sklearn"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        alone(arguments.alone, arguments.folder, arguments.dtype, arguments.ridges)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_data(folder, arguments.rows, arguments.features, arguments.targets)
        (folder / "scatter.json").write_text(json.dumps(scatter_mean(folder)))
        size = f"{arguments.rows} x {arguments.features} -> {arguments.targets}, {arguments.ridges} λ"
        print(f"ridge fit, {size}; {machine()}", flush=True)
        compare(folder, arguments.pairs, arguments.dtype, arguments.ridges)


if __name__ == "__main__":
    main()
