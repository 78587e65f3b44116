"""Model files: written whole or not at all, read without running anything."""

import io
import math
import os
import pickle
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, Evil, noise, rows, run, same

import classifier
from classifier import (
    FILE_FORMAT,
    CifarNet,
    UserError,
    load_model,
    parse_config,
    save_atomically,
)


def test_round_trip(trained):
    saved = torch.load(trained, weights_only=True)
    keys = "format_version weights model class_names dataset flip pixel_mean pixel_std temperature"
    keys += " train_digest metrics settings versions"
    assert set(saved) == set(keys.split())
    model = load_model(trained)
    assert not model.model.training and model.class_names == tuple("0123456789")
    assert (model.dataset, model.flip, model.temperature) == ("digits", False, saved["temperature"])
    assert (model.settings, model.train_digest) == (saved["settings"], saved["train_digest"])
    assert same(model.model.state_dict(), saved["weights"])
    assert saved["metrics"]["test_accuracy"] > 0.2
    assert saved["settings"]["epochs"] == 15 and saved["model"] == {"width": 8, "depth": 2}


def test_order_of_an_atomic_save(tmp_path, monkeypatch):
    """Written beside, flushed, then moved."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def recorded(*args, name=name, real=real):
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(os, name, recorded)
    save_atomically({"a": 1}, tmp_path / "file.pth")
    assert calls == ["fsync", "replace"]
    assert os.listdir(tmp_path) == ["file.pth"]


@pytest.mark.parametrize(
    "error,raised",
    [
        (OSError(28, "No space left on device"), UserError),
        (classifier.Stopped(15), classifier.Stopped),
    ],
)
def test_a_failing_save_leaves_the_old_file_whole(tmp_path, monkeypatch, error, raised):
    """torch.save makes a RuntimeError of what a file's later writes raise: a stop would be lost."""
    path = tmp_path / "file.pth"
    save_atomically({"a": 1}, path)

    class Failing(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) < 400:
                return super().write(data)
            super().write(data[:100])
            raise error

    monkeypatch.setattr(classifier, "open", Failing, raising=False)
    with pytest.raises(raised, match="could not be written|SIGTERM"):
        save_atomically({"a": 2}, path)
    assert torch.load(path, weights_only=True) == {"a": 1} and os.listdir(tmp_path) == ["file.pth"]


def write_legacy(path):
    payload = {"format_version": FILE_FORMAT, "weights": Evil()}
    torch.save(payload, path, _use_new_zipfile_serialization=False)


def refusal(capsys, mode, path):
    """What a mode says to a model file that it refuses: one line, and nothing on stdout."""
    image = ["--image", "x.png"] if mode == "predict" else []
    code, out, err = run(capsys, "--mode", mode, "--model-path", path, *image, "--no-mlflow")
    told = [line for line in err.splitlines() if not line.startswith("python ")]
    assert code == 1 and not out and len(told) == 1 and path.name in told[0]
    return told[0]


VERSION = {"format_version": FILE_FORMAT}
BAD = {  # what is at the path: bytes, what torch saved, or what a function made; and the message
    "missing": (lambda path: None, "no such model"),
    "folder": (lambda path: path.mkdir(), "cannot be read|directory"),
    "empty": (b"", "damaged or no model file"),
    "text": (b"hello", "damaged or no model"),
    "evil pickle": (pickle.dumps(Evil()), "damaged or no model file"),
    "evil zip": (VERSION | {"weights": Evil()}, "damaged or no model file"),
    "evil legacy": (write_legacy, "damaged or no model file"),
    "foreign": (torch.nn.Linear(2, 2).state_dict(), "not a file of this program"),
    "keys": (VERSION | {"weights": {}, "class_names": ["a"]}, "damaged: it lacks '"),
    "future": ({"format_version": 99, "weights": {}}, "another version"),
    "version": ({"format_version": torch.zeros(2)}, "not a file of this program"),
}


