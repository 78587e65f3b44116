"""Whole runs by `main(argv)`: what they print, write, return, and how they fail."""
import json
import os
import shlex
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT, TINY

import classifier


def run(capsys, *argv):
    code = classifier.main([*map(str, argv)])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def rows(out):
    return [json.loads(line) for line in out.splitlines()]


def test_train_as_json(capsys, tmp_path):
    code, out, err = run(capsys, "--mode", "train", *TINY, "--json")
    first, second, result = rows(out)
    assert code == 0
    assert set(first) == {"event", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "seconds",
                          "images_per_second", "data_wait_seconds"}
    assert (first["event"], first["epoch"], second["epoch"], result["event"]) == ("epoch", 1, 2, "result")
    assert set(result) >= {"test_accuracy", "test_accuracy_tta", "train_seconds", "evaluation_seconds", "total_seconds",
                           "model_path", "run_id"}
    assert result["test_accuracy"] == second["test_accuracy"] and 0 <= result["test_accuracy"] <= 1
    assert result["train_seconds"] == pytest.approx(first["seconds"] + second["seconds"])
    assert os.listdir(tmp_path) == ["digits_model.pth"] and result["model_path"] == "digits_model.pth"
    assert "test accuracy" in err


def test_train_as_text(capsys):
    code, out, err = run(capsys, "--mode", "train", *TINY)
    head, *table, last = out.splitlines()
    assert code == 0 and head.split()[:3] == ["epoch", "train", "loss"] and [row.split()[0] for row in table] == ["1", "2"]
    assert last.endswith("model: digits_model.pth") and "test accuracy" in last and "\r" not in out + err


@pytest.mark.parametrize("flags", [[], ["--no-amp"], ["--no-tta"]])
def test_evaluate_repeats_trains_figures_exactly(capsys, flags):
    result = rows(run(capsys, "--mode", "train", *TINY, *flags, "--json")[1])[-1]
    if "--no-amp" in flags:
        flags = []                      # the model file remembers
    code, out, _ = run(capsys, "--mode", "evaluate", "--dataset", "digits", "--no-mlflow", "--device", "cpu", "--json", *flags)
    (again,) = rows(out)
    assert code == 0
    for name in ("test_accuracy", "test_accuracy_tta", "test_loss", "ece"):
        assert again[name] == result[name], name
    assert set(again) >= {"event", "per_class", "seconds"} and set(again["per_class"]) == set("0123456789")


def test_evaluate_as_text_names_the_classes(capsys, trained):
    code, out, _ = run(capsys, "--mode", "evaluate", "--model-path", trained, "--no-mlflow")
    assert code == 0 and "test accuracy" in out.splitlines()[0] and len(out.splitlines()) == 11


def test_evaluate_refuses_to_call_training_images_held_out(capsys, trained):
    code, _, err = run(capsys, "--mode", "evaluate", "--model-path", trained, "--holdout", 50)
    assert code == 1 and "--holdout 50" in err


def test_evaluate_refuses_another_data_set(capsys, trained):
    saved = torch.load(trained, weights_only=True)
    torch.save(saved | {"dataset": "cifar10"}, "cifar10_model.pth")
    code, _, err = run(capsys, "--mode", "evaluate", "--dataset", "digits", "--model-path", "cifar10_model.pth")
    assert code == 1 and "was trained on cifar10" in err


def weights(path):
    return torch.load(path, weights_only=True)["weights"]


def same(a, b):
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("flags", [["--num-workers", "2"], ["--num-workers", "1", "--mlflow"], ["--json"],
                                   ["--eval-every", "0"]])
def test_same_seed_same_weights(capsys, flags):
    for name, more in (("a.pth", []), ("b.pth", flags), ("c.pth", ["--seed", "1"])):
        assert run(capsys, "--mode", "train", *TINY, "--model-path", name, *more)[0] == 0
    assert same(weights("a.pth"), weights("b.pth")) and not same(weights("a.pth"), weights("c.pth"))


