"""What is planted is what the scores name; nothing done to the null block moves the auditor.

What each figure should say of what is planted in the null space (●: clearly not chance, ○: chance or nothing):

| planted in the null | |AS| paper's | AS⁻ | AS⁺ | κ | |AS| centred | unique R² | class probe | AS⁻ own over other text
| |---|---|---|---|---|---|---|---|---| | leakage: class meaning      | ● | ● | ○ | - | ● | ● | ● | ● | | nuisance:
across the class  | ● | ○ | ● | + | ● | ● | ○ | ○ | | copy: of the row space      | ● | ● | ○ | - | ● | ○ | ● | ● | |
offset: one for all         | ● | ● | ○ | - | ○ | ○ | ○ | ○ | | nothing                     | ○ | ○ | ○ | 0 | ○ | ○ | ○
| ○ |
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from build_demo import PROMPTS
from singreg.analysis.chance import measure_chance
from singreg.analysis.fitting import fit_on_split
from singreg.analysis.probes import fit_blocks, measure_information
from singreg.analysis.scores import analyze_model
from singreg.data.scenes import ATTRIBUTES, BACKGROUNDS, SHAPES, SceneTable, sample_scenes
from singreg.functional import attribute_score, image_score, kappa
from singreg.metrics import score_columns, summarize_columns
from singreg.models.classifier import Classifier
from singreg.nullspace import NullSpace
from singreg.ridge import Standardize
from singreg.translator import LinearTranslator, fit_translator
from tests import toy
from tests.demo import altered, demo_vlm, embedded
from tests.planted import CASES, CLASSES, DIM, Planted, plant

LOUD = [case for case in CASES if case != "nothing"]
Found = dict[str, Any]


@cache
def findings(case: str) -> tuple[Found, Found, Found]:
    """Both removals' scores with their chance levels, and information: fitted on one split, measured on another."""
    fit, test = plant(case, seed=1), plant(case, seed=2, count=800)
    auditor = fit_translator([(b.features, b.embeddings) for b in fit.batches()], standardize=fit.space.basis)
    options: Any = {"texts": test.texts, "null_space": test.space, "mean": fit.features.mean(0), "draws": 4}
    chance = measure_chance(test.batches(), translators={"auditor": auditor}, **options)["auditor"]
    fits = fit_blocks(fit.batches(), null_space=fit.space, classes=CLASSES, target_dim=DIM)
    return chance["paper"], chance["centred"], measure_information(test.batches(), fits)


def decide(case: str) -> str:
    """The decision table read from top to bottom."""
    paper, centred, information = findings(case)
    if paper["observed"]["IS"] < 0.25 * paper["levels"]["energy"]["mean"]["IS"]:
        return "nothing"
    if centred["observed"]["AS_abs"] < 0.25 * paper["observed"]["AS_abs"]:
        return "offset"
    if information["intervals"]["unique"][1] < 0.01:
        return "copy"
    class_in_null = information["intervals"]["accuracy null_space"][0] > 2 * information["chance"]
    harm, benign, sign = (centred["observed"][key] for key in ("AS_neg", "AS_pos", "kappa"))
    if class_in_null and harm > 3 * benign and sign < 0:
        return "leakage"
    return "nuisance" if not class_in_null and benign > 3 * harm and sign > 0 else "undecided"


@pytest.mark.parametrize("case", CASES)
def test_each_truth_is_told_apart(case: str) -> None:
    assert decide(case) == case


def test_the_papers_absolute_score_cannot_tell_them_apart() -> None:
    """Leakage and nuisance, its opposite, read the same |AS|; so do all four that are not nothing."""
    values = {case: findings(case)[0]["observed"]["AS_abs"] for case in CASES}
    assert [values[case] for case in LOUD] == pytest.approx([5.0] * len(LOUD), rel=0.05)
    assert values["nothing"] < 0.5


