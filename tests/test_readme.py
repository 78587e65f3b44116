"""What the documents tell people to type exists."""
import re
import shlex

import pytest
from conftest import ROOT

from classifier import Config, parse_config

TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "OPTIMIZATIONS.md")}
TEXTS["--help"] = (ROOT / "classifier.py").read_text().split('"""')[1]
COMMANDS = sorted({(name, match) for name, text in TEXTS.items()
                   for match in re.findall(r"(?:python|torchrun [^\n`]*?) ?classifier\.py ([^`#|\n]*)", text)})
FLAGS = {"--" + name.replace("_", "-") for name in Config().flat()}
FOREIGN = {"--backend-store-uri", "--env-manager", "--port", "--help", "--nproc-per-node", "--nnodes", "--max-restarts",
           "--rdzv-backend", "--rdzv-id", "--rdzv-endpoint", "--nodes", "--ntasks-per-node", "--gpus-per-node",
           "--cpus-per-task"}


@pytest.mark.parametrize("name,words", COMMANDS, ids=lambda text: text.strip())
def test_commands_parse(name, words, capsys, tmp_path):
    (tmp_path / "pets").mkdir()
    if "--help" not in words:
        parse_config(shlex.split(words))


@pytest.mark.parametrize("name", TEXTS)
def test_flags_exist(name):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXTS[name]))
    assert {flag.replace("--no-", "--") for flag in named} <= FLAGS | FOREIGN
    assert COMMANDS


def test_no_unfilled_figure():
    assert not [found for text in TEXTS.values() for found in re.findall(r"@[A-Z]+@", text)]


def test_the_test_command_is_the_one_that_ci_runs():
    pattern = re.search(r"grep -m 1 '(.*)' README", (ROOT / ".ci" / "run").read_text()).group(1)
    assert re.search(pattern, TEXTS["README.md"], re.MULTILINE).group() == \
        "pip install -r requirements.txt && python -m pytest"
