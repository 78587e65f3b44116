"""Killed or out of disk: a training loses at most the epoch it was in, and repeats nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT, TINY, rows, run, same, weights

import classifier

resource = pytest.importorskip("resource")  # not on Windows

EXACT = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr")
KILLS = 12


def exact(records):
    return [[record[name] for name in EXACT] for record in records]


def history(path):
    """The epochs in a resume file."""
    return torch.load(path, weights_only=True)["history"]


def test_a_full_disk_costs_no_epoch(capsys, monkeypatch):
    """Two saves fail: training goes on, the file before stays whole, and the third works."""
    real, saves, kept = os.fsync, [], []

    def full(file):
        saves.append(len(saves))
        if len(saves) in (3, 4):
            raise OSError(28, "No space left on device")
        if len(saves) == 5:
            kept.extend(history("digits_model.pth.resume"))
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    flags = ["--limit-images", 128, "--epochs", 4, "--json"]
    code, out, err = run(capsys, "--mode", "train", *TINY, *flags)
    assert code == 0 and err.count("No space left on device; training goes on") == 2
    assert [row.get("epoch") for row in rows(out)] == [1, 2, 3, 4, None]
    assert [row["epoch"] for row in kept] == [1] and os.listdir() == ["digits_model.pth"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_a_destructor_swallows_counts_at_the_next_batch(capsys, monkeypatch):
    real, calls = classifier.augment, []

    class Destroyed:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    def augment(*args):
        calls.append(args)
        if len(calls) == 2:
            Destroyed()
        return real(*args)

    monkeypatch.setattr(classifier, "augment", augment)
    code, _, err = run(capsys, "--mode", "train", *TINY, "--limit-images", 128)
    assert code == 143 and "stopped by SIGTERM" in err and len(calls) == 2


def start(folder, *flags, **options):
    """A training in a process of its own."""
    command = [sys.executable, ROOT / "classifier.py", "--mode", "train", *TINY, "--json"]
    return subprocess.Popen(
        [*command, "--epochs", "12", *flags],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path):
    """SIGKILL until KILLS have hit; each training ends as if none had."""
    started = time.monotonic()
    out, err = start(tmp_path, "--model-path", "straight.pth").communicate()
    straight = rows(out)
    assert len(straight) == 13, err
    whole = time.monotonic() - started  # kills shall hit training, not only the imports
    draw, kills, finished = random.Random(0), 0, 0
    while kills < KILLS or (tmp_path / "broken.pth.resume").exists():
        process = start(tmp_path, "--model-path", "broken.pth", "--resume")
        try:
            if kills < KILLS:
                process.wait(draw.uniform(0.4 * whole, whole))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        err = process.communicate()[1]
        assert process.returncode in (0, -9), err
        resumable = (tmp_path / "broken.pth.resume").exists()
        if (tmp_path / "broken.pth").exists() and not resumable:
            finished += 1
            saved = torch.load(tmp_path / "broken.pth", weights_only=True)
            assert same(saved["weights"], weights(tmp_path / "straight.pth"))
            assert saved["metrics"]["test_accuracy_tta"] == straight[-1]["test_accuracy_tta"]
            (tmp_path / "broken.pth").unlink()
        elif resumable:
            done = history(tmp_path / "broken.pth.resume")
            assert exact(done) == exact(straight[: len(done)])
    assert finished


@pytest.mark.slow
def test_a_file_size_limit_while_saving(tmp_path):
    """Below a resume file's size: training goes on, says so, and nothing half-written stays."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start(tmp_path, preexec_fn=limit)
    out, err = process.communicate()
    assert process.returncode == 1 and len(out.splitlines()) == 12, err
    assert err.count("training goes on") == 13 and "could not be written" in err.splitlines()[-1]
    assert "Traceback" not in err and os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_kill_leaves_no_workers(tmp_path):
    """Two workers whose batches nobody takes any more."""
    process = start(tmp_path, "--epochs", "4000", "--num-workers", "2", "--batch-size", "128")
    assert json.loads(process.stdout.readline())["epoch"] == 1
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.kill()
    assert not psutil.wait_procs(workers, 60)[1]
    process.communicate()
