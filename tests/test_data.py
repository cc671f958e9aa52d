"""Data sets in their real file formats, written here in small: read right when whole, named in an error when not."""

import gzip
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import supermix.data
import torch
from PIL import Image
from supermix.data import (ArrayImages, Info, Views, evenly, find_fashion, load_cifar100, load_data, load_fashion_mnist,
                           load_folder, load_imagenet, open_image, read_idx)
from supermix.runs import write_cifar100
from torch.utils.data import DataLoader
from torchvision import transforms


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path, monkeypatch):
    "Data are looked for in the test's own folder and in no cache of the machine."
    monkeypatch.delenv("SUPERMIX_DATA", raising=False)
    monkeypatch.setattr(supermix.data, "CACHE", tmp_path / "no cache")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


# ---- CIFAR-100: a folder of pickled batches

NAMES = ["apple", "aquarium_fish", "bébé"]
ROWS = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
BATCH = {"filenames": [f"{i}.png" for i in range(6)], "batch_label": "batch 1 of 1", "fine_labels": [2, 0, 1, 1, 0, 2],
         "coarse_labels": [0] * 6, "data": ROWS}


def dump(path, content): path.write_bytes(pickle.dumps(content, protocol=2))  # the protocol of the real files


def cut(path): path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture
def cifar(tmp_path):
    split = ROWS, BATCH["fine_labels"]
    return write_cifar100(tmp_path, NAMES, split, split)


def test_cifar(cifar, tmp_path, monkeypatch):
    data = load_cifar100(tmp_path, download=False)
    assert data.info.classes == tuple(NAMES) and len(data.train) == len(data.test) == 6 and str(cifar) in repr(data)
    image, label = data.train[1]
    assert label == 0 and image.shape == (3, 32, 32)
    red_of_row_2_column_5 = (ROWS[1][2 * 32 + 5] / 255 - 0.5071) / 0.2675
    assert image[0, 2, 5].item() == pytest.approx(red_of_row_2_column_5, abs=1e-6)
    monkeypatch.setenv("SUPERMIX_DATA", str(tmp_path))
    assert len(load_data("cifar100", download=False).test) == 6


class Malicious:
    def __reduce__(self): return os.mkdir, ("owned",)


def other(name, **changes):
    "Write a batch again with some entries changed, or left out where they are None."
    return lambda folder: dump(folder / name, {k: v for k, v in {**BATCH, **changes}.items() if v is not None})


CIFAR_DAMAGE = {
    "no test": (lambda folder: (folder / "test").unlink(), "test is missing: .* half downloaded"),
    "no meta": (lambda folder: (folder / "meta").unlink(), "meta is missing: .* half downloaded"),
    "cut off": (lambda folder: cut(folder / "train"), "train cannot be read .* fetch it again"),
    "empty": (lambda folder: (folder / "meta").write_bytes(b""), "meta cannot be read .* fetch it again"),
    "a web page": (lambda folder: (folder / "test").write_bytes(b"<html>404</html>"), "test cannot be read .* fetch"),
    "malicious": (lambda folder: dump(folder / "meta", Malicious()), "it asks for posix.mkdir"),
    "malicious inside": (other("test", filenames=Malicious()), "it asks for posix.mkdir"),
    "other rows": (other("train", data=ROWS[:, :1024]), r"rows of 3,072 bytes .* got uint8 \(6, 1024\)"),
    "other bytes": (other("train", data=ROWS.astype(np.float32)), r"rows of 3,072 bytes .* got float32"),
    "too few labels": (other("train", fine_labels=[0, 1]), "2 labels"),
    "CIFAR-10's labels": (other("train", fine_labels=None, labels=[0] * 6), "train.*fine_labels"),
    "no data": (other("test", data=None), "test.*data"),
    "a list": (lambda folder: dump(folder / "test", [1, 2]), "test.* list"),
    "no names": (lambda folder: dump(folder / "meta", {}), "meta.*fine_label_names"),
    "more labels than names": (other("test", fine_labels=[0, 1, 2, 0, 1, 99]), "test.*99"),
}


@pytest.mark.skipif(os.name != "posix", reason="os.mkdir goes by another name")
@pytest.mark.parametrize("case", CIFAR_DAMAGE)
def test_damaged_cifar(case, cifar, tmp_path):
    damage, message = CIFAR_DAMAGE[case]
    damage(cifar)
    with pytest.raises((ValueError, FileNotFoundError), match=message): load_cifar100(tmp_path, download=False)
    assert not os.path.exists("owned")


