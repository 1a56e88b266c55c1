"""Pictures of the class, concept and image level: violins, the AS/IS cloud, arrows of concepts, sheets of worst pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse

from singreg.analysis.levels.class_results import ClassMeasurement, ClassScore
from singreg.analysis.levels.concept_results import ConceptMeasurement, ConceptShift
from singreg.analysis.levels.image_results import ImageMeasurement, Neighbour, PictureShift, WorstImage
from singreg.analysis.levels.joint import JointDistribution
from singreg.data.datasets import ImageSplit
from singreg.reporting.plots import _axes, _styled, drawable

HARM, GOOD, NEUTRAL = "#c2410c", "#2563eb", "#6b7280"  # AS < 0, AS > 0
CYCLE = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#4d7c0f", "#be185d")
CLASSES_SHOWN = 24
NAME_LENGTH = 28  # characters beside an axis


def _signed(value: float) -> str:
    return f"{value:+.2f}" if abs(value) >= 0.005 else "0.00"


def _removal(centred: bool) -> str:
    return "centred removal" if centred else "paper's removal"


def draw_class_violins(found: ClassMeasurement, shown: int = CLASSES_SHOWN) -> Figure:
    """AS and IS (degrees) of every class as violins with the mean marked, the leakiest on top.

    Of more than `shown` classes the leakiest and the least leaky halves are drawn.
    """
    scores = list(found.classes)
    gap = None
    if len(scores) > shown:
        gap = shown - shown // 2
        scores = scores[:gap] + scores[len(scores) - shown // 2 :]
    figure, panels = _axes(2, width=4.6, height=max(2.6, 0.27 * len(scores) + 1.5))
    for axes, key in zip(panels, ("AS", "IS"), strict=True):
        _violins(axes, scores, key)
        if gap is not None:
            axes.axhline(gap - 0.5, color="black", linewidth=0.9, linestyle=":")
        if key == "AS":
            axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel("degrees")
        _styled(axes, "AS (left of 0: leakage)" if key == "AS" else "IS")
    panels[0].set_yticks(range(len(scores)), [f"{drawable(score.name, NAME_LENGTH)} ({score.images})" for score in scores], fontsize=8)
    panels[1].set_yticks(range(len(scores)), [""] * len(scores))
    left = "" if gap is None else f"; {gap} leakiest and {len(scores) - gap} least leaky of {len(found.classes)}"
    empty = f"; {len(found.empty)} classes have no picture" if found.empty else ""
    figure.suptitle(f"classes by AS⁻ (pictures), by the {found.translator}, {_removal(found.centred)}{left}{empty}", fontsize=9)
    return figure


def _violins(axes: Axes, scores: Sequence[ClassScore], key: str) -> None:
    """Violins of the quantiles; a class whose pictures all agree is a mark only, since it has no density."""
    places = [place for place, score in enumerate(scores) if score.distribution[key][0] < score.distribution[key][-1]]
    if places:
        values = [scores[place].distribution[key] for place in places]
        drawn = axes.violinplot(values, positions=places, orientation="horizontal", showextrema=False, widths=0.9)
        for body, place in zip(drawn["bodies"], places, strict=True):  # type: ignore[arg-type, call-overload]
            mean = scores[place].means["AS"]
            body.set_facecolor(NEUTRAL if key == "IS" else HARM if mean < 0 else GOOD)
            body.set_alpha(0.55)
    axes.plot([score.means[key] for score in scores], range(len(scores)), "o", color="black", markersize=3.5, linestyle="none")
    axes.set_ylim(len(scores) - 0.4, -0.6)


def draw_class_accuracy(found: ClassMeasurement, named: int = 6) -> Figure:
    """AS⁻ (degrees) of every class against its accuracy, the rank correlation above; the leakiest classes are named."""
    figure, (axes,) = _axes(1, width=7.4, height=4.2)
    leak = [score.means["AS_neg"] for score in found.classes]
    accuracy = [100 * score.means["accuracy"] for score in found.classes]
    axes.scatter(leak[named:], accuracy[named:], s=26, color=NEUTRAL, alpha=0.7, linewidths=0)
    axes.margins(x=0.08, y=0.1)
    for place, score in enumerate(found.classes[:named]):  # numbers, since names would lie on each other
        label = f"{place + 1}  {drawable(score.name, NAME_LENGTH)}"
        axes.scatter(leak[place], accuracy[place], s=110, color=HARM, linewidths=0, label=label)
        axes.text(leak[place], accuracy[place], f"{place + 1}", fontsize=7, color="white", ha="center", va="center_baseline")
    axes.legend(title="the leakiest", fontsize=8, title_fontsize=8, handlelength=0, markerscale=0, loc="center left",
                bbox_to_anchor=(1.0, 0.5), frameon=False)  # fmt: skip
    tie = found.correlations["AS_neg"]
    said = "rank correlation not defined"
    if tie.value is not None:
        interval = "" if tie.low is None or tie.high is None else f" [{tie.low:+.2f}, {tie.high:+.2f}]"
        said = f"Spearman ρ = {tie.value:+.2f}{interval}"
    axes.set(xlabel="AS⁻ °", ylabel="accuracy %")
    _styled(axes, f"leakage and accuracy of {len(leak)} classes: {said}")
    return figure


def draw_joint_distribution(found: Mapping[str, JointDistribution]) -> Figure:
    """AS against IS (degrees) of every picture, with 1 and 2 sigma ellipses; one colour for each name (paper figure 4)."""
    figure, (axes,) = _axes(1, width=6.4, height=5.2)
    handles = []
    for (name, joint), colour in zip(found.items(), CYCLE * (1 + len(found) // len(CYCLE)), strict=False):
        points = np.array(joint.points)
        axes.scatter(points[:, 0], points[:, 1], s=7, alpha=max(0.12, 0.35 / len(found)), color=colour, linewidths=0)
        for ellipse in joint.ellipses:
            patch = Ellipse(
                joint.mean, ellipse.width, ellipse.height, angle=ellipse.tilt, fill=False, edgecolor=colour, zorder=4,
                linewidth=1.8 if ellipse.sigma == 1 else 1.2, linestyle="-" if ellipse.sigma == 1 else "--",
            )  # fmt: skip
            axes.add_patch(patch)
        axes.plot(*joint.mean, marker="o", color=colour, markeredgecolor="white", markersize=8, zorder=5)
        ratio = "–" if joint.ratio is None else f"{joint.ratio:.1f}"
        label = f"{drawable(name, 40)}: IS {joint.mean[0]:.1f}°, AS {joint.mean[1]:+.2f}°, IS/|AS| {ratio}"
        handles.append(Line2D([], [], marker="o", linestyle="none", color=colour, label=label))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="IS °", ylabel="AS °")
    shares = " and ".join(f"{ellipse.share:.0%}" for ellipse in next(iter(found.values())).ellipses)
    inside = f",\nwith {shares} of the pictures inside" if len(found) == 1 and shares else ""
    _styled(axes, f"every picture; ellipses at 1σ (solid) and 2σ (dashed){inside}")
    axes.legend(handles=handles, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    return figure


def draw_concept_arrows(found: ConceptMeasurement, count: int = 10, label: int | None = None) -> Figure:
    """An arrow from the angle before to the angle after (degrees) for the concepts that moved most and least (paper figure 5).

    Overall, or for the class `label`. Red: the concept moves away when the null component goes; blue: it comes closer.
    """
    moved = found.select("strongest", count, label)
    still = tuple(shift for shift in found.select("weakest", count, label) if shift not in moved)
    panels = [("strongest", moved), ("weakest", still)] if still else [("strongest", moved)]
    longest = max(len(shifts) for _, shifts in panels)
    figure = Figure(figsize=(5.6 * len(panels), max(2.4, 0.3 * longest + 1.5)), layout="constrained")
    drawn = np.atleast_1d(figure.subplots(1, len(panels)))
    edges = [value for shift in (*moved, *still) for value in (shift.before, shift.after)]
    margin = 0.08 * max(max(edges) - min(edges), 0.5)
    for axes, (title, shifts) in zip(drawn, panels, strict=True):
        _arrows(axes, shifts, max(edges) - min(edges))
        axes.set_xlim(min(edges) - margin, max(edges) + 6 * margin)  # room for the figures
        axes.set_ylim(longest - 0.4, -0.6)
        axes.set_xlabel("angle to the concept °")
        _styled(axes, f"{title}: ○ before, ► after the removal")
    images = found.images if label is None else found.class_images[label]
    where = "all pictures" if label is None else f"class {drawable(found.class_names[label], 40)}"
    key = "red: the concept moves away (AS < 0), blue: it comes closer (AS > 0)"
    figure.suptitle(f"{len(found.concepts)} concepts, {where} ({images}), {_removal(found.centred)}; {key}", fontsize=9)
    return figure


def _arrows(axes: Axes, shifts: Sequence[ConceptShift], span: float) -> None:
    for place, shift in enumerate(shifts):
        colour = HARM if shift.score < 0 else GOOD
        axes.plot(shift.before, place, marker="o", markersize=5, markerfacecolor="white", markeredgecolor=colour, zorder=3)
        if abs(shift.score) > 0.05 * span:  # a shorter arrow would be all head
            axes.annotate(
                "", (shift.after, place), (shift.before, place),
                arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.8, "shrinkA": 3, "shrinkB": 0, "mutation_scale": 11},
            )  # fmt: skip
        else:
            axes.plot([shift.before, shift.after], [place, place], color=colour, linewidth=1.8)
        spread = "" if shift.low is None or shift.high is None else f" [{_signed(shift.low)}, {_signed(shift.high)}]"
        axes.annotate(
            f"{_signed(shift.score)}{spread}", (max(shift.before, shift.after), place), xytext=(8, 0), textcoords="offset points",
            fontsize=7.5, va="center", color=colour,
        )  # fmt: skip
    axes.set_yticks(range(len(shifts)), [drawable(shift.concept, NAME_LENGTH) for shift in shifts], fontsize=8)


def draw_worst_images(
    found: ImageMeasurement, shifts: Sequence[PictureShift], part: ImageSplit, gallery: ImageSplit, *, shown: int = 8, nearest: int = 3
) -> Figure:
    """A sheet: each worst picture with its figures, the gallery's nearest to T(f), to T(f~) and, if searched, to the steered one.

    `shifts` are those of the same pictures in the same order (`nearest_pictures`); captions are angles in degrees.

    Raises:
        ValueError: pictures and shifts do not go together.
    """
    worst = found.worst[:shown]
    if [image.index for image in found.worst[: len(shifts)]] != [shift.index for shift in shifts] or len(shifts) < len(worst):
        raise ValueError(f"{len(worst)} pictures need the nearest ones of the same pictures in the same order, got {len(shifts)} others")
    sides = {"before": "nearest to T(f)", "after": "nearest to T(f~), null component removed", "steered": "nearest to the steered T(f)"}
    sides = {side: title for side, title in sides.items() if side != "steered" or shifts[0].steered is not None}
    across = [min(nearest, len(getattr(shifts[0], side))) for side in sides]
    columns = [1.0, 1.45, *(width for count in across for width in (0.06, *[1.0] * count))]
    width, height = 1.35 * sum(columns) + 0.3, 1.72 * len(worst) + 0.75
    figure = Figure(figsize=(width, height))
    room = {"left": 0.12 / width, "right": 1 - 0.12 / width, "bottom": 0.08 / height, "top": 1 - 1.0 / height}
    grid = figure.subplots(
        len(worst), len(columns), squeeze=False, gridspec_kw={"width_ratios": columns, "wspace": 0.08, "hspace": 0.32, **room}
    )
    for axes in grid.ravel():
        axes.axis("off")
    for row, (image, shift) in enumerate(zip(worst, shifts, strict=False)):
        _picture(grid[row, 0], part, image.index, f"{drawable(image.class_name, 18)}\nnamed: {drawable(image.predicted, 18)}")
        grid[row, 1].text(0, 0.5, _why(image), fontsize=7, va="center", ha="left", transform=grid[row, 1].transAxes)
        column = 2
        for (side, title), count in zip(sides.items(), across, strict=True):
            for place, neighbour in enumerate(getattr(shift, side)[:count]):
                axes = grid[row, column + 1 + place]
                _picture(axes, gallery, neighbour.index, _caption(gallery, neighbour))
                if row == 0 and place == 0:
                    above = axes.annotate(
                        title, (0, 1), xytext=(0, 24), textcoords="offset points", xycoords="axes fraction", fontsize=9
                    )
                    above.set_in_layout(False)  # it spans the columns to its right, and must not widen its own
            column += 1 + count
    order = "most negative AS" if found.by == "AS" else "largest IS"
    title = f"{len(worst)} pictures of {found.images} with the {order}, {_removal(found.centred)}"
    figure.suptitle(title, fontsize=10, x=room["left"], y=1 - 0.12 / height, ha="left", va="top")
    return figure


def _picture(axes: Axes, part: ImageSplit, index: int, caption: str) -> None:
    axes.imshow(np.asarray(part.image(index)))
    axes.set_title(caption, fontsize=7, pad=2)


def _caption(gallery: ImageSplit, neighbour: Neighbour) -> str:
    label = int(gallery.labels[neighbour.index])
    return f"{'' if label < 0 else drawable(gallery.class_names[label], 18)}\n{neighbour.angle:.1f}°"


def _why(image: WorstImage, moved: int = 3) -> str:
    """The figures of one picture and the concepts that moved most."""
    lines = [f"AS {image.attribute_score:+.1f}°, IS {image.image_score:.1f}°"]
    for title, shifts in (("moves away:", image.falls), ("comes closer:", image.rises)):
        if shifts:
            lines += [title, *(f"  {drawable(shift.concept, 20)} {shift.score:+.1f}°" for shift in shifts[:moved])]
    return "\n".join(lines)
