"""Model files: written whole or not at all, read without running anything."""
import os
import pickle
import zipfile

import pytest
import torch

import classifier
from classifier import MODEL_FORMAT, UserError, load_model, save_atomically


def test_round_trip(trained):
    saved = torch.load(trained, weights_only=True)
    assert set(saved) >= {"format_version", "weights", "model", "class_names", "dataset", "pixel_mean", "pixel_std",
                          "temperature", "metrics", "settings", "versions"}
    assert not [name for name in saved["weights"] if "_orig_mod" in name or "module." in name]
    model = load_model(trained)
    assert not model.model.training and model.class_names == tuple("0123456789") and model.dataset == "digits"
    assert all(torch.equal(tensor, saved["weights"][name]) for name, tensor in model.model.state_dict().items())
    assert saved["metrics"]["test_accuracy"] > 0.2
    assert saved["settings"]["epochs"] == 15 and saved["model"] == {"width": 8, "depth": 2}


def test_statistics_travel_with_the_file(trained, tmp_path):
    saved = torch.load(trained, weights_only=True)
    saved["weights"]["pixel_mean"] += 0.1
    torch.save(saved, tmp_path / "other.pth")
    images = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    assert not torch.equal(load_model(tmp_path / "other.pth").model(images), load_model(trained).model(images))


def test_order_of_an_atomic_save(tmp_path, monkeypatch):
    """Written beside, flushed, moved, and then the folder is flushed."""
    calls = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, lambda *args, name=name, real=getattr(os, name): (calls.append(name), real(*args)))
    save_atomically({"a": 1}, tmp_path / "file.pth")
    assert calls == ["fsync", "replace", "fsync"]
    assert os.listdir(tmp_path) == ["file.pth"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_failing_save_leaves_the_old_file_whole(tmp_path, monkeypatch, error):
    path = tmp_path / "file.pth"
    save_atomically({"a": 1}, path)

    def fail(_payload, file):
        file.write(b"half")
        raise error
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match="could not be written"):
        save_atomically({"a": 2}, path)
    assert torch.load(path, weights_only=True) == {"a": 1} and os.listdir(tmp_path) == ["file.pth"]


def test_a_signal_while_saving_leaves_nothing_beside(tmp_path, monkeypatch):
    def stop(_payload, file):
        file.write(b"half")
        raise classifier.Stopped(15)
    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(classifier.Stopped):
        save_atomically({"a": 2}, tmp_path / "file.pth")
    assert os.listdir(tmp_path) == []


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def write_evil_old(path):
    path.write_bytes(pickle.dumps(Evil()))


def write_evil_zip(path):
    torch.save({"format_version": MODEL_FORMAT, "weights": Evil()}, path)
    assert zipfile.is_zipfile(path)


def write_evil_legacy(path):
    torch.save({"format_version": MODEL_FORMAT, "weights": Evil()}, path, _use_new_zipfile_serialization=False)


def write_state_dict(path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)


def write_other_weights(path):
    torch.save({"format_version": MODEL_FORMAT, "weights": {}, "model": {"width": 8}, "class_names": ["a"], "dataset": "x"}, path)


def write_future(path):
    torch.save({"format_version": 99, "weights": {}, "model": {}, "class_names": [], "dataset": "x"}, path)


@pytest.mark.parametrize("write,words", [
    (lambda path: None, "no such model"), (lambda path: path.mkdir(), "cannot be read|directory"),
    (lambda path: path.write_bytes(b""), "damaged or no file"), (lambda path: path.write_text("hello"), "damaged or no"),
    (write_evil_old, "damaged or no file.*nothing in it was run"), (write_evil_zip, "nothing in it was run"),
    (write_evil_legacy, "nothing in it was run"), (write_state_dict, "no file of this program"),
    (write_other_weights, "damaged"), (write_future, "format 99")],
    ids=["missing", "folder", "empty", "text", "evil old", "evil zip", "evil legacy", "foreign", "no weights", "future"])
