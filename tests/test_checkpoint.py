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


def test_truncated_model(trained, tmp_path):
    for share in (0.1, 0.5, 0.99):
        content = trained.read_bytes()
        (tmp_path / "short.pth").write_bytes(content[:int(len(content) * share)])
        with pytest.raises(UserError, match="damaged"):
            load_model(tmp_path / "short.pth")


def test_unwritable_model_path_is_found_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "model.pth", tmp_path):
        assert classifier.main(["--dataset", "digits", "--no-mlflow", "--model-path", str(path)]) == 1
        streams = capsys.readouterr()
        assert "--model-path" in streams.err and not streams.out
