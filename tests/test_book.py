"""What the book is made of: pages without directives and widgets, and signatures with their comments."""

import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
book = importlib.import_module("book")
CHAPTERS = sorted(p for p in (ROOT / "nbs").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_module_is_described_by_its_docstrings_and_comments(path):
    docments = pytest.importorskip("fastcore.docments").docments
    module = importlib.import_module(book.module_of(path.stem))
    page = book.api_page(module.__name__, path.stem)
    assert re.findall(r"^## `(\w+)`$", page, re.MULTILINE) == sorted(set(module.__all__), key=lambda n: page.index(f"\n## `{n}`\n"))
    assert inspect.getdoc(module).splitlines()[0] in page
    for name in module.__all__:
        part, value = page.partition(f"\n## `{name}`\n")[2], getattr(module, name)
        if not (inspect.isfunction(value) or inspect.isclass(value)) or value.__module__ != module.__name__: continue
        if value.__doc__ and f"{name}(" != value.__doc__[:len(name) + 1]: assert inspect.getdoc(value).splitlines()[0] in part, name
        if inspect.isfunction(value):
            for comment in filter(None, docments(value).values()): assert all(line in part for line in comment.splitlines()), (name, comment)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_page_is_the_chapter_without_directives_and_widgets(path):
    page = book.page_of(path, [path.stem])
    code = ["".join(cell["source"]) for cell in page["cells"] if cell["cell_type"] == "code"]
    assert code and not any(text.startswith("#|") for text in code)
    assert "widget-view" not in json.dumps(page) and page["cells"][0]["source"].startswith("# ")
    assert f"(api/{book.module_of(path.stem)}.md)" in page["cells"][1]["source"] and f"(solutions/{path.stem}.ipynb)" in page["cells"][-1]["source"]
    kept = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    images = lambda cells: sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", []))
    assert images(page["cells"]) == images(kept)


def test_what_would_be_fetched_is_found(tmp_path):
    (tmp_path / "page.html").write_text('<a href="https://x.org">a link</a><script src="https://x.org/a.js"></script><img src="//x.org/a.png"><img src="a.png">')
    (tmp_path / "style.css").write_text("@font-face { src: url(https://x.org/a.woff) } a { background: url(a.png) }")
    found = book.fetched(tmp_path)
    assert len(found) == 3 and all("x.org" in text and "a link" not in text for text in found)