@pytest.mark.parametrize("content,words", BAD.values(), ids=BAD)
@pytest.mark.parametrize("mode", ["evaluate", "predict"])
def test_a_bad_model_file_is_one_clear_line(tmp_path, capsys, content, words, mode):
    path = tmp_path / "model.pth"
    if callable(content):
        content(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert re.search(words, refusal(capsys, mode, path))
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory, trained):
    """A model file of a few kB, with two classes."""
    path = tmp_path_factory.mktemp("small") / "small.pth"
    saved = torch.load(trained, weights_only=True)
    changes = {"model": {"width": 1}, "class_names": ["a", "b"]}
    save_atomically(saved | changes | {"weights": CifarNet(1, 2).state_dict()}, path)
    assert load_model(path).class_names == ("a", "b")
    return path


@pytest.fixture
def crafted(small, tmp_path):
    """A function that writes the small model's file with some of it changed."""

    def write(**changes):
        saved = torch.load(small, weights_only=True)
        for name, value in changes.items():
            merge = name in ("weights", "settings") and isinstance(value, dict)
            saved[name] = saved[name] | value if merge else value
        torch.save(saved, tmp_path / "crafted.pth")
        return tmp_path / "crafted.pth"

    return write


IMPOSSIBLE = {
    "temperature text": {"temperature": "x"},
    "temperature 0": {"temperature": 0.0},
    "temperature NaN": {"temperature": math.nan},
    "temperature infinite": {"temperature": math.inf},
    "temperature tiny": {"temperature": 1e-300},
    "temperature tensor": {"temperature": torch.ones(2)},
    "class names numbers": {"class_names": [1, 2]},
    "class names number": {"class_names": 2},
    "class names none": {
        "class_names": [],
        "weights": {"head.weight": torch.zeros(0, 4)},
    },
    "class names too many": {"class_names": ["a", "b", "c"]},
    "data set list": {"dataset": ["digits"]},
    "flip text": {"flip": "x"},
    "model list": {"model": [1]},
    "model empty": {"model": {}},
    "width text": {"model": {"width": "1"}},
    "width None": {"model": {"width": None}},
    "width 0": {"model": {"width": 0}},
    "width 10**9": {"model": {"width": 10**9}},
    "width other": {"model": {"width": 2}},
    "limit_images text": {"settings": {"limit_images": "abc"}},
    "limit_images -1": {"settings": {"limit_images": -1}},
    "amp text": {"settings": {"amp": "abc"}},
    "lr NaN": {"settings": {"lr": math.nan}},
    "weights float64": {"weights": {"head.weight": torch.zeros(2, 4).double()}},
    "weights int64": {"weights": {"blocks.0.norm1.weight": torch.ones(1).long()}},
    "weights complex": {"weights": {"head.weight": torch.zeros(2, 4, dtype=torch.cfloat)}},
    "weights sparse": {"weights": {"head.weight": torch.zeros(2, 4).to_sparse()}},
    "weights expanded": {"weights": {"head.weight": torch.zeros(1).expand(2, 4)}},
    "weights NaN": {"weights": {"head.weight": torch.full((2, 4), math.nan)}},
    "weights text": {"weights": {"head.weight": "x"}},
    "weights list": {"weights": ["x"]},
    "settings list": {"settings": ["x"]},
    "weights more": {"weights": {"more": torch.zeros(1)}},
}


