"""Notebooks and the book in a real browser: JupyterLab on this machine, and Chromium that runs every cell, clicks and
drags."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image
from supermix.zoo import pretrained, save

ROOT = Path(__file__).parent.parent
SHOTS = ROOT / "out" / "browser"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHAPTERS = sorted(p.stem for p in (ROOT / "nbs").glob("[0-9]*.ipynb"))
SETTINGS = {
    "notebook-extension/tracker": '{"windowingMode": "none"}',  # every cell is on the page, seen or not
    # no pop-up, and nothing is fetched
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
}
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]
STATE = """() => { const nb = window.jupyterapp.shell.currentWidget.content;
 return nb.widgets.filter(c => c.model.type == 'code' && c.model.sharedModel.source.trim())\
.map(c => c.model.executionCount) }"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab with a token, on a copy of the notebooks: (address, token)."
    pytest.importorskip("jupyterlab")
    home, token = tmp_path_factory.mktemp("lab"), secrets.token_hex(16)
    shutil.copytree(ROOT / "nbs", home / "nbs", ignore=shutil.ignore_patterns("out", ".*"))
    for name in ("results", "tests", "policies"):
        os.symlink(ROOT / name, home / name)
    for name, text in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={home}",
        f"--LabApp.user_settings_dir={home / 'settings'}",
        f"--LabApp.workspaces_dir={home / 'spaces'}",
        "--LabApp.expose_app_in_browser=True",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    env.pop("MPLBACKEND", None)  # conftest's Agg would keep every figure from the page
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=home)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail("JupyterLab did not start: " + (home / "log").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}", token
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def page(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright here: pip install playwright")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=CHROMIUM, args=FLAGS, viewport={"width": 1500, "height": 1300}
        )
        yield browser.new_page()
        browser.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The book, built and served on this machine: its address."
    for tool in ("myst_nb", "sphinx_book_theme", "latex2mathml"):
        pytest.importorskip(tool, reason=f"no book without {tool}: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("book")
    done = subprocess.run([sys.executable, ROOT / "tools" / "book.py", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.slow
def test_the_book(site, page):
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "response",
        lambda response: complaints.append(f"{response.status} {response.url}") if response.status >= 400 else None,
    )
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.goto(f"{site}/index.html")
    assert page.locator("img[src*='demo']").evaluate("image => image.complete && image.naturalWidth > 100")
    page.locator(".bd-sidebar-primary a", has_text="33 SuperMix").first.click(force=True)
    page.wait_for_url("**/33_mixing.solver.html")
    assert "SuperMix" in page.locator("article h1").inner_text() and page.locator("article math").count() > 10
    assert (
        page.locator("article .cell_output img").count() > 2 and "#| export" not in page.locator("article").inner_text()
    )
    page.screenshot(path=SHOTS / "book_chapter.png")
    page.get_by_role("link", name="supermix.mixing.solver").first.click()
    page.wait_for_url("**/api/supermix.mixing.solver.html")
    assert "# weight of the sparsity term" in page.locator("article").inner_text()
    page.goto(f"{site}/search.html?q=dirichlet")
    page.locator("#search-results li a").first.wait_for(timeout=20_000)
    assert page.locator("#search-results li").count() > 2
    page.screenshot(path=SHOTS / "book_search.png")
    page.locator("#search-results li a").first.click()
    page.wait_for_url(lambda url: "search" not in url)
    assert "dirichlet" in page.locator("article").inner_text().lower()
    assert not complaints and len(asked) > 10 and all(url.startswith((site, "data:")) for url in asked), [
        *complaints,
        *asked,
    ]


def run_all(page, lab, chapter, seconds=240):
    "Open a chapter, run all its cells, and see that none has an error."
    address, token = lab
    page.goto(f"{address}/lab/tree/nbs/{chapter}.ipynb?token={token}&reset")  # no tabs of chapters before
    page.wait_for_function(
        "() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'",
        timeout=90_000,
    )
    page.evaluate(
        "() => { window.ranAll = false; "
        "window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.ranAll = true }) }"
    )
    try:
        page.wait_for_function("() => window.ranAll", timeout=1000 * seconds)
    except Exception:  # Playwright's own TimeoutError, which cannot be imported where Playwright may be missing
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / f"{chapter}_late.png")
        pytest.fail(f"{chapter} has not ended after {seconds} s; cells so far: {page.evaluate(STATE)}; see {SHOTS}")
    errors = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr'] >> text=/Traceback/")
    assert errors.count() == 0 and page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    counts = page.evaluate(STATE)
    assert counts and all(counts), counts


def keep(page, chapter):
    "A picture of the whole chapter, cells and outputs, for somebody to look at."
    SHOTS.mkdir(parents=True, exist_ok=True)
    height = page.evaluate(
        "() => window.jupyterapp.shell.currentWidget.content.widgets"
        ".reduce((sum, cell) => sum + cell.node.offsetHeight, 0)"
    )
    page.set_viewport_size({"width": 1500, "height": min(round(height) + 250, 16_000)})  # Chromium draws no more
    page.evaluate(
        "() => { window.jupyterapp.shell.collapseLeft(); "
        "window.jupyterapp.shell.currentWidget.content.outerNode.scrollTop = 0 }"
    )
    page.wait_for_timeout(1500)
    page.screenshot(path=SHOTS / f"{chapter}.jpg", type="jpeg", quality=60)


def stop_kernels(lab):
    "Each chapter's kernel holds its data and networks: forty would not fit."
    address, token = lab
    ask = lambda method, what: urllib.request.urlopen(
        urllib.request.Request(f"{address}/api/{what}?token={token}", method=method), timeout=30
    ).read()
    for session in json.loads(ask("GET", "sessions")):
        ask("DELETE", f"sessions/{session['id']}")


def until(page, what, seconds=30, why=""):
    "Wait until `what()` holds."
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            SHOTS.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=SHOTS / "late.png")
            kernel = page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status")
            pytest.fail(f"{why} (the kernel is {kernel}; see {SHOTS / 'late.png'})")
        page.wait_for_timeout(30)