@pytest.mark.parametrize("mode", ["evaluate", "predict"])
def test_a_bad_model_file_is_one_clear_line(tmp_path, capsys, write, words, mode):
    path = tmp_path / "model.pth"
    write(path)
    assert classifier.main(["--mode", mode, "--model-path", str(path), "--image", "x.png", "--no-mlflow"]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("python ")]
    assert len(told) == 1 and "model.pth" in told[0]
    import re
    assert re.search(words, told[0])
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory, trained):
    """A model file of 13 kB."""
    path = tmp_path_factory.mktemp("small") / "small.pth"
    saved = torch.load(trained, weights_only=True)
    model = classifier.build_model(classifier.ModelSettings(width=1, depth=1), 2)
    save_atomically(saved | {"weights": model.state_dict(), "model": {"width": 1, "depth": 1},
                             "class_names": ["a", "b"]}, path)
    assert load_model(path).class_names == ("a", "b")
    return path


def outcome(path, content):
    """The weights and names that a file's content gives, or "refused"."""
    path.write_bytes(content)
    try:
        saved = load_model(path)
    except UserError as error:
        assert "damaged" in str(error) or "no file of this program" in str(error)
        return "refused"
    return {name: tensor.tolist() for name, tensor in saved.model.state_dict().items()}, saved.class_names


def test_a_model_truncated_anywhere_is_refused(small, tmp_path):
    content = small.read_bytes()
    ends = [*range(0, len(content), 61), *range(len(content) - 120, len(content))]
    assert {str(outcome(tmp_path / "short.pth", content[:end])) for end in ends} == {"refused"}


def flipped(content, position, bit=0):
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1:]


def test_flipped_bits_are_found(small, tmp_path):
    """What the file says is checked, down to the last weight; padding and dates may change."""
    content = small.read_bytes()
    good = outcome(tmp_path / "good.pth", content)
    found = [outcome(tmp_path / "flipped.pth", flipped(content, position, position % 8))
             for position in range(0, len(content), 37)]
    assert all(each in ("refused", good) for each in found) and found.count("refused") > len(found) / 2
    with zipfile.ZipFile(small) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        weights = content.index(archive.read(largest))
    assert outcome(tmp_path / "flipped.pth", flipped(content, weights + largest.file_size // 2)) == "refused"


@pytest.mark.slow
def test_every_byte_truncated_and_flipped(small, tmp_path):
    content = small.read_bytes()
    good = outcome(tmp_path / "good.pth", content)
    for position in range(len(content)):
        assert outcome(tmp_path / "short.pth", content[:position]) == "refused"
        assert outcome(tmp_path / "flipped.pth", flipped(content, position, position % 8)) in ("refused", good)


def test_bombs(small, tmp_path):
    """A file that unpacks to much more, one that claims a huge network, and tensors larger than what they store."""
    with zipfile.ZipFile(small) as archive, zipfile.ZipFile(tmp_path / "zip.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in archive.infolist():
            bomb.writestr(entry.filename, archive.read(entry) if "data.pkl" in entry.filename else bytes(2**24))
    saved = torch.load(small, weights_only=True)
    torch.save(saved | {"model": {"width": 4096, "depth": 64}}, tmp_path / "wide.pth")
    torch.save(saved | {"model": {"width": 10**9, "depth": 1}}, tmp_path / "wider.pth")
    saved["weights"]["head.weight"] = torch.zeros(1).expand(10**6, 10**6)
    torch.save(saved, tmp_path / "expanded.pth")
    for name in ("zip", "wide", "wider", "expanded"):
        with pytest.raises(UserError, match="damaged"):
            load_model(tmp_path / f"{name}.pth")


def test_unwritable_model_path_is_found_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "model.pth", tmp_path):
        assert classifier.main(["--dataset", "digits", "--no-mlflow", "--model-path", str(path)]) == 1
        streams = capsys.readouterr()
        assert "--model-path" in streams.err and not streams.out