@pytest.mark.parametrize("changes", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_no_training_writes_is_one_clear_line(crafted, capsys, changes):
    """Nothing runs from a model file, whatever it says; and no mode ends in a traceback."""
    path = crafted(**changes)
    for mode in ("evaluate", "predict"):
        assert "crafted.pth is damaged" in refusal(capsys, mode, path)


def test_answers_that_are_not_finite_are_one_line(crafted, tmp_path, capsys):
    """Each weight is possible, but their products are infinite."""
    huge = {
        "stem.bias": torch.ones(24),
        "blocks.1.conv1.weight": torch.full((4, 1, 3, 3), 3e38),
        "blocks.2.conv1.weight": torch.full((6, 4, 3, 3), 3e38),
    }
    path = crafted(weights=huge)
    noise(40, 40).save(tmp_path / "x.png")
    for words in ([], ["--json"]):
        flags = ["--mode", "predict", "--model-path", path, "--image", tmp_path / "x.png", *words]
        code, out, err = run(capsys, *flags)
        assert code == 1 and not out and len(err.splitlines()) == 1 and "finite" in err


def test_a_settings_name_that_is_not_known_is_no_fault(crafted, tmp_path, capsys):
    """Files of later versions with more settings can still be read."""
    noise(40, 40).save(tmp_path / "x.png")
    path = crafted(settings={"unheard_of": ["x"]})
    flags = ["--mode", "predict", "--model-path", path, "--image", tmp_path / "x.png", "--json"]
    code, out, _ = run(capsys, *flags)
    assert code == 0 and rows(out)[0]["label"] in ("a", "b")


def outcome(path, content):
    """The weights and names that a file's content gives, or "refused"."""
    path.write_bytes(content)
    try:
        saved = load_model(path)
    except UserError as error:
        assert "damaged" in str(error) or "not a file of this program" in str(error)
        return "refused"
    weights = {name: tensor.tolist() for name, tensor in saved.model.state_dict().items()}
    return weights, saved.class_names


def flipped(content, position, bit=0):
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


@pytest.mark.parametrize("step", [211, pytest.param(3, marks=pytest.mark.slow)])
def test_truncation_and_flipped_bits_are_found(small, tmp_path, step):
    """What the file says is checked, down to the last weight; padding and dates may change."""
    content, path = small.read_bytes(), tmp_path / "damaged.pth"
    good, places = outcome(tmp_path / "good.pth", content), range(0, len(content), step)
    for end in (*places, *range(len(content) - 60, len(content))):
        assert outcome(path, content[:end]) == "refused"
    found = [outcome(path, flipped(content, place, place % 8)) for place in places]
    assert all(each in ("refused", good) for each in found)
    assert found.count("refused") > len(found) / 2
    with zipfile.ZipFile(small) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        weights = content.index(archive.read(largest))
    assert outcome(path, flipped(content, weights + largest.file_size // 2)) == "refused"


def test_a_compressed_file_is_refused(small, tmp_path):
    """It may be a zip bomb."""
    path = tmp_path / "packed.pth"
    with (
        zipfile.ZipFile(small) as whole,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry))
    with pytest.raises(UserError, match="compressed"):
        load_model(path)


def test_a_claimed_width_takes_no_memory(crafted, monkeypatch):
    on_meta = []
    monkeypatch.setattr(torch.nn.init, "dirac_", lambda weight: on_meta.append(weight.is_meta))
    with pytest.raises(UserError, match="damaged"):
        load_model(crafted(model={"width": 512}))
    assert on_meta and all(on_meta)


def test_unwritable_model_path_is_found_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    long = f"{246 * 'a'}.pth"  # 250 bytes, too long for `<name>.resume.tmp`
    for path in (tmp_path / "file" / "model.pth", tmp_path, tmp_path / long):
        code, out, err = run(capsys, "--dataset", "digits", "--no-mlflow", "--model-path", path)
        assert code == 1 and "--model-path" in err and not out


def test_settings_of_a_callers_types_are_saved_as_plain_ones(cpu, tmp_path):
    """NumPy's numbers and paths, which `torch.load` refuses."""
    config = parse_config(["--mode", "train", *TINY, "--epochs", "1", "--no-amp"])
    path = tmp_path / "m.pth"
    config = replace(config, lr=np.float64(0.01), model_path=path)
    data = classifier.load_data(config)
    assert classifier.train_seed(config, data, cpu, keep=True)[1]
    saved = load_model(path).settings
    assert (type(saved["lr"]), saved["lr"], saved["model_path"]) == (float, 0.01, str(path))
