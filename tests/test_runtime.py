"""Devices, precision, CPUs that may be used, signals, and a compile fallback that works."""
import copy
import os
import signal
from dataclasses import replace

import pytest
import torch

import classifier
from classifier import (ModelSettings, Stopped, UserError, accelerate, build_model, pick_amp_dtype, pick_compile,
                        pick_device, pixel_statistics)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_absent_cuda_is_an_error_that_names_the_flag(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda.*--device cpu"):
        pick_device("cuda")


def test_auto_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto", local_rank=1) == torch.device("cuda", 1)
    assert pick_device("cpu") == CPU
    with pytest.raises(UserError, match="device 2 is wanted and 2"):
        pick_device("auto", local_rank=2)


@pytest.mark.parametrize("device,amp,native,expected", [
    (CUDA, None, False, torch.float16), (CUDA, False, False, None), (CPU, None, True, torch.bfloat16),
    (CPU, None, False, None), (CPU, True, False, torch.bfloat16), (CPU, False, True, None)])
def test_amp_dtype(monkeypatch, device, amp, native, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native}, raising=False)
    dtype, reason = pick_amp_dtype(device, amp)
    assert dtype == expected and reason


def test_compile_is_automatic_on_cuda_only():
    assert [pick_compile(None, device, False)[0] for device in (CUDA, CPU)] == [True, False]
    assert pick_compile(None, CUDA, one_off=True)[0] is False
    assert pick_compile(True, CPU, one_off=True)[0] is True


@pytest.mark.parametrize("files,expected", [
    ({"cpu.max": "200000 100000"}, 2.0), ({"cpu.max": "150000 100000"}, 1.5), ({"cpu.max": "max 100000"}, float("inf")),
    ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")), ({}, float("inf"))])
def test_container_quota(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert classifier.cgroup_cpus(tmp_path) == expected


def test_usable_cpus_takes_the_smallest_limit(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(classifier, "cgroup_cpus", lambda: 1.5)
    assert classifier.usable_cpus() == 2
    monkeypatch.setattr(classifier, "cgroup_cpus", lambda: float("inf"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert classifier.usable_cpus() == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_raises_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, classifier.stop_signals():
        os.kill(os.getpid(), number)
        signal.pause()
    assert stopped.value.signum == number
    assert signal.getsignal(number) == before


def failing_compile(model, **_):
    def first_call(*_):
        model.blocks[0].norms[0].running_mean += 1
        torch.rand(3)
        raise RuntimeError("no C++ compiler\nmore")
    return first_call


def test_failed_compile_leaves_everything_as_it_was(monkeypatch, cpu, capsys):
    monkeypatch.setattr(torch, "compile", failing_compile)
    model = build_model(ModelSettings(width=4), 10).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    net, report = accelerate(model, cpu, (True, "--compile"), torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    assert net is model and not report.active and "no C++ compiler" in report.reason
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert "torch.compile failed" in capsys.readouterr().err


def test_weights_cast_beforehand_give_what_autocast_gives(cpu):
    runtime = replace(cpu, amp_dtype=torch.bfloat16)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    for training in (True, False):
        model = build_model(ModelSettings(width=4), 10, pixel_statistics(images)).train(training)
        with torch.inference_mode(), runtime.autocast():
            expected = copy.deepcopy(model)(images)
            net, _ = accelerate(model, runtime, (False, ""), images)
            assert torch.equal(net(images), expected)
        assert expected.std(0).min() > 0 and net.head.weight.dtype == (torch.float32 if training else torch.bfloat16)
        assert net.blocks[0].norms[0].running_var.dtype == torch.float32


@pytest.mark.slow
def test_compiled_training_without_a_compiler_trains_the_same(cli, tmp_path):
    from conftest import TINY
    train = ["--mode", "train", *TINY, "--epochs", "1", "--model-path"]
    assert cli(*train, "a.pth").returncode == 0
    done = cli(*train, "b.pth", "--compile", env={"CXX": "/nonexistent/c++", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"})
    assert done.returncode == 0, done.stderr
    assert "torch.compile failed" in done.stderr
    a, b = (torch.load(tmp_path / name, weights_only=True)["weights"] for name in ("a.pth", "b.pth"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_compiled_equals_eager_and_saves_clean_names(cpu):
    torch.manual_seed(0)
    model = build_model(ModelSettings(width=8), 10).eval()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    net, report = accelerate(model, cpu, (True, "--compile"), images)
    assert report.active, report.reason
    with torch.inference_mode():
        assert (net(images) - model(images)).abs().max() < 1e-4
    assert not [name for name in model.state_dict() if "_orig_mod" in name]


@pytest.mark.slow
def test_compiled_training_in_bfloat16_follows_eager_training(cli):
    """Its gradients were once not a number where eager ones were fine."""
    import json

    from conftest import TINY
    flags = ["--mode", "train", *TINY, "--epochs", "1", "--amp", "--json", "--cutout", "0", "--letterbox-share", "0"]
    eager, compiled = (cli(*flags, *more) for more in ([], ["--compile"]))
    assert compiled.returncode == 0 and "compiled: True" in compiled.stderr, compiled.stderr
    losses = [json.loads(done.stdout.splitlines()[0])["train_loss"] for done in (eager, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
