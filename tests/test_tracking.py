"""MLflow: everything is there, and nothing that happens to it can hurt a training."""

import base64
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    LOGGED,
    ROOT,
    encoded,
    free_port,
    interrupted,
    noise,
    run,
    runs_of,
    same,
    weights,
)

import classifier
from classifier import Augmentation, Config, MlflowTracker, open_tracker

SMALL = [*LOGGED, "--limit-images", "128"]
RECORDS = 7  # of `log_something` and of a training of two epochs


PATIENCE = classifier.TRACKING_PATIENCE  # in other tests it is longer


def settings(**tracking):
    return Config(dataset="digits", **tracking)


@pytest.fixture(scope="session")
def new_store(tmp_path_factory):
    """A database with all of MLflow's tables, which take four seconds to make."""
    folder = tmp_path_factory.mktemp("store")
    config = settings(experiment="other", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(classifier, "TRACKING_PATIENCE", 600)
        with open_tracker(config, classifier.Runtime(torch.device("cpu"))):
            pass
    assert [each.info.status for each in runs_of(folder / "mlflow.db", "other")[2]] == ["FINISHED"]
    return folder / "mlflow.db"


@pytest.fixture
def store(new_store, tmp_path):
    """A copy of it where --tracking-uri looks by default."""
    return Path(shutil.copy(new_store, tmp_path / "mlflow.db"))


@pytest.fixture
def no_served_model(monkeypatch):
    """Leaves out what takes most of a tracked training's time."""
    monkeypatch.setattr(MlflowTracker, "log_model", lambda *_: None)


@pytest.fixture(scope="module")
def digits():
    return classifier.load_data(Config(dataset="digits", limit_images=20))


def log_something(config, runtime, data, files=None):
    """A run of three epochs, as a training logs it."""
    with open_tracker(config, runtime) as tracker:
        tracker.log_settings({"run_device": "cpu"}, data)
        for epoch in range(3):
            tracker.log_metrics({"train_loss": 1.0, "test_accuracy": 0.5}, epoch)
        tracker.log_outcome("fine", files or {"note.md": lambda: "text"})
    return tracker


@pytest.fixture
def trackers(monkeypatch):
    """Those that the program makes."""
    made, real = [], MlflowTracker.__init__
    monkeypatch.setattr(MlflowTracker, "__init__", lambda *a: (real(*a), made.append(a[0]))[0])
    return made


def steps(client, run_id, name="train/loss"):
    return [metric.step for metric in client.get_metric_history(run_id, name)]


@pytest.fixture(scope="module")
def logged(tmp_path_factory, new_store):
    """One tracked training: folder, client, experiment, run, and what it printed on stderr."""
    folder = tmp_path_factory.mktemp("tracked")
    shutil.copy(new_store, folder)
    secret = ["--data-url", "http://me:hunter2@example.org/x?key=hunter2"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as err:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)  # the other fixture's
        assert classifier.main(["--mode", "train", *SMALL, "--seed", "3", *secret]) == 0
    client, experiment, (found,) = runs_of(folder / "mlflow.db")
    return folder, client, experiment, found, err.getvalue()


def test_every_setting_and_every_fact_is_a_parameter(logged):
    params = logged[3].data.params
    assert set(asdict(Config())) - {"resume"} <= set(params)
    assert params["seed"] == "3" and params["amp"] == "auto" and params["tta"] == "True"
    assert params["lr"] == "auto" and params["momentum"] == "0.9367"
    facts = {name for name in params if name.startswith("run_")} - {"run_name"}
    loading = {"num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "non_blocking"}
    speed = {"amp_dtype", "amp_reason", "compile", "compile_reason", "memory_format"}
    work = {"effective_batch", "peak_lr", "flip"}
    work |= {"dataset", "train_images", "data_loading", "width", "depth"}
    work |= set(Augmentation._fields)
    machine = {"device", "threads", "world_size", "backend"}
    assert facts == {f"run_{name}" for name in loading | speed | work | machine}
    assert params["run_effective_batch"] == "32" and params["run_num_workers"] == "0"
    assert params["run_flip"] == "False" and float(params["run_peak_lr"]) == 0.0192 / 4
    assert params["shift"] == "auto" and params["run_shift"] == "2"  # two epochs


def test_metrics_of_epochs_have_steps_and_final_ones_none(logged):
    _, client, _, found, _ = logged
    epochs = """test/accuracy test/loss train/loss train/accuracy train/lr time/epoch_s
        speed/epoch_img_s data/epoch_wait_s memory/so_far_mb"""
    final = """test/accuracy_tta time/train_s time/eval_s time/total_s time/compile_s train/skipped
        speed/train_img_s data/wait_s memory/peak_mb calibration/ece calibration/temperature"""
    assert set(found.data.metrics) == {*epochs.split(), *final.split()}
    for names, expected in ((epochs, [1, 2]), (final, [0])):
        for name in names.split():
            assert steps(client, found.info.run_id, name) == expected, name
    assert 1 < found.data.metrics["test/accuracy"] <= 100  # percent


def test_artifacts_data_set_and_note(logged):
    _, client, _, found, err = logged
    names = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert names == {"confusion_matrix.png", "per_class.json"}
    inputs = {each.tags[0].value: each.dataset.digest for each in found.inputs.dataset_inputs}
    assert set(inputs) == {"train", "test"} and len(set(inputs.values())) == 2
    assert "--seed 3" in found.data.tags["mlflow.note.content"]
    assert found.info.status == "FINISHED" and found.data.tags["task"] == "train"
    assert "serve it: MLFLOW_TRACKING_URI=sqlite:///" in err
    assert found.info.run_name == "e2 b32 s3 j0 n128"


def test_no_password_anywhere(logged):
    folder, _, _, _, err = logged
    assert "hunter2" not in err
    for file in folder.rglob("*"):
        assert not file.is_file() or b"hunter2" not in file.read_bytes(), file


def test_the_end_says_how_to_compare(logged):
    folder, _, experiment, _, err = logged
    assert f"mlflow ui --backend-store-uri sqlite:///{folder}/mlflow.db" in err
    page = f"#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
    assert f"{page}&viewStateShareKey=train" in err
    assert "test/accuracy" in experiment.tags["mlflow.sharedViewState.train"]
    assert experiment.artifact_location == (folder / "mlartifacts").as_uri()
    names = ["digits_model.pth", "mlartifacts", "mlflow.db"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_evaluate_is_a_run_of_its_own(store, trained, capsys):
    assert run(capsys, "--mode", "evaluate", "--device", "cpu", "--model-path", trained)[0] == 0
    (found,) = runs_of(store)[2]
    assert found.data.tags["task"] == "evaluate" and found.data.metrics["test/accuracy_tta"] > 0
    # The model's settings are those that were given, not what `auto` became.
    assert (found.info.run_name, found.data.params["lr"]) == ("eval e15 b32 n320", "auto")


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:9",
        "./mlruns",
        "sqlite:////proc/nowhere/mlflow.db",
        "nonsense://x",
    ],
)
def test_a_store_that_fails_is_told_once_and_hurts_nobody(cpu, digits, capsys, uri):
    files = {"a.png": lambda: 1, "b.json": lambda: 2}
    tracker = log_something(settings(tracking_uri=uri), cpu, digits, files)
    err = capsys.readouterr().err
    assert err.count("cannot log to MLflow at") == 1 and "Traceback" not in err
    assert f"MLflow did not take {RECORDS} records" in err and "compare runs" not in err
    assert len(tracker.pending) == RECORDS


@pytest.mark.usefixtures("no_served_model")
def test_what_a_dead_store_did_not_take_is_logged_by_resume(store, tmp_path, capsys):
    words = ["--mode", "train", *SMALL]
    assert run(capsys, *words, "--tracking-uri", "nonsense://x")[0] == 0
    trained = weights(tmp_path / "digits_model.pth")
    code, _, err = run(capsys, *words, "--resume", "--tracking-uri", f"sqlite:///{store}")
    client, _, (found,) = runs_of(store)
    assert code == 0 and found.info.status == "FINISHED", err
    assert steps(client, found.info.run_id) == [1, 2]
    assert found.data.metrics["test/accuracy_tta"] > 0
    assert same(trained, weights(tmp_path / "digits_model.pth"))
    assert not (tmp_path / "digits_model.pth.resume").exists()


def test_a_server_that_accepts_and_never_answers(trackers, monkeypatch, capsys):
    """Training goes on; each of its six calls tries once. Resuming adds no call."""
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT

    monkeypatch.setattr(MLFLOW_HTTP_REQUEST_TIMEOUT, "type", float)  # MLflow takes whole seconds
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "0.3")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        words = ["--mode", "train", *SMALL, "--tracking-uri", uri]
        calls, (code, out, err) = [], run(capsys, *words)
        silent.setblocking(False)
        for _ in range(2):
            calls.append(0)
            with contextlib.suppress(BlockingIOError):
                while True:
                    silent.accept()[0].close()
                    calls[-1] += 1
            if len(calls) == 1:
                run(capsys, *words, "--resume")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:3]] == ["1", "2"]
    assert err.count("cannot log to MLflow at") == 1 and "Traceback" not in err
    assert calls == [6, 4] and [len(each.pending) for each in trackers] == 2 * [RECORDS]