# ---- ImageNet: folders of JPEGs

@pytest.fixture
def imagenet(tmp_path, photos):
    "Two classes of two photographs, one of them grey and one upright; the same for training and validation."
    for split in ("train", "val"):
        for name, photo in photos.items():
            folder = tmp_path / "imagenet" / split / ("animal" if name in ("chelsea", "astronaut") else "thing")
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(photo).resize((120, 160) if name == "coffee" else (200, 150))
            (image.convert("L") if name == "rocket" else image).save(folder / f"{name}.JPEG", quality=90)
    return tmp_path / "imagenet"


def test_imagenet(imagenet, tmp_path):
    data = load_data("imagenet", tmp_path)
    assert data.info.classes == ("animal", "thing") and data.train.labels.tolist() == [0, 0, 1, 1]
    assert str(load_imagenet(imagenet)) == str(data)  # the folder itself will do as well as the one above it
    theirs = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(),
                                 transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    for i, path in enumerate(data.test.files):
        torch.testing.assert_close(data.test[i][0], theirs(Image.open(path).convert("RGB")), rtol=0, atol=1e-5)


def test_random_views_of_photographs(imagenet, seeded):
    train = load_imagenet(imagenet).train
    (a, labels, where), = train.batches(4, seed=0)
    assert a.shape == (4, 3, 224, 224) and torch.equal(labels, train.labels[where])
    views = train.draw(torch.zeros(200, dtype=torch.int64), seeded())  # of the first photograph, 200×150
    top, left, h, w = views.crop.T
    assert ((top >= 0) & (left >= 0) & (top + h <= 150) & (left + w <= 200)).all() and 60 < views.flip.sum() < 140
    one = Views(views.crop[:1], torch.tensor([True]))
    other = Views(views.crop[:1], torch.tensor([False]))
    zero = torch.tensor([0])
    assert torch.equal(train.fetch(zero, one).flip(-1), train.fetch(zero, other))


IMAGENET_DAMAGE = {
    "no train": (lambda folder: (folder / "train").rename(folder / "train.part"), "train is missing: .* half"),
    "no val": (lambda folder: (folder / "val").rename(folder / "val.part"), "val is missing: .* half"),
    "neither": (lambda folder: folder.rename(folder.parent / "imagenet.part"), "expected the folders train and val"),
    "a class less": (lambda folder: (folder / "val" / "thing").rename(folder / "thing"),
                     r"train has 2 classes and val 1; only in one: \['thing'\]"),
    "an empty class": (lambda folder: [f.unlink() for f in (folder / "val" / "thing").iterdir()], "thing"),
}


@pytest.mark.parametrize("case", IMAGENET_DAMAGE)
def test_damaged_imagenet(case, imagenet, tmp_path):
    damage, message = IMAGENET_DAMAGE[case]
    damage(imagenet)
    with pytest.raises((ValueError, FileNotFoundError), match=message): load_imagenet(tmp_path)


def png_with_a_broken_chunk(path):
    Image.effect_noise((300, 300), 50).save(path, format="PNG")
    content = bytearray(path.read_bytes())
    second = content.find(b"IDAT", content.find(b"IDAT") + 4)  # Pillow answers this one with a SyntaxError
    content[second:second + 4] = b"\0\1\2\3"
    path.write_bytes(content)


def png_header(width, height):
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">II", zlib.crc32(header), 100) + b"IDAT"


IMAGE_DAMAGE = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:2000]),
    "empty": lambda path: path.write_bytes(b""),
    "a web page": lambda path: path.write_bytes(b"<html>404</html>"),
    "gone": lambda path: path.unlink(),
    "a broken PNG": png_with_a_broken_chunk,
    "a bomb": lambda path: path.write_bytes(png_header(20_000, 20_000)),
}


@pytest.mark.parametrize("case", IMAGE_DAMAGE)
def test_a_broken_image_is_named(case, imagenet, seeded):
    train = load_imagenet(imagenet).train
    path = Path(train.files[2])
    IMAGE_DAMAGE[case](path)
    for read in (lambda: train[2], lambda: list(train.batches(1, seed=0))):  # the second one in another thread
        with pytest.raises(ValueError, match=f"{path.name} cannot be read as an image"): read()