def test_holdout_takes_the_test_sets_place(capsys):
    *epochs, result = rows(run(capsys, "--mode", "train", *TINY, "--holdout", 64, "--json")[1])
    assert "holdout_accuracy" in epochs[0] and "test_accuracy" not in epochs[0]
    assert "holdout_accuracy_tta" in result and not [name for name in result if name.startswith("test_")]


def test_eval_every(capsys):
    *epochs, _ = rows(run(capsys, "--mode", "train", *TINY, "--epochs", 5, "--eval-every", 2, "--json")[1])
    assert ["test_accuracy" in epoch for epoch in epochs] == [False, True, False, True, True]


def test_repeats(capsys):
    *_, first, second, summary = [row for row in rows(run(capsys, "--mode", "train", *TINY, "--repeats", 2, "--json")[1])
                                  if row["event"] != "epoch"]
    assert (first["seed"], second["seed"], summary["event"]) == (0, 1, "summary")
    both = [first["test_accuracy"], second["test_accuracy"]]
    assert summary["test_accuracy_mean"] == pytest.approx(sum(both) / 2)
    assert summary["test_accuracy_std"] == pytest.approx(abs(both[0] - both[1]) / 2 ** 0.5)
    assert first["model_path"] and not second["model_path"]
    assert run(capsys, "--mode", "train", *TINY, "--model-path", "alone.pth")[0] == 0
    assert same(weights("digits_model.pth"), weights("alone.pth"))


def interrupted(monkeypatch, capsys, *argv, after=2):
    """A training that is stopped in the epoch that follows `after`."""
    real, epochs = classifier.train_epoch, []

    def stopping(state, *args):
        if len(epochs) == after:
            raise classifier.Stopped(15)
        epochs.append(state.epoch)
        return real(state, *args)
    with monkeypatch.context() as patch:
        patch.setattr(classifier, "train_epoch", stopping)
        return run(capsys, "--mode", "train", *argv)


def test_resume_ends_bit_for_bit_as_if_nothing_had_happened(capsys, monkeypatch):
    flags = [*TINY, "--epochs", "4", "--model-path"]
    straight = rows(run(capsys, "--mode", "train", *flags, "straight.pth", "--json")[1])
    code, out, err = interrupted(monkeypatch, capsys, *flags, "broken.pth")
    assert code == 143 and not os.path.exists("broken.pth")
    command = shlex.split(err.splitlines()[-1].split("go on with: ")[1])[2:]
    code, out, err = run(capsys, *command, "--json", "--num-workers", "1")       # a harmless change
    assert code == 0 and "going on after epoch 2 of 4" in err
    resumed = rows(out)
    assert [row.get("epoch") for row in resumed] == [3, 4, None]
    for row, expected in zip(resumed, straight[2:]):
        for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "test_accuracy_tta"):
            assert row.get(name) == expected.get(name), name
    assert same(weights("straight.pth"), weights("broken.pth")) and not os.path.exists("broken.pth.resume")


def test_resume_refuses_what_changes_the_mathematics(capsys, monkeypatch):
    interrupted(monkeypatch, capsys, *TINY, after=1)
    for flags, words in ((["--lr", "0.2"], f"--lr was {classifier.TrainSettings.lr}, is 0.2"),
                         (["--limit-images", "300"], "--limit-images"), (["--epochs", "9"], "--epochs was 2, is 9")):
        code, _, err = run(capsys, "--mode", "train", *TINY, *flags, "--resume")
        assert code == 1 and words in err
    assert run(capsys, "--mode", "train", *TINY, "--resume")[0] == 0


def test_resume_with_nothing_or_a_damaged_file(capsys):
    code, _, err = run(capsys, "--mode", "train", *TINY, "--resume")
    assert code == 0 and "training starts afresh" in err
    with open("digits_model.pth.resume", "wb") as file:
        file.write(b"broken")
    before = open("digits_model.pth", "rb").read()
    code, _, err = run(capsys, "--mode", "train", *TINY, "--resume")
    assert code == 1 and "digits_model.pth.resume" in err and open("digits_model.pth", "rb").read() == before
    assert "damaged" in err and "train without --resume" in err.splitlines()[-1]


