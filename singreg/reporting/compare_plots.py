"""A comparison's one figure: |AS| against IS of every model in every space, and its rank in every view."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from singreg.analysis.results import PRIMARY
from singreg.analysis.comparing.results import CompareReport, OrderCheck
from singreg.reporting.plots import drawable

WIDTH = 4.6
VIEW_LENGTH = 80  # two names, one above the other


def draw_comparison(report: CompareReport) -> Figure:
    """A panel a space: mean IS over mean |AS| with 95 % intervals (degrees), bubbles by AS⁻; then ranks by AS⁻ in all views."""
    spaces = list(report.measurements)
    names = [head.label for head in report.heads if head.omitted is None]
    colours = dict(zip(names, matplotlib.colormaps["tab20" if len(names) > 10 else "tab10"](np.arange(len(names))), strict=True))
    order = next((found for found in report.orders if found.figure == "AS_neg"), None)
    panels = len(spaces) + (order is not None)
    figure = Figure(figsize=(WIDTH * panels + 2.2, max(4.2, 0.3 * len(names) + 1.5)), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, panels)))
    for panel, space in zip(axes, spaces, strict=False):
        _draw_space(panel, report, space, colours)
    if order is not None:
        _draw_ranks(axes[-1], order, colours)
    handles = [Axes.plot(axes[0], [], [], "o", color=colours[name], label=drawable(name))[0] for name in names]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    images = next((m.images for found in report.measurements.values() for m in found.values()), 0)
    figure.suptitle(f"{images} test pictures, the same for all models; 95 % intervals; area: AS⁻", fontsize=9)
    return figure


def _draw_space(axes: Axes, report: CompareReport, space: str, colours: dict[str, np.ndarray]) -> None:
    found = report.measurements[space]
    translator = PRIMARY if all(PRIMARY in m.translators for m in found.values()) else next(iter(next(iter(found.values())).translators))
    largest = max((m.translators[translator].overall["AS_neg"] for m in found.values()), default=1.0)
    for name, measured in found.items():
        scores = measured.translators[translator]
        x, y = scores.overall["AS_abs"], scores.overall["IS"]
        (left, right), (low, high) = scores.intervals["AS_abs"], scores.intervals["IS"]
        errors = {"xerr": [[max(x - left, 0)], [max(right - x, 0)]], "yerr": [[max(y - low, 0)], [max(high - y, 0)]]}
        axes.errorbar(x, y, **errors, color=colours[name], capsize=2, linewidth=1)  # type: ignore[arg-type]
        axes.scatter(x, y, s=30 + 170 * scores.overall["AS_neg"] / max(largest, 1e-9), color=colours[name], alpha=0.75, zorder=3)
    axes.set(xlabel="mean |AS| °", ylabel="mean IS °", xlim=(0, None), ylim=(0, None))
    axes.set_title(f"{drawable(space)}, by the {translator}", fontsize=10)
    _style(axes)


def _draw_ranks(axes: Axes, order: OrderCheck, colours: dict[str, np.ndarray]) -> None:
    places = np.arange(len(order.views))
    for name, colour in colours.items():
        ranks = [names.index(name) + 1 for names in order.orders]
        axes.plot(places, ranks, "o-", color=colour, linewidth=1.8)
    axes.set_xticks(places, [drawable(view, VIEW_LENGTH).replace(", ", "\n") for view in order.views], fontsize=8)
    axes.set_yticks(np.arange(1, len(colours) + 1))
    axes.set_xlim(-0.4, len(places) - 0.6)
    axes.set_ylim(len(colours) + 0.4, 0.6)
    axes.set_ylabel("rank by AS⁻, 1 leaks least")
    axes.set_title(f"order in every view (lowest τ {order.lowest_tau:.2f})", fontsize=10)
    _style(axes)


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