def test_an_image_with_transparency_is_read_as_rgb(tmp_path):
    Image.new("RGBA", (4, 3), (10, 20, 30, 128)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (10, 20, 30)


# ---- Fashion-MNIST: idx files

def idx(values):
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def put(path, content): path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def of(folder, name): return next(folder.glob(f"{name}*"))


PIXELS, LABELS = np.arange(5 * 28 * 28).reshape(5, 28, 28) % 251, np.array([9, 0, 3, 3, 1])


@pytest.fixture(params=["gz", "plain"])
def fashion(request, tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        for kind, values in (("images-idx3-ubyte", PIXELS), ("labels-idx1-ubyte", LABELS)):
            put(folder / (f"{split}-{kind}" + (".gz" if request.param == "gz" else "")), idx(values))
    return folder


def test_fashion_mnist(fashion, tmp_path):
    data = load_fashion_mnist(tmp_path, download=False)
    assert data.train.labels.tolist() == LABELS.tolist() and data.info.classes[9] == "ankle boot"
    pixels = data.test.fetch(torch.arange(5))
    assert pixels.shape == (5, 3, 32, 32)
    assert pixels[..., :2].sum() == pixels[..., -2:, :].sum() == 0  # a frame of two black pixels
    assert (pixels[:, :, 2:-2, 2:-2].numpy() == PIXELS[:, None]).all()
    assert load_data("auto", fashion).info.name == "fashion_mnist"


FASHION_DAMAGE = {
    "one missing": (lambda folder: of(folder, "t10k-labels").unlink(), "half downloaded: t10k-labels-.* missing"),
    "cut off": (lambda folder: cut(of(folder, "train-images")), "train-images.* fetch it again"),
    "empty": (lambda folder: of(folder, "t10k-images").write_bytes(b""), "t10k-images.* fetch it again"),
    "a web page": (lambda folder: of(folder, "t10k-images").write_bytes(b"<html>404</html>"),
                   "t10k-images.*(fetch it again|3c68746d)"),
    "labels for images": (lambda folder: put(of(folder, "train-images"), idx(LABELS)), "train-images"),
    "fewer labels": (lambda folder: put(of(folder, "train-labels"), idx(LABELS[:4])), r"5 images, got labels \(4,\)"),
}


@pytest.mark.parametrize("case", FASHION_DAMAGE)
def test_damaged_fashion_mnist(case, fashion, tmp_path):
    damage, message = FASHION_DAMAGE[case]
    damage(fashion)
    with pytest.raises((ValueError, FileNotFoundError), match=message): load_data("auto", tmp_path, download=False)


@pytest.mark.parametrize("content", [
    gzip.compress(idx(PIXELS))[:10] + b"\xff" * 50,             # zlib: an invalid block type
    gzip.compress(idx(PIXELS))[:-8] + bytes(8),                 # a wrong checksum
    gzip.compress(struct.pack(">HBB1I", 0, 13, 1, 2) + bytes(8)),  # floats
    gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1)),  # a product beyond 64 bits
    gzip.compress(idx(LABELS) + b"more"),
], ids=["block", "checksum", "floats", "endless", "too long"])
def test_a_broken_idx_file_is_named(content, tmp_path):
    (tmp_path / "broken.gz").write_bytes(content)
    with pytest.raises(ValueError, match="broken.gz"): read_idx(tmp_path / "broken.gz")


# ---- what every data set does

@pytest.mark.parametrize("name, message", [("cifar10", "set 'cifar10'. Did you mean 'cifar100'"), ("", "set ''")])
def test_an_unknown_name(name, message):
    with pytest.raises(ValueError, match=f"Unknown data {message}"): load_data(name)


@pytest.mark.parametrize("name", ["auto", "fashion_mnist", "cifar100", "imagenet"])
def test_a_missing_folder(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such-folder"): load_data(name, tmp_path / "no-such-folder")
    if name in ("cifar100", "imagenet"):  # a folder that is there, but not with these data
        with pytest.raises(FileNotFoundError, match=str(tmp_path)): load_data(name, tmp_path, download=False)


@pytest.fixture(params=["array", "folder"])
def images(request):
    "Nine images in memory, or four in files."
    if request.param == "folder": return load_imagenet(request.getfixturevalue("imagenet")).train.subset(4)
    info = Info("noise", ("a", "b", "c"), 8, (0.5,) * 3, (0.25,) * 3)
    pixels = torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8)
    return ArrayImages(info, pixels, torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2]))


