"""Whole runs by `main(argv)`: what they print, write, return, and how they fail."""

import errno
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, interrupted, noise, rows, run, runs_of, same, weights
from PIL import Image

import classifier
from classifier import Benchmark

EVALUATE = ["--mode", "evaluate", "--no-mlflow", "--device", "cpu", "--model-path"]
LITTLE = [*TINY, "--limit-images", "128", "--no-amp"]
TRAIN = ["--mode", "train", *LITTLE, "--epochs", "1"]
EPOCH = """event epoch train_loss train_accuracy test_loss test_accuracy lr seconds
    images_per_second data_wait_seconds"""
RESULT = """event test_accuracy test_accuracy_tta test_loss ece temperature train_seconds
    evaluation_seconds compile_seconds train_images_per_second data_wait skipped_updates
    peak_memory_mb total_seconds seed run_id model_path"""


def last_line(err):
    """What the program says in the end; it must not be a traceback."""
    assert "Traceback" not in err
    return err.splitlines()[-1]


def test_train_as_json(capsys, tmp_path):
    code, out, err = run(capsys, "--mode", "train", *LITTLE, "--json")
    first, second, result = rows(out)
    assert code == 0 and set(first) == set(EPOCH.split()) and set(result) == set(RESULT.split())
    assert [each["event"] for each in (first, second, result)] == ["epoch", "epoch", "result"]
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert result["test_accuracy"] == second["test_accuracy"] and 0 <= result["test_accuracy"] <= 1
    assert result["train_seconds"] == pytest.approx(first["seconds"] + second["seconds"])
    assert os.listdir(tmp_path) == ["digits_model.pth"]
    assert result["model_path"] == "digits_model.pth" and "test accuracy" in err


def test_train_as_text(capsys):
    code, out, err = run(capsys, "--mode", "train", *LITTLE)
    head, *table, last = out.splitlines()
    assert code == 0 and head.split()[:3] == ["epoch", "train", "loss"]
    assert [row.split()[0] for row in table] == ["1", "2"] and "test accuracy" in last
    assert last.endswith("model: digits_model.pth") and "\r" not in out + err


@pytest.mark.parametrize("flags", [[], ["--no-tta"]])
def test_evaluate_repeats_trains_figures_exactly(capsys, flags):
    result = rows(run(capsys, *TRAIN, *flags, "--json")[1])[-1]
    code, out, _ = run(capsys, *EVALUATE, "digits_model.pth", "--json", *flags)
    (again,) = rows(out)
    assert code == 0
    for name in ("test_accuracy", "test_accuracy_tta", "test_loss", "ece", "temperature"):
        assert again[name] == result[name], name
    assert set(again["per_class"]) == set("0123456789") and again["seconds"] > 0


def test_evaluate_as_text_names_the_classes(capsys, trained):
    code, out, _ = run(capsys, *EVALUATE, trained)
    head, *classes, confused = out.splitlines()
    assert code == 0 and "test accuracy" in head and "64 images" in head
    assert confused.startswith("  most confused: ")
    assert [line.split()[0] for line in classes] == list("0123456789")


def test_limit_images_0_undoes_the_models_limit(capsys, trained):
    """The model was trained with --limit-images 320."""
    code, out, _ = run(capsys, *EVALUATE, trained, "--limit-images", 0)
    assert code == 0 and "359 images" in out.splitlines()[0]


@pytest.mark.parametrize("asked,own", [("cifar10", "digits"), ("digits", "cifar10")])
def test_evaluate_refuses_another_data_set(capsys, trained, asked, own):
    saved = torch.load(trained, weights_only=True)
    torch.save(saved | {"dataset": own}, "other.pth")
    code, out, err = run(capsys, *EVALUATE, "other.pth", "--dataset", asked)
    assert (code, out) == (1, "")
    assert last_line(err) == f"classifier.py: --dataset {asked}: other.pth was trained on {own}"


def test_evaluate_refuses_other_classes(capsys, trained):
    saved = torch.load(trained, weights_only=True)
    torch.save(saved | {"class_names": list("abcdefghij")}, "other.pth")
    code, _, err = run(capsys, *EVALUATE, "other.pth")
    assert code == 1 and "has other classes" in last_line(err)


