"""Your own photographs in the shell: a folder and a file of weights become mixes, a student and a table."""

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
from safetensors.torch import save_file
from supermix import cli, recipes
from supermix.core import file_hash
from supermix.data import DATA_SETS, load_digits, load_folder
from supermix.experiments.photographs import _prediction_table
from supermix.mixing.generate import generate
from supermix.mixing.store import MixedDataset
from supermix.recipes import FAST, Generation, Mixing, Pictures
from supermix.zoo import (
    create,
    full_name,
    info_for,
    load,
    load_pictures,
    open_network,
    predict,
    pretrained,
    save,
    view_of,
)

DIGITS = load_digits()
VIEW = ["--size", "32", *"--mean 0.3059 0.3059 0.3059 --std 0.324 0.324 0.324".split()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Digits as image files in one folder per class, and their shipped teacher as a plain state dictionary."
    folder = tmp_path_factory.mktemp("own")
    for split, images, n in (("train", DIGITS.train, 160), ("val", DIGITS.test, 40)):
        part = images.subset(n)
        for i, label in enumerate(part.labels.tolist()):
            path = folder / "numbers" / split / DIGITS.info.classes[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(part.fetch(torch.tensor([i]))[0].permute(1, 2, 0).numpy()).save(path)
    torch.save(pretrained("digits").state_dict(), folder / "teacher.pt")
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    "A new working folder, in which `numbers` and `teacher.pt` are at hand."
    monkeypatch.chdir(tmp_path)
    for name in ("numbers", "teacher.pt"):
        (tmp_path / name).symlink_to(place / name)
    return tmp_path


def supermix(line, capsys):
    "What a command prints; an error's text where it ends with one."
    try:
        cli.main(line.split() if isinstance(line, str) else line)
    except SystemExit as end:
        return str(end)
    return capsys.readouterr().out


OWN = "--data numbers --teacher teacher.pt --network resnet20".split()


# ---- generate


def test_generate_makes_the_store_that_python_makes(here, capsys):
    said = supermix(["generate", *OWN, *VIEW, "--count", "90", "--out", "mixes"], capsys)
    assert re.search(r"resnet20 is right in (9\d|100) % of 160 training images\n90 mixed images in mixes", said)
    data = load_folder("numbers", size=32, mean=(0.3059,) * 3, std=(0.324,) * 3)
    recipe = Generation("numbers", "given", 90, Mixing(**FAST), shard=128)
    twin = generate(recipe, "twin", data, open_network("teacher.pt", "resnet20"))
    shards = sorted(path.name for path in Path("mixes").glob("*.safetensors"))
    assert shards and all(file_hash(f"mixes/{name}") == file_hash(twin.folder / name) for name in shards)
    assert len(MixedDataset("mixes", data)) == 90
    assert "90 mixed images" in supermix(["generate", *OWN, *VIEW, "--count", "90", "--out", "mixes"], capsys)


def test_a_folder_has_defaults_of_its_own(here):
    work = cli.parse_command(["generate", *OWN])
    assert work.args[0].count == 1000 and work.args[1] == Pictures("resnet20") and work.args[2] is None
    assert cli.parse_command(["generate", *OWN, "--count", "7"]).args[0].count == 7
    assert cli.parse_command(["generate"]).args[0] == Generation()
    assert set(recipes._DATA_NAMES) == {"auto", *DATA_SETS}


def test_classes_in_another_order_are_told_with_the_accuracy(here, capsys):
    turned = "--classes 1 2 3 4 5 6 7 8 9 0".split()
    with pytest.warns(UserWarning, match=r"right in 0\.0 % of 160 images, where chance is 10\.0 %.*--classes"):
        supermix(["generate", *OWN, *VIEW, *turned, "--count", "1", "--out", "mixes"], capsys)
    with pytest.warns(UserWarning, match=r"The network is right in .*--classes in the shell"):
        supermix(["predict", "numbers/val", "--weights", "teacher.pt", "--network", "resnet20", *VIEW, *turned], capsys)


@pytest.mark.slow
def test_a_warning_is_one_line_in_a_shell(here):
    line = [*OWN, *VIEW, "--classes", *"1234567890", "--count", "1", "--out", "mixes"]
    done = subprocess.run([sys.executable, "-m", "supermix", "generate", *line], capture_output=True, text=True)
    told = [text for text in done.stderr.splitlines() if "where chance is" in text]
    assert done.returncode == 0 and len(told) == 1 and told[0].startswith("supermix: The teacher is right in 0.0 %")


# ---- what is refused


def refused(line, message, here, capsys):
    "Asks, and checks that the answer is one line, that there is no traceback and that nothing was written."
    before = set(here.rglob("*"))
    said = supermix(line, capsys)
    assert said.startswith(f"supermix: {message}") and len(said.splitlines()) == 1, said
    assert set(here.rglob("*")) == before


@pytest.mark.parametrize(
    "line, message",
    [
        ("generate --data numbers", "Expected a teacher of the classes in numbers: use --teacher FILE --network NAME"),
        ("generate --data numbers --teacher teacher.pt", "teacher.pt does not say which network its weights belong to"),
        ("generate --data numbers --teacher gone.pt --network resnet20", "There is no file of weights gone.pt"),
        ("generate --data numbers --teacher teacher.pt --network resnet21", "Unknown network 'resnet21'. Did you mean"),
        ("generate --data numbers --teacher teacher.pt --network vgg8", "teacher.pt does not fit vgg8: missing: "),
        ("generate --data numbers --teacher teacher.pt --network timm/resnet19", "Unknown network of timm 'resnet19'"),
        ("generate --data no/numbers --teacher teacher.pt", "There is no folder no/numbers."),
        ("generate --data digits --network resnet20", "Expected --data FOLDER with --network"),
        ("generate --data digits --size 64", "Expected --data FOLDER with --size"),
        ("distill --data numbers --student resnet8", "Expected a teacher of the classes in numbers"),
        ("distill --data numbers --teacher teacher.pt --student resnet8", "teacher.pt does not say which network"),
        ("distill --mean 0 0 0 --only-cost", "Expected --data FOLDER with --mean"),
        ("predict numbers --weights teacher.pt --network resnet20 --classes a b", "Expected 10 classes, as many as"),
        ("predict numbers --weights teacher.pt --network resnet20 --top 0", "Expected top of 1 or more"),
        ("predict gone.png --weights teacher.pt --network resnet20", "There is no file gone.png."),
    ],
)
def test_an_error_names_the_fix(line, message, here, capsys):
    refused(line, message, here, capsys)


def test_a_head_of_other_classes_is_an_error(here, capsys):
    torch.save(create("torchvision/resnet18").state_dict(), "imagenet.pt")
    message = "imagenet.pt has a head for 1000 classes, and "
    for command in ("generate", "distill --student resnet8 --only-cost false"):
        line = f"{command} --data numbers --teacher imagenet.pt --network resnet18 --size 32".replace(
            "--only-cost false", "--scale smoke"
        )
        said = supermix(line, capsys)
        assert said.startswith(f"supermix: {message}") and "create('torchvision/resnet18', 10)" in said


class Evil:
    def __reduce__(self):
        return (open, ("pwned", "w"))


def test_a_file_cannot_run_code(here, capsys):
    torch.save({"model": Evil()}, "evil.pt")
    said = supermix("predict numbers --weights evil.pt --network resnet20", capsys)
    assert said.startswith("supermix: evil.pt is not a file of weights that can be read safely")
    assert not Path("pwned").exists()


# ---- files of weights

KEPT = {
    "plain": lambda state: state,
    "torchvision's script": lambda state: {"model": state, "epoch": 3, "args": None},
    "timm's script": lambda state: {"state_dict": state, "arch": "resnet10t"},
    "DataParallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "Lightning": lambda state: {"state_dict": {f"net.{key}": value for key, value in state.items()}, "epoch": 1},
    "compiled in DataParallel": lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
}


@pytest.mark.parametrize("how", KEPT)
@pytest.mark.parametrize("name", ["timm/test_resnet", "resnet8"])
def test_weights_as_scripts_keep_them(name, how, tmp_path):
    network = create(name, 7).eval()
    torch.save(KEPT[how](network.state_dict()), tmp_path / "weights.pth")
    again = open_network(tmp_path / "weights.pth", name)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert not again.training and again.num_classes == 7 and torch.equal(again(x), network(x))


def test_weights_in_safetensors(tmp_path):
    network = create("timm/test_resnet", 3)
    save_file(network.state_dict(), tmp_path / "plain.safetensors")
    again = open_network(tmp_path / "plain.safetensors", "timm/test_resnet")
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values()))
    network.info = DIGITS.info
    save(network, tmp_path / "ours.safetensors")
    again = open_network(tmp_path / "ours.safetensors")
    assert again.name == "timm/test_resnet" and again.info == DIGITS.info
    with pytest.raises(ValueError, match="holds a timm/test_resnet, not a resnet8"):
        open_network(tmp_path / "ours.safetensors", "resnet8")


