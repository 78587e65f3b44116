#!/usr/bin/env python3
"""Train a CNN on CIFAR-10, classify your own pictures with it, and compare every setting in MLflow.

93.2 % test accuracy (94.3 % with test-time augmentation) after 20 epochs, 18 minutes on two CPU cores that compute in
bfloat16 (AMD Zen 5, torch 2.15, mean of three seeds); README.md says how it was measured.

    python classifier.py --mode train                      # 20 epochs; downloads CIFAR-10 if it is not there
    python classifier.py --mode train --dataset digits     # the same program in under a minute, no download
    python classifier.py --mode evaluate                   # accuracy, calibration and classes of a saved model
    python classifier.py --mode predict --image photo.jpg  # files, folders, globs, - for paths on stdin
    python classifier.py --mode benchmark                  # what each optimization gains on this machine
    torchrun --nproc-per-node 4 classifier.py --mode train # several devices

Read it from top to bottom, nothing uses what stands below it:
settings, runtime, model, pixels, data, checkpoints, tracking, training, prediction, modes, main.
"""
from __future__ import annotations

import argparse
import base64
import colorsys
import contextlib
import copy
import datetime
import errno
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import signal
import socket
import stat
import statistics
import sys
import tempfile
import threading
import time
import urllib.parse
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler

DEVICES = r"auto|cpu|mps|cuda(:\d+)?"
DATASETS = ("cifar10", "digits")   # any other is a folder
IMAGE_SIZE = 32                    # CIFAR-10's; every other picture is brought to it
LETTERBOX_GRAY = (128, 128, 128)   # the brief's neutral gray
REFERENCE_BATCH = 128              # the effective batch that learning rates and momentum are meant for
EVALUATION_BATCH = 250             # divides 10,000, so compiled evaluation sees one shape; 500 takes 1.3 times as long
CALIBRATION_BINS = 15              # as in Guo et al. 2017, arXiv:1706.04599
SOFTEN = ImageFilter.Kernel((3, 3), (1, 8, 1, 8, 64, 8, 1, 8, 1))              # see `framings`
CENTRE_SQUARES = (1.0, 0.85)       # sides of the squares in the middle of a photo that TTA adds, in its short sides
SQUARE_SIZE = 40                   # their pixels: of 110 photos 83 are named right, 79 at 32 (four networks)
REDUCING_GAP = 2.0                 # Pillow averages whole pixels down to twice the target before LANCZOS: half the time
MAX_PIXELS = 25_000_000            # of a picture as decoded, which for a big JPEG is a fraction: 1 s, 1 GB in all
TTA_MARGIN = 2.0                   # on 5,000 held-out images 27 % were below, and the accuracy that of averaging all
SQUARES_MARGIN = 3.0               # the same for photos: 85 of 110 named right, as by averaging all; at 2.0 83
PREDICTION_BATCH = 64              # pictures a call of the network; as many more are decoded meanwhile
SPLIT_SEED = 10                    # the held-out images must not depend on `--seed`
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")
MODEL_FORMAT = 3                   # raise it when an older file can no longer be read


# ------------------------------------------------------------------------------------------------------------
# Settings: each is written once, as a dataclass field, and becomes a flag, its help and an MLflow parameter.
# ------------------------------------------------------------------------------------------------------------
class UserError(Exception):
    """What the user can mend in files, devices or network: printed as one line, exit code 1."""