def save_pictures(folder, count):
    """A data set of two classes with `count` pictures each, all different."""
    for number, name in enumerate(("bright", "dark")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for picture in range(count):
            pixels = np.full((40, 60, 3), 200 - 150 * number + picture, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{picture}.png")


FOLDER = [*TINY, "--dataset", "pictures", "--limit-images", 0, "--epochs", 1, "--batch-size", 8]
FOLDER += ["--no-amp"]


def test_evaluate_holdout_measures_what_was_held_out_only(capsys):
    """Other flags than in training would hold out images that were trained on."""
    epoch, result = rows(run(capsys, *TRAIN, "--holdout", 60, "--json")[1])
    assert "holdout_accuracy" in epoch and "holdout_accuracy_tta" in result
    assert not [name for name in {**epoch, **result} if name.startswith("test_")]
    code, out, _ = run(capsys, *EVALUATE, "digits_model.pth", "--holdout", 60)
    assert code == 0 and "holdout accuracy" in out and "60 images" in out
    for flags in (["--holdout", 60, "--limit-images", 700], ["--holdout", 50]):
        code, out, err = run(capsys, *EVALUATE, "digits_model.pth", *flags)
        assert (code, out) == (1, "") and "was not trained on the" in last_line(err)


def test_evaluate_holdout_of_a_folder_that_grew_is_refused(capsys, tmp_path):
    """One more picture draws another holdout."""
    save_pictures(tmp_path / "pictures", 12)
    holdout = ["--holdout", 6]
    code, out, _ = run(capsys, "--mode", "train", *FOLDER, *holdout)
    assert code == 0 and "  most confused: " in out
    code, out, _ = run(capsys, *EVALUATE, "pictures_model.pth", *holdout)
    assert code == 0 and "letterbox" in out.splitlines()[1] and "squares" in out.splitlines()[1]
    noise(50, 40).save(tmp_path / "pictures" / "dark" / "new.png")
    code, _, err = run(capsys, *EVALUATE, "pictures_model.pth", *holdout)
    assert code == 1 and "was not trained on" in last_line(err)


def test_init_from_a_model_that_saw_the_holdout_is_refused(capsys):
    """The same data set without --holdout; with it, all is well."""
    for name, flags in (("full.pth", []), ("part.pth", ["--holdout", 60])):
        assert run(capsys, *TRAIN, "--model-path", name, *flags)[0] == 0
    code, _, err = run(capsys, *TRAIN, "--init-from", "full.pth", "--holdout", 60)
    assert code == 1 and "may have been trained on images of --holdout 60" in last_line(err)
    assert run(capsys, *TRAIN, "--init-from", "part.pth", "--holdout", 60)[0] == 0
    assert run(capsys, *TRAIN, "--init-from", "full.pth")[0] == 0


def test_same_seed_same_weights(capsys):
    """However the images are loaded and whatever is reported; another seed, other weights."""
    flags = ["--num-workers", 2, "--json", "--eval-every", 0, "--no-tta"]
    for name, more in (("a.pth", []), ("new/b.pth", flags), ("c.pth", ["--seed", 1])):
        assert run(capsys, "--mode", "train", *LITTLE, "--model-path", name, *more)[0] == 0
    assert same(weights("a.pth"), weights("new/b.pth"))
    assert not same(weights("a.pth"), weights("c.pth"))


def test_eval_every(capsys):
    flags = ["--epochs", 5, "--eval-every", 2, "--json"]
    *epochs, _ = rows(run(capsys, "--mode", "train", *LITTLE, *flags)[1])
    assert ["test_accuracy" in epoch for epoch in epochs] == [False, True, False, True, True]


def test_time_left_counts_evaluations(capsys, monkeypatch):
    real, clock, late = classifier.evaluate, time.perf_counter, []

    def slow(*arguments):
        late.append(1000)
        return real(*arguments)

    monkeypatch.setattr(classifier.time, "perf_counter", lambda: clock() + sum(late))
    monkeypatch.setattr(classifier, "evaluate", slow)
    _, out, _ = run(capsys, "--mode", "train", *LITTLE, "--start-size", 32)
    assert "0:16:40" <= out.splitlines()[1].split()[-1] < "0:18:00"


def test_repeats(capsys):
    _, out, err = run(capsys, *TRAIN, "--repeats", 2, "--json")
    found = rows(out)
    first, second, summary = [row for row in found if row["event"] != "epoch"]
    assert (first["seed"], second["seed"], summary["event"]) == (0, 1, "summary")
    both = [first["test_accuracy"], second["test_accuracy"]]
    assert summary["test_accuracy_mean"] == pytest.approx(sum(both) / 2)
    assert summary["test_accuracy_std"] == pytest.approx(abs(both[0] - both[1]) / 2**0.5)
    assert first["model_path"] and not second["model_path"] and err.count("; model: ") == 1
    assert run(capsys, *TRAIN, "--model-path", "alone.pth")[0] == 0
    assert same(weights("digits_model.pth"), weights("alone.pth"))


def test_repeats_do_not_replace_the_model_that_they_start_from(capsys):
    """The second seed would start from the first one's result."""
    assert run(capsys, *TRAIN)[0] == 0
    flags = ["--repeats", 2, "--init-from", "./digits_model.pth"]
    code, _, err = run(capsys, *TRAIN, *flags)
    assert code == 1 and "would replace it; use --model-path" in last_line(err)
    assert run(capsys, *TRAIN, *flags, "--model-path", "new.pth")[0] == 0


@pytest.mark.parametrize("flags", [[], ["--repeats", 2]])
def test_a_model_that_finds_no_place_goes_elsewhere(capsys, monkeypatch, tmp_path_factory, flags):
    """The exit code is 1, with --repeats as well."""
    real = classifier.save_model

    def full(path, *content):
        if path.name == str(path):
            raise classifier.UserError(f"{path} could not be written: No space left on device")
        real(path, *content)

    monkeypatch.setattr(classifier, "save_model", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("elsewhere")))
    code, out, err = run(capsys, *TRAIN, *flags, "--json")
    path = next(row["model_path"] for row in rows(out) if row["event"] == "result")
    assert code == 1 and f"the model is in {path}" in err and "--resume saves the model" in err
    assert classifier.load_model(Path(path)).dataset == "digits"
    assert os.listdir() == ["digits_model.pth.resume"]


def test_resume_ends_bit_for_bit_as_if_nothing_had_happened(capsys, monkeypatch):
    flags = [*LITTLE, "--epochs", "4", "--model-path"]
    straight = rows(run(capsys, "--mode", "train", *flags, "straight.pth", "--json")[1])
    code, out, err = interrupted(monkeypatch, capsys, *flags, "broken.pth")
    assert code == 143 and not os.path.exists("broken.pth")
    command = shlex.split(last_line(err).split("continue with: ")[1])[2:]
    code, out, err = run(capsys, *command, "--json", "--num-workers", "1")  # a harmless change
    assert code == 0 and "continuing after epoch 2 of 4" in err
    resumed = rows(out)
    assert [row.get("epoch") for row in resumed] == [3, 4, None]
    losses = ["train_loss", "train_accuracy", "test_loss"]
    names = [*losses, "test_accuracy", "test_accuracy_tta", "lr"]
    for row, expected in zip(resumed, straight[2:], strict=True):
        assert [row.get(name) for name in names] == [expected.get(name) for name in names]
    assert same(weights("straight.pth"), weights("broken.pth"))
    assert not os.path.exists("broken.pth.resume")


def test_resume_refuses_what_changes_the_mathematics(capsys, monkeypatch):
    interrupted(monkeypatch, capsys, *LITTLE, after=1)
    for flags, words in (
        (["--lr", "0.2"], "--lr was auto, is 0.2"),
        (["--limit-images", "300"], "--limit-images was 128, is 300"),
        (["--epochs", "9"], "--epochs was 2, is 9"),
        (["--momentum", "0.5"], "--momentum was 0.9367, is 0.5"),
        (["--amp"], "--amp was None, is torch.bfloat16"),
    ):
        code, out, err = run(capsys, "--mode", "train", *LITTLE, *flags, "--resume")
        assert code == 1 and not out and words in last_line(err)


def test_resume_of_a_run_that_differed_elsewhere_is_refused(capsys, monkeypatch):
    """In its images, its processes, or what `auto` became."""
    interrupted(monkeypatch, capsys, *LITTLE, after=1)
    saved = torch.load("digits_model.pth.resume", weights_only=True)
    saved["settings"] |= {"device": "cuda", "amp": "torch.float16", "nproc_per_node": 2}
    saved["settings"]["init_from"] = "/x.pth"
    torch.save(saved | {"digest": "another"}, "digits_model.pth.resume")
    code, _, err = run(capsys, "--mode", "train", *LITTLE, "--resume")
    assert code == 1 and "different training images; " in last_line(err)
    for change in (
        "--device was cuda, is cpu",
        "--amp was torch.float16, is None",
        "--nproc-per-node was 2, is 1",
        "--init-from was /x.pth, is auto",
    ):
        assert change in last_line(err)


def test_resume_passes_what_is_harmless(capsys, monkeypatch, tmp_path):
    """Only reports differ, and the same paths are written differently."""
    save_pictures(tmp_path / "pictures", 6)
    assert run(capsys, "--mode", "train", *FOLDER, "--model-path", "from.pth")[0] == 0
    start = [*FOLDER, "--epochs", 3, "--init-from", "from.pth", "--limit-images", "auto"]
    interrupted(monkeypatch, capsys, *start, after=1)
    flags = ["--dataset", f"{tmp_path}/pictures/", "--init-from", tmp_path / "from.pth", "--no-amp"]
    flags += ["--model-path", "./pictures_model.pth", "--limit-images", 0, "--num-workers", 1]
    flags += ["--no-tta", "--system-metrics", "--eval-every", 2, "--json", "--resume"]
    code, out, err = run(capsys, "--mode", "train", *start, *flags)
    assert code == 0 and "continuing after epoch 1 of 3" in err
    assert [row.get("epoch") for row in rows(out)] == [2, 3, None]


def test_resume_with_nothing_or_a_damaged_file(capsys):
    code, _, err = run(capsys, *TRAIN, "--resume")
    assert code == 0 and "training starts from the beginning" in err
    before = Path("digits_model.pth").read_bytes()
    Path("digits_model.pth.resume").write_bytes(b"broken")
    code, _, err = run(capsys, *TRAIN, "--resume")
    assert code == 1 and Path("digits_model.pth").read_bytes() == before
    assert "digits_model.pth.resume is damaged" in last_line(err)
    assert "train without --resume" in last_line(err)
    Path("digits_model.pth.resume").write_bytes(before)  # a model is no resume file
    assert "from another run (different" in last_line(run(capsys, *TRAIN, "--resume")[2])


def test_a_model_that_could_not_be_saved_is_saved_by_resume(capsys, monkeypatch, tmp_path):
    def full(*_):
        raise classifier.UserError("disk full")

    straight = rows(run(capsys, *TRAIN, "--json", "--model-path", "a.pth")[1])[-1]
    with monkeypatch.context() as patch:
        patch.setattr(classifier, "save_model", full)
        patch.setattr(tempfile, "tempdir", str(tmp_path))
        assert run(capsys, *TRAIN)[0] == 1
    (result,) = rows(run(capsys, *TRAIN, "--resume", "--json")[1])
    assert result["test_accuracy_tta"] == straight["test_accuracy_tta"]


@pytest.mark.parametrize("epochs,kept", [(0, []), (1, ["digits_model.pth.resume.old"])])
def test_starting_anew_keeps_what_an_interrupted_run_left(capsys, monkeypatch, epochs, kept):
    """If it finished an epoch."""
    interrupted(monkeypatch, capsys, *LITTLE, after=epochs)
    err = run(capsys, "--mode", "train", *LITTLE)[2]
    assert ("moved to digits_model.pth.resume.old" in err) == bool(kept)
    assert sorted(os.listdir()) == ["digits_model.pth", *kept]


def test_a_failed_training_leaves_the_old_model(capsys, monkeypatch):
    assert run(capsys, *TRAIN)[0] == 0
    before = Path("digits_model.pth").read_bytes()
    monkeypatch.setattr(classifier, "orthogonalize", lambda matrix: matrix * float("nan"))
    code, _, err = run(capsys, "--mode", "train", *LITTLE)
    assert code == 1 and "no longer finite (epoch 1, learning rate" in last_line(err)
    assert "--lr" in last_line(err)
    assert Path("digits_model.pth").read_bytes() == before


def test_a_loss_that_explodes_in_the_last_update_is_one_line(capsys):
    """Training sees it no more, evaluation does."""
    code, out, err = run(capsys, *TRAIN, "--batch-size", 128, "--lr", 1e6)
    assert code == 1 and len(out.splitlines()) == 1  # the table's heading
    assert "the network's answers are not finite" in last_line(err) and "--lr" in last_line(err)
    assert not os.path.exists("digits_model.pth")


def test_two_trainings_on_one_model_path(capsys, monkeypatch):
    real, results = classifier.Training.train_epoch, []

    def meanwhile(*args):
        if not results:
            results.append(None)
            thread = threading.Thread(target=lambda: results.append(classifier.main(TRAIN)))
            thread.start()
            thread.join()
        return real(*args)

    monkeypatch.setattr(classifier.Training, "train_epoch", meanwhile)
    code, _, err = run(capsys, *TRAIN)
    assert (code, results[1]) == (0, 1) and "another training is writing digits_model.pth" in err


def test_missing_data_is_one_line_with_the_ways_out(capsys, tmp_path):
    flags = ["--data-dir", tmp_path / "none", "--data-url", "http://127.0.0.1:9/x", "--no-mlflow"]
    code, out, err = run(capsys, *flags)
    assert code == 1 and not out
    for words in ("cifar-10-python.tar.gz", "--data-dir", "--data-url", "--dataset digits"):
        assert words in last_line(err)
    assert last_line(err).startswith("classifier.py: could not get CIFAR-10")


def test_absent_device(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run(capsys, "--device", "cuda", "--dataset", "digits")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "--device cuda" in err and "--device cpu" in err


@pytest.mark.parametrize(
    "error,words",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "--accumulate-grad-steps 2"),
        (RuntimeError("CUDA error: out of memory\nSearch for"), "--batch-size 16"),
        (RuntimeError("DataLoader worker (pid 7) is killed"), "try python"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--batch-size 16"),
        (RuntimeError("gloo: Connection closed by peer"), "lost another process"),
        (torch.distributed.DistBackendError("NCCL error\nLast error:\nno route"), "no route"),
        (ModuleNotFoundError("No module named 'sklearn'"), "pip install -r requirements.txt"),
        (OSError(28, "No space left on device", "a/file"), "a/file: No space left on device"),
    ],
)
def test_what_the_user_can_solve_is_one_line(capsys, monkeypatch, error, words):
    def fail(*_):
        raise error

    monkeypatch.setattr(classifier.Training, "train_epoch", fail)
    code, _, err = run(capsys, *TRAIN)
    assert code == 1 and last_line(err).startswith("classifier.py: ") and words in last_line(err)


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(classifier.Training, "train_epoch", broken)
    with pytest.raises(KeyError):
        classifier.main(TRAIN)


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--mode", "predict", "--image", "x.png"], "--mode predict runs in one process"),
        (["--mode", "benchmark"], "--mode benchmark runs in one process"),
        (["--device", "cuda:1"], "--device cuda:1: torchrun gives each process its own"),
    ],
)
def test_what_torchrun_cannot_do_is_refused(capsys, monkeypatch, flags, words):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = run(capsys, *flags)
    assert (code, out) == (1, "") and words in last_line(err)


