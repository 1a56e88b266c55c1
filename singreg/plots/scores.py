"""Plots of scores: models and arms side by side, joint distributions, classes, concepts, images, perturbations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from singreg import report
from singreg.analysis.comparison import FALLING, FIGURES, HARM, STAYING, Measured, Paired, words
from singreg.analysis.levels import joint_distribution, select_concepts
from singreg.analysis.scores import AUDITOR
from singreg.data.splits import ImageSplit
from singreg.plots import BLUE, CYCLE, GREY, ORANGE, RED, arrows, drawable, panels, save, show, styled
from singreg.tables import AUDIT, READING, audit_table, score_table

HEIGHT = 2.9  # inches an image
SIDES = {"before": "nearest to T(f)", "after": "nearest to T(f~)"}
EACH_WAY = 4  # concepts beside a single image
# How the models of a fine-tuning run are called wherever people read them.
STAGES = {"before": "before", "control": "control (cross-entropy)", "sing": "SingLoss"}
DROPPED = {"dropped": "control, null space dropped"}  # only in tables: where it is 0 there is nothing to draw
COLOURS = {"before": GREY, "control": ORANGE, "sing": BLUE}
PERTURBATIONS = {"null": (BLUE, "null space"), "random": (GREY, "random"), "principal": (RED, "row space")}
CLASSES_SHOWN, CONCEPTS_SHOWN = 24, 16
NAME_LENGTH = 28  # characters beside an axis
Found = Mapping[str, Any]
ROLES = {"reference": ORANGE, "method": BLUE, "baseline": GREY, "placebo": RED}


def plot_images(images: Sequence[Found], split: ImageSplit, gallery: ImageSplit, path: Path) -> report.Figure:
    """Draw each image with its logits, the concepts that moved and the gallery's nearest, before and after."""
    across = max(len(near) for near in images[0]["near"].values()) if images[0]["near"] else 0
    widths = [1.6, 2.0, 2.6, *[0.95] * across]
    figure = Figure(figsize=(1.35 * sum(widths) + 1.6, HEIGHT * len(images) + 0.5), layout="constrained")
    figure.suptitle("the null component removed: ○ before, ► after", fontsize=10)
    for part, image in zip(figure.subfigures(len(images), 1, squeeze=False).flat, images, strict=True):
        grid = part.add_gridspec(2, len(widths), width_ratios=widths)
        given, logits, concepts = (part.add_subplot(grid[:, column]) for column in range(3))
        scores = f"AS {image['attribute_score']:+.1f}°, IS {image['image_score']:.1f}°"
        names = f"class: {drawable(image['class_name'], 22)}\nnamed: {drawable(image['predicted'], 22)}"
        show(
            given,
            np.asarray(split.image(image["index"])),
            drawable(Path(image["image"]).name, 24),
            f"{names}\n{scores}",
        )
        _logits(logits, image)
        arrows(concepts, [*image["falls"][:EACH_WAY], *image["rises"][:EACH_WAY]], 20)
        concepts.tick_params(labelsize=7)
        styled(concepts, "angle to concepts °; red: away, blue: closer").title.set_fontsize(8)
        for row, (side, title) in enumerate(SIDES.items()):
            for column, near in enumerate(image["near"].get(side, ())):
                axes = part.add_subplot(grid[row, 3 + column])
                label = int(gallery.labels[near["index"]])
                name = "" if label < 0 else drawable(gallery.class_names[label], 14)
                below = f"{name} {near['angle']:.0f}°"
                show(axes, np.asarray(gallery.image(near["index"])), "" if column else title, below)
    return save(figure, path, "what stays and what moves when the null component is removed")


def _logits(axes: Axes, image: Found) -> None:
    """Two bars a class, which are equal: the classifier does not see the removal."""
    table = image["logits"]
    places = np.arange(len(table["class"]))
    axes.barh(places - 0.2, table["before"], height=0.36, color=BLUE, label="before")
    axes.barh(places + 0.2, table["after"], height=0.36, color=ORANGE, label="after")
    axes.set_yticks(places, [drawable(name, 18) for name in table["class"]], fontsize=7)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=7)
    axes.legend(fontsize=6, frameon=False)
    styled(axes, f"logits: moved by {image['logit_change']:.0e}").title.set_fontsize(8)