def test_weights_that_are_not_finite(tmp_path):
    state = create("resnet8").state_dict()
    next(iter(state.values())).view(-1)[0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match="expected finite weights"):
        open_network(tmp_path / "nan.pt", "resnet8")


def test_names_of_other_libraries():
    assert full_name("vgg13") == "vgg13" and full_name("resnet18") == "torchvision/resnet18"
    assert full_name("vit_tiny_patch16_224") == "timm/vit_tiny_patch16_224"
    with pytest.raises(ValueError, match="Unknown network of torchvision 'resnet19'. Did you mean 'resnet1"):
        create("torchvision/resnet19")
    with pytest.raises(ValueError, match="Unknown network 'hf-hub:me/mine'"):
        create("hf-hub:me/mine")  # a name that timm would fetch from a network


def test_a_student_of_another_library_is_saved_by_name(tmp_path):
    student = create("torchvision/mobilenet_v3_small", 5).eval()
    again = load(save(student, tmp_path / "student.safetensors"))
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert again.name == "torchvision/mobilenet_v3_small" and torch.equal(again(x), student(x))


# ---- how a network sees images


def test_timm_networks_see_images_as_timm_says(here):
    timm = pytest.importorskip("timm")
    network = create("timm/test_resnet", 10)
    config = timm.data.resolve_model_data_config(network)
    data = load_pictures("numbers", network)
    assert (3, data.info.size, data.info.size) == config["input_size"] and data.info.mean == config["mean"]
    assert data.info.interpolation == config["interpolation"] and data.info.crop_pct == config["crop_pct"]
    assert replace(info_for(network), name="numbers", classes=data.info.classes) == data.info
    photo = Image.open(data.test.files[0]).convert("RGB")
    theirs = timm.data.create_transform(**config, is_training=False)(photo)
    torch.testing.assert_close(data.test[0][0], theirs, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["resnet18", "inception_v3", "efficientnet_b3"])