@pytest.mark.cuda
def test_train_evaluate_and_predict_on_a_gpu(capsys):
    noise(50, 40).save("a.png")
    device = ["--device", "cuda", "--no-compile", "--json"]
    result = rows(run(capsys, *TRAIN, "--amp", *device)[1])[-1]
    model = ["--model-path", "digits_model.pth", *device]
    (again,) = rows(run(capsys, "--mode", "evaluate", "--no-mlflow", *model)[1])
    assert again["test_accuracy_tta"] == result["test_accuracy_tta"]
    (answer,) = rows(run(capsys, "--mode", "predict", "--image", "a.png", *model)[1])
    assert answer["label"] in list("0123456789")


def measured(scale=1.0):
    """What a configuration's process sends: three rounds of every measure."""
    seconds = {name: [scale * x for x in (1.0, 2.0, 4.0)] for name in classifier.MEASURES}
    resolved = {"run_compile": False}
    return {"seconds": seconds, "count": 100, "memory": 200.0 * scale, "resolved": resolved}


def a_benchmark(runtime, *words):
    return Benchmark(classifier.parse_config(["--mode", "benchmark", *words]), runtime, None)


def test_benchmark_rows(cpu):
    """Medians and percentiles of the rounds, per image or image by image."""
    benchmark = a_benchmark(cpu)
    benchmark.add("baseline", measured())
    found = benchmark.add("faster", measured(0.5))
    by_measure = {row["measure"]: row for row in found}
    assert list(by_measure) == list(classifier.MEASURES)
    training, photo, batch = (by_measure[name] for name in ("training", "photo", "batch_64"))
    assert (training["value"], training["unit"], training["ratio"]) == (100, "images/s", 2)
    assert (training["p10"], training["p90"]) == pytest.approx((60, 180))  # of 50, 100 and 200
    assert (photo["value"], photo["unit"], photo["ratio"]) == (1000, "ms", 2)
    assert batch["value"] == 64 and {row["ratio"] for row in found} == {2}
    assert {row["name"] for row in found} == {"faster"}
    memory = {name: row["peak_memory_mb"] for name, row in by_measure.items()}
    assert memory.pop("training") == 100 and set(memory.values()) == {None}
    areas = ["training", "loading", *["inference"] * 4]
    assert [row["area"] for row in found] == areas