def test_one_call_to_a_dead_server_is_shorter_than_the_patience(cpu):
    with open_tracker(settings(tracking_uri="nonsense://x"), cpu):
        assert float(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]) < PATIENCE


def test_a_slow_store_holds_up_each_call_for_so_long_and_no_longer(
    cpu, digits, store, monkeypatch, capsys
):
    """Six seconds a record: two at the first call, the others at the next ones."""
    now, counts = [0.0], []
    monkeypatch.setattr(classifier, "TRACKING_PATIENCE", PATIENCE)
    monkeypatch.setattr(
        classifier, "time", SimpleNamespace(time=time.time, monotonic=lambda: now[0])
    )
    real_store, real_send = MlflowTracker.store_metrics, MlflowTracker.send

    def slow(*args, **content):
        now[0] += 6
        real_store(*args, **content)

    def send(tracker, *args, **content):
        before = len(tracker.pending)
        real_send(tracker, *args, **content)
        counts.append(before + 1 - len(tracker.pending))

    monkeypatch.setattr(MlflowTracker, "store_metrics", slow)
    monkeypatch.setattr(MlflowTracker, "send", send)
    with open_tracker(settings(), cpu) as tracker:
        tracker.log_settings({}, digits)
        for step in range(5):
            tracker.log_metrics({"x": 1.0}, step, flush=step > 2)
    client, _, (found,) = runs_of(store)
    assert counts == [0, 2, 0, 0, 0, 2, 2, 2] and found.info.status == "FINISHED"
    assert steps(client, tracker.run_id, "x") == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err.count("takes more than 10 s") == 1


