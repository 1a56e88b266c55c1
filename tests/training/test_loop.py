"""The inner loop: schedule, accumulation and micro-batches, processes, checkpoints that are damaged, groups of parameters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from singreg.losses import SingLoss
from singreg.models.classifier import Classifier
from singreg.training.checkpoint import Checkpoints, Position
from singreg.training.config import FinetuneConfig
from singreg.training.loop import Schedule, micro_batch
from singreg.training.task import FinetuneTask, parameter_groups
from singreg.translator import LinearTranslator
from singreg.workbench.run import make_accelerator
from tests.processes import run_processes
from tests.tiny_run import arguments, finetune


def test_schedule_drops_the_last_batch_warms_up_and_refreshes_evenly() -> None:
    config = FinetuneConfig()
    config.training.epochs, config.training.batch_size, config.training.lr_warmup = 3, 32, 0.1
    config.translator.refreshes = 3
    schedule = Schedule.from_config(config, 1003)
    assert (schedule.steps_per_epoch, schedule.total, schedule.warmup) == (31, 93, 10)
    assert schedule.refresh_at == (23, 46, 70)
    factors = [schedule.learning_rate_factor(step) for step in range(94)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == factors[10] == 1
    assert factors[52] == pytest.approx(0.5 * (1 + math.cos(math.pi * 42 / 83)))
    assert factors[93] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match=r"31 pictures, fewer than training.batch_size = 32"):
        Schedule.from_config(config, 31)


@pytest.mark.parametrize(("batch", "accumulation", "processes", "micro"), [(32, 1, 2, 32), (32, 4, 2, 8), (30, 4, 1, 0), (32, 4, 3, 0)])
def test_micro_batches_are_even_or_refused(batch: int, accumulation: int, processes: int, micro: int) -> None:
    config = FinetuneConfig()
    config.training.batch_size, config.training.accumulation = batch, accumulation
    if micro:
        assert micro_batch(config, processes) == micro
    else:
        with pytest.raises(ValueError, match=f"{accumulation} accumulation step.* over {processes} process"):
            micro_batch(config, processes)


def _weights(rank: int, world: int, folder: str, cache: str, *more: str) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor]]:
    """Run the whole recipe; the main process answers with the report's measurements, all with what is on the shared disk."""
    finetune(Path(folder), Path(cache), "--name", "run", *more, keep_group=world > 1)
    report = json.loads((Path(folder) / "run" / "report.json").read_text()) if rank == 0 else None
    return report, load_file(Path(folder) / "run" / "model" / "model.safetensors")


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "tfevents" not in path.name}


def test_two_processes_and_accumulation_give_what_one_process_gives(tmp_path: Path) -> None:
    """1 process x batch 16 = 2 x 8 = accumulation 2 x 8, for weights, AS, IS and counts, with an odd number of test pictures."""
    cache = str(tmp_path / "cache")
    # Ratio terms are means over a forward's pictures: accumulation splits those, so it is held against a loss of plain means.
    terms = "{hinge: 1.0, band: 0.3, capacity: 10.0, leak: 0.0, class_share: 0.0}"
    plain = ("--loss.terms", terms, "--training.clip", "1000", "--loss.momentum", "1.0")
    one, weights = _weights(0, 1, str(tmp_path / "one"), cache, *plain)
    assert one is not None
    (two, theirs), (idle, _) = run_processes(2, _weights, str(tmp_path / "two"), cache, *plain)
    assert idle is None
    _, halves = _weights(0, 1, str(tmp_path / "halves"), cache, *plain, "--training.accumulation", "2")
    moved = Classifier.from_timm("test_resnet", pretrained=False)  # only to be sure that something was compared
    assert len(weights) > 10
    assert moved.feature_dim > 0
    for name, value in weights.items():
        torch.testing.assert_close(theirs[name], value, atol=2e-5, rtol=1e-3, msg=f"two processes: {name}")
        torch.testing.assert_close(halves[name], value, atol=2e-4, rtol=1e-2, msg=f"accumulation: {name}")
    for stage, measured in one["measurements"].items():
        other = two["measurements"][stage]
        assert measured["images"] == other["images"] == 45
        assert measured["top1"] == other["top1"]
        for translator, scores in measured["translators"].items():
            for figure in ("AS", "AS_neg", "IS"):
                assert scores["overall"][figure] == pytest.approx(other["translators"][translator]["overall"][figure], abs=1e-3)
            assert scores["fit_images"] == other["translators"][translator]["fit_images"]
    assert files_below(tmp_path / "one") == files_below(tmp_path / "two")


