"""Makes the book (out/book): one static site with the notebooks and their saved outputs, their solutions, and the
package's signatures.
"""

import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from house import ROOT, name_of, notebooks

SOURCE = ROOT / "build" / "book"
FETCHED = re.compile(
    r"""<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=["'](?:https?:)?//[^>]*>"""
    r"""|(?:@import|url\()\s*["']?(?:https?:)?//[^)]*"""
)


def module_of(name):
    return "supermix." + name.partition("_")[2] if re.match(r"\d\d_", name) else None


def text_cell(text):
    return {"cell_type": "markdown", "id": sha256(text.encode()).hexdigest()[:8], "metadata": {}, "source": text}


def page_of(path, solved):
    "A notebook as the book shows it: without directives and widgets, with links to its module and its solutions."
    notebook, name, cells = json.loads(path.read_text()), name_of(path), []
    notebook["metadata"] = {
        "kernelspec": notebook["metadata"]["kernelspec"],
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            alt = re.search(r"^#\| fig-alt: (.*)", text, re.MULTILINE)
            if alt:
                cell["metadata"]["mystnb"] = {"image": {"alt": alt[1]}}
            text = re.sub(r"^#\|.*\n?", "", text, flags=re.MULTILINE).strip()
            cell["outputs"] = [
                o for o in cell["outputs"] if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})
            ]
            if not text:
                continue  # #| default_exp
        else:
            text = text.replace("](../nbs/", "](../").replace("](../solutions/", "](solutions/")
        cells.append(cell | {"source": text})
    module = module_of(name)
    if module:
        cells.insert(1, text_cell(f"*Exports* [`{module}`](api/{module}.md)*.*"))
    if name.startswith("solutions/"):
        cells.insert(1, text_cell(f"*Back to [chapter {path.stem[:2]}](../{path.stem}.ipynb)*."))
    if name in solved:
        cells.append(text_cell(f"*[Solutions](solutions/{name}.ipynb)*"))
    return notebook | {"cells": cells}


def signature(node, lines):
    "The lines of a definition above its body, with comments; for a class also its fields."
    first, top = node.body[0], min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    if isinstance(node, ast.ClassDef):
        head = lines[top : first.lineno - 1] or [lines[top][: first.col_offset]]
        return head + [
            line
            for n in node.body
            if isinstance(n, (ast.AnnAssign, ast.Assign))
            for line in lines[n.lineno - 1 : n.end_lineno]
        ]
    if first.lineno > node.lineno and not lines[first.lineno - 1][: first.col_offset].strip():
        return lines[top : first.lineno - 1]
    # it stands on its `def`'s last line
    return lines[top : first.lineno - 1] + [lines[first.lineno - 1][: first.col_offset].rstrip()]


def described(name, node, lines, heading):
    "A definition as Markdown: heading, signature, docstring; then its public methods."
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        block, about = lines[node.lineno - 1 : min(node.end_lineno, node.lineno + 14)], None
    else:
        block, about = signature(node, lines), ast.get_docstring(node)
    indent = min(len(line) - len(line.lstrip()) for line in block if line.strip())
    code = "\n".join(line[indent:].rstrip() for line in block)
    parts = [f"{heading} `{name}`", f"```python\n{code}\n```", *([about] if about else [])]
    if isinstance(node, ast.ClassDef):
        methods = [
            n
            for n in node.body
            if isinstance(n, ast.FunctionDef) and (n.name in ("__init__", "__call__") or not n.name.startswith("_"))
        ]
        parts += [described(n.name, n, lines, heading + "#") for n in methods]
    return "\n\n".join(parts)


def api_page(module, chapter):
    "A module's names, in the order of its chapter."
    text = ROOT.joinpath(*module.split(".")).with_name(module.split(".")[-1] + ".py").read_text()
    tree, lines = ast.parse(text), text.splitlines()
    defined = {n.name: n for n in tree.body if hasattr(n, "name")}
    for n in tree.body:  # A = 1, B: int = 2, and C, D = 3, 4
        for target in getattr(n, "targets", [n.target] if isinstance(n, ast.AnnAssign) else []):
            defined |= {t.id: n for t in ast.walk(target) if isinstance(t, ast.Name)}
    names = sorted(ast.literal_eval(defined["__all__"].value), key=lambda name: defined[name].lineno)
    head = [f"# {module}", ast.get_docstring(tree) or "", f"From chapter [{chapter}](../{chapter}.ipynb)."]
    return "\n\n".join(head + [described(name, defined[name], lines, "##") for name in names]) + "\n"


def title_of(page):
    "The title of a notebook's page, with its number."
    return re.search(
        r"^# (?:Solutions: )?(.*)",
        "\n\n".join(c["source"] for c in page["cells"] if c["cell_type"] == "markdown"),
        re.MULTILINE,
    )[1]


