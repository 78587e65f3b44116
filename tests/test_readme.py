"""What the documents tell people to type exists."""

import re
import shlex
from dataclasses import asdict, fields

import pytest
from conftest import ROOT

from classifier import AUGMENTATIONS, Config, parse_config

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
    for folder in ("pets", "ink"):
        (tmp_path / folder).mkdir()
    parse_config(shlex.split(words))


@pytest.mark.parametrize("name", TEXTS)
def test_flags_exist(name):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXTS[name]))
    assert {flag.replace("--no-", "--") for flag in named} <= FLAGS | FOREIGN
    assert COMMANDS


def table_rows(name):
    """The cells of all tables, without code blocks."""
    text = re.sub(r"^```.*?^```", "", TEXTS[name], flags=re.MULTILINE | re.DOTALL)
    return [re.findall(r"[^|]+", line) for line in text.splitlines() if line.startswith("| ")]


def test_the_table_of_flags_is_complete_and_has_the_defaults():
    told = {}
    for flags, defaults, _ in (row for row in table_rows("README.md") if row[0][:4] == " `--"):
        told |= zip(re.findall(r"--[\w-]+", flags), defaults.strip().split(", "), strict=True)
    assert told.keys() == FLAGS
    for each in fields(Config):
        flag = "--" + each.name.replace("_", "-")
        if isinstance(each.default, bool):
            assert told[flag] == ("off", "on")[each.default]
        elif isinstance(each.default, int | float):
            assert told[flag] == f"{each.default:g}"


def test_the_table_of_short_names_has_those_that_do_not_begin_their_flag():
    rows = ["|".join(row) for row in table_rows("README.md") if len(row) == 4]
    told = re.findall(r"`([a-z-]+)` \| --([a-z-]+)", "\n".join(rows))
    short = {each.metadata["short"]: each.name.replace("_", "-") for each in fields(Config)}
    assert dict(told) == {
        name: flag for name, flag in short.items() if name and not flag.startswith(name)
    }


def test_the_table_of_recipes_by_epochs_is_the_programs():
    rows = [row for row in table_rows("OPTIMIZATIONS.md") if len(row) == 5 and row[1][1].isdigit()]
    words = {"none": 0, "a fifth": 0.2}
    told = [
        [words.get(cell.strip()) or float(words.get(cell.strip(), cell)) for cell in row[1:]]
        for row in rows
    ]
    assert told == [list(each) for each in AUGMENTATIONS.values()]


def test_code_in_optimizations_is_the_programs():
    source = [line.strip() for line in (ROOT / "classifier.py").read_text().splitlines()]
    blocks = re.findall(
        r"^```python\n(.*?)^```", TEXTS["OPTIMIZATIONS.md"], re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 5
    for block in blocks:
        lines = [line.strip() for line in block.splitlines()]
        starts = [number for number, line in enumerate(source) if line == lines[0]]
        assert any(source[start : start + len(lines)] == lines for start in starts), block


@pytest.mark.parametrize("name,most", [("README.md", 1200), ("OPTIMIZATIONS.md", 1900)])
def test_documents_stay_short(name, most):
    """Words outside code, cells and paragraphs: a limit on lines only packs them."""
    text = re.sub(r"^```.*?^```", "\n", TEXTS[name], flags=re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"\S*\w\S*", text)) <= most
    assert not [cell for row in table_rows(name) for cell in row if len(cell.strip()) > 90]
    for paragraph in re.split(r"\n\n|\n(?=- |\| )", text):
        assert len(paragraph.strip().splitlines()) <= 4, paragraph


def test_pictures_are_there_and_small():
    named = re.findall(r"\]\((\.github/[^)]+)\)", TEXTS["README.md"])
    assert len(named) <= 7
    assert all((ROOT / name).stat().st_size < 200_000 for name in named)
