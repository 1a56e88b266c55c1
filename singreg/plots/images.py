"""One figure that explains single images: what stays (the logits) and what moves (the meaning)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from singreg import report
from singreg.data.splits import ImageSplit
from singreg.plots import BLUE, ORANGE, arrows, drawable, save, show, styled

HEIGHT = 2.9  # inches an image
SIDES = {"before": "nearest to T(f)", "after": "nearest to T(f~)"}
CONCEPTS_SHOWN = 4  # each way
Image = Mapping[str, Any]


def plot_images(images: Sequence[Image], split: ImageSplit, gallery: ImageSplit, path: Path) -> report.Figure:
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
        _concepts(concepts, image)
        for row, (side, title) in enumerate(SIDES.items()):
            for column, near in enumerate(image["near"].get(side, ())):
                axes = part.add_subplot(grid[row, 3 + column])
                label = int(gallery.labels[near["index"]])
                name = "" if label < 0 else drawable(gallery.class_names[label], 14)
                below = f"{name} {near['angle']:.0f}°"
                show(axes, np.asarray(gallery.image(near["index"])), "" if column else title, below)
    return save(figure, path, "what stays and what moves when the null component is removed")


def _logits(axes: Axes, image: Image) -> None:
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


def _concepts(axes: Axes, image: Image) -> None:
    """An arrow from the angle before to that after for the concepts that went farthest each way."""
    arrows(axes, [*image["falls"][:CONCEPTS_SHOWN], *image["rises"][:CONCEPTS_SHOWN]], 20)
    axes.tick_params(labelsize=7)
    styled(axes, "angle to concepts °; red: away, blue: closer").title.set_fontsize(8)