def test_stopped_after_the_last_epoch(capsys, monkeypatch):
    def full(*_):
        raise classifier.UserError("disk full")
    straight = rows(run(capsys, "--mode", "train", *TINY, "--json", "--model-path", "a.pth")[1])[-1]
    with monkeypatch.context() as patch:
        patch.setattr(classifier, "save_model", full)
        assert run(capsys, "--mode", "train", *TINY)[0] == 1
    *epochs, result = rows(run(capsys, "--mode", "train", *TINY, "--resume", "--json")[1])
    assert not epochs and result["test_accuracy_tta"] == straight["test_accuracy_tta"]


def test_starting_anew_keeps_what_an_interrupted_run_left(capsys, monkeypatch):
    interrupted(monkeypatch, capsys, *TINY, after=1)
    assert "moved to digits_model.pth.resume.old" in run(capsys, "--mode", "train", *TINY)[2]
    assert sorted(os.listdir()) == ["digits_model.pth", "digits_model.pth.resume.old"]


def test_a_failed_training_leaves_the_old_model(capsys, monkeypatch):
    assert run(capsys, "--mode", "train", *TINY)[0] == 0
    before = open("digits_model.pth", "rb").read()
    monkeypatch.setattr(classifier, "orthogonalize", lambda matrix: matrix * float("nan"))
    code, _, err = run(capsys, "--mode", "train", *TINY)
    assert code == 1 and "no longer finite" in err and "--lr" in err and "Traceback" not in err
    assert open("digits_model.pth", "rb").read() == before


def test_two_trainings_on_one_model_path(capsys, monkeypatch):
    real, results = classifier.train_epoch, []

    def meanwhile(*args):
        if not results:
            results.append(None)
            thread = threading.Thread(target=lambda: results.append(classifier.main(["--mode", "train", *TINY])))
            thread.start()
            thread.join()
        return real(*args)
    monkeypatch.setattr(classifier, "train_epoch", meanwhile)
    code, _, err = run(capsys, "--mode", "train", *TINY)
    assert (code, results[1]) == (0, 1) and "another training is writing digits_model.pth" in err


def test_missing_data_is_one_line_with_the_ways_out(capsys, tmp_path):
    code, out, err = run(capsys, "--data-dir", tmp_path / "none", "--data-url", "http://127.0.0.1:9/x", "--no-mlflow")
    assert code == 1 and not out and "Traceback" not in err
    assert err.splitlines()[-1].startswith("classifier.py: CIFAR-10 is not to be had") and "--dataset digits" in err


