"""What the documents tell people to type exists."""

import re
import shlex
from dataclasses import asdict, fields

import pytest
from conftest import ROOT

from classifier import Config, parse_config

TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "OPTIMIZATIONS.md")}
TEXTS["--help"] = (ROOT / "classifier.py").read_text().split('"""')[1]
COMMANDS = sorted(
    {
        (name, match)
        for name, text in TEXTS.items()
        for match in re.findall(r"(?:python|torchrun [^\n`]*?) ?classifier\.py ([^`#|\n]*)", text)
    }
)
FLAGS = {"--" + name.replace("_", "-") for name in asdict(Config())}
FOREIGN = {
    "--backend-store-uri",
    "--env-manager",
    "--port",
    "--help",
    "--nproc-per-node",
    "--nnodes",
    "--max-restarts",
    "--rdzv-backend",
    "--rdzv-id",
    "--rdzv-endpoint",
}


@pytest.mark.parametrize("name,words", COMMANDS, ids=lambda text: text.strip())
def test_commands_parse(name, words, tmp_path):
    (tmp_path / "pets").mkdir()
    parse_config(shlex.split(words))


@pytest.mark.parametrize("name", TEXTS)
def test_flags_exist(name):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXTS[name]))
    assert {flag.replace("--no-", "--") for flag in named} <= FLAGS | FOREIGN
    assert COMMANDS


def test_the_table_of_flags_is_complete_and_has_the_defaults():
    told = {}
    for flags, defaults in re.findall(r"^\| (`--.+) \| (.+) \|$", TEXTS["README.md"], re.MULTILINE):
        told |= zip(re.findall(r"--[\w-]+", flags), defaults.split(", "), strict=True)
    assert told.keys() == FLAGS
    for each in fields(Config):
        flag = "--" + each.name.replace("_", "-")
        if isinstance(each.default, bool):
            assert told[flag] == ("off", "on")[each.default]
        elif isinstance(each.default, int | float):
            assert told[flag] == f"{each.default:g}"


@pytest.mark.parametrize("name,most", [("README.md", 230), ("OPTIMIZATIONS.md", 240)])
def test_documents_stay_short(name, most):
    assert len(TEXTS[name].splitlines()) <= most


def test_pictures_are_there_and_small():
    named = re.findall(r"\]\((\.github/[^)]+)\)", TEXTS["README.md"])
    assert len(named) <= 5
    assert all((ROOT / name).stat().st_size < 200_000 for name in named)
