"""A run's folder and what surrounds it: the accelerator, the machine, signals, errors that tell how to go on."""

import logging
import os
import platform
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DataLoaderConfiguration, LoggerType, ProjectConfiguration, set_seed
from accelerate.utils import DistributedDataParallelKwargs as DDPArguments
from accelerate.utils import InitProcessGroupKwargs as GroupArguments

from singreg.config import RunConfig
from singreg.parsing import dump
from singreg.utils import sweep, usable_cores, write_text

SHARDING = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
REPEATED = 5.0  # s in which a further signal is the same request


def start(config: RunConfig) -> Accelerator:
    """Return the Accelerator of a run: seeded, batches split over processes, trackers below the run's folder."""
    _refuse_what_needs_other_weights()
    known, available = [str(each) for each in LoggerType], [str(each) for each in get_available_trackers()]
    if config.log_with not in ("all", *available, *(LOGGER_TYPE_TO_CLASS.keys() - known)):
        why = "is not installed" if config.log_with in known else f"is none of {', '.join(known)}"
        raise SystemExit(f"error: log_with: {config.log_with} {why}; available here: {', '.join(available) or 'none'}")
    # Left alone, MKL's products round by where memory happens to begin and by how its threads took turns.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    gpu = torch.cuda.is_available() or torch.xpu.is_available()
    if not torch.cuda.is_available():
        # The launcher pins CPU runs to one thread a process; share the cores among the local processes instead.
        torch.set_num_threads(max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    accelerator = Accelerator(
        # Unasked, accelerate takes several processes without a GPU for as many runs of one process each. Apple's GPU
        # has no float64, which null spaces and ridge solves need.
        cpu=not gpu and ("LOCAL_RANK" in os.environ or torch.backends.mps.is_available()),
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=None if config.dry_run else config.log_with,
        project_config=ProjectConfiguration(str(config.folder), str(config.folder / "tensorboard")),
        kwargs_handlers=[
            DDPArguments(broadcast_buffers=False),  # SingLoss keeps its buffers equal by itself
            # One process may embed a million images while the others wait; NCCL would give up after 10 minutes.
            GroupArguments(timeout=timedelta(hours=3)),
        ],
    )
    if accelerator.mixed_precision == "fp16" and not gpu:  # accelerate accepts it and trains in float32
        raise SystemExit("error: --mixed_precision fp16 needs a GPU, and this run has a CPU alone; use bf16 or no")
    if accelerator.num_processes == 1 and os.environ.get("MASTER_ADDR") == "127.0.0.1" and "RANK" not in os.environ:
        # Asked for several CPU processes, accelerate's plain launcher sets this address, starts one and says nothing.
        raise SystemExit("error: accelerate started one process only; add --multi_gpu, its flag for CPUs too")
    # The name of this setting changes with torch's version; the old one is understood by all of them.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    # singreg speaks; timm, open_clip and accelerate only when something is wrong.
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("singreg").setLevel(logging.INFO)
    set_seed(config.seed)
    return accelerator


def _refuse_what_needs_other_weights() -> None:
    for name, key in SHARDING.items():
        if os.environ.get(key, "").lower() in ("1", "true", "yes"):
            raise SystemExit(f"error: {name} shards the weights, but the null space is that of the whole head; use DDP")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise SystemExit("error: accelerate's dynamo backend compiles the head too; set model.compile: true instead")


def describe_machine(accelerator: Accelerator) -> dict[str, Any]:
    """Return what a run ran on: processor, cores, memory in GiB, device, processes, precision, versions."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "processor": platform.machine(),
        "cores": usable_cores(),
        "memory_gib": round(pages / 2**30, 1),
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "accumulation": accelerator.gradient_accumulation_steps,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


@contextmanager
def explained() -> Iterator[None]:
    """While a run is set up, turn what is wrong with a user's files or settings into its message and exit status 1."""
    try:
        yield
    except UnicodeEncodeError as error:  # of a file's name, in whatever is made of it
        name = error.object[max(0, error.start - 80) : error.start + 40]
        raise SystemExit(f"error: a file or folder has a name that is not UTF-8: {name!r}; rename it") from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


class Run:
    """A run's folder with the resolved configuration in it; only the main process writes."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, recipe: str) -> None:
        self.config, self.accelerator, self.recipe = config, accelerator, recipe
        self.folder = config.folder
        self.seconds: dict[str, float] = {}

    def check(self) -> "Run":
        """Raise, before anything long is done, if the folder holds another run, or this one and `resume` is not set."""
        self.check_place()
        resolved = self.folder / "config.yaml"
        if self.config.dry_run or not resolved.is_file():
            return self
        if not self.config.resume:
            raise FileExistsError(f"{self.folder} already holds a run; go on with --resume true or use another --out")
        if resolved.read_text(encoding="utf-8") != self._resolved():
            raise ValueError(f"{resolved} differs from the configuration given; go on with {self.command}")
        return self

    def check_place(self) -> None:
        """Raise if the folder cannot be made or written to."""
        place = next(each for each in (self.folder.absolute(), *self.folder.absolute().parents) if each.exists())
        if not place.is_dir():
            raise NotADirectoryError(f"out: {self.folder} cannot be made, as {place} is a file; give another --out")
        if not os.access(place, os.W_OK):
            raise PermissionError(f"out: {self.folder} cannot be made, as {place} is read-only; give another --out")

    def open(self) -> "Run":
        """Create the folder with the resolved configuration in it, or go on in it (see `check`)."""
        self.check()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            sweep(self.folder)
            write_text(self.folder / "config.yaml", self._resolved())
        self.accelerator.wait_for_everyone()
        return self

    def _resolved(self) -> str:
        return dump(replace(self.config, resume=False, dry_run=False))  # how a run is started is not what it is

    @property
    def command(self) -> str:
        """The command that goes on with this run, as it can be pasted."""
        count, precision = self.accelerator.num_processes, self.accelerator.mixed_precision
        flags = ["--multi_gpu", "--num_processes", str(count)] if count > 1 else []  # so called on CPUs too
        flags += ["--mixed_precision", precision] if precision != "no" else []
        words = [sys.argv[0], "--config", str(self.folder / "config.yaml"), "--resume", "true"]
        return shlex.join([*(["accelerate", "launch", *flags] if flags else ["python"]), *words])

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - begun

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Say how to go on when the run is interrupted or fails; the error passes on."""
        before = signal.signal(signal.SIGTERM, _end)  # schedulers send it before they kill
        try:
            yield
        except BaseException as error:
            main = self.accelerator.is_main_process
            if isinstance(error, SystemExit) and isinstance(error.code, str):  # a sentence says what is wrong
                raise
            if (main or isinstance(error, Exception)) and (self.folder / "config.yaml").is_file():
                print(f"\nstopped; all finished work is kept in {self.folder}", file=sys.stderr)
                print(f"go on with: {self.command}", file=sys.stderr)
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def _end(number: int, _: FrameType | None = None) -> NoReturn:
    """End this process as a signal wants it: exit status 128 + its number, Ctrl-C as KeyboardInterrupt."""
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


class StopRequest:
    """Inside `with`, SIGINT and SIGTERM are noted: the loop looks for them after its steps. A later second one ends it.

    Sooner ones are the same request, since a launcher and its processes may each be signalled.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.number, self.since = accelerator, 0, 0.0

    def __enter__(self) -> "StopRequest":
        self.before = {each: signal.signal(each, self._note) for each in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.number and time.monotonic() - self.since >= REPEATED:
            _end(number)
        if not self.number:
            self.number, self.since = number, time.monotonic()
            print(f"\nstopping after this step; once more after {REPEATED:.0f} s stops at once", file=sys.stderr)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.number and kind is None:  # it came after the last step
            self.end()

    def came(self) -> bool:
        """Return whether any process was asked to stop; every process must ask, after the same step."""
        if self.accelerator.num_processes == 1:
            return bool(self.number)
        if self.number:
            self.accelerator.set_trigger()
        return bool(self.accelerator.check_trigger())

    def end(self) -> NoReturn:
        """End this process by the signal that came to it, or to another one."""
        _end(self.number or signal.SIGTERM)
