"""MLflow: everything is there, nothing of it can hurt a training."""
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

import classifier
from classifier import Config, DataSettings, RunSettings, TrackingSettings, TrainSettings, default_run_name, open_tracker

LOGGED = [word for word in TINY if word != "--no-mlflow"]


def runs_of(database, experiment="digits"):
    import mlflow
    client = mlflow.MlflowClient(f"sqlite:///{database}")
    found = client.get_experiment_by_name(experiment)
    return client, found, client.search_runs([found.experiment_id], order_by=["attributes.start_time ASC"])


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """One tracked training: folder, client, experiment, run, and what it printed."""
    folder = tmp_path_factory.mktemp("tracked")
    before = os.getcwd()
    os.chdir(folder)
    try:
        from contextlib import redirect_stderr
        from io import StringIO
        with redirect_stderr(StringIO()) as told:
            assert classifier.main(["--mode", "train", *LOGGED, "--seed", "3", "--data-url",
                                    "http://me:hunter2@example.org/x?key=hunter2"]) == 0
    finally:
        os.chdir(before)
    client, experiment, (run,) = runs_of(folder / "mlflow.db")
    return folder, client, experiment, run, told.getvalue()


def test_every_setting_and_every_fact_is_a_parameter(logged):
    params = logged[3].data.params
    assert set(Config().flat()) - {"resume"} <= set(params)
    assert params["seed"] == "3" and params["amp"] == "auto" and params["lr"] == "0.125" and params["tta"] == "True"
    facts = {name for name in params if name.startswith("run_")}
    assert facts >= {"run_effective_batch", "run_amp_dtype", "run_compile", "run_compile_reason", "run_num_workers",
                     "run_pin_memory", "run_persistent_workers", "run_prefetch_factor", "run_non_blocking", "run_device"}
    assert params["run_effective_batch"] == "32" and params["run_num_workers"] == "0"


def test_metrics_of_epochs_have_steps_and_final_ones_none(logged):
    _, client, _, run, _ = logged
    for name in ("test/accuracy", "test/loss", "train/loss", "train/accuracy", "train/lr", "time/epoch_s",
                 "speed/epoch_img_s", "data/epoch_wait_s"):
        assert [metric.step for metric in client.get_metric_history(run.info.run_id, name)][:2] == [1, 2], name
    for name in ("test/accuracy_tta", "time/train_s", "time/eval_s", "speed/train_img_s", "data/wait_s",
                 "memory/peak_mb", "calibration/ece"):
        assert [metric.step for metric in client.get_metric_history(run.info.run_id, name)] == [0], name
    assert 10 < run.data.metrics["test/accuracy"] <= 100                        # percent


def test_final_metrics_do_not_spoil_the_curves(logged):
    _, client, _, run, _ = logged
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "test/accuracy")] == [1, 2]


def test_artifacts_data_set_and_note(logged):
    _, client, _, run, _ = logged
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"confusion_matrix.png", "per_class.json", "digits_model.pth", "classifier.py"} <= names
    inputs = {each.tags[0].value: each.dataset.digest for each in run.inputs.dataset_inputs}
    assert set(inputs) == {"train", "test"} and len(set(inputs.values())) == 2
    assert "--seed 3" in run.data.tags["mlflow.note.content"] and run.info.status == "FINISHED"
    assert run.info.run_name == "w8 b32 e2 s3 n320" and len(run.info.run_name) <= 18


def test_no_password_anywhere(logged):
    folder, _, _, _, told = logged
    assert "hunter2" not in told
    for file in folder.rglob("*"):
        assert not file.is_file() or b"hunter2" not in file.read_bytes(), file


def test_the_end_tells_how_to_compare(logged):
    folder, _, experiment, _, told = logged
    assert f"mlflow ui --backend-store-uri sqlite:///{folder}/mlflow.db" in told
    assert f"#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey=classifier" in told
    assert "test/accuracy" in experiment.tags["mlflow.sharedViewState.classifier"]
    assert experiment.artifact_location == (folder / "mlartifacts").as_uri()
    assert sorted(path.name for path in folder.iterdir()) == ["digits_model.pth", "mlartifacts", "mlflow.db"]