def test_torchvision_networks_see_images_as_their_weights_say(name, place):
    first = next(iter(torchvision.models.get_model_weights(name)))
    network = create("torchvision/resnet18", 10)
    network.name = f"torchvision/{name}"
    data = load_pictures(place / "numbers", network)
    theirs = first.transforms()(Image.open(data.test.files[0]).convert("RGB"))
    torch.testing.assert_close(data.test[0][0], theirs, atol=0.02, rtol=0)
    assert view_of(network)["size"] == first.transforms().crop_size[0]


# ---- predict


def test_predict_says_what_the_network_says(here, capsys):
    weights = ["--weights", "teacher.pt", "--network", "resnet20", *VIEW, "--out", "said/table.json", "--top", "2"]
    said = supermix(["predict", "numbers/val", *weights, "--classes", *"0123456789"], capsys)
    kept = json.loads(Path("said/table.json").read_text())
    files = sorted(str(path.relative_to("numbers/val")) for path in Path("numbers/val").rglob("*.png"))
    assert [row["file"] for row in kept["predictions"]] == files and kept["network"] == "resnet20"
    network = pretrained("digits")
    network.info = replace(DIGITS.info, crop_pct=0.875)
    pixels = [torchvision.transforms.v2.functional.pil_to_tensor(Image.open(f"numbers/val/{file}")) for file in files]
    shares = predict(network, torch.stack(pixels)).probabilities.double()
    assert [row["class"] for row in kept["predictions"]] == shares.argmax(1).tolist()
    for row, own in zip(kept["predictions"], shares):
        assert [best["probability"] for best in row["top"]] == pytest.approx(own.topk(2).values.tolist(), abs=2e-3)
    right = sum(row["label"] == Path(row["file"]).parent.name for row in kept["predictions"])
    assert kept["right"] == pytest.approx(100 * right / 40) and f"{kept['right']:.1f} % are in a folder" in said
    assert said.splitlines()[:40] == _prediction_table(kept["predictions"]).splitlines() and right > 36