def test_benchmark_leaves_out_what_does_not_work_here(cpu):
    bf16 = replace(cpu, amp_dtype=torch.bfloat16)
    cases = a_benchmark(bf16).cases()
    single = ["data_loading", "channels_last", "mixed_precision", "compile"]
    assert [*cases] == ["baseline", *single, "combined", "everything", "baseline_again"]
    assert all(cases[name] == (name,) for name in single)
    assert cases["baseline"] == cases["baseline_again"] == ()
    assert set(cases["combined"]) == set(single) - {"compile"}  # a CPU's auto
    assert set(cases["everything"]) == set(classifier.OPTIMIZATIONS)
    assert "mixed_precision" not in str(a_benchmark(cpu).cases())
    cases = a_benchmark(bf16, "--no-compile").cases()
    assert "compile" not in str(cases) and "everything" not in cases  # combined is the same
    on_mps = a_benchmark(replace(cpu, device=torch.device("mps"))).cases()
    assert "channels_last" not in str(on_mps)
    on_cuda = a_benchmark(replace(bf16, device=torch.device("cuda"))).cases()
    assert "compile" in on_cuda["combined"] and "everything" not in on_cuda


@pytest.fixture
def measured_benchmark(cpu):
    """Three configurations; the baseline is a tenth slower at the end. One check failed."""
    benchmark = a_benchmark(cpu, "--json", "--width", "16")
    for name, scale in {"baseline": 1.0, "combined": 0.5, "baseline_again": 1 / 0.9}.items():
        benchmark.add(name, measured(scale))
    benchmark.check("compiled", torch.tensor(0.0), 1e-4)
    benchmark.check("predict", torch.tensor(torch.nan), 1e-4)
    return benchmark


