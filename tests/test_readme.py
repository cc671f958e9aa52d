"""The README's snippets, run as they stand."""

import json
import re
import subprocess
import sys
from pathlib import Path

from supermix.demo import Row, as_table

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_snippets_run_in_their_order(tmp_path):
    assert len(SNIPPETS) == 2
    done = subprocess.run([sys.executable, "-c", "\n".join(SNIPPETS)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "student.safetensors").is_file()


def test_the_snippets_are_short():
    lines = [sum(bool(line.strip()) for line in snippet.splitlines()) for snippet in SNIPPETS]
    assert lines[0] < 15 and sum(lines) < 25


def test_both_commands_are_on_the_first_screen():
    assert "make demo" in README[:3000] and "make test" in README[:3000]


def test_every_link_within_the_repository_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links and all((Path(__file__).parent.parent / link).exists() for link in links), links


def test_the_table_is_the_one_that_was_measured():
    rows = json.loads((Path(__file__).parent.parent / "results" / "demo.json").read_text())["rows"]
    assert as_table([Row(**row) for row in rows]) in README


def test_the_engines_table_is_the_one_that_was_measured():
    report = json.loads((Path(__file__).parent.parent / "results" / "engine.json").read_text())
    for k, result in report["races"].items():
        for way, name in (("plain", "plain way"), ("engine", "engine")):
            w, ratio = result[way], result["ratio"] if way == "engine" else 1
            assert f"| k = {k}, {name} | {w['images/s']:.1f} | {ratio:.1f} | {100 * w['solved']:.1f} % |" in README