@pytest.mark.parametrize("words,name", [
    ([], "default"), (["--dataset", "digits"], "default"), (["--epochs", "5", "--batch-size", "64"], "b64 e5"),
    (["--no-amp", "--seed", "2"], "noamp s2"), (["--lr", "0.3", "--compile"], "lr0.3 compile")])
def test_run_name_tells_what_differs(words, name):
    assert default_run_name(classifier.parse_config(words)) == name


def settings(**tracking):
    return Config(run=RunSettings(), train=TrainSettings(), data=DataSettings(dataset="digits"),
                  tracking=TrackingSettings(**tracking))


def log_something(config, runtime, tmp_path):
    data = classifier.load_data(DataSettings(dataset="digits", limit_images=20))
    resolved = {"run_device": "cpu"}
    with open_tracker(config, runtime) as tracker:
        tracker.log_settings(resolved, data)
        for epoch in range(3):
            tracker.log_metrics({"train_loss": 1.0, "test_accuracy": 0.5}, epoch)
        tracker.log_outcome("fine", torch.eye(10), dict.fromkeys(data.class_names, 1.0), [])
    return tracker


@pytest.mark.parametrize("uri,seconds", [("http://127.0.0.1:9", 20), ("file:///tmp/x", 20), ("./mlruns", 20),
                                         ("sqlite:////proc/nowhere/mlflow.db", 20), ("nonsense://x", 20)])
def test_a_store_that_fails_is_told_once_and_hurts_nobody(cpu, tmp_path, capsys, uri, seconds):
    started = time.perf_counter()
    log_something(settings(tracking_uri=uri), cpu, tmp_path)
    assert time.perf_counter() - started < seconds
    told = capsys.readouterr().err
    assert told.count("does not take the run") == 1 and "Traceback" not in told and "not logged" in told


def test_a_call_that_failed_is_made_again(cpu, tmp_path, monkeypatch, capsys):
    from mlflow import MlflowClient
    real, broken = MlflowClient.log_batch, [1, 1]

    def unreliable(*args, metrics=(), **more):
        if broken and metrics:
            broken.pop()
            raise ConnectionError("gone for a moment")
        return real(*args, metrics=metrics, **more)
    monkeypatch.setattr(MlflowClient, "log_batch", unreliable)
    tracker = log_something(settings(), cpu, tmp_path)
    client, _, (run,) = runs_of(tmp_path / "mlflow.db")
    assert [each.step for each in client.get_metric_history(tracker.run_id, "train/loss")] == [0, 1, 2]
    assert run.info.status == "FINISHED" and "gone for a moment" in capsys.readouterr().err


@pytest.mark.parametrize("error,status", [(RuntimeError, "FAILED"), (lambda: classifier.Stopped(2), "KILLED"),
                                          (lambda: SystemExit(0), "FAILED")])
def test_the_run_ends_as_the_work_does(cpu, tmp_path, error, status):
    with pytest.raises(BaseException), open_tracker(settings(), cpu) as tracker:     # noqa: B017
        tracker.log_metrics({"train_loss": 1.0}, 1)
        raise error()
    _, _, (run,) = runs_of(tmp_path / "mlflow.db")
    assert run.info.status == status


def test_artifacts_that_cannot_be_stored_do_not_block_the_run(cpu, tmp_path, monkeypatch, capsys):
    from mlflow import MlflowClient

    def refuse(*_, **__):
        raise PermissionError("no credentials")
    monkeypatch.setattr(MlflowClient, "log_figure", refuse)
    log_something(settings(), cpu, tmp_path)
    client, _, (run,) = runs_of(tmp_path / "mlflow.db")
    assert run.info.status == "FINISHED" and "no credentials" in capsys.readouterr().err
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["per_class.json"]