def test_absent_device(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run(capsys, "--device", "cuda", "--dataset", "digits")
    assert (code, out, len(err.splitlines())) == (1, "", 1) and "--device cuda" in err


def test_out_of_memory_names_the_flags_that_help(capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(classifier, "train_epoch", full)
    code, _, err = run(capsys, "--mode", "train", *TINY)
    assert code == 1 and "--batch-size 16 --accumulate-grad-steps 2" in err and "Traceback" not in err


def test_full_disk_or_missing_rights_are_one_line(capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "some/file")
    monkeypatch.setattr(classifier, "train_epoch", full)
    code, _, err = run(capsys, "--mode", "train", *TINY)
    assert code == 1 and err.splitlines()[-1] == "classifier.py: some/file: No space left on device"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(*_):
        raise KeyError("a bug")
    monkeypatch.setattr(classifier, "train_epoch", broken)
    with pytest.raises(KeyError):
        classifier.main(["--mode", "train", *TINY])


def test_predict_and_benchmark_refuse_several_processes(capsys, monkeypatch, cpu):
    from contextlib import contextmanager
    from dataclasses import replace

    @contextmanager
    def two(_):
        yield replace(cpu, world_size=2)
    monkeypatch.setattr(classifier, "open_runtime", two)
    code, _, err = run(capsys, "--mode", "predict", "--image", "x.png")
    assert code == 1 and "one process" in err


def test_tiny_cifar_from_end_to_end(capsys, tiny_cifar):
    code, out, err = run(capsys, "--mode", "train", "--data-dir", tiny_cifar, "--width", 4, "--epochs", 2, "--batch-size",
                         16, "--no-mlflow", "--num-workers", 0)
    assert code == 0, err
    assert "airplane" in run(capsys, "--mode", "evaluate", "--data-dir", tiny_cifar, "--no-mlflow")[1]


def work_by_clock(order, now, **seconds):
    """Cases that take the given seconds, one after the other, on a clock of their own."""
    def case(name, steps):
        return lambda: (order.append(name), now.__setitem__(0, now[0] + next(steps)))
    return {name: case(name, iter(steps)) for name, steps in seconds.items()}


def test_measure_takes_turns_and_each_round_starts_with_another():
    now, order = [0.0], []
    cases = work_by_clock(order, now, a=(100, 1, 2), b=(50, 3, 4))
    found = classifier.measure(cases, 2, lambda: order.append("|"), lambda: now[0])
    assert found == {"a": [100, 1, 2], "b": [50, 3, 4]} and "".join(order) == "|a||b||b||a||a||b|"


def test_measure_ends_early_where_rounds_take_long():
    now = [0.0]
    found = classifier.measure(work_by_clock([], now, a=[30] * 9), 8, lambda: None, lambda: now[0], limit=100)
    assert found == {"a": [30] * 4}                                 # the warm-up and three rounds, though 120 > 100


def test_figures_of_a_row():
    seconds = {"baseline": [9.0, 1.0, 2.0, 4.0], "faster": [8.0, 0.5, 1.0, 2.0]}
    row = classifier.benchmark_rows("training", "training", seconds, images=100)[1]
    assert (row["ratio"], row["value"], row["unit"], row["first"], row["rounds"]) == (2, 100, "images/s", 12.5, 3)
    assert (row["p10"], row["p90"]) == pytest.approx((60, 180))     # between 50, 100 and 200
    single = classifier.benchmark_rows("inference", "photo", seconds, images=1)[1]
    assert (single["value"], single["unit"], single["ratio"], single["first"]) == (1000, "ms", 2, 8000)


def test_benchmark_leaves_out_what_does_not_work_here(cpu):
    from dataclasses import replace
    bf16 = replace(cpu, amp_dtype=torch.bfloat16)

    def names(run, runtime):
        return {case.name: case.chosen for case in classifier.benchmark_cases(run, runtime)}
    full = names(classifier.RunSettings(), bf16)
    assert [*full] == ["baseline", "baseline_again", "data_loading", "channels_last", "mixed_precision", "compile",
                       "combined", "everything"]
    assert "compile" not in full["combined"] and set(full["everything"]) == set(classifier.OPTIMIZATIONS)
    assert "mixed_precision" not in names(classifier.RunSettings(), cpu)
    assert not {"compile", "everything"} & set(names(classifier.RunSettings(compile=False), bf16))


def test_benchmark_table_and_figure(cpu):
    rows = [row for measured in classifier.MEASURES for row in classifier.benchmark_rows(
        "x", measured, {"baseline": [1, 1.0, 1.0], "baseline_again": [1, 1.0, 1.25], "combined": [1, 0.5, 0.5]},
        1 if "photo" in measured else 100)]
    rows = [row | {"peak_memory_mb": {"baseline": 200.0, "combined": 100.0}.get(row["name"])} for row in rows]
    checks = [{"name": "predict", "passed": False}, {"name": "compiled", "passed": True}]
    head, rule, *lines, last = [line for line in classifier.benchmark_table(
        rows, checks, classifier.Config(), cpu.device).splitlines() if line]
    assert {line.count("|") for line in (head, rule, *lines)} == {9} and head.startswith("| Configuration | Training |")
    assert lines[2] == ("| combined | 2.00x (200/s) | 2.00x (200/s) | 2.00x (500.0 ms) | 2.00x (500.0 ms) | 2.00x (200/s) "
                        "| 2.00x (200/s) | 0.50x (100 MB) |")
    assert "differs by up to 10.00 %" in last and "FAILED: predict." in last and "python" in last
    panels = classifier.benchmark_figure(rows).axes
    assert [axes.get_title() for axes in panels] == [title for title, _ in classifier.MEASURES.values()]
    assert [round(bar.get_width(), 2) for bar in panels[0].patches] == [1, 0.9, 2]


def test_the_measured_photo_is_one(tmp_path):
    from PIL import Image
    classifier.save_photo(tmp_path / "photo.jpg", 500, 375)
    with Image.open(tmp_path / "photo.jpg") as photo:
        assert photo.size == (500, 375) and (tmp_path / "photo.jpg").stat().st_size > 20_000
        assert sum(photo.convert("L").histogram()[64:192]) > 0.5 * 500 * 375 and len(set(photo.getdata())) > 10_000


def test_peak_memory_is_this_process_own():
    """A child's figure must not start at the size of the parent that started it, as getrusage's does."""
    code = ("import subprocess, sys, numpy; grown = numpy.ones(1_000_000_000, dtype=numpy.uint8); print(subprocess.run("
            "[sys.executable, '-c', 'import torch, classifier; "
            "print(classifier.Runtime(torch.device(\"cpu\")).peak_memory_mb())'], text=True, capture_output=True).stdout)")
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert 50 < float(done.stdout) < 900, done.stderr


@pytest.mark.slow
def test_benchmark(cli, tmp_path):
    done = cli("--mode", "benchmark", "--dataset", "digits", "--width", 16, "--json", timeout=900)
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    checks = {row["name"]: row["passed"] for row in found if row["event"] == "check"}
    assert checks == {"accumulation": True, "compiled": True, "mixed_precision": True, "predict": True}
    keys = {"event", "area", "measure", "name", "value", "unit", "p10", "p90", "p95", "first", "ratio", "peak_memory_mb"}
    measured = [row for row in found if row["event"] == "benchmark"]
    assert all(keys <= set(row) and row["p10"] <= row["value"] <= row["p90"] for row in measured)
    training = {row["name"]: row for row in measured if row["area"] == "training"}
    assert {"baseline", "baseline_again", "data_loading", "channels_last", "compile", "combined"} <= set(training)
    assert all(row["peak_memory_mb"] > 100 for row in training.values()) and training["compile"]["compile_seconds"] > 0
    assert {row["measure"] for row in measured} == set(classifier.MEASURES)
    assert "| baseline again |" in done.stderr and "Self-checks: all passed" in done.stderr
    assert "recompile_limit" not in done.stderr
    assert (tmp_path / "digits_benchmark.png").stat().st_size > 10_000
    import mlflow
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    *children, parent = client.search_runs([client.get_experiment_by_name("digits").experiment_id],
                                           order_by=["attributes.start_time DESC"])
    assert {run.info.run_name for run in children} == {name.replace("_", " ") for name in training}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    by_name = {run.info.run_name: run.data for run in children}
    assert by_name["baseline"].params["run_memory_format"] == "contiguous" != by_name["combined"].params["run_memory_format"]
    assert by_name["combined"].metrics["speed/train_img_s"] == pytest.approx(training["combined"]["value"], rel=1e-4)
    assert {"ratio/training", "infer/photo_ms", "memory/peak_mb"} <= set(by_name["combined"].metrics)
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"benchmark.md", "benchmark.png"}


@pytest.mark.slow
def test_digits_in_full_are_learned(cli):
    done = cli("--mode", "train", "--dataset", "digits", "--json", "--no-mlflow")
    assert done.returncode == 0 and rows(done.stdout)[-1]["test_accuracy"] > 0.97


@pytest.mark.slow
def test_one_epoch_on_the_real_images(cli, real_cifar):
    done = cli("--mode", "train", "--data-dir", real_cifar, "--epochs", 1, "--limit-images", 12800, "--json", "--no-mlflow")
    assert done.returncode == 0 and rows(done.stdout)[-1]["test_accuracy"] > 0.4