def setting(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field with a flag's help; `limits` are `least`, `most`, `above`, `choices` and `pattern`."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class RunSettings:
    """every mode"""
    mode: str = setting("train", "what to do", choices=("train", "evaluate", "predict", "benchmark"))
    model_path: str | None = setting(None, "the model file: train writes it, evaluate and predict read it "
                                           "(auto: <dataset>_model.pth)")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", pattern=DEVICES)
    seed: int = setting(0, "same seed and settings: the same weights bit for bit on a CPU", least=0, most=2**31)
    amp: bool | None = setting(None, "mixed precision (auto: float16 on CUDA, bfloat16 on a CPU that computes in it)")
    compile: bool | None = setting(None, "torch.compile (auto: training on CUDA, where it pays)")
    json: bool = setting(False, "JSON Lines on stdout and nothing else; people's text goes to stderr")


@dataclass(frozen=True)
class TrainSettings:
    """train, benchmark"""
    epochs: int = setting(20, "passes over the training images", least=1)
    batch_size: int = setting(128, "images per process and micro-batch", least=1)
    accumulate_grad_steps: int = setting(1, "micro-batches per update; effective batch = batch x steps x processes",
                                         least=1)
    lr: float = setting(0.0115, f"length of the filters' first update, at an effective batch of {REFERENCE_BATCH}",
                        above=0.0, most=1e6)
    head_lr: float = setting(6.0, "first learning rate of the last layer, at that batch", above=0.0, most=1e6)
    bias_lr: float = setting(0.47, "first learning rate of the biases, at that batch", above=0.0, most=1e6)
    momentum: float = setting(0.968, "Nesterov momentum of the filters, at that batch", least=0.0, most=0.9999)
    head_momentum: float = setting(0.99, "Nesterov momentum of the last layer and the biases, at that batch",
                                   least=0.0, most=0.9999)
    weight_decay: float = setting(1.7e-3, "share of the last layer and the biases that the first update takes off, at "
                                  "that batch", least=0.0, most=1.0)
    label_smoothing: float = setting(0.2, "share of the target given to all classes", least=0.0, most=0.9)
    start_size: int = setting(20, "side of the images in the first 0.3 of the updates; whole in the last 0.4",
                              least=16, most=IMAGE_SIZE)
    hard_share: float = setting(0.4, "each epoch leaves out more of the images with the least loss, down to this share "
                                "of all images", above=0.0, most=1.0)
    freeze_after: float = setting(0.6, "share of the updates after which the first stage, a quarter of the time, stays "
                                  "as it is; the stem's bias after half of that", least=0.0, most=1.0)
    flip: bool | None = setting(None, "mirror images, in training and in TTA (auto: not for digits)")
    shift: int = setting(3, "move images by up to this many pixels in training", least=0, most=IMAGE_SIZE // 2)
    cutout: int = setting(8, "side of the gray square laid on each training image; 0: none", least=0, most=IMAGE_SIZE)
    letterbox_share: float = setting(0.2, "share of the training images shown between gray bars, as photos come",
                                     least=0.0, most=1.0)
    temperature: float = setting(0.54, "divides the logits before they become confidences; with --holdout fitted there",
                                 above=0.0)
    eval_every: int = setting(1, "epochs between evaluations; 0: only at the end", least=0)
    repeats: int = setting(1, "train this many seeds; the first seed's model is saved", least=1)
    init_from: str | None = setting(None, "start from this model file's weights, those of the last layer for classes "
                                          "that both know (auto: from nothing)")
    resume: bool = setting(False, "go on from an interrupted run of the same --model-path")


@dataclass(frozen=True)
class ModelSettings:
    """train, benchmark; the others find it in the model file"""
    width: int = setting(80, "channels of the first stage; the next two have four times as many", least=1, most=4096)
    depth: int = setting(2, "convolutions of each stage", least=1, most=64)


@dataclass(frozen=True)
class DataSettings:
    """train, evaluate, benchmark"""
    dataset: str = setting("cifar10", "cifar10; digits, which needs no download; or a folder of pictures: one "
                                      "subfolder a class, below train/ and test/ where these exist")
    data_dir: str = setting("data", "holds cifar-10-batches-py/ or cifar-10-python.tar.gz, or gets them")
    data_url: tuple[str, ...] = setting(("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
                                        "where to download CIFAR-10 from, tried in order")
    num_workers: int | None = setting(None, "DataLoader processes (auto: CPUs this process may use, at most 8)",
                                      least=0, most=1024)
    holdout: int = setting(0, "training images kept out of training, to choose settings on instead of the test set",
                           least=0)
    limit_images: int = setting(0, "train on the first N images only and test on N/5; 0: all", least=0)

    @property
    def name(self) -> str:
        """A folder's own name, without where it lies."""
        return os.path.basename(os.path.abspath(self.dataset))


@dataclass(frozen=True)
class PredictSettings:
    """predict, evaluate"""
    image: tuple[str, ...] = setting((), "pictures to classify: files, folders, globs, - for paths on stdin")
    top_k: int = setting(3, "how many classes to name", least=1)
    threshold: float = setting(0.0, "answer `unknown` below this confidence", least=0.0, most=1.0)
    tta: bool = setting(True, "average over views: mirrored and shifted, of photos also squares of the middle")
    save_inputs: str | None = setting(None, "write the 32x32 pictures that the network saw to this folder "
                                            "(auto: nowhere)")


@dataclass(frozen=True)
class TrackingSettings:
    """train, evaluate, benchmark"""
    mlflow: bool = setting(True, "log to MLflow")
    experiment: str | None = setting(None, "MLflow experiment (auto: the data set's name)")
    run_name: str | None = setting(None, "MLflow run name (auto: what differs from the defaults)")
    tracking_uri: str | None = setting(None, "MLflow store (auto: MLFLOW_TRACKING_URI, else ./mlflow.db)")
    system_metrics: bool = setting(False, "log the machine's load too, every 2 seconds; needs psutil")


@dataclass(frozen=True)
class Config:
    """All settings, as asked for; what `auto` became is told by `resolved_settings`."""
    run: RunSettings = RunSettings()
    train: TrainSettings = TrainSettings()
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    prediction: PredictSettings = PredictSettings()
    tracking: TrackingSettings = TrackingSettings()

    @property
    def model_path(self) -> Path:
        return Path(self.run.model_path or f"{self.data.name}_model.pth")

    @property
    def resume_path(self) -> Path:
        return Path(f"{self.model_path}.resume")

    def flat(self) -> dict[str, Any]:
        """Every setting under its own name, without its part's."""
        return {name: value for part in asdict(self).values() for name, value in part.items()}


def value_parser(hint: Any, limits: dict[str, Any]) -> Callable[[str], Any]:
    """What turns a flag's text into its value, refusing what is outside `limits`."""
    kind = next((arg for arg in get_args(hint) if isinstance(arg, type) and arg is not type(None)), hint)
    least, most, above = limits.get("least", -math.inf), limits.get("most", math.inf), limits.get("above", -math.inf)

    def parse(text: str) -> Any:
        if text == "auto" and type(None) in get_args(hint):
            return None
        value = kind(text)
        if kind is str:
            if not re.fullmatch(limits.get("pattern", ".*"), text, re.DOTALL):
                raise argparse.ArgumentTypeError(f"invalid value: {text!r}")
        elif not (least <= value <= most and value > above):       # false for nan too
            bounds = [f"above {above:g}"] * ("above" in limits) + [f"at least {least:g}"] * ("least" in limits)
            bounds += [f"at most {most:g}"] * ("most" in limits)
            raise argparse.ArgumentTypeError(f"must be {' and '.join(bounds)}: {text}")
        return value

    parse.__name__ = kind.__name__                                 # argparse says "invalid int value"
    return parse


def add_flag(group: argparse._ArgumentGroup, name: str, hint: Any, default: Any, limits: dict[str, Any]) -> None:
    """One field, one flag; unset flags stay out of the namespace so that `Config` alone holds the defaults."""
    shown = " ".join(default) or "none" if isinstance(default, tuple) else default
    told = "" if "(auto: " in limits["help"] else f" (default: {shown})".replace("False", "off").replace("True", "on")
    options: dict[str, Any] = {"help": (limits["help"] + told).replace("%", "%%"), "default": argparse.SUPPRESS}
    if hint in (bool, bool | None):
        options |= {"action": argparse.BooleanOptionalAction}
    else:
        options |= {"type": value_parser(hint, limits), "choices": limits.get("choices")}
        options |= {"metavar": name.rsplit("_")[-1].upper()} if not limits.get("choices") else {}
        options |= {"nargs": "+", "action": "extend"} if isinstance(default, tuple) else {}
    group.add_argument(f"--{name.replace('_', '-')}", **options)


def parse_config(argv: list[str] | None = None) -> Config:
    """The command line as a checked `Config`; exits with 2 and the flag's name where it is impossible."""
    parser = argparse.ArgumentParser(prog="classifier.py", allow_abbrev=False, description=__doc__,
                                     usage="%(prog)s --mode MODE [flags]; --help explains them",    # else 25 lines
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = get_type_hints(Config)
    for part in parts.values():
        group = parser.add_argument_group(f"read by {part.__doc__}")
        hints = get_type_hints(part)
        for f in fields(part):
            add_flag(group, f.name, hints[f.name], f.default, f.metadata)
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args(argv)).items()}
    if (dataset := given.get("dataset", "cifar10")) not in DATASETS and not os.path.isdir(dataset):
        parser.error(f"argument --dataset: {dataset} is neither {', '.join(DATASETS)} nor a folder")
    if given.get("mode") == "predict" and not given.get("image"):
        parser.error("argument --image: --mode predict needs at least one picture")
    if given.get("resume") and given.get("repeats", 1) > 1:
        parser.error("argument --resume: not with --repeats")
    return Config(**{name: part(**{f.name: given[f.name] for f in fields(part) if f.name in given})
                     for name, part in parts.items()})


def redact(text: str) -> str:
    """`text` with the passwords and queries of its URLs replaced: it goes to logs, parameters and files."""
    text = re.sub(r"://(?:[^/@\s:]*:[^@\s'\"]*|[^/@\s]*)@", "://***@", text)          # a password may hold a slash
    return re.sub(r"(://[^\s?#]*)\?[^\s'\"]*", r"\1?***", text)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def loggable(value: Any) -> Any:
    """A setting as logs and files hold it: a plain value without secrets."""
    if isinstance(value, tuple):
        return " ".join(map(redact, value))
    return redact(value) if isinstance(value, str) else value


def in_front() -> bool:
    """Whether this process is the one that speaks: under torchrun the main one."""
    return os.environ.get("RANK", "0") == "0"


def note(message: str) -> None:
    """A line for the person in front, on stderr."""
    if in_front():
        print(redact(message), file=sys.stderr, flush=True)


def progress(items: Iterable, label: str, total: int | None = None) -> Iterable:
    """`items` with a bar and, where their number is known, the time left, on a terminal."""
    from tqdm import tqdm
    return tqdm(items, label, total, leave=False, dynamic_ncols=True, disable=None if in_front() else True)


# ------------------------------------------------------------------------------------------------------------
# Runtime: the device, the precision, the processes. Knows neither model nor data.
# ------------------------------------------------------------------------------------------------------------
class Stopped(BaseException):
    """SIGINT or SIGTERM: not an Exception, so that nothing swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """The first SIGINT or SIGTERM raises `Stopped`; a second one, from then on, ends the process at once."""
    def stop(signum: int, _frame: Any) -> None:
        for each in handled:
            signal.signal(each, signal.SIG_DFL)
        if hasattr(signal, "SIGCHLD"):  # torch's handler would turn workers that the same signal ended into an error
            signal.signal(signal.SIGCHLD, lambda *_: None)         # SIG_DFL: Python complains of one already on its way
        raise Stopped(signum)

    handled = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = [(each, signal.signal(each, stop)) for each in handled]
    try:
        yield
    finally:
        for each, handler in before:
            signal.signal(each, handler)


def cgroup_cpus(root: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs that the container's quota allows (cgroup v2, then v1); infinite without one."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (root / "cpu.max").read_text().split()
        return int(quota) / int(period)                            # "max 100000": no quota, a ValueError
    with contextlib.suppress(OSError, ValueError):
        quota, period = (int((root / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else math.inf
    return math.inf


def usable_cpus() -> int:
    """CPUs this process may use: affinity and container quota count, not what the machine has."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, math.ceil(min(cgroup_cpus(), allowed))))


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `--device` names; each local process takes the CUDA device of its rank."""
    if not re.fullmatch(DEVICES, name):
        raise UserError(f"device {name!r}: must be auto, cpu, cuda, cuda:N or mps")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available here; use --device cpu")
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(name[5:] or local_rank)
        if index >= count:
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            raise UserError(f"--device {name}: device {index} is wanted and {count} CUDA devices can be used "
                            f"(torch {torch.__version__}, {built}); use --device cpu or fewer processes")
        return torch.device("cuda", index)
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """The device and, where the system tells, its make."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    make = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):                             # Linux, where Python does not know it
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        make = found[1] if found else make
    return f"{device} {make}"


def pick_amp_dtype(device: torch.device, amp: bool | None) -> tuple[torch.dtype | None, str]:
    """The dtype of mixed precision, None for off, and why."""
    if amp is False:
        return None, "--no-amp"
    if device.type == "cuda":
        return torch.float16, "CUDA, with a gradient scaler"
    if device.type != "cpu":
        return None, f"not used on {device.type}"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if any(able for name, able in capabilities.items() if "bf16" in name):     # avx512_bf16, amx_bf16, ...
        return torch.bfloat16, "this CPU computes in bfloat16"
    return (torch.bfloat16, "--amp; slow, this CPU emulates bfloat16") if amp else (
        None, "this CPU lacks bfloat16, or torch cannot tell")


@dataclass(frozen=True)
class Runtime:
    """Where the work runs. One process is a world of one, so no caller asks whether there are several."""
    device: torch.device
    amp_dtype: torch.dtype | None = None
    amp_reason: str = ""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0                # of the processes of this machine
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp_dtype or torch.bfloat16,
                              enabled=self.amp_dtype is not None)

    def move(self, *tensors: Tensor) -> list[Tensor]:
        return [tensor.to(self.device, non_blocking=self.device.type == "cuda") for tensor in tensors]

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` added up over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, value: Any) -> Any:
        """The main process's `value`, in every process."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    @contextlib.contextmanager
    def by_turns(self) -> Iterator[None]:
        """The main process does it alone, then one process of each other machine, then the others, who find what these
        left on the disk."""
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for now in range(3):
            if now == turn:
                yield
            if self.world_size > 1 and now < 2:
                dist.barrier()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory_mb(self) -> float | None:
        """Peak GPU memory on CUDA, else the peak resident set of this process; None where neither is known."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        with contextlib.suppress(OSError, IndexError):             # Linux; its ru_maxrss starts at the parent's size
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
        try:
            import resource                                        # not on Windows
        except ImportError:
            return None
        unit = 2**20 if sys.platform == "darwin" else 2**10        # macOS counts bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@contextlib.contextmanager
def open_runtime(run: RunSettings) -> Iterator[Runtime]:
    """Device, precision and (under torchrun) the process group, which is left again whatever happens."""
    rank, world_size, local_rank, local_world_size = (
        int(os.environ.get(name, default)) for name, default in
        (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    device = pick_device(run.device, local_rank)
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))         # torch does not know of quotas
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if world_size > 1:
        if ":" in run.device:
            raise UserError(f"--device {run.device}: each process takes a device of its own under torchrun; say cuda")
        # Two hours: the others wait while the main process downloads.
        patience = datetime.timedelta(hours=2)
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=patience))
        if local_world_size == world_size:
            # torchrun's store still has what processes before a restart left there (pytorch/pytorch#135712); several
            # machines count restarts each for itself.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world_size, timeout=patience)
    try:
        yield Runtime(device, *pick_amp_dtype(device, run.amp), rank, world_size, local_rank, local_world_size)
        if world_size > 1:              # gloo's threads that still hold a Python tensor when Python ends abort the
            dist.barrier()              # process (pytorch/pytorch#179291); meanwhile they let go
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def pick_compile(compile: bool | None, device: torch.device, one_off: bool) -> tuple[bool, str]:
    """Whether to compile, and why; `one_off` work is over before compiling has paid."""
    if compile is not None:
        return compile, "--compile" if compile else "--no-compile"
    if one_off:
        return False, "does not pay for a single pass"
    return (True, "CUDA") if device.type == "cuda" else (False, f"does not pay on {device.type}")


class CompileReport(NamedTuple):
    """What became of torch.compile."""
    active: bool
    reason: str
    seconds: float = 0.0


def accelerate(model: nn.Module, runtime: Runtime, compile: tuple[bool, str], example: Tensor,
               memory_format: torch.memory_format = torch.channels_last) -> tuple[nn.Module, CompileReport]:
    """What to call in place of `model`: on the device, channels-last, compiled if asked for and if it works.

    torch.compile is lazy and fails at the first call, so that call is made here, on `example` (images),
    in the mode (train or eval) that the model is in. It leaves weights, BatchNorm statistics and random state as
    they were, and no gradients. The result shares the model's weights, which in eval mode get the runtime's precision.
    """
    model.to(runtime.device, memory_format=memory_format)
    if runtime.amp_dtype and not model.training:       # the same numbers: autocast would cast them at each call, 0.4 ms
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.to(runtime.amp_dtype)
    wanted, why = compile
    if not wanted:
        return model, CompileReport(False, why)
    before = copy.deepcopy(model.state_dict())
    started = time.perf_counter()
    try:
        devices = [runtime.device] if runtime.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.inference_mode(not model.training):
            # Training has four shapes, each compiled in 8 s here; one for any shape took 35 s and more.
            net = torch.compile(model, dynamic=False if model.training else None)
            with runtime.autocast():
                logits = net(*runtime.move(example))
            if model.training:
                logits.float().sum().backward()
        runtime.synchronize()
        report = CompileReport(True, why, time.perf_counter() - started)
    except Exception as error:          # any: compiler, Triton and Dynamo raise errors of their own
        cause = " ".join(str(error).split())[:200]
        net, report = model, CompileReport(False, f"failed: {type(error).__name__}: {cause}",
                                           time.perf_counter() - started)
        note(f"torch.compile failed, the network runs without it: {cause}")
    model.load_state_dict(before)
    model.zero_grad(set_to_none=True)
    return net, report


def distribute(net: nn.Module, runtime: Runtime) -> nn.Module:
    """DistributedDataParallel around `net` where there are several processes; only the training step calls it."""
    if runtime.world_size == 1:
        return net
    # Buffers stay per process in training; `share_buffers` averages them before evaluating and saving.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):     # torch 2.15 calls it deprecated, 2.6
        return DistributedDataParallel(net, broadcast_buffers=False)           # does not know what is to replace it


def share_buffers(model: nn.Module, runtime: Runtime) -> None:
    """BatchNorm statistics become their mean over the processes."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            runtime.sum(buffer).div_(runtime.world_size)


# ------------------------------------------------------------------------------------------------------------
# Model: uint8 pixels in, logits out. Knows neither flags nor files.
# ------------------------------------------------------------------------------------------------------------
class PixelStatistics(NamedTuple):
    """What the network's first layers take from the training images; pixels counted from 0 to 1."""
    mean: Tensor         # (3,)
    std: Tensor          # (3,)
    whitening: Tensor    # (24, 3, 2, 2)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels (N, 3, S, S) from 0 to 255 to floats of mean 0 and deviation 1."""
    return (images / 255 - mean) / std


def pixel_statistics(images: Tensor) -> PixelStatistics:
    """Mean and deviation of all pixels, and filters that whiten 2x2 patches, of uint8 `images` (N, 3, S, S).

    The filters are the eigenvectors of the patches' covariance over the roots of their eigenvalues, each with its
    negative, since an activation follows (as in tysam-code/hlb-CIFAR10 and KellerJordan/cifar10-airbench).
    """
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    levels = torch.arange(256).double() / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = (share * levels).sum(1)
    std = (share * (levels - mean[:, None]) ** 2).sum(1).sqrt().clamp(min=1 / 255)
    sample = normalise(images[:1000].double(), mean.view(3, 1, 1), std.view(3, 1, 1))
    patches = sample.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    eigenvalues, eigenvectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    # Gray images leave directions empty, whose noise BatchNorm would blow up: the others take their places.
    filled = (eigenvalues.clamp(min=0) >= 1e-6 * eigenvalues[-1]).nonzero().flatten()
    chosen = filled[torch.arange(12) % len(filled)]
    filters = (eigenvectors[:, chosen] / (eigenvalues[chosen] + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
    return PixelStatistics(mean.float(), std.float(), torch.cat([filters, -filters]).float())


class ConvBlock(nn.Module):
    """`depth` convolutions, the first before halving; from the third on each adds to what it gets."""

    def __init__(self, channels_in: int, channels_out: int, depth: int) -> None:
        super().__init__()
        channels = [channels_in] + [channels_out] * depth
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1, bias=False) for pair in itertools.pairwise(channels))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels_out) for _ in range(depth))
        for conv, norm in zip(self.convs, self.norms):
            nn.init.dirac_(conv.weight.data[:conv.in_channels])    # starts by passing its input on
            norm.weight.requires_grad = False                      # the next convolution scales as well

    def forward(self, x: Tensor) -> Tensor:                        # (N, in, S, S)
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            y = conv(x)
            y = F.max_pool2d(y, 2) if number == 0 else y + x if number > 1 else y
            x = F.gelu(norm(y))                                    # (N, out, S/2, S/2)
        return x


class CifarNet(nn.Module):
    """A whitening stem and three wide blocks, after KellerJordan/cifar10-airbench: 180 M multiply-adds an image.

    Takes uint8 pixels (N, 3, 32, 32) and normalises them itself, so that no caller can do it wrong and a quarter
    of the bytes travel; gives logits (N, classes).
    """

    def __init__(self, settings: ModelSettings, classes: int, statistics: PixelStatistics | None) -> None:
        super().__init__()
        width, depth = settings.width, settings.depth
        self.stem = nn.Conv2d(3, 24, 2)
        self.blocks = nn.Sequential(ConvBlock(24, width, depth), ConvBlock(width, 4 * width, depth),
                                    ConvBlock(4 * width, 4 * width, depth))
        self.head = nn.Linear(4 * width, classes, bias=False)
        mean, std, whitening = statistics or (torch.zeros(3), torch.ones(3), torch.zeros(24, 3, 2, 2))
        self.register_buffer("pixel_mean", mean.view(3, 1, 1))
        self.register_buffer("pixel_std", std.view(3, 1, 1))
        self.stem.weight = nn.Parameter(whitening, requires_grad=False)
        nn.init.zeros_(self.stem.bias)
        if statistics:                  # without, a state dict brings the weights, and drawing on "meta" takes 2 s
            nn.init.normal_(self.head.weight)

    def forward(self, images: Tensor) -> Tensor:                   # uint8 (N, 3, 32, 32)
        x = normalise(images, self.pixel_mean, self.pixel_std)
        x = F.gelu(self.stem(x))                                   # (N, 24, 31, 31)
        x = self.blocks(x)                                         # (N, 4 width, 3, 3)
        x = F.max_pool2d(x, x.shape[-2:]).flatten(1)               # not amax: compiled in bfloat16 its gradient is NaN
        return self.head(x) / x.shape[1]                           # airbench's scale, for weights of deviation 1


def build_model(settings: ModelSettings, classes: int, statistics: PixelStatistics | None = None) -> CifarNet:
    """A new network; `statistics` may be left out where a state dict will bring them."""
    return CifarNet(settings, classes, statistics)


def reflect(positions: Tensor, size: int) -> Tensor:
    """Positions beyond either edge, mirrored back inside: -1 becomes 1, size becomes size - 2."""
    return (size - 1) - (size - 1 - positions.abs()).abs()


def move_pixels(images: Tensor, down: Tensor, right: Tensor, mirrored: Tensor) -> Tensor:
    """Each image (N, C, H, W) shifted by its own whole pixels, edges reflected, and mirrored where told.

    Every pixel of the result is some pixel of the original, so one gather does all three.
    """
    _, channels, height, width = images.shape
    rows = reflect(torch.arange(height, device=images.device) - down[:, None], height)              # (N, H)
    columns = reflect(torch.arange(width, device=images.device) - right[:, None], width)            # (N, W)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    source = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)                            # (N, H*W)
    return images.flatten(2).gather(2, source[:, None].expand(-1, channels, -1)).view_as(images)


def shifted_views(images: Tensor, flip: bool) -> Tensor:
    """Uint8 (views, N, 3, S, S): images (N, 3, S, S) shifted by a pixel both ways, and with `flip` mirrored images too
    (airbench's multi-crop, without the images as they are)."""
    views = []
    for shift, mirror in list(itertools.product((0, -1, 1), (False, True) if flip else (False,)))[1:]:
        down = torch.full((len(images),), shift, device=images.device)
        views.append(move_pixels(images, down, down, torch.full_like(down, mirror, dtype=torch.bool)))
    return torch.stack(views)


def logits_with_tta(net: nn.Module, images: Tensor, tta: bool, flip: bool, views: Tensor | None = None
                    ) -> tuple[Tensor, Tensor]:
    """Float32 logits (N, classes) of the images as they are, and those to answer with.

    With `tta` (test-time augmentation) the latter are the mean over an image and further views of it, `views`
    (views, N, 3, S, S) or else `shifted_views`, for the images whose two best classes lie closer than a margin; the
    others keep theirs.
    """
    plain = net(images).float()
    best = plain.topk(min(2, plain.shape[1])).values
    margin = TTA_MARGIN if views is None else SQUARES_MARGIN
    unsure = (best[:, 0] - best[:, -1] < margin).nonzero().flatten() if tta else plain.new_empty(0)
    if not len(unsure):
        return plain, plain
    views = shifted_views(images[unsure], flip) if views is None else views[:, unsure]
    # Few images: all views at once, at width 64 3.2 ms against 7.5 for a photo. More than fit the caches take longer.
    pieces = views.flatten(0, 1).split(max(len(images), PREDICTION_BATCH))
    others = torch.cat([net(piece).float() for piece in pieces]).unflatten(0, (-1, len(unsure)))
    return plain, plain.index_copy(0, unsure, torch.cat([plain[None, unsure], others]).mean(0))


# ------------------------------------------------------------------------------------------------------------
# Pixels: from anybody's picture to the 32x32 that the network sees. Knows neither model nor settings.
# ------------------------------------------------------------------------------------------------------------
def to_rgb(image: Image.Image, full_size: tuple[int, int]) -> Image.Image:
    """Turned as its EXIF says, transparency laid on the letterbox's gray, 16 bits scaled to 8, as RGB.

    A picture far larger than needed is first averaged over whole pixels, to a longer side of 512 to 1,023. Decoded at a
    fraction or averaged, its sides are no longer in exactly their ratio: `info["full_size"]` has those it had.
    """
    if 0 in image.size:
        raise ValueError("the picture has no pixels")
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"{image.width}x{image.height} pixels: more than {MAX_PIXELS // 10**6} million are not read")
    image.load()
    with contextlib.suppress(Exception):                           # broken EXIF says nothing against the picture
        image = ImageOps.exif_transpose(image)
    sixteen_bits = image.mode.startswith("I;16")
    if sixteen_bits or image.mode in ("1", "P", "PA"):             # what `reduce` does not average
        image = image.convert("I" if sixteen_bits else "RGBA" if image.has_transparency_data else "RGB")
    if (factor := max(image.size) // (16 * IMAGE_SIZE)) > 1:
        image = image.reduce(factor)
    if image.mode in ("I", "F"):                                   # Pillow's own conversion clips at 255
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        deep = 65535 if sixteen_bits else values.max(initial=0)
        full = next((scale for scale in (1.0, 255.0, 65535.0) if deep <= scale), deep)
        image = Image.fromarray((values.clip(0, full) * (255 / full)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, LETTERBOX_GRAY), image.convert("RGBA"))
    rgb = image.convert("RGB")
    rgb.info["full_size"] = min(full_size, full_size[::-1],        # the turned one where it was turned
                                key=lambda size: abs(size[0] * rgb.height - size[1] * rgb.width))
    return rgb


def read_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """A picture as RGB, of an animation (told by `info["animated"]`) the first.

    Raises `UserError` with the reason where it cannot be read.
    """
    try:
        if isinstance(source, Image.Image):
            return to_rgb(source, source.size)
        if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):      # a pipe may never end
            raise UserError("a directory" if os.path.isdir(source) else "not a regular file")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.format == "EPS":                              # a program, which Pillow hands to Ghostscript
                raise UserError("an EPS drawing, which is not run: export it as PNG")
            full_size = image.size
            image.draft(None, (4 * IMAGE_SIZE, 4 * IMAGE_SIZE))    # big JPEGs: decode at a fraction of their size
            rgb = to_rgb(image, full_size)
            with contextlib.suppress(Exception):                   # the first picture is good whatever follows it
                rgb.info["animated"] = getattr(image, "is_animated", False)
            return rgb
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        head = source[:12] if isinstance(source, bytes) else Path(source).open("rb").read(12)
        if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"heif", b"mif1", b"msf1"):
            raise UserError("a HEIC photo, which Pillow cannot read: export it as JPEG") from None
        raise UserError("not a picture that Pillow can read" if head else "the file is empty") from None
    except FileNotFoundError:
        raise UserError("no such picture") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"too many pixels to be safe: {error}") from None
    except Exception as error:          # any: decoders meet hostile bytes with errors of every kind
        raise UserError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from None


def letterbox(image: Image.Image, size: int = IMAGE_SIZE) -> Image.Image:
    """`image` (RGB) at its own aspect ratio, LANCZOS-resized to fit and centred on a gray square."""
    sides = image.info.get("full_size", image.size)
    if abs(sides[0] * image.height - sides[1] * image.width) > max(sides):     # not its own: the image was cut since
        sides = image.size
    fitted = image.resize([max(1, round(side * size / max(sides))) for side in sides], Image.Resampling.LANCZOS,
                          reducing_gap=REDUCING_GAP)
    square = Image.new("RGB", (size, size), LETTERBOX_GRAY)
    square.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return square


def framings(image: Image.Image, tta: bool, mirrors: bool) -> list[Image.Image]:
    """What the network sees of `image` (RGB): the letterbox and, with `tta`, two squares of its middle, the first
    mirrored (with `mirrors`), where neither is enlarged.

    A photo's object fills less of it than CIFAR-10's do; the squares' SQUARE_SIZE pixels make up for that.
    LANCZOS leaves a photo's finest detail with up to three times the power that it has in CIFAR-10's images, which
    misleads a network that was trained on these. SOFTEN brings it to within a tenth of theirs at every frequency.
    A picture of the network's own size is left as it is and has one framing, so that predict answers as evaluate does.
    """
    views = [letterbox(image)]
    sides = [min(image.size) * share for share in CENTRE_SQUARES]
    if tta and min(sides) > SQUARE_SIZE:
        for side in sides:
            left, top = ((whole - side) / 2 for whole in image.size)
            views.append(image.resize((SQUARE_SIZE, SQUARE_SIZE), Image.Resampling.LANCZOS,
                                      (left, top, left + side, top + side), REDUCING_GAP))
    if mirrors and len(views) > 1:
        views[1] = ImageOps.mirror(views[1])
    return [view.filter(SOFTEN) for view in views] if max(image.size) > IMAGE_SIZE else views


def to_pixels(image: Image.Image) -> Tensor:
    """RGB picture to uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# ------------------------------------------------------------------------------------------------------------
# Data: uint8 images in one array, whole batches from it, augmented on the device. Knows neither model nor MLflow.
# ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Split:
    """Images (N, 3, 32, 32) uint8 and their labels (N,) int64."""
    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor | slice) -> Split:
        return Split(self.images[indices], self.labels[indices])

    @functools.cached_property
    def digest(self) -> str:
        """16 characters that tell one set of images and labels from another."""
        sha = hashlib.sha256(self.images.numpy())
        sha.update(self.labels.numpy())
        return sha.hexdigest()[:16]


@dataclass(frozen=True)
class ImageData:
    """A data set: what to train on and what to measure on."""
    name: str
    class_names: tuple[str, ...]
    train: Split
    evaluation: Split
    evaluation_name: str = "test"      # or holdout: prefix of its metrics
    mirrors: bool = True               # whether a mirrored image is still of its class
    source: str = "https://www.cs.toronto.edu/~kriz/cifar.html"


def read_cifar10(root: str | Path) -> ImageData:
    """The official files below `root`; RuntimeError (torchvision's) where they are missing or their md5 differs."""
    from torchvision.datasets import CIFAR10
    train, test = ((part, Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
                                torch.tensor(part.targets)))
                   for part in (CIFAR10(root, train=True), CIFAR10(root, train=False)))
    return ImageData("cifar10", tuple(train[0].classes), train[1], test[1])


def unpack_cifar10(data_dir: Path, urls: Iterable[str], scratch: str) -> None:
    """The tarball, from `data_dir` or the first of `urls` that has it, md5-checked and unpacked into `scratch`."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, download_url, extract_archive
    tarball, failures = data_dir / CIFAR10.filename, []
    if check_integrity(tarball, CIFAR10.tgz_md5):
        return extract_archive(str(tarball), scratch)
    if tarball.exists():
        failures.append(f"{tarball} is damaged, its md5 differs")
    for url in urls:
        note(f"downloading CIFAR-10 (170 MB) from {url}")
        silence = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)                               # torchvision sets none and would wait for ever
        try:
            with contextlib.ExitStack() as stack:
                if not sys.stderr.isatty():                        # torchvision's bar would flood a log
                    stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
                download_url(url, scratch, CIFAR10.filename, CIFAR10.tgz_md5)
            return extract_archive(str(Path(scratch, CIFAR10.filename)), scratch)
        except Exception as error:      # any: whatever is wrong with this mirror, the next may serve
            failures.append(f"{url}: {error or type(error).__name__}")
            note(f"  failed: {failures[-1]}")
        finally:
            socket.setdefaulttimeout(silence)
    raise UserError(f"CIFAR-10 is not to be had: {'; '.join(failures)}. Three ways on: put {CIFAR10.filename} "
                    f"(md5 {CIFAR10.tgz_md5}) into {data_dir}/, name a mirror with --data-url, or try the program "
                    f"with --dataset digits, which needs no download")


def load_cifar10(settings: DataSettings) -> ImageData:
    """CIFAR-10 from `--data-dir`, unpacked or downloaded into it first where needed."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity
    data_dir = Path(settings.data_dir)
    folder = data_dir / CIFAR10.base_folder
    files = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    damaged = [name for name, md5 in files if not check_integrity(folder / name, md5)]
    if not damaged:
        return read_cifar10(data_dir)
    if folder.exists():
        note(f"{folder}: missing or damaged (md5 differs): {', '.join(damaged)}; trying to get them anew")
    with contextlib.suppress(OSError):
        data_dir.mkdir(parents=True, exist_ok=True)
    writable = data_dir.is_dir() and os.access(data_dir, os.W_OK)  # read-only data: unpacked elsewhere, each time
    with tempfile.TemporaryDirectory(dir=data_dir if writable else None) as scratch:
        unpack_cifar10(data_dir, settings.data_url, scratch)
        data = read_cifar10(scratch)
        if writable:                    # whole files, one by one: safe beside another process that does the same
            folder.mkdir(exist_ok=True)
            for name, _ in files:
                os.replace(Path(scratch, CIFAR10.base_folder, name), folder / name)
    return data


def load_digits(settings: DataSettings) -> ImageData:
    """scikit-learn's 1,797 handwritten digits, 8x8 in 17 grays, enlarged; a fifth of them is the test set."""
    try:
        from sklearn.datasets import load_digits as load_bundled
    except ImportError:
        raise UserError("--dataset digits comes with scikit-learn: pip install scikit-learn") from None
    bundled = load_bundled()
    small = torch.from_numpy(bundled.images).float()[:, None] * (255 / 16)
    large = F.interpolate(small, size=IMAGE_SIZE, mode="bilinear").round().byte().expand(-1, 3, -1, -1).contiguous()
    order = torch.randperm(len(large), generator=torch.Generator().manual_seed(SPLIT_SEED))
    both = Split(large, torch.from_numpy(bundled.target).long())
    test_count = len(large) // 5
    return ImageData("digits", tuple(map(str, bundled.target_names)), both.take(order[test_count:]),
                     both.take(order[:test_count]), mirrors=False,
                     source="https://archive.ics.uci.edu/dataset/80")


def natural(path: str) -> list[Any]:
    """Sort key by which photo2 stands before photo10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


def pictures_below(folder: str | Path) -> list[str]:
    """Paths of the pictures, hidden ones apart, in `folder` and all below it, in natural order."""
    return sorted((os.path.join(place, name) for place, _, names in os.walk(folder) for name in names
                   if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")), key=natural)


def find_classes(root: str) -> dict[str, list[str]]:
    """The pictures of each subfolder of `root` that has any; UserError where there are no two such classes."""
    folders = sorted((entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."), key=natural)
    classes = {name: pictures_below(os.path.join(root, name)) for name in folders}
    for name in (name for name in folders if not classes[name]):
        note(f"{os.path.join(root, name)}: no pictures in it, no class")
    alike = {first for first, second in itertools.combinations(folders, 2) if first.casefold() == second.casefold()}
    if alike:
        raise UserError(f"--dataset: {root} has several folders called {', '.join(sorted(alike))} but for capitals: "
                        f"merge or rename them")
    return {name: paths for name, paths in classes.items() if paths}


def split_class(paths: list[str], root: str) -> tuple[list[str], list[str]]:
    """What to train on and a tenth, at least one of two, to test on: chosen by name, so that more pictures change
    little."""
    def drawn(path: str) -> bytes:
        return hashlib.sha256(os.fsencode(f"{SPLIT_SEED}/{os.path.relpath(path, root)}")).digest()
    order = sorted(paths, key=drawn)
    count = max(1, len(paths) // 10) if len(paths) > 1 else 0
    return order[count:], order[:count]


def read_pictures(classes: dict[str, list[str]], class_names: tuple[str, ...]) -> Split:
    """The pictures as predict's letterbox shows them; what cannot be read is named, left out and counted."""
    def read(path: str) -> Tensor | None:
        try:
            return to_pixels(framings(read_image(path), False, False)[0])
        except UserError as error:
            return note(f"{path}: {error}")
    paths = list(itertools.chain(*classes.values()))
    labels = torch.tensor([class_names.index(name) for name, paths in classes.items() for _ in paths], dtype=torch.long)
    with ThreadPoolExecutor(usable_cpus()) as pool:
        pixels = list(progress(pool.map(read, paths), "reading pictures", len(paths)))
    good = [number for number, each in enumerate(pixels) if each is not None]
    if len(good) < len(paths):
        note(f"{len(paths) - len(good)} of {len(paths)} pictures could not be read and are left out")
    images = torch.empty(len(good), 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    for row, number in enumerate(good):
        images[row] = pixels[number]
    return Split(images, labels[good])


def load_folder(settings: DataSettings) -> ImageData:
    """Pictures of a folder with one subfolder a class, below train/ and test/ or else a tenth of each class to test."""
    root = os.path.abspath(settings.dataset)
    if not os.path.isdir(root):
        raise UserError(f"the pictures of {root} are no longer there: say with --dataset where they lie")
    parts = [os.path.join(root, part) for part in ("train", "test")]
    if os.path.isdir(parts[0]):
        train = find_classes(parts[0])
        test = find_classes(parts[1]) if os.path.isdir(parts[1]) else None
    else:
        train, test = find_classes(root), None
    if test is None:
        halves = {name: split_class(paths, root) for name, paths in train.items()}
        train, test = ({name: half[part] for name, half in halves.items()} for part in (0, 1))
    if len(train) < 2:
        raise UserError(f"--dataset: {root} needs pictures in at least two subfolders, one a class; "
                        f"they are in {len(train)}")
    if unknown := [name for name in test if name not in train]:
        raise UserError(f"--dataset: {parts[1]} has classes that {parts[0]} lacks: {', '.join(unknown)}")
    for name in (name for name in train if not test.get(name)):
        note(f"class {name}: no picture to test on")
    names = tuple(train)
    known, unseen = read_pictures(train, names), read_pictures(test, names)
    if missing := [name for number, name in enumerate(names) if number not in known.labels]:
        raise UserError(f"--dataset: no picture of {', '.join(missing)} could be read to train on")
    if not len(unseen):
        raise UserError(f"--dataset: {root} leaves no picture to test on")
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(SPLIT_SEED))    # for --limit-images
    return ImageData(root, names, known.take(order), unseen, source=Path(root).as_uri())


def load_data(settings: DataSettings) -> ImageData:
    """The data set that the settings name, with `--limit-images` and `--holdout` applied."""
    data = {"cifar10": load_cifar10, "digits": load_digits}.get(settings.dataset, load_folder)(settings)
    if settings.limit_images:
        data = replace(data, train=data.train.take(slice(settings.limit_images)),
                       evaluation=data.evaluation.take(slice(max(1, settings.limit_images // 5))))
    if settings.holdout:
        count = len(data.train)
        if settings.holdout >= count:
            raise UserError(f"--holdout {settings.holdout}: leaves nothing to train on, there are {count} images")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
        data = replace(data, train=data.train.take(order[settings.holdout:]), evaluation_name="holdout",
                       evaluation=data.train.take(order[:settings.holdout]))
    return data


def load_everywhere(settings: DataSettings, runtime: Runtime) -> ImageData:
    """The data set in every process; UserError where a machine's differs from the main process's."""
    with runtime.by_turns():
        data = load_data(settings)
    digests = data.train.digest, data.evaluation.digest
    if runtime.from_main(digests) != digests:
        raise UserError(f"{platform.node()} has other images than the main process: bring --data-dir or --dataset to "
                        f"the same state on all machines")
    return data


class Batch:
    """Images uint8 (B, 3, 32, 32), labels (B,) and indices (B,): iterating gives them as tensors.

    They come from a worker as numpy arrays, through its pipe. Tensors come by file descriptor, and handing three of
    those over takes longer than the bytes do (70,000 images/s against 280,000, two workers, batches of 128).
    """

    def __init__(self, *arrays: np.ndarray) -> None:
        self.arrays = arrays

    def __iter__(self) -> Iterator[Tensor]:
        return map(torch.from_numpy, self.arrays)

    def pin_memory(self) -> tuple[Tensor, ...]:
        """Called by the DataLoader where its option of that name is on."""
        return tuple(tensor.pin_memory() for tensor in self)


class ImageBatches(Dataset):
    """Answers whole batches."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: np.ndarray) -> Batch:
        chosen = self.split.take(torch.from_numpy(indices))
        return Batch(chosen.images.numpy(), chosen.labels.numpy(), indices)


def epoch_generator(seed: int, epoch: int, rank: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """Random numbers that depend on these alone: an interrupted run draws the same as one that was not."""
    drawn = np.random.SeedSequence((seed, epoch, rank)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(drawn >> np.uint64(1)))


class BatchSampler(Sampler):
    """The indices of this process's batches: one shuffle for all processes, disjoint shares.

    With `shuffle` each epoch (set `epoch` first) has its own order, shares are equally long and a short last batch
    is dropped if a whole one remains, so that every update sees the same shapes. Without, nothing is left out.
    Assign `chosen` to go through these images only.
    """

    def __init__(self, count: int, batch_size: int, runtime: Runtime, shuffle: bool, seed: int = 0) -> None:
        self.batch_size, self.runtime, self.shuffle, self.seed = batch_size, runtime, shuffle, seed
        self.chosen, self.epoch = torch.arange(count), 0

    def share(self, count: int) -> int:
        """Images of this process in an epoch of `count` images."""
        rank, world_size = self.runtime.rank, self.runtime.world_size
        if not self.shuffle:
            return len(range(rank, count, world_size))
        equal = count // world_size
        return max(equal - equal % self.batch_size, min(equal, self.batch_size))

    def batches(self, count: int) -> int:
        return math.ceil(self.share(count) / self.batch_size)

    def __len__(self) -> int:
        return self.batches(len(self.chosen))

    def __iter__(self) -> Iterator[np.ndarray]:
        order, count = self.chosen, len(self.chosen)
        if self.shuffle:
            order = order[torch.randperm(count, generator=epoch_generator(self.seed, self.epoch))]
        mine = order[self.runtime.rank::self.runtime.world_size][:self.share(count)]
        yield from (batch.numpy() for batch in mine.split(self.batch_size))


def as_it_is(batch: Batch) -> Batch:
    return batch


def start_worker(_worker: int) -> None:
    """Ctrl-C reaches the whole process group: the main process alone answers it and ends its workers. A worker that is
    left alone would wait for ever to hand its batches over, and ends too."""
    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def loader_options(num_workers: int | None, runtime: Runtime) -> dict[str, Any]:
    """DataLoader keywords: as many workers as CPUs (at most 8, shared by the local processes), pinned for CUDA."""
    if num_workers is None:
        num_workers = min(usable_cpus(), 8) // runtime.local_world_size
    options = {"num_workers": num_workers, "pin_memory": runtime.device.type == "cuda"}
    if num_workers:                     # torch refuses these two without workers
        options |= {"persistent_workers": True, "prefetch_factor": 4}
    return options


def build_loader(split: Split, sampler: BatchSampler, options: dict[str, Any]) -> DataLoader:
    """The loader of whole batches, so that there is nothing to collate."""
    return DataLoader(ImageBatches(split), batch_sampler=sampler, collate_fn=as_it_is, worker_init_fn=start_worker,
                      **options)


def cut_out(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A gray square of `size` pixels, partly outside at the edges, on each image (DeVries 2017, arXiv:1708.04552)."""
    side = images.shape[-1]
    corner = torch.randint(-(size // 2), side - size // 2, (2, len(images), 1), generator=generator,
                           device=images.device)
    offset = torch.arange(side, device=images.device) - corner     # (2, N, S): rows, columns
    rows, columns = (offset >= 0) & (offset < size)
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], LETTERBOX_GRAY[0])


def augment(images: Tensor, indices: Tensor, epoch: int, generator: torch.Generator, flip: bool, shift: int,
            cutout: int = 0) -> Tensor:
    """A whole batch of uint8 images, each moved by up to `shift` pixels, with `flip` mirrored by turns, and cut out.

    Mirroring alternates: an image is mirrored in every second epoch, half of the images in even ones, which wastes
    fewer epochs on a side already seen than chance does (Jordan 2024, arXiv:2404.00498).
    """
    if cutout:
        images = cut_out(images, cutout, generator)
    if not shift and not flip:
        return images
    down, right = torch.randint(-shift, shift + 1, (2, len(images)), generator=generator, device=images.device)
    coin = (indices * 2654435761 >> 31) & 1                        # Knuth's hash: a fixed coin for each image
    return move_pixels(images, down, right, ((coin + epoch) % 2).bool() & flip)


def shrink(images: Tensor, size: int) -> Tensor:
    """Images (N, 3, S, S) of side `size`, as floats; as they are where they have it."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)


def zoom_out(images: Tensor, count: int, host: torch.Generator) -> Tensor:
    """Uint8 images (N, 3, S, S), the first `count` of them as photos come through the letterbox.

    Half of these as wide pictures, half as tall ones: shrunk, cropped to their short side, carried on by reflection
    along the long one, between gray bars. One size for each half, drawn on the host: a device's number is waited for.
    """
    images = images.clone()
    for part in (images[:count // 2], images[count // 2:count].transpose(2, 3)):
        height, side = sorted((2 * torch.randint(IMAGE_SIZE // 4, IMAGE_SIZE // 2 + 1, (2,), generator=host)).tolist())
        top = int(torch.randint(side - height + 1, (), generator=host))
        margin, bar = (IMAGE_SIZE - side) // 2, (IMAGE_SIZE - height) // 2
        wide = F.pad(shrink(part, side)[:, :, top:top + height].float(), (margin, margin, 0, 0), mode="reflect")
        part.copy_(F.pad(wide, (0, 0, bar, bar), value=LETTERBOX_GRAY[0]).round())
    return images


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: plain dicts that `torch.load(weights_only=True)` reads. Knows neither DDP nor compile.
# ------------------------------------------------------------------------------------------------------------
class SavedModel(NamedTuple):
    """What evaluate and predict need of a model file."""
    model: CifarNet
    class_names: tuple[str, ...]
    dataset: str
    mirrors: bool
    temperature: float
    settings: dict[str, Any]


def flush_folder(folder: Path) -> None:
    """Makes a move within `folder` last, where the system can (Windows and some network disks cannot)."""
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_atomically(payload: dict[str, Any], path: Path) -> None:
    """Written beside `path`, flushed, then moved over it: a crash or a full disk leaves the old file whole."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        flush_folder(path.parent)
    except (OSError, RuntimeError) as error:                       # torch's writer reports a full disk as the latter
        raise UserError(f"{path} could not be written: {error}") from None
    finally:
        beside.unlink(missing_ok=True)                             # gone if all went well


def checked_copy(file: Any) -> io.BytesIO:
    """A file of `torch.save` with its checksums verified, which torch.load does not do; raises where they differ.

    A copy, since torch reads the directory of a damaged file in a way of its own and can find other bytes.
    """
    copied = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(copied, "w") as whole:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:          # a bomb, maybe
                raise ValueError("compressed, which torch.save does not do")
            whole.writestr(entry.filename, archive.read(entry))
    copied.seek(0)
    return copied


def load_checked(path: Path, version: int, keys: Iterable[str]) -> dict[str, Any]:
    """The dict in `path`; UserError where it is missing, damaged, something else or wants to run code."""
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such model; train one (--mode train) or name it with --model-path") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    with file:
        try:
            payload = torch.load(checked_copy(file), map_location="cpu", weights_only=True)
        except Exception as error:      # any: whatever the unpickler makes of foreign bytes, none of it was run
            raise UserError(f"{path} is damaged or no file of this program ({first_line(error)}); "
                            f"nothing in it was run") from None
    if not isinstance(payload, dict) or not {"format_version", *keys} <= payload.keys():
        raise UserError(f"{path} is no file of this program")
    if payload["format_version"] != version:
        raise UserError(f"{path} has format {payload['format_version']}, this program reads {version}: train anew")
    return payload


def save_model(path: Path, model: CifarNet, data: ImageData, mirrors: bool, config: Config,
               temperature: float, metrics: dict[str, Any]) -> None:
    """The model file: weights of the bare network and all that is needed to use it without any flag."""
    save_atomically({
        "format_version": MODEL_FORMAT,
        "weights": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
        "model": asdict(config.model),
        "class_names": list(data.class_names),
        "dataset": data.name,
        "mirrors": mirrors,
        "pixel_mean": model.pixel_mean.flatten().tolist(),
        "pixel_std": model.pixel_std.flatten().tolist(),
        "temperature": temperature,
        "metrics": metrics,
        "settings": {name: loggable(value) for name, value in config.flat().items()},
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }, path)


def load_model(path: Path) -> SavedModel:
    """The network of a model file, in eval mode, rebuilt without any flag."""
    saved = load_checked(path, MODEL_FORMAT, ("weights", "model", "class_names", "dataset"))
    try:
        settings = ModelSettings(**saved["model"])
        if not all(f.metadata["least"] <= getattr(settings, f.name) <= f.metadata["most"] for f in fields(settings)):
            raise ValueError(f"impossible network {settings}")
        with torch.device("meta"):      # takes no memory, whatever size the file claims
            model = build_model(settings, len(saved["class_names"]))
        model.load_state_dict(saved["weights"], assign=True)
        return SavedModel(model.eval(), tuple(saved["class_names"]), saved["dataset"],
                          saved.get("mirrors", True), saved["temperature"], saved["settings"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from None


@contextlib.contextmanager
def hold_lock(path: Path, timeout: float, refusal: str) -> Iterator[None]:
    """Nobody else holds the lock `path` meanwhile; UserError with `refusal` where somebody does."""
    from filelock import FileLock, Timeout                         # comes with torch
    lock = FileLock(path, timeout=timeout)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(refusal) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):                         # Windows does not remove what is open
            path.unlink()
        lock.release()


@contextlib.contextmanager
def reserve_model_path(path: Path) -> Iterator[None]:
    """Finds out before training whether `path` can be written, and keeps other trainings away from it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--model-path {path} cannot be written: {error.strerror}") from None
    with hold_lock(path.with_name(f".{path.name}.lock"), 0, f"another training is writing {path}: "
                                                            f"wait for it or name another --model-path"):
        yield


# ------------------------------------------------------------------------------------------------------------
# Tracking: MLflow, or nothing. A failure is told once, never reaches the training and holds it up for seconds at most.
# ------------------------------------------------------------------------------------------------------------
TRACKING_PATIENCE = 10             # seconds that an epoch waits for MLflow
CLOSING_PATIENCE = 60              # and the end of a run, where the model's file is stored
METRIC_NAMES = {"lr": "train/lr", "seconds": "time/epoch_s", "images_per_second": "speed/epoch_img_s",
                "data_wait_seconds": "data/epoch_wait_s", "peak_memory_mb": "memory/peak_mb",
                "train_seconds": "time/train_s", "evaluation_seconds": "time/eval_s", "total_seconds": "time/total_s",
                "compile_seconds": "time/compile_s", "train_images_per_second": "speed/train_img_s",
                "peak_memory_so_far_mb": "memory/so_far_mb", "data_wait": "data/wait_s",
                "ece": "calibration/ece", "temperature": "calibration/temperature", "skipped_updates": "train/skipped"}
RUN_NAME_PARTS = {"width": "w", "depth": "d", "lr": "lr", "batch_size": "b", "accumulate_grad_steps": "x",
                  "epochs": "e", "amp": "amp", "compile": "compile", "repeats": "rep", "seed": "s", "momentum": "m",
                  "init_from": "from-", "head_lr": "head", "head_momentum": "hm", "bias_lr": "bias",
                  "weight_decay": "wd", "label_smoothing": "ls", "start_size": "px", "hard_share": "hard",
                  "freeze_after": "fr", "flip": "flip", "shift": "shift", "cutout": "cut", "letterbox_share": "box",
                  "temperature": "t", "holdout": "hold", "limit_images": "n", "num_workers": "j"}


def command_line(config: Config, **changes: Any) -> str:
    """The command that asks for `config`, with some settings changed; without its secrets."""
    words, defaults = ["--mode", config.run.mode], Config().flat()
    for name, value in (config.flat() | changes).items():
        flag = f"--{name.replace('_', '-')}"
        if name != "mode" and value != defaults[name]:
            words += ([flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool)
                      else [flag, *map(redact, value)] if isinstance(value, tuple) else [flag, str(loggable(value))])
    start, script = "python" if "TORCHELASTIC_RUN_ID" not in os.environ else "torchrun [its flags]", __file__
    with contextlib.suppress(ValueError):                          # on another drive than the current folder
        script = os.path.relpath(__file__)
    return f"{start} {shlex.join([script, *words])}"


def default_run_name(config: Config) -> str:
    """What differs from the defaults, most telling first, as far as MLflow's table shows it (18 characters)."""
    flat, defaults = config.flat(), Config().flat()
    parts = [{"evaluate": "eval", "benchmark": "bench"}.get(config.run.mode, "")]
    for name, short in RUN_NAME_PARTS.items():
        value = Path(flat[name]).stem if name == "init_from" and flat[name] else flat[name]
        if value != defaults[name]:
            parts.append(f"{'' if value else 'no'}{short}" if isinstance(value, bool) else
                         f"{short}{value:g}" if isinstance(value, float) else f"{short}{value}")
    names = itertools.accumulate(filter(None, parts), "{} {}".format)
    return max((name for name in names if len(name) <= 18), key=len, default="default")


def effective_batch(train: TrainSettings, runtime: Runtime) -> int:
    """Images an update sees."""
    return train.batch_size * train.accumulate_grad_steps * runtime.world_size


def resolved_settings(config: Config, runtime: Runtime, options: dict[str, Any], report: CompileReport,
                      data: ImageData, mirrors: bool) -> dict[str, Any]:
    """What `auto` became and what follows from the settings, named as MLflow and the model's users see it."""
    batch = effective_batch(config.train, runtime)
    return {
        "run_effective_batch": batch,
        "run_peak_lr": config.train.lr * batch / REFERENCE_BATCH,
        "run_amp_dtype": str(runtime.amp_dtype or torch.float32).removeprefix("torch."),
        "run_amp": runtime.amp_dtype is not None,
        "run_amp_reason": runtime.amp_reason,
        "run_compile": report.active,
        "run_compile_reason": report.reason,
        "run_memory_format": "channels_last",
        "run_data_loading": "batches",
        "run_flip": mirrors,
        "run_device": device_name(runtime.device),
        "run_threads": torch.get_num_threads(),
        "run_world_size": runtime.world_size,
        "run_backend": dist.get_backend() if runtime.world_size > 1 else "none",
        **{f"run_{name}": options.get(name, "none") for name in
           ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor")},
        "run_non_blocking": runtime.device.type == "cuda",
        "run_train_images": len(data.train),
    }


def sqlite_path(uri: str) -> Path | None:
    """The file behind a sqlite:/// URI, which may be quoted and have options; None for other stores."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(urllib.parse.unquote(uri.removeprefix("sqlite:///").split("?")[0])).absolute()


def check_database(path: Path) -> None:
    """Raises within 5 s where MLflow would try for 20 s (locked) or 103 s (not writable)."""
    import sqlite3
    with contextlib.closing(sqlite3.connect(path, timeout=5)) as connection:
        connection.execute("BEGIN IMMEDIATE")


def shared_view(mode: str, name: str) -> str:
    """MLflow's saved view, undocumented (3.17): the runs table with the columns that tell a mode's runs apart."""
    search, order = "", "attributes.start_time"
    metrics = [f"{name}/accuracy", f"{name}/accuracy_tta", "time/train_s", "speed/train_img_s", "memory/peak_mb"]
    params = ["epochs", "run_effective_batch", "run_peak_lr", "run_amp_dtype", "run_compile", "run_num_workers",
              "run_device", "seed"]
    if mode == "benchmark":             # sorted by a metric, the table unfolds the runs below their parent
        search, order = "tags.task = 'benchmark'", "metrics.`ratio/training`"
        metrics = ["ratio/training", "speed/train_img_s", "memory/peak_mb", "infer/photo_ms", "infer/b64_img_s"]
        params = ["run_data_loading", "run_memory_format", "run_amp_dtype", "run_compile"]
    columns = [f"metrics.`{key}`" for key in metrics] + [f"params.`{key}`" for key in params]
    state = {"searchFilter": search, "orderByKey": order, "orderByAsc": False, "startTime": "ALL",
             "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs",
             "selectedColumns": columns}
    return json.dumps({"name": f"classifier.py {mode}", "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})


def confusion_figure(confusion: Tensor, class_names: tuple[str, ...]) -> Any:
    """A matplotlib figure of the counts: rows are the true classes, columns the answers."""
    from matplotlib.figure import Figure
    side = 3 + 0.5 * min(len(class_names), 60)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot(xlabel="answer", ylabel="true class")
    axes.imshow((confusion / confusion.sum(1, keepdim=True).clamp(min=1)).numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(class_names)), class_names, rotation=45, ha="right")
    axes.set_yticks(range(len(class_names)), class_names)
    for row, column in itertools.product(range(len(class_names)), repeat=2) if len(class_names) <= 30 else ():
        count = int(confusion[row, column])
        axes.text(column, row, count or "", ha="center", va="center",
                  color="white" if 2 * count > confusion[row].sum() else "black")
    return figure


def evaluation_files(confusion: Tensor, class_names: tuple[str, ...], per_class: dict[str, float]
                     ) -> dict[str, Callable[[], Any]]:
    """What a run keeps of its evaluation: `confusion` counts (true class, answer)."""
    shares = {"class": list(per_class), "accuracy": [100 * share for share in per_class.values()]}
    return {"confusion_matrix.png": functools.partial(confusion_figure, confusion, class_names),
            "per_class.json": lambda: shares}


def log_served_model(path: Path, name: str) -> None:
    """The model for `mlflow models serve`: this script itself (models-from-code) and `path`, nothing pickled.

    The example tells MLflow which parameters a request may have. Needs an active run.
    """
    import mlflow
    import PIL
    picture = io.BytesIO()
    Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), LETTERBOX_GRAY).save(picture, "PNG")
    example = [base64.b64encode(picture.getvalue()).decode()], {"top_k": 3, "threshold": 0.0, "tta": True}
    versions = [f"torch=={torch.__version__.split('+')[0]}", f"numpy=={np.__version__}", f"pillow=={PIL.__version__}"]
    stored = mlflow.pyfunc.log_model(
        name=re.sub(r"[^\w-]", "-", name), python_model=__file__, artifacts={"model": str(path)}, input_example=example,
        pip_requirements=versions)
    note(f"serve it: MLFLOW_TRACKING_URI={shlex.quote(mlflow.get_tracking_uri())} mlflow models serve "
         f"--env-manager local --port 5001 -m {stored.model_uri}")


def start_system_metrics(run_id: str, uri: str) -> Any:
    """MLflow's own monitor of the machine, running; None without psutil."""
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
    except ImportError:
        return note("--system-metrics: nothing is measured, psutil is missing: pip install psutil")
    monitor = SystemMetricsMonitor(run_id, sampling_interval=2, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor


class Tracker:
    """Tracks nothing: what --no-mlflow and every process but the main one talk to."""
    run_id: str | None = None

    def log_settings(self, resolved: dict[str, Any], data: ImageData) -> None:
        """Once, before the work: what was asked for and what became of it."""

    def log_metrics(self, record: dict[str, Any], step: int = 0) -> None:
        """The numbers of an epoch, or with no step the final ones."""

    def log_outcome(self, text: str, files: dict[str, Callable[[], Any]], model: Path | None = None) -> None:
        """Once, after the work: the result in words, the model, and by its name what makes a figure, table or text."""

    def close(self, status: str) -> None:
        """FINISHED, FAILED or KILLED."""


class MlflowTracker(Tracker):
    """One MLflow run, written record by record, in their order, by a thread that the work waits for only so long.

    A record that fails waits, with all that follow it, for the next one. What the store has not taken when the run
    ends goes to a JSON Lines file beside the model.
    """

    def __init__(self, config: Config, uri: str, run_id: str | None, parent: Tracker | None) -> None:
        import mlflow
        self.config, self.uri, self.run_id, self.parent = config, uri, run_id, parent
        self.database = sqlite_path(uri)
        mlflow.set_tracking_uri(uri)
        self.connect = functools.cache(mlflow.MlflowClient)        # a bad store must fail in the thread, not here
        self.experiment_id, self.known = "", {}
        self.logged: set[int] = set()                              # steps that a resumed run has from before
        self.courier, self.delivering = threading.Thread(), threading.Lock()
        self.monitor: Any = None
        self.warned = False
        self.waiting: list[tuple[str, dict[str, Any]]] = [
            ("start", {"name": config.tracking.run_name or default_run_name(config), "began": int(1000 * time.time()),
                       "tag": os.urandom(8).hex()})]

    def send(self, *records: tuple[str, dict[str, Any]], closing: bool = False) -> None:
        """Hands records (a kind and its content) to the thread, after those that wait already."""
        patience = CLOSING_PATIENCE if closing else TRACKING_PATIENCE
        deadline = time.monotonic() + patience
        self.waiting += records
        if self.courier.is_alive():
            self.courier.join(patience)
        if not self.courier.is_alive():
            self.courier = threading.Thread(target=self.store_waiting, daemon=True)
            self.courier.start()
            self.courier.join(max(0.0, deadline - time.monotonic()))
        if self.courier.is_alive():
            self.warn(f"no answer for {patience} s")

    def warn(self, reason: str) -> None:
        if not self.warned:
            note(f"MLflow at {self.uri} does not take the run, which goes on and tries again each epoch: {reason}")
        self.warned = True

    def store_waiting(self) -> None:
        """Each record goes to the method that is named after its kind."""
        with self.delivering:           # a signal in `join` makes Python take the thread for ended, and a second starts
            try:
                if self.database:
                    check_database(self.database)
                while self.waiting:
                    kind, content = self.waiting[0]
                    getattr(self, f"store_{kind}")(**content)
                    self.waiting.pop(0)
            except Exception as error:  # any: tracking must never end a training
                self.warn(first_line(error))

    def store_start(self, name: str, began: int, tag: str) -> None:
        """Finds or makes the experiment, then goes on with the run of a resumed training or makes a new one."""
        from mlflow.exceptions import MlflowException
        config = self.config
        experiment = config.tracking.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or config.data.name
        with contextlib.ExitStack() as stack:
            location = None
            if self.database:           # two processes that create its tables at once break each other
                location = (self.database.parent / "mlartifacts").as_uri()
                lock = self.database.with_name(f".{self.database.name}.lock")
                stack.enter_context(hold_lock(lock, 5, f"{lock} is held by another process"))
            client = self.connect()
            found = client.get_experiment_by_name(experiment)
            if found and found.lifecycle_stage == "deleted":
                client.restore_experiment(found.experiment_id)
            self.experiment_id = found.experiment_id if found else client.create_experiment(experiment, location)
        try:
            run = client.get_run(self.run_id) if self.run_id else self.create_run(name, began, tag)
            client.update_run(run.info.run_id, status="RUNNING")
        except MlflowException as error:
            gone = error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE")
            if not gone or not self.run_id:
                raise
            note(f"MLflow run {self.run_id} is gone, a new one takes its place")
            run = self.create_run(name, began, tag)
        self.run_id, self.experiment_id, self.known = run.info.run_id, run.info.experiment_id, run.data.params
        if config.train.resume:
            self.logged = {each.step for each in client.get_metric_history(self.run_id, "train/loss")}
            self.logged |= {0} if METRIC_NAMES["train_seconds"] in run.data.metrics else set()
        client.set_experiment_tag(self.experiment_id, f"mlflow.sharedViewState.{config.run.mode}", shared_view(
            config.run.mode, "holdout" if config.data.holdout else "test"))
        if config.tracking.system_metrics:
            self.monitor = start_system_metrics(self.run_id, self.uri)

    def create_run(self, name: str, began: int, tag: str) -> Any:
        """A new run, or the one that an earlier try made whose answer was lost on its way (it has `tag`)."""
        from mlflow.tracking.context.registry import resolve_tags  # user, script, git commit
        client = self.connect()
        if found := client.search_runs([self.experiment_id], f"tags.`mlflow.classifier.start` = '{tag}'"):
            return found[0]
        count = int(client.get_experiment(self.experiment_id).tags.get("classifier.runs", 0))
        client.set_experiment_tag(self.experiment_id, "classifier.runs", count + 1)
        # MLflow's own colours collide with few runs; hues a golden ratio apart do not.
        red, green, blue = (int(255 * part) for part in colorsys.hsv_to_rgb(count * 0.618 % 1, 0.75, 0.8))
        tags = resolve_tags({"mlflow.runColor": f"#{red:02x}{green:02x}{blue:02x}", "mlflow.classifier.start": tag})
        if self.parent and self.parent.run_id:
            tags["mlflow.parentRunId"] = self.parent.run_id
        return client.create_run(self.experiment_id, start_time=began, tags=tags, run_name=name)

    def log_settings(self, resolved: dict[str, Any], data: ImageData) -> None:
        def as_text(value: Any) -> str:
            return "auto" if value is None else f"{value:.6g}" if isinstance(value, float) else str(loggable(value))
        asked = self.config.flat() | resolved
        params = {name: as_text(value) for name, value in asked.items() if name != "resume"}
        alike = json.dumps({name: value for name, value in params.items() if name not in ("seed", "run_name")})
        tags = {"task": self.config.run.mode, "torch": str(torch.__version__), "host": platform.node(),
                "group": hashlib.sha256(alike.encode()).hexdigest()[:8]}       # the UI averages a group: over seeds
        digests = {"train": data.train.digest, data.evaluation_name: data.evaluation.digest}
        self.send(("settings", {"params": params, "tags": tags}),
                  ("data", {"name": self.config.data.name, "source": data.source, "digests": digests}))

    def store_settings(self, params: dict[str, str], tags: dict[str, str]) -> None:
        """A resumed run's parameters stand; what differs now becomes a tag."""
        from mlflow.entities import Param, RunTag
        changed = {f"resumed_{name}": value for name, value in params.items() if self.known.get(name, value) != value}
        self.connect().log_batch(
            self.run_id, params=[Param(name, value) for name, value in params.items() if name not in self.known],
            tags=[RunTag(name, value) for name, value in (tags | changed).items()])

    def store_data(self, name: str, source: str, digests: dict[str, str]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        self.connect().log_inputs(self.run_id, [
            DatasetInput(Dataset(name, digest, "http", json.dumps({"url": source})),
                         [InputTag("mlflow.data.context", context)]) for context, digest in digests.items()])

    def log_metrics(self, record: dict[str, Any], step: int = 0) -> None:
        names = {name: name if "/" in name else METRIC_NAMES.get(name, name.replace("_", "/", 1)) for name in record}
        values = {names[name]: 100 * value if "accuracy" in name else value for name, value in record.items()
                  if name != "epoch" and isinstance(value, (int, float)) and math.isfinite(value)}
        best_first = sorted(values, key=lambda name: name.startswith("train/") or not name.endswith("/accuracy"))
        rounded = {name: float(f"{values[name]:.6g}") for name in best_first}  # the compare page draws the first
        self.send(("metrics", {"values": rounded, "step": step, "when": int(1000 * time.time())}))

    def store_metrics(self, values: dict[str, float], step: int, when: int) -> None:
        from mlflow.entities import Metric
        if step in self.logged:
            return
        self.connect().log_batch(self.run_id, metrics=[Metric(name, value, when, step)
                                                       for name, value in values.items()])

    def log_outcome(self, text: str, files: dict[str, Callable[[], Any]], model: Path | None = None) -> None:
        defaults = Config().flat()
        changed = [f"- `{name}` {loggable(value)}" for name, value in self.config.flat().items()
                   if value != defaults[name]]
        text = "\n".join([f"{text}\n\n```\n{command_line(self.config)}\n```\n", *changed])
        self.send(("note", {"text": text}), ("files", {"files": files, "model": model}))

    def store_note(self, text: str) -> None:
        self.connect().set_tag(self.run_id, "mlflow.note.content", text)

    def store_files(self, files: dict[str, Callable[[], Any]], model: Path | None) -> None:
        """Failures are told and passed over: files may lie elsewhere than the run, which they need not hold up."""
        import mlflow
        for name, build in files.items():
            kinds = {".png": "log_figure", ".json": "log_table", ".md": "log_text"}
            try:
                getattr(self.connect(), kinds[Path(name).suffix])(self.run_id, build(), name)
            except Exception as error:  # any: see above
                note(f"MLflow did not store {name}: {first_line(error)}")
        try:
            if model:
                with mlflow.start_run(self.run_id, log_system_metrics=False):
                    log_served_model(model, self.config.tracking.run_name or default_run_name(self.config))
        except Exception as error:      # any: see above
            note(f"MLflow did not store the model: {first_line(error)}")

    def close(self, status: str) -> None:
        try:
            self.send(("status", {"status": status, "when": int(1000 * time.time())}), closing=True)
        finally:                        # also where a signal ends the waiting
            if self.waiting:
                self.keep_waiting()
        if not self.waiting and not self.parent:                   # whose end tells it
            page = (f"#/experiments/{self.experiment_id}/runs?workflowType=machine_learning"      # not its empty page
                    f"&viewStateShareKey={self.config.run.mode}")
            server = re.match("https?://", self.uri)
            if not server:
                note(f"compare runs: mlflow ui --backend-store-uri {shlex.quote(self.uri)}")
            note(f"{'compare runs:' if server else 'and open'} {self.uri if server else 'http://127.0.0.1:5000'}/{page}")

    def store_status(self, status: str, when: int) -> None:
        if self.monitor:
            self.monitor.finish()
        self.connect().set_terminated(self.run_id, status, when)

    def keep_waiting(self) -> None:
        """What was not logged, a record a line, beside the model; of its files the names."""
        path = Path(f"{self.config.model_path}.unlogged.jsonl")
        lines = [json.dumps({"run_id": self.run_id, "log": kind} | content,
                            default=lambda each: str(each) if isinstance(each, Path) else "not kept")
                 for kind, content in list(self.waiting)]
        try:
            with open(path, "a") as file:
                file.writelines(f"{redact(line)}\n" for line in lines)
            note(f"MLflow did not take {len(lines)} records: they are in {path}")
        except OSError as error:
            note(f"MLflow did not take {len(lines)} records, nor could {path} be written: {error.strerror}")


@contextlib.contextmanager
def open_tracker(config: Config, runtime: Runtime, run_id: str | None = None, parent: Tracker | None = None
                 ) -> Iterator[Tracker]:
    """A tracker whose run ends as the work within ends: FINISHED, FAILED, or KILLED by a signal.

    `run_id` goes on with that run; `parent` is the tracker whose run this one folds under.
    """
    if not config.tracking.mlflow or not runtime.is_main or type(parent) is Tracker:
        yield Tracker()
        return
    # A user's own value wins. Without the first two, a dead server costs 245 s a call; stdout belongs to the results.
    for name, value in (("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"), ("MLFLOW_HTTP_REQUEST_TIMEOUT", "8"),
                        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"), ("MLFLOW_LOGGING_LEVEL", "CRITICAL"),
                        ("MLFLOW_DISABLE_TELEMETRY", "true"), ("GIT_PYTHON_REFRESH", "quiet"),
                        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")):
        os.environ.setdefault(name, value)
    uri = config.tracking.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):    # the printed `mlflow ui` command must work from any folder
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    try:
        tracker: Tracker = MlflowTracker(config, uri, run_id or (None if parent else os.environ.get("MLFLOW_RUN_ID")),
                                         parent)
    except Exception as error:          # any: also what its import makes of a missing home folder
        note(f"nothing is logged, MLflow cannot be imported ({first_line(error)}): pip install mlflow, or --no-mlflow")
        tracker = Tracker()
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except Stopped:
        status = "KILLED"
        raise
    finally:
        tracker.close(status)


# ------------------------------------------------------------------------------------------------------------
# Training: returns numbers, never prints, logs or saves.
# ------------------------------------------------------------------------------------------------------------
def orthogonalize(matrix: Tensor) -> Tensor:
    """The matrix (rows, columns) with its singular vectors kept and its singular values brought to 0.68 to 1.2, where
    they are not below a fiftieth of the matrix's norm.

    Three Newton-Schulz steps, as matrix products only, with the coefficients of Jordan 2024
    (kellerjordan.github.io/posts/muon), which give up exactness for a steep slope at zero. The steps are taken on the
    small square matrix of the rows' products and applied to the long rows once: half the time, as exact.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    gram, identity = wide @ wide.T, torch.eye(len(wide), device=wide.device)
    steps = identity
    for _ in range(3):
        step = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        steps, gram = step @ steps, step @ gram @ step
    wide = steps @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


class Muon(torch.optim.Optimizer):
    """Nesterov SGD that orthogonalizes the updates of the filters (Jordan 2024; torch.optim's takes matrices only).

    An orthogonal update turns every direction of a filter bank by the same angle, so its length, `lr`, says how far,
    whatever the gradient; the bank itself is kept at one norm, sqrt(filters), before each step.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in (each for each in group["params"] if each.grad is not None):
                velocity = self.state[weight].setdefault("velocity", torch.zeros_like(weight))
                velocity.mul_(group["momentum"]).add_(weight.grad)
                update = weight.grad.add(velocity, alpha=group["momentum"])
                if weight.ndim == 4:
                    weight.mul_(len(weight) ** 0.5 / weight.norm())
                    update = orthogonalize(update.flatten(1)).view_as(weight)
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def build_optimizer(model: nn.Module, settings: TrainSettings, batch: int) -> Muon:
    """The optimizer for updates of `batch` images, its peak rates derived from those at the reference batch.

    An epoch shall lead as far at every batch. Momentum remembers as many images: a power of the batch. Within that
    memory updates point the same way, so that they add up: the rate grows with the batch (arXiv:1706.02677). What is
    not orthogonalized moves by each gradient 1 / (1 - momentum) times, which 1 - momentum undoes.
    """
    ratio = batch / REFERENCE_BATCH
    momentum, head_momentum = settings.momentum ** ratio, settings.head_momentum ** ratio
    sgd = ratio * (1 - head_momentum) / (1 - settings.head_momentum)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Muon([{"params": [weight for weight in trained if weight.ndim == dimensions], "peak_lr": rate,
                  "momentum": memory, "weight_decay": decay * ratio / rate}
                 for dimensions, rate, memory, decay in (
                     (4, settings.lr * ratio, momentum, 0.0),
                     (2, settings.head_lr * sgd, head_momentum, settings.weight_decay),
                     (1, settings.bias_lr * sgd, head_momentum, settings.weight_decay))])


def image_size(share_done: float, settings: TrainSettings) -> int:
    """Side of the training images after a share of the updates: small up to 0.3, between up to 0.6, then whole."""
    return settings.start_size + (IMAGE_SIZE - settings.start_size) * min(int(share_done / 0.3), 2) // 2


def images_of_epoch(epoch: int, settings: TrainSettings, count: int) -> int:
    """How many of `count` images epoch number `epoch` (from 0) trains on: all at first, then straight down."""
    return math.ceil(count * (1 - (1 - settings.hard_share) * epoch / settings.epochs))


def accumulation_windows(batches: Iterable, count: int, steps: int) -> Iterator[tuple[Any, float, bool]]:
    """Each of `count` equal batches, its share of its update, and whether it closes it; a short last window too."""
    for position, batch in enumerate(batches):
        window = min(steps, count - position // steps * steps)
        yield batch, 1 / window, position % steps == window - 1


class Meter:
    """Loss and accuracy of an epoch of `count` batches, kept on the device so that no batch waits for its numbers.

    In tensors made beforehand: small ones that each batch leaves behind hold the heap's pieces apart, 0.9 GB of them
    after an epoch in float32.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.losses, self.correct = torch.zeros(2, count, device=device)
        self.batches = self.images = 0
        self.wait_seconds = 0.0

    def timed(self, loader: Iterable) -> Iterator[Any]:
        """The loader's batches; adds up how long they were waited for."""
        batches = iter(loader)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.wait_seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.losses[self.batches] = loss.detach() * len(labels)
        self.correct[self.batches] = (logits.argmax(1) == labels).sum()
        self.batches += 1
        self.images += len(labels)

    def first_bad(self) -> int | None:
        """Number (from 1) of the first batch whose loss is not finite."""
        bad = (~self.losses.isfinite()).nonzero()
        return int(bad[0]) + 1 if len(bad) else None

    def result(self, runtime: Runtime) -> dict[str, float]:
        """Means over the images of all processes."""
        sums = torch.stack([self.losses.sum(), self.correct.sum(), self.losses.new_tensor(self.images)])
        loss, correct, images = runtime.sum(sums).tolist()
        return {"train_loss": loss / images, "train_accuracy": correct / images, "images": images}


class TrainState:
    """What training changes: weights, optimizer, scaler, where in the schedule it stands (`total` updates), and the
    loss of each training image when it was last seen."""

    def __init__(self, model: nn.Module, replica: nn.Module, optimizer: Muon, total: int, images: int,
                 runtime: Runtime) -> None:
        self.model, self.replica, self.optimizer, self.total, self.runtime = model, replica, optimizer, total, runtime
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp_dtype is torch.float16)
        self.losses = torch.full((images,), math.inf, device=runtime.device)
        self.epoch = self.updates = self.skipped = 0
        self.lr = 0.0

    def share_done(self) -> float:
        """Share of the updates done; the rates fall straight with it."""
        return self.updates / self.total

    def update(self) -> None:
        """One step of the optimizer; where float16 overflowed it is skipped and the schedule stands still."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * (1 - self.share_done())
        self.lr = self.optimizer.param_groups[0]["lr"]
        scale = self.scaler.get_scale()
        with self.runtime.autocast():                              # for the optimizer's matrix products
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        skipped = self.scaler.get_scale() < scale
        self.skipped += skipped
        self.updates += not skipped

    def state_dict(self) -> dict[str, Any]:
        """All that going on bit for bit needs; random numbers depend on seed and epoch alone."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "losses": self.losses, "epoch": self.epoch,
                "updates": self.updates, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part in ("model", "optimizer", "scaler"):
            getattr(self, part).load_state_dict(state[part])
        self.losses.copy_(state["losses"])
        self.epoch, self.updates, self.skipped = state["epoch"], state["updates"], state["skipped"]

    def freeze(self, freeze_after: float) -> None:
        """No gradients for the lowest layers once their time is over, on which several processes must agree anew."""
        for layer, after in ((self.model.stem, freeze_after / 2), (self.model.blocks[0], freeze_after)):
            if self.share_done() >= after and any(each.requires_grad for each in layer.parameters()):
                layer.requires_grad_(False)
                if isinstance(self.replica, DistributedDataParallel):
                    self.replica = distribute(self.replica.module, self.runtime)

    def hardest(self, count: int) -> Tensor:
        """Indices of the `count` images with the greatest losses."""
        return self.losses.argsort(descending=True, stable=True)[:count].cpu()


def no_sync(replica: nn.Module, skip: bool) -> contextlib.AbstractContextManager:
    """While gradients only accumulate, several processes need not exchange them."""
    return replica.no_sync() if skip and isinstance(replica, DistributedDataParallel) else contextlib.nullcontext()


def train_epoch(state: TrainState, batches: Iterable, count: int, settings: TrainSettings, seed: int, mirrors: bool,
                runtime: Runtime) -> dict[str, float]:
    """One pass over `count` training batches; means over all processes."""
    state.freeze(settings.freeze_after)
    state.replica.train()
    meter = Meter(count, runtime.device)
    generator, host = (epoch_generator(seed, state.epoch, 1 + runtime.rank, each) for each in (runtime.device, "cpu"))
    seen = torch.zeros_like(state.losses)
    started = time.perf_counter()
    for batch, share, closes in accumulation_windows(meter.timed(batches), count, settings.accumulate_grad_steps):
        images, labels, indices = runtime.move(*batch)
        images = augment(images, indices, state.epoch, generator, mirrors, settings.shift, settings.cutout)
        pairs = settings.letterbox_share * len(images) / 2 + float(torch.rand((), generator=host))
        zoomed = 2 * min(int(pairs), len(images) // 2)                                       # on average that share
        images = zoom_out(images, zoomed, host) if zoomed else images
        images = shrink(images, image_size(state.share_done(), settings))
        with no_sync(state.replica, skip=not closes):
            with runtime.autocast():
                logits = state.replica(images)                                               # (N, classes)
                losses = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing, reduction="none")
            loss = losses.mean()
            state.scaler.scale(loss * share).backward()
        seen[indices[zoomed:]] = losses[zoomed:].detach().float()                            # bars make an image harder
        meter.add(loss, logits, labels)                                                      # on the device: no wait
        if closes:
            state.update()
    seen = runtime.sum(seen)                                       # each process saw others
    state.losses = torch.where(seen > 0, seen, state.losses)
    result = meter.result(runtime)
    seconds = time.perf_counter() - started
    if not math.isfinite(result["train_loss"]):
        raise UserError(f"the loss is no longer finite (epoch {state.epoch + 1}, batch {meter.first_bad()}, learning "
                        f"rate {state.lr:.3g}): try a lower --lr or --no-amp")
    images_per_second = result.pop("images") / seconds
    return result | {"lr": state.lr, "seconds": seconds, "images_per_second": images_per_second,
                     "data_wait_seconds": meter.wait_seconds}


class Evaluation(NamedTuple):
    """Accuracies and `ece` are fractions; `confusion` counts plain answers: (true class, answer)."""
    loss: float
    accuracy: float
    accuracy_tta: float | None
    ece: float
    temperature: float
    confusion: Tensor
    seconds: float

    def record(self, prefix: str) -> dict[str, float | None]:
        return {f"{prefix}_accuracy": self.accuracy, f"{prefix}_accuracy_tta": self.accuracy_tta,
                f"{prefix}_loss": self.loss, "ece": self.ece, "temperature": self.temperature}

    def per_class(self, class_names: tuple[str, ...]) -> dict[str, float]:
        """Accuracy of each class that has images here."""
        rows = zip(class_names, self.confusion.diag().tolist(), self.confusion.sum(1).tolist())
        return {name: correct / count for name, correct, count in rows if count}


def fit_temperature(logits: Tensor, labels: Tensor, runtime: Runtime) -> float:
    """What all processes' logits (N, classes) are to be divided by for the least loss (Guo 2017, arXiv:1706.04599)."""
    tried = torch.logspace(-1, 1, 201)                             # in steps of 2 %
    losses = torch.stack([F.cross_entropy(logits / each, labels, reduction="sum") for each in tried])
    return float(tried[runtime.sum(losses.to(runtime.device)).argmin()])


@torch.inference_mode()
def evaluate(net: nn.Module, split: Split, classes: int, runtime: Runtime, tta: bool, mirrors: bool,
             temperature: float | None = None) -> Evaluation:
    """`net` on each image of `split` once, however many processes share them.

    The loss is of the plain view without smoothing or temperature; the expected calibration error is of the
    answer that predict would give (with `tta` and `temperature`, None: fitted here), over 15 equal bins of confidence.
    """
    started = time.perf_counter()
    net.eval()
    sampler = BatchSampler(len(split), EVALUATION_BATCH, runtime, shuffle=False)
    # No workers: reading in order costs nothing. `net` is not DDP, whose buffers' exchange shares of unequal
    # length would wait for in vain.
    plain, answers, labels = [], [], []
    for images, batch_labels, _ in build_loader(split, sampler, loader_options(0, runtime)):
        with runtime.autocast():
            for logits, kept in zip(logits_with_tta(net, *runtime.move(images), tta, mirrors), (plain, answers)):
                kept.append(logits.cpu())
        labels.append(batch_labels)
    logits, truth = torch.cat(plain), torch.cat(labels)                                      # (N, classes), (N,)
    loss = F.cross_entropy(logits, truth, reduction="sum")
    confusion = torch.bincount(truth * classes + logits.argmax(1), minlength=classes * classes)
    temperature = temperature or fit_temperature(torch.cat(answers), truth, runtime)
    confidence, answer = (torch.cat(answers) / temperature).softmax(1).max(1)
    correct = (answer == truth).float()
    bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    gaps = torch.zeros(CALIBRATION_BINS).index_add_(0, bins, confidence - correct)
    sums = runtime.sum(torch.cat([loss[None], correct.sum()[None], gaps, confusion.float()]).to(runtime.device)).cpu()
    table = sums[2 + CALIBRATION_BINS:].view(classes, classes)
    count = float(table.sum())
    return Evaluation(loss=float(sums[0]) / count, accuracy=float(table.diag().sum()) / count,
                      accuracy_tta=float(sums[1]) / count if tta else None,
                      ece=float(sums[2:2 + CALIBRATION_BINS].abs().sum()) / count, temperature=temperature,
                      confusion=table, seconds=time.perf_counter() - started)


# ------------------------------------------------------------------------------------------------------------
# Prediction: pictures in, answers out, from a model that is loaded once. Knows neither training nor data sets.
# ------------------------------------------------------------------------------------------------------------
class Seen(NamedTuple):
    """What the network sees of a picture, uint8 (3, S, S) a framing, or the `error` that kept it from being read."""
    views: tuple[Tensor, ...]
    error: str | None = None
    animated: bool = False


@dataclass(frozen=True)
class Prediction:
    """The answer for one picture, or the `error` that kept it from being read; `milliseconds` is its share of its
    batch's time."""
    image: Any
    label: str | None = None
    confidence: float | None = None
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None
    milliseconds: float = 0.0
    seen: Seen | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Predictor:
    """A model ready to be called."""
    net: nn.Module
    saved: SavedModel
    runtime: Runtime

    @torch.inference_mode()
    def probabilities(self, images: Tensor, tta: bool, *views: Tensor) -> Tensor:
        """(N, classes) on the CPU, of uint8 images (N, 3, 32, 32) and of further views (V, N, 3, S, S) or none."""
        with self.runtime.autocast():
            images, *views = self.runtime.move(images, *views)
            _, logits = logits_with_tta(self.net, images, tta, self.saved.mirrors, *views)
        return (logits / self.saved.temperature).softmax(1).cpu()


_predictor_lock = threading.Lock()


@functools.lru_cache(maxsize=1)
def load_predictor(path: Path, _stamp: tuple[int, ...], device: str, amp: bool | None,
                   compile: bool | None) -> Predictor:
    """The global cache: one predictor, kept until its path, the file behind it (`_stamp`) or an option changes."""
    target = pick_device(device)
    runtime = Runtime(target, *pick_amp_dtype(target, amp))
    saved = load_model(path)
    example = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    net, _ = accelerate(saved.model, runtime, pick_compile(compile, target, one_off=False), example)
    return Predictor(net, saved, runtime)


def cached_model(path: str | Path, device: str = "auto", amp: bool | None = None,
                 compile: bool | None = None) -> Predictor:
    """The predictor of a model file; reads the weights only if this file was not the last one asked for."""
    path = Path(path).absolute()
    try:
        status = path.stat()
        stamp = status.st_mtime_ns, status.st_size, status.st_ino
    except OSError:
        stamp = ()                      # load_model has the words for it
    with _predictor_lock:               # threads that come at once wait for one load
        return load_predictor(path, stamp, device, amp, compile)


def look_at(source: Any, tta: bool, mirrors: bool) -> Seen:
    """One picture as the network sees it."""
    try:
        image = read_image(source)
    except UserError as error:
        return Seen((), str(error))
    views = tuple(to_pixels(view) for view in framings(image, tta, mirrors))
    return Seen(views, animated=image.info.get("animated", False))


def class_shares(predictor: Predictor, seen: list[Seen], tta: bool) -> Tensor:
    """Probabilities (N, classes) of pictures with several views and of those with one, as evaluate would give them."""
    shares = torch.zeros(len(seen), len(predictor.saved.class_names))
    for several in (False, True):
        chosen = [number for number, each in enumerate(seen) if not each.error and (len(each.views) > 1) is several]
        if chosen:
            images, *squares = map(torch.stack, zip(*(seen[number].views for number in chosen)))
            shares[chosen] = predictor.probabilities(images, tta, *([torch.stack(squares)] if several else []))
    return shares


def classify_each(predictor: Predictor, sources: Iterable[Any], top_k: int, threshold: float, tta: bool
                  ) -> Iterator[Prediction]:
    """One `Prediction` a source, in their order. While the network answers a batch, threads decode the next."""
    if top_k < 1:
        raise UserError(f"top_k must be at least 1: {top_k}")
    names = predictor.saved.class_names
    look = functools.partial(look_at, tta=tta, mirrors=predictor.saved.mirrors)
    remaining, started = iter(sources), time.perf_counter()
    chunk = list(itertools.islice(remaining, PREDICTION_BATCH))
    with ThreadPoolExecutor(usable_cpus()) as pool:
        looks = (pool.map if len(chunk) > 1 else map)(look, chunk)
        while chunk:
            seen, following = list(looks), list(itertools.islice(remaining, PREDICTION_BATCH))
            looks = pool.map(look, following)
            best = class_shares(predictor, seen, tta).topk(min(top_k, len(names)))
            milliseconds, started = 1000 * (time.perf_counter() - started) / len(chunk), time.perf_counter()
            for source, each, values, indices in zip(chunk, seen, best.values.tolist(), best.indices.tolist()):
                top = tuple((names[index], value) for index, value in zip(indices, values))
                label = top[0][0] if top[0][1] >= threshold else "unknown"
                yield (Prediction(source, error=each.error, seen=each) if each.error else
                       Prediction(source, label, top[0][1], top, milliseconds=milliseconds, seen=each))
            chunk = following


def classify(predictor: Predictor, sources: Iterable[Any], top_k: int, threshold: float, tta: bool
             ) -> list[Prediction]:
    return list(classify_each(predictor, sources, top_k, threshold, tta))


def predict(images: Any, *, model_path: str | Path = "cifar10_model.pth", top_k: int = 3, threshold: float = 0.0,
            tta: bool = True, device: str = "auto") -> list[Prediction]:
    """Classify pictures: paths, bytes or PIL images (one, or any iterable of them).

    The model is loaded, and on CUDA compiled, by the first call and kept until `model_path` or the file behind it
    changes; safe from several threads. A picture that cannot be read gets a `Prediction` whose `error` says why.
    `label` is "unknown" where the confidence is below `threshold`. Raises `UserError` for a bad model or device.
    """
    sources = [images] if isinstance(images, (str, bytes, Path, Image.Image)) else list(images)
    return classify(cached_model(model_path, device), sources, top_k, threshold, tta)


def served_model() -> Any:
    """What `mlflow models serve` calls: pictures of any size, as base64 and never as paths, which would let anybody
    read the server's files; a picture that cannot be read gets an `error`, the others are answered."""
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc import PythonModel

    class ServedModel(PythonModel):
        def predict(self, context: Any, model_input: list[str], params: dict[str, Any] | None = None) -> list:
            try:                        # what stands before a comma is a data URL's head
                pictures = [base64.b64decode(text.rpartition(",")[2], validate=True) for text in model_input]
                answers = classify(cached_model(context.artifacts["model"], compile=False), pictures,
                                   **{"top_k": 3, "threshold": 0.0, "tta": True} | (params or {}))
            except ValueError as error:
                raise MlflowException.invalid_parameter_value(f"inputs are not base64: {error}") from None
            except UserError as error:
                raise MlflowException.invalid_parameter_value(str(error)) from None
            return [{"label": answer.label, "confidence": answer.confidence, "top": dict(answer.top),
                     "error": answer.error} for answer in answers]
    return ServedModel()


# ------------------------------------------------------------------------------------------------------------
# Modes: one function each, the only ones that report. Results go to stdout, progress and messages to stderr.
# ------------------------------------------------------------------------------------------------------------
def emit(record: dict[str, Any], text: str, config: Config, runtime: Runtime) -> None:
    """A result: `text` on stdout, or with --json the record there (unless it is empty) and `text` on stderr."""
    if runtime.is_main and config.run.json and record:
        print(json.dumps(record, allow_nan=False), flush=True)
    if runtime.is_main and text:
        print(text, file=sys.stderr if config.run.json else sys.stdout, flush=True)


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f} %"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def epoch_row(record: dict[str, Any], name: str, left: float) -> str:
    """A line of the epoch table; its heading where `record` is empty."""
    columns = (("epoch", 5, "d", "epoch"), ("train loss", 10, ".4f", "train_loss"),
               ("train acc", 9, ".2%", "train_accuracy"), (f"{name} loss", 12, ".4f", f"{name}_loss"),
               (f"{name} acc", 11, ".2%", f"{name}_accuracy"), ("lr", 8, ".2g", "lr"), ("seconds", 7, ".1f", "seconds"),
               ("img/s", 7, ".0f", "images_per_second"), ("wait s", 6, ".2f", "data_wait_seconds"))
    cells = [f"{record[key]:{width}{spec}}" if key in record else f"{'' if record else title:>{width}}"
             for title, width, spec, key in columns]
    return "  ".join([*cells, duration(left) if record else "time left"])


def announce(resolved: dict[str, Any]) -> None:
    """What `auto` became, before the work starts."""
    note("{run_train_images} training images, effective batch {run_effective_batch}, {run_num_workers} workers, "
         "{run_device} with {run_threads} threads\n{run_amp_dtype} ({run_amp_reason}), compiled: {run_compile} "
         "({run_compile_reason})".format(**resolved))


class Resume:
    """The resume file of a model path: all of a run up to its last finished epoch."""
    VERSION = 2
    MAY_CHANGE = {"mode", "model_path", "json", "data_dir", "data_url", "num_workers", "resume", "compile", "image",
                  "top_k", "threshold", "save_inputs", "mlflow", "experiment", "run_name", "tracking_uri"}

    def __init__(self, config: Config, data: ImageData, runtime: Runtime) -> None:
        self.path = config.resume_path
        asked = config.flat() | {"processes": runtime.world_size}
        self.settings = {name: loggable(value) for name, value in asked.items() if name not in self.MAY_CHANGE}
        self.digest = data.train.digest

    def save(self, state: TrainState, history: list[dict[str, Any]], run_id: str | None, seconds: float) -> None:
        """A failure is told and no more: the file before stays whole, and the next epoch tries again."""
        try:
            save_atomically({"format_version": self.VERSION, "state": state.state_dict(), "history": history,
                             "run_id": run_id, "seconds": seconds, "settings": self.settings, "digest": self.digest},
                            self.path)
        except UserError as error:
            note(f"{error}; training goes on, the next epoch tries again")

    def load(self) -> dict[str, Any] | None:
        """The file's content, None where there is none; UserError where it belongs to another training."""
        if not self.path.exists():
            note(f"--resume: no {self.path}, training starts afresh")
            return None
        try:
            saved = load_checked(self.path, self.VERSION,
                                 ("state", "history", "run_id", "seconds", "settings", "digest"))
        except UserError as error:
            raise UserError(f"--resume: {error}; train without --resume to start anew") from None
        changed = [f"--{name.replace('_', '-')} was {saved['settings'].get(name)}, is {value}"
                   for name, value in self.settings.items() if saved["settings"].get(name) != value]
        if changed or saved["digest"] != self.digest:
            raise UserError(f"--resume: {self.path} is of another training "
                            f"({'; '.join(changed) or 'other training images'}); train without --resume to start anew")
        return saved

    def move_away(self) -> None:
        """A training that starts anew keeps what an interrupted one left, if that had finished an epoch."""
        if not self.path.exists():
            return
        with contextlib.suppress(UserError):                       # a damaged file is kept too
            if not load_checked(self.path, self.VERSION, ("history",))["history"]:
                return
        old = self.path.with_name(self.path.name + ".old")
        os.replace(self.path, old)
        note(f"an interrupted training was found and moved to {old}; --resume would have gone on from it")


@dataclass
class Training:
    """What `train_seed` needs of one training, built from the settings."""
    state: TrainState
    sampler: BatchSampler
    loader: DataLoader
    mirrors: bool
    resolved: dict[str, Any]
    compile_seconds: float


def start_from(model: CifarNet, path: Path, class_names: tuple[str, ...]) -> None:
    """Weights and pixel statistics of a model file; in the last layer those of the classes that both know."""
    try:
        saved = load_model(path)
    except UserError as error:
        raise UserError(f"--init-from: {error}") from None
    weights, head = saved.model.state_dict(), model.head.weight.detach().clone()
    for row, name in enumerate(class_names):
        if name in saved.class_names and head.shape[1] == saved.model.head.in_features:
            head[row] = weights["head.weight"][saved.class_names.index(name)]
    weights["head.weight"] = head
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"--init-from {path}: its network has --width {saved.settings.get('width')} --depth "
                        f"{saved.settings.get('depth')}: ask for the same") from None


def build_training(config: Config, data: ImageData, runtime: Runtime) -> Training:
    """Network, optimizer and loader of one seed, nothing trained yet."""
    settings, count = config.train, len(data.train)
    mirrors = data.mirrors if settings.flip is None else settings.flip
    torch.manual_seed(config.run.seed)
    model = build_model(config.model, len(data.class_names), pixel_statistics(data.train.images))
    sampler = BatchSampler(count, settings.batch_size, runtime, shuffle=True, seed=config.run.seed)
    if not sampler.batches(images_of_epoch(settings.epochs - 1, settings, count)):
        raise UserError(f"{count} training images are too few for {runtime.world_size} processes")
    if settings.init_from:
        start_from(model, Path(settings.init_from), data.class_names)
    options = loader_options(config.data.num_workers, runtime)
    loader = build_loader(data.train, sampler, options)
    example = shrink(data.train.images[:min(sampler.share(count), sampler.batch_size)], settings.start_size)
    net, report = accelerate(model.train(), runtime, pick_compile(config.run.compile, runtime.device, False), example)
    optimizer = build_optimizer(model, settings, effective_batch(settings, runtime))
    total = sum(math.ceil(sampler.batches(images_of_epoch(epoch, settings, count)) / settings.accumulate_grad_steps)
                for epoch in range(settings.epochs))
    state = TrainState(model, distribute(net, runtime), optimizer, total, count, runtime)
    resolved = resolved_settings(config, runtime, options, report, data, mirrors)
    return Training(state, sampler, loader, mirrors, resolved, report.seconds)


def evaluate_training(training: Training, config: Config, data: ImageData, runtime: Runtime) -> Evaluation:
    """Where training stands; with test-time augmentation after the last epoch only."""
    state = training.state
    last = state.epoch == config.train.epochs
    evaluation = evaluate(state.model, data.evaluation, len(data.class_names), runtime, last and config.prediction.tta,
                          training.mirrors, None if config.data.holdout else config.train.temperature)
    if not math.isfinite(evaluation.loss):
        raise UserError(f"the loss on the {data.evaluation_name} images is not finite after epoch {state.epoch}: try a "
                        f"lower --lr or --no-amp")
    return evaluation


def run_epoch(training: Training, config: Config, data: ImageData, runtime: Runtime
              ) -> tuple[dict[str, Any], Evaluation | None]:
    """Train one epoch and, where one is due, evaluate."""
    state, name, epochs = training.state, data.evaluation_name, config.train.epochs
    training.sampler.epoch = state.epoch
    training.sampler.chosen = state.hardest(images_of_epoch(state.epoch, config.train, len(data.train)))
    bar = progress(training.loader, f"epoch {state.epoch + 1}/{epochs}")
    record = {"epoch": state.epoch + 1} | train_epoch(state, bar, len(training.sampler), config.train, config.run.seed,
                                                      training.mirrors, runtime)
    share_buffers(state.model, runtime)
    state.epoch += 1
    every = config.train.eval_every
    if state.epoch < epochs and (not every or state.epoch % every):
        return record, None
    evaluation = evaluate_training(training, config, data, runtime)
    return record | {f"{name}_loss": evaluation.loss, f"{name}_accuracy": evaluation.accuracy}, evaluation


def headline(evaluation: Evaluation, name: str) -> str:
    tta = f" ({percent(evaluation.accuracy_tta)} with TTA)" if evaluation.accuracy_tta is not None else ""
    return f"{percent(evaluation.accuracy)} {name} accuracy{tta}"


def save_result(training: Training, data: ImageData, config: Config, temperature: float, result: dict[str, Any]
                ) -> Path:
    """Saves the model, in a new temporary folder if its own place takes nothing any more; says and returns where."""
    content = training.state.model, data, training.mirrors, config, temperature, result
    try:
        save_model(config.model_path, *content)
        return config.model_path
    except UserError as error:
        elsewhere = Path(tempfile.mkdtemp(prefix="classifier-"), config.model_path.name)
        save_model(elsewhere, *content)
        note(f"{error}: the model is in {elsewhere}")
        return elsewhere


def train_seed(config: Config, data: ImageData, runtime: Runtime, keep: bool, parent: Tracker | None = None
               ) -> dict[str, Any]:
    """Train with one seed, report every epoch, save the model (with `keep`); its result."""
    began, epochs, name = time.perf_counter(), config.train.epochs, data.evaluation_name
    keep = keep and runtime.is_main
    training, resume = build_training(config, data, runtime), Resume(config, data, runtime)
    state, history, run_id, evaluation = training.state, [], None, None
    if config.train.resume and (saved := runtime.from_main(resume.load() if runtime.is_main else None)):
        state.load_state_dict(saved["state"])
        history, run_id, began = saved["history"], saved["run_id"], began - saved["seconds"]
        note(f"going on after epoch {state.epoch} of {epochs}")
    elif keep:
        resume.move_away()
    with open_tracker(config, runtime, run_id, parent) as tracker:
        announce(training.resolved)
        tracker.log_settings(training.resolved, data)
        for step, record in enumerate(history, 1):                 # what the tracker lacks: the kill came in between
            tracker.log_metrics(record, step)
        if keep:
            resume.save(state, history, tracker.run_id, time.perf_counter() - began)
        emit({}, epoch_row({}, name, 0), config, runtime)
        while state.epoch < epochs:
            record, evaluation = run_epoch(training, config, data, runtime)
            history.append(record)
            left = (epochs - state.epoch) * statistics.mean(each["seconds"] for each in history)
            emit({"event": "epoch"} | record, epoch_row(record, name, left), config, runtime)
            tracker.log_metrics(record | {"peak_memory_so_far_mb": runtime.peak_memory_mb()}, state.epoch)
            if keep:
                resume.save(state, history, tracker.run_id, time.perf_counter() - began)
        evaluation = evaluation or evaluate_training(training, config, data, runtime)      # stopped just before
        result = evaluation.record(name) | {
            "train_seconds": sum(each["seconds"] for each in history), "evaluation_seconds": evaluation.seconds,
            "total_seconds": time.perf_counter() - began, "compile_seconds": training.compile_seconds,
            "train_images_per_second": statistics.median(each["images_per_second"] for each in history),
            "data_wait": sum(each["data_wait_seconds"] for each in history), "skipped_updates": state.skipped,
            "peak_memory_mb": runtime.peak_memory_mb()}
        text = f"{headline(evaluation, name)} after {epochs} epochs in {duration(result['train_seconds'])}"
        path = save_result(training, data, config, evaluation.temperature, result) if keep else None
        tracker.log_metrics({key: value for key, value in result.items() if key not in history[-1]})
        files = evaluation_files(evaluation.confusion, data.class_names, evaluation.per_class(data.class_names))
        tracker.log_outcome(f"**{text}**", files, path)
        result |= {"seed": config.run.seed, "model_path": path and str(path), "run_id": tracker.run_id}
        emit({"event": "result"} | result, f"{text}; model: {result['model_path']}", config, runtime)
    if path == config.model_path:       # last, so that also what the tracker lacks can be resumed
        resume.path.unlink(missing_ok=True)
    return result


def summarise(results: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Mean, standard deviation, least and greatest of what varies with the seed."""
    summary = {}
    for key in (f"{name}_accuracy", f"{name}_accuracy_tta", "train_seconds"):
        values = [result[key] for result in results if result[key] is not None]
        for statistic, of in (("mean", statistics.mean), ("std", statistics.stdev), ("min", min), ("max", max)):
            summary |= {f"{key}_{statistic}": of(values)} if values else {}
    return summary


def run_train(config: Config, runtime: Runtime) -> int:
    """Train one seed or, with --repeats, several under one MLflow parent run."""
    note(command_line(config))
    seeds = range(config.run.seed, config.run.seed + config.train.repeats)
    with reserve_model_path(config.model_path) if runtime.is_main else contextlib.nullcontext():
        data = load_everywhere(config.data, runtime)
        if len(seeds) == 1:
            result = train_seed(config, data, runtime, keep=True)
            return 0 if result["model_path"] in (str(config.model_path), None) else 1
        with open_tracker(config, runtime) as parent:
            parent.log_settings({}, data)
            results = [train_seed(replace(config, run=replace(config.run, seed=seed), train=replace(
                config.train, repeats=1)), data, runtime, seed == seeds[0], parent) for seed in seeds]
            summary, name = summarise(results, data.evaluation_name), data.evaluation_name
            mean, deviation, low, high = (percent(summary[f"{name}_accuracy_{each}"])
                                          for each in ("mean", "std", "min", "max"))
            text = f"{len(seeds)} seeds: {mean} +- {deviation} {name} accuracy ({low} to {high})"
            parent.log_metrics(summary)
            parent.log_outcome(f"**{text}**", {})
    emit({"event": "summary", "repeats": len(seeds)} | summary, text, config, runtime)
    return 0


def as_trained(config: Config, saved: SavedModel) -> Config:
    """`config` with the model's own data, network and training, so that evaluate repeats train's figures."""
    asked = config.data.dataset
    if asked in DATASETS and asked not in (saved.dataset, DataSettings().dataset):
        raise UserError(f"--dataset {asked}: {config.model_path} was trained on {saved.dataset}")
    then = saved.settings
    if config.data.holdout and config.data.holdout != then.get("holdout"):
        raise UserError(f"--holdout {config.data.holdout}: {config.model_path} was trained on some of these images, "
                        f"with --holdout {then.get('holdout')}")
    model, train = (part(**{f.name: then[f.name] for f in fields(part) if f.name in then})
                    for part in (ModelSettings, TrainSettings))
    return replace(config, model=model, train=train,
                   run=replace(config.run, amp=then.get("amp") if config.run.amp is None else config.run.amp),
                   data=replace(config.data, dataset=saved.dataset if asked in DATASETS else asked,
                                limit_images=config.data.limit_images or then.get("limit_images", 0)))


def run_evaluate(config: Config, runtime: Runtime) -> int:
    """Accuracy, loss, calibration and classes of a saved model on the test images (with --holdout on those)."""
    note(command_line(config))
    saved = load_model(config.model_path)
    config = as_trained(config, saved)
    dtype, reason = pick_amp_dtype(runtime.device, config.run.amp)
    runtime = replace(runtime, amp_dtype=dtype, amp_reason=reason)
    data = load_everywhere(config.data, runtime)
    if data.class_names != saved.class_names:
        raise UserError(f"{config.model_path} knows other classes than {data.name}: {', '.join(saved.class_names)}")
    compile = pick_compile(config.run.compile, runtime.device, one_off=True)
    net, report = accelerate(saved.model, runtime, compile, data.evaluation.images[:EVALUATION_BATCH])
    resolved = resolved_settings(config, runtime, loader_options(0, runtime), report, data, saved.mirrors)
    with open_tracker(config, runtime) as tracker:
        tracker.log_settings(resolved, data)
        evaluation = evaluate(net, data.evaluation, len(data.class_names), runtime, config.prediction.tta,
                              saved.mirrors, saved.temperature)
        result, per_class = evaluation.record(data.evaluation_name), evaluation.per_class(data.class_names)
        text = headline(evaluation, data.evaluation_name)
        tracker.log_metrics(result | {"evaluation_seconds": evaluation.seconds})
        tracker.log_outcome(f"**{text}**", evaluation_files(evaluation.confusion, data.class_names, per_class))
    lines = [f"{text}, loss {evaluation.loss:.4f}, calibration error {percent(evaluation.ece)}, "
             f"{len(data.evaluation)} images in {evaluation.seconds:.1f} s",
             *(f"  {label:<12} {percent(share):>8}" for label, share in per_class.items())]
    emit({"event": "result"} | result | {"per_class": per_class, "seconds": evaluation.seconds}, "\n".join(lines),
         config, runtime)
    return 0


def find_images(patterns: Iterable[str]) -> Iterator[str]:
    """Paths of pictures: files as named, those below folders, those that match globs, `-` for stdin's lines."""
    for pattern in patterns:
        if pattern == "-":
            yield from find_images(line for line in (each.rstrip("\r\n") for each in sys.stdin)
                                   if line not in ("", "-"))
        elif os.path.isdir(pattern):
            yield from pictures_below(pattern) or [os.path.join(pattern, "*")]           # read_image: no such picture
        elif os.path.exists(pattern):
            yield pattern                                          # also names with [brackets]
        else:
            yield from sorted(glob.glob(pattern, recursive=True), key=natural) or [pattern]


def prediction_row(answer: Prediction) -> str:
    """The answer as a line: label, confidence, a bar, the next classes."""
    full, empty = "█░" if "utf" in (sys.stdout.encoding or "").lower() else "#."
    tenths = round(10 * answer.confidence)
    others = ", ".join(f"{name} {percent(value)}" for name, value in answer.top if name != answer.label)
    return (f"{answer.image}: {answer.label}  {percent(answer.confidence)}  {full * tenths}{empty * (10 - tenths)}"
            f"{others and f'  ({others})'}")


def save_seen(answer: Prediction, number: int, folder: Path) -> None:
    """Writes what the network saw of a picture, a PNG a view."""
    stem = Path(answer.image).stem[:50]                            # file names end at 255 bytes, a letter has up to 4
    for view, name in zip(answer.seen.views, ("letterbox", "square", "centre")):
        Image.fromarray(view.permute(1, 2, 0).numpy()).save(folder / f"{number:05d}-{stem}-{name}.png")


def run_predict(config: Config, runtime: Runtime) -> int:
    """Classify the pictures that --image names; 1 if any of them could not be read."""
    settings, count, failures = config.prediction, 0, 0
    folder = Path(settings.save_inputs) if settings.save_inputs else None
    if folder:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            used = any(folder.iterdir())
        except OSError as error:
            raise UserError(f"--save-inputs {folder}: {error.strerror}") from None
        if used:
            raise UserError(f"--save-inputs {folder}: is not empty")
    predictor = cached_model(config.model_path, str(runtime.device), config.run.amp, bool(config.run.compile))
    images: Any = find_images(settings.image)
    images = images if "-" in settings.image else list(images)
    started = time.perf_counter()
    answers = classify_each(predictor, images, settings.top_k, settings.threshold, settings.tta)
    if sys.stderr.isatty() and not sys.stdout.isatty():            # on one terminal the answers show how far it is
        answers = progress(answers, "pictures", len(images) if isinstance(images, list) else None)
    for count, answer in enumerate(answers, 1):
        failures += bool(answer.error)
        if answer.error:
            note(f"{answer.image}: {answer.error}")
            emit({"image": answer.image, "error": answer.error}, "", config, runtime)
            continue
        if answer.seen.animated:
            note(f"{answer.image}: animated, its first picture is answered")
        emit({"image": answer.image, "label": answer.label, "confidence": answer.confidence, "top": answer.top,
              "milliseconds": answer.milliseconds}, prediction_row(answer), config, runtime)
        if folder:
            save_seen(answer, count, folder)
    if count > 1:
        seconds = time.perf_counter() - started
        note(f"{count} pictures in {seconds:.1f} s, {count / seconds:.0f} a second"
             + (f"; {failures} could not be read" if failures else ""))
    return 1 if failures else 0


# What the benchmark switches on, alone and together, and what it measures, with the names that tables and MLflow use.
OPTIMIZATIONS = ("data_loading", "channels_last", "mixed_precision", "compile")
MEASURES = {"training": ("Training", "speed/train_img_s"), "loading": ("Data loading", "speed/load_img_s"),
            "photo": ("One 500x375 JPEG", "infer/photo_ms"),
            "photo_12mp": ("One 12-megapixel JPEG", "infer/12mp_ms"),
            "batch_64": ("64 images", "infer/b64_img_s"),
            "batch_512": ("512 images", "infer/b512_img_s")}


class UsualImages(Dataset):
    """What the benchmark compares with: one PIL image at a time through torchvision's transforms."""

    def __init__(self, split: Split, shift: int) -> None:
        from torchvision import transforms
        self.images, self.labels = split.images.permute(0, 2, 3, 1).contiguous().numpy(), split.labels.tolist()
        self.transform = transforms.Compose([
            transforms.RandomCrop(IMAGE_SIZE, padding=shift, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index], int(index)


class Case(NamedTuple):
    """A configuration to measure: its name, its optimizations, and the runtime that has their precision."""
    name: str
    chosen: tuple[str, ...]
    runtime: Runtime

    def net(self, model: nn.Module, example: Tensor) -> tuple[nn.Module, CompileReport]:
        layout = torch.channels_last if "channels_last" in self.chosen else torch.contiguous_format
        return accelerate(model, self.runtime, ("compile" in self.chosen, "benchmark"), example, layout)


def benchmark_cases(run: RunSettings, runtime: Runtime) -> list[Case]:
    """Baseline (twice: their difference is the noise), each optimization alone, all that `auto` turns on, and all.

    Mixed precision is left out where it would be emulated, or with --no-amp; compiling with --no-compile.
    """
    left_out = {"mixed_precision": runtime.amp_dtype is None, "compile": run.compile is False}
    possible = tuple(name for name in OPTIMIZATIONS if not left_out.get(name))
    auto = tuple(name for name in possible if name != "compile" or pick_compile(None, runtime.device, False)[0])
    cases = {"baseline": (), "baseline_again": (), **{name: (name,) for name in possible}, "combined": auto}
    if possible != auto:
        cases["everything"] = possible
    plain = replace(runtime, amp_dtype=None)
    return [Case(name, chosen, runtime if "mixed_precision" in chosen else plain) for name, chosen in cases.items()]


def measure(cases: dict[str, Callable[[], Any]], rounds: int, synchronize: Callable[[], None],
            clock: Callable[[], float] = time.perf_counter, limit: float = 60.0) -> dict[str, list[float]]:
    """Seconds of each case in each round; the first round, which warms up, is on top of `rounds`.

    The cases take turns, so that a machine that slows down slows all of them, and each round starts with another
    one: who comes after the slowest finds cold caches. Past `limit` seconds and three rounds the rest is left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    began = clock()
    for number in range(rounds + 1):
        if number > 3 and clock() - began > limit:
            break
        start = number % len(cases)
        for name, case in [*cases.items()][start:] + [*cases.items()][:start]:
            synchronize()
            started = clock()
            case()
            synchronize()
            seconds[name].append(clock() - started)
    return seconds


def benchmark_rows(area: str, measured: str, seconds: dict[str, list[float]], images: int) -> list[dict[str, Any]]:
    """A row a case: images a second (milliseconds for one image), and speed over the baseline, round by round."""
    rows = []
    for name, (first, *times) in seconds.items():
        first, *figures = (1000 * each if images == 1 else images / each for each in (first, *times))
        p10, p90, p95 = np.percentile(figures, (10, 90, 95)).tolist()
        ratio = statistics.median(base / each for base, each in zip(seconds["baseline"][1:], times))
        rows.append({"event": "benchmark", "area": area, "measure": measured, "name": name,
                     "value": statistics.median(figures), "unit": "ms" if images == 1 else "images/s", "p10": p10,
                     "p90": p90, "p95": p95, "first": first, "rounds": len(times), "ratio": ratio,
                     "peak_memory_mb": None})
    return rows


def benchmark_loading(config: Config, data: ImageData, runtime: Runtime) -> list[dict[str, Any]]:
    """Loading, shifting, mirroring and normalising, without a network: the usual pipeline against ours."""
    split = data.train.take(torch.arange(12_800) % len(data.train))
    sampler, options = BatchSampler(len(split), 128, runtime, True), loader_options(config.data.num_workers, runtime)
    usual = DataLoader(UsualImages(split, config.train.shift), batch_sampler=sampler, **options)
    ours, generator = build_loader(split, sampler, options), epoch_generator(0, 0, device=runtime.device)
    mean, std = runtime.move(*(each.view(3, 1, 1) for each in pixel_statistics(split.images)[:2]))

    def load_usual() -> None:
        for batch in usual:
            runtime.move(*batch)

    def load_ours() -> None:
        for batch in ours:
            pixels, _, indices = runtime.move(*batch)
            normalise(augment(pixels, indices, 0, generator, True, config.train.shift), mean, std)
    cases = {"baseline": load_usual, "baseline_again": load_usual, "data_loading": load_ours}
    return benchmark_rows("loading", "loading", measure(cases, 9, runtime.synchronize), len(split))


def training_case(case: Case, config: Config, data: ImageData) -> tuple[Callable[[], Any], CompileReport]:
    """What trains an epoch, and what became of compiling."""
    torch.manual_seed(config.run.seed)
    split, settings = data.train, replace(config.train, accumulate_grad_steps=1)
    ours, found, example = "data_loading" in case.chosen, pixel_statistics(split.images), split.images
    if not ours:        # the usual loader normalises: this mean and deviation make the network's own do nothing
        found, example = found._replace(mean=torch.zeros(3), std=torch.full((3,), 1 / 255)), example.float()
    model = build_model(config.model, len(data.class_names), found).train()
    net, report = case.net(model, example[:settings.batch_size])
    sampler = BatchSampler(len(split), settings.batch_size, case.runtime, shuffle=True)
    options = loader_options(config.data.num_workers, case.runtime)
    loader = (build_loader(split, sampler, options) if ours else
              DataLoader(UsualImages(split, settings.shift), batch_sampler=sampler, **options))
    state = TrainState(model, net, build_optimizer(model, settings, settings.batch_size), 10 ** 6,
                       len(split), case.runtime)
    # The usual pipeline has shifted before.
    same_work = replace(settings, shift=settings.shift * ours, cutout=0, letterbox_share=0.0, start_size=IMAGE_SIZE)
    return functools.partial(train_epoch, state, loader, len(sampler), same_work, config.run.seed,
                             ours and data.mirrors, case.runtime), report


def train_and_weigh(case: Case, config: Config, data: ImageData, threads: int, result: Any) -> None:
    """Sends to the connection `result` the MB that training takes at most; meant for a process of its own."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True                          # as `open_runtime` has it; ignored on a CPU
    train, _ = training_case(case, config, data)
    train()
    result.send(case.runtime.peak_memory_mb())


def peak_memory(case: Case, config: Config, data: ImageData) -> float | None:
    """`train_and_weigh` in a new process; None where that fails or dies, which the other figures do not need."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=train_and_weigh, args=(case, config, data, torch.get_num_threads(), sender))
    answers_signals = signal.signal(signal.SIGINT, signal.SIG_IGN)             # inherited: Ctrl-C is for this process
    try:
        child.start()
        signal.signal(signal.SIGINT, answers_signals)
        sender.close()
        memory = receiver.recv()
        child.join()
        return memory
    except EOFError:
        return note(f"memory of {case.name} not measured: its process died")
    finally:
        signal.signal(signal.SIGINT, answers_signals)
        child.kill()


def benchmark_training(config: Config, data: ImageData, runtime: Runtime) -> list[dict[str, Any]]:
    """Short epochs through `train_epoch`, and the peak memory of a process that trains one of them."""
    batches = 100 if runtime.device.type == "cuda" else 12
    data = replace(data, train=data.train.take(torch.arange(batches * config.train.batch_size) % len(data.train)))
    epochs, more = {}, {}
    for case in benchmark_cases(config.run, runtime):
        memory = peak_memory(case, config, data)
        train, report = training_case(case, config, data)
        if report.active or "compile" not in case.chosen:          # else it would be the baseline again
            epochs[case.name] = train
            more[case.name] = {"peak_memory_mb": memory, "compile_seconds": report.seconds}
    rows = benchmark_rows("training", "training", measure(epochs, 7, runtime.synchronize, limit=200), len(data.train))
    return [row | more[row["name"]] for row in rows]


def save_photo(path: Path, width: int, height: int) -> None:
    """A JPEG with as much detail at each scale as photos have: octaves of noise, finer ones fainter."""
    generator, picture = epoch_generator(0, 0), torch.zeros(1, 3, height, width)
    for octave in range(2, 10):
        noise = torch.randn(1, 3, 3 * 2**octave // 4, 2**octave, generator=generator)
        picture += F.interpolate(noise, (height, width), mode="bilinear") / 2**octave
    pixels = (128 + 60 * picture / picture.std()).clamp(0, 255).byte()[0].permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(path, quality=90)


def benchmark_inference(config: Config, data: ImageData, runtime: Runtime) -> list[dict[str, Any]]:
    """Pictures from file to answer, without TTA but where told, and batches of 64 and 512 through the network."""
    model = build_model(config.model, len(data.class_names), pixel_statistics(data.train.images)).eval()
    with tempfile.TemporaryDirectory() as folder:
        file, photo, large = (Path(folder, name) for name in ("model.pth", "photo.jpg", "large.jpg"))
        save_photo(photo, 500, 375)
        save_photo(large, 4000, 3000)
        save_model(file, model, data, data.mirrors, config, 1.0, {})
        saved, nets = load_model(file), {}
        for case in benchmark_cases(config.run, runtime):
            if case.name != "data_loading":
                net, report = case.net(copy.deepcopy(model), data.train.images[:1])
                if report.active or "compile" not in case.chosen:              # else it would be the baseline again
                    nets[case.name] = Predictor(net, saved, case.runtime)

        def load_and_classify() -> None:
            load_predictor.cache_clear()
            classify(cached_model(file, str(runtime.device), config.run.amp, False), [photo], 3, 0.0, False)

        def decode_in_full() -> None:
            with Image.open(large) as image:
                nets["baseline"].probabilities(to_pixels(letterbox(image.convert("RGB")))[None], False)
        single = {name: functools.partial(classify, net, [photo], 3, 0.0, False) for name, net in nets.items()}
        single |= {"combined_tta": functools.partial(classify, nets["combined"], [photo], 3, 0.0, True),
                   "load_each_time": load_and_classify}
        rows = benchmark_rows("inference", "photo", measure(single, 100, runtime.synchronize), 1)
        twelve = {"baseline": decode_in_full, "combined": functools.partial(classify, nets["combined"], [large], 3, 0.0,
                                                                            False)}
        rows += benchmark_rows("inference", "photo_12mp", measure(twelve, 20, runtime.synchronize), 1)
    for count in (64, 512):
        images = data.train.images[torch.arange(count) % len(data.train)]
        batches = {name: functools.partial(net.probabilities, images, False) for name, net in nets.items()}
        rows += benchmark_rows("inference", f"batch_{count}", measure(batches, 9, runtime.synchronize), count)
    return rows


def self_checks(config: Config, data: ImageData, runtime: Runtime) -> list[dict[str, Any]]:
    """Whether the optimizations leave the results as they are: the largest difference of each to the plain way."""
    sample = data.train.take(torch.arange(64) % len(data.train))
    images, labels = runtime.move(sample.images, sample.labels)
    torch.manual_seed(config.run.seed)
    model = build_model(config.model, len(data.class_names), pixel_statistics(data.train.images)).to(runtime.device)
    with torch.no_grad():
        for _ in range(10):            # BatchNorm's own statistics first: without, each block doubles what it gets
            model.train()(images)
    model.eval()
    plain = replace(runtime, amp_dtype=None)
    net, _ = accelerate(model, plain, (False, ""), images)

    def gradient(micro_batch: int) -> Tensor:
        batches = zip(images.split(micro_batch), labels.split(micro_batch))
        model.zero_grad()
        for (inputs, truth), share, _ in accumulation_windows(batches, 64 // micro_batch, 64 // micro_batch):
            (F.cross_entropy(net(inputs), truth) * share).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    whole, parts = gradient(64), gradient(16)
    with torch.inference_mode(), io.BytesIO() as file:
        logits = net(images)
        expected = logits.softmax(1)
        compiled, report = accelerate(copy.deepcopy(model), plain, (True, "check"), images)
        with replace(plain, amp_dtype=pick_amp_dtype(runtime.device, True)[0]).autocast():
            mixed = net(images).float().softmax(1)
        Image.fromarray(sample.images[0].permute(1, 2, 0).numpy()).save(file, "PNG")
        predictor = Predictor(net, SavedModel(model, data.class_names, data.name, data.mirrors, 1.0, {}), plain)
        answer = classify(predictor, [file.getvalue()], 1, 0.0, tta=False)[0]
        found = {"accumulation": ((whole - parts).abs().max() / whole.abs().max(), 1e-4),
                 "mixed_precision": ((mixed - expected).abs().max(), 2e-2),
                 "predict": (abs(answer.confidence - expected[0].max()), 1e-4)}
        if report.active:
            found["compiled"] = (compiled(images) - logits).abs().max() / logits.abs().max(), 1e-4
    return [{"event": "check", "name": name, "passed": bool(difference <= tolerance), "difference": float(difference)}
            for name, (difference, tolerance) in found.items()]


def benchmark_text(row: dict[str, Any]) -> str:
    """A row for people, as it comes."""
    if row["event"] == "check":
        verdict = "pass" if row["passed"] else "FAIL"
        return f"check       {row['name']:<16} {verdict} (largest difference {row['difference']:.2g})"
    text = (f"{row['measure']:<11} {row['name']:<16} {row['value']:>9.1f} {row['unit']:<9} x{row['ratio']:<5.2f} "
            f"({', '.join(f'{key} {row[key]:.1f}' for key in ('p10', 'p90', 'p95', 'first'))})")
    text += f"  {row['peak_memory_mb']:.0f} MB" if row["peak_memory_mb"] else ""
    return text + (f"  compiled in {row['compile_seconds']:.0f} s" if row.get("compile_seconds") else "")


def benchmark_table(rows: list[dict[str, Any]], checks: list[dict[str, Any]], config: Config, device: torch.device
                    ) -> str:
    """Markdown, ready to paste: a line a configuration, a column a measure, then where and how it was measured."""
    found = {(row["measure"], row["name"]): row for row in rows}
    measured = [name for name in MEASURES if (name, "baseline") in found]
    base = found["training", "baseline"]["peak_memory_mb"]

    def cell(row: dict[str, Any] | None) -> str:
        figure = "" if not row else f"{row['value']:.1f} ms" if row["unit"] == "ms" else f"{row['value']:,.0f}/s"
        return f"{row['ratio']:.2f}x ({figure})" if row else ""
    lines = [["Configuration", *(MEASURES[name][0] for name in measured), "Peak memory"], ["---"] * (len(measured) + 2)]
    for name in dict.fromkeys(row["name"] for row in rows):
        memory = found.get(("training", name), {}).get("peak_memory_mb")
        lines.append([name.replace("_", " "), *(cell(found.get((each, name))) for each in measured),
                      f"{memory / base:.2f}x ({memory:,.0f} MB)" if memory and base else ""])
    noise = max(abs(row["ratio"] - 1) for row in rows if row["name"] == "baseline_again")
    failed = [check["name"] for check in checks if not check["passed"]]
    return "\n".join([
        *(f"| {' | '.join(line)} |" for line in lines), "",
        f"{datetime.date.today()}, `{command_line(config)}`: {device_name(device)}, {torch.get_num_threads()} threads, "
        f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}. Speeds are medians of "
        f"interleaved rounds, ratios are to the baseline of the same round, higher is faster; the baseline against "
        f"itself differs by up to {percent(noise)}. Self-checks: "
        f"{'FAILED: ' + ', '.join(failed) if failed else 'all passed'}."])


def benchmark_figure(rows: list[dict[str, Any]]) -> Any:
    """A matplotlib figure: bars of the speed over the baseline, a panel a measure."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(14, 7), layout="constrained")
    figure.suptitle("Speed over the baseline, which is 1")
    for axes, (name, (title, _)) in zip(figure.subplots(2, 3).flat, MEASURES.items()):
        panel = [row for row in rows if row["measure"] == name]
        bars = axes.barh([row["name"].replace("_", " ") for row in panel], [row["ratio"] for row in panel])
        axes.bar_label(bars, [f"{row['ratio']:.2f}x" for row in panel], padding=3)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=title, xlim=(0, 1.2 * max(row["ratio"] for row in panel)))
        axes.invert_yaxis()
    return figure


def log_case(case: Case, rows: list[dict[str, Any]], config: Config, data: ImageData, parent: Tracker) -> None:
    """A configuration as an MLflow run, with the parameters and metrics of an ordinary training."""
    compiled, name = "compile" in case.chosen, case.name.replace("_", " ")
    child = replace(config, tracking=replace(config.tracking, run_name=name), run=replace(
        config.run, amp="mixed_precision" in case.chosen, compile=compiled))
    metrics: dict[str, Any] = {}
    for row in rows:
        metrics |= {MEASURES[row["measure"]][1]: row["value"], f"ratio/{row['measure']}": row["ratio"]}
        metrics |= {key: row[key] for key in ("peak_memory_mb", "compile_seconds") if row.get(key)}
    with open_tracker(child, case.runtime, parent=parent) as tracker:
        report = CompileReport(compiled, "benchmark")
        options = loader_options(config.data.num_workers, case.runtime)
        tracker.log_settings(resolved_settings(child, case.runtime, options, report, data, data.mirrors) | {
            "run_memory_format": "channels_last" if "channels_last" in case.chosen else "contiguous",
            "run_data_loading": "batches" if "data_loading" in case.chosen else "images"}, data)
        tracker.log_metrics(metrics)


def run_benchmark(config: Config, runtime: Runtime) -> int:
    """What each optimization gains on this machine, and whether it leaves the results alone."""
    note(command_line(config))
    data, cases = load_data(config.data), benchmark_cases(config.run, runtime)
    if runtime.amp_dtype is None:
        note(f"mixed precision is left out: {runtime.amp_reason}")

    def told(part: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
        note(f"measuring: {part.__name__.removeprefix('benchmark_').replace('_', ' ')}")
        torch.compiler.reset()          # past eight variants of one function torch.compile gives up on more
        rows = part(config, data, runtime)
        for row in rows:
            emit(row, benchmark_text(row), config, runtime)
        return rows
    with open_tracker(config, runtime) as parent:
        parent.log_settings({}, data)
        checks = told(self_checks)
        rows = [row for part in (benchmark_loading, benchmark_inference, benchmark_training) for row in told(part)]
        table, chart = benchmark_table(rows, checks, config, runtime.device), f"{config.data.name}_benchmark.png"
        emit({}, f"\n{table}", config, runtime)
        try:
            benchmark_figure(rows).savefig(chart)
            note(f"bar chart: {chart}")
        except (ImportError, OSError) as error:
            note(f"no bar chart: {first_line(error)}")
        for case in cases:
            if found := [row for row in rows if row["name"] == case.name]:
                log_case(case, found, config, data, parent)
        parent.log_metrics({f"{row['measure']}/{row['name']}": row["value"] for row in rows
                            if row["name"] not in {case.name for case in cases}})
        parent.log_outcome(table, {"benchmark.md": lambda: table, "benchmark.png": lambda: benchmark_figure(rows)})
    return 0 if all(check["passed"] for check in checks) else 1


MODES = {"train": run_train, "evaluate": run_evaluate, "predict": run_predict, "benchmark": run_benchmark}


# ------------------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> int:
    """Run the mode that the command line names; its exit code."""
    for stream in (sys.stdout, sys.stderr):                        # paths need not be valid text, nor LANG UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    config = parse_config(argv)
    warnings.filterwarnings("ignore", module="PIL")                # what matters comes as an error, in our words
    try:
        with stop_signals(), open_runtime(config.run) as runtime:
            if runtime.world_size > 1 and config.run.mode in ("predict", "benchmark"):
                raise UserError(f"--mode {config.run.mode} runs in one process: start it without torchrun")
            return MODES[config.run.mode](config, runtime)
    except UserError as error:
        print(f"classifier.py: {redact(str(error))}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        resumable = config.run.mode == "train" and config.train.repeats == 1 and config.resume_path.exists()
        note(f"stopped by {stopped}" + (f"; go on with: {command_line(config, resume=True)}" if resumable else ""))
        return 128 + stopped.signum
    except torch.OutOfMemoryError:
        print(f"classifier.py: out of GPU memory; train needs less for the same effective batch with --batch-size "
              f"{max(1, config.train.batch_size // 2)} --accumulate-grad-steps "
              f"{2 * config.train.accumulate_grad_steps}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            print(f"classifier.py: the processes lost each other, the first that ended says why: {first_line(error)}",
                  file=sys.stderr)
            return 1
        if "DataLoader worker" not in str(error):
            raise                                                  # a bug keeps its traceback
        print(f"classifier.py: {first_line(error)}; most often memory or /dev/shm is short: go on with "
              f"{command_line(config, num_workers=0, resume=True)}", file=sys.stderr)
        return 1
    except BrokenPipeError:                                        # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise                                                  # a bug keeps its traceback
        print(f"classifier.py: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
elif __name__.startswith("code_model_"):                           # MLflow's models-from-code runs the file so
    from mlflow.models import set_model
    set_model(served_model())
