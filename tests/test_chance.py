"""Chance levels and perturbations of equal norm: plain loops with explicit projectors, what theory says, processes."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from singreg.analysis import chance
from singreg.analysis.chance import FIGURES, KINDS, _cycle, matched_coefficients, measure_chance, random_projection
from singreg.nullspace import NullSpace
from singreg.translator import LinearTranslator
from tests.processes import run_same
from tests.recipe_run import same
from tests.reference import formulas
from tests.toy import World

DRAWS, SEED = 3, 5
Found = dict[str, Any]


def world() -> World:
    return World.make(31, unlabelled=False)


def measure(w: World, size: int = 4, **options: object) -> Found:
    reader = w.translator.double()
    batches = (replace(b, features=b.features.double()) for b in w.batches(size))
    settings: Any = {"draws": DRAWS, "seed": SEED, "texts": w.texts.double(), "null_space": w.space, **options}
    return measure_chance(batches, translator=reader, mean=w.mean.double(), **settings)


measured = cache(lambda: measure(world()))


def displacement(kind: str, g: Tensor, null: Tensor, random: Tensor) -> Tensor:
    """δ of one image, from vectors: as long as the null part and at its angle to g, towards P g's part across g."""
    if kind == "dimension":
        return random @ g
    n, along = null @ g, g / g.norm()
    across = random @ g - (random @ g @ along) * along
    turned = n.norm() * (1 - (n.norm() / g.norm()) ** 2).sqrt() * across / across.norm()
    return n.norm() ** 2 / g.norm() * along + turned