@pytest.mark.parametrize("held_to_the_end", [False, True])
def test_a_locked_database_fails_quickly_and_is_tried_again(
    cpu, digits, store, monkeypatch, capsys, held_to_the_end
):
    real, patience = sqlite3.connect, []

    def impatient(path, timeout, **more):
        patience.append(timeout)
        return real(path, timeout=0.05, **more)

    other = real(store, isolation_level=None)
    with contextlib.closing(other), open_tracker(settings(), cpu) as tracker:
        tracker.log_settings({}, digits)
        monkeypatch.setattr(sqlite3, "connect", impatient)
        other.execute("BEGIN IMMEDIATE")
        for epoch in (1, 2):
            tracker.log_metrics({"train_loss": 1.0}, epoch)
        assert len(tracker.pending) == 2 and patience == [5, 5]  # once a call, 5 s at most
        if not held_to_the_end:
            other.execute("ROLLBACK")
        tracker.log_metrics({"train_loss": 1.0}, 3)
        if held_to_the_end:
            tracker.close("FAILED")
            other.execute("ROLLBACK")
            assert len(tracker.pending) == 4
    client, _, (found,) = runs_of(store)
    assert steps(client, tracker.run_id) == [1, 2, 3] and found.info.status == "FINISHED"
    err = capsys.readouterr().err
    assert err.count("cannot log to MLflow") == 1 and "database is locked" in err


