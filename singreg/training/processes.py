"""What training on several processes needs beside DDP: random numbers of their own, batch norms that agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import synchronize_rng_states
from timm.layers.norm_act import convert_sync_batchnorm

from singreg.models.classifier import Classifier
from singreg.training.config import FinetuneConfig
from singreg.utils import seed_process


@contextmanager
def own_random_numbers(accelerator: Accelerator, seed: int) -> Iterator[None]:
    """Each process but the first draws its own dropout masks inside; outside, all draw as the first does (no shapes).

    The first keeps its state, so that one process gives what it gave. The order of pictures has a seed of its own.
    """
    if accelerator.num_processes == 1:
        yield
        return
    if accelerator.process_index:
        seed_process(seed, accelerator.process_index)
    yield
    # Not after a failure: the others may never come.
    synchronize_rng_states(["torch", "cuda"] if accelerator.device.type == "cuda" else ["torch"])


def refuse_batch_norm(config: FinetuneConfig, accelerator: Accelerator) -> None:
    """Batch norms that train need the statistics of all processes, which torch gathers on GPUs alone (no shapes).

    Raises:
        ValueError: model.batch_norm is train on several processes without GPUs.
    """
    trains = config.model.batch_norm == "train" and config.model.tuning != "head"
    if trains and accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        raise ValueError(
            f"model.batch_norm: train on {accelerator.num_processes} processes needs GPUs: on CPUs every process would keep statistics of "
            "its own pictures, and so another model; set model.batch_norm to eval, or use one process"
        )


def synchronise_batch_norm(classifier: Classifier, config: FinetuneConfig, accelerator: Accelerator) -> None:
    """Let batch norms that train take their statistics over all processes, in place, weights and buffers kept (no shapes).

    Raises:
        ValueError: as `refuse_batch_norm`, or for a batch norm in the head, which must stay of the kind that is folded into W.
    """
    refuse_batch_norm(config, accelerator)
    if accelerator.num_processes == 1 or config.model.batch_norm != "train":
        return
    if any(getattr(module, "running_var", None) is not None for module in classifier.head.modules()):
        raise ValueError(
            f"model.batch_norm: train on {accelerator.num_processes} processes: the head {classifier.head_name!r} of {classifier.tag} has "
            "a batch norm of its own, which would differ between them; set model.batch_norm to eval, or use one process"
        )
    # timm's own: torch's would lose the activation inside timm's BatchNormAct2d.
    convert_sync_batchnorm(classifier.model)  # type: ignore[no-untyped-call]
