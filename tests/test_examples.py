"""The examples of other people's loops run as they stand, and what a loop usually does keeps working in them."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from singreg import Classifier, RidgeStatistics, SingLoss, fit_translator
from tests import toy

ROOT = Path(__file__).parents[1]
NEEDS = {"plain_torch": "torch", "timm_task": "timm", "hf_trainer": "transformers", "lightning_module": "lightning"}
Figures = dict[str, dict[str, float]]


def run(name: str, *arguments: str, images: int = 96, processes: int = 1) -> Figures:
    """AS⁻, |AS| and IS that an example prints before and after training."""
    pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed (pip install 'singreg[examples]')")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), f"recipes/examples/{name}.py"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    options = ["--images", str(images), *arguments]
    done = subprocess.run(command + options, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for when, line in re.findall(r"(before|after) (AS_neg.*)", done.stdout):
        found[when] = {key: float(value) for key, value in re.findall(r"(\w+) ([\d.]+)°", line)}
    return found


def test_the_plain_loop_trains() -> None:
    found = run("plain_torch", "--epochs", "1", "--accumulate", "2")
    assert found["before"].keys() == found["after"].keys() == {"AS_neg", "AS_abs", "IS"}
    assert found["before"] != found["after"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_leakage_falls(name: str) -> None:
    found = run(name, images=1000)
    assert found["after"]["AS_neg"] < 0.5 * found["before"]["AS_neg"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_a_checkpoint_goes_on(name: str, tmp_path: Path) -> None:
    for folder in ("once", "twice"):
        (tmp_path / folder).mkdir()
    once = run(name, "--epochs", "2", "--folder", str(tmp_path / "once"))
    run(name, "--epochs", "1", "--folder", str(tmp_path / "twice"))
    assert run(name, "--epochs", "2", "--folder", str(tmp_path / "twice"))["after"] == once["after"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_mixed_precision_and_accumulation(name: str) -> None:
    exact, mixed = (run(name, "--epochs", "1", "--accumulate", "3", *more) for more in ([], ["--bf16"]))
    assert exact != mixed
    assert mixed["after"] == pytest.approx(exact["after"], abs=1.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "option", "processes"), [("plain_torch", ["--compile"], 1), ("plain_torch", [], 2), ("hf_trainer", [], 2)]
)
def test_compiled_and_on_two_processes_the_figures_stay(name: str, option: list[str], processes: int) -> None:
    plain = run(name, "--epochs", "1")["after"]
    assert run(name, "--epochs", "1", *option, processes=processes)["after"] == pytest.approx(plain, abs=0.1)


def adapted(**settings: Any) -> nn.Module:
    """A small network with LoRA adapters in it, by PEFT; layer 4 is the head."""
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'singreg[examples]')")
    config = peft.LoraConfig(r=2, init_lora_weights=False, **settings)
    return peft.get_peft_model(toy.classifier().model, config)


def sing_of(classifier: Classifier) -> SingLoss:
    f, z = torch.randn(80, toy.WIDTH), torch.randn(80, toy.DIM)
    statistics = RidgeStatistics(toy.WIDTH, toy.DIM).update(f, z)
    return SingLoss(classifier, fit_translator([(f, z)]), torch.randn(toy.CLASSES, toy.DIM), statistics)


@pytest.mark.parametrize("saved", [None, ["4"]], ids=["head frozen", "head trained"])
def test_lora_on_the_backbone_is_trained(saved: list[str] | None) -> None:
    model = adapted(target_modules=["1"], modules_to_save=saved)
    classifier = Classifier.from_module(model, "base_model.model.4")
    features, logits = classifier.features_and_logits(torch.rand(4, 3, toy.SIDE, toy.SIDE))
    torch.testing.assert_close(features @ classifier.weight.T + classifier.bias, logits)
    sing_of(classifier)(features, torch.arange(4), torch.randn(4, toy.DIM)).backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum("lora_" in name for name in trained) == 2
    assert sum("modules_to_save" in name for name in trained) == 2 * (saved is not None)
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in trained.items() if not name.endswith("bias"))


def test_lora_on_the_head_is_refused_until_merged() -> None:
    model = adapted(target_modules=["1", "4"])
    with pytest.raises(ValueError, match="merge"):
        Classifier.from_module(model, "base_model.model.4")
    merged = Classifier.from_module(model.merge_and_unload(), "4")
    assert sing_of(merged).head_weight.shape == (toy.CLASSES, toy.WIDTH)
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["4"]), merged.model)  # on a head that is known
    with pytest.raises(ValueError, match="merge"):
        sing_of(merged)
