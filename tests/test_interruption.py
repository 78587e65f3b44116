"""Killed, out of disk, or without its tracker: a training loses at most the epoch it was in, and repeats nothing."""
import json
import os
import random
import resource
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT, TINY

import classifier
from test_modes import interrupted, rows, run, same, weights
from test_tracking import runs_of

LOGGED = [flag for flag in TINY if flag != "--no-mlflow"]
EXACT = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr")


def exact(records):
    return [{name: record[name] for name in EXACT} for record in records]


def history(path):
    """The epochs in a resume file."""
    return torch.load(path, weights_only=True)["history"]


@pytest.mark.parametrize("when", ["before the resume file is written", "before the tracker is told"])
def test_a_kill_between_tracker_and_resume_file_neither_repeats_nor_loses_an_epoch(tmp_path, monkeypatch, capsys, when):
    if "resume" in when:                # the tracker has an epoch more than the file
        real, saves = classifier.save_atomically, []

        def stopping(payload, path):
            saves.append(path)
            if len(saves) == 4:         # one before the first epoch
                raise classifier.Stopped(15)
            real(payload, path)
        with monkeypatch.context() as patch:
            patch.setattr(classifier, "save_atomically", stopping)
            run(capsys, "--mode", "train", *LOGGED, "--epochs", "4")
    else:                               # the file has epochs more than the tracker
        with monkeypatch.context() as patch:
            patch.setattr(classifier.MlflowTracker, "store_metrics", lambda *_, **__: None)
            interrupted(monkeypatch, capsys, *LOGGED, "--epochs", "4")
    assert run(capsys, "--mode", "train", *LOGGED, "--epochs", "4", "--resume")[0] == 0
    client, _, (found,) = runs_of(tmp_path / "mlflow.db")
    for name, steps in (("train/loss", [1, 2, 3, 4]), ("test/accuracy", [0, 1, 2, 3, 4]), ("time/train_s", [0])):
        logged = sorted(each.step for each in client.get_metric_history(found.info.run_id, name))
        assert logged in (steps, steps[-4:]), name


def test_a_full_disk_costs_no_epoch(capsys, monkeypatch):
    """Two saves fail: training goes on, the file before stays whole, and the third works."""
    real, saves = torch.save, []

    def full(payload, file):
        saves.append(len(saves))
        if len(saves) in (3, 4):
            file.write(b"half")
            raise OSError(28, "No space left on device")
        if len(saves) == 5:
            assert [row["epoch"] for row in history("digits_model.pth.resume")] == [1]
        real(payload, file)
    monkeypatch.setattr(torch, "save", full)
    code, out, err = run(capsys, "--mode", "train", *TINY, "--epochs", "4", "--json")
    assert code == 0 and err.count("No space left on device; training goes on") == 2
    assert [row.get("epoch") for row in rows(out)] == [1, 2, 3, 4, None]
    assert sorted(os.listdir()) == ["digits_model.pth"]


def test_a_model_that_finds_no_place_goes_elsewhere(capsys, monkeypatch, tmp_path):
    real = classifier.save_model

    def full(path, *content):
        if path.name == str(path):
            raise classifier.UserError(f"{path} could not be written: No space left on device")
        real(path, *content)
    monkeypatch.setattr(classifier, "save_model", full)
    code, out, err = run(capsys, "--mode", "train", *TINY, "--json")
    path = rows(out)[-1]["model_path"]
    assert code == 1 and f"the model is in {path}" in err
    assert classifier.load_model(classifier.Path(path)).dataset == "digits" and os.listdir() == ["digits_model.pth.resume"]


def start(folder, *flags, **options):
    command = [sys.executable, str(ROOT / "classifier.py"), "--mode", "train", *TINY, "--epochs", "12", "--json", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            **options)


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path):
    """SIGKILL at random moments until 50 have hit; each training ends as if none had."""
    out, err = start(tmp_path, "--model-path", "straight.pth").communicate()
    straight, draw, kills, finished = [json.loads(line) for line in out.splitlines()], random.Random(0), 0, 0
    assert len(straight) == 13, err
    started = time.monotonic()
    start(tmp_path, "--model-path", "timed.pth").wait()
    whole = time.monotonic() - started
    while kills < 50 or (tmp_path / "broken.pth.resume").exists():
        process = start(tmp_path, "--model-path", "broken.pth", "--resume")
        try:
            if kills < 50:
                process.wait(draw.uniform(0.4 * whole, whole))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        told = process.communicate()[1]
        assert process.returncode in (0, -9), told
        if process.returncode == 0 and (tmp_path / "broken.pth").exists():
            finished += 1
            saved = torch.load(tmp_path / "broken.pth", weights_only=True)
            assert same(saved["weights"], weights(tmp_path / "straight.pth"))
            assert saved["metrics"]["test_accuracy_tta"] == straight[-1]["test_accuracy_tta"]
            (tmp_path / "broken.pth").unlink()
        elif (tmp_path / "broken.pth.resume").exists():
            done = history(tmp_path / "broken.pth.resume")
            assert exact(done) == exact(straight[:len(done)])
    assert finished


@pytest.mark.slow
def test_a_file_size_limit_while_saving(tmp_path):
    """RLIMIT_FSIZE below a resume file's size: training goes on, says so each epoch, and nothing half-written stays."""
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
    assert not psutil.wait_procs(workers, 10)[1]