def plot_joint(clouds: Mapping[str, tuple[pd.DataFrame, Found]], path: Path) -> report.Figure:
    """Draw AS against IS of every image with the 1 and 2 sigma ellipses, one panel a name (paper figure 4).

    Args:
        clouds: columns IS and AS of all images, and what `joint_distribution` says of them.
    """
    figure, drawn = panels(len(clouds), height=4.6)
    edges = pd.concat([cloud for cloud, _ in clouds.values()]).quantile([0.002, 0.998])  # without the outermost points
    for place, (axes, (name, (cloud, joint))) in enumerate(zip(drawn, clouds.items(), strict=True)):
        colour, (x, y) = COLOURS.get(name, CYCLE[place % len(CYCLE)]), joint["mean"]
        axes.scatter(cloud["IS"], cloud["AS"], s=7, alpha=0.35, color=colour, linewidths=0)
        for each in joint["ellipses"]:
            line: dict[str, Any] = {"edgecolor": colour, "linestyle": "-" if each["sigma"] == 1 else "--", "zorder": 4}
            axes.add_patch(Ellipse((x, y), each["width"], each["height"], angle=each["tilt"], fill=False, **line))
        axes.plot(x, y, marker="o", color=colour, markeredgecolor="white", markersize=8, zorder=5)
        axes.axhline(0, color="black", linewidth=0.8)
        ratio = "–" if joint["ratio"] is None else f"{joint['ratio']:.1f}"
        styled(axes, f"{drawable(STAGES.get(name, name))}\nIS {x:.1f}°, AS {y:+.2f}°, IS/|AS| {ratio}")
        axes.set(xlabel="IS °", ylabel="AS °")
        for of, limits in (("IS", axes.set_xlim), ("AS", axes.set_ylim)):
            low, high = edges[of]
            limits(low - 0.08 * max(high - low, 1e-3), high + 0.08 * max(high - low, 1e-3))
    figure.suptitle("every image; ellipses at 1σ and 2σ; below the line the removal hurts the true class", fontsize=9)
    return save(figure, path, "AS against IS of every test image")


def plot_classes(rows: pd.DataFrame, found: Found, path: Path) -> report.Figure:
    """Draw AS and IS of every class as violins, the leakiest on top; of many classes the two ends."""
    classes, half = list(found["classes"]), CLASSES_SHOWN // 2
    shown = classes if len(classes) <= CLASSES_SHOWN else classes[:half] + classes[-half:]
    figure, drawn = panels(2, width=4.6, height=max(2.6, 0.27 * len(shown) + 1.5))
    for axes, key, title in zip(drawn, ("AS", "IS"), ("AS (left of 0: leakage)", "IS"), strict=True):
        values = rows[f"{key}/auditor"]
        for place, each in enumerate(shown):
            own = values[rows["label"] == each["label"]]
            if own.nunique() > 1:  # images that all agree have no density
                options: Any = {"orientation": "horizontal", "showextrema": False, "widths": 0.9}
                for body in axes.violinplot(own, [place], **options)["bodies"]:  # type: ignore[attr-defined]
                    body.set(facecolor=GREY if key == "IS" else RED if each["means"]["AS"] < 0 else BLUE, alpha=0.55)
        axes.plot([each["means"][key] for each in shown], range(len(shown)), "o", color="black", markersize=3.5)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlabel("degrees")
        styled(axes, title)
    drawn[0].axvline(0, color="black", linewidth=0.8)
    names = [f"{drawable(each['name'], NAME_LENGTH)} ({each['images']})" for each in shown]
    drawn[0].set_yticks(range(len(shown)), names, fontsize=8)
    drawn[1].set_yticks(range(len(shown)), [""] * len(shown))
    part = "" if shown == classes else f"; {half} leakiest and {half} least leaky of {len(classes)}"
    figure.suptitle(f"classes by AS⁻ (images), by the auditor{part}", fontsize=9)
    return save(figure, path, "AS and IS of every class, the leakiest on top")


def plot_concepts(found: Found, path: Path) -> report.Figure:
    """Draw an arrow from the angle before to that after for the concepts that moved most (paper figure 5)."""
    moved = select_concepts(found["overall"], "strongest", CONCEPTS_SHOWN).to_dict("records")
    figure, (axes,) = panels(width=7.0, height=max(2.4, 0.3 * len(moved) + 1.5))
    arrows(axes, moved, NAME_LENGTH)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.28 * (high - low))
    beside: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7.5, "va": "center"}
    for place, row in enumerate(moved):
        said = report.interval(row["AS"], row["AS_low"], row["AS_high"])
        axes.annotate(said, (max(row["before"], row["after"]), place), (8, 0), **beside)
    axes.set_xlabel("angle to the concept °: ○ before, ► after the removal")
    count = len(found["overall"]["concept"])
    styled(axes, f"the {len(moved)} of {count} concepts that move most; red: away, blue: closer")
    return save(figure, path, "angle of each concept to the images before and after")