def test_benchmark_table(measured_benchmark):
    table = measured_benchmark.table()
    head, rule, *lines, blank, last = table.splitlines()
    assert {line.count("|") for line in (head, rule, *lines)} == {9} and not blank
    assert head.startswith("| Configuration | Training | Data loading | One 500x375 JPEG |")
    assert [line.split(" | ")[0] for line in lines] == [
        "| baseline",
        "| combined",
        "| baseline again",
    ]
    assert lines[0] == (
        "| baseline | 50/s | 50/s | 2000.0 ms | 2000.0 ms | 2000.0 ms | 32/s | 200 MiB |"
    )
    assert lines[1] == "| combined |" + " 2.00x |" * 6 + " 0.50x |"
    assert "differs from the first by up to 10.00%" in last
    assert "FAILED: predict." in last and f"`{classifier.command_line()}`" in last
    measured_benchmark.checks.pop()
    assert measured_benchmark.table().endswith("Self-checks: all passed.")
    measured_benchmark.rows = [
        row for row in measured_benchmark.rows if row["name"] != "baseline_again"
    ]
    assert "The baseline at the end was not measured." in measured_benchmark.table()


def without_processes(monkeypatch, found, check=lambda _: None):
    """`measure` gives what `found` has for a configuration, in no time."""
    monkeypatch.setattr(Benchmark, "check_all", check)
    monkeypatch.setattr(Benchmark, "measure", lambda _, name, chosen: found(name, chosen))