@pytest.mark.usefixtures("no_served_model")
def test_a_full_disk_costs_the_tracking_only(store, trackers, tmp_path, monkeypatch, capsys):
    from mlflow import MlflowClient

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MlflowClient, "log_batch", full)
    code, _, err = run(capsys, "--mode", "train", *SMALL)
    assert code == 0 and (tmp_path / "digits_model.pth").exists()
    assert err.count("No space left on device") == 1 and "Traceback" not in err
    (found,) = runs_of(store)[2]
    assert len(trackers[0].pending) == RECORDS - 1 and trackers[0].run_id == found.info.run_id


def test_a_start_that_failed_halfway_makes_no_second_run(cpu, digits, store, monkeypatch):
    from mlflow import MlflowClient

    real, broken = MlflowClient.set_experiment_tag, [1]

    def unreliable(*args):
        if broken:
            broken.pop()
            raise ConnectionError("gone for a moment")
        return real(*args)

    monkeypatch.setattr(MlflowClient, "set_experiment_tag", unreliable)
    tracker = log_something(settings(), cpu, digits)
    client, _, (found,) = runs_of(store)
    assert found.info.status == "FINISHED" and not broken
    assert steps(client, tracker.run_id) == [0, 1, 2]


@pytest.mark.parametrize(
    "error,status",
    [
        (RuntimeError(), "FAILED"),
        (classifier.Stopped(2), "KILLED"),
        (SystemExit(0), "FAILED"),
    ],
)
def test_the_run_ends_as_the_work_does(cpu, store, error, status):
    with pytest.raises(type(error)), open_tracker(settings(), cpu) as tracker:
        tracker.log_metrics({"train_loss": 1.0}, 1)
        raise error
    assert [found.info.status for found in runs_of(store)[2]] == [status]


def test_a_deleted_experiment_comes_back(cpu, digits, store, capsys):
    log_something(settings(), cpu, digits)
    client, experiment, _ = runs_of(store)
    client.delete_experiment(experiment.experiment_id)
    log_something(settings(), cpu, digits)
    assert len(runs_of(store)[2]) == 2 and "cannot log" not in capsys.readouterr().err


@pytest.fixture
def another_thread():
    """A thread that takes signals, as those of OpenMP and of --system-metrics do."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    yield
    end.set()
    thread.join()


@pytest.mark.usefixtures("another_thread")
def test_a_signal_while_the_store_works_loses_and_doubles_nothing(
    cpu, digits, store, monkeypatch, tmp_path
):
    """The stop waits until the record is stored."""
    from mlflow import MlflowClient

    real, calls = MlflowClient.log_batch, []

    def interrupting(*args, **more):
        answer = real(*args, **more)
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # the main thread is stopped meanwhile
        return answer

    monkeypatch.setattr(MlflowClient, "log_batch", interrupting)
    with pytest.raises(classifier.Stopped), classifier.stop_signals():
        log_something(settings(), cpu, digits)
    client, _, (found,) = runs_of(store)
    assert found.info.status == "KILLED" and len(calls) == 2
    assert steps(client, found.info.run_id) == [0]


def test_a_group_is_of_runs_that_differ_in_the_seed_only(cpu, digits, store):
    same_work = "--seed 1 --run-name x --model-path x.pth --data-dir /tmp/7 --json"
    for words in ("--seed 0", same_work, "--epochs 5"):
        config = classifier.parse_config(f"--dataset digits {words}".split())
        with open_tracker(config, cpu) as tracker:
            tracker.log_settings({}, digits)
    found = runs_of(store)[2]
    assert found[1].info.run_name == "x"
    one, same, other = (each.data.tags["group"] for each in found)
    assert one == same != other


def test_a_database_in_a_new_folder(cpu, digits, tmp_path):
    """MLflow makes the folder, too."""
    with open_tracker(settings(tracking_uri="sqlite:///runs/new/a.db"), cpu) as tracker:
        tracker.log_settings({}, digits)
    assert not tracker.pending and (tmp_path / "runs" / "new" / "a.db").exists()


def test_a_server_without_data_sets_and_views_gets_the_rest(cpu, digits, store, monkeypatch):
    """Such as GitLab's."""
    from mlflow import MlflowClient, MlflowException

    def missing(*_, **__):
        raise MlflowException("404 Not Found")

    monkeypatch.setattr(MlflowClient, "log_inputs", missing)
    monkeypatch.setattr(MlflowClient, "set_experiment_tag", missing)
    tracker = log_something(settings(), cpu, digits)
    (found,) = runs_of(store)[2]
    assert not tracker.pending and found.data.metrics["test/accuracy"] == 50
    assert found.info.status == "FINISHED"


