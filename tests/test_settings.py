"""Flags and settings: one of each, checked before any work."""
from dataclasses import fields

import pytest

import classifier
from classifier import Config, command_line, parse_config, redact

PARTS = [getattr(Config(), field.name) for field in fields(Config)]
FIELDS = [(field, getattr(part, field.name)) for part in PARTS for field in fields(part)]
SAMPLES = {"mode": "predict", "device": "cpu", "dataset": "digits", "image": ("a.png", "b.png"), "start_size": 24,
           "data_url": ("http://a/", "http://b/")}


def test_no_flags_is_the_default():
    assert parse_config([]) == Config()


def test_names_are_unique_over_the_parts():
    assert len(Config().flat()) == len(FIELDS)


@pytest.mark.parametrize("field,default", FIELDS, ids=lambda value: getattr(value, "name", ""))
def test_each_field_is_one_flag_that_reaches_it(field, default, capsys):
    flag = "--" + field.name.replace("_", "-")
    if isinstance(default, bool) or field.name in ("amp", "compile", "flip"):
        words, expected = [flag.replace("--", "--no-") if default else flag], not default
    else:
        expected = SAMPLES.get(field.name, 0.25 if isinstance(default, float) else
                               3 if isinstance(default, int) or field.name == "num_workers" else "word")
        words = [flag, *expected] if isinstance(expected, tuple) else [flag, str(expected)]
    if expected == "predict":
        words += ["--image", "x.png"]
    assert parse_config(words).flat()[field.name] == expected
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    assert flag in capsys.readouterr().out


@pytest.mark.parametrize("words", [
    "--batch-size 0", "--epochs -1", "--epochs 0", "--accumulate-grad-steps 0", "--top-k 0", "--threshold 1.5",
    "--threshold nan", "--lr 0", "--lr nan", "--lr inf", "--num-workers -1", "--epochs two", "--mode guess",
    "--device tpu", "--dataset mnist", "--frobnicate", "--epoch 3", "--freeze-after 2", "--holdout -5"])
def test_impossible_value_exits_2_and_names_the_flag(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(words.split())
    assert stopped.value.code == 2
    usage, line = capsys.readouterr().err.splitlines()
    assert words.split()[0] in line


def test_predict_needs_pictures(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--mode", "predict"])
    assert stopped.value.code == 2 and "--image" in capsys.readouterr().err.splitlines()[-1]


def test_auto_means_unset():
    assert parse_config(["--num-workers", "auto"]).data.num_workers is None


def test_default_model_path_follows_the_dataset():
    assert str(parse_config([]).model_path) == "cifar10_model.pth"
    assert str(parse_config(["--dataset", "digits"]).model_path) == "digits_model.pth"


def test_command_line_gives_the_same_settings_back():
    words = ["--mode", "train", "--epochs", "3", "--no-amp", "--compile", "--lr", "0.3", "--data-url", "http://a/b",
             "--run-name", "two words", "--no-tta"]
    config = parse_config(words)
    import shlex
    assert parse_config(shlex.split(command_line(config))[2:]) == config
    assert "--resume" in command_line(config, resume=True)


@pytest.mark.parametrize("text,clean", [
    ("http://me:secret@host/x", "http://***@host/x"),
    ("http://host/x?token=secret more", "http://host/x?*** more"),
    ("postgresql://u:secret@h/db", "postgresql://***@h/db"),
    ("postgresql://u:se/cret@h/db", "postgresql://***@h/db"), ("http://host/a@b", "http://host/a@b"),
    ('{"uri": "http://127.0.0.1:5000", "cpu": "CPU @ 2.2GHz"}', '{"uri": "http://127.0.0.1:5000", "cpu": "CPU @ 2.2GHz"}'),
    ("at http://host:5000 by a@b", "at http://host:5000 by a@b"),
    ("data/file.txt", "data/file.txt"), ("http://host/x", "http://host/x")])
def test_redact(text, clean):
    assert redact(text) == clean


def test_modes_match_the_flag():
    choices = next(field for field, _ in FIELDS if field.name == "mode").metadata["choices"]
    assert tuple(classifier.MODES) == choices
