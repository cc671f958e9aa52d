"""What a user may rely on: the names in each module's `__all__` have hints and docstrings; the rest is internal."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "supermix"
TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
    for path in sorted(ROOT.rglob("*.py"))
    if not path.name.startswith("_") and path != ROOT / "generate.py"
}


def all_of(tree):
    "The value of a module's `__all__`."
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def defined_in(tree):
    "A module's top-level names, and what defines each of them."
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name) and part.id != "__all__":
                        yield part.id, node


def methods_of(node):
    "The functions whose signature a user sees: a function itself, or a class's public methods and its `__init__`."
    if isinstance(node, ast.FunctionDef):
        return [node]
    return [
        part
        for part in node.body
        if isinstance(part, ast.FunctionDef) and (part.name == "__init__" or not part.name.startswith("_"))
    ]


def without_hints(function, in_class):
    "The parameters of a function that have no type hint, and `return` where it has none."
    given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    plain = any(getattr(mark, "id", "") == "staticmethod" for mark in function.decorator_list)
    if in_class and not plain:
        given = given[1:]
    missing = [one.arg for one in given if one.annotation is None]
    return missing + ["return"] * (function.returns is None and function.name != "__init__")


IMPORTED = {
    (node.module or "").split(".")[-1] + "." + alias.name
    for tree in [*TREES.values(), ast.parse((ROOT / "generate.py").read_text())]
    for node in ast.walk(tree)
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
# three kinds of names: public (in `__all__`); internal (imported by another module, or with an underscore); and taught:
# what a chapter defines and explains, and no other module needs
PUBLIC = {
    f"{module}.{name}": node
    for module, tree in TREES.items()
    for name, node in defined_in(tree)
    if name in all_of(tree) and isinstance(node, ast.FunctionDef | ast.ClassDef)
}
TAUGHT = {
    f"{module}.{name}": node
    for module, tree in TREES.items()
    if module != "cli"
    for name, node in defined_in(tree)
    if not name.startswith("_") and name not in all_of(tree) and f"{module.split('.')[-1]}.{name}" not in IMPORTED
}


def test_the_surface_is_small():
    count = sum(len(all_of(tree)) for tree in TREES.values())
    assert 50 < len(PUBLIC) and count <= 120, f"{count} public names: has a helper lost its underscore?"


@pytest.mark.parametrize("name", PUBLIC | TAUGHT)
def test_a_public_name_has_a_docstring_and_hints(name):
    node = (PUBLIC | TAUGHT)[name]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef), "a constant that only its module uses needs an underscore"
    words = ast.get_docstring(node)
    assert words and not words.startswith("The same"), "a docstring stands alone"
    for function in methods_of(node):
        assert not without_hints(function, isinstance(node, ast.ClassDef)), f"{function.name}: no hints"


def test_what_only_its_own_module_uses_is_explained():
    assert len(TAUGHT) <= 50, "a helper needs an underscore"


@pytest.mark.parametrize("module", TREES)
def test_a_module_defines_each_name_once(module):
    names = [node.name for node in TREES[module].body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(set(names)) == len(names)
