"""The table of chapters in nbs/index.ipynb, written from the chapters themselves."""

import json
import re
from functools import cache

PARTS = {
    0: "What we stand on",
    10: "Networks, exact to the parameter",
    20: "Training",
    29: "Mixing",
    40: "Learning from a teacher",
    50: "Use",
}  # by the number of their first chapter
EVERYWHERE = {"00", "01", "02", "19"}  # chapters that every chapter needs; the table does not name them
BEGIN, END = "<!-- course: written by tools/course.py -->", "<!-- end of course -->"
WORDS, LINES, MINUTES = 150, 12, 12  # words and lines of code per minute, minutes per exercise
TIMES = (5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 300, 450, 600)  # seconds; times are rounded up to one of these


def number(name):
    "Two digits, and for a run notebook the folder before them: 33, runs/01."
    return name.rpartition("/")[0] + "/" * ("/" in name) + name.rpartition("/")[2][:2]


def order(name):
    "The place of a notebook in the course: by number, and the run notebooks before chapter 70."
    return ("69", name) if "/" in name else (name[:2], name)


class Chapter:
    "The table's entry of a notebook."

    def __init__(self, path, name):
        cells = json.loads(path.read_text())["cells"]
        prose, code = (
            "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == kind)
            for kind in ("markdown", "code")
        )
        self.name, self.number = name, number(name)
        self.title = re.search(r"^# (.+)$", prose, re.MULTILINE)[1]
        self.line = re.search(r"^> (.+)$", prose, re.MULTILINE)[1]
        self.modules = set(re.findall(r"^\s*from supermix\.([\w.]+) import", code, re.MULTILINE))
        self.minutes = len(prose.split()) / WORDS + sum(bool(line.strip()) for line in code.splitlines()) / LINES
        section = re.search(r"^## Exercises\n(.*?)(?=^## |\Z)", prose, re.MULTILINE | re.DOTALL)
        self.exercises = len(re.findall(r"^\d+\. ", section[1], re.MULTILINE)) if section else 0

    @property
    def reading(self):
        return max(5, 5 * round(self.minutes / 5))


def needs(chapters):
    "By number: the chapters from which a chapter imports, without those that another of them needs."
    by_module = {c.name.partition("_")[2]: c.number for c in chapters if "/" not in c.name}
    direct = {c.number: {by_module[m] for m in c.modules if m in by_module} - EVERYWHERE for c in chapters}

    @cache
    def below(one):
        return direct[one].union(*map(below, direct[one]))

    return {one: sorted(found - set().union(*map(below, found))) for one, found in direct.items()}


def ranges(numbers):
    "Numbers as text; three or more consecutive ones become a range: 03, 11–18."
    groups = []
    for n in numbers:
        if groups and int(n) == int(groups[-1][-1]) + 1:
            groups[-1].append(n)
        else:
            groups.append([n])
    parts = [f"{group[0]}–{group[-1]}" if len(group) > 2 else ", ".join(group) for group in groups]
    return ", ".join(parts) or "–"


def table(chapters, seconds):
    "The table as Markdown; `seconds` are those that the notebooks took, by name."
    chapters = sorted(chapters, key=lambda c: order(c.name))
    needed, parts = needs(chapters), dict(PARTS)
    lines = ["| chapter | what it gives | needs | read (min) | do (min) | run (s) |", "|---|---|---|--:|--:|--:|"]
    for c in chapters:
        for first in [n for n in parts if n <= int(order(c.name)[0])]:
            lines.append(f"| **{parts.pop(first)}** | | | | | |")
        run = next((t for t in TIMES if t >= seconds[c.name]), TIMES[-1]) if c.name in seconds else "–"
        label = f"{'run ' * ('/' in c.name)}{c.number.removeprefix('runs/')} {c.title}"
        lines.append(
            f"| [{label}]({c.name}.ipynb) | {c.line.replace('|', chr(92) + '|')} | "
            f"{ranges(needed[c.number])} | {c.reading} | {MINUTES * c.exercises or '–'} | {run} |"
        )
    hours = [
        round(sum(values) / 60) for values in ((c.minutes for c in chapters), (MINUTES * c.exercises for c in chapters))
    ]
    return "\n".join([*lines, f"| **All together** | | | {hours[0]} hours | {hours[1]} hours | |"])


def fill(cells, text):
    "Put the table between its markers, in place; exits with an error if they are missing."
    for cell in cells:
        source = "".join(cell["source"])
        if BEGIN not in source:
            continue
        before, _, rest = source.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            break
        cell["source"] = f"{before}{BEGIN}\n\n{text}\n\n{END}{after}".splitlines(keepends=True)
        return
    raise SystemExit(f"Expected a cell of nbs/index.ipynb with the lines '{BEGIN}' and '{END}', found none.")