def test_the_same_seed_gives_the_same_batches(images):
    def one_pass(seed): return [torch.cat(parts) for parts in zip(*images.batches(2, seed))]
    first, other = one_pass(0), one_pass(1)
    images.workers = 1  # however many threads decode
    again = one_pass(0)
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[0], other[0])
    assert first[2].sort().values.tolist() == list(range(len(images)))  # each image once, with its label
    assert torch.equal(first[1], images.labels[first[2]])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 1])
def test_a_pass_begun_late_and_shared_holds_the_same(world, start, images):
    whole = [torch.cat(parts) for parts in zip(*images.batches(4, 3, epoch=2, start=start))]
    ranks = [list(images.batches(4, 3, epoch=2, start=start, share=(rank, world))) for rank in range(world)]
    alike = [[batch[2].tolist() for batch in rank] for rank in ranks]
    together = [batches[0] if len(batches[0][2]) == 1 else [torch.cat(t) for t in zip(*batches)]
                for batches in zip(*ranks)]
    assert all(torch.equal(torch.cat(a), b) for a, b in zip(zip(*together), whole)) and len(alike) == world
    full = [torch.cat(parts) for parts in zip(*images.batches(4, 3, epoch=2))]
    assert all(torch.equal(a, b[4 * start:]) for a, b in zip(whole, full))
    assert not torch.equal(full[2], torch.cat([i for _, _, i in images.batches(4, 3, epoch=1)]))


def test_plain_batches_are_the_images_in_order(images):
    batches = [x for x, _, _ in images.batches(2)]
    assert [len(x) for x in batches] == [2, 2] if len(images) == 4 else [2, 2, 2, 2, 1]
    assert torch.equal(torch.cat(batches), images[:][0]) and torch.equal(torch.cat(batches)[-1], images[-1][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_reads_them(images, workers):
    loaded = list(DataLoader(images, batch_size=3, num_workers=workers))
    for ours, theirs in zip(images[:], zip(*loaded)): assert torch.equal(ours, torch.cat(theirs))


def test_a_mask_chooses_images(images):
    chosen, labels = images[images.labels == 1]
    assert set(labels.tolist()) == {1} and len(chosen) == (images.labels == 1).sum()


def test_an_index_beyond_the_end(images):
    for i in (len(images), -len(images) - 1):
        with pytest.raises(IndexError): images[i]


def test_a_subset_is_even_over_the_classes_and_the_same_each_time(digits):
    few = digits.train.subset(45)
    assert sorted(few.labels.bincount().tolist()) == [4] * 5 + [5] * 5
    assert torch.equal(few.pixels, digits.train.subset(45).pixels)
    assert not torch.equal(few.pixels, digits.train.subset(45, seed=1).pixels)
    first, rest = digits.train.split(45)
    assert len(first) == 45 and len(rest) == len(digits.train) - 45
    assert torch.equal(torch.cat([first.labels, rest.labels]).bincount(), digits.train.labels.bincount())
    assert (first.pixels.sum((1, 2, 3)).sum() + rest.pixels.sum((1, 2, 3)).sum()) == digits.train.pixels.sum()


def test_evenly_deals_like_a_plain_loop(seeded):
    labels = torch.randint(0, 7, (200,), generator=seeded()) ** 2 % 11                  # some classes are empty
    order = torch.randperm(200, generator=seeded(5)).tolist()
    dealt, seen = [], {}
    for i in order: seen.setdefault(int(labels[i]), []).append(i)
    for number in range(max(map(len, seen.values()))):
        dealt += [i for i in order if number < len(seen[int(labels[i])]) and seen[int(labels[i])][number] == i]
    assert evenly(labels, 200, seed=5).tolist() == dealt


def test_evenly_chooses_from_as_many_images_as_imagenet_has(seeded):
    labels = torch.randint(0, 1000, (1_281_167,), generator=seeded())
    chosen = labels[evenly(labels, 50_000)[:50_000]].bincount()
    assert chosen.min() == chosen.max() == 50


@pytest.mark.parametrize("pixels, labels, message", [
    (torch.zeros(2, 3, 8, 8), torch.zeros(2), r"uint8 pixels \(n, 1 or 3, H, W\), got torch.float32 \(2, 3, 8, 8\)"),
    (torch.zeros(2, 8, 8).byte(), torch.zeros(2), r"got torch.uint8 \(2, 8, 8\)"),
    (torch.zeros(2, 2, 8, 8).byte(), torch.zeros(2), r"got torch.uint8 \(2, 2, 8, 8\)"),
    (torch.zeros(2, 1, 8, 8).byte(), torch.zeros(3), r"a label for each of 2 images, got labels \(3,\)"),
])
def test_arrays_that_are_no_images(pixels, labels, message, digits):
    with pytest.raises(ValueError, match=message): ArrayImages(digits.info, pixels, labels)


@pytest.mark.parametrize("options, message", [
    (dict(mean=(123.7, 116.3, 103.5)),
     r"Expected mean of three channels, each of pixels in 0 … 1 .*divide it by 255.*got \(123.7"),
    (dict(std=(0.2, 0.0, 0.2)), "Expected std of three channels"),
    (dict(mean=0.5), "Expected mean of three channels.* got 0.5"), (dict(std=(0.5,)), "Expected std of three channels"),
])
def test_a_folder_under_an_odd_normalisation(options, message, photos, tmp_path):
    for name, photo in photos.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3): Image.fromarray(photo[i:200 + i, :200]).save(tmp_path / "photos" / name / f"{i}.png")
    data = load_folder(tmp_path / "photos", size=32, mean=[0.5, 0.5, 0.5], std=(0.5, 0.5, 0.5))
    assert len(data.train) + len(data.test) == 12 and data.train[:2][0].shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match=message): load_folder(tmp_path / "photos", **options)