@pytest.mark.parametrize(
    ("case", "sign", "unique", "inside", "own"),
    [
        ("leakage", -1, 0.11, True, True),
        ("copy", -1, 0, True, True),
        ("offset", -1, 0, False, False),
        ("nuisance", 1, 0.65, False, None),
        ("nothing", 0, 0, False, False),
    ],
)
def test_every_figure_says_what_the_table_says(
    case: str, sign: int, unique: float, inside: bool, own: bool | None
) -> None:
    paper, centred, information = findings(case)
    figures = paper["observed"]
    if sign:  # the sign tells harm from help
        assert sign * figures["kappa"] > 0.2
        assert sign * (figures["AS_pos"] - figures["AS_neg"]) > 0.95 * figures["AS_abs"]
        ratio = centred["observed"]["AS_abs"] / figures["AS_abs"]  # only an offset goes with centring
        assert ratio < 0.15 if case == "offset" else ratio == pytest.approx(1, abs=0.02)
    else:
        assert abs(figures["kappa"]) < 0.05
        assert abs(figures["AS"]) < 0.1
    low, high = information["intervals"]["unique"]
    assert information["unique"] == pytest.approx(unique, abs=0.02)
    assert low <= information["unique"] <= high
    assert (low > 0.05) == (unique > 0)
    low, high = information["intervals"]["accuracy null_space"]
    assert (low > 0.7) == inside
    assert inside or low < 1.2 / CLASSES < high + 0.05
    assert (information["unique_accuracy"] > 0.05) == (case == "leakage")  # a copy adds nothing to the row space
    other = paper["levels"]["texts"]["mean"]["AS_neg"]
    if own is not None:  # another class's text tells the class from a shift of all
        assert figures["AS_neg"] > 4 * other if own else figures["AS_neg"] < 1.2 * other


def test_removing_nothing_is_far_below_a_random_removal() -> None:
    """It is no accident of its size: random subspaces as large, or as energetic, cost meaning."""
    paper = findings("nothing")[0]
    for kind in ("dimension", "energy"):
        assert paper["observed"]["IS"] < 0.15 * paper["levels"][kind]["mean"]["IS"]
        assert paper["observed"]["AS_neg"] < 0.05 * paper["levels"][kind]["mean"]["AS_neg"]


# The auditor: f' = Π_p f + M Π_n f, with M a rotation inside the null space or 0.1 of it, gives the same logits and
# holds the same information. A frozen translator is fooled by the rotation, an un-standardised refit by the shrinking,
# and so is one standardised feature by feature, unless the head is aligned with the axes (METHOD section 8.6).
FIGURES = ("AS", "AS_neg", "AS_abs", "IS", "kappa")
RIDGE = 1.0  # relative; a penalty that is felt, as on real features
Warp = Literal["same", "rotated", "shrunk", "both"]


def warp_matrix(space: NullSpace, warp: Warp) -> Tensor:
    """The map of feature space (m, m) that leaves the row space alone."""
    null, g = space.null_basis(), torch.Generator().manual_seed(9)
    turn = torch.linalg.qr(torch.randn(space.nullity, space.nullity, generator=g, dtype=torch.float64)).Q
    inside = turn if warp in ("rotated", "both") else torch.eye(space.nullity).double()
    return space.basis @ space.basis.T + (0.1 if warp in ("shrunk", "both") else 1) * null @ inside @ null.T


def warped(part: Planted, warp: Warp) -> Planted:
    return replace(part, features=part.features @ warp_matrix(part.space, warp).T)


def aligned(part: Planted) -> Planted:
    """The same images in coordinates in which the head reads the first axes only."""
    basis = torch.cat([part.space.basis, part.space.null_basis()], dim=1)
    return replace(part, features=part.features @ basis, weight=part.weight @ basis)


def fit(part: Planted, standardize: Standardize) -> LinearTranslator:
    return fit_translator([(part.features, part.embeddings)], standardize=standardize, ridges=[RIDGE])


def read(translator: LinearTranslator, part: Planted) -> dict[str, float]:
    """Figures of the real removal, in float64."""
    translator = copy.deepcopy(translator).double()
    z, z_eq = translator(part.features), translator(part.space.remove(part.features))
    summary = summarize_columns(score_columns(z, z_eq, part.texts[part.labels]).sum(1, keepdim=True))
    return {name: float(summary[name]) for name in FIGURES}


@cache
def auditor(warp: Warp, how: str, along_axes: bool = False) -> dict[str, float]:
    """Refitted on the warped images of one split, read on the warped images of another."""
    made = [plant("leakage", seed=seed, count=count) for seed, count in ((1, 3000), (2, 400))]
    fitted, test = (warped(aligned(part) if along_axes else part, warp) for part in made)
    return read(fit(fitted, {"plain": False, "features": True, "blocks": fitted.space.basis}[how]), test)