def test_a_notebook_may_call_main_again(store, tmp_path, monkeypatch, capsys, no_served_model):
    """Each call as if it were the first: the store, the environment, sys.argv."""
    monkeypatch.setattr(sys, "argv", ["notebook", "--its-own"])
    names = classifier.PROCESS_VARIABLES
    environment = [os.environ.get(name) for name in names]
    shutil.copy(store, tmp_path / "scratch.db")
    scratch = ["--tracking-uri", "sqlite:///scratch.db"]
    for flags in (scratch, []):
        assert run(capsys, "--mode", "train", *SMALL, *flags)[0] == 0
        assert sys.argv == ["notebook", "--its-own"]
        assert [os.environ.get(name) for name in names] == environment
        assert len(runs_of(tmp_path / "scratch.db")[2]) == 1
    assert len(runs_of(store)[2]) == 1


def test_seeds_are_named_apart(store, capsys, no_served_model):
    run(capsys, "--mode", "train", *SMALL, "--repeats", 2, "--run-name", "big", "--seed", 4)
    names = {each.info.run_name for each in runs_of(store)[2]}
    assert names == {"big", "big s4", "big s5"}


def test_results_that_wait_for_mlflow_are_no_unfinished_training(capsys, tmp_path):
    """The next training keeps them, and says what they are."""
    dead = ["--tracking-uri", "nonsense://x"]
    for _ in range(3):
        err = run(capsys, "--mode", "train", *SMALL, *dead)[2]
    name = "digits_model.pth.resume.ended"
    assert f"what MLflow did not take of the last training was moved to {name}1" in err
    found = sorted(path.name for path in tmp_path.glob("*.resume*"))
    assert found == [name[:-6], name, f"{name}1"]