def test_a_split_takes_the_same_share_of_each_class(digits):
    labels = torch.tensor([0] * 100 + [1] * 100 + [2] * 12 + [3])
    images = ArrayImages(digits.info, torch.zeros(213, 1, 32, 32, dtype=torch.uint8), labels)
    held, learned = images.split(43)
    counts = labels.bincount()
    assert ((held.labels.bincount(minlength=4) - counts * 43 / 213).abs() < 1).all() and len(held) == 43
    assert learned.labels.bincount().equal(counts - held.labels.bincount(minlength=4)) and 3 in learned.labels
    even = ArrayImages(digits.info, torch.zeros(40, 1, 32, 32, dtype=torch.uint8), torch.arange(40) % 4)
    assert even.split(8)[0].labels.bincount().tolist() == [2, 2, 2, 2]


DOWNLOADS = """
import sys, time
from pathlib import Path
from supermix.data import download_to

def slow(place, download):
    Path(place, "set").mkdir()
    for name in "abc":
        Path(place, "set", name).write_text(name)
        time.sleep(0.2)
    with open(sys.argv[1] + "/log", "a") as log: log.write("made\\n")

download_to(Path(sys.argv[1]) / "data", "set", slow)
assert sorted(p.name for p in Path(sys.argv[1], "data", "set").iterdir()) == ["a", "b", "c"]
"""


def test_several_processes_download_once_and_find_it_whole(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(DOWNLOADS)
    processes = [subprocess.Popen([sys.executable, script, tmp_path]) for _ in range(3)]
    assert [p.wait(600) for p in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "made\n"
    assert [p.name for p in (tmp_path / "data").iterdir() if not p.name.startswith(".")] == ["set"]


def test_files_in_the_open_count_where_their_folder_is_named(fashion, tmp_path, monkeypatch):
    "MNIST's files have the names of Fashion-MNIST's."
    names = [shutil.move(path, tmp_path) for path in (tmp_path / "FashionMNIST" / "raw").iterdir()]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in names: shutil.copy(name, tmp_path / "data")
    assert str(tmp_path) not in str(find_fashion()) and find_fashion(tmp_path)[0].parent == tmp_path


def test_indices_are_whole_numbers_or_a_mask_of_all(digits):
    few = digits.train.subset(6)
    with pytest.raises(IndexError, match="whole numbers or a mask of 6, got torch.float"): few[1.7]
    with pytest.raises(IndexError, match="mask of 6, got torch.bool"): few[[True, False]]
    assert len(few[[]][0]) == 0 and len(few[few.labels >= 0][0]) == 6


def test_grey_images_stay_one_channel(digits):
    part, rest = digits.train.split(100)
    assert all(images.kept.shape[1] == 1 for images in (part, rest, digits.train.subset(50)))


def test_a_share_for_testing_is_a_share(tmp_path):
    for share in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1, a share"): load_folder(tmp_path, held_out=share)