def test_children_fold_under_their_parent(capsys, tmp_path):
    assert classifier.main(["--mode", "train", *LOGGED, "--repeats", "2"]) == 0
    parent, *children = runs_of(tmp_path / "mlflow.db")[2]
    assert [child.data.tags["mlflow.parentRunId"] for child in children] == [parent.info.run_id] * 2
    assert parent.data.metrics["test/accuracy_mean"] == pytest.approx(
        sum(child.data.metrics["test/accuracy"] for child in children) / 2)
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    assert capsys.readouterr().err.count("compare runs") == 1


def test_a_resumed_run_that_is_gone_gets_a_new_one(cpu, tmp_path, capsys):
    with open_tracker(settings(), cpu, run_id="0" * 32) as tracker:
        tracker.log_metrics({"train_loss": 1.0}, 1)
    (run,) = runs_of(tmp_path / "mlflow.db")[2]
    assert run.info.run_id == tracker.run_id != "0" * 32 and "is gone" in capsys.readouterr().err


@pytest.mark.parametrize("uri,path", [("sqlite:////a%20b/m.db?timeout=3", "/a b/m.db"), ("http://host", None)])
def test_sqlite_path(uri, path):
    assert classifier.sqlite_path(uri) == (path and Path(path))


def test_nothing_is_written_when_off_or_not_the_main_process(cpu, tmp_path):
    from dataclasses import replace
    for config, runtime in ((settings(mlflow=False), cpu), (settings(), replace(cpu, rank=1, world_size=2))):
        log_something(config, runtime, tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_mlflow_is_told(cpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    log_something(settings(), cpu, tmp_path)
    assert "pip install mlflow" in capsys.readouterr().err


def test_an_old_mlruns_folder_does_not_matter(cpu, tmp_path):
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text("name: Default")
    log_something(settings(), cpu, tmp_path)
    assert len(runs_of(tmp_path / "mlflow.db")[2]) == 1


def test_a_resumed_training_goes_on_in_its_run(tmp_path, monkeypatch, capsys):
    from test_modes import interrupted
    interrupted(monkeypatch, capsys, *LOGGED, "--epochs", "4")
    client, _, (run,) = runs_of(tmp_path / "mlflow.db")
    assert run.info.status == "KILLED"
    assert classifier.main(["--mode", "train", *LOGGED, "--epochs", "4", "--num-workers", "1", "--resume"]) == 0
    (again,) = runs_of(tmp_path / "mlflow.db")[2]
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")
    assert [each.step for each in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3, 4]
    assert again.data.params["num_workers"] == "0" and again.data.tags["resumed_num_workers"] == "1"


@pytest.mark.slow
def test_four_trainings_start_at_once_on_a_new_store(tmp_path):
    command = [sys.executable, str(ROOT / "classifier.py"), "--mode", "train", *LOGGED, "--epochs", "1"]
    running = [subprocess.Popen([*command, "--model-path", f"{number}.pth"], cwd=tmp_path, stderr=subprocess.PIPE,
                                text=True) for number in range(4)]
    told = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0] * 4, told
    runs = runs_of(tmp_path / "mlflow.db")[2]
    assert len(runs) == 4 and {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_as_killed_and_tells_how_to_go_on(tmp_path, number):
    command = [sys.executable, str(ROOT / "classifier.py"), "--mode", "train", *LOGGED, "--epochs", "2000",
               "--num-workers", "2"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        for _ in range(4):
            process.stdout.readline()
        os.killpg(process.pid, number)                             # as a terminal does: the workers get it too
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and "Traceback" not in told, told
    (line,) = [line for line in told.splitlines() if "go on with: " in line]
    _, _, (run,) = runs_of(tmp_path / "mlflow.db")
    assert run.info.status == "KILLED"
    words = shlex.split(line.split("go on with: ")[1])
    assert words[0] == "python" and words[1].endswith("classifier.py") and "--resume" in words
    assert (tmp_path / "digits_model.pth.resume").exists()
