"""MLflow: everything is there, nothing of it can hurt a training."""
import base64
import contextlib
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

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
    assert params["seed"] == "3" and params["amp"] == "auto" and params["tta"] == "True"
    assert params["lr"] == str(TrainSettings.lr)
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
    assert 1 < run.data.metrics["test/accuracy"] <= 100                        # percent


def test_final_metrics_do_not_spoil_the_curves(logged):
    _, client, _, run, _ = logged
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "test/accuracy")] == [1, 2]


def test_artifacts_data_set_and_note(logged):
    _, client, _, run, _ = logged
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert names == {"confusion_matrix.png", "per_class.json"}
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
    assert f"#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey=train" in told
    assert "test/accuracy" in experiment.tags["mlflow.sharedViewState.train"]
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
        tracker.log_outcome("fine", classifier.evaluation_files(torch.eye(10), data.class_names, dict.fromkeys(data.class_names, 1.0)))
    return tracker


@pytest.mark.parametrize("uri,seconds", [("http://127.0.0.1:9", 20), ("file:///tmp/x", 20), ("./mlruns", 20),
                                         ("sqlite:////proc/nowhere/mlflow.db", 20), ("nonsense://x", 20)])
def test_a_store_that_fails_is_told_once_and_hurts_nobody(cpu, tmp_path, capsys, uri, seconds):
    started = time.perf_counter()
    log_something(settings(tracking_uri=uri), cpu, tmp_path)
    assert time.perf_counter() - started < seconds
    told = capsys.readouterr().err
    assert told.count("does not take the run") == 1 and "Traceback" not in told
    assert "they are in digits_model.pth.unlogged.jsonl" in told
    kept = [json.loads(line) for line in (tmp_path / "digits_model.pth.unlogged.jsonl").read_text().splitlines()]
    assert [each["log"] for each in kept] == ["start", "settings", "data", *["metrics"] * 3, "note", "files", "status"]
    assert kept[4]["values"] == {"test/accuracy": 50.0, "train/loss": 1.0} and kept[4]["step"] == 1
    assert kept[1]["params"]["run_device"] == "cpu" and kept[-1]["status"] == "FINISHED"
    assert kept[-2]["files"] == {"confusion_matrix.png": "not kept", "per_class.json": "not kept"}


def test_a_store_that_hangs_is_waited_for_so_long_and_no_longer(cpu, tmp_path, monkeypatch, capsys):
    from mlflow import MlflowClient
    release = threading.Event()
    monkeypatch.setattr(classifier, "TRACKING_PATIENCE", 0.2)
    monkeypatch.setattr(classifier, "CLOSING_PATIENCE", 0.2)
    monkeypatch.setattr(MlflowClient, "log_inputs", lambda *_: release.wait(60))
    started = time.perf_counter()
    tracker = log_something(settings(), cpu, tmp_path)
    assert time.perf_counter() - started < 10 and "no answer for 0.2 s" in capsys.readouterr().err
    assert (tmp_path / "digits_model.pth.unlogged.jsonl").exists()
    release.set()
    tracker.courier.join(60)                                        # what comes late is stored all the same
    assert [run.info.status for run in runs_of(tmp_path / "mlflow.db")[2]] == ["FINISHED"]


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


def test_a_run_whose_creation_was_not_answered_is_not_made_twice(cpu, tmp_path, monkeypatch):
    from mlflow import MlflowClient
    real, lost = MlflowClient.create_run, [1]

    def unanswered(*args, **more):
        run = real(*args, **more)
        if lost:
            lost.pop()
            raise ConnectionError("the answer is lost")
        return run
    monkeypatch.setattr(MlflowClient, "create_run", unanswered)
    log_something(settings(), cpu, tmp_path)
    assert [run.info.status for run in runs_of(tmp_path / "mlflow.db")[2]] == ["FINISHED"]


def test_a_deleted_experiment_comes_back(cpu, tmp_path, capsys):
    log_something(settings(), cpu, tmp_path)
    client, experiment, _ = runs_of(tmp_path / "mlflow.db")
    client.delete_experiment(experiment.experiment_id)
    log_something(settings(), cpu, tmp_path)
    assert len(runs_of(tmp_path / "mlflow.db")[2]) == 2 and "gone" not in capsys.readouterr().err


