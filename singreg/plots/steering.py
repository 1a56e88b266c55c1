"""Figures of steering and attacks, and the report of an attack, from what report.json holds; computes nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from singreg.analysis.attack import ATTACK, MOST_HELD, RANDOM
from singreg.analysis.steering_curves import DROPPED, MAXIMISER, SINGLE, natural_marks
from singreg.analysis.steering_curves import RANDOM as RANDOM_DIRECTION
from singreg.data.splits import ImageSplit
from singreg.plots import BLUE, CYCLE, GREY, ORANGE, RED, band, drawable, panels, save, show, styled
from singreg.report import Figure, Section, interval, percent

Found = Mapping[str, Any]
SHOWN = 6  # images or pairs a model
AMPLIFIED = 20
LINES = {  # (attack, judge, defence): colour, line, label
    (MAXIMISER, "fitted", ""): (BLUE, "-", "maximiser"),
    (MAXIMISER, "auditor", ""): (ORANGE, "-", "maximiser, the auditor judges"),
    (MAXIMISER, "fitted", DROPPED): (RED, "-", "maximiser, null space dropped"),
    (SINGLE, "fitted", ""): (BLUE, "--", "single gradient step"),
    (RANDOM_DIRECTION, "fitted", ""): (GREY, ":", "random direction"),
}
RISE = (
    "°: rise towards the target class's prompt, read from the saved 8-bit files; 0 where logits, decision or budget "
    "were not kept. first: share of images whose target came first, with Wilson's intervals. fitted: the attacked "
    "translator; auditor: another one from other images; the rest are image encoders that the attack never saw. "
    "random: a random direction of the whole budget, held to nothing. A model whose null space was dropped is attacked "
    "by its features before the dropping, which hides nothing in pixels."
)
TWINS = "Pairs of two classes, as close in logits as images of one class and as far apart for an encoder as others."
CLASSES_SHOWN, NUMBERS_UP_TO, NAME_LENGTH = 60, 20, 22
PAGE_WIDTH = 12.0  # inches: a report shows that at four fifths of its size
FIGURES = {"success": (100.0, "target outranks all classes, %"), "AS": (1.0, "AS towards the target, °")}
BUDGETS = {
    "step": ("relative step", "ε / |f|"),
    "radius": ("radius", "Mahalanobis radius / natural median"),
}
STYLES = {"fitted": "--", "auditor": "-"}


def attack_verdict(figures: Found) -> list[str]:
    """Say in at most four sentences what may be claimed."""
    failed = [f"{check['name']} ({check['model']})" for check in figures["checks"] if not check["passed"]]
    said = [f"All {len(figures['checks'])} checks passed: the rises are lower bounds of a white-box attacker's."]
    if failed:
        said = [f"Checks failed: {'; '.join(failed)}. Nothing may be claimed of robustness."]
    budget, each = figures["summaries"][-1]["budget"], []
    for s in figures["summaries"]:
        if (s["arm"], s["budget"]) == (ATTACK, budget):
            rises = ", ".join(f"{rise[0]:+.1f}° ({judge})" for judge, rise in s["rise"].items())
            each.append(f"{s['model']} {rises}, target first for {s['success']['fitted'][0]:.0%}")
    held = f"Within {budget} and logits within {figures['tau']:g} sd images turn towards the target's prompt by: "
    said.append(f"{held}{'; '.join(each)}.")
    if (count := len(figures["encoders"])) < 2:
        known = f"half of the untouched images rightly, and {count} of {len(figures['zero_shot'])} do"
        said.append(f"Changed meaning cannot be claimed: that takes two image encoders that name {known}.")
    return said


def attack_warnings(figures: Found) -> list[str]:
    """List reasons not to believe an attack's figures."""
    images, weak = figures["images"], [m["label"] for m in figures["models"] if m["classes"] > MOST_HELD]
    warnings = {
        f"only {images} images were attacked; a share is known to ±{100 / images**0.5:.0f} points": images < 100,
        f"{', '.join(weak)}: above {MOST_HELD} classes the attack does not follow the logits' tangent and finds far "
        "less (a quarter of the rise where both were tried); compare it with no other": bool(weak),
    }
    for name, share in figures["zero_shot"].items():
        known = name in figures["encoders"]
        warnings[f"{name} names only {share:.0%} of the untouched images rightly: it is no witness"] = not known
    return [f"Warning: {text}." for text, true in warnings.items() if true]