def test_sing_reads_the_clean_view_in_eval_mode_and_cross_entropy_the_augmented_one() -> None:
    torch.manual_seed(0)
    classifier = Classifier.from_timm("test_resnet", pretrained=False, num_classes=4, drop_rate=0.5).tune("all", batch_norm="train")
    translator = LinearTranslator(torch.randn(8, classifier.feature_dim), torch.zeros(8))
    sing = SingLoss(classifier, translator, torch.randn(4, 8), weight=1.0)
    task = FinetuneTask(classifier, sing).train()
    images, clean, labels = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), torch.arange(4)
    seen: list[torch.Tensor] = []
    sing.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    task(images, labels, clean)
    task(images, labels)
    classifier.eval()
    expected = classifier.features(clean)
    # Batch norm's statistics moved between the two calls by the augmented views alone.
    assert seen[0].shape == expected.shape
    assert classifier.training is False
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)
    again = FinetuneTask(classifier, sing).train()
    again._clean_features(clean)
    assert classifier.training, "the mode is restored after the clean view"


def test_parameter_groups_split_head_and_norms_and_cover_everything_once() -> None:
    classifier = Classifier.from_timm("test_resnet", pretrained=False, num_classes=4).tune("all")
    groups = parameter_groups(classifier, learning_rate=1e-3, head_factor=5, decay=0.1)
    assert sorted((group["lr"], group["weight_decay"]) for group in groups) == [(1e-3, 0.0), (1e-3, 0.1), (5e-3, 0.0), (5e-3, 0.1)]
    together = [id(p) for group in groups for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in classifier.parameters())
    with pytest.raises(ValueError, match="nothing is left to train"):
        parameter_groups(classifier.requires_grad_(False), learning_rate=1, head_factor=1, decay=0)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    AcceleratorState._reset_state(True)
    accelerator = make_accelerator(seed=0)
    model = accelerator.prepare(torch.nn.Linear(3, 2))
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        with torch.no_grad():
            model.weight.fill_(step)
        store.save(accelerator, Position(step, 0, step))
    assert [path.name for path in store.all()] == ["step-00000002", "step-00000003"]
    weights = tmp_path / "step-00000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with caplog.at_level("WARNING"):
        assert store.load_latest(accelerator) == Position(2, 0, 2)
    assert "step-00000003 cannot be read" in caplog.text
    assert float(model.weight.detach().mean()) == 2
    (tmp_path / "step-00000002" / "position.json").write_text("{")
    assert store.load_latest(accelerator) is None
    AcceleratorState._reset_state(True)


@pytest.mark.slow
def test_torchrun_starts_two_processes_that_give_what_one_gives(tmp_path: Path) -> None:
    import subprocess
    import sys

    finetune(tmp_path / "one", tmp_path / "cache", "--name", "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "recipes.finetune"]
    done = subprocess.run([*command, *arguments(tmp_path / "two", tmp_path / "cache", "--name", "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "run" / "report.json").read_text()) for name in ("one", "two"))
    assert (one["machine"]["processes"], two["machine"]["processes"]) == (1, 2), "a second process that never started proves nothing"
    for stage, measured in one["measurements"].items():
        assert measured["images"] == two["measurements"][stage]["images"] == 45
        for name, scores in measured["translators"].items():
            others = two["measurements"][stage]["translators"][name]["overall"]
            for figure in ("AS", "IS"):
                assert scores["overall"][figure] == pytest.approx(others[figure], abs=1e-3)
