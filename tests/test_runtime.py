"""Devices, precision, CPUs that may be used, signals, locks, and a compile fallback that works."""

import contextlib
import copy
import errno
import io
import os
import platform
import signal
import sys
import threading
import time
from dataclasses import replace

import filelock
import pytest
import torch
from conftest import TINY, rows, same, weights

import classifier
from classifier import (
    CifarNet,
    Config,
    Stopped,
    UserError,
    accelerate,
    hold_lock,
    open_runtime,
    pick_amp_dtype,
    pick_device,
    pixel_statistics,
    stop_signals,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def two_gpus(monkeypatch):
    """What torch says where there are two CUDA devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


@pytest.mark.parametrize(
    "built,capability,works",
    [
        (["sm_80", "sm_90"], (8, 6), True),  # of the same major number
        (["sm_75", "sm_80"], (6, 1), False),  # too old
        (["sm_80", "compute_80"], (12, 0), True),  # portable code
        (["sm_80", "sm_90a"], (12, 0), False),
    ],
)
def test_a_gpu_that_torch_was_not_built_for(two_gpus, monkeypatch, built, capability, works):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert pick_device("auto").type == ("cuda" if works else "cpu")


def test_auto_device(two_gpus, monkeypatch):
    monkeypatch.setattr(classifier, "supports_gpu", lambda: True)
    assert pick_device("auto", local_rank=1) == torch.device("cuda", 1)
    assert pick_device("cuda:1", local_rank=0) == torch.device("cuda", 1)
    assert pick_device("cpu") == CPU
    with pytest.raises(UserError, match="no device 2, 2 CUDA devices"):
        pick_device("auto", local_rank=2)


@pytest.mark.parametrize("mode,tunes", [("train", True), ("evaluate", False), ("predict", False)])
def test_cudnn_tunes_for_training_only(two_gpus, monkeypatch, mode, tunes):
    """It tries algorithms for each new shape, of which evaluation and prediction have many."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not tunes)
    with open_runtime(Config(mode=mode, device="cuda")) as runtime:
        assert torch.backends.cudnn.benchmark is tunes
        assert (runtime.device, runtime.amp_dtype) == (CUDA, torch.float16)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_not_cleared_again():
    """Every page that Linux clears is a fault. glibc keeps a few blocks before it reuses them."""
    resource = pytest.importorskip("resource")
    faults = []
    with open_runtime(Config(device="cpu")):
        for _ in range(20):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(10 * 2**20)  # 40 MiB: 10,240 pages
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert max(faults[-5:]) < 100


@pytest.mark.parametrize("fails", [False, True])
def test_no_process_waits_for_one_that_failed(two_gpus, monkeypatch, fails):
    """With NCCL, destroy_process_group waits for all: after an error it would hang."""
    calls = []
    for name in ("init_process_group", "destroy_process_group"):

        def called(*_, name=name, **options):
            calls.append((name, options.get("device_id")))

        monkeypatch.setattr(classifier.dist, name, called)
    monkeypatch.setattr(classifier.dist, "rendezvous", lambda *_, **__: iter([(None, 1, 2)]))
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(classifier, "supports_gpu", lambda: True)
    with contextlib.suppress(KeyError), open_runtime(Config()) as runtime:
        assert (runtime.rank, runtime.world_size) == (1, 2)
        if fails:
            raise KeyError("a bug")
    ends = [] if fails else [("destroy_process_group", None)]
    assert calls == [("init_process_group", torch.device("cuda", 1)), *ends]


@pytest.mark.parametrize("device", ["auto", "mps"])
def test_a_mac_has_no_gpu_under_torchrun(monkeypatch, device):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device cpu"), open_runtime(Config(device=device)):
        pass


def test_channels_last_except_on_mps(cpu, model, images):
    """There, torch's gradients were wrong (pytorch/pytorch#175189)."""
    mps = classifier.Runtime(torch.device("mps"))
    assert mps.memory_format is torch.contiguous_format
    accelerate(model, cpu, False, images)
    assert model.blocks[1].conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "device,amp,native,expected",
    [
        (CUDA, None, False, torch.float16),
        (CUDA, False, False, None),
        (CPU, None, True, torch.bfloat16),
        (CPU, None, False, None),
        (CPU, True, False, torch.bfloat16),
        (CPU, False, True, None),
        (torch.device("mps"), None, False, None),
    ],
)
def test_amp_dtype(monkeypatch, device, amp, native, expected):
    capabilities = {"avx512_bf16": native}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    dtype, reason = pick_amp_dtype(device, amp)
    assert dtype == expected and reason