def attack_sections(figures: Found, plots: Mapping[str, Figure]) -> list[Section]:
    """Return an attack's report as sections."""
    rows = []
    for s in figures["summaries"]:
        row = {"model": s["model"], "budget": s["budget"], "arm": s["arm"], "kept": percent(s["kept"], 0)}
        row |= {f"{judge} °": interval(*rise) for judge, rise in s["rise"].items()}
        for judge, share in s["success"].items():
            value, low, high = (100 * each for each in share)
            row[f"{judge} first %"] = interval(value, low, high, 0)
        rows.append(row)
    sections = [Section("Attacked images", [plots["rises"], pd.DataFrame(rows), RISE, plots["attacked"]])]
    if "features" in plots:
        sections.append(Section("The same images in feature space", [plots["features"]]))
    if figures["differences"]:
        differences, carried = pd.DataFrame(figures["differences"]), pd.DataFrame(figures["transfers"])
        blocks = ["Rise ° of the second minus the first, paired by image:", differences, "Carried over:", carried]
        sections.append(Section("Models compared", blocks))
    if figures["twins"]:
        table = pd.DataFrame(figures["twins"]).drop(columns="shown")
        sections.append(Section("Natural twins", [table, TWINS, plots["twins"]]))
    climbs, checks, models = (pd.json_normalize(figures[name]) for name in ("climbs", "checks", "models"))
    return [*sections, Section("The attack itself", [climbs, checks]), Section("Models", [models])]


def attack_plots(figures: Found, judged: pd.DataFrame, split: ImageSplit, folder: Path) -> dict[str, Figure]:
    """Draw every figure of an attack into plots/ of the run's folder, by name."""
    found = {"rises": _rises(figures, folder / "plots"), "attacked": _attacked(figures, judged, folder)}
    if figures["features"]:
        found["features"] = _features(figures["features"], folder / "plots")
    if figures["twins"]:
        found["twins"] = _twins(figures["twins"], split, folder / "plots")
    return found


def _rises(figures: Found, folder: Path) -> Figure:
    models = [model["label"] for model in figures["models"]]
    figure, axes = panels(len(models))
    for ax, label in zip(axes, models, strict=True):
        mine, random = (
            [s for s in figures["summaries"] if (s["model"], s["arm"]) == (label, arm)] for arm in (ATTACK, RANDOM)
        )
        judges = list(mine[0]["rise"])
        for place, name in enumerate(judges):
            x = np.arange(len(mine)) + 0.8 * (place + 0.5) / len(judges) - 0.4
            rise, low, high = np.array([s["rise"][name] for s in mine]).T
            ax.bar(x, rise, 0.75 / len(judges), color=CYCLE[place % len(CYCLE)], label=drawable(name, 24))
            ax.errorbar(x, rise, np.maximum([rise - low, high - rise], 0), fmt="none", color="black", capsize=2, lw=1)
            heights = [s["rise"][name][0] for s in random]
            ax.scatter(x, heights, facecolors="white", edgecolors="black", s=14, zorder=3)
        styled(ax, drawable(label, 34)).sharey(axes[0])
        ax.set_xticks(range(len(mine)), [s["budget"] for s in mine])
    axes[0].set_ylabel("rise towards the target's prompt, °")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    caption = f"logits within {figures['tau']:g} sd; 95 % over {figures['images']} images; dots: random directions"
    return save(figure, folder / "rises.png", caption)


def _attacked(figures: Found, judged: pd.DataFrame, folder: Path) -> Figure:
    budget, encoder = figures["summaries"][-1]["budget"], next(reversed(figures["zero_shot"]))
    at = judged[(judged["arm"] == ATTACK) & (judged["budget"] == budget)]
    models = [model["label"] for model in figures["models"]]
    height, columns = min(SHOWN, figures["images"]), 1 + 2 * len(models)
    figure, flat = panels(columns, height, width=1.6, height=1.8)
    grid = np.array(flat).reshape(height, columns)
    for place, label in enumerate(models):
        for line, row in enumerate(at[at["model"] == label].head(height).to_dict("records")):
            original, attacked = (np.asarray(Image.open(folder / row[name])) for name in ("original", "file"))
            moved = (127.5 + AMPLIFIED * (attacked.astype(float) - original)).clip(0, 255).astype(np.uint8)
            rises = f"{row['rise fitted']:+.0f}°, {row[f'rise {encoder}']:+.0f}°" if row["kept"] else "not kept"
            show(grid[line, 0], original, "original")
            show(grid[line, 1 + 2 * place], attacked, drawable(label, 24), rises)
            show(grid[line, 2 + 2 * place], moved, f"moved × {AMPLIFIED}")
    caption = f"attacked at {budget}; below: rise by the attacked translator, and by {encoder}, which nobody attacked"
    return save(figure, folder / "plots" / "attacked.png", caption)