def test_predict_one_image(here, capsys):
    said = supermix(
        ["predict", "numbers/val/7/" + next(Path("numbers/val/7").iterdir()).name, "--weights", "teacher.pt"]
        + ["--network", "resnet20", *VIEW],
        capsys,
    )
    assert "class 7" in said and "1 prediction in out/predictions.json" in said
    assert json.loads(Path("out/predictions.json").read_text())["right"] is None


# ---- distill


@pytest.mark.filterwarnings("ignore:The network is right")  # two epochs teach it nothing
def test_distill_writes_a_student_that_predict_takes(here, capsys):
    line = [*OWN, *VIEW, *"--student timm/test_resnet --mixer supermix --scale smoke --out runs".split()]
    said = supermix(["distill", *line], capsys)
    result = json.loads(next(Path("runs/results").iterdir()).read_text())
    student = Path(said.splitlines()[-1].removeprefix("The student: "))
    assert result["recipe"]["data"] == "numbers" and result["teacher"]["name"] == "resnet20"
    assert result["figures"]["epochs"] == 2 and result["variant"]["mixer"] == "supermix"
    assert load(student).info.classes == DIGITS.info.classes and load(student).name == "timm/test_resnet"
    assert said == supermix(["distill", *line], capsys), "the same command finds its result"
    said = supermix(["predict", "numbers/val", "--weights", str(student)], capsys)
    assert f"{result['figures']['test_accuracy']:.1f} % are in a folder" in said


def test_distill_for_a_folder_begins_with_the_folders_recipe(here):
    line = ["distill", *OWN, "--student", "resnet8", "--training.lr", "0.1"]
    recipe, _, places, scale, _ = cli.parse_command(line).args
    wanted = recipes.change(recipes.FOLDER, {"data": "numbers", "teacher": "resnet20", "student": "resnet8"})
    assert recipe == recipes.change(wanted, {"training.lr": 0.1}) and scale == "paper"
    assert places.teacher == Path("teacher.pt") and places.results == Path("out/runs/results")
    named = ["distill", "--data", "numbers", "--teacher", "resnet20", "--teacher-file", "teacher.pt"]
    assert cli.parse_command([*named, "--student", "resnet8"]).args[2].teacher == Path("teacher.pt")


def test_train_without_a_teacher(here, capsys):
    line = "train --data numbers --student timm/test_resnet --size 32 --scale smoke --training.epochs 1 --out runs"
    said = supermix(line, capsys)
    assert "% of the test images after 1 epochs" in said and load(said.splitlines()[-1].split(": ")[1]).info.size == 32


def test_a_safe_file_of_supermix_needs_no_network(here, capsys):
    teacher = pretrained("digits")
    teacher.info = replace(teacher.info, flip=True, pad=4)
    save(teacher, "ours.safetensors")
    said = supermix("generate --data numbers --teacher ours.safetensors --count 1 --out mixes", capsys)
    assert "% of 160 training images" in said and "128 mixed" not in said
    assert cli.parse_command("distill --data numbers --teacher ours.safetensors --student resnet8".split()).args[
        0
    ].teacher == ("resnet20")
