"""Draws pictures into nbs/images: `pictures.py` draws the README's, `pictures.py charts` those of results/ only, and
`pictures.py cifar100` the mixes that chapters 33, 34, 37 and 72 show (where CIFAR-100 is found).

Each PNG keeps the numbers that it shows in its field "Description"; tests/test_readme.py compares them with results/.
"""

import argparse
import io
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from supermix.data import Info, load_data
from supermix.experiments.large import _LARGE, imagenet_classes, large_teacher
from supermix.experiments.race import _read_report, _sparsity_and_kl
from supermix.experiments.study import _confidence_interval, load_results
from supermix.explore.widget import Session
from supermix.mixing.engine import Engine, Sets, decode, draw_block, joined
from supermix.mixing.masks import masks_from_theta, mix, show_mixes
from supermix.mixing.solver import SuperMix, teacher_logits
from supermix.recipes import FAST, Mixing
from supermix.zoo import pretrained

ROOT = Path(__file__).resolve().parent.parent
DARK, LIGHT = "#1b3a5b", "#b9c6d3"  # told apart by their brightness, too
DPI, WIDTH = 100, 8  # 800 pixels
plt.rcParams["font.size"] = 14  # readable at half the size


def save(figure: Figure, path: Path, numbers) -> None:
    "Write a picture with its numbers; with nothing in it that changes from one version of matplotlib to the next."
    figure.savefig(path, dpi=DPI, metadata={"Description": json.dumps(numbers, ensure_ascii=False), "Software": None})
    plt.close(figure)
    print(path)


def numbers_in(path: Path):
    "The numbers that a picture shows."
    with Image.open(path) as picture:
        return json.loads(picture.text["Description"])


# ---- a mixed image of two photographs

WANTED = (0.6, 0.4)  # the cat's share and the cup's
ANGLE = math.pi / 2  # of the line at which the search begins


def two_photographs() -> list[np.ndarray]:  # uint8 (224, 224, 3), each
    "scikit-image's cat and its cup of coffee, cut to squares."
    from skimage import data

    photos = (data.chelsea(), 85), (data.coffee(), 100)  # with the left edge of the square
    return [
        np.asarray(Image.fromarray(photo[:, left : left + len(photo)]).resize((224, 224), Image.Resampling.BICUBIC))
        for photo, left in photos
    ]


def mixed_photographs():
    "The two photographs, their masks (2, 224, 224), the mixed image (224, 224, 3), and the teacher's probabilities."
    teacher, mean, std = large_teacher()
    info = Info("photographs", ("cat", "cup"), 224, mean, std)
    photos = two_photographs()
    images = info.normalize(torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2))
    classes = teacher_logits(teacher, images).argmax(1)
    unused = torch.zeros(1, 2, 4, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bool)  # windows and mirrors
    one, lam = torch.zeros(1, dtype=torch.int64), torch.tensor([WANTED])
    sets = Sets(one, torch.tensor([[0, 1]]), *unused, lam, torch.tensor([ANGLE]), classes[None], images[None])
    found = joined(Engine(teacher, images, Mixing(**_LARGE), slots=1).run([sets]))
    masks = masks_from_theta(decode(found.code, True), (224, 224))
    mixed = info.denormalize(mix(sets.images, masks))[0].permute(1, 2, 0).clamp(0, 1)
    return photos, masks[0], mixed, found.logits.softmax(1)[0]


def draw_mix(path: Path) -> None:
    "Two photographs, their masks, the mixed image, and what the teacher sees in it."
    photos, masks, mixed, p = mixed_photographs()
    names, top = imagenet_classes(), p.topk(6)
    seen = [(names[c], round(100 * q)) for q, c in zip(top.values.tolist(), top.indices.tolist())]
    figure = plt.figure(figsize=(WIDTH, 3.3))
    small, large, bottom = 0.163, 0.338, 0.02  # sides in widths of the picture
    place = lambda left, low, side: figure.add_axes((left, low, side, side * WIDTH / 3.3))
    for row, (photo, mask, share) in enumerate(zip(photos, masks, WANTED)):
        low = bottom + (1 - row) * (small * WIDTH / 3.3 + 0.029)
        for left, picture in ((0.008, photo), (0.184, mask)):
            axes = place(left, low, small)
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
        axes.text(
            12, 205, f"asked: {100 * share:.0f} %", color="white", fontsize=13, bbox=dict(fc="black", ec="none", pad=3)
        )
    axes = place(0.375, bottom, large)
    axes.imshow(mixed)
    axes.set_axis_off()
    for left, text in ((0.008, "two photos"), (0.184, "two masks"), (0.375, "one mixed image")):
        figure.text(left, 0.905, text, weight="bold")
    figure.text(0.735, 0.905, "the teacher sees", weight="bold")
    bars = figure.add_axes((0.735, bottom, 0.2, 0.84))
    bars.barh(range(len(seen)), [q for _, q in seen], 0.3, color=DARK)
    for y, (name, q) in enumerate(seen):
        bars.text(0, y - 0.28, f"{name} {q} %", va="bottom")
    bars.set_ylim(len(seen) - 0.7, -0.8)
    bars.set_axis_off()
    save(figure, path, {"shares": WANTED, "teacher": seen})