def test_a_signal_while_waiting_for_the_store_loses_and_doubles_nothing(cpu, tmp_path, monkeypatch):
    from mlflow import MlflowClient
    real = MlflowClient.create_run

    def slow(*args, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        return real(*args, **more)
    monkeypatch.setattr(MlflowClient, "create_run", slow)
    with pytest.raises(classifier.Stopped), classifier.stop_signals():
        log_something(settings(), cpu, tmp_path)
    (run,) = runs_of(tmp_path / "mlflow.db")[2]
    assert run.info.status == "KILLED" and run.data.params["run_device"] == "cpu"
    assert not list(tmp_path.glob("*.jsonl"))


def test_runs_have_colours_of_their_own_and_a_group_without_the_seed(cpu, tmp_path):
    from dataclasses import replace
    for seed, epochs in ((0, 20), (1, 20), (0, 5)):
        config = settings()
        log_something(replace(config, run=RunSettings(seed=seed), train=TrainSettings(epochs=epochs)), cpu, tmp_path)
    tags = [run.data.tags for run in runs_of(tmp_path / "mlflow.db")[2]]
    assert len({each["mlflow.runColor"] for each in tags}) == 3
    assert tags[0]["group"] == tags[1]["group"] != tags[2]["group"]


def test_system_metrics(cpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    with open_tracker(settings(system_metrics=True), cpu) as tracker:
        tracker.log_metrics({"train_loss": 1.0}, 1)
        time.sleep(1)
    (run,) = runs_of(tmp_path / "mlflow.db")[2]
    assert "system/cpu_utilization_percentage" in run.data.metrics and run.info.status == "FINISHED"


@pytest.mark.parametrize("asked", [False, True])
def test_system_metrics_without_psutil(cpu, tmp_path, monkeypatch, capsys, asked):
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")         # a user's shell must not break the run
    monkeypatch.setitem(sys.modules, "psutil", None)
    for name in [name for name in sys.modules if name.startswith("mlflow.system_metrics.")]:
        monkeypatch.delitem(sys.modules, name)
    log_something(settings(system_metrics=asked), cpu, tmp_path)
    (run,) = runs_of(tmp_path / "mlflow.db")[2]
    assert run.info.status == "FINISHED" and ("pip install psutil" in capsys.readouterr().err) == asked


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
        sum(child.data.metrics["test/accuracy"] for child in children) / 2, abs=1e-3)
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    assert "2 seeds: " in parent.data.tags["mlflow.note.content"]
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


def test_a_run_that_sigkill_left_running_is_put_right(tmp_path, monkeypatch, capsys):
    from mlflow import MlflowClient
    from test_modes import interrupted
    with monkeypatch.context() as patch:                            # nobody tells the store of the end
        patch.setattr(MlflowClient, "set_terminated", lambda *_: None)
        interrupted(monkeypatch, capsys, *LOGGED, "--epochs", "4")
    assert runs_of(tmp_path / "mlflow.db")[2][0].info.status == "RUNNING"
    assert classifier.main(["--mode", "train", *LOGGED, "--epochs", "4", "--resume"]) == 0
    assert [run.info.status for run in runs_of(tmp_path / "mlflow.db")[2]] == ["FINISHED"]


def request(port, payload):
    """Status and answer of a scoring server."""
    call = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", json.dumps(payload).encode(),
                                  {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(call, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def server(words, port, path, folder):
    """A server of MLflow's, once it answers under `path`."""
    process = subprocess.Popen([sys.executable, "-m", "mlflow", *words, "--port", str(port)], cwd=folder,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                               env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                                                 "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5):
                break
            time.sleep(0.25)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_run_can_be_served(tmp_path, capsys):
    classifier.main(["--mode", "train", *LOGGED])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("serve it: ")]
    words = shlex.split(line)
    uri = words[words.index("-m") + 1]
    picture = io.BytesIO()
    Image.effect_noise((300, 200), 80).save(picture, "PNG")
    text, port = base64.b64encode(picture.getvalue()).decode(), free_port()
    with server(["models", "serve", "--env-manager", "local", "-m", uri], port, "ping", tmp_path) as process:
        good = {"inputs": [text, "data:image/png;base64," + text], "params": {"top_k": 2}}
        status, answer = request(port, good)
        expected = classifier.predict(picture.getvalue(), model_path="digits_model.pth", top_k=2)[0]
        assert status == 200 and [each["label"] for each in answer["predictions"]] == [expected.label] * 2
        assert answer["predictions"][0]["top"] == pytest.approx(dict(expected.top), abs=1e-3)
        assert request(port, {"inputs": ["/etc/passwd"]})[0] == 400
        status, answer = request(port, {"inputs": [base64.b64encode(b"no picture").decode(), text]})
        assert status == 200 and "not a picture" in answer["predictions"][0]["error"]
        assert answer["predictions"][1]["label"] == expected.label
        assert request(port, {"inputs": [text], "params": {"top_k": 0}})[0] == 400
        started = time.perf_counter()
        assert request(port, good)[0] == 200 and process.poll() is None
        assert time.perf_counter() - started < 1


@pytest.mark.slow
def test_a_full_disk_costs_the_tracking_and_not_the_training(tmp_path):
    import resource

    def room_for_the_model_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (800_000, 800_000))          # a new database takes more
    done = subprocess.run([sys.executable, str(ROOT / "classifier.py"), "--mode", "train", *LOGGED], cwd=tmp_path,
                          capture_output=True, text=True, preexec_fn=room_for_the_model_only)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("does not take the run") == 1 and (tmp_path / "digits_model.pth").exists()
    kept = [json.loads(line) for line in (tmp_path / "digits_model.pth.unlogged.jsonl").read_text().splitlines()]
    assert [each["log"] for each in kept].count("metrics") == 3


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle(cpu, tmp_path, capsys):
    port = free_port()
    data = classifier.load_data(DataSettings(dataset="digits", limit_images=20))
    config = settings(tracking_uri=f"http://127.0.0.1:{port}")
    with server(["server", "--workers", "1", "--backend-store-uri", f"sqlite:///{tmp_path}/far.db"], port, "health",
                tmp_path) as process:
        with open_tracker(config, cpu) as tracker:
            tracker.log_settings({"run_device": "cpu"}, data)
            tracker.log_metrics({"train_loss": 1.0}, 1)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            started = time.perf_counter()
            tracker.log_metrics({"train_loss": 0.5}, 2)
            assert time.perf_counter() - started < 11
    told = capsys.readouterr().err
    assert told.count("does not take the run") == 1 and "2 records" in told
    client, _, (run,) = runs_of(tmp_path / "far.db")
    assert [each.step for each in client.get_metric_history(run.info.run_id, "train/loss")] == [1]
    kept = [json.loads(line) for line in (tmp_path / "digits_model.pth.unlogged.jsonl").read_text().splitlines()]
    assert [(each["log"], each["run_id"]) for each in kept] == [("metrics", run.info.run_id), ("status", run.info.run_id)]


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
