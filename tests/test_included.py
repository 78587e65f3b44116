"""The included model: the first answer without a download or a training."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, noise, run

import classifier
from classifier import UserError, predict

COMMAND = "python classifier.py --mode predict --image .github/cat.jpg"
NO_NETWORK = """
import socket
def refuse(*args, **options): raise OSError("the network is blocked")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""


@pytest.fixture
def clone(tmp_path):
    """A new clone's files, without what a training of the developer's may have left."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("classifier.py", ".pretrained", ".github"):
        way = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        way(ROOT / name, folder / name)
    (folder / "sitecustomize.py").write_text(NO_NETWORK)
    return folder


def start(clone, *words):
    command = [sys.executable, "-X", "importtime", *words]
    environment = os.environ | {"PYTHONPATH": str(clone)}
    options = {"cwd": clone, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, **options, timeout=300)
    lines = done.stderr.splitlines()
    loaded = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    return done, [line for line in lines if not line.startswith("import time:")], loaded


def test_readmes_first_command_answers_without_a_network(clone):
    readme = (ROOT / "README.md").read_text()
    shown = re.search(rf"{COMMAND}\n```\n\n```\n.*: cat  (\d+)\.\d\d%", readme)
    done, err, loaded = start(clone, *COMMAND.split()[1:], "--device", "cpu")
    found = re.match(r"\.github/cat\.jpg: cat  (\d+)\.\d\d%", done.stdout)
    assert done.returncode == 0 and abs(int(found[1]) - int(shown[1])) <= 1
    assert err == ["using the included model"]
    assert not loaded & {"torch._dynamo", "mlflow", "torchvision"}


@pytest.fixture
def included(clone, monkeypatch):
    """The included model's file, of the clone."""
    path = clone / ".pretrained" / "cifar10_model.pth"
    monkeypatch.setattr(classifier, "INCLUDED_MODEL", path)
    return path


def test_python_uses_it_from_any_folder_with_one_load(monkeypatch):
    real, loads = classifier.load_model, []
    monkeypatch.setattr(classifier, "_predictors", {})
    monkeypatch.setattr(classifier, "load_model", lambda path: loads.append(path) or real(path))
    for _ in range(2):
        (found,) = predict(ROOT / ".github" / "cat.jpg")
    assert found.label == "cat" and loads == [classifier.INCLUDED_MODEL]


def test_ones_own_model_comes_first(trained, tmp_path):
    shutil.copy(trained, tmp_path / "cifar10_model.pth")
    assert predict(noise(32, 32))[0].label in "0123456789"


def test_a_model_that_is_named_must_be_there(capsys):
    words = ("--mode", "predict", "--image", ROOT / ".github" / "cat.jpg", "--model-path", "a.pth")
    code, out, err = run(capsys, *words)
    assert (code, out) == (1, "") and "a.pth: no such model" in err


def junk(path):
    path.write_bytes(b"junk")


def pickled(path):
    path.write_bytes(pickle.dumps({"weights": 1}))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def link_to_nowhere(path):
    path.unlink()
    path.symlink_to("nowhere")


def directory(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [junk, pickled, cut, link_to_nowhere, directory])
@pytest.mark.parametrize("mode", ["predict", "evaluate"])
def test_a_damaged_file_is_one_line_that_names_the_way_out(included, capsys, damage, mode):
    damage(included)
    image = ["--image", ROOT / ".github" / "cat.jpg"] if mode == "predict" else ["--no-mlflow"]
    code, out, err = run(capsys, "--mode", mode, *image)
    (line,) = [each for each in err.splitlines() if each.startswith("classifier.py: ")]
    assert (code, out) == (1, "") and "--mode train" in line and "Traceback" not in err


def test_a_copy_of_the_script_alone_says_what_to_do(clone):
    shutil.rmtree(clone / ".pretrained")
    done, err, _ = start(clone, *COMMAND.split()[1:])
    assert done.returncode == 1 and "create one with --mode train" in err[-1] and len(err) == 1


def test_own_classes_start_from_it_in_one_line(included, capsys, tmp_path):
    for label, shade in (("day", 200), ("night", 40)):
        (tmp_path / "set" / label).mkdir(parents=True)
        for number in range(6):
            shown = noise(40, 40).point(lambda level, shade=shade: level // 8 + shade)
            shown.crop((number, 0, 40, 40)).save(tmp_path / "set" / label / f"{number}.png")
    before = included.read_bytes()
    monkey = ["--mode", "train", "--dataset", "set", "--no-mlflow", "--epochs", "1", "--init-from"]
    config = classifier.parse_config(monkey)
    assert config.init_from == str(ROOT / ".pretrained" / "cifar10_model.pth")
    code, out, err = run(capsys, *monkey, "--num-workers", 0)
    assert code == 0, err
    saved = classifier.load_model(tmp_path / "set_model.pth")
    assert saved.model.settings == classifier.load_model(included).model.settings
    assert included.read_bytes() == before


def test_a_width_that_differs_from_it_is_refused(capsys):
    words = ("--mode", "train", *TINY, "--init-from", classifier.INCLUDED_MODEL)
    code, _, err = run(capsys, *words)  # with --width 8
    assert code == 1 and "its width is 64; leave --width out" in err


def test_weights_of_16_bits_are_checked_and_become_float32(included, tmp_path):
    import torch

    assert included.stat().st_size < 16e6
    saved = torch.load(included, weights_only=True)
    assert saved["weights"]["head.weight"].dtype == torch.float16
    model = classifier.load_model(included).model
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    saved["weights"]["head.weight"][0, 0] = float("inf")
    torch.save(saved, tmp_path / "a.pth")
    with pytest.raises(UserError, match="invalid head.weight"):
        classifier.load_model(tmp_path / "a.pth")


@pytest.mark.slow
def test_evaluate_repeats_the_documented_figures(cli, real_cifar):
    done = cli("--mode", "evaluate", "--data-dir", real_cifar, "--json", "--no-mlflow")
    found = json.loads(done.stdout)
    assert found["test_accuracy"] == pytest.approx(0.9517, abs=0.001)
    assert found["test_accuracy_tta"] == pytest.approx(0.9571, abs=0.001)