# ---- mixes of CIFAR-100


def draw_sets(path: Path, name: str, info: Info, sets, masks, lam, classes, logits, dpi: int = 80) -> None:
    "A row for each set: sources, masks and mix, with the wanted share of each class and the teacher's probability."
    p = logits.softmax(1).gather(1, classes)
    titles = [
        "\n".join(f"{info.classes[c].replace('_', ' ')}: λ {share:.0%}, p {q:.0%}" for c, share, q in zip(*row))
        for row in zip(classes.tolist(), lam.tolist(), p.tolist())
    ]
    with plt.rc_context({"font.size": 10, "savefig.bbox": "tight"}):
        figure = show_mixes(info, sets, masks, titles, name=name)
        figure.savefig(path, dpi=dpi, metadata={"Software": None})
    plt.close(figure)
    print(path)


def draw_cifar100(out: Path) -> None:
    "Mixes by the paper's search and by the engine's, and of the engine's those of lowest and of highest KL."
    data, teacher = load_data("cifar100"), pretrained("cifar100").requires_grad_(False)
    images, _ = data.test[:64]
    draw_explorer(out / "cifar100_explorer.png", data.test, teacher, (26, 10))  # a tiger and a chair
    mixer = SuperMix(teacher)
    draw = mixer.draw(images, generator=torch.Generator().manual_seed(0))
    mixed = mixer.solve(images[draw.partners], draw.lam, draw=draw)
    few = mixed.solved.nonzero().flatten()[:3]
    solved = (t[few] for t in (images[draw.partners], mixed.masks, mixed.lam, mixed.classes, mixed.logits))
    draw_sets(out / "cifar100_paper.png", "CIFAR-100 by the paper's search", data.info, *solved)
    for k in (2, 3):
        mixing = Mixing(**FAST, k=k)
        engine = Engine(teacher, images[:2], mixing)
        block = draw_block(data.train, engine.source_logits, mixing, 0, 0)
        found = joined(engine.run([block]))
        theta = decode(found.code, True)
        kl = _sparsity_and_kl(found, theta, found.logits, (32, 32))[:, 1].argsort()
        for name, title, rows in (
            (f"cifar100_k{k}", f"CIFAR-100 by the engine, k = {k}", found.index.argsort()[:3]),
            ("cifar100_extremes", "CIFAR-100: the two lowest KLs, then the two highest", kl[[0, 1, -2, -1]]),
        ):
            if name == "cifar100_extremes" and k == 3:
                continue
            masks = masks_from_theta(theta[rows], (32, 32))
            parts = block.images[found.index[rows]], masks, found.lam[rows], found.classes[rows], found.logits[rows]
            draw_sets(out / f"{name}.png", title, data.info, *parts, dpi=80 if k == 2 else 64)


def draw_explorer(path: Path, images, teacher, pick: tuple[int, int]) -> None:
    "The explorer's picture of two images at the update that solves them, without PuzzleMix and the curves."
    session = Session(images, teacher, count=max(pick) + 1, search="fast", pick=pick)
    session.change(pick=pick).wait()
    with Image.open(io.BytesIO(session.board.frame(len(session.board) - 1))) as frame:
        shown = frame.convert("RGB").crop((0, 0, 968, 532)).resize((800, 440), Image.Resampling.LANCZOS)
    shown.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path)


# ---- charts of results/