def test_system_metrics(cpu, store, monkeypatch):
    """The machine's load is there every two seconds, and measuring ends with the run."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor as Monitor

    asked, published, publish = [], threading.Event(), Monitor.publish_metrics

    def start(monitor):
        asked.append((monitor.sampling_interval, monitor.samples_before_logging))
        monitor.sampling_interval = 0.01
        real_start(monitor)

    real_start = Monitor.start
    monkeypatch.setattr(Monitor, "start", start)
    monkeypatch.setattr(Monitor, "publish_metrics", lambda *a: (publish(*a), published.set()))
    with open_tracker(settings(system_metrics=True), cpu) as tracker:
        tracker.log_metrics({"train_loss": 1.0}, 1)
        assert asked == [(2, 1)] and published.wait(60)
    (found,) = runs_of(store)[2]
    assert "system/cpu_utilization_percentage" in found.data.metrics
    assert found.info.status == "FINISHED"
    assert "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()}


def test_artifacts_that_cannot_be_stored_do_not_block_the_run(
    cpu, digits, store, monkeypatch, capsys
):
    from mlflow import MlflowClient

    def refuse(*_, **__):
        raise PermissionError("no credentials")

    monkeypatch.setattr(MlflowClient, "log_text", refuse)
    files = {"a.md": lambda: "text", "b.json": lambda: {"x": [1]}}
    log_something(settings(), cpu, digits, files)
    client, _, (found,) = runs_of(store)
    assert found.info.status == "FINISHED"
    assert "MLflow did not store a.md: no credentials" in capsys.readouterr().err
    assert [file.path for file in client.list_artifacts(found.info.run_id)] == ["b.json"]


def test_an_outcome_that_is_stored_is_not_stored_again(cpu, digits, store):
    """`log_table` would append to what is there."""
    files = {"b.json": lambda: {"x": [1]}}
    run_id = log_something(settings(), cpu, digits, files).run_id
    with open_tracker(settings(), cpu, run_id=run_id) as tracker:
        tracker.log_outcome("fine", files)
    client = runs_of(store)[0]
    stored = Path(client.download_artifacts(run_id, "b.json"))
    assert json.loads(stored.read_text())["data"] == [[1]]


def test_the_served_model_requires_what_the_script_imports(cpu, store, tmp_path, monkeypatch):
    def log_model(pip_requirements, **_):
        required.extend(each.split("==")[0] for each in pip_requirements)
        return SimpleNamespace(model_uri="models:/m")

    required = []
    monkeypatch.setattr("mlflow.models.Model.log", log_model)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")  # of a user's shell
    monkeypatch.setitem(sys.modules, "psutil", None)
    with open_tracker(settings(), cpu) as tracker:
        tracker.log_outcome("fine", {"the model": lambda: tmp_path / "m.pth"})
    imports = re.findall(r"^(?:import|from) (\w+)", Path(classifier.__file__).read_text(), re.M)
    foreign = set(imports) - set(sys.stdlib_module_names)
    assert {{"pillow": "PIL"}.get(name, name) for name in required} == foreign


def test_class_names_that_are_no_utf8_have_their_files(cpu, store, tmp_path):
    """A folder's name of other bytes reaches MLflow in both files."""
    for name in (b"gr\xfcn", b"rot"):
        folder = os.path.join(os.fsencode(tmp_path), b"pictures", name)
        try:
            os.makedirs(folder)
        except OSError:
            pytest.skip("this file system takes UTF-8 only")
        for number in range(4):
            noise(40, 30).save(os.path.join(os.fsdecode(folder), f"{number}.png"))
    data = classifier.load_data(Config(dataset=str(tmp_path / "pictures")))
    found = classifier.Evaluation(1.0, 0.5, None, 0.1, 1.0, torch.eye(2).long(), 1.0)
    files = found.files(data.class_names)
    log_something(settings(), cpu, data, files)
    client, _, (found,) = runs_of(store)
    stored = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert stored == {"confusion_matrix.png", "per_class.json"}


@pytest.mark.usefixtures("no_served_model")
def test_children_fold_under_their_parent(store, capsys):
    words = ["--epochs", 1, "--repeats", 2, "--holdout", 32]
    code, _, err = run(capsys, "--mode", "train", *SMALL, *words)
    parent, *children = runs_of(store)[2]
    assert code == 0 and len(children) == 2
    assert {each.data.tags["mlflow.parentRunId"] for each in children} == {parent.info.run_id}
    accuracies = [each.data.metrics["holdout/accuracy"] for each in children]
    mean = parent.data.metrics["holdout/accuracy_mean"]
    assert mean == pytest.approx(sum(accuracies) / 2, abs=1e-3)
    assert {each.info.status for each in (parent, *children)} == {"FINISHED"}
    assert "2 seeds: " in parent.data.tags["mlflow.note.content"]
    assert err.count("compare runs: http") == 1


@pytest.mark.parametrize("deleted", [False, True])
def test_a_resumed_run_that_is_gone_gets_a_new_one(cpu, store, capsys, deleted):
    old = "0" * 32
    if deleted:
        with open_tracker(settings(), cpu) as tracker:
            tracker.log_metrics({"train_loss": 1.0}, 1)
        old = tracker.run_id
        runs_of(store)[0].delete_run(old)
    with open_tracker(settings(), cpu, run_id=old) as tracker:
        tracker.log_metrics({"train_loss": 1.0}, 1)
    (found,) = runs_of(store)[2]
    assert found.info.run_id == tracker.run_id != old and found.info.status == "FINISHED"
    assert f"MLflow run {old} is gone" in capsys.readouterr().err


