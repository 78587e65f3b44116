"""The file's own rules: read once from top to bottom, importing does nothing, heavy imports stay where they serve."""
import ast
import subprocess
import sys

import pytest
from conftest import ROOT

SOURCE = (ROOT / "classifier.py").read_text()
TREE = ast.parse(SOURCE)
DEFINITIONS = [node for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]


def test_no_forward_reference():
    names, seen = {node.name for node in DEFINITIONS}, set()
    for node in DEFINITIONS:
        used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} & names
        assert used <= seen | {node.name}, f"{node.name} uses {used - seen} from below"
        seen.add(node.name)


def test_module_level_holds_imports_constants_and_definitions_only():
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
    rest = [node for node in TREE.body[1:] if not isinstance(node, allowed)]
    assert [ast.unparse(node.test) for node in rest] == ["__name__ == '__main__'"]


@pytest.mark.parametrize("module", ["mlflow", "torchvision", "matplotlib", "sklearn", "tqdm"])
def test_heavy_imports_are_inside_functions(module):
    top = [alias for node in TREE.body if isinstance(node, ast.Import) for alias in node.names]
    assert module not in {alias.name for alias in top}
    assert module not in {node.module.split(".")[0] for node in TREE.body if isinstance(node, ast.ImportFrom)}


def test_only_the_reporting_functions_print():
    printing = {function.name for function in FUNCTIONS for node in ast.walk(function)
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"}
    assert printing == {"note", "emit", "main"}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: f"{function.name}:{function.lineno}")
def test_signatures_are_typed(function):
    arguments = [*function.args.args, *function.args.kwonlyargs]
    untyped = [each.arg for each in arguments if each.annotation is None and each.arg not in ("self", "cls")]
    assert not untyped and function.returns is not None


def test_longest_function_fits_a_screen():
    longest = max(FUNCTIONS, key=lambda node: node.end_lineno - node.lineno)
    assert longest.end_lineno - longest.lineno < 50, longest.name


def test_import_writes_nothing_and_loads_nothing_heavy(tmp_path):
    code = ("import sys; import classifier; "
            "print([name for name in ('mlflow', 'torchvision', 'matplotlib', 'sklearn') if name in sys.modules])")
    found = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, text=True,
                           capture_output=True)
    assert (found.stdout, found.stderr, list(tmp_path.iterdir())) == ("[]\n", "", [])