BENCHMARK = ["--mode", "benchmark", *TINY, "--json", "--no-amp"]


def test_a_configuration_that_dies_or_does_not_compile_is_left_out(capsys, monkeypatch):
    def found(name, chosen):
        return None if name == "channels_last" else measured()  # `run_compile` is False in it

    without_processes(monkeypatch, found)
    code, out, err = run(capsys, *BENCHMARK)
    names = list(dict.fromkeys(row["name"] for row in rows(out)))
    assert code == 0 and names == ["baseline", "data_loading", "combined", "baseline_again"]
    assert "| baseline again |" in err


def test_a_round_of_the_benchmark_keeps_to_the_schedule(monkeypatch):
    """Its last rate would be negative if it made more updates than an epoch has."""
    real, done, sent = classifier.Training.train_epoch, [], []

    def spying(*arguments, **options):
        done.append(real(*arguments, **options))

    monkeypatch.setattr(classifier.Training, "train_epoch", spying)
    monkeypatch.setattr(classifier, "timed", lambda work, rounds, device: [work()])
    config = classifier.parse_config([*BENCHMARK, "--epochs", "1", "--accumulate-grad-steps", "4"])
    classifier.measure_case(config, ("data_loading",), SimpleNamespace(send=sent.append))
    assert len(sent) == len(done) == 1 and done[0]["lr"] > 0


def test_a_baseline_that_dies_ends_the_benchmark(capsys, monkeypatch):
    without_processes(monkeypatch, lambda *_: None)
    code, out, err = run(capsys, *BENCHMARK)
    assert (code, out) == (1, "") and "the baseline could not be measured" in last_line(err)


def test_a_check_that_fails_makes_the_exit_code_1(capsys, monkeypatch):
    def check(benchmark):
        benchmark.check("predict", torch.tensor(1.0), 0.5)

    without_processes(monkeypatch, lambda *_: measured(), check)
    code, _, err = run(capsys, *BENCHMARK)
    assert code == 1 and "FAILED: predict" in err


def peak_memory():
    return classifier.Runtime(torch.device("cpu")).peak_memory_mb()


def test_each_training_has_its_own_peak_of_memory(cpu):
    grown = np.ones(400_000_000, dtype=np.uint8)
    before = cpu.peak_memory_mb()
    del grown
    cpu.reset_peak_memory()
    assert cpu.peak_memory_mb() < before - 300


def test_out_of_memory_is_advised_by_mode():
    error = RuntimeError("CUDA error: out of memory")
    for words in ("--mode evaluate", "--mode train --batch-size 1"):
        text = classifier.explain(error, classifier.parse_config(words.split()))
        assert text == "out of memory: close other programs, or use --device cpu"