def test_mlflows_own_variables_count(cpu, digits, tmp_path, store, monkeypatch):
    """The store and the experiment that a launcher names are used, a flag's before them."""
    store.rename(tmp_path / "theirs.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/theirs.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    for config, experiment in ((settings(), "theirs"), (settings(experiment="mine"), "mine")):
        tracker = log_something(config, cpu, digits)
        (found,) = runs_of(tmp_path / "theirs.db", experiment)[2]
        assert found.info.run_id == tracker.run_id
    assert not store.exists()


def test_a_database_may_have_a_quoted_name_and_options(cpu, digits, tmp_path, store):
    """The file that is looked at first is the one that MLflow opens."""
    store.rename(tmp_path / "a b.db")
    uri = f"sqlite:///{tmp_path}/a%20b.db?timeout=3"
    with open_tracker(settings(tracking_uri=uri), cpu) as tracker:
        tracker.log_settings({}, digits)
        assert tracker.database == tmp_path / "a b.db" and not tracker.pending
    assert {path.suffix for path in tmp_path.iterdir()} <= {".db"}


def test_nothing_is_written_when_off_or_not_the_main_process(cpu, digits, tmp_path):
    off, other = settings(mlflow=False), replace(cpu, rank=1, world_size=2)
    for config, runtime in ((off, cpu), (settings(), other)):
        assert log_something(config, runtime, digits).run_id is None
    assert not list(tmp_path.iterdir())


def test_missing_mlflow_is_told(cpu, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    log_something(settings(), cpu, digits)
    assert "pip install mlflow" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_old_mlruns_folder_does_not_matter(cpu, digits, store, tmp_path):
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text("name: Default")
    log_something(settings(), cpu, digits)
    assert len(runs_of(store)[2]) == 1


@pytest.mark.usefixtures("no_served_model")
def test_a_resumed_training_continues_its_run(store, monkeypatch, capsys):
    interrupted(monkeypatch, capsys, *SMALL, "--epochs", "4")
    (found,) = runs_of(store)[2]
    assert found.info.status == "KILLED"
    flags = ["--epochs", 4, "--num-workers", 1, "--resume"]
    assert run(capsys, "--mode", "train", *SMALL, *flags)[0] == 0
    client, _, (again,) = runs_of(store)
    assert (again.info.run_id, again.info.status) == (found.info.run_id, "FINISHED")
    assert steps(client, found.info.run_id) == [1, 2, 3, 4]
    assert again.data.params["num_workers"] == "0" and again.data.tags["resumed_num_workers"] == "1"


def test_a_run_that_sigkill_left_running_is_put_right(cpu, digits, store, monkeypatch):
    """What it has already is not logged twice."""
    from mlflow import MlflowClient

    with monkeypatch.context() as patch:  # nobody tells the store of the end
        patch.setattr(MlflowClient, "set_terminated", lambda *_: None)
        killed = log_something(settings(), cpu, digits)
    assert [found.info.status for found in runs_of(store)[2]] == ["RUNNING"]
    with open_tracker(settings(), cpu, run_id=killed.run_id) as tracker:
        for epoch in (1, 2, 3):
            tracker.log_metrics({"train_loss": 2.0}, epoch)
    client, _, (found,) = runs_of(store)
    assert found.info.status == "FINISHED" and steps(client, killed.run_id) == [0, 1, 2, 3]
    history = client.get_metric_history(killed.run_id, "train/loss")
    assert [each.value for each in history] == [1, 1, 1, 2]


def test_a_resumed_run_logs_its_final_metrics_once(cpu, store):
    run_id = None
    for seconds in (1.0, 2.0):
        with open_tracker(settings(), cpu, run_id=run_id) as tracker:
            tracker.log_metrics({"train_seconds": seconds})
        run_id = tracker.run_id
    history = runs_of(store)[0].get_metric_history(run_id, "time/train_s")
    assert [each.value for each in history] == [1.0]


def request(port, payload):
    """Status and answer of a scoring server."""
    call = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(payload).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(call, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@contextlib.contextmanager
def server(words, port, path, folder):
    """A server of MLflow's, once it answers under `path`."""
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *words, "--port", str(port)],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"PATH": programs, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )
    try:
        for _ in range(240):
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5),
            ):
                break
            time.sleep(0.25)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_run_can_be_served(store, tmp_path, capsys):
    _, _, err = run(capsys, "--mode", "train", *SMALL)
    (line,) = [line for line in err.splitlines() if line.startswith("serve it: ")]
    words = shlex.split(line)
    uri = words[words.index("-m") + 1]
    picture = encoded(noise(300, 200))
    text, port = base64.b64encode(picture).decode(), free_port()
    bad = base64.b64encode(b"no picture").decode()
    start = ["models", "serve", "--env-manager", "local", "-m", uri]
    with server(start, port, "ping", tmp_path) as process:
        good = {"inputs": [text, "data:image/png;base64," + text], "params": {"top_k": 2}}
        status, answer = request(port, good)
        (expected,) = classifier.predict(picture, model_path="digits_model.pth", top_k=2)
        assert status == 200
        assert [each["label"] for each in answer["predictions"]] == [expected.label] * 2
        assert answer["predictions"][0]["top"] == pytest.approx(dict(expected.top), abs=1e-3)
        assert request(port, {"inputs": ["/etc/passwd"]})[0] == 400
        status, answer = request(port, {"inputs": [bad, text]})
        assert status == 200 and "not a picture" in answer["predictions"][0]["error"]
        assert answer["predictions"][1]["label"] == expected.label
        assert request(port, {"inputs": [text], "params": {"top_k": 0}})[0] == 400
        assert request(port, good)[0] == 200 and process.poll() is None


