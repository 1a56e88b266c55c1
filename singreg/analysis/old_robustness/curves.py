"""From rows (picture, target) to curves, areas, intervals and matrices of a robustness measurement, exact over processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from singreg.analysis.old_steering.curves import INTERVAL, mean_height
from singreg.analysis.old_steering.plan import SteeringRows
from singreg.analysis.old_steering.results import Matrix
from singreg.analysis.results import Rows
from singreg.analysis.old_robustness.attacks import MAXIMISER, SINGLE, Attack, Grids
from singreg.analysis.old_robustness.reachable import Reach
from singreg.analysis.old_robustness.results import FIGURES, RobustnessCurve, SuccessMatrix
from singreg.analysis.statistics import resampled_means
from singreg.utils import all_reduce_sum, gather_rows

CELLS = ("success", "AS", "eligible", "rows")


class Tables:
    """Sums and maxima by picture, and sums by (source, target), pairs (S, K); a picture's targets may come in several chunks."""

    def __init__(self, attacks: Sequence[Attack], judges: Sequence[str], pairs: Tensor) -> None:
        self._columns: list[Rows] = []
        self._index = np.zeros(0, dtype=np.int64)
        self._open: dict[str, Tensor] = {}
        # made at once, so that a process without pictures adds its zeros too
        self._cells = {
            f"{attack.name}|{attack.crafted_on}|{judge}": torch.stack([pairs * 0] * len(CELLS))
            for attack in attacks if attack.name in (SINGLE, MAXIMISER)
            for judge in judges
        }  # fmt: skip

    def begin(self, index: np.ndarray) -> None:
        """Pictures (b,) of a batch, by their places in the part."""
        self._index, self._open = index, {}

    def add(self, key: str, values: Tensor, image: Tensor) -> None:
        """Sum values (R, k) by picture; image (R,) is each row's place in the batch."""
        sums = self._open.setdefault(key, values.new_zeros(len(self._index), values.shape[1]))
        sums.index_add_(0, image, values)

    def largest(self, key: str, values: Tensor, image: Tensor) -> None:
        """Maximum of values (R, k) >= 0 by picture."""
        most = self._open.setdefault(key, values.new_zeros(len(self._index), values.shape[1]))
        most.scatter_reduce_(0, image[:, None].expand_as(values), values, "amax")

    def cell(self, key: str, values: Tensor, rows: SteeringRows) -> None:
        """Sum values (4, R) by source and target."""
        table = self._cells[key]
        table.flatten(1).index_add_(1, rows.source * table.shape[2] + rows.target, values)

    def end(self) -> None:
        """The batch is done."""
        if len(self._index):
            self._columns.append({"index": self._index, **{key: value.cpu().numpy() for key, value in self._open.items()}})

    def gathered(self) -> tuple[Rows, dict[str, Tensor]]:
        """Of all processes: columns (N, k) in the order of the pictures, cells (4, S, K)."""
        return gather_rows(self._columns, sort_by="index"), {key: all_reduce_sum(table) for key, table in self._cells.items()}


def curves_of(rows: Rows, attacks: Sequence[Attack], grids: Grids, judges: Sequence[str], *, drop_null: bool) -> list[RobustnessCurve]:
    """A curve for every attack, kind of budget, judge and defence; rows (N, k) as `_Target` fills them."""
    return [
        _curve(rows, attack, budget, grids.of(budget), judge, defence)
        for attack in attacks
        for budget in attack.budgets
        for defence in (["", "drop_null"] if drop_null and attack.tolerance is not None else [""])
        for judge in judges
    ]