def test_compile_is_automatic_on_cuda_only(model, monkeypatch, images):
    monkeypatch.setattr(model, "to", lambda *_, **__: model)  # as if the device were there
    monkeypatch.setattr(torch, "compile", failing_compile)
    for device, asked, tried in ((CPU, None, 0), (CPU, True, 1), (CUDA, None, 1), (CUDA, False, 0)):
        _, report = accelerate(model, classifier.Runtime(device), asked, images)
        assert report.reason.startswith("failed") == tried


@pytest.mark.parametrize(
    "files,expected",
    [
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu.max": "9900000 100000"}, 64),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ({}, 64),
    ],
)
def test_usable_cpus_takes_the_smallest_limit(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert classifier.usable_cpus(tmp_path) == expected


# --- Signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_raises_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, stop_signals():
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            assert signal.getsignal(number) is signal.SIG_DFL  # a second one ends the process
    assert stopped.value.signum == number
    assert signal.getsignal(number) == before


# --- Locks ----------------------------------------------------------------------------------------


def test_a_lock_is_held_by_one_at_a_time_and_leaves_no_file(tmp_path):
    path = tmp_path / ".lock"
    refused = pytest.raises(UserError, match="taken")
    with hold_lock(path, 0, "taken"), refused, hold_lock(path, 0, "taken"):
        pytest.fail("two hold it")
    with hold_lock(path, 0, "taken"):
        assert path.exists()
    assert not path.exists()


def test_who_waits_for_a_lock_says_so(tmp_path, capsys):
    path, order, told = tmp_path / ".lock", [], ""

    def second():
        with hold_lock(path, -1, "waiting"):
            order.append("second")

    with hold_lock(path, -1, "waiting"):
        assert capsys.readouterr().err == ""
        thread = threading.Thread(target=second)
        thread.start()
        deadline = time.monotonic() + 60
        while not told and time.monotonic() < deadline:
            told = capsys.readouterr().err
        order.append("first")
    thread.join()
    assert told == "waiting\n" and order == ["first", "second"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.parametrize("timeout", [0, -1])
def test_a_disk_without_locks_is_used_without_them(tmp_path, monkeypatch, capsys, number, timeout):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with hold_lock(tmp_path / ".lock", timeout, "taken"):
        assert f"cannot be locked ([Errno {number}]" in capsys.readouterr().err


def test_a_system_without_locks_is_a_line(tmp_path, monkeypatch, capsys):
    def acquire(*_):
        raise NotImplementedError("none")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with hold_lock(tmp_path / ".lock", 0, "taken"):
        assert f"{tmp_path}/.lock cannot be locked" in capsys.readouterr().err


# --- Compiled networks ----------------------------------------------------------------------------


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)


@pytest.fixture
def model(images):
    torch.manual_seed(0)
    return CifarNet(4, 10, pixel_statistics(images))


def failing_compile(model, **_):
    def first_call(*_):
        model.blocks[0].norm1.running_mean += 1
        torch.rand(3)
        raise RuntimeError("no C++ compiler\nmore")

    return first_call


def unsupported_compile(*_, **__):
    """As on a Python that is too new for it."""
    raise RuntimeError("no C++ compiler")


@pytest.mark.parametrize("compile", [failing_compile, unsupported_compile])
def test_failed_compile_leaves_everything_as_it_was(
    monkeypatch, cpu, capsys, model, images, compile
):
    monkeypatch.setattr(torch, "compile", compile)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    net, report = accelerate(model.train(), cpu, True, images)
    assert net is model and not report.active and "no C++ compiler" in report.reason
    assert same(before, model.state_dict())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert "torch.compile failed" in capsys.readouterr().err


def test_a_compile_that_works_leaves_weights_and_random_state(monkeypatch, cpu, model, images):
    """Each shape's first call is a training step without its update."""
    calls = []

    def compile(model, dynamic):
        calls.append(dynamic)
        return lambda inputs: (calls.append(len(inputs)), model(inputs))[1]

    monkeypatch.setattr(torch, "compile", compile)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    net, report = accelerate(model.train(), cpu, True, images, images[:2])
    assert net is not model and report.active and calls == [False, 4, 2]
    assert same(before, model.state_dict()) and torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_weights_cast_beforehand_give_what_autocast_gives(cpu, model, images, training):
    runtime = replace(cpu, amp_dtype=torch.bfloat16)
    model.train(training)
    with torch.inference_mode(), runtime.autocast():
        expected = copy.deepcopy(model)(images)
        net, _ = accelerate(model, runtime, False, images)
        assert torch.equal(net(images), expected)
    cast = torch.float32 if training else torch.bfloat16
    assert expected.std(0).min() > 0 and net.head.weight.dtype == cast
    assert net.blocks[0].norm1.running_var.dtype == torch.float32


@pytest.mark.slow
def test_compiled_training_without_a_compiler_trains_the_same(cli):
    train = ["--mode", "train", *TINY, "--epochs", "1", "--model-path"]
    assert cli(*train, "a.pth").returncode == 0
    no_compiler = {"CXX": "/nonexistent/c++", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = cli(*train, "b.pth", "--compile", env=no_compiler)
    assert done.returncode == 0, done.stderr
    assert "torch.compile failed" in done.stderr
    assert same(weights("a.pth"), weights("b.pth"))


@pytest.mark.slow
def test_compiled_equals_eager(cpu, model, images):
    net, report = accelerate(model.eval(), cpu, True, images)
    assert report.active, report.reason
    with torch.inference_mode():
        assert (net(images) - model(images)).abs().max() < 1e-4


@pytest.mark.slow
def test_compiled_training_in_bfloat16_follows_eager_training(cli):
    """Its gradients were once not a number where eager ones were fine."""
    plain = ["--cutout", "0", "--letterbox-share", "0"]
    flags = ["--mode", "train", *TINY, "--epochs", "1", "--amp", "--json", *plain]
    flags += ["--limit-images", "96"]
    eager, compiled = (cli(*flags, *more) for more in ([], ["--compile"]))
    assert compiled.returncode == 0 and "compiled: True" in compiled.stderr, compiled.stderr
    losses = [rows(done.stdout)[0]["train_loss"] for done in (eager, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_every_gpu_of_amd_is_used(two_gpus, monkeypatch):
    """torch for AMD names architectures without numbers to compare, and knows what it runs on."""
    monkeypatch.setattr(torch.version, "hip", "6.4.0")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["gfx90a", "gfx1100"])
    assert pick_device("auto").type == "cuda"


def test_torch_2_6_knows_bfloat16_by_another_name(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for there, expected in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda there=there: there)
        assert pick_amp_dtype(CPU, None)[0] == expected


def test_windows_is_not_asked_for_its_libc(monkeypatch):
    """`libc_ver` reads python.exe, which the Microsoft Store's Python forbids."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(platform, "libc_ver", lambda: 1 / 0)
    with open_runtime(Config(device="cpu")) as runtime:
        assert runtime.device == CPU


@pytest.mark.parametrize("torchs,usable,expected", [(64, 3, 3), (2, 8, 2)])
def test_torch_starts_no_more_threads_than_may_run(monkeypatch, torchs, usable, expected):
    """A container with a quota of 2 CPUs on a machine with 64 would be very slow."""
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: torchs)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(classifier, "usable_cpus", lambda: usable)
    with open_runtime(Config(device="cpu")):
        assert asked == [expected]


def test_a_message_stands_on_a_line_of_its_own(monkeypatch):
    """The progress bar goes away for it and comes back."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    for _ in classifier.progress(range(1), "epoch 1/1", 1):
        classifier.log("told")
    before, after = terminal.getvalue().split("told\n")
    assert "epoch 1/1" in before and before.endswith("\r") and "epoch 1/1" in after
