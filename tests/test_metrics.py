"""Metrics: exact against plain loops, over batches, classes and processes at odd sizes; no state merged or saved."""

from __future__ import annotations

import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from singreg.functional import attribute_score, image_score, kappa
from singreg.metrics import AttributeScore, ImageScore, SemanticLeakage
from tests.processes import run_processes

C, N, COUNT = 4, 6, 9


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, z_eq = (torch.randn(COUNT, N, generator=generator) for _ in range(2))
    return torch.randn(C, N, generator=generator), z, z_eq, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0])


def test_overall_and_per_class_are_the_plain_means() -> None:
    texts, z, z_eq, labels = data()
    metric = SemanticLeakage(texts)
    for start in (0, 4, 5):
        stop = {0: 4, 4: 5, 5: 9}[start]
        metric.update(z[start:stop], z_eq[start:stop], labels[start:stop])
    attribute, image = attribute_score(z, z_eq, texts[labels]).double(), image_score(z, z_eq).double()
    travelled = kappa(z, z_eq, texts[labels]).double()
    result = metric.compute()
    expected = {
        "AS": attribute.mean(), "AS_neg": torch.relu(-attribute).mean(), "AS_pos": torch.relu(attribute).mean(),
        "AS_abs": attribute.abs().mean(), "IS": image.mean(), "kappa": travelled.mean(), "AS_std": attribute.std(correction=0),
        "IS_std": image.std(correction=0), "ratio": image.mean() / attribute.abs().mean(), "count": torch.tensor(9.0).double(),
    }  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, msg=name)
    per_class = metric.per_class()
    for label in range(3):
        torch.testing.assert_close(per_class["AS"][label], attribute[labels == label].mean())
    assert torch.isnan(per_class["AS"][3])
    assert abs(metric.quantile("IS", 0.5) - float(image.median())) <= 0.25


def test_simple_metrics_and_collections() -> None:
    texts, z, z_eq, labels = data()
    score = attribute_score(z, z_eq, texts[labels])
    for part, value in {"signed": score, "negative": torch.relu(-score), "positive": torch.relu(score), "absolute": score.abs()}.items():
        metric = AttributeScore(part)  # type: ignore[arg-type]
        metric.update(z, z_eq, texts[labels])
        assert float(metric.compute()) == pytest.approx(float(value.mean()), rel=1e-6)
    image = ImageScore()
    image.update(z, z_eq)
    assert float(image.compute()) == pytest.approx(float(image_score(z, z_eq).mean()), rel=1e-6)
    with pytest.raises(ValueError, match="sideways"):
        AttributeScore("sideways")  # type: ignore[arg-type]


def test_a_collection_never_merges_scores_that_agree_on_the_first_batch() -> None:
    texts, z, z_eq, labels = data()
    parts = ("signed", "negative", "positive", "absolute")
    score = attribute_score(z, z_eq, texts[labels])
    harmful = score < 0  # of these alone |AS| and AS⁻ are the same number
    pair = MetricCollection({part: AttributeScore(part) for part in parts})
    pair.update(z[harmful], z_eq[harmful], texts[labels[harmful]])
    pair.update(z, z_eq, texts[labels])
    assert sorted(map(len, pair.compute_groups.values())) == [1, 1, 1, 1]
    both = torch.cat([score[harmful], score])
    for part, value in {"signed": both, "negative": torch.relu(-both), "positive": torch.relu(both), "absolute": both.abs()}.items():
        assert float(pair[part].compute()) == pytest.approx(float(value.mean()), rel=1e-6)


def test_states_are_tensors_in_float64_and_nothing_is_saved_or_trained() -> None:
    """Trap 7."""
    texts, z, z_eq, labels = data()
    metric = SemanticLeakage(texts).half()
    assert metric.sums.dtype == torch.float64
    assert list(metric.parameters()) == []
    assert list(metric.state_dict()) == []
    metric.update(z, z_eq, labels)
    copy = pickle.loads(pickle.dumps(metric))
    assert copy.compute()["AS"] == metric.compute()["AS"]
    metric.reset()
    assert metric.sums.sum() == 0


def test_plots() -> None:
    texts, z, z_eq, labels = data()
    metric, image = SemanticLeakage(texts), ImageScore()
    metric.update(z, z_eq, labels)
    image.update(z, z_eq)
    assert metric.plot()[1].get_xlabel() == "degrees"
    assert image.plot()[0] is not None


def test_bad_labels_and_shapes_are_named() -> None:
    texts, z, z_eq, labels = data()
    metric = SemanticLeakage(texts)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        metric.update(z, z_eq, labels + 3)
    with pytest.raises(ValueError, match=r"\(B, 6\)"):
        metric.update(z[:, :3], z_eq[:, :3], labels)


def _share(rank: int, world: int) -> tuple[dict[str, float], float]:
    texts, z, z_eq, labels = data()
    metric, simple = SemanticLeakage(texts), ImageScore()
    mine = slice(rank, COUNT if rank < 2 else 0, 2)  # the third process is idle
    if len(z[mine]):
        metric.update(z[mine], z_eq[mine], labels[mine])
        simple.update(z[mine], z_eq[mine])
    return {name: float(value) for name, value in metric.compute().items()}, float(simple.compute())


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nine_samples_over_processes_count_nine(world: int) -> None:
    """Trap 5: values and the count, at an odd size, with an idle process."""
    texts, z, z_eq, labels = data()
    metric = SemanticLeakage(texts)
    metric.update(z, z_eq, labels)
    expected = {name: float(value) for name, value in metric.compute().items()}
    for result, simple in run_processes(world, _share):
        assert result["count"] == 9
        assert result == pytest.approx(expected, rel=1e-12)
        assert simple == pytest.approx(expected["IS"], rel=1e-6)