def _curve(rows: Rows, attack: Attack, budget: str, grid: list[float], judge: str, defence: str) -> RobustnessCurve:
    key, places = f"{attack.name}|{attack.crafted_on}|{budget}", range(len(grid))
    read = np.stack([rows[f"{key}|{defence}|{judge}|{place}"] for place in places], axis=2)  # (N, 4, G)
    kept, similarity, change, longest = (
        np.concatenate([rows[f"{key}|{name}|{place}"] for place in places], axis=1)
        for name in ("kept", "similarity", "change", "longest")
    )
    sums = np.concatenate([read, kept[:, None], similarity[:, None]], axis=1).reshape(len(read), -1)
    counts = np.concatenate([rows[f"{defence}|{judge}|eligible"], rows["rows"]], axis=1)
    mean, resampled = _ratios(np.concatenate([sums, counts], axis=1), len(grid))
    bands = _quantiles(resampled)
    area, area_bands = mean_height(mean, grid), _quantiles(mean_height(resampled, grid))
    return RobustnessCurve(
        attack=attack.name,
        crafted_on=attack.crafted_on,
        judge=judge,
        defence=defence,
        budget=budget,
        grid=grid,
        figures={name: [_plain(v) for v in mean[place]] for place, name in enumerate(FIGURES)},
        intervals={name: [[_plain(v) for v in ends] for ends in bands[:, place].T] for place, name in enumerate(FIGURES)},
        area={name: [_plain(v) for v in (area[place], *area_bands[:, place])] for place, name in enumerate(FIGURES)},
        logit_change=[float(value) for value in change.max(0)],
        longest=[float(value) for value in longest.max(0)],
        tolerance=attack.tolerance,
    )


def _ratios(columns: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Figures (6, G) and their draws (resamples, 6, G): ratios of sums over pictures, both successes over the eligible, others over all."""
    both = np.concatenate([columns.mean(0, keepdims=True), resampled_means(columns.astype(np.float64))])
    sums, eligible, count = both[:, :-2].reshape(len(both), len(FIGURES), points), both[:, -2, None, None], both[:, -1, None, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.concatenate([sums[:, :2] / eligible, sums[:, 2:] / count], axis=1)
    return ratios[0], ratios[1:]


def _quantiles(draws: np.ndarray) -> np.ndarray:
    """The 95 % interval over draws (B, ...) that are defined: (2, ...), NaN where none is."""
    defined = ~np.isnan(draws).all(0)
    ends = np.full((2, *draws.shape[1:]), np.nan)
    ends[:, defined] = np.nanquantile(draws[:, defined], INTERVAL, axis=0)
    return ends


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def limit_success(rows: Rows, attacks: Sequence[Attack], judges: Sequence[str]) -> dict[str, float | None]:
    """Success of the maximiser at the largest budget among what is reachable, crafted on and judged by each translator; rows (N, k)."""
    found: dict[str, float | None] = {}
    for attack in attacks:
        if attack.name != MAXIMISER or attack.crafted_on not in judges:
            continue
        key = f"{attack.name}|{attack.crafted_on}|step||{attack.crafted_on}"
        last = max(int(name.rsplit("|", 1)[1]) for name in rows if name.startswith(f"{key}|"))
        reachable = rows[f"{attack.crafted_on}|reachable"].sum()
        found[attack.crafted_on] = float(rows[f"{key}|{last}"][:, 0].sum() / reachable) if reachable else None
    return found


def reachable_share(rows: Rows, reach: Mapping[str, Reach]) -> dict[str, float | None]:
    """By judge, the share of the eligible that a null displacement of any length puts first; None of networks; rows (N, k)."""
    shares: dict[str, float | None] = {}
    for judge, directions in reach.items():
        eligible = rows[f"|{judge}|eligible"].sum()
        shares[judge] = float(rows[f"{judge}|reachable"].sum() / eligible) if eligible and directions.basis is not None else None
    return shares


def matrices_of(cells: dict[str, Tensor], attacks: Sequence[Attack], judges: Sequence[str], step: float) -> list[SuccessMatrix]:
    """Success, AS and counts by source and target at one relative step; cells (4, S, K) by attack, translator and judge."""
    found = []
    for attack in attacks:
        for judge in judges:
            table = cells.get(f"{attack.name}|{attack.crafted_on}|{judge}")
            if attack.name not in (SINGLE, MAXIMISER) or table is None:
                continue
            success, gained, eligible, rows = table.cpu()
            found.append(
                SuccessMatrix(
                    attack=attack.name, crafted_on=attack.crafted_on, judge=judge, step=step,
                    success=_matrix(success / eligible), AS=_matrix(gained / rows), rows=_matrix(torch.where(rows > 0, rows, torch.nan)),
                )
            )  # fmt: skip
    return found


def _matrix(values: Tensor) -> Matrix:
    return [[_plain(value) for value in row] for row in values.tolist()]
