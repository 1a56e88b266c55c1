"""Plots of scores: models side by side, joint distributions, classes, concepts, images, chance, information."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse

from singreg import report
from singreg.analysis.chance import FIGURES, KINDS
from singreg.analysis.classes import joint_distribution
from singreg.analysis.comparison import Measured
from singreg.analysis.concepts import select_concepts
from singreg.analysis.probes import BLOCKS
from singreg.data.datasets import ImageSplit
from singreg.plots import BLUE, CYCLE, GREY, ORANGE, RED, bar, drawable, label_points, panels, save, styled
from singreg.tables import BLOCK_TITLES, KIND_TITLES, score_table

# How the models of a fine-tuning run are called wherever people read them.
STAGES = {"before": "before", "control": "control (cross-entropy)", "sing": "SingLoss"}
COLOURS = {"before": GREY, "control": ORANGE, "sing": BLUE}
TITLES = {"AS": "AS °", "AS_neg": "AS⁻ °", "AS_pos": "AS⁺ °", "AS_abs": "|AS| °", "IS": "IS °", "kappa": "κ"}
PERTURBATIONS = {"null": (BLUE, "null space"), "random": (GREY, "random"), "principal": ("#dc2626", "row space")}
CLASSES_SHOWN, CLASSES_NAMED, CLASSES_COMPARED, CONCEPTS_SHOWN, NEAREST = 24, 6, 40, 12, 3
NAME_LENGTH = 28  # characters beside an axis
Found = Mapping[str, Any]
READING = (
    "Means over the same test images with 95 % bootstrap intervals. AS⁻: what removing the null space takes from the "
    "true class (lower is better); IS: how far it moves the image's meaning (to be kept). frozen: the translator "
    "fitted before training; loop: the one the loss saw last; auditor: fitted on images training never used."
)


def plot_joint(joints: Mapping[str, Found], path: Path, *, separate: bool = False) -> Path:
    """Draw AS against IS of every image with the 1 and 2 sigma ellipses, in one panel or in one a name (figure 4)."""
    count = len(joints) if separate else 1
    figure, drawn = panels(count, width=4.2 if separate else 6.4, height=4.6 if separate else 5.2)
    handles = []
    for place, (name, joint) in enumerate(joints.items()):
        axes, colour = drawn[place % count], COLOURS.get(name, CYCLE[place % len(CYCLE)])
        points = np.array(joint["points"])
        alpha = 0.35 if separate else max(0.2, 0.35 / len(joints))
        axes.scatter(points[:, 0], points[:, 1], s=7, alpha=alpha, color=colour, linewidths=0)
        for e in joint["ellipses"]:
            line: dict[str, Any] = {"linewidth": 1.8 if e["sigma"] == 1 else 1.2, "fill": False, "edgecolor": colour}
            line |= {"linestyle": "-" if e["sigma"] == 1 else "--", "zorder": 4}
            axes.add_patch(Ellipse(joint["mean"], e["width"], e["height"], angle=e["tilt"], **line))
        axes.plot(*joint["mean"], marker="o", color=colour, markeredgecolor="white", markersize=8, zorder=5)
        ratio = "–" if joint["ratio"] is None else f"{joint['ratio']:.1f}"
        title, (x, y) = drawable(STAGES.get(name, name)), joint["mean"]
        label = f"IS {x:.1f}°, AS {y:+.2f}°, IS/|AS| {ratio}"
        handles.append(Line2D([], [], marker="o", linestyle="none", color=colour, label=f"{title}: {label}"))
        styled(axes, f"{title}\n{label}" if separate else "")
    cloud = np.concatenate([np.array(joint["points"]) for joint in joints.values()])
    for axes in drawn:
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xlabel="IS °", ylabel="AS °")
        if separate:  # without the outermost 0.2 % of points
            low, high = np.quantile(cloud, (0.002, 0.998), axis=0)
            margin = 0.08 * np.maximum(high - low, 1e-3)
            axes.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
    if not separate:
        drawn[0].legend(handles=handles, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    below = "below the line the removal hurts the true class"
    note = f"every image; ellipses at 1σ (solid) and 2σ (dashed){'; ' if separate else chr(10)}{below}"
    figure.suptitle(note, fontsize=9)
    return save(figure, path)


def plot_classes(found: Found, path: Path) -> Path:
    """Draw AS and IS of every class as violins, the leakiest on top; of many classes the two ends."""
    shown = CLASSES_SHOWN
    scores, gap = list(found["classes"]), shown - shown // 2
    cut = len(scores) > shown
    if cut:
        scores = scores[:gap] + scores[len(scores) - shown // 2 :]
    figure, drawn = panels(2, width=4.6, height=max(2.6, 0.27 * len(scores) + 1.5))
    for axes, key in zip(drawn, ("AS", "IS"), strict=True):
        _violins(axes, scores, key)
        if cut:
            axes.axhline(gap - 0.5, color="black", linewidth=0.9, linestyle=":")
        if key == "AS":
            axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel("degrees")
        styled(axes, "AS (left of 0: leakage)" if key == "AS" else "IS")
    names = [f"{drawable(score['name'], NAME_LENGTH)} ({score['images']})" for score in scores]
    drawn[0].set_yticks(range(len(scores)), names, fontsize=8)
    drawn[1].set_yticks(range(len(scores)), [""] * len(scores))
    left = f"; {gap} leakiest and {shown - gap} least leaky of {len(found['classes'])}" if cut else ""
    figure.suptitle(f"classes by AS⁻ (images), by the {found['translator']}{left}", fontsize=9)
    return save(figure, path)


def _violins(axes: Axes, scores: Sequence[Found], key: str) -> None:
    """Violins of the quantiles; a class whose images all agree is a mark only, since it has no density."""
    places = [k for k, score in enumerate(scores) if score["distribution"][key][0] < score["distribution"][key][-1]]
    if places:
        values = [scores[place]["distribution"][key] for place in places]
        found: Any = axes.violinplot(values, places, orientation="horizontal", showextrema=False, widths=0.9)
        for body, place in zip(found["bodies"], places, strict=True):
            colour = GREY if key == "IS" else RED if scores[place]["means"]["AS"] < 0 else BLUE
            body.set(facecolor=colour, alpha=0.55)
    means = [score["means"][key] for score in scores]
    axes.plot(means, range(len(scores)), "o", color="black", markersize=3.5, linestyle="none")
    axes.set_ylim(len(scores) - 0.4, -0.6)


def plot_class_accuracy(found: Found, path: Path) -> Path:
    """Draw AS⁻ of every class against its accuracy; the leakiest classes are named."""
    (figure, (axes,)), named = panels(width=7.4, height=4.2), CLASSES_NAMED
    leak = [score["means"]["AS_neg"] for score in found["classes"]]
    accuracy = [100 * score["means"]["accuracy"] for score in found["classes"]]
    axes.scatter(leak, accuracy, s=30, color=[RED if place < named else GREY for place in range(len(leak))])
    axes.margins(x=0.08, y=0.1)
    tie = found["correlations"]["AS_neg"]
    said = "rank correlation not defined"
    if tie["value"] is not None:
        bounds = "" if tie["low"] is None else f" [{tie['low']:+.2f}, {tie['high']:+.2f}]"
        said = f"Spearman's ρ {tie['value']:+.2f}{bounds} over {tie['classes']} classes"
    axes.set(xlabel="AS⁻ °", ylabel="accuracy, %")
    styled(axes, f"leakage and accuracy by class, by the {found['translator']}; {said}")
    names = [score["name"] for score in found["classes"][:named]]
    label_points(axes, leak[:named], accuracy[:named], names)
    return save(figure, path)


def plot_concepts(found: Found, path: Path) -> Path:
    """Draw an arrow from the angle before to that after for the concepts that moved most and least (paper figure 5)."""
    moved, still = (select_concepts(found, order, CONCEPTS_SHOWN) for order in ("strongest", "weakest"))
    still = still[~still["concept"].isin(moved["concept"])]
    tables = {"strongest": moved, **({"weakest": still} if len(still) else {})}
    longest = max(map(len, tables.values()))
    figure, drawn = panels(len(tables), width=5.6, height=max(2.4, 0.3 * longest + 1.5))
    edges = pd.concat(tables.values())[["before", "after"]].to_numpy()
    span = max(edges.max() - edges.min(), 0.5)
    for axes, (title, table) in zip(drawn, tables.items(), strict=True):
        _arrows(axes, table, span)
        axes.set_xlim(edges.min() - 0.08 * span, edges.max() + 0.75 * span)  # room for the figures
        axes.set_ylim(longest - 0.4, -0.6)
        axes.set_xlabel("angle to the concept °")
        styled(axes, f"{title}: ○ before, ► after the removal")
    key = "red: the concept moves away (AS < 0), blue: it comes closer (AS > 0)"
    figure.suptitle(f"{len(found['concepts'])} concepts, all images ({found['images']}); {key}", fontsize=9)
    return save(figure, path)


def _arrows(axes: Axes, table: pd.DataFrame, span: float) -> None:
    for place, row in enumerate(table.to_dict("records")):
        colour, ends = RED if row["AS"] < 0 else BLUE, [row["before"], row["after"]]
        axes.plot(ends[0], place, "o", markersize=5, markerfacecolor="white", markeredgecolor=colour, zorder=3)
        if abs(row["AS"]) > 0.05 * span:  # a shorter arrow would be all head
            arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.8, "shrinkA": 3, "shrinkB": 0}
            axes.annotate("", (ends[1], place), (ends[0], place), arrowprops={**arrow, "mutation_scale": 11})
        else:
            axes.plot(ends, [place, place], color=colour, linewidth=1.8)
        spread = "" if np.isnan(row["AS_low"]) else f" [{_signed(row['AS_low'])}, {_signed(row['AS_high'])}]"
        beside: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7.5, "va": "center", "color": colour}
        axes.annotate(f"{_signed(row['AS'])}{spread}", (max(ends), place), (8, 0), **beside)
    axes.set_yticks(range(len(table)), [drawable(name, NAME_LENGTH) for name in table["concept"]], fontsize=8)


def _signed(value: float) -> str:
    return f"{value:+.2f}" if abs(value) >= 0.005 else "0.00"


def plot_images(
    worst: Sequence[Found], shifts: Sequence[Found], split: ImageSplit, gallery: ImageSplit, path: Path
) -> Path:
    """Draw each worst image with its figures and the gallery's nearest to T(f), to T(f~) and to the steered T(f)."""
    sides = {"before": "nearest to T(f)", "after": "nearest to T(f~), null component removed"}
    sides["steered"] = "nearest to the steered T(f)"
    across = min(NEAREST, len(shifts[0]["before"]))
    widths = [1.0, 1.45, *[0.06, *[1.0] * across] * len(sides)]
    width, height = 1.35 * sum(widths) + 0.3, 1.72 * len(worst) + 0.75
    figure = Figure(figsize=(width, height))
    room = {"left": 0.12 / width, "right": 1 - 0.12 / width, "bottom": 0.08 / height, "top": 1 - 1.0 / height}
    spacing = {"width_ratios": widths, "wspace": 0.08, "hspace": 0.32, **room}
    grid = figure.subplots(len(worst), len(widths), squeeze=False, gridspec_kw=spacing)
    for axes in grid.ravel():
        axes.axis("off")
    for row, (image, shift) in enumerate(zip(worst, shifts, strict=True)):
        names = f"{drawable(image['class_name'], 18)}\nnamed: {drawable(image['predicted'], 18)}"
        _show(grid[row, 0], split, image["index"], names)
        grid[row, 1].text(0, 0.5, _why(image), fontsize=7, va="center", transform=grid[row, 1].transAxes)
        for part, (side, title) in enumerate(sides.items()):
            first = 3 + part * (across + 1)
            for place, neighbour in enumerate(shift[side][:across]):
                label = int(gallery.labels[neighbour["index"]])
                name = "" if label < 0 else drawable(gallery.class_names[label], 18)
                _show(grid[row, first + place], gallery, neighbour["index"], f"{name}\n{neighbour['angle']:.1f}°")
            if row == 0:
                at: dict[str, Any] = {"textcoords": "offset points", "xycoords": "axes fraction", "fontsize": 9}
                grid[0, first].annotate(title, (0, 1), (0, 24), **at)
    title = f"the {len(worst)} worst images and the gallery's nearest"
    figure.suptitle(title, fontsize=10, x=room["left"], y=1 - 0.12 / height, ha="left", va="top")
    return save(figure, path)


