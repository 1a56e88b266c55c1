"""Metrics: exact against plain loops, over batches, classes and processes at odd sizes; no state merged or saved."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from singreg import metrics
from singreg.functional import attribute_score, image_score, kappa
from singreg.metrics import AttributeScore, ImageScore, SemanticLeakage
from tests.processes import run_processes

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
    for state in (metric.columns, metric.histogram, image.count):
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