def _features(found: Found, folder: Path) -> Figure:
    figure, axes = panels(len(found), height=3.4)
    for ax, (label, features) in zip(axes, found.items(), strict=True):
        own = [curve for curve in features["curves"] if curve["attacker"] == "fitted"]
        curves = {(curve["attack"], curve["judge"], curve["defence"]): curve for curve in own}
        for key, (colour, line, said) in LINES.items():
            band(ax, curves[key], "success", color=colour, linestyle=line, label=said)
        styled(ax, drawable(label, 34)).set(xlabel="ε / |f|", ylim=(-3, 103))
    axes[0].set_ylabel("target first, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    caption = "the same images steered in feature space, on the attacked translator; bands: 95 % over images"
    return save(figure, folder / "features.png", caption)


def _twins(twins: list[dict[str, Any]], split: ImageSplit, folder: Path) -> Figure:
    figure, flat = panels(SHOWN, 2 * len(twins), width=1.7, height=1.9)
    grid = np.array(flat).reshape(len(twins), 2, SHOWN)
    for ax in flat:
        ax.set_axis_off()
    for each, lines in zip(twins, grid, strict=True):
        for pair, (above, below) in zip(each["shown"], lines.T, strict=False):
            for ax, index in ((above, pair["first"]), (below, pair["second"])):
                ax.set_axis_on()
                name = drawable(split.class_names[int(split.labels[index])], 18)
                apart = f"Δlogit {pair['logit_distance']:.1f}, {pair['angle']:.0f}°" if ax is below else ""
                show(ax, np.asarray(split.image(index)), name, apart)
        lines[0, 0].set_ylabel(drawable(each["model"], 24), fontsize=8)
    caption = "natural twins: two classes, alike in logits and far apart for an encoder; nobody attacked them"
    return save(figure, folder / "twins.png", caption)


def plot_steering(found: Found, folder: Path) -> dict[str, Figure]:
    """Draw the figures of recipes/steer.py below a folder."""
    return {"curves": _curves(found, folder / "curves.png"), "pairs": _pairs(found, folder / "pairs.png")}


def _pairs(found: Found, path: Path) -> Figure:
    """Heat maps by the auditor of what the fitted translator steers, sources down and targets across."""
    (read,) = (each for each in found["pairs"] if (each["attacker"], each["judge"]) == ("fitted", "auditor"))
    named = found["sources"], found["targets"]
    down, across = ([drawable(name, NAME_LENGTH) for name in some[:CLASSES_SHOWN]] for some in named)
    numbered = max(len(down), len(across)) <= NUMBERS_UP_TO
    width = max(3.6, (0.42 if numbered else 0.16) * len(across) + 1.6)
    height = max(1.8, (0.3 if numbered else 0.16) * len(down)) + 1.9
    beside = 2 if 2 * width <= PAGE_WIDTH else 1  # else one below the other: numbers must stay large enough to read
    figure, axes = panels(beside, 2 // beside, width=width, height=height)
    for panel, (name, title, factor) in zip(
        axes, (("AS_abs", "|AS| °", 1), ("success", "success %", 100)), strict=True
    ):
        values = factor * np.array(read["matrices"][name], dtype=float)[:CLASSES_SHOWN, :CLASSES_SHOWN]
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        image = panel.imshow(values, cmap="cividis", vmin=low, vmax=max(high, low + 1e-6), aspect="auto")
        panel.set_facecolor("#f3f4f6")
        panel.set_xticks(range(len(across)), across, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        panel.set_yticks(range(len(down)), down, fontsize=8)
        panel.set_title(title, fontsize=10)
        for (row, column), value in np.ndenumerate(values) if numbered else ():
            if np.isfinite(value):
                colour = "white" if value < low + 0.6 * (high - low) else "black"
                panel.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
        figure.colorbar(image, ax=panel, shrink=0.8, pad=0.02)
    said = f"steered from (down) to (across), at most {CLASSES_SHOWN} each; empty: not steered, or out of reach"
    figure.suptitle(said, fontsize=9)
    return save(figure, path, f"every source and target at an image score of {found['image_score']:g}°, by the auditor")


def _curves(found: Found, path: Path) -> Figure:
    """Success and AS against every budget, by attacker (colour) and judge (line), with 95 % bands."""
    figure, axes = panels(len(BUDGETS), len(FIGURES), width=4.8, height=3.6)
    attackers = list(dict.fromkeys(curve["attacker"] for curve in found["curves"]))
    for column, (budget, (name, unit)) in enumerate(BUDGETS.items()):
        for row, (figure_name, (factor, label)) in enumerate(FIGURES.items()):
            panel = styled(axes[row * len(BUDGETS) + column])
            if column:
                panel.sharey(axes[row * len(BUDGETS)])
            panel.set_title(name if row == 0 else "", fontsize=10, pad=26)  # above the names of the percentiles
            for curve in (curve for curve in found["curves"] if curve["budget"] == budget):
                colour = CYCLE[attackers.index(curve["attacker"]) % len(CYCLE)]
                said = f"{curve['attacker']} attacks, {curve['judge']} judges" if (row, column) == (0, 0) else None
                band(panel, curve, figure_name, factor, color=colour, linestyle=STYLES[curve["judge"]], label=said)
            panel.set_ylabel(label if column == 0 else "")
            panel.set_xlabel(unit if row else "")
            marks = {} if budget == "step" else natural_marks(found["natural"])
            for said, value in marks.items():  # named above the panel, where no curve is
                panel.axvline(value, color=GREY, linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
                where = panel.get_xaxis_transform()
                panel.text(value, 1.01, said, transform=where, fontsize=7, rotation=45, va="bottom")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    caption = "success and AS against every budget; bands: 95 % over classes and images; one step, so a lower bound"
    return save(figure, path, caption)