@pytest.mark.slow
def test_peak_memory_is_this_process_own():
    """A child's figure must not start at the size of the parent that started it."""
    grown = np.ones(1_500_000_000, dtype=np.uint8)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert 50 < pool.apply(peak_memory) < 900
    assert peak_memory() > 2**-20 * len(grown)


@pytest.mark.slow
def test_benchmark(cli, tmp_path):
    flags = "--dataset digits --width 4 --batch-size 16 --no-compile --num-workers 0 --json"
    flags = [*flags.split(), "--holdout", 60]
    more = ["--epochs", 1, "--model-path", "start.pth", "--no-mlflow"]
    assert cli("--mode", "train", *flags, *more).returncode == 0
    (tmp_path / "temporary").mkdir()
    place, flags = {"TMPDIR": str(tmp_path / "temporary")}, [*flags, "--init-from", "start.pth"]
    done = cli("--mode", "benchmark", *flags, timeout=1800, env=place)
    assert done.returncode == 0, done.stderr
    assert not [*(tmp_path / "temporary").rglob("*.pth")]
    found = rows(done.stdout)
    checks = {row["name"]: row["passed"] for row in found if row["event"] == "check"}
    assert set(checks) >= {"accumulation", "mixed_precision", "predict"} and all(checks.values())
    figures = [row for row in found if row["event"] == "benchmark"]
    keys = "event area measure name value unit p10 p90 ratio peak_memory_mb"
    assert all(set(row) == set(keys.split()) for row in figures)
    assert all(0 < row["p10"] <= row["value"] <= row["p90"] for row in figures)
    training = {row["name"]: row for row in figures if row["measure"] == "training"}
    cases = {"baseline", "data_loading", "channels_last", "combined", "baseline_again"}
    assert cases <= set(training) and all(row["peak_memory_mb"] > 50 for row in training.values())
    assert len(figures) == len(training) * len(classifier.MEASURES)
    assert "| baseline again |" in done.stderr and "Self-checks: all passed" in done.stderr
    client, _, (parent, *children) = runs_of(tmp_path / "mlflow.db")
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    by_name = {child.info.run_name: child.data for child in children}
    assert set(by_name) == {name.replace("_", " ") for name in training}
    facts = ("run_memory_format", "run_data_loading", "run_compile")
    for name, expected in (
        ("baseline", ["contiguous_format", "images", "False"]),
        ("channels last", ["channels_last", "images", "False"]),
        ("combined", ["channels_last", "batches", "False"]),
    ):
        assert [by_name[name].params[fact] for fact in facts] == expected
    combined = by_name["combined"].metrics
    names = {metric for _, metric, *_ in classifier.MEASURES.values()}
    assert names | {f"ratio/{name}" for name in classifier.MEASURES} < set(combined)
    speed = training["combined"]["value"]
    assert combined["speed/train_img_s"] == pytest.approx(speed, rel=1e-4)
    assert combined["memory/peak_mb"] > 50
    stored = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert stored == {"benchmark.md"}


@pytest.mark.slow
def test_a_training_whose_reader_ends_says_how_to_continue():
    words = shlex.join(["--mode", "train", *LITTLE, "--epochs", "9"])
    command = f"{sys.executable} {classifier.__file__} {words} | head -n 1"
    piped = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert len(piped.stdout.splitlines()) == 1 and "Traceback" not in piped.stderr
    assert "stdout was closed; continue with: python" in last_line(piped.stderr)


@pytest.mark.slow
def test_digits_in_full_are_learned(cli):
    done = cli("--mode", "train", "--dataset", "digits", "--json", "--no-mlflow")
    assert done.returncode == 0 and rows(done.stdout)[-1]["test_accuracy"] > 0.97


@pytest.mark.slow
def test_one_epoch_on_the_real_images(cli, real_cifar):
    flags = ["--epochs", 1, "--limit-images", 12800, "--json", "--no-mlflow"]
    done = cli("--mode", "train", "--data-dir", real_cifar, *flags)
    assert done.returncode == 0 and rows(done.stdout)[-1]["test_accuracy"] > 0.4


@pytest.mark.parametrize("seconds,told", [(0.2, True), (0.001, False)])
def test_a_long_training_tells_how_long_it_will_take(capsys, seconds, told):
    """Two of 20 epochs are done, with 391 batches each, of which one takes so many seconds."""
    config = classifier.Config()
    data = SimpleNamespace(name="cifar10")
    training = SimpleNamespace(config=config, sampler=range(391), epoch=2, data=data)
    classifier.tell_duration(training, False, seconds)
    err = capsys.readouterr().err
    assert ("this takes about 0:23:28 here" in err) == told == ("about 0:07:09 for 94.2%" in err)


def test_a_training_tells_its_duration_once(capsys, monkeypatch):
    monkeypatch.setattr(classifier, "LONG_TRAINING", 0.0)
    assert run(capsys, "--mode", "train", *LITTLE)[2].count("this takes about") == 1