def _show(axes: Axes, split: ImageSplit, index: int, caption: str) -> None:
    axes.imshow(np.asarray(split.image(index)))
    axes.set_title(caption, fontsize=7, pad=2)


def _why(image: Found, moved: int = 3) -> str:
    lines = [f"AS {image['attribute_score']:+.1f}°, IS {image['image_score']:.1f}°"]
    for title, shifts in (("moves away:", image["falls"]), ("comes closer:", image["rises"])):
        if shifts:
            lines += [title, *(f"  {drawable(s['concept'], 20)} {s['score']:+.1f}°" for s in shifts[:moved])]
    return "\n".join(lines)


def plot_chance(found: Found, path: Path) -> Path:
    """Draw every score (filled) beside its chance levels (bars: ± 1 sd over draws), one panel a score."""
    figure, drawn = panels(3, 2, width=3.2, height=3.7)
    kinds, removals = ("observed", *KINDS), {"paper": (BLUE, "the paper's removal"), "centred": (ORANGE, "centred")}
    for axes, name in zip(drawn, FIGURES, strict=True):
        for (removal, (colour, label)), shift in zip(removals.items(), (-0.12, 0.12), strict=True):
            scores, levels = found[removal], [found[removal]["levels"][kind] for kind in KINDS]
            observed = scores["observed"][name]
            style: dict[str, Any] = {"color": colour, "linestyle": "none"}
            axes.plot([shift], [observed], marker="D", markersize=8, label=label, **style)
            axes.axhline(observed, color=colour, linewidth=0.8, linestyle=(0, (2, 3)), alpha=0.7)
            mean, spread = ([level[what][name] for level in levels] for what in ("mean", "spread"))
            places = np.arange(1, len(kinds)) + shift
            axes.errorbar(places, mean, spread, marker="o", ms=5, markerfacecolor="white", capsize=4, **style)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(kinds)), [KIND_TITLES[kind] for kind in kinds], rotation=30, ha="right", fontsize=9)
        axes.set_xlim(-0.6, len(kinds) - 0.4)
        styled(axes, TITLES[name])
    figure.legend(*drawn[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    size = f"null space of {found['dimensions']} of {found['features']} dimensions"
    note = f"scores (filled) beside chance (± 1 sd over {found['draws']} draws), by the auditor"
    figure.suptitle(f"{note}: {found['images']} images; {size}", fontsize=9)
    return save(figure, path)


def plot_information(found: Found, path: Path) -> Path:
    """Draw R² of the image embedding and class accuracy from f, Π_p f and Π_n f with 95 % intervals."""
    figure, (left, right) = panels(2, width=4.4, height=3.6)
    for axes, figure_name, factor in ((left, "r2", 1.0), (right, "accuracy", 100.0)):
        for x, (name, colour) in enumerate(zip(BLOCKS, (GREY, "#dc2626", BLUE), strict=True)):
            bounds = [factor * value for value in found["intervals"][f"{figure_name} {name}"]]
            bar(axes, x, 0.6, factor * found[figure_name][name], bounds, colour)
        axes.set_xticks(range(len(BLOCKS)), [BLOCK_TITLES[name] for name in BLOCKS], fontsize=9)
    low, high = found["intervals"]["unique"]
    title = f"image embedding; only in the null space: {found['unique']:.3f} [{low:.3f}, {high:.3f}]"
    styled(left, title).set_ylabel("R², held out")
    right.axhline(100 * found["chance"], color="black", linewidth=1.2, linestyle="--", label="always the most frequent")
    right.set_ylim(0, 1.2 * right.get_ylim()[1])
    right.legend(fontsize=8, loc="upper right")
    styled(right, "class, by a fresh linear probe").set_ylabel("accuracy, held out, %")
    return save(figure, path)


def plot_perturbations(found: Found, path: Path) -> Path:
    """Draw |Δlogit|, flipped decisions and translated angle against the perturbation's size (paper figure 9)."""
    figure, (left, middle, right) = panels(3, height=4.6)
    sizes = found["sizes"]
    for kind, curve in found["curves"].items():
        colour, title = PERTURBATIONS[kind]
        style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4}
        mean = {name: np.array(values) for name, values in curve["mean"].items()}
        for name, line in (("logit_change", "-"), *([("logit_change_float32", "--")] if kind == "null" else [])):
            kept = np.where(mean[name] > 0, mean[name], np.nan)  # a logarithmic axis has no 0
            width = "float32" if line == "--" else "float64"
            left.plot(sizes, kept, linestyle=line, label=f"{title}, {width}", **style)
        middle.plot(sizes, 100 * mean["flipped"], label=title, **style)
        for place, name in enumerate(found["translators"]):
            key = f"angle {name}"
            right.plot(sizes, mean[key], linestyle=("-", "--", ":", "-.")[place % 4], label=f"{title}, {name}", **style)
            if kind == "null":
                right.fill_between(sizes, curve["low"][key], curve["high"][key], color=colour, alpha=0.1, linewidth=0)
    left.axhline(found["margin"], color="black", linewidth=1, linestyle=":", label="mean margin of the top-1")
    left.set_yscale("log")
    titles = {
        "largest |Δlogit| of an image": "logits",
        "top-1 flipped": "%",
        "angle between T(f) and T(f + δ)": "degrees",
    }
    for axes, (title, unit) in zip((left, middle, right), titles.items(), strict=True):
        axes.set_xscale("log")
        axes.set_xlabel("size of the perturbation, |δ| / |f|")
        styled(axes, title).set_ylabel(unit)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    bands = "; band: 5 % to 95 % of the images, null space" if "null" in found["curves"] else "; no null space"
    figure.suptitle(f"perturbations of equal norm, mean of {found['images']} images{bands}", fontsize=9)
    return save(figure, path)


def plot_analysis(found: Found, split: ImageSplit, gallery: ImageSplit, folder: Path) -> dict[str, report.Figure]:
    """Draw every figure of recipes/analyze.py below a folder; the images are those of `split` and of the gallery."""
    drawings: dict[str, tuple[Any, Any, str]] = {
        "joint": (plot_joint, found["joint"], "AS against IS of every test image"),
        "chance": (plot_chance, found["chance"]["auditor"], "every score beside its levels of chance"),
        "information": (plot_information, found["information"], "what can be read from each part of the features"),
        "classes": (plot_classes, found["classes"], "AS and IS of every class, the leakiest on top"),
        "accuracy": (plot_class_accuracy, found["classes"], "AS⁻ of every class against its accuracy"),
        "concepts": (plot_concepts, found["concepts"], "angle of each concept to the images before and after"),
        "perturbations": (plot_perturbations, found["perturbation"], "perturbations of equal norm"),
    }
    drawn = {}
    for name, (draw, data, said) in drawings.items():
        drawn[name] = report.Figure(draw(data, folder / f"{name}.png"), said)
    sheet = plot_images(found["images"]["worst"], found["shifts"], split, gallery, folder / "images.png")
    said = "the worst images, and the gallery's nearest to their translated features before, after and steered"
    return {**drawn, "images": report.Figure(sheet, said)}


def plot_finetune(measured: Mapping[str, Measured], class_names: Sequence[str], folder: Path) -> list[report.Figure]:
    """Draw every figure of recipes/finetune.py below a folder, the summary first."""
    figures = {stage: found for stage, (_, found) in measured.items()}
    joints = {stage: joint_distribution(table) for stage, (table, _) in measured.items()}
    return [
        report.Figure(plot_summary(figures, folder / "summary.png"), "the models side by side"),
        report.Figure(plot_joint(joints, folder / "joint.png", separate=True), "AS against IS of every test image"),
        report.Figure(plot_class_leakage(figures, class_names, folder / "classes.png"), "AS⁻ of every class"),
    ]


def finetune_sections(
    figures: Mapping[str, Found], comparisons: pd.DataFrame, plots: Sequence[report.Figure]
) -> list[report.Section]:
    """Arrange a run's tables and plots (`plot_finetune`) as the sections of its report."""
    results = score_table({STAGES[stage]: found for stage, found in figures.items()})
    return [
        report.Section("Results", [results, READING, *plots[:1]]),
        report.Section(
            "SingLoss against the control", [comparisons, "Ratios of means; intervals are paired by image."]
        ),
        report.Section("Images and classes", plots[1:]),
    ]


def plot_summary(measurements: Mapping[str, Found], path: Path) -> Path:
    """Draw AS⁻, |AS|, IS and top-1 of every stage with 95 % intervals, by the auditor and the frozen translator."""
    figure, (*scores, right) = panels(4, width=3.2)
    titles = {"AS_neg": "AS⁻ (leakage)", "AS_abs": "|AS|", "IS": "IS (variety)"}
    for axes, (key, title) in zip(scores, titles.items(), strict=True):
        for x, (stage, measured) in enumerate(measurements.items()):
            for place, (name, alpha) in enumerate((("auditor", 1.0), ("frozen", 0.4))):
                by = measured["translators"][name]
                bar(axes, x - 0.2 + 0.4 * place, 0.38, by["overall"][key], by["intervals"][key], COLOURS[stage], alpha)
        styled(axes, title).set_ylabel("degrees")
    for x, (stage, measured) in enumerate(measurements.items()):
        bar(right, x, 0.6, 100 * measured["top1"], [100 * v for v in measured["top1_interval"]], COLOURS[stage])
    styled(right, "top-1").set_ylabel("%")
    for axes in (*scores, right):
        axes.set_xticks(range(len(measurements)), [STAGES[name].split(" ")[0] for name in measurements])
    images = next(iter(measurements.values()))["images"]
    note = f"{images} test images, 95 % intervals; full colour: auditor, pale: frozen translator"
    figure.suptitle(note, fontsize=9)
    return save(figure, path)


def plot_class_leakage(measurements: Mapping[str, Found], class_names: Sequence[str], path: Path) -> Path:
    """Draw AS⁻ of every class in each stage by the auditor, leakiest first; at most 40 classes."""
    per_class = {stage: measured["translators"]["auditor"]["per_class"] for stage, measured in measurements.items()}
    table = pd.DataFrame({stage: found["AS_neg"] for stage, found in per_class.items()}, dtype=float)
    ordered = table.sort_values(str(table.columns[0]), ascending=False, kind="stable").dropna(how="all")
    shown = ordered[:CLASSES_COMPARED]
    figure, (axes,) = panels(width=7.0, height=max(2.5, 0.24 * len(shown) + 1.2))
    places = range(len(shown))
    axes.hlines(places, shown.min(axis=1), shown.max(axis=1), color="#d1d5db", linewidth=2, zorder=1)
    for stage in shown:
        axes.scatter(shown[stage], places, s=28, color=COLOURS[str(stage)], label=STAGES[str(stage)], zorder=2)
    axes.set_yticks(places, [drawable(class_names[label]) for label in shown.index], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("AS⁻ °")
    part = "" if len(shown) == len(table) else f" ({len(shown)} of {len(table)} classes)"
    styled(axes, f"leakage by class{part}, by the auditor").legend(fontsize=8)
    return save(figure, path)
