"""Which code a notebook's outputs depend on, definition by definition.

A notebook reaches the definitions that its cells name, those that these name, and so on. Its outputs are fresh as long
as none of them has changed, whichever module they live in. Comments, docstrings, line breaks and imports do not count.
"""

import ast
import io
import json
import re
import tokenize
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path


def short_hash(text):
    "A hash of a text, of eight digits."
    return sha256(text.encode()).hexdigest()[:8]


def docstrings(tree):
    "The starts of a syntax tree's docstrings: (line, column)."
    owners = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    firsts = (node.body[0] for node in ast.walk(tree) if isinstance(node, owners) and node.body)
    return {
        (first.lineno, first.col_offset)
        for first in firsts
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    }


def tokens(source):
    """The tokens of some code that its result depends on, as text. An f-string counts as one token, as in Python up to
    3.11."""
    skip, lines = docstrings(ast.parse(source)), source.splitlines(keepends=True)
    begun, depth = None, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind.endswith("STRING_START"):
            begun, depth = begun or token.start, depth + 1
        elif kind.endswith("STRING_END"):
            depth -= 1
            if depth == 0:
                (top, left), (bottom, right) = begun, token.end
                text = "".join(lines[top - 1 : bottom])
                yield text[left : len(text) - len(lines[bottom - 1]) + right]
                begun = None
        elif depth == 0 and kind == "INDENT":
            yield "INDENT"
        elif depth == 0 and kind == "DEDENT":
            yield "DEDENT"
        elif depth == 0 and kind not in ("COMMENT", "NL", "NEWLINE", "ENDMARKER") and token.start not in skip:
            yield token.string


def bound_names(node):
    "The names that a top-level statement of a module defines."
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = getattr(node, "targets", [node.target] if isinstance(node, (ast.AnnAssign, ast.AugAssign)) else [])
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


def is_guard(node):
    "Whether a statement is `if __name__ == …` or `if TYPE_CHECKING`."
    return isinstance(node, ast.If) and any(
        isinstance(n, ast.Name) and n.id in ("__name__", "TYPE_CHECKING") for n in ast.walk(node.test)
    )


