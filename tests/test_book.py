"""What the book is made of: pages without directives and widgets, and signatures with their comments."""

import importlib
import inspect
import json
import re
import shutil
import subprocess
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
    assert re.findall(r"^## `(\w+)`$", page, re.MULTILINE) == sorted(
        set(module.__all__), key=lambda n: page.index(f"\n## `{n}`\n")
    )
    assert inspect.getdoc(module).splitlines()[0] in page
    for name in module.__all__:
        part, value = page.partition(f"\n## `{name}`\n")[2], getattr(module, name)
        if not (inspect.isfunction(value) or inspect.isclass(value)) or value.__module__ != module.__name__:
            continue
        if value.__doc__ and f"{name}(" != value.__doc__[: len(name) + 1]:
            assert inspect.getdoc(value).splitlines()[0] in part, name
        if inspect.isfunction(value):
            for comment in filter(None, docments(value).values()):
                assert all(line in part for line in comment.splitlines()), (name, comment)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_page_is_the_chapter_without_directives_and_widgets(path):
    page = book.page_of(path, [path.stem])
    code = ["".join(cell["source"]) for cell in page["cells"] if cell["cell_type"] == "code"]
    assert code and not any(text.startswith("#|") for text in code)
    assert "widget-view" not in json.dumps(page) and page["cells"][0]["source"].startswith("# ")
    assert (
        f"(api/{book.module_of(path.stem)}.md)" in page["cells"][1]["source"]
        and f"(solutions/{path.stem}.ipynb)" in page["cells"][-1]["source"]
    )
    kept = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    images = lambda cells: sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", []))
    assert images(page["cells"]) == images(kept)


def test_an_old_book_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    def build(source, site):
        site.mkdir()
        (site / "index.html").write_text("new")
        if broken:
            raise broken

    monkeypatch.setattr(book, "sources", lambda: None)
    monkeypatch.setattr(book, "build", build)
    site = tmp_path / "out" / "book"
    site.mkdir(parents=True)
    (site / "index.html").write_text("old")
    for broken in (KeyboardInterrupt(), SystemExit("a fault")):
        with pytest.raises(type(broken)):
            book.make(site)
        assert (site / "index.html").read_text() == "old" and list(site.parent.iterdir()) == [site]
    broken = None
    book.make(site)
    assert (site / "index.html").read_text() == "new" and list(site.parent.iterdir()) == [site]


def test_what_would_be_fetched_is_found(tmp_path):
    (tmp_path / "page.html").write_text(
        '<a href="https://x.org">a link</a><script src="https://x.org/a.js"></script>'
        '<img src="//x.org/a.png"><img src="a.png">'
    )
    (tmp_path / "style.css").write_text("@font-face { src: url(https://x.org/a.woff) } a { background: url(a.png) }")
    found = book.fetched(tmp_path)
    assert len(found) == 3 and all("x.org" in text and "a link" not in text for text in found)


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "solutions").mkdir()
    (tmp_path / "index.html").write_text(
        '<a href="solutions/01.html#here">to it</a> <a href="#top">up</a> <a href="https://x.org/none">elsewhere</a> '
        '<p id="end"></p> <a href="#end">down</a>'
    )
    (tmp_path / "solutions" / "01.html").write_text(
        '<h2 id="here"></h2> <a href="../index.html?q=1#end">back</a> <img src="data:image/png;base64,AA==">'
    )
    assert not list(book.dead(tmp_path))
    wrong = [
        "02.html",
        "../index.html#start",
        "#nowhere",
        "../api/none.html",
        "../none.png",
        "../../outside.txt",
        "/etc/hostname",
    ]
    (tmp_path.parent / "outside.txt").write_text("a file, but none of the site's")
    (tmp_path / "solutions" / "02x.html").write_text(
        "".join(f'<a href="{to}">x</a>' if i % 2 else f"<img src='{to}'>" for i, to in enumerate(wrong))
    )
    assert list(book.dead(tmp_path)) == [f"solutions/02x.html: {to}" for to in wrong]


GOOD = [
    "01_chapter.ipynb",
    "solutions/01_chapter.ipynb",
    "api/supermix.chapter.md",
    "images/a.png",
    "01_chapter.ipynb#a-heading",
    "#this-one",
]
DEAD = [
    "02_chapter.ipynb",
    "solutions/02_chapter.ipynb",
    "api/supermix.other.md",
    "images/b.png",
    "../README.md",
    "01_chapter.ipynb#no-heading",
    "#not-this-one",
]


def small_book(folder, links, html=""):
    """A chapter, its solutions, its page of the API, a picture, and an index that links to them; built as the whole
    book is."""
    pytest.importorskip("myst_nb")
    pytest.importorskip("sphinx_book_theme")
    source = folder / "book"
    for sub in ("solutions", "api", "images"):
        (source / sub).mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "favicon.svg", source / "images" / "a.png")
    index = (
        "# Index\n\n## This one\n\n"
        + "\n".join(f"- [link {i}]({to})" for i, to in enumerate(links))
        + f"\n\n{html}\n\n"
    )
    index += "```{toctree}\n01_chapter\nsolutions/01_chapter\napi/supermix.chapter\n```\n"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for name, text in {
        "index": index,
        "01_chapter": "# Chapter\n\n## A heading\n",
        "solutions/01_chapter": "# Solutions",
    }.items():
        page = {"cells": [book.text_cell(text)], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
        (source / f"{name}.ipynb").write_text(json.dumps(page))
    (source / "api" / "supermix.chapter.md").write_text("# supermix.chapter\n")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); from pathlib import Path; "
        f"from book import build; build(Path({str(source)!r}), Path({str(folder / 'site')!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.slow
def test_a_book_of_good_links_is_built(tmp_path):
    done = small_book(tmp_path, GOOD, '<a href="01_chapter.html#a-heading">html</a>')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "solutions" / "01_chapter.html").is_file()


def test_a_book_with_dead_links_is_not_built(tmp_path):
    done = small_book(tmp_path, GOOD + DEAD, '<a href="planted.html">html</a>')
    assert done.returncode == 1
    complaints = "\n".join(line for line in done.stderr.splitlines() if "WARNING" in line or "is broken" in line)
    for to in [*DEAD, "planted.html"]:
        assert to.split("#")[-1] in complaints, to
    assert "a-heading" not in complaints and "this-one" not in complaints.replace("not-this-one", "")


def test_a_folder_that_is_no_book_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("mine")
    done = subprocess.run([sys.executable, ROOT / "tools" / "book.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and "exists and is not a book" in done.stderr
    assert (tmp_path / "precious").read_text() == "mine"


def test_equations_have_room_around_names():
    conf, nodes = pytest.importorskip("conf", reason="latex2mathml is missing"), pytest.importorskip("docutils.nodes")
    made = lambda tex: conf.mathml(nodes.math(tex, tex), "block")
    space = '<mspace width="0.167em" />'
    assert (
        f"<mi>log</mi>{space}<msub>" in made(r"\log p_n")
        and space not in made(r"\log(p)")
        and space not in made(r"\mathrm{mean}_{c}")
    )
    assert f"<mn>4</mn>{space}<mi>log</mi>{space}<mn>3</mn>" in made(r"4 \log 3")
    assert 'class="sum"' in made(r"\sum_i x_i") and 'class="sum"' not in conf.mathml(
        nodes.math("", r"\sum_i x_i"), "inline"
    )