@pytest.mark.slow
def test_a_database_that_finds_no_room(tmp_path, cli):
    import resource

    def room_for_the_model_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (800_000, 800_000))  # a new database takes more

    done = cli("--mode", "train", *SMALL, preexec_fn=room_for_the_model_only)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("cannot log to MLflow") == 1
    assert f"did not take {RECORDS} records" in done.stderr
    assert (tmp_path / "digits_model.pth").exists()


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle(cpu, digits, tmp_path, capsys):
    port = free_port()
    config = settings(tracking_uri=f"http://127.0.0.1:{port}")
    words = ["server", "--workers", "1", "--backend-store-uri", f"sqlite:///{tmp_path}/far.db"]
    with (
        server(words, port, "health", tmp_path) as process,
        open_tracker(config, cpu) as tracker,
    ):
        tracker.log_settings({"run_device": "cpu"}, digits)
        tracker.log_metrics({"train_loss": 1.0}, 1)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        tracker.log_metrics({"train_loss": 0.5}, 2)
    err = capsys.readouterr().err
    assert err.count("cannot log to MLflow") == 1 and "2 records" in err
    client, _, (found,) = runs_of(tmp_path / "far.db")
    assert steps(client, found.info.run_id) == [1]
    assert tracker.run_id == found.info.run_id


@pytest.mark.slow
def test_four_trainings_start_at_once_on_a_new_store(tmp_path):
    command = [sys.executable, ROOT / "classifier.py", "--mode", "train", *SMALL, "--epochs", "1"]
    running = [
        subprocess.Popen(
            [*command, "--model-path", f"{number}.pth"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    errors = [process.communicate(timeout=600)[1] for process in running]
    assert [process.returncode for process in running] == [0] * 4, errors
    found = runs_of(tmp_path / "mlflow.db")[2]
    assert len(found) == 4 and {each.info.status for each in found} == {"FINISHED"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_as_killed_and_says_how_to_continue(tmp_path, store, number):
    command = [sys.executable, ROOT / "classifier.py", "--mode", "train", *SMALL]
    with subprocess.Popen(
        [*command, "--epochs", "2000", "--num-workers", "2"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        for _ in range(4):
            process.stdout.readline()
        os.killpg(process.pid, number)  # as a terminal does: the workers get it too
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and "Traceback" not in err, err
    (line,) = [line for line in err.splitlines() if "continue with: " in line]
    assert [found.info.status for found in runs_of(store)[2]] == ["KILLED"]
    words = shlex.split(line.split("continue with: ")[1])
    assert words[0] == "python" and words[1].endswith("classifier.py") and "--resume" in words
    assert (tmp_path / "digits_model.pth.resume").exists()
