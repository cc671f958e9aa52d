"""Networks against the benchmark's numbers, files that keep them, predictions, and the shipped teachers."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from supermix.core import weights_hash
from supermix.data import FolderImages, Info, load_data
from supermix.models.shakeshake import ShakeShake
from supermix.policies.policies import load_policy, save_policy
from supermix.training.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from supermix.training.loop import accuracy
from supermix.zoo import _as_batch, _crd_keys, _shipped, create, load, load_crd, predict, pretrained, save, table
from torch import nn

# As published: the paper's supplement, the CRD benchmark, torchvision
PARAMETERS = {
    "wrn_40_2": 2_255_156,
    "wrn_40_1": 569_780,
    "wrn_16_2": 703_284,
    "resnet110": 1_736_564,
    "resnet56": 861_620,
    "resnet32": 472_756,
    "resnet20": 278_324,
    "resnet50": 23_705_252,
    "resnet32x4": 7_433_860,
    "resnet8x4": 1_233_540,
    "vgg13": 9_462_180,
    "vgg8": 3_965_028,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
    "wrn_40_2a": 2_258_084,
    "wrn_28_10a": 36_546_980,
    "shakeshake26_2x96d": 26_366_404,
    "imagenet_resnet34": 21_797_672,
    "imagenet_resnet18": 11_689_512,
    "imagenet_resnet50": 25_557_032,
}
ORACLE = json.loads((Path(__file__).parent / "data" / "crd_networks.json").read_text())


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in table()}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_published_parameter_counts(name, rows):
    assert rows[name].parameters == PARAMETERS[name]


def test_a_row_says_name_stages_cost_and_paper(rows):
    "The cost against a count by hand: output elements times weights of one output."
    for name in ("resnet20", "vgg8", "mobilenetv2", "shufflenetv1"):
        network, cost = create(name).eval(), 0

        def count(module, args, output):
            nonlocal cost
            cost += output.numel() * module.weight[0].numel()

        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(count)
        with torch.no_grad():
            network(torch.zeros(1, 3, 32, 32))
        assert (
            rows[name].multiply_adds == cost
            and "arXiv" in rows[name].paper
            and f"{rows[name].parameters:,}" in str(rows[name])
        )


def fill(shapes):
    "Weights from seeds, as the oracle's were."
    for i, (key, shape) in enumerate(shapes):
        g = torch.Generator().manual_seed(i)
        kind = key.rsplit(".", 1)[-1]
        if kind == "num_batches_tracked":
            yield torch.tensor(0)
        elif kind == "running_var":
            yield 0.5 + torch.rand(shape, generator=g, dtype=torch.float64)
        elif kind in ("running_mean", "bias"):
            yield 0.1 * torch.randn(shape, generator=g, dtype=torch.float64)
        elif len(shape) == 1:
            yield 0.25 + 0.5 * torch.rand(shape, generator=g, dtype=torch.float64)
        else:
            yield torch.randn(shape, generator=g, dtype=torch.float64) * (2 / torch.Size(shape[1:]).numel()) ** 0.5


def benchmark_state(name):
    "The benchmark's state dictionary of a network, filled from seeds."
    shapes = ORACLE[name]["state_dict"]
    return dict(zip([key for key, _ in shapes], fill(shapes), strict=True))


@pytest.mark.parametrize("name", ORACLE)
def test_the_benchmarks_features_and_logits(name, rows):
    want, network = ORACLE[name], load_crd(create(name).double(), benchmark_state(name))
    assert list(_crd_keys(network).values()) == [key for key, _ in want["state_dict"]] and not network.training
    probe = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1234), dtype=torch.float64)
    with torch.no_grad():
        features, logits = network.features(probe), network(probe)
    assert [list(f.shape[1:]) for f in features] == want["features"] == [list(s) for s in rows[name].stages]
    ours = torch.cat([torch.stack([f.mean() for f in features]), logits[0, :8], logits[1, -4:]])
    theirs = want["feature_means"] + want["logits_row0_first8"] + want["logits_row1_last4"]
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s},
        lambda s: {"epoch": 240, "model": s, "best_acc": torch.tensor(1.0), "opt": Namespace(a=1)},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    ],
)
def test_a_benchmark_file(wrap, tmp_path):
    state = benchmark_state("vgg8")
    torch.save(wrap(state), tmp_path / "vgg8.pth")
    network = load_crd(create("vgg8"), tmp_path / "vgg8.pth")
    assert torch.equal(network.head.weight, state["classifier.weight"].float())
    assert torch.equal(network.stages[3][1][1].running_var, state["block4.1.running_var"].float())


@pytest.mark.parametrize("name", ["vgg8", "wrn_16_2", "shufflenetv2"])
def test_a_file_of_pytorch_0_4_has_no_counters(name, tmp_path):
    state = benchmark_state(name)
    old = {f"module.{k}": v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save({"model": old}, tmp_path / "old.pth")
    network = create(name)
    network(torch.randn(2, 3, 32, 32))  # its own counters are at 1
    load_crd(network, tmp_path / "old.pth")
    torch.testing.assert_close(network.state_dict(), load_crd(create(name), state).state_dict(), rtol=0, atol=0)
    old.pop(next(key for key in old if key.endswith("running_mean")))
    with pytest.raises(ValueError, match="missing: .*running_mean"):
        load_crd(create(name), old)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("layer2.0.bn1.bias"), "resnet20: missing: layer2.0.bn1.bias"),
        (lambda s: s.update({"tail.weight": torch.zeros(1)}), "not expected: tail.weight"),
        (lambda s: s.update({"fc.weight": torch.zeros(10, 64)}), r"fc.weight: expected \(100, 64\), got \(10, 64\)"),
        (lambda s: s.update(note="hello"), "expected a dictionary of tensors"),
    ],
)
def test_a_wrong_benchmark_state_is_named_and_changes_nothing(change, message):
    state, network = benchmark_state("resnet20"), create("resnet20")
    change(state)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_crd(network, state)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_a_benchmark_file_that_would_run_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": benchmark_state("resnet20"), "opt": Bomb()}, tmp_path / "bad.pth")
    (tmp_path / "short.pth").write_bytes((tmp_path / "bad.pth").read_bytes()[:1000])
    for name in ("bad.pth", "short.pth"):
        with pytest.raises(ValueError, match=f"{name} is not a file of weights that can be read safely"):
            load_crd(create("resnet20"), tmp_path / name)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="Unknown family of the CRD benchmark 'ShakeShake'"):
        load_crd(nn.Module.__new__(ShakeShake), {})


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (64, 64)])
@pytest.mark.parametrize(
    "name", ["resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2", "imagenet_resnet18"]
)
def test_a_network_takes_any_size_and_gives_any_number_of_classes(name, size):
    network, x = create(name, num_classes=3).eval(), torch.randn(2, 3, *size)
    assert network(x).shape == (2, 3)
    head = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    torch.testing.assert_close(network(x), head(network.features(x)[-1]))


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: create("resnet21"), "Unknown network 'resnet21'. Did you mean .*'resnet20'"),
        (lambda: pretrained("digit"), "Unknown shipped teacher 'digit'. Did you mean 'digits'"),
        (
            lambda: save(nn.Linear(1, 1), "never.safetensors"),
            "made by `create` .* got Linear without a registered name",
        ),
        (lambda: predict(create("resnet8"), torch.zeros(3, 32, 32)), "a network that knows its data"),
    ],
)
def test_unknown_names_and_networks(act, message):
    with pytest.raises(ValueError, match=message):
        act()


@pytest.fixture
def saved(digits, tmp_path):
    torch.manual_seed(0)
    network = create("resnet8", 10)
    network.info = digits.info
    network(torch.randn(4, 3, 32, 32))  # the statistics of batch norm are kept, too
    return network.eval(), save(network, tmp_path / "net.safetensors", note="never trained", accuracy=9.5)


def test_a_network_comes_back_from_its_file(saved, digits, tmp_path):
    network, path = saved
    again = load(path)
    assert not again.training and again.info == digits.info
    assert (again.card["note"], again.card["accuracy"]) == ("never trained", 9.5)
    torch.testing.assert_close(again.state_dict(), network.state_dict(), rtol=0, atol=0)
    assert save(again, tmp_path / "twice", note="never trained", accuracy=9.5).read_bytes() == path.read_bytes()


def test_a_network_in_16_bits_takes_half_the_room(saved, tmp_path):
    network, path = saved
    small = save(network, tmp_path / "half.safetensors", half=True)
    again = load(small)
    assert small.stat().st_size < 0.55 * path.stat().st_size
    for name, t in again.state_dict().items():
        whole = network.state_dict()[name]
        assert t.dtype == whole.dtype and torch.equal(
            t, whole.half().to(whole.dtype) if t.is_floating_point() else whole
        )
    with torch.no_grad():
        next(network.parameters())[0] = 1e6  # more than 16 bits can hold
    with pytest.raises(ValueError, match="expected finite weights"):
        save(network, tmp_path / "half.safetensors", half=True)
    assert torch.equal(load(small).state_dict()["stem.0.weight"], again.state_dict()["stem.0.weight"])


def compiled(module):
    return torch.compile(module, backend="eager")  # needs no C++ compiler


def with_compiled_part(network):
    network.stages[1] = compiled(nn.DataParallel(network.stages[1]))
    return network


WRAPPERS = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "both": lambda net: nn.DataParallel(compiled(net)),
    "a wrapped part": with_compiled_part,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_network_is_saved_as_it_is_without(name, saved, digits, tmp_path):
    network, path = saved
    images, labels = digits.test[:20]
    want, right = predict(network, images).probabilities, accuracy(network, digits.test.subset(50))
    wrapped = WRAPPERS[name](load(path))
    assert weights_hash(wrapped) == weights_hash(network)
    file = save(wrapped, tmp_path / "wrapped.safetensors", note="never trained", accuracy=9.5)
    assert file.read_bytes() == path.read_bytes() and load(file).info == digits.info
    torch.testing.assert_close(predict(wrapped, images).probabilities, want)
    assert accuracy(wrapped, digits.test.subset(50)) == right


def test_data_that_the_wrapper_was_told_of(digits, tmp_path):
    wrapped = nn.DataParallel(create("resnet8", 10))
    wrapped.info = digits.info  # as a training loop sets it
    assert load(save(wrapped, tmp_path / "net.safetensors")).info == digits.info
    assert len(predict(wrapped, digits.test[:2][0]).labels) == 2


def test_a_file_that_was_once_saved_compiled(saved):
    network, path = saved
    tensors = from_safetensors(path.read_bytes())
    card = json.loads(json.dumps({"network": "resnet8", "num_classes": 10}))
    path.write_bytes(to_safetensors({f"_orig_mod.{k}": v for k, v in tensors.items()}, {"card": json.dumps(card)}))
    torch.testing.assert_close(load(path).state_dict(), network.state_dict(), rtol=0, atol=0)


def test_a_network_that_was_never_trained_has_no_data(tmp_path):
    network = load(save(create("wrn_16_1", 3), tmp_path / "net.safetensors"))
    assert (network.name, network.num_classes, network.info) == ("wrn_16_1", 3, None)


def test_predictions_of_any_kind_of_image(saved, digits, tmp_path):
    network, _ = saved
    pixels, floats = digits.test.fetch(torch.arange(3)), digits.test[:3][0]
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    pictures[0].save(tmp_path / "first.png")
    want = predict(network.train(), floats)
    assert network.training
    with torch.no_grad():
        torch.testing.assert_close(want.probabilities, network.eval()(floats).softmax(1))
    assert torch.equal(want.classes, want.probabilities.argmax(1))
    assert want.labels == [digits.info.classes[c] for c in want.classes]
    first = tmp_path / "first.png"
    assert _as_batch([Image.new("L", (50, 90)), first], digits.info).shape == (2, 3, 32, 32)  # grey, of another size
    for images in (pixels, pictures, [first, *pixels[1:]], [str(first), pictures[1], floats[2]]):
        torch.testing.assert_close(predict(network, images).probabilities, want.probabilities)


@pytest.mark.parametrize("crop_pct", [1.0, 224 / 256])
def test_a_picture_is_seen_as_where_accuracy_was_measured(crop_pct, photos, tmp_path):
    info = Info("photos", tuple(photos), 48, (0.5,) * 3, (0.25,) * 3, crop_pct=crop_pct)
    pictures = list(map(Image.fromarray, photos.values()))
    pictures.append(pictures[0].crop((0, 0, 48, 48)))
    files = [tmp_path / f"{i}.png" for i in range(len(pictures))]
    for picture, file in zip(pictures, files):
        picture.save(file)
    tested, _ = FolderImages(info, files, torch.zeros(len(files)))[:]
    assert torch.equal(_as_batch(files, info), tested) and torch.equal(_as_batch(pictures, info), tested)
    pixels = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]
    torch.testing.assert_close(_as_batch(pixels, info), tested, rtol=0, atol=8 / 255)  # torch rounds once, Pillow twice
    assert torch.equal(tested[-1:], info.normalize(pixels[-1][None])) == (crop_pct == 1)  # of just the size: whole


def test_a_saved_network_knows_how_a_test_sees(tmp_path):
    network = create("resnet8", 2)
    network.info = Info("photos", ("a", "b"), 64, (0.5,) * 3, (0.25,) * 3, crop_pct=0.875)
    assert load(save(network, tmp_path / "net.safetensors")).info == network.info


def test_a_head_may_be_wider_than_the_names(digits):
    network = create("resnet8", 12)
    network.info = digits.info
    torch.nn.init.zeros_(network.head.weight)
    network.head.bias.data = torch.arange(12.0)
    assert predict(network, digits.test[:2][0]).labels == ["class 11"] * 2


@pytest.mark.parametrize("content", [b"hello", b"", b"\x80\x04", b"PK\x03\x04 and no more"])
def test_what_is_no_file_of_weights(content, tmp_path):
    (tmp_path / "odd.pth").write_bytes(content)
    with pytest.raises(ValueError, match="odd.pth is not a file of weights"):
        load_crd(create("resnet8"), tmp_path / "odd.pth")
    with pytest.raises(FileNotFoundError):
        load_crd(create("resnet8"), tmp_path / "none.pth")


def test_a_folder_gives_a_table(saved, photos, tmp_path):
    network, places = saved[0], ["a/one.png", "a/two.GIF", "b/c/three.jpg", "four.bmp"]
    for place, pixels in zip([*places, ".hidden/five.png", "b/._one.png", "__MACOSX/six.png"], [*photos.values()] * 2):
        (tmp_path / "in" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / place)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    said = predict(network, str(tmp_path / "in"))
    assert said.files == ("a/one.png", "a/two.GIF", "b/c/three.jpg", "four.bmp")
    want = predict(network, [tmp_path / "in" / place for place in said.files])
    assert torch.equal(said.probabilities, want.probabilities) and said.labels == want.labels and not want.files
    rows = repr(said).splitlines()
    assert len(rows) == 4 and all(row.startswith(f) and l in row for row, f, l in zip(rows, said.files, said.labels))
    for i in range(120):
        shutil.copy(tmp_path / "in" / "four.bmp", tmp_path / "in" / f"x{i:03d}.bmp")
    many = predict(network, tmp_path / "in")
    assert len(many.classes) == 124 and repr(many).endswith("… and 74 more")
    torch.testing.assert_close(many.probabilities[-1], said.probabilities[-1])
    with pytest.raises(ValueError, match="b is a folder: pass it alone"):
        predict(network, [tmp_path / "in" / "b"])
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="Expected images in .*none, such as .jpg or .png files, found none"):
        predict(network, tmp_path / "none")


def test_a_network_of_one_channel(digits):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    network.info = digits.info
    with pytest.raises(ValueError, match=r"network does not take images .* takes 1 channel.*v2.Grayscale"):
        predict(network, digits.test[:2][0])


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(1, 28, 28), r"\(3, H, W\) .* got Tensor \(1, 28, 28\)"),
        (torch.zeros(3, 4), r"got Tensor \(3, 4\)"),
        (7, "got int"),
        ("no-such.png", "There is no file no-such.png"),
        ([torch.zeros(3, 32, 32), Path("no/such.png")], "There is no file no/such.png"),
        (Path(__file__), "test_zoo.py cannot be read as an image"),
        ([], "[Ee]mpty|at least|0 images"),
        (torch.full((3, 32, 32), float("nan")), "NaN"),
    ],
)
def test_what_is_no_image(images, message, saved):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        predict(saved[0], images)


def flip(path, at=-1000, bit=3):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def rewrite(path, card=None, drop=(), add=()):
    "Write a network's file again with another card or other tensors."
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    card = {**json.loads(header["__metadata__"]["card"]), **(card or {})}
    tensors = {**{k: v for k, v in from_safetensors(content).items() if k not in drop}, **dict(add)}
    card = {k: v for k, v in card.items() if v is not None}
    path.write_bytes(to_safetensors(tensors, {"card": json.dumps(card)}))


DAMAGE = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "net.safetensors is not a whole safetensors"),
    "no card": (lambda path: path.write_bytes(to_safetensors({"a": torch.zeros(1)})), "net.safetensors has no card"),
    "other network": (lambda path: rewrite(path, {"network": "resnet9"}), "Unknown network 'resnet9'"),
    "other classes": (lambda path: rewrite(path, {"num_classes": 100}), "net.safetensors"),
    "no classes": (lambda path: rewrite(path, {"num_classes": None}), "net.safetensors"),
    "a tensor less": (lambda path: rewrite(path, drop=["head.bias"]), "net.safetensors.*head.bias"),
    "a tensor more": (lambda path: rewrite(path, add=[("tail", torch.zeros(1))]), "net.safetensors.*tail"),
    "a flipped bit": (flip, "net.safetensors was changed after it was saved: the hash of its tensors"),
    "the first flipped bit": (lambda path: flip(path, -4, 0), "net.safetensors was changed"),
    "another hash": (lambda path: rewrite(path, {"tensors": "0" * 16}), "its card says 0000000000000000"),
    "NaN": (
        lambda path: rewrite(path, {"tensors": None}, add=[("head.bias", torch.full((10,), float("nan")))]),
        "net.safetensors: expected finite weights, got NaN or infinity in head.bias",
    ),
    "a list of data": (lambda path: rewrite(path, {"info": [1]}), "net.safetensors"),
    "other data": (lambda path: rewrite(path, {"info": {"name": "digits"}}), "net.safetensors"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_named(case, saved):
    damage, message = DAMAGE[case]
    damage(saved[1])
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load(saved[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_saved(value, saved):
    network, path = saved
    before = path.read_bytes()
    with torch.no_grad():
        network.stages[0][0].a[0].weight[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="resnet8, to be saved as .*net.safetensors.* infinity in stages.0.0.a"):
        save(network, path)
    assert path.read_bytes() == before


def test_a_file_without_a_hash_is_loaded(saved):
    network, path = saved
    rewrite(path, {"tensors": None})
    torch.testing.assert_close(load(path).state_dict(), network.state_dict(), rtol=0, atol=0)


def test_a_shipped_teacher_is_as_good_as_its_card_says(teacher, digits):
    assert "digits" in _shipped() and teacher.info == digits.info and not teacher.training
    # one image of 500 may fall differently on another processor
    assert accuracy(teacher, digits.test) == pytest.approx(teacher.card["test_accuracy"], abs=0.21)


@pytest.mark.parametrize("name", _shipped())
def test_a_card_tells_how_its_teacher_was_trained(name):
    card = pretrained(name).card
    assert {"network", "data", "test_accuracy", "recipe", "sha256"} <= set(card)
    assert card["data"] == name and card["test_accuracy"] > {"cifar100": 60}.get(name, 85)


def test_the_teacher_of_a_hundred_classes_is_as_good_as_its_card_says():
    try:
        data = load_data("cifar100", download=False)
    except FileNotFoundError:
        pytest.skip("CIFAR-100 is not here: SUPERMIX_DATA names its folder")
    teacher, few = pretrained("cifar100"), data.test.subset(2000)
    assert teacher.info == data.info and len(teacher.card["sha256"]) == 64
    whole = teacher.card["test_accuracy"]  # three standard deviations of 2,000 images
    assert accuracy(teacher, few) == pytest.approx(whole, abs=3 * (whole * (100 - whole) / 2000) ** 0.5)


def test_a_network_that_learned_from_other_images(teacher, digits, tmp_path):
    path = save(teacher, tmp_path / "digits.safetensors")
    assert load(path, digits.info).info == digits.info
    with pytest.raises(ValueError, match="was trained on digits, and you use it for photos, whose classes and mean"):
        load(path, Info("photos", tuple("abcdefghij"), 32, (0.5,) * 3, digits.info.std))


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    assert save(create("resnet8", 10), "~/student.safetensors") == tmp_path / "me" / "student.safetensors"
    assert load("~/student.safetensors").name == "resnet8" and not (tmp_path / "~").exists()
    torch.save(create("resnet8", 10).state_dict(), tmp_path / "me" / "theirs.pt")
    with pytest.raises(ValueError, match="missing"):  # found, and of another kind
        load_crd(create("resnet8", 10), "~/theirs.pt")
    path = save_checkpoint("~/run", 3, {"step": 3})
    assert checkpoints("~/run") == [path] == list((tmp_path / "me" / "run").iterdir())
    assert load_checkpoint("~/run/" + path.name) == {"step": 3}
    assert load_policy(save_policy(load_policy("randaugment"), "~/mine.json")) == load_policy("~/mine.json")
