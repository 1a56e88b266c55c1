"""What the scores mean, on pictures whose attributes are known: what is planted in the null space is what the scores name.

Features are made from the packaged vision-language model's own embeddings: a head reads some attributes and the null space
holds others, so it is known beforehand which concept removing (or swapping) the null component must move.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from recipes.build_demo import PROMPTS
from singreg.analysis.features import PassSettings
from singreg.analysis.old_fitting import fit_on_part
from singreg.analysis.model import analyze_model
from singreg.analysis.results import CENTRED
from singreg.data.datasets import SceneSplit
from singreg.data.scenes import ATTRIBUTES, BACKGROUNDS, SHAPES, SceneTable, sample_scenes
from singreg.functional import attribute_score, image_score, kappa
from singreg.metrics import SemanticLeakage
from singreg.nullspace import NullSpace
from singreg.translator import LinearTranslator, fit_translator
from tests.demo import altered, demo_classifier, demo_vlm, embedded
from tests.reference import formulas

COUNT, FITTED = 420, 260
PLAIN = {"shape": SHAPES.index("circle"), "color": 7, "texture": 0, "background": BACKGROUNDS.index("snow"), "size": 1, "place": 4}


@cache
def scenes() -> SceneTable:
    return sample_scenes(COUNT, seed=4711)


@cache
def prompts() -> dict[str, Tensor]:
    """Unit text embeddings of every attribute's values, (K, 64) float64 by attribute."""
    vlm = demo_vlm()
    return {name: vlm.embed_texts([PROMPTS[name][0].format(v) for v in values]).double() for name, values in ATTRIBUTES.items()}


@cache
def embeddings() -> Tensor:
    return embedded(scenes())


def scaled(part: Tensor) -> Tensor:
    return part / part.std()


def similarities(z: Tensor) -> Tensor:
    """Cosines to the prompts of all 38 values: what a head could read."""
    return torch.nn.functional.normalize(z, dim=1) @ torch.cat(list(prompts().values())).T


def planted_features(attribute: str) -> tuple[Tensor, Tensor]:
    """Features (N, m) whose head W (38, m) reads everything but one attribute, which only the null space holds."""
    read = scaled(similarities(embedded(altered(scenes(), **{attribute: PLAIN[attribute]}))))
    hidden = scaled(embedded(altered(scenes(), **{name: value for name, value in PLAIN.items() if name != attribute})))
    generator = torch.Generator().manual_seed(1)
    features = torch.cat([read, hidden], dim=1)
    width, classes = features.shape[1], read.shape[1]
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    mix = torch.randn(classes, classes, generator=generator, dtype=torch.float64)
    return features @ turn.T, torch.cat([mix, mix.new_zeros(classes, width - classes)], dim=1) @ turn.T


def held_out(attribute: str) -> Tensor:
    return torch.from_numpy(scenes().codes[attribute][FITTED:])


@pytest.mark.parametrize("planted", ["background", "color", "shape"])
def test_removing_the_null_moves_the_concept_that_was_planted_there(planted: str) -> None:
    features, weight = planted_features(planted)
    translator = fit_translator([(features[:FITTED], embeddings()[:FITTED])]).double()
    space, mean = NullSpace.from_weight(weight), features[:FITTED].mean(0)
    tested = features[FITTED:]
    removed = space.remove(tested, mean=mean)
    constant = space.component(mean) @ weight.T
    assert ((tested - removed) @ weight.T - constant).abs().max() < 1e-9
    z, z_eq = translator(tested), translator(removed)
    own = {name: prompts()[name][held_out(name)] for name in ATTRIBUTES}
    moved = {name: float(attribute_score(z, z_eq, own[name]).mean()) for name in ATTRIBUTES}
    assert moved[planted] < -10
    assert all(abs(moved[planted]) > 4 * abs(moved[name]) for name in ATTRIBUTES if name != planted), moved
    assert kappa(z, z_eq, own[planted]).mean() < -0.7
    for name in ATTRIBUTES:  # and the truth itself: what can still be told from the equivalent features
        readable = float(((z_eq @ prompts()[name].T).argmax(1) == held_out(name)).double().mean())
        assert readable < 0.35 if name == planted else readable > 0.9, name
    leakage = SemanticLeakage(prompts()["shape"])  # the class figure of the reports
    leakage.update(z, z_eq, held_out("shape"))
    harm = float(leakage.compute()["AS_neg"])
    if planted == "shape":
        assert harm > 20  # the control: class meaning in the null space is called leakage
    else:
        assert harm < 0.5
    assert image_score(z, z_eq).mean() > 10  # either way the picture's meaning moves: IS alone does not tell them apart