def plot_perturbations(found: Found, path: Path) -> report.Figure:
    """Draw |Δlogit| and the translated angle against the perturbation's size (paper figure 9)."""
    figure, (left, right) = panels(2, width=5.0, height=4.6)
    for kind, curve in found["curves"].items():
        colour, title = PERTURBATIONS[kind]
        style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4}
        mean = {name: np.array(values) for name, values in curve.items()}
        for name, line, dtype in (("logit_change", "-", "float64"), ("logit_change_float32", "--", "float32")):
            if name in mean:
                kept = np.where(mean[name] > 0, mean[name], np.nan)  # a logarithmic axis has no 0
                left.plot(found["sizes"], kept, linestyle=line, label=f"{title}, {dtype}", **style)
        for name, line in zip(found["translators"], ("-", "--", ":", "-.", "-"), strict=False):
            right.plot(found["sizes"], mean[f"angle {name}"], linestyle=line, label=f"{title}, {name}", **style)
    left.axhline(found["margin"], color="black", linewidth=1, linestyle=":", label="mean margin of the top-1")
    left.set_yscale("log")
    for axes, title in ((left, "largest |Δlogit| of an image"), (right, "angle between T(f) and T(f + δ), degrees")):
        axes.set_xscale("log")
        axes.set_xlabel("size of the perturbation, |δ| / |f|")
        styled(axes, title)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    figure.suptitle(f"perturbations of equal norm, mean of {found['images']} images", fontsize=9)
    return save(figure, path, "perturbations of equal norm")


def plot_analysis(
    rows: pd.DataFrame, found: Found, split: ImageSplit, gallery: ImageSplit, folder: Path
) -> dict[str, report.Figure]:
    """Draw every figure of recipes/analyze.py below a folder; the images are those of `split` and of the gallery."""
    clouds = {name: (_cloud(rows, name), joint) for name, joint in found["joint"].items()}
    figures = [
        plot_joint(clouds, folder / "joint.png"),
        plot_classes(rows, found["classes"], folder / "classes.png"),
        plot_concepts(found["concepts"], folder / "concepts.png"),
        plot_perturbations(found["perturbation"], folder / "perturbations.png"),
        plot_images(found["images"], split, gallery, folder / "images.png"),
    ]
    return {figure.path.stem: figure for figure in figures}


def _cloud(rows: pd.DataFrame, translator: str) -> pd.DataFrame:
    return rows[[f"IS/{translator}", f"AS/{translator}"]].set_axis(["IS", "AS"], axis=1)


def plot_finetune(measured: Mapping[str, Measured], paired: Paired, folder: Path) -> list[report.Figure]:
    """Draw every figure of recipes/finetune.py below a folder, the summary first."""
    drawn = {stage: measured[stage] for stage in STAGES}
    clouds = {stage: (_cloud(rows, "auditor"), joint_distribution(rows)) for stage, (rows, _) in drawn.items()}
    summary = plot_ratios(paired, len(drawn["before"][0]), folder / "summary.png")
    return [summary, plot_joint(clouds, folder / "joint.png")]


def finetune_sections(
    figures: Mapping[str, Found], paired: Paired, plots: Sequence[report.Figure]
) -> list[report.Section]:
    """Arrange a run's tables and plots (`plot_finetune`) as the sections of its report."""
    named = {said: figures[stage] for stage, said in (STAGES | DROPPED).items()}
    compared = pd.DataFrame([(said, words(paired.get(name))) for name, said in FIGURES.items()], columns=["", "value"])
    return [
        report.Section("Results", [audit_table(named), AUDIT, *plots[:1]]),
        report.Section("By the auditor and by the loop", [score_table(named), READING]),
        report.Section("SingLoss against the control", [compared, "Ratios of means, paired by image."]),
        report.Section("Images", plots[1:]),
    ]