def test_depth_3_is_trained_saved_and_read_again(capsys):
    result = rows(run(capsys, *TRAIN, "--depth", 3, "--json")[1])[-1]
    saved = classifier.load_model(Path("digits_model.pth")).model
    assert saved.settings == {"width": 8, "depth": 3}
    assert len(saved.parameter_groups()["filters"]) == 9
    (again,) = rows(run(capsys, *EVALUATE, "digits_model.pth", "--json")[1])
    assert again["test_loss"] == result["test_loss"]


@pytest.mark.parametrize("change", [{"limit_images": 9}, {"init_from": "m.pth"}, {"width": 8}])
def test_another_training_is_not_promised_the_usual_accuracy(capsys, change):
    training = SimpleNamespace(
        config=classifier.Config(**change),
        sampler=range(391),
        epoch=2,
        data=SimpleNamespace(name="cifar10"),
    )
    classifier.tell_duration(training, False, 0.2)
    err = capsys.readouterr().err
    assert "this takes about 0:23:28 here; an interrupted" in err and "94.2%" not in err


def test_several_seeds_are_not_promised_a_resume(capsys, monkeypatch):
    monkeypatch.setattr(classifier, "LONG_TRAINING", 0.0)
    err = run(capsys, *TRAIN, "--repeats", 2)[2]
    assert len(re.findall("this takes about .* here for each seed\n", err)) == 2


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_training_needs_no_stdout(cpu, capsys, monkeypatch, number):
    """As after its terminal was closed. Nothing is left of predict then, so that ends."""

    def write(_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", SimpleNamespace(write=write, flush=lambda: None))
        assert classifier.main(["--mode", "train", *TRAIN[2:]]) == 0
        with pytest.raises(OSError):
            classifier.emit({}, "text", classifier.Config(mode="predict"), cpu)
    assert "stdout cannot be written" in capsys.readouterr().err
    assert os.path.exists("digits_model.pth")


def test_windows_closes_pipes_in_another_way(cpu, monkeypatch):
    def write(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=write, flush=lambda: None))
    with monkeypatch.context() as patch, pytest.raises(BrokenPipeError):
        patch.setattr(os, "name", "nt")
        classifier.emit({}, "text", classifier.Config(), cpu)


@pytest.mark.parametrize("failures", [0, 2, 9])
def test_a_file_that_a_scanner_holds_for_a_moment_is_replaced(tmp_path, monkeypatch, failures):
    """As virus scanners do on Windows."""
    calls, real = [], os.replace

    def replace_(source, target):
        calls.append(target)
        if len(calls) <= failures:
            raise PermissionError(13, "in use")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    path = tmp_path / "file"
    if failures < 9:
        classifier.save_atomically({"a": 1}, path)
        assert classifier.load_whole(path) == {"a": 1} and len(calls) == failures + 1
    else:
        with pytest.raises(classifier.UserError, match="could not be written"):
            classifier.save_atomically({"a": 1}, path)
        assert len(calls) == 4 and not list(tmp_path.iterdir())


def test_a_third_interrupted_training_keeps_the_first(capsys, monkeypatch):
    for _ in range(3):
        interrupted(monkeypatch, capsys, *LITTLE, after=1)
    found = sorted(path.name for path in Path().glob("*.resume*"))
    assert found == [f"digits_model.pth.resume{end}" for end in ("", ".old", ".old1")]


def test_an_unfinished_training_is_no_damaged_model(capsys, monkeypatch):
    interrupted(monkeypatch, capsys, *LITTLE, after=1)
    code, _, err = run(capsys, *EVALUATE, "digits_model.pth.resume")
    assert code == 1 and "is an unfinished training: --resume finishes it if it is named" in err


def test_a_closed_stderr_does_not_stop_json(cpu, capsys, monkeypatch):
    def write(_):
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=write, flush=lambda: None))
    classifier.emit({"a": 1}, "text", classifier.Config(json=True), cpu)
    assert capsys.readouterr().out == '{"a": 1}\n'


@pytest.mark.parametrize("words", [["--num-workers", "4"], ["--seed", "0"], []])
def test_the_command_after_a_dead_worker_is_valid(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["classifier.py", "--mode", "train", *words])
    error = RuntimeError("DataLoader worker (pid 7) is killed")
    text = classifier.explain(error, classifier.Config())
    config = classifier.parse_config(shlex.split(text.split("try python classifier.py ")[1]))
    assert (config.num_workers, config.resume, config.seed) == (0, True, 0)


def test_windows_gets_quotes_that_it_knows(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["classifier.py", "--data-dir", "D:\\a b"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        command = classifier.command_line()
    assert command == 'python classifier.py --data-dir "D:\\a b"'