def loops(w: World, kind: str, centred: bool) -> dict[str, tuple[float, float]]:
    """Mean and spread over draws by plain loops; the texts' cycle is read from the function itself."""
    null, f, t = formulas.null_projector(w.weight), w.features.double(), w.texts.double()
    matrix, offset, draws = w.translator.matrix.double(), w.translator.offset.double(), []
    for draw in range(DRAWS):
        random = random_projection(12, w.space.nullity, seed=(SEED, draw))(torch.eye(12).double())
        cycle, rows = _cycle(len(t), (SEED, draw)), []
        for x, label in zip(f, w.labels.tolist(), strict=True):
            g = x - w.mean.double() if centred else x
            delta = null @ g if kind == "texts" else displacement(kind, g, null, random)
            text = t[int(cycle[label])] if kind == "texts" else t[label]
            score, image, kappa = formulas.scores(matrix @ x + offset, matrix @ (x - delta) + offset, text).values()
            rows.append([score, (-score).clamp_min(0), score.clamp_min(0), score.abs(), image, kappa])
        draws.append(torch.tensor(rows).double().mean(0))
    table = torch.stack(draws)
    return {name: (float(table[:, k].mean()), float(table[:, k].std())) for k, name in enumerate(FIGURES)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("removal", ["paper", "centred"])
def test_levels_are_those_of_plain_loops(kind: str, removal: str) -> None:
    found = measured()
    level = found[removal]["levels"][kind]
    for name, (mean, spread) in loops(world(), kind, removal == "centred").items():
        assert level["mean"][name] == pytest.approx(mean, abs=1e-6), name
        assert level["spread"][name] == pytest.approx(spread, abs=1e-6), name
    assert found["images"] == 31


@pytest.mark.parametrize("centred", [False, True])
def test_the_observed_scores_are_the_real_removals(centred: bool) -> None:
    w, found = world(), measured()["centred" if centred else "paper"]
    z, text = w.translator.double()(w.features.double()), w.texts.double()[w.labels]
    z_eq = w.translator(w.space.remove(w.features.double(), mean=w.mean.double() if centred else None))
    means = {name: float(values.mean()) for name, values in formulas.scores(z, z_eq, text).items()}
    assert {name: found["observed"][name] for name in means} == pytest.approx(means, abs=1e-6)
    texts = found["levels"]["texts"]
    assert (texts["mean"]["IS"], texts["spread"]["IS"]) == pytest.approx((means["IS"], 0), abs=1e-6)


@pytest.mark.parametrize("rows", [2, 9])  # a null space larger and smaller than the row space
def test_equal_energy_is_equal_for_every_image_at_the_same_angle(rows: int) -> None:
    g = torch.Generator().manual_seed(rows)
    f = torch.randn(50, 12, generator=g, dtype=torch.float64) + 1
    space = NullSpace.from_weight(torch.randn(rows, 12, generator=g))
    null, part, squared = space.component(f), random_projection(12, space.nullity, seed=1)(f), f.square().sum(1)
    share, other = null.square().sum(1) / squared, part.square().sum(1) / squared
    assert (share - other).abs().max() > 0.05  # the control: a plain random removal takes another share of each image
    alpha, beta = matched_coefficients(share, other)
    delta = alpha[:, None] * f + beta[:, None] * part
    torch.testing.assert_close(delta.norm(dim=1), null.norm(dim=1))
    torch.testing.assert_close((delta * f).sum(1), (null * f).sum(1))
    torch.testing.assert_close((f - delta).norm(dim=1), space.remove(f).norm(dim=1))


@pytest.mark.parametrize("dimension", [3, 7])
def test_random_subspaces_are_uniform_and_orthonormal(dimension: int) -> None:
    eye = torch.eye(10).double()
    drawn = torch.stack([random_projection(10, dimension, seed=seed)(eye) for seed in range(400)])
    torch.testing.assert_close(drawn.mean(0), eye * dimension / 10, atol=0.06, rtol=0)
    first = drawn[0]
    torch.testing.assert_close(first @ first, first)
    assert torch.linalg.matrix_rank(first) == dimension
    assert torch.equal(random_projection(10, dimension, seed=0)(eye), first)


def test_energies_removed_are_reported() -> None:
    w = world()
    paper, f = measure(w, draws=200, size=31)["paper"], w.features.double()
    expected = float(w.space.component(f).square().sum() / f.square().sum())
    energies = [paper["energy"], *(paper["levels"][kind]["energy"] for kind in ("energy", "texts"))]
    assert energies == pytest.approx([expected] * 3, rel=1e-9)
    assert paper["levels"]["dimension"]["energy"] == pytest.approx(8 / 12, abs=0.03)  # d/m whatever the features
    assert abs(expected - 8 / 12) > 0.03


def beyond(scores: Found, kind: str, figure: str) -> float:
    """How many spreads the observed figure lies from the draws' mean."""
    level = scores["levels"][kind]
    return (scores["observed"][figure] - level["mean"][figure]) / level["spread"][figure]


def test_a_null_space_drawn_at_random_is_at_its_own_chance_level() -> None:
    """And one that was put where the meaning is, is not: the levels are where they should be, and they discriminate."""
    g = torch.Generator().manual_seed(0)
    f, matrix = torch.randn(400, 20, generator=g), torch.randn(9, 20, generator=g)
    weight, texts, concepts = (torch.randn(*shape, generator=g) for shape in ((8, 20), (4, 9), (3, 9)))
    T = LinearTranslator(matrix, torch.zeros(9))
    w = World(f, torch.arange(400) % 4, weight, T, texts, concepts, f.mean(0))
    scores = measure(w, size=100, draws=30)["paper"]
    for kind in ("dimension", "energy"):
        for name in FIGURES:
            assert abs(beyond(scores, kind, name)) < 4, (kind, name)
    aligned = replace(w, weight=torch.linalg.qr(matrix.T).Q.T[:8])  # the null loses eight of nine directions T reads
    assert beyond(measure(aligned, size=100, draws=12)["paper"], "dimension", "IS") < -5


def test_shuffled_texts_never_read_a_class_by_its_own() -> None:
    for classes in (2, 3, 50):
        for seed in range(20):
            order = _cycle(classes, (seed, 0))
            assert sorted(order.tolist()) == list(range(classes))
            assert not (order == torch.arange(classes)).any()
    assert len({tuple(_cycle(5, (seed, 0)).tolist()) for seed in range(40)}) > 10


def test_the_seed_decides_and_float32_gives_the_same_to_rounding() -> None:
    w, exact = world(), measured()
    assert measure(w) == exact
    other = measure(w, seed=6)["paper"]["levels"]
    assert all(other[kind] != exact["paper"]["levels"][kind] for kind in KINDS)
    options: Any = {"texts": w.texts, "null_space": w.space, "mean": w.mean, "draws": DRAWS, "seed": SEED}
    narrow = measure_chance(w.batches(), translator=w.translator.float(), **options)
    for kind in KINDS:
        mean = exact["centred"]["levels"][kind]["mean"]
        assert narrow["centred"]["levels"][kind]["mean"] == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize(("processes", "count"), [(2, 31), (3, 31), (3, 2)])  # with two images the third is idle
def test_over_processes_it_is_the_same(processes: int, count: int) -> None:
    w = World.make(count, unlabelled=False)
    expected = measure(w)
    for found in run_same(processes, measure, w, 5):
        same(found, expected, rel=1e-9, abs=1e-9)


def perturb(w: World, size: int = 4, **options: Any) -> dict[str, Any]:
    settings = {"null_space": options.pop("null_space", None) or w.space, "chosen": np.arange(len(w.labels)), **options}
    return chance.measure_perturbations(w.batches(size), weight=w.weight, translators={"T": w.translator}, **settings)


def slow_perturbations(w: World, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Every figure image by image: {kind: {figure: (N, sizes)}}."""
    project = formulas.null_projector(w.weight)
    weight, matrix, offset = w.weight.double(), w.translator.matrix.double(), w.translator.offset.double()
    found: dict[str, dict[str, list[list[float]]]] = {kind: {} for kind in chance.PERTURBATIONS}
    for index, f in enumerate(w.features.double()):
        gaussian = np.random.Generator(np.random.Philox(key=[seed, index])).standard_normal(len(f))
        whole = torch.from_numpy(gaussian)
        kinds = {"null": project @ whole, "random": whole, "principal": whole - project @ whole}
        for kind, direction in kinds.items():
            rows: dict[str, list[float]] = {"logit_change": [], "angle T": []}
            for size in chance.SIZES:
                moved = f + size * f.norm() * direction / direction.norm()
                rows["logit_change"].append(float((weight @ moved - weight @ f).abs().max()))
                angle = formulas.angle_degrees(matrix @ f + offset, matrix @ moved + offset)
                rows["angle T"].append(float(angle))
            for name, values in rows.items():
                found[kind].setdefault(name, []).append(values)
    return {kind: {name: np.array(values) for name, values in rows.items()} for kind, rows in found.items()}


def test_every_figure_is_that_of_plain_loops() -> None:
    w = World.make(31)
    report = perturb(w, seed=3)
    for kind, figures in slow_perturbations(w, 3).items():
        for name, values in figures.items():
            tolerance = 1e-5 if name.startswith("angle") else 1e-9  # the translator's matrix is in float32
            expected = values.mean(0).tolist()
            assert report["curves"][kind][name] == pytest.approx(expected, abs=tolerance), (kind, name)
    top = (w.features.double() @ w.weight.double().T).topk(2, dim=1).values
    assert report["margin"] == pytest.approx(float((top[:, 0] - top[:, 1]).mean()))
    assert report["images"] == 31


def test_the_null_moves_meaning_and_no_logit_the_row_space_moves_logits() -> None:
    null, random, principal = (perturb(World.make(200))["curves"][kind] for kind in chance.PERTURBATIONS)
    assert max(null["logit_change"]) < 1e-12
    assert null["angle T"][4] > 5
    assert null["logit_change"][4] < random["logit_change"][4] < principal["logit_change"][4]
    # A random direction has √(r/m) of its length in the row space.
    ratio = random["logit_change"][4] / principal["logit_change"][4]
    assert ratio == pytest.approx((4 / 12) ** 0.5, rel=0.1)
    assert principal["logit_change"][4] == pytest.approx(10 * principal["logit_change"][2])


def test_a_head_without_a_null_space_has_no_null_curve() -> None:
    full = replace(World.make(9), weight=torch.randn(15, 12, generator=torch.Generator().manual_seed(2)))
    curves = perturb(full, null_space=NullSpace.from_weight(full.weight, allow_empty=True))["curves"]
    assert sorted(curves) == ["principal", "random"]
    for name, values in curves["random"].items():
        assert curves["principal"][name] == pytest.approx(values)


def test_softmax_invariance_reads_changes_about_their_mean() -> None:
    w = World.make(20)
    space = NullSpace.from_weight(w.weight, invariance="softmax")
    plain = NullSpace(space.basis, space.singular_values)  # the control: read as if logits had to stay
    changes = [max(perturb(w, null_space=s)["curves"]["null"]["logit_change"]) for s in (space, plain)]
    assert changes[0] < 1e-12
    assert changes[1] > 0.1


@pytest.mark.parametrize(("world", "count"), [(2, 31), (3, 31), (3, 2)])  # with two images the third is idle
def test_perturbations_over_processes_are_the_same(world: int, count: int) -> None:
    expected = perturb(World.make(count))
    for report in run_same(world, perturb, World.make(count), 5):
        assert report["images"] == count
        for kind in chance.PERTURBATIONS:
            for name, values in expected["curves"][kind].items():
                tolerance = 1e-5 if name == "logit_change_float32" else 1e-9  # float32 products depend on the batch
                assert report["curves"][kind][name] == pytest.approx(values, abs=tolerance), (kind, name)