class Module:
    "The definitions of a module, and the meanings of its names."

    def __init__(self, name, source, is_package=False):
        self.name, self.source, self.lines = name, source, source.splitlines()
        self.package = name if is_package else name.rpartition(".")[0]
        self.definitions, self.body, self.imports = {}, [], {}  # names: statements; other statements; names: where from
        tree = ast.parse(source)
        for node in tree.body:
            names = [] if isinstance(node, (ast.Import, ast.ImportFrom)) else bound_names(node)
            for bound in names:
                self.definitions.setdefault(bound, []).append(node)
            plain = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not names and not plain and not is_guard(node) and not isinstance(node, (ast.Import, ast.ImportFrom)):
                self.body.append(node)
        self.definitions.pop("__all__", None)
        self.collect_imports(ast.walk(tree))

    def collect_imports(self, nodes):
        for node in nodes:
            if isinstance(node, ast.Import):
                for n in node.names:
                    self.imports[n.asname or n.name.split(".")[0]] = n.asname and n.name, None
                self.imports |= {n.name: (n.name, None) for n in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = self.package.split(".")[: len(self.package.split(".")) - node.level + 1] if node.level else []
                of = ".".join([*above, *([node.module] if node.module else [])])
                for n in node.names:
                    self.imports[n.asname or n.name] = of, n.name

    def text(self, nodes):
        "The code of some statements, without the parts that do not count."
        parts = []
        for node in nodes:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            parts.append("\n".join(self.lines[first - 1 : node.end_lineno]) + "\n")
        return "\n".join(" ".join(tokens(part)) for part in parts)

    @cached_property
    def statements(self):
        "The statements of each definition, and under `` those that define nothing."
        return {**self.definitions, **({"": self.body} if self.body else {})}

    @cached_property
    def hashes(self):
        "The hash of each definition."
        return {name: short_hash(name + self.text(nodes)) for name, nodes in self.statements.items()}


read_module = lru_cache(maxsize=None)(Module)  # most modules are the same when they are read again


def dotted(node):
    "`a.b.c` as a list of its names; empty if it is not such a chain."
    names = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else []


class House:
    "All modules of the package `supermix` in a folder."

    def __init__(self, root):
        self.root, self.modules = Path(root), {}
        for path in sorted((self.root / "supermix").rglob("*.py")):
            parts = path.relative_to(self.root).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            if parts[-1] != "_modidx":
                self.modules[name] = read_module(name, path.read_text(), is_package)

    @cached_property
    def hashes(self):
        "The hash of each definition: (module, name)."
        return {(m.name, name): digest for m in self.modules.values() for name, digest in m.hashes.items()}

    def find(self, module, name):
        "The definitions that `name` means in a module: usually one; none if the name is not ours."
        m = self.modules.get(module)
        if m is None:
            return []
        if name in m.definitions:
            return [(module, name)]
        if name in m.imports:
            of, origin = m.imports[name]
            return self.find(of, origin) if of and origin and (of, origin) != (module, name) else []
        if "__getattr__" in m.definitions:  # names that are created on demand
            return [(other.name, name) for other in self.modules.values() if name in other.definitions]
        return []

    def named(self, module, nodes):
        "The definitions that some statements of a module name."
        for node in (n for statement in nodes for n in ast.walk(statement)):
            if isinstance(node, ast.Name):
                yield from self.find(module.name, node.id) or self.local(module, node.id)
            elif isinstance(node, ast.Attribute):
                first, *rest = dotted(node) or [""]
                of, origin = module.imports.get(first, (None, None))
                of = f"{of}.{origin}" if origin else of or first
                while rest and f"{of}.{rest[0]}" in self.modules:
                    of = f"{of}.{rest.pop(0)}"
                if rest:
                    yield from self.find(of, rest[0])

    @cached_property
    def names(self):
        "The definitions that each definition names, and the other statements of its module."
        return {
            (m.name, name): {*self.named(m, nodes), *([(m.name, "")] if m.body else [])}
            for m in self.modules.values()
            for name, nodes in m.statements.items()
        }

    def local(self, module, name):
        "The definitions that `name` means in a module outside the package, such as a notebook."
        if name in module.definitions:
            return []
        of, origin = module.imports.get(name, (None, None))
        return self.find(of, origin) if of and origin else []

    def reached(self, module, nodes):
        "All definitions that some statements of a module reach: {(module, name)}."
        found, todo = set(), set(self.named(module, nodes))
        while todo:
            found |= todo
            todo = {name for place in todo for name in self.names[place]} - found
        return found


def code_of(path):
    "The code of a notebook's cells, without magics, as one text."
    cells = json.loads(Path(path).read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return "\n".join(re.sub(r"^\s*[%!].*$", "pass", text, flags=re.MULTILINE) for text in texts) + "\n"


def programs(tree):
    "Strings of a syntax tree that are programs which import supermix, as modules."
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if "import" not in text or "supermix" not in text:
            continue
        try:
            yield Module("program", text)
        except (SyntaxError, ValueError):
            continue


def shown_files(root, text):
    "Results and policies that lines of `text` read."
    for name in sorted(set(re.findall(r"\.\./((?:results|policies)/[\w./=-]*)", text))):
        place = root / name
        yield from sorted(place.rglob("[!.]*.json")) if place.is_dir() else [place] if place.is_file() else []


def dependencies(house, path):
    """What a notebook's outputs depend on, {hash: name}: the code of its own cells, each definition of ours that they
    reach, the results and policies that they show, and the shipped teachers where they may ask one."""
    notebook = Module("notebook", code_of(path))
    tree = ast.parse(notebook.source)
    own = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    found = house.reached(notebook, own)
    for program in programs(tree):
        found |= house.reached(program, ast.parse(program.source).body)
    texts = {"its cells": notebook.text(own)}
    uses = {short_hash(name + text): name for name, text in texts.items()}
    uses |= {house.hashes[place]: place[1] or f"statements of {place[0]}" for place in found}
    files = list(shown_files(house.root, notebook.source))
    if any(name == "pretrained" for _, name in found):
        files += sorted((house.root / "supermix" / "teachers").glob("*.*"))
    return uses | {sha256(file.read_bytes()).hexdigest()[:8]: str(file.relative_to(house.root)) for file in files}


def changes(kept, now):
    "The names of what has changed between two such dictionaries. A teacher that was added since then changes nothing."
    odd = [
        kept.get(digest) or now[digest]
        for digest in kept.keys() ^ now.keys()
        if digest in kept or "/teachers/" not in now[digest]
    ]
    return sorted(set(odd), key=lambda name: (name != "its cells", name))
