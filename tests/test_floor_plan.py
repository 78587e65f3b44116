"""The file's own rules: its size, its order, and that importing it does nothing."""

import ast
import re
import subprocess
import sys
from dataclasses import fields

from conftest import ROOT

from classifier import Config

MOST_LINES = 4000  # against creeping up; no reason to pack
MOST_FLAGS = 41
SCREEN = 60  # lines of a function with its docstring
HEAVY = {"mlflow", "torchvision", "matplotlib", "sklearn"}

SOURCE = (ROOT / "classifier.py").read_text()
TREE = ast.parse(SOURCE)
DEFINITIONS = [node for node in TREE.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]


def test_line_budget():
    assert len(SOURCE.splitlines()) <= MOST_LINES


def test_number_of_flags():
    assert len(fields(Config)) <= MOST_FLAGS


def test_at_most_one_comprehension_and_conditional_expression_a_statement():
    comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    packed = [
        node.lineno
        for node in ast.walk(TREE)
        if isinstance(node, ast.stmt) and not hasattr(node, "body")  # a simple statement
        for kinds in (comprehensions, ast.IfExp)
        if sum(isinstance(each, kinds) for each in ast.walk(node)) > 1
    ]
    assert not packed


def test_no_forward_reference():
    names, seen = {node.name for node in DEFINITIONS}, set()
    for node in DEFINITIONS:
        used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} & names
        assert used <= seen | {node.name}, f"{node.name} uses {used - seen} from below"
        seen.add(node.name)


def test_sections_are_those_that_the_docstring_lists():
    listed = re.search(r"below it:\n(.*?)\.\n", SOURCE, re.DOTALL)[1].replace("\n", " ")
    headings = re.findall(r"^# -{90,}\n# (\w+)", SOURCE, re.MULTILINE)
    assert [heading.lower() for heading in headings] == listed.split(", ")


def test_module_level_holds_imports_constants_and_definitions_only():
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    rest = [node for node in TREE.body[1:] if not isinstance(node, allowed)]
    assert [ast.unparse(node.test) for node in rest] == ["__name__ == '__main__'"]


def test_import_writes_nothing_and_loads_nothing_heavy(tmp_path):
    command = [sys.executable, "-B", "-X", "importtime", "-c", "import classifier"]
    options = {"cwd": tmp_path, "env": {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run(command, **options, text=True, capture_output=True)
    lines = done.stderr.splitlines()
    loaded = {line.split("|")[-1].strip() for line in lines}
    assert {"classifier", "torch"} <= loaded and not loaded & HEAVY
    assert [line for line in lines if not line.startswith("import time:")] == []
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (0, "", [])


def test_only_the_reporting_functions_print():
    printing = {
        function.name
        for function in FUNCTIONS
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "tqdm.write")
    }
    assert printing == {"log", "emit", "run_mode"}


def test_every_function_fits_a_screen():
    lines = {(each.name, each.lineno): each.end_lineno - each.lineno + 1 for each in FUNCTIONS}
    long = {key: count for key, count in lines.items() if count > SCREEN}
    assert not long