def change(after: dict[str, float], before: dict[str, float]) -> float:
    return max(abs(after[name] - before[name]) / abs(before[name]) for name in FIGURES)


@pytest.mark.parametrize("warp", ["rotated", "shrunk", "both"])
def test_the_auditor_does_not_move(warp: Warp) -> None:
    assert auditor("same", "blocks")["AS_neg"] > 1  # there is something to lose
    assert change(auditor(warp, "blocks"), auditor("same", "blocks")) < 1e-4  # float32 storage of A is all that is left


def test_what_the_auditor_sees_through_fools_the_others() -> None:
    frozen, test = fit(plant("leakage", seed=1), plant("leakage").space.basis), plant("leakage", seed=2, count=400)
    assert read(frozen, warped(test, "rotated"))["AS_neg"] < 0.5 * read(frozen, test)["AS_neg"]
    for how in ("plain", "features"):
        assert auditor("shrunk", how)["AS_neg"] < 0.5 * auditor("same", how)["AS_neg"]
    assert change(auditor("rotated", "plain"), auditor("same", "plain")) < 1e-4
    # With the axes along the head's two blocks, shrinking one is a rescaling of features; turning it is not.
    before = auditor("same", "features", True)
    assert change(auditor("shrunk", "features", True), before) < 1e-4
    assert change(auditor("rotated", "features", True), before) > 0.01
    # The block scale does not know where the axes are.
    assert change(auditor("shrunk", "blocks", True), auditor("same", "blocks")) < 1e-4


def test_the_whole_path_from_images_to_report_stays_within_one_per_cent() -> None:
    """fit_on_split and analyze_model on a classifier whose null block was turned and shrunk by a layer of its own."""
    model, split, test = toy.classifier(), toy.ToySplit(240), toy.ToySplit(31, seed=1)
    mean, z = toy.features(model, split).mean(0).float(), toy.embeddings(240)
    found: dict[tuple[Warp, str], list[float]] = {}
    kinds: tuple[Literal["blocks", "features"], ...] = ("blocks", "features")
    for warp in ("same", "both"):
        matrix = warp_matrix(NullSpace.from_weight(model.weight), warp).float()  # type: ignore[arg-type]
        layers, layer = list(copy.deepcopy(model.model).children()), nn.Linear(toy.WIDTH, toy.WIDTH, bias=False)
        layer.weight.data.copy_(matrix)
        other = Classifier.from_module(nn.Sequential(*layers[:-1], layer, layers[-1]), "5", transform=toy.to_tensor)
        options: Any = {"ridges": [RIDGE], "settings": toy.QUIET}
        auditors = {how: fit_on_split(other, split, z, standardize=how, **options).translator for how in kinds}
        options = {"mean": mean @ matrix.T, "settings": toy.QUIET}
        measured = analyze_model(other, test, toy.embeddings(31, 1), toy.texts(), auditors, **options)[1]
        for how, by in measured["translators"].items():
            kept = [by[kind][name] for kind in ("overall", "centred") for name in ("AS", "AS_neg", "AS_abs", "IS")]
            found[warp, how] = kept  # type: ignore[index]
    moved = {how: np.abs(np.array(found["both", how]) / found["same", how] - 1).max() for how in kinds}
    assert moved["blocks"] < 0.01
    assert moved["features"] > 0.3


# Scenes whose attributes are known: features are made from the packaged vision-language model's own embeddings, a head
# reads some attributes and the null space holds others, so it is known which concept removing (or swapping) the null
# component must move.
COUNT, FITTED = 420, 260
PLAIN = {"shape": SHAPES.index("circle"), "color": 7, "texture": 0, "background": BACKGROUNDS.index("snow")}
PLAIN |= {"size": 1, "place": 4}


@cache
def scenes() -> SceneTable:
    return sample_scenes(COUNT, seed=4711)


@cache
def scene_embeddings() -> Tensor:
    return embedded(scenes())


@cache
def prompts() -> dict[str, Tensor]:
    """Unit text embeddings of every attribute's values, (K, 64) float64 by attribute."""
    texts = {name: [PROMPTS[name][0].format(value) for value in values] for name, values in ATTRIBUTES.items()}
    return {name: demo_vlm().embed_texts(each).double() for name, each in texts.items()}


