"""A run's folder and what surrounds it: accelerator, signals, errors that tell how to go on, checkpoints, stages."""

import json
import logging
import os
import platform
import shlex
import shutil
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from tempfile import mkdtemp
from types import FrameType
from typing import Any, NoReturn

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DataLoaderConfiguration, LoggerType, ProjectConfiguration, broadcast_object_list, set_seed
from accelerate.utils import DistributedDataParallelKwargs as DDPArguments
from accelerate.utils import InitProcessGroupKwargs as GroupArguments
from safetensors import SafetensorError, safe_open

from singreg.analysis.comparison import Measured
from singreg.config import RunConfig
from singreg.models.vlm import hash_of_state
from singreg.parsing import dump
from singreg.setup import Setup
from singreg.utils import atomic_write, plain, seed_process, sweep, usable_cores, write_json, write_text

SHARDING = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
REPEATED = 5.0  # s in which a further signal is the same request
logger = get_logger(__name__)
KEEP = 2  # checkpoints of an arm that stay
BROKEN = (OSError, ValueError, TypeError, KeyError, SafetensorError, zipfile.BadZipFile)


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
        """Raise, before anything long is done, if the folder cannot be made, or holds a run and `resume` is not set.

        It must be of this configuration, but for a study, whose arms may change: their digests say which are done.
        """
        place = next(each for each in (self.folder.absolute(), *self.folder.absolute().parents) if each.exists())
        if not place.is_dir():
            raise NotADirectoryError(f"out: {self.folder} cannot be made, as {place} is a file; give another --out")
        if not os.access(place, os.W_OK):
            raise PermissionError(f"out: {self.folder} cannot be made, as {place} is read-only; give another --out")
        resolved = self.folder / "config.yaml"
        if self.config.dry_run or not resolved.is_file():
            return self
        if not self.config.resume:
            raise FileExistsError(f"{self.folder} already holds a run; go on with --resume true or use another --out")
        if self.recipe != "study" and resolved.read_text(encoding="utf-8") != self._resolved():
            raise ValueError(f"{resolved} differs from the configuration given; go on with {self.command}")
        return self

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


@dataclass(frozen=True)
class Position:
    """Where an arm stands: optimiser steps done, the epoch, micro-batches of it already used."""

    step: int = 0
    epoch: int = 0
    batches: int = 0
    due: bool = False  # what follows this step (the translator's refresh, the curves) is still to be done


class Checkpoints:
    """The last checkpoints of one arm, each a folder that is filled under another name and then renamed."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator

    def save(self, position: Position) -> None:
        """Save the training's state and the position."""
        target = self.folder / f"step-{position.step:08d}"
        temporary = self.folder / f".writing-{position.step:08d}"
        if self.accelerator.is_main_process:
            for left in self.folder.glob(".writing-*"):  # by a killed run or a full disk
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary), safe_serialization=True)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            files = sorted(path.name for path in temporary.iterdir())
            place = {**asdict(position), "processes": self.accelerator.num_processes, "files": files}
            write_json(temporary / "position.json", place)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            others = sorted(path for path in self.folder.glob("step-*") if path != target)
            for old in others[: len(others) - KEEP + 1]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load_latest(self, *, seed: int) -> Position:
        """Restore the newest whole checkpoint; without one, the position is the beginning.

        The main process chooses, or processes could go on from different ones. On another number of processes the run
        goes on, but not to the bit; a process without a random state in it draws from (seed, its number, step).
        """
        chosen = [self._newest() if self.accelerator.is_main_process else None]
        broadcast_object_list(chosen)
        if chosen[0] is None:
            return Position()
        folder, position, processes = chosen[0]
        self.accelerator.load_state(str(folder))
        if self.accelerator.is_main_process:
            logger.info("resuming from %s (step %d)", folder, position.step)
        now, rank = self.accelerator.num_processes, self.accelerator.process_index
        if processes != now:
            said = "%s was written by %d process(es), this run has %d: it goes on, but not to the same bits"
            logger.warning(said, folder, processes, now)
        if rank >= processes:
            seed_process(seed, rank, position.step)
        return position

    def _newest(self) -> tuple[Path, Position, int] | None:
        """Find the newest whole checkpoint; broken ones are named and renamed, or they would crowd out new ones."""
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                return folder, *_whole(folder)
            except BROKEN as error:
                logger.warning("checkpoint %s is broken (%s); trying the one before", folder, error)
                os.replace(folder, mkdtemp(prefix=f"broken-{folder.name}-", dir=self.folder))
        return None


def _whole(folder: Path) -> tuple[Position, int]:
    """Position and number of processes of a checkpoint whose every file can be read, before anything is loaded."""
    stored = json.loads((folder / "position.json").read_text(encoding="utf-8"))
    for path in (folder / name for name in stored.pop("files")):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # or it says that the file was cut
                pass
        elif zipfile.ZipFile(path).testzip() is not None:  # what torch.save writes, with check sums
            raise ValueError(f"{path} is not what was written")
    processes = stored.pop("processes")
    return Position(**stored), processes


def stage(run: Run, name: str, compute: Callable[[], Measured]) -> Measured:
    """Return a stage's rows and figures: read back from the run's folder where it had finished, else computed and kept.

    The JSON is written last and marks the stage as done. Figures that are not defined are None, fresh or stored.
    """
    folder = run.folder / "checkpoints" / "stages" / name
    done = folder / "stage.json"
    if done.is_file():
        logger.info("stage %s is done already, read from %s", name, folder)
        stored = json.loads(done.read_text(encoding="utf-8"))
        run.seconds[name] = stored["seconds"]
        return pd.read_parquet(folder / "rows.parquet"), stored["figures"]
    with run.timed(name):
        rows, figures = compute()
    figures = plain(figures)
    if run.accelerator.is_main_process:
        with atomic_write(folder / "rows.parquet") as temporary:
            rows.to_parquet(temporary)
        write_json(done, {"figures": figures, "seconds": run.seconds[name]})
    run.accelerator.wait_for_everyone()
    return rows, figures


def fingerprints(setup: Setup) -> dict[str, str]:
    """Return hashes of all that a run starts from beside its configuration, by what they are called in messages."""
    return {
        **{f"{split.name} images": split.fingerprint for split in setup.splits},
        "starting classifier": hash_of_state(setup.classifier.model),
        "classifier's preprocessing": setup.info.classifier_preprocessing,
        "vision-language model": setup.info.vlm_weights_hash,
        "vision-language model's preprocessing": setup.info.vlm_preprocessing,
    }


def refuse_other_inputs(run: Run, inputs: Mapping[str, str]) -> None:
    """Note what a run starts from; refuse to resume with other inputs, and name them."""
    path = run.folder / "checkpoints" / "inputs.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else inputs
    other = [name for name in {**stored, **inputs} if stored.get(name) != inputs.get(name)]
    if other:
        told = [f"other {name} (then {stored.get(name, '')[:8]}, now {inputs.get(name, '')[:8]})" for name in other]
        raise SystemExit(f"error: {path}: the run was begun with {', '.join(told)}; use another --out")
    run.accelerator.wait_for_everyone()  # all have looked before it is there
    if run.accelerator.is_main_process:
        write_json(path, inputs)
    run.accelerator.wait_for_everyone()