def five_and_no_sixth(page, explorer):
    "Thumbnails up to five; then the page says no, and nothing else changes."
    chosen, status, bar = (
        explorer.locator(css)
        for css in ("button.supermix-thumb.mod-active", ".supermix-status", ".widget-hprogress .widget-label")
    )
    while (count := chosen.count()) < 5:
        explorer.locator("button.supermix-thumb:not(.mod-active)").first.click()
        until(page, lambda: chosen.count() == count + 1, why=f"a thumbnail beside {count} is not taken")
    page.wait_for_timeout(1000)
    until(page, lambda: bar.inner_text() == "done", 60, "five images are not solved")
    explorer.screenshot(path=SHOTS / "explorer_five.png")
    explorer.locator("button.supermix-thumb:not(.mod-active)").last.click()
    until(
        page, lambda: "two to five" in status.inner_text() and chosen.count() == 5, why="a sixth image is not refused"
    )


def saves(page, lab, explorer):
    "The buttons write files beside the notebook: a PNG, and a GIF of all iterations."
    address, token = lab
    for kind, head in (("PNG", b"\x89PNG"), ("GIF", b"GIF89a")):
        explorer.get_by_role("button", name=f"Save {kind}").click()
        until(
            page,
            lambda: f"Saved supermix.{kind.lower()}" in explorer.locator(".supermix-status").inner_text(),
            60,
            f"{kind} is not saved",
        )
        with urllib.request.urlopen(f"{address}/files/nbs/supermix.{kind.lower()}?token={token}", timeout=30) as file:
            assert file.read().startswith(head)


def newer_cancels_older(page, large):
    """At 224x224 a solve takes seconds: the bar says so, the page answers meanwhile, and only the last setting is
    solved to its end."""
    large.scroll_into_view_if_needed()
    bar, handle = (
        large.locator(".widget-hprogress .widget-label"),
        large.locator(".widget-inline-hbox", has=page.locator(".widget-label:text-is('σ, smoothing')")).locator(
            ".noUi-handle"
        ),
    )
    until(page, lambda: bar.inner_text() == "done")
    handle.focus()
    handle.press("ArrowLeft")
    until(page, lambda: bar.inner_text() == "solving", why="no progress is shown")
    start = time.monotonic()
    handle.press("ArrowLeft")
    wanted = handle.get_attribute("aria-valuenow")
    assert page.evaluate("1 + 1") == 2 and time.monotonic() - start < 1, "the page is frozen while a solve runs"
    large.screenshot(path=SHOTS / "explorer_large.png")
    until(page, lambda: bar.inner_text() == "done", 120, "the newest setting is not solved")
    page.wait_for_timeout(1000)
    assert bar.inner_text() == "done" and handle.get_attribute("aria-valuenow") == wanted


