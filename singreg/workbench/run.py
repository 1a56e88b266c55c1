"""A run's folder and what surrounds it: the accelerator, the log, the machine (DESIGN: "A run's folder")."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed

from singreg.old_seals import DamagedFileError, read_sealed_text, write_sealed_text
from singreg.utils import sweep
from singreg.workbench.config import JobConfig
from singreg.workbench.parsing import dump_config
from singreg.workbench.stopping import signals_end_the_run

logger = get_logger(__name__)
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
PATIENCE = timedelta(hours=3)
HOW = ("resume", "dry_run")  # how a run is started is not part of what it is


SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


def refuse_sharded_weights() -> None:
    """The null space needs the whole head on every process, so weights are copied (DDP), never sharded (no shapes).

    Raises:
        SystemExit: `accelerate launch` was told to shard them.
    """
    asked = [name for key, name in SHARDING.items() if os.environ.get(key, "").lower() in ("1", "true", "yes")]
    if asked:
        raise SystemExit(
            f"error: accelerate was started with {' and '.join(asked)}, which shards the weights over processes. The null space is that "
            "of the whole head, so singreg runs on copies of the model (DDP): launch with --multi_gpu, or run `accelerate config` and "
            f"answer no to {' and '.join(asked)}. For a model too large for one device try model.gradient_checkpointing"
        )


def refuse_foreign_compile() -> None:
    """accelerate's own switch compiles the whole step, head and hooks included (no shapes).

    Raises:
        SystemExit: `accelerate launch` was given a dynamo backend.
    """
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise SystemExit(
            f"error: accelerate was started with the dynamo backend {backend!r}, which would compile the head too, into which singreg has "
            "to look; leave it out and set model.compile: true, which compiles what comes before the head"
        )


def make_accelerator(*, seed: int, mixed_precision: str | None = None, accumulation: int = 1) -> Accelerator:
    """The Accelerator of a run: global batches are split over processes, so one process and many see the same ones (no shapes).

    `mixed_precision` is training.mixed_precision; None for a job that trains nothing and runs in float32.

    Raises:
        SystemExit: `accelerate launch` was told what singreg does not do, or fp16 is wanted without a device for it.
    """
    refuse_sharded_weights()
    refuse_foreign_compile()
    # Left alone, MKL's products round by where memory happens to begin and by how its threads took turns.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    gpu = torch.cuda.is_available() or torch.xpu.is_available()
    if not torch.cuda.is_available():
        # The launcher pins CPU runs to one thread a process; share the cores among the local processes instead.
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, usable_cores() // local))
    accelerator = Accelerator(
        # Unasked, accelerate takes several processes without a GPU for as many runs of one process each.
        cpu=not gpu and ("LOCAL_RANK" in os.environ or _without_float64()),
        mixed_precision=_supported_precision(mixed_precision or "no", gpu=gpu),
        gradient_accumulation_steps=accumulation,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        kwargs_handlers=[
            # SingLoss keeps its buffers equal on all ranks itself.
            DistributedDataParallelKwargs(broadcast_buffers=False),
            # One process may embed a million pictures while the others wait; NCCL would give up after 10 minutes.
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
        step_scheduler_with_optimizer=False,
    )
    # The name this setting goes by changes with torch's version; the old one is understood by all of them.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    # singreg speaks; timm, open_clip and accelerate only when something is wrong.
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("singreg").setLevel(logging.INFO)
    if accelerator.is_main_process:
        _say_other_precision(mixed_precision)
    set_seed(seed)
    return accelerator


def _without_float64() -> bool:
    """True, and said, where Apple's GPU is the only one: null spaces and ridge solves need float64, which it has not."""
    if not torch.backends.mps.is_available():
        return False
    print("warning: Apple's GPU (mps) has no float64, which null spaces and ridge solves need; running on the CPU", file=sys.stderr)
    return True


def _supported_precision(wanted: str, *, gpu: bool) -> str:
    if wanted == "fp16" and not gpu:  # accelerate accepts it and trains in float32
        raise SystemExit(
            "error: training.mixed_precision: fp16 needs a GPU, and this run has a CPU alone; set training.mixed_precision to bf16 or no"
        )
    return wanted


