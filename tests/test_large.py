"""Chapter 48 on a folder of photographs: what counts as one, its label, and what an unusable folder is told."""

import json

import pytest
import torch
from PIL import Image
from supermix import cli
from supermix.experiments.large import measure_large, photographs_in
from torch import nn


class Colours(nn.Module):
    "A teacher of three classes at 224×224: red, green or blue, by the means of the channels."

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        return self.scale * x.mean((2, 3))


@pytest.fixture
def folder(tmp_path, photos):
    "Real photographs: two with the number of a class, one with a number that is none, one in a folder below."
    home = tmp_path / "my pictures"
    (home / "below").mkdir(parents=True)
    named = {"chelsea": "002_chelsea.jpg", "coffee": "1-coffee.png", "rocket": "2024_rocket.jpg"}
    for photo, name in (named | {"astronaut": "below/astronaut.jpg"}).items():
        Image.fromarray(photos[photo]).resize((300, 260)).save(home / name)
    (home / "notes.txt").write_text("no photograph")
    return home


def test_labels_come_from_the_names_or_from_the_teacher(folder):
    teacher = Colours().eval()
    images = photographs_in(folder, teacher)
    assert [file.name for file in images.files] == [
        "002_chelsea.jpg",
        "1-coffee.png",
        "2024_rocket.jpg",
        "astronaut.jpg",
    ]
    seen = teacher(images[:][0]).argmax(1).tolist()
    assert images.labels.tolist() == [2, 1, *seen[2:]]  # 2024 is the number of no class
    assert seen[:2] != [2, 1], "the names must say something else than the teacher, or nothing is tested"
    assert images.info.classes == ("class 0", "class 1", "class 2") and images[0][0].shape == (3, 224, 224)


def test_unusable_folders_are_told(folder, tmp_path):
    teacher = Colours().eval()
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        photographs_in(tmp_path / "nowhere", teacher)
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="Expected images in .*empty, such as .jpg"):
        photographs_in(empty, teacher)
    Image.new("RGB", (300, 300)).save(empty / "one.png")
    with pytest.raises(ValueError, match="two photographs or more in .*empty, got 1"):
        photographs_in(empty, teacher)
    whole = (folder / "002_chelsea.jpg").read_bytes()
    (folder / "003_broken.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="003_broken.jpg cannot be read as an image"):
        photographs_in(folder, teacher)


def test_the_command_says_so_before_it_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "supermix.experiments.large.large_teacher", lambda name: (Colours().eval(), (0.5,) * 3, (0.5,) * 3)
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="supermix: Expected images in .*empty"):
        cli.main(["large", "--photos", str(tmp_path / "empty"), "--out", str(tmp_path / "large.json")])
    assert not (tmp_path / "large.json").exists()


@pytest.mark.slow
def test_a_folder_is_measured(folder, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch", reason="no teacher for photographs here")
    from supermix.experiments.large import large_teacher

    teacher, mean, std = large_teacher()
    for name in ("002_chelsea.jpg", "1-coffee.png"):
        (folder / name).rename(folder / name.split("_")[-1].split("-")[-1])
    images = photographs_in(folder, teacher, mean, std)
    assert set(images.labels.tolist()) & {281, 282, 285} and len(set(images.labels.tolist())) > 2
    result = measure_large(teacher, images, tmp_path / "large.json", sets=2, blocks=1)
    assert json.loads((tmp_path / "large.json").read_text()) == result
    assert (result["photographs"], result["folder"], result["sets"]) == (4, "my pictures", 128)