@pytest.mark.parametrize("swapped", ["background", "color"])
def test_a_pair_that_differs_in_one_attribute_is_told_apart_by_that_attributes_prompts(swapped: str) -> None:
    """Equal logits, and a null component taken from a copy of the scene with another background or colour."""
    values = len(ATTRIBUTES[swapped])
    another = (scenes().codes[swapped] + 1 + np.arange(COUNT) % (values - 1)) % values
    copies = embedded(altered(scenes(), **{swapped: another}))
    read = scaled(similarities(embeddings())[:, : len(SHAPES)])
    original, copy = (torch.cat([read, z / embeddings().std()], dim=1) for z in (embeddings(), copies))
    space = NullSpace.from_weight(torch.eye(len(SHAPES), original.shape[1]))
    torch.testing.assert_close(space.component(copy - original), copy - original)
    translator = fit_translator([(original[:FITTED], embeddings()[:FITTED])]).double()
    z, z_eq = translator(original[FITTED:]), translator(copy[FITTED:])
    towards_new = attribute_score(z, z_eq, prompts()[swapped][torch.from_numpy(another[FITTED:])])
    from_old = attribute_score(z, z_eq, prompts()[swapped][held_out(swapped)])
    assert (towards_new > 0).double().mean() > 0.95
    assert (from_old < 0).double().mean() > 0.95
    size = float(towards_new.mean())
    assert size > 10
    for name in set(ATTRIBUTES) - {swapped}:
        assert attribute_score(z, z_eq, prompts()[name][held_out(name)]).abs().mean() < size / 4, name


@cache
def packaged() -> tuple[SceneSplit, np.ndarray, dict[str, LinearTranslator], Tensor]:
    """Test scenes with embeddings, and a plain and a standardised translator of the packaged classifier with its mean feature."""
    settings = PassSettings(progress=False)
    part = SceneSplit("audit", sample_scenes(300, seed=1))
    z = embedded(part.table).float().numpy()
    plain = fit_on_part(demo_classifier(), part, z, settings=settings)
    standardized = fit_on_part(demo_classifier(), part, z, standardize=True, settings=settings)
    test = SceneSplit("test", sample_scenes(150, seed=2))
    return test, embedded(test.table).float().numpy(), {"frozen": plain.translator, "auditor": standardized.translator}, plain.mean


def test_scores_of_the_packaged_classifier_are_the_slow_formulas_image_by_image() -> None:
    part, z, translators, mean = packaged()
    texts = demo_vlm().embed_classes(SHAPES)
    measured = analyze_model(
        demo_classifier(), part, z, texts, translators, mean=mean, settings=PassSettings(batch_size=37, progress=False)
    )
    assert measured.logit_change_float64 <= 1e-9
    assert measured.logit_change_float32 <= 1e-4
    images = torch.stack([demo_classifier().transform(part.image(index)) for index in range(len(part))])
    with torch.no_grad():
        f = demo_classifier().features(images).double()
    project, text = formulas.null_projector(demo_classifier().weight), texts[part.labels]
    for name, translator in translators.items():
        matrix, offset = translator.matrix.double(), translator.offset.double()
        for kind, removed in {"": f @ project, CENTRED: (f - mean) @ project}.items():
            before, after = (g @ matrix.T + offset for g in (f, f - removed))
            attribute = formulas.angle_degrees(before, text) - formulas.angle_degrees(after, text)
            image = formulas.angle_degrees(before, after)
            np.testing.assert_allclose(measured.rows[f"{kind}AS/{name}"], attribute.numpy(), atol=1e-4, rtol=0)
            np.testing.assert_allclose(measured.rows[f"{kind}IS/{name}"], image.numpy(), atol=1e-4, rtol=0)
            assert attribute.abs().max() > 3
            overall = measured.translators[name].centred if kind else measured.translators[name].overall
            assert overall["AS_neg"] == pytest.approx(float(torch.relu(-attribute).mean()), abs=1e-4)
            assert overall["IS"] == pytest.approx(float(image.mean()), abs=1e-4)