def _say_other_precision(wanted: str | None) -> None:
    """accelerate's own setting gives way to the configuration's, which must not go unnoticed; its default "no" asks for nothing."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched == "no" or launched == wanted:
        return
    told = (
        f"the run uses training.mixed_precision: {wanted}; set --training.mixed_precision {launched}"
        if wanted is not None
        else "this job trains nothing and runs in float32"
    )
    print(f"accelerate was launched with {launched}, {told}", file=sys.stderr)


def usable_cores() -> int:
    """Cores this process may run on: fewer than the machine has inside a container or under taskset (no shapes)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def explained() -> Iterator[None]:
    """Turn what is wrong with a user's files or settings into its message and exit status 1; used while a run is set up.

    Later errors keep their traceback: they are not the user's doing. (No shapes.)
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


class OtherRunError(ValueError):
    """A run is to be resumed on other pictures or models than it was begun with; the text names them."""


class Run:
    """One run: its folder (path `runs/NAME`) with the resolved configuration in it. Only the main process writes."""

    def __init__(self, config: JobConfig, accelerator: Accelerator, recipe: str) -> None:
        self.config, self.accelerator, self.recipe = config, accelerator, recipe
        self.folder = config.folder
        self.seconds: dict[str, float] = {}

    def check(self) -> Run:
        """Raise now what `open` would raise later, so that nothing long is done for a run that cannot start (no shapes).

        Raises:
            FileExistsError: the folder holds a run and `resume` is False. ValueError: it was another configuration.
        """
        resolved = self.folder / "config.yaml"
        if not resolved.is_file():
            return self
        if not getattr(self.config, "resume", False):
            raise FileExistsError(
                f"{self.folder} already holds a run; use --resume true to go on with it, or another --name for a new one"
            )
        if read_sealed_text(resolved) != self._resolved():
            raise ValueError(
                f"{resolved} differs from the configuration given, so this would not be the same run; resume with "
                f"--config {resolved} --resume true, or use another --name"
            )
        return self

    def open(self) -> Run:
        """Create the folder with the resolved configuration in it, or go on in it when `resume` is set (see `check`)."""
        self.check()
        self.accelerator.wait_for_everyone()
        resolved = self.folder / "config.yaml"
        if self.accelerator.is_main_process:
            sweep(self.folder)
            if not resolved.is_file():
                write_sealed_text(resolved, self._resolved())
        self.accelerator.wait_for_everyone()
        return self

    def _resolved(self) -> str:
        values = dataclasses.asdict(self.config)
        return dump_config({key: False if key in HOW else value for key, value in values.items()})

    def resume_command(self) -> str:
        """The command that goes on with this run (its folder's path in it)."""
        return f"accelerate launch recipes/{self.recipe}.py --config {self.folder / 'config.yaml'} --resume true"

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Say, when the run is interrupted or fails, what is kept and how to go on; the error itself passes through.

        SIGTERM and Ctrl-C end a training with a checkpoint of the step that is under way (see `stopping`). Damaged files, a full
        disk and a folder that cannot be written are sentences, not tracebacks.
        """
        with signals_end_the_run():
            try:
                yield
            except BaseException as error:
                if isinstance(error, OtherRunError):
                    raise SystemExit(f"error: {error}") from error
                self._say_how_to_go_on(error)
                if isinstance(error, DamagedFileError):
                    raise SystemExit(f"error: {error}") from error
                if _of_the_disk(error):
                    raise SystemExit(f"error: {error} (while writing in {self.folder})") from error
                raise


    def _say_how_to_go_on(self, error: BaseException) -> None:
        """On the main process, and on the one that failed: the launcher may end the others before they can say anything."""
        main = self.accelerator.is_main_process
        if (main or isinstance(error, Exception)) and (self.folder / "config.yaml").is_file():
            who = "" if main else f"process {self.accelerator.process_index}: "
            print(f"\n{who}stopped; all finished work is kept in {self.folder}", file=sys.stderr)
            print(f"go on with: {self.resume_command()}", file=sys.stderr)


def _of_the_disk(error: BaseException) -> bool:
    """A full disk, a quota, a folder that cannot be written; safetensors and torch raise errors of their own of these."""
    if isinstance(error, OSError):
        return error.errno in DISK
    found = re.search(r"\(os error (\d+)\)", str(error))
    return "PytorchStreamWriter failed" in str(error) or (found is not None and int(found[1]) in DISK)


def describe_machine(accelerator: Accelerator) -> dict[str, Any]:
    """What the run ran on: processor, cores, memory in GiB, devices, versions (no shapes)."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "processor": platform.machine(),
        "cores": usable_cores(),
        "memory_gib": round(pages / 2**30, 1),
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