def plot_ratios(paired: Paired, images: int, path: Path) -> report.Figure:
    """Draw what SingLoss leaves of the control, as ratios with 95 % intervals by the auditor; left of 1 is less."""
    shown = [name for name in (*FALLING, *STAYING) if np.isfinite(paired[name]["value"])]
    figure, (axes,) = panels(width=7.4, height=0.42 * len(shown) + 1.6)
    for place, name in enumerate(shown):
        value, low, high = (paired[name][end] for end in ("value", "low", "high"))
        colour = BLUE if name in FALLING else GREY
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot(value, place, marker="o", color=colour)
        axes.annotate(f"{value:.2f}×", (value, place), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [FIGURES[name] for name in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.set_xlabel("SingLoss / plain fine-tuning")
    said = f"{images} test images, 95 % intervals; top-1 {words(paired['top1'])}"
    styled(axes, f"{said}\nblue should fall, grey should stay")
    return save(figure, path, "what is left")


def save_comparison_plot(measured: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> report.Figure:
    """Draw mean IS over mean |AS| of models in every space, bubbles by AS⁻, from figures of `analyze_model`."""
    names = list(next(iter(measured.values())))
    palette = matplotlib.colormaps["tab20" if len(names) > 10 else "tab10"](np.arange(len(names)))
    colours = dict(zip(names, palette, strict=True))
    figure, drawn = panels(len(measured), width=4.6, height=max(4.2, 0.3 * len(names) + 1.5))
    for axes, (space, models) in zip(drawn, measured.items(), strict=True):
        read = {name: found["translators"][AUDITOR] for name, found in models.items()}
        largest = max(scores["overall"]["AS_neg"] for scores in read.values())
        for name, scores in read.items():
            x, y, harm = (scores["overall"][key] for key in ("AS_abs", "IS", "AS_neg"))
            axes.plot(scores["intervals"]["AS_abs"], [y, y], color=colours[name], linewidth=1)
            axes.plot([x, x], scores["intervals"]["IS"], color=colours[name], linewidth=1)
            size = 30 + 170 * harm / max(largest, 1e-9)
            axes.scatter(x, y, s=size, color=colours[name], alpha=0.75, zorder=3)
        axes.set(xlabel="mean |AS| °", ylabel="mean IS °", xlim=(0, None), ylim=(0, 1.15 * axes.get_ylim()[1]))
        styled(axes, f"{drawable(space)}, by the {AUDITOR}")
    handles = [drawn[0].plot([], [], "o", color=colour, label=drawable(name))[0] for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return save(figure, path, "IS against |AS| of every model in every space (area: AS⁻).")


def save_pareto(arms: Sequence[Mapping[str, Any]], reference: str, path: Path) -> report.Figure:
    """Draw top-1 against class-score variance (%), arms that differ in λ alone joined; names stand in a column."""
    inks = [ROLES["reference" if arm["arm"] == reference else arm["role"]] for arm in arms]
    figure, (axes,) = panels(1, width=9.0, height=max(4.5, 0.26 * len(arms) + 1.5))
    x, y = (100 * np.array([arm["mean"][key] for arm in arms]) for key in ("top1", HARM))
    across, along = (100 * np.array([arm["intervals"][key] for arm in arms]).T for key in ("top1", HARM))
    axes.hlines(y, across[0], across[1], colors=inks, linewidth=0.7, alpha=0.35)
    axes.vlines(x, along[0], along[1], colors=inks, linewidth=0.7, alpha=0.35)
    axes.scatter(x, y, c=inks, s=36, zorder=3)
    front = np.array(sorted((a, b) for arm, a, b in zip(arms, x, y, strict=True) if arm["front"]))
    axes.plot(*front.T, color="black", linewidth=1, linestyle="--", zorder=2)
    curve = sorted((arm["weight"], a, b) for arm, a, b in zip(arms, x, y, strict=True) if arm["weight"] is not None)
    axes.plot([a for _, a, _ in curve], [b for _, _, b in curve], color=BLUE, linewidth=1, zorder=2)
    axes.set(xlabel="top-1 %", ylabel="class-score variance in the null space, %")
    styled(axes, "leakage against accuracy")
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    edge = right + 0.02 * (right - left)
    heights = bottom + (top - bottom) * (np.arange(len(arms)) + 0.5) / len(arms)
    for height, place in zip(heights, np.lexsort((x, y)), strict=True):  # in the order of the points' heights
        axes.plot([x[place], edge], [y[place], height], color=inks[place], linewidth=0.5, alpha=0.5, zorder=1)
        name = f" {drawable(arms[place]['arm'], 28)}"
        axes.text(edge, height, name, fontsize=8, va="center", color=inks[place])
    axes.set_xticks([tick for tick in axes.get_xticks() if left <= tick <= right])
    axes.set(xlim=(left, edge + 0.32 * (right - left)), ylim=(bottom, top))
    caption = (
        "Right and low is good. Dashed: no arm is better in both. Blue: the same arm at growing λ, from plain's 0."
    )
    return save(figure, path, caption)
