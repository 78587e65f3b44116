"""Flags and settings: one of each, checked before any work."""

import shlex
import sys
from collections import Counter
from dataclasses import asdict, fields
from typing import get_args, get_type_hints

import pytest

import classifier
from classifier import (
    Config,
    command_line,
    load_data,
    parse_config,
    redact,
)

HINTS = get_type_hints(Config)
RECIPE = [each for each in fields(Config) if each.metadata["group"] == classifier.RECIPE]
DEFAULTS = asdict(Config())
DAILY = {"--mode", "--model-path", "--epochs", "--batch-size", "--accumulate-grad-steps", "--amp"}


def flag_of(name):
    return "--" + name.replace("_", "-")


def refusal(words, capsys):
    """The line that `words` are refused with."""
    with pytest.raises(SystemExit) as stopped:
        parse_config(words)
    usage, line = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and usage.startswith("usage: ")
    return line


def help_lines(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out.splitlines()


def another_value(each):
    """A valid value that is not the default, and the words that ask for it."""
    name, default, hint = each.name, DEFAULTS[each.name], HINTS[each.name]
    kinds = {hint, *get_args(hint)}
    if bool in kinds:
        return not default, [flag_of(name).replace("--", "--no-" if default else "--", 1)]
    if isinstance(default, tuple):
        return ("http://a/", "b"), [flag_of(name), "http://a/", "b"]
    samples = {
        "mode": "evaluate",
        "device": "cpu",
        "dataset": "digits",
        "start_size": 24,
        "depth": 3,
    }
    value = samples.get(name, 0.25 if float in kinds else 5 if int in kinds else "word")
    return value, [flag_of(name), str(value)]


@pytest.mark.parametrize("each", fields(Config), ids=lambda each: each.name)
def test_each_setting_is_one_flag_and_comes_back_from_the_command_line(each):
    value, words = another_value(each)
    mode = {"mode": "predict"} if each.name == "image" else {}
    config = parse_config([*words, *(["--mode", "predict"] if mode else [])])
    assert asdict(config) == DEFAULTS | mode | {each.name: value}


def test_help_shows_the_daily_flags_on_its_first_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    first = [line.split()[0].strip(",") for line in help_lines(capsys)[:45] if line[:4] == "  --"]
    assert set(first) >= DAILY


def test_every_recipe_setting_has_a_short_form():
    assert [each.name for each in RECIPE if not each.metadata["short"]] == []


def test_short_forms_are_unique():
    counts = Counter(each.metadata["short"] for each in fields(Config))
    del counts[""]
    assert counts and max(counts.values()) == 1


@pytest.mark.parametrize(
    "words,name",
    [
        ("", "default"),
        ("--model-path a.pth --no-mlflow", "default"),  # has no short form
        ("--epochs 8", "e8"),
        ("--batch-size 64 --epochs 8 --lr 0.01", "e8 b64 lr0.01"),
        ("--amp --no-flip", "amp noflip"),
        ("--init-from --lr 0.01", "from-incl lr0.01"),
        ("--mode evaluate", "eval"),
        ("--mode benchmark --width 8", "bench w8"),
        ("--epochs 8 --label-smoothing 0.1234567", "e8 ls0.123457"),
        ("--epochs 100 --batch-size 100 --seed 100 --width 100", "e100 b100 s100"),
        ("--init-from models/everything_of_last_summer.pth", "from-everything_of"),
        ("--epochs 8 --weight-decay 0.123 --momentum 0.123", "e8 m0.123 wd0.123"),
        ("--epochs 10 --seed 12345678 --momentum 0.123", "e10 s12345678"),  # at most 18 letters
    ],
)
def test_a_runs_name_says_what_differs(words, name):
    assert parse_config(words.split()).short_name == name


@pytest.mark.parametrize(
    "words",
    [
        "--lr nan",
        "--lr inf",
        "--threshold nan",
        "--epochs two",
        "--epochs 1.5",
        "--mode guess",
        "--device tpu",
        "--device cuda:x",
        "--dataset mnist",
        "--start-size 17",
        "--frobnicate",
        "--epoch 3",  # no abbreviations
        "--batch-size auto",  # has a default that is no auto
        "--mode predict",  # without --image
        "--image x.png",  # without --mode predict, it would train
        "--resume --repeats 2",
    ],
)
def test_impossible_words_are_refused_with_the_flags_name(words, capsys):
    line = refusal(words.split(), capsys)
    assert ("--image" if words == "--mode predict" else words.split()[0]) in line


def test_limits_hold_at_both_ends(capsys):
    checked = 0
    for each in fields(Config):
        flag, limits = flag_of(each.name), each.metadata
        step = 1 if int in {HINTS[each.name], *get_args(HINTS[each.name])} else 0.01
        outside = [
            limits[name] + by
            for name, by in (("least", -step), ("most", step), ("above", 0))
            if name in limits
        ]
        inside = [limits[name] for name in ("least", "most") if name in limits]
        for value in inside:
            assert getattr(parse_config([flag, str(value)]), each.name) == value
        for value in outside:
            assert f"argument {flag}: must be " in refusal([f"{flag}={value}"], capsys)
        checked += len(outside)
    assert checked > 20


def test_auto_means_unset():
    assert parse_config(["--num-workers", "auto", "--lr", "auto"]) == Config()


@pytest.mark.parametrize(
    "words,expected",
    [
        ("", 0.0192),
        ("--init-from a.pth", 0.015),
        ("--init-from a.pth --lr 0.5", 0.5),
    ],
)
def test_auto_rate(words, expected):
    assert parse_config(words.split()).peak_lr == expected


@pytest.mark.parametrize("words,flip", [("", False), ("--no-flip", False), ("--flip", True)])
def test_flip_is_the_data_sets_unless_given(words, flip):
    assert load_data(parse_config(f"--dataset digits {words}".split())).flip is flip


def test_default_model_path_follows_the_dataset(tmp_path):
    (tmp_path / "pets").mkdir()
    found = [
        str(parse_config(words.split()).model_file)
        for words in ("", "--dataset digits", f"--dataset {tmp_path}/pets/", "--model-path a.pth")
    ]
    assert found == ["cifar10_model.pth", "digits_model.pth", "pets_model.pth", "a.pth"]


def test_command_line_is_what_was_typed_and_added_without_secrets(monkeypatch):
    words = ["--run-name", "two words", "--tracking-uri=http://me:secret@host/"]
    monkeypatch.setattr(sys, "argv", ["a b/classifier.py", *words])
    typed = ["a b/classifier.py", "--run-name", "two words", "--tracking-uri=http://***@host/"]
    assert shlex.split(command_line())[1:] == typed
    assert shlex.split(command_line("--resume"))[1:] == [*typed, "--resume"]
    monkeypatch.setattr(sys, "argv", ["classifier.py", "--resume"])
    assert command_line("--resume") == "python classifier.py --resume"


@pytest.mark.parametrize(
    "text,clean",
    [
        ("http://me:secret@host/x", "http://***@host/x"),
        ("http://host/x?token=secret more", "http://host/x?*** more"),
        ("postgresql://u:secret@h/db", "postgresql://***@h/db"),
        ("postgresql://u:se/cret@h/db", "postgresql://***@h/db"),
        ("http://host/a@b", "http://host/a@b"),
        (
            '{"uri": "http://127.0.0.1:5000", "cpu": "CPU @ 2.2GHz"}',
            '{"uri": "http://127.0.0.1:5000", "cpu": "CPU @ 2.2GHz"}',
        ),
        ("at http://host:5000 by a@b", "at http://host:5000 by a@b"),
        ("data/file.txt", "data/file.txt"),
    ],
)
def test_redact(text, clean):
    assert redact(text) == clean


def test_modes_match_the_flag():
    choices = next(each for each in fields(Config) if each.name == "mode").metadata["choices"]
    assert tuple(classifier.MODES) == choices


def test_help_names_no_python_value(capsys):
    assert "None" not in "\n".join(help_lines(capsys))