@pytest.mark.slow
def test_the_explorer(lab, page):
    run_all(page, lab, "72_explore.widget")
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / "page.png")
    first = page.locator(".supermix-explorer").first
    picture, bar = first.locator("img.supermix-picture"), first.locator(".widget-hprogress .widget-label")

    def look():
        return picture.get_attribute("src")

    def changed(before, what):
        until(page, lambda: look() != before, why=f"{what} changes nothing")
        page.wait_for_timeout(300)
        until(page, lambda: bar.inner_text() == "done", 60, f"after {what} the solve does not end")
        page.wait_for_timeout(500)
        return look()

    first.scroll_into_view_if_needed()
    page.wait_for_timeout(1000)
    first.screenshot(path=SHOTS / "explorer.png")
    now = look()
    for name in ("λ of image 1", "λ_s, sparsity", "σ, smoothing", "w, mask size", "iterations", "show iteration"):
        row = first.locator(".widget-inline-hbox", has=page.locator(f".widget-label:text-is('{name}')"))
        handle = row.locator(".noUi-handle").first
        handle.focus()
        handle.press("ArrowLeft")
        now = changed(now, name)
    handle.press("End")  # where a solve leaves it, and where who wants to see it played finds it
    frames = {changed(now, "the last iteration")}
    first.locator(".widget-play button").first.click()
    deadline = time.monotonic() + 30
    while len(frames) < 4:  # it begins anew: the one it stood on, and three that come by themselves
        assert time.monotonic() < deadline, f"play shows {len(frames) - 1} frames"
        page.wait_for_timeout(50)
        frames.add(look())
    first.locator(".widget-play button").first.click()  # pause
    page.wait_for_timeout(1000)
    now = look()
    first.locator("button.supermix-thumb").nth(4).click()
    now = changed(now, "a thumbnail")
    assert first.locator("button.supermix-thumb.mod-active").count() == 3
    page.wait_for_timeout(2000)
    assert look() == now, "nobody touches anything, and the picture changes: the page's rounding comes back as a wish"
    first.screenshot(path=SHOTS / "explorer_three.png")
    five_and_no_sixth(page, first)
    saves(page, lab, first)
    newer_cancels_older(page, page.locator(".supermix-explorer").nth(1))
    small = page.locator(".widget-interact").all()  # σ, τ, Newton's step, stages
    assert len(small) == 4
    for i, one in enumerate(small):
        picture = one.locator("img")
        now = look()
        if one.locator("select").count():
            one.locator("select").select_option(index=2)  # a list of values is a menu
        else:
            one.locator(".noUi-handle").press("ArrowRight")
        changed(now, f"the control of small explorer {i + 1}")
        one.screenshot(path=SHOTS / f"explorer_small_{i + 1}.png")


@pytest.mark.slow
def test_own_pictures_from_the_shell(page, tmp_path, photos):
    "`supermix explore` on a folder and a teacher's file: the notebook is there, runs, and answers a slider."
    (tmp_path / "pictures").mkdir()
    for name, pixels in photos.items():
        Image.fromarray(pixels).resize((90, 60)).save(tmp_path / "pictures" / f"{name}.jpg")
    save(pretrained("digits"), tmp_path / "teacher.safetensors")
    command = ["explore", "--data", "pictures", "--teacher", "teacher.safetensors", "--no-browser"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("MPLBACKEND", None)
    door = subprocess.Popen(
        [sys.executable, "-m", "supermix", *command], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=env
    )
    try:
        address = door.stdout.readline().strip()
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(address, timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        page.goto(address)
        cell = page.locator(".jp-CodeCell .cm-content", has_text="explore(")
        cell.wait_for(timeout=60_000)
        assert f"explore('{tmp_path}/pictures', '{tmp_path}/teacher.safetensors')" in cell.inner_text()
        cell.click()
        page.keyboard.press("Shift+Enter")
        explorer = page.locator(".supermix-explorer")
        explorer.wait_for(timeout=90_000)
        picture = explorer.locator("img.supermix-picture")
        bar = explorer.locator(".widget-hprogress .widget-label")
        deadline = time.monotonic() + 60
        while bar.inner_text() != "done":
            assert time.monotonic() < deadline, "the first set is not solved"
            page.wait_for_timeout(100)
        before = picture.get_attribute("src")
        row = explorer.locator(".widget-inline-hbox", has=page.locator(".widget-label:text-is('λ of image 1')"))
        row.locator(".noUi-handle").first.focus()
        page.keyboard.press("ArrowLeft")
        while picture.get_attribute("src") == before:
            assert time.monotonic() < deadline + 60, "a slider changes nothing"
            page.wait_for_timeout(100)
        assert explorer.locator("button.supermix-thumb").count() == 4
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / "front_door.png")
    finally:
        door.terminate()
        door.wait(20)


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_runs_in_the_browser(lab, page, chapter):
    try:
        run_all(page, lab, chapter, seconds=600)
        keep(page, chapter)
    finally:
        stop_kernels(lab)