def similarities(z: Tensor) -> Tensor:
    """Cosines to the prompts of all 38 values: what a head could read."""
    return nn.functional.normalize(z, dim=1) @ torch.cat(list(prompts().values())).T


def held_out(attribute: str) -> Tensor:
    return torch.from_numpy(scenes().codes[attribute][FITTED:])


def planted_features(attribute: str) -> tuple[Tensor, Tensor]:
    """Features (N, m) whose head W (38, m) reads everything but one attribute, which only the null space holds."""
    read = similarities(embedded(altered(scenes(), **{attribute: PLAIN[attribute]})))
    others = {name: value for name, value in PLAIN.items() if name != attribute}
    features = torch.cat([part / part.std() for part in (read, embedded(altered(scenes(), **others)))], dim=1)
    width, classes, g = features.shape[1], read.shape[1], torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64)).Q
    mix = torch.randn(classes, classes, generator=g, dtype=torch.float64)
    return features @ turn.T, torch.cat([mix, mix.new_zeros(classes, width - classes)], dim=1) @ turn.T


@pytest.mark.parametrize("planted", ["background", "color", "shape"])
def test_removing_the_null_moves_the_concept_that_was_planted_there(planted: str) -> None:
    features, weight = planted_features(planted)
    translator = fit_translator([(features[:FITTED], scene_embeddings()[:FITTED])]).double()
    space, mean, tested = NullSpace.from_weight(weight), features[:FITTED].mean(0), features[FITTED:]
    removed = space.remove(tested, mean=mean)
    assert ((tested - removed) @ weight.T - space.component(mean) @ weight.T).abs().max() < 1e-9
    z, z_eq = translator(tested), translator(removed)
    own = {name: prompts()[name][held_out(name)] for name in ATTRIBUTES}
    moved = {name: float(attribute_score(z, z_eq, own[name]).mean()) for name in ATTRIBUTES}
    assert moved[planted] < -10
    assert all(abs(moved[planted]) > 4 * abs(moved[name]) for name in ATTRIBUTES if name != planted), moved
    assert kappa(z, z_eq, own[planted]).mean() < -0.7
    for name in ATTRIBUTES:  # and the truth itself: what can still be told from the equivalent features
        readable = float(((z_eq @ prompts()[name].T).argmax(1) == held_out(name)).double().mean())
        assert readable < 0.35 if name == planted else readable > 0.9, name
    harm = float(attribute_score(z, z_eq, own["shape"]).neg().clamp_min(0).mean())  # the class figure of the reports
    assert harm > 20 if planted == "shape" else harm < 0.5  # class meaning in the null space is called leakage
    assert image_score(z, z_eq).mean() > 10  # either way the meaning moves: IS alone does not tell them apart


@pytest.mark.parametrize("swapped", ["background", "color"])
def test_a_swapped_attribute_is_told_apart_by_its_own_prompts(swapped: str) -> None:
    """Equal logits, and a null component taken from a copy of the scene with another background or colour."""
    values, z = len(ATTRIBUTES[swapped]), scene_embeddings()
    another = (scenes().codes[swapped] + 1 + np.arange(COUNT) % (values - 1)) % values
    seen = similarities(z)[:, : len(SHAPES)]
    other = embedded(altered(scenes(), **{swapped: another}))
    original, swap = (torch.cat([seen / seen.std(), each / z.std()], dim=1) for each in (z, other))
    space = NullSpace.from_weight(torch.eye(len(SHAPES), original.shape[1]))
    torch.testing.assert_close(space.component(swap - original), swap - original)
    translator = fit_translator([(original[:FITTED], z[:FITTED])]).double()
    before, after = translator(original[FITTED:]), translator(swap[FITTED:])
    towards = attribute_score(before, after, prompts()[swapped][torch.from_numpy(another[FITTED:])])
    away = attribute_score(before, after, prompts()[swapped][held_out(swapped)])
    assert (towards > 0).double().mean() > 0.95
    assert (away < 0).double().mean() > 0.95
    assert towards.mean() > 10
    for name in set(ATTRIBUTES) - {swapped}:
        others = attribute_score(before, after, prompts()[name][held_out(name)])
        assert others.abs().mean() < towards.mean() / 4, name