def tree_of(caption, entries):
    "A part of the navigation as a cell, or None without entries."
    return (
        [text_cell("```{toctree}\n:hidden:\n:caption: " + caption + "\n\n" + "\n".join(entries) + "\n```")]
        if entries
        else []
    )


def sources():
    "Write all pages, with the navigation in the order of the index."
    shutil.rmtree(SOURCE, ignore_errors=True)
    (SOURCE / "api").mkdir(parents=True)
    shutil.copytree(ROOT / "nbs" / "images", SOURCE / "images")
    found = {name_of(path): path for path in notebooks()}
    solved = [name.removeprefix("solutions/") for name in found if name.startswith("solutions/")]
    pages = {name: page_of(path, solved) for name, path in found.items()}
    index = "".join(cell["source"] for cell in pages["index"]["cells"] if cell["cell_type"] == "markdown").partition(
        "## The chapters"
    )[2]
    order = list(dict.fromkeys(re.findall(r"\]\(([\w./]+)\.ipynb\)", index)))
    modules = {name: module_of(name) for name in order if module_of(name)}
    numbered = lambda names: [  # the glossary has no number
        f"{''.join(re.findall(r'^[0-9]+', name.rpartition('/')[2]))} {title_of(pages[name])} <{name}>".strip()
        for name in names
    ]
    pages["index"]["cells"] += [
        *tree_of("Chapters", numbered(n for n in order if "/" not in n)),
        *tree_of("Runs of the paper", numbered(n for n in order if "/" in n)),
        *tree_of("Solutions", numbered(f"solutions/{n}" for n in order if n in solved)),
        *tree_of("API", [f"api/{m}" for m in modules.values()]),
    ]
    for name, page in pages.items():
        target = SOURCE / f"{name}.ipynb"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(page))
    for name, module in modules.items():
        (SOURCE / "api" / f"{module}.md").write_text(api_page(module, name))


def fetched(site):
    "The files that pages and styles would load from other sites."
    return [
        f"{f.relative_to(site)}: {m[0][:120]}"
        for f in sorted(site.rglob("*"))
        if f.suffix in (".html", ".css")
        for m in FETCHED.finditer(f.read_text())
    ]


class Links(HTMLParser):
    "The links of a page, and its anchors."

    def __init__(self, text):
        super().__init__()
        self.anchors, self.targets = {"", "top"}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found.get("id"), found.get("name")}
        self.targets += [found[key] for key in ("href", "src") if found.get(key)]


def dead(site):
    "Links within the site whose file or anchor does not exist."
    site = site.resolve()
    pages = {
        f: Links(f.read_text()) for f in sorted(site.rglob("*.html")) if f.relative_to(site).parts[0] != "_static"
    }  # there are the theme's templates
    for page, links in pages.items():
        for target in dict.fromkeys(links.targets):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue  # elsewhere, or an image in the page
            file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            known = (
                file.is_file()
                and file.is_relative_to(site)
                and (file not in pages or unquote(parts.fragment) in pages[file].anchors)
            )
            if not known:
                yield f"{page.relative_to(site)}: {target}"


def build(source, site):
    """Render the pages, or exit with all faults: Sphinx's warnings, files from other sites, and broken links."""
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-E",
        "--fail-on-warning",
        "--keep-going",
        "-c",
        ROOT / "tools",
        "-d",
        source.with_name("doctrees"),
        source,
        site,
    ]
    faults = ["Sphinx found faults: see above."] if subprocess.run(command).returncode else []
    faults += [f"This is loaded from another site: {fault}" for fault in fetched(site)] + [
        f"This link is broken: {fault}" for fault in dead(site)
    ]
    if faults:
        sys.exit("\n".join(faults))


def make(site):
    "Make the book beside its folder, and put it in the place of the old one when it is whole."
    site.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=site.parent, prefix=f".{site.name}.") as folder:
        sources()
        build(SOURCE, Path(folder) / "book")
        shutil.rmtree(site, ignore_errors=True)
        (Path(folder) / "book").rename(site)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=ROOT / "out" / "book",
        help="the folder for the book; an existing book is replaced",
    )
    site = parser.parse_args().folder
    if site.exists() and (not site.is_dir() or any(site.iterdir()) and not (site / ".buildinfo").is_file()):
        parser.error(f"{site} exists and is not a book: name another folder, or empty it.")
    make(site)
    print(
        f"{site / 'index.html'}: {sum(1 for _ in site.rglob('*.html'))} pages, "
        f"{sum(f.stat().st_size for f in site.rglob('*') if f.is_file()) / 1e6:.0f} MB"
    )
