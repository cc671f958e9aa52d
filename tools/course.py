"""The table of chapters in nbs/index.ipynb, written from the chapters themselves."""

import json
import re
from functools import cache
from statistics import median

PARTS = {
    0: "What we stand on",
    10: "Networks, exact to the parameter",
    20: "Training",
    29: "Mixing",
    40: "Learning from a teacher",
    50: "Use",
}  # by the number of their first chapter
EVERYWHERE = {"00", "01", "02", "19"}  # chapters that every chapter needs; the table does not name them
# from masks to a distilled student and to what the study found; all other chapters are variations
MAIN = ("22", "30", "31", "32", "33", "34", "40", "45", "50", "60")
HOURS = 16  # a weekend: what the main path may take, its exercises included
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
            [source for cell in cells if cell["cell_type"] == kind and (source := "".join(cell["source"]))]
            for kind in ("markdown", "code")
        )
        seen = [line for source in code if "#| hide" not in source for line in source.splitlines() if line.strip()]
        prose, code = "\n\n".join(prose), "\n\n".join(code)
        self.name, self.number = name, number(name)
        self.title = re.search(r"^# (.+)$", prose, re.MULTILINE)[1]
        self.line = re.search(r"^> (.+)$", prose, re.MULTILINE)[1]
        self.modules = set(re.findall(r"^\s*from supermix\.([\w.]+) import", code, re.MULTILINE))
        self.estimate = len(prose.split()) / WORDS + len(seen) / LINES  # minutes; nobody's time, but a length
        section = re.search(r"^## Exercises\n(.*?)(?=^## |\Z)", prose, re.MULTILINE | re.DOTALL)
        self.exercises = len(re.findall(r"^\d+\. ", section[1], re.MULTILINE)) if section else 0

    @property
    def doing(self):
        return MINUTES * self.exercises

    def reading(self, reported):
        "Minutes: the median of those that readers reported, or else the estimate."
        return median(reported[self.name]) if reported.get(self.name) else self.estimate

    def reading_cell(self, reported):
        "As the table shows them: 80 (3) by three readers, ≈ 75 by the chapter's length."
        if reported.get(self.name):
            return f"{median(reported[self.name]):.0f} ({len(reported[self.name])})"
        return f"≈ {max(5, 5 * round(self.estimate / 5))}"


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


def check_reported(reported, names):
    "Exit with an error unless what readers reported is a list of minutes for some of the chapters."
    for name, minutes in reported.items():
        if name not in names:
            raise SystemExit(
                f"Expected names of notebooks in nbs/reading.json, such as 33_mixing.solver, got {name!r}."
            )
        if not isinstance(minutes, list) or not all(isinstance(m, (int, float)) and m > 0 for m in minutes):
            raise SystemExit(f"Expected a list of minutes for {name} in nbs/reading.json, got {minutes!r}.")


def main_path(chapters, reported):
    "The chapters of the main path, and the hours that they take for reading and for exercises."
    path = [c for c in chapters if c.number in MAIN]
    hours = sum(c.reading(reported) for c in path) / 60, sum(c.doing for c in path) / 60
    if sum(hours) > HOURS:
        raise SystemExit(
            f"Expected a main path of {HOURS} hours at most, its exercises included, got {sum(hours):.1f}: "
            "shorten its chapters, or take one out of MAIN in tools/course.py."
        )
    return path, hours


def introduction(chapters, reported):
    "What stands above the table: the main path and its hours, and where the reading times are from."
    path, (read, do) = main_path(chapters, reported)
    timed = sum(bool(reported.get(c.name)) for c in chapters)
    known = (
        f"Readers have reported their times for {timed} of {len(chapters)} notebooks"
        if timed
        else "No reader has reported a time yet, so all reading times are estimates"
    )
    return (
        f"**The main path** is {ranges([c.number for c in path])}: from masks to a distilled student, and to what the "
        f"study found. It fits into a weekend: about {read + do:.0f} hours, {read:.1f} for reading and {do:.1f} for "
        "its exercises. It uses other chapters as tools; of these the first paragraph is enough. All other notebooks "
        "are *variations*: further networks, mixers, losses and data, larger runs, and the tools themselves.\n\n"
        f"{known}."
    )


def table(chapters, seconds, reported=None):
    "The table as Markdown; `seconds` are those that the notebooks took, `reported` the minutes of readers, by name."
    chapters, reported = sorted(chapters, key=lambda c: order(c.name)), reported or {}
    check_reported(reported, {c.name for c in chapters})
    needed, parts = needs(chapters), dict(PARTS)
    lines = [
        introduction(chapters, reported),
        "",
        "| chapter | path | what it gives | needs | read (min) | do (min) | run (s) |",
        "|---|---|---|---|--:|--:|--:|",
    ]
    for c in chapters:
        for first in [n for n in parts if n <= int(order(c.name)[0])]:
            lines.append(f"| **{parts.pop(first)}** | | | | | | |")
        run = next((t for t in TIMES if t >= seconds[c.name]), TIMES[-1]) if c.name in seconds else "–"
        label = f"{'run ' * ('/' in c.name)}{c.number.removeprefix('runs/')} {c.title}"
        lines.append(
            f"| [{label}]({c.name}.ipynb) | {'**main**' if c.number in MAIN else 'variation'} | "
            f"{c.line.replace('|', chr(92) + '|')} | {ranges(needed[c.number])} | {c.reading_cell(reported)} | "
            f"{c.doing or '–'} | {run} |"
        )
    hours = sum(c.reading(reported) for c in chapters) / 60, sum(c.doing for c in chapters) / 60
    for name, (read, do) in (("The main path", main_path(chapters, reported)[1]), ("All together", hours)):
        lines.append(f"| **{name}** | | | | {read:.0f} hours | {do:.0f} hours | |")
    return "\n".join(lines)


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
