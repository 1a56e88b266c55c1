"""Angles and scores against arccos, also where it fails; metrics against plain loops, over batches and processes."""

import pickle
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from singreg import functional, metrics
from singreg.functional import angle, attribute_score, image_score, kappa, pairwise_angles, unit_rows
from singreg.metrics import AttributeScore, ImageScore, SemanticLeakage
from tests.processes import run_processes
from tests.reference import formulas


@pytest.mark.parametrize("degrees", [1e-4, 0.06, 1.0, 179.94, 180.0])
def test_angle_is_exact_at_both_ends_in_float32(degrees: float) -> None:
    """Trap 3: arccos of a clamped cosine is not."""
    radians = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    x, y = torch.tensor([1.0, 0.0]), torch.stack([torch.cos(radians), torch.sin(radians)]).float()
    assert abs(angle(x, y).item() - degrees) < 2e-5  # float32 itself cannot place 180 better
    if degrees == 0.06:
        arccos = torch.rad2deg(torch.arccos((x @ y / y.norm()).clamp(-1, 1)))
        assert abs(arccos.item() - degrees) > 5e-4


def test_angle_is_that_of_arccos_with_its_gradient_and_widths_must_agree() -> None:
    x, y = (torch.randn(50, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(angle(x, y), formulas.angle_degrees(x, y))
    assert torch.autograd.gradcheck(angle, (x[:4], y[:4]))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        angle(torch.ones(2, 3), torch.ones(2, 4))


@pytest.mark.parametrize("y", [[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
def test_gradient_is_finite_everywhere(y: list[float]) -> None:
    x, other = torch.tensor([1.0, 0.0], requires_grad=True), torch.tensor(y, requires_grad=True)
    angle(x, other).backward()
    assert torch.isfinite(torch.cat([x.grad, other.grad])).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_attribute_score_is_bounded_by_image_score_and_scale_free(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, z_eq, t = (torch.randn(20, 6, dtype=torch.float64, generator=generator) for _ in range(3))
    attribute = attribute_score(z, z_eq, t)
    assert (attribute.abs() <= image_score(z, z_eq) + 1e-9).all()
    torch.testing.assert_close(attribute_score(scale * z, z_eq, t), attribute)
    assert (attribute_score(t, z_eq, t) < 0).all()  # the removal led away from the prompt: leakage


def test_kappa_is_its_definition_and_zero_at_chance() -> None:
    z, z_eq, t = (torch.randn(30, 7, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(kappa(z, z_eq, t), formulas.scores(z, z_eq, t)["kappa"])
    many = torch.randn(20_000, 32)
    assert kappa(many, many + 0.5 * torch.randn_like(many), torch.randn(32)).mean().abs() < 0.02
    assert kappa(many, many, torch.randn(32)).abs().max() < 1  # nothing moved: defined, not NaN


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.float64, 1e-7)])
@patch.object(functional, "REFINED_AT_ONCE", 7)
def test_pairwise_angles_are_right_from_0_to_180(dtype: torch.dtype, tolerance: float) -> None:
    """Vectors of 768 dimensions at planted angles; arccos of the cosine alone is the control."""
    generator = torch.Generator().manual_seed(0)
    base, across = torch.linalg.qr(torch.randn(768, 2, generator=generator, dtype=torch.float64)).Q.T
    ends = [0, 1e-6, 1e-4, 1e-3, 0.01, 0.5, 5, 30, 36, 37, 60, 90, 120, 144, 150, 179, 179.9999, 180]
    degrees = torch.tensor(ends, dtype=torch.float64)
    radians = degrees.deg2rad()[:, None]
    rows = unit_rows((radians.cos() * base + radians.sin() * across).to(dtype))
    x = unit_rows(base.to(dtype)[None])
    truth = angle(x.double(), rows.double())  # of the rounded rows themselves
    found, cosines = pairwise_angles(x, rows)
    assert (found[0].double() - truth).abs().max() < tolerance
    assert (truth - degrees).abs().max() < (1e-5 if dtype == torch.float32 else 1e-10)
    torch.testing.assert_close(cosines[0].double(), degrees.deg2rad().cos(), atol=1e-6, rtol=0)
    control = torch.rad2deg(torch.acos((x @ rows.T).clamp(-1, 1)))[0].double()
    assert (control - truth).abs().max() > 2 * tolerance


def test_pairwise_angles_are_those_of_angle_one_by_one() -> None:
    x, y = (unit_rows(torch.randn(count, 9)) for count in (6, 5))
    y[2] = 0
    found, _ = pairwise_angles(x, y)
    torch.testing.assert_close(found, torch.stack([angle(row[None], y) for row in x]), atol=5e-5, rtol=0)
    assert found[:, 2].tolist() == [90.0] * 6  # a zero vector, as `angle` has it


C, N, COUNT = 4, 6, 9
generator = torch.Generator().manual_seed(0)
Z, Z_EQ = (torch.randn(COUNT, N, generator=generator) for _ in range(2))
TEXTS, LABELS = torch.randn(C, N, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0])
TEXT = TEXTS[LABELS]


def parts(score: Tensor) -> dict[str, Tensor]:
    negative, positive = torch.relu(-score), torch.relu(score)
    return {"signed": score, "negative": negative, "positive": positive, "absolute": score.abs()}


def leakage() -> SemanticLeakage:
    metric = SemanticLeakage(TEXTS)
    metric.update(Z, Z_EQ, LABELS)
    return metric


def test_overall_and_per_class_are_the_plain_means() -> None:
    metric = SemanticLeakage(TEXTS)
    for rows in (slice(0, 4), slice(4, 5), slice(5, 9), slice(9, 9)):
        metric.update(Z[rows], Z_EQ[rows], LABELS[rows])
    attribute, image = attribute_score(Z, Z_EQ, TEXT).double(), image_score(Z, Z_EQ).double()
    names = {"signed": "AS", "negative": "AS_neg", "positive": "AS_pos", "absolute": "AS_abs"}
    expected = {names[part]: values for part, values in parts(attribute).items()}
    expected |= {"IS": image, "kappa": kappa(Z, Z_EQ, TEXT).double()}
    means = {name: values.mean() for name, values in expected.items()}
    means |= {f"{name}_std": expected[name].std(correction=0) for name in ("AS", "IS", "kappa")}
    means |= {"ratio": means["IS"] / means["AS_abs"], "count": torch.tensor(9.0).double()}
    result = metric.compute()
    assert result.keys() == means.keys()
    for name, value in means.items():
        torch.testing.assert_close(result[name], value, msg=name)
    for label in range(3):
        torch.testing.assert_close(metric.per_class()["AS"][label], attribute[label == LABELS].mean())
    assert torch.isnan(metric.per_class()["AS"][3])


def test_a_collection_of_all_of_them_beside_others_never_merges_scores() -> None:
    """Trap 6: |AS| and AS⁻ agree on a first batch of harmful images, and two texts where their class is not met."""
    score = attribute_score(Z, Z_EQ, TEXT)
    harmful = score < 0
    other = TEXTS.clone()
    other[3] += 1  # of a class that the first batch does not have
    members: dict[str, Any] = {part: AttributeScore(part) for part in parts(score)}  # type: ignore[arg-type]
    members |= {"image": ImageScore(), "leakage": SemanticLeakage(TEXTS), "other": SemanticLeakage(other)}
    collection = MetricCollection(members | {"mean": MeanMetric()}, prefix="test/")
    for rows in (harmful, torch.ones_like(harmful)):
        collection.update(z=Z[rows], z_eq=Z_EQ[rows], text=TEXT[rows], labels=LABELS[rows], value=score[rows])
    assert all(len(group) == 1 for group in collection.compute_groups.values())
    result = {name: float(value) for name, value in collection.compute().items()}
    both = torch.cat([score[harmful], score])
    for part, values in parts(both).items():
        assert result[f"test/{part}"] == pytest.approx(float(values.mean()), rel=1e-6)
    assert result["test/leakage_AS"] == pytest.approx(float(both.mean()), rel=1e-6)
    image = image_score(Z, Z_EQ)
    assert result["test/image"] == pytest.approx(float(torch.cat([image[harmful], image]).mean()), rel=1e-6)


def test_states_are_in_float64_and_nothing_is_saved_or_trained() -> None:
    """Trap 7."""
    metric = leakage().half()
    assert metric.columns.dtype == torch.float64
    assert list(metric.parameters()) == []
    assert list(metric.state_dict()) == []
    copy = pickle.loads(pickle.dumps(metric))
    assert copy.compute()["AS"] == metric.compute()["AS"]
    metric.reset()
    assert metric.columns.sum() == 0


def test_sums_stay_on_the_cpu_where_a_device_has_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the "meta" device in the place of MPS: everything else moves."""
    monkeypatch.setattr(metrics, "NO_FLOAT64", ("meta",))
    metric, image = leakage().to("meta"), ImageScore().to("meta")
    assert (metric.device.type, metric.texts.device.type) == ("meta", "meta")
    for state in (metric.columns, metric.histogram, getattr(image, image.name)):
        assert (state.device.type, state.dtype) == ("cpu", torch.float64)
    assert metric.compute()["count"] == COUNT
    monkeypatch.setattr(metrics, "NO_FLOAT64", ())
    assert leakage().to("meta").columns.device.type == "meta"  # the control


def test_bad_labels_and_shapes_are_named() -> None:
    metric = SemanticLeakage(TEXTS)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        metric.update(Z, Z_EQ, LABELS + 3)
    with pytest.raises(ValueError, match=r"\(B, 6\)"):
        metric.update(Z[:, :3], Z_EQ[:, :3], LABELS)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_type_are_the_same(dtype: torch.dtype) -> None:
    metric, whole = SemanticLeakage(TEXTS), leakage()
    metric.update(Z, Z_EQ, LABELS.to(dtype))
    assert torch.equal(metric.per_class()["AS"].nan_to_num(), whole.per_class()["AS"].nan_to_num())
    with pytest.raises(ValueError, match="whole numbers"):
        metric.update(Z, Z_EQ, LABELS > 0)


def share(rank: int, world: int) -> tuple[dict[str, float], float]:
    metric, simple = SemanticLeakage(TEXTS), ImageScore()
    mine = slice(rank, COUNT if rank < 2 else 0, 2)  # the third process is idle
    if len(Z[mine]):
        metric.update(Z[mine], Z_EQ[mine], LABELS[mine])
        simple.update(Z[mine], Z_EQ[mine])
    return {name: float(value) for name, value in metric.compute().items()}, float(simple.compute())


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nine_samples_over_processes_count_nine(world: int) -> None:
    """Trap 5: values and the count, at an odd size, with an idle process."""
    expected = {name: float(value) for name, value in leakage().compute().items()}
    for result, simple in run_processes(world, share):
        assert result["count"] == 9
        assert result == pytest.approx(expected, rel=1e-12)
        assert simple == pytest.approx(expected["IS"], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_float32(dtype: torch.dtype) -> None:
    z = torch.randn(200, 64).to(dtype)
    z_eq, texts, labels = (z + 0.02 * torch.randn(200, 64)).to(dtype), torch.randn(5, 64), torch.arange(200) % 5
    given, exact = SemanticLeakage(texts), SemanticLeakage(texts)
    given.update(z, z_eq, labels)
    exact.update(z.double(), z_eq.double(), labels)
    for name in ("AS_neg", "AS_abs", "IS"):
        assert float(given.compute()[name]) == pytest.approx(float(exact.compute()[name]), rel=1e-3)