ROWS = ("alone", "KD", "MixUp + KD", "CutMix + KD", "PuzzleMix + KD", "SuperMix + KD", "KD, double updates")
STUDIES = {"Fashion-MNIST": ("core", "budget"), "CIFAR-100": ("cifar100",)}  # groups of the study
RACES = ("engine.json", "engine_cifar100.json")
TITLES = {"fashion_mnist": "Fashion-MNIST", "cifar100": "CIFAR-100"}


def accuracies(results: Path = ROOT / "results") -> dict[str, dict[str, list[float]]]:
    """By data set and row: the mean test accuracy (%), half its 95 % interval, and the number of seeds. A data set is
    left out until each of its rows has two seeds."""
    found, numbers = load_results(results / "study"), {}
    for name, groups in STUDIES.items():
        rows = {row: seeds for group in groups for row, seeds in found.get(group, {}).items() if row in ROWS and seeds}
        if rows and all(len(seeds) > 1 for seeds in rows.values()):
            values = {row: [result["accuracy"] for result in rows[row].values()] for row in ROWS if row in rows}
            intervals = {row: _confidence_interval(v) if len(v) > 1 else (v[0], 0.0) for row, v in values.items()}
            numbers[name] = {row: [*(round(x, 2) for x in intervals[row]), len(values[row])] for row in intervals}
    return numbers


def speeds(results: Path = ROOT / "results") -> dict[str, dict[str, list[float]]]:
    "By data set and number of sources k: solved images per second of baseline and engine, and their ratio."
    numbers = {}
    for file in RACES:
        if (results / file).is_file():
            report = _read_report(results / file)
            data = report["teacher"].rpartition(" on ")[2]
            pairs = {
                k: [race[way]["images/s"] for way in ("baseline", "engine")] for k, race in report["races"].items()
            }
            numbers[TITLES.get(data, data)] = {
                k: [round(x, 1) for x in (*pair, pair[1] / pair[0])] for k, pair in pairs.items()
            }
    return numbers


def draw_accuracy(path: Path, numbers: dict) -> None:
    "A panel for each data set: the rows' mean accuracies with their intervals."
    figure, panels = plt.subplots(
        1, len(numbers), figsize=(WIDTH, 3.1), layout="constrained", sharey=True, squeeze=False
    )
    figure.get_layout_engine().set(wspace=0.06)
    for axes, (name, rows) in zip(panels[0], numbers.items()):
        for row, (mean, half, _) in rows.items():
            ours, y = row.startswith("SuperMix"), ROWS.index(row)
            axes.errorbar(mean, y, xerr=half, fmt="D" if ours else "o", color=DARK if ours else "#777777", capsize=4)
            axes.text(mean, y - 0.17, f"{mean:.1f}", ha="center", va="bottom", fontsize=12)
        axes.set(title=name, xlabel="test accuracy (%), mean and 95 % interval"[: None if len(numbers) == 1 else 17])
        axes.set_yticks(range(len(ROWS)), ROWS)
        axes.grid(axis="y", color="#eeeeee")
        axes.set_ylim(len(ROWS) - 0.5, -0.9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].get_yticklabels()[ROWS.index("SuperMix + KD")].set_weight("bold")
    save(figure, path, numbers)


def draw_speed(path: Path, numbers: dict) -> None:
    "Solved images per second: the baseline's bar above the engine's, for each data set and number of sources."
    races = [(f"{name}, {k} sources", values) for name, of_k in numbers.items() for k, values in of_k.items()]
    figure, axes = plt.subplots(figsize=(WIDTH, 0.9 + 0.75 * len(races)), layout="constrained")
    for y, (name, (baseline, engine, ratio)) in enumerate(races):
        bars = ((baseline, LIGHT, f"baseline {baseline:.1f}"), (engine, DARK, f"engine {engine:.1f}, {ratio:.0f} ×"))
        for offset, (value, colour, text) in zip((-0.2, 0.2), bars):
            axes.barh(y + offset, value, 0.36, color=colour)
            axes.text(value, y + offset, f" {text}", va="center")
    axes.set_yticks(range(len(races)), [name for name, _ in races])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.5 * max(values[1] for _, values in races)), xlabel="solved mixed images per second")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path, numbers)


def main(what: str = "all", out: Path = ROOT / "nbs" / "images") -> None:
    if what == "cifar100":
        return draw_cifar100(out)
    draw_accuracy(out / "accuracy.png", accuracies())
    draw_speed(out / "speed.png", speeds())
    if what == "all":
        draw_mix(out / "mix.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["all", "charts", "cifar100"], default="all")
    main(parser.parse_args().what)
