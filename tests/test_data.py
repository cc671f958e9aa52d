"""Data sets in their real file formats, written here in small: read right when whole, named in an error when not."""

import gzip
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import supermix.data
import timm
import torch
import torchvision
from PIL import Image, ImageOps, features
from supermix.data import (
    ArrayImages,
    FolderImages,
    Info,
    Views,
    _PlainUnpickler,
    _find_fashion,
    _read_idx,
    centred,
    evenly,
    fingerprint,
    image_size,
    load_cifar100,
    load_data,
    load_fashion_mnist,
    load_folder,
    load_imagenet,
    open_image,
    to_rgb,
)
from supermix.experiments.runs import _write_cifar100
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path, monkeypatch):
    "Data are looked for in the test's own folder and in no cache of the machine."
    monkeypatch.delenv("SUPERMIX_DATA", raising=False)
    monkeypatch.setattr(supermix.data, "_CACHE", tmp_path / "no cache")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


# ---- CIFAR-100: a folder of pickled batches

NAMES = ["apple", "aquarium_fish", "bébé"]
ROWS = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
BATCH = {
    "filenames": [f"{i}.png" for i in range(6)],
    "batch_label": "batch 1 of 1",
    "fine_labels": [2, 0, 1, 1, 0, 2],
    "coarse_labels": [0] * 6,
    "data": ROWS,
}


def dump(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol))  # 2: as the real files


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture
def cifar(tmp_path):
    return _write_cifar100(tmp_path, NAMES, (ROWS, BATCH["fine_labels"]), (255 - ROWS, BATCH["fine_labels"]))


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
    def __reduce__(self):
        return os.mkdir, ("owned",)


def other(name, **changes):
    "Write a batch again with some entries changed, or left out where they are None."
    return lambda folder: dump(folder / name, {k: v for k, v in {**BATCH, **changes}.items() if v is not None})


CIFAR_DAMAGE = {
    "no test": (lambda folder: (folder / "test").unlink(), "test is missing: .* half downloaded. Delete the folder"),
    "no meta": (lambda folder: (folder / "meta").unlink(), "meta is missing: .* half downloaded"),
    "cut off": (lambda folder: cut(folder / "train"), "train cannot be read .* download it again"),
    "empty": (lambda folder: (folder / "meta").write_bytes(b""), "meta cannot be read .* download it again"),
    "a web page": (
        lambda folder: (folder / "test").write_bytes(b"<html>404</html>"),
        "test cannot be read .* download it again",
    ),
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
    "labels below 0": (other("test", fine_labels=[0, 1, 2, 0, 1, -1]), "test.*0 to 2, got -1"),
    "labels that are None": (lambda folder: dump(folder / "train", {**BATCH, "fine_labels": None}), "NoneType labels"),
    "a label that is None": (other("train", fine_labels=[0, 1, 2, 0, 1, None]), "train.*0 to 2, got None"),
    "broken labels": (other("train", fine_labels=[0, 1, 2, 0, 1, 1.5]), "train.*0 to 2, got 1.5"),
    "lists of labels": (other("train", fine_labels=[[0], [1], [2], [0], [1], [1, 2]]), r"train.*got \[0\]"),
    "no images": (lambda folder: dump(folder / "train", {"data": ROWS[:0], "fine_labels": []}, 4), "train.*got none"),
    "data as lists": (other("train", data=ROWS.tolist()), "rows of 3,072 bytes .* got list"),
    "a number for the names": (lambda folder: dump(folder / "meta", {"fine_label_names": 3}), "meta .* got 3"),
    "a word for the names": (lambda folder: dump(folder / "meta", {"fine_label_names": "abc"}), "meta .* got 'abc'"),
    "numbers as names": (lambda folder: dump(folder / "meta", {"fine_label_names": [1, 2, 3]}), r"meta .* got \[1, 2"),
    "no name": (lambda folder: dump(folder / "meta", {"fine_label_names": []}), r"meta .* got \[\]"),
    "doubled names": (
        lambda folder: dump(folder / "meta", {"fine_label_names": ["a", "b", "b"]}),
        r"meta .* more than once \['b'\]",
    ),
    "the same file twice": (lambda folder: shutil.copy(folder / "train", folder / "test"), "the same images to train"),
    "swapped": (other("train", data=ROWS[:4], fine_labels=[0, 1, 2, 0]), "4 images to train and 6 to test: .* swapped"),
}


@pytest.mark.skipif(os.name != "posix", reason="os.mkdir goes by another name")
@pytest.mark.parametrize("case", CIFAR_DAMAGE)
def test_damaged_cifar(case, cifar, tmp_path):
    damage, message = CIFAR_DAMAGE[case]
    damage(cifar)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_cifar100(tmp_path, download=False)
    assert not os.path.exists("owned")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])  # before numpy 2, and since
def test_cifar_as_every_numpy_writes_it(protocol, core, cifar, tmp_path):
    labels = [np.int64(label) for label in BATCH["fine_labels"]]
    dump(cifar / "train", {"data": ROWS, "fine_labels": labels}, protocol)
    if protocol < 4:  # later ones write the length of each name
        written = re.sub(rb"cnumpy\._?core\.", f"c{core}.".encode(), (cifar / "train").read_bytes())
        assert written.count(core.encode()) > 1
        (cifar / "train").write_bytes(written)
    train = load_cifar100(tmp_path, download=False).train
    assert (train.pixels.flatten(1).numpy() == ROWS).all() and train.labels.tolist() == BATCH["fine_labels"]
    unpickler = _PlainUnpickler(io.BytesIO())
    for value, function in (
        (np.zeros(1).__reduce_ex__(5), "numeric._frombuffer"),
        (np.zeros(1).__reduce__(), "multiarray._reconstruct"),
        (np.int64(1).__reduce__(), "multiarray.scalar"),
    ):
        module, name = function.split(".")
        assert unpickler.find_class(f"{core}.{module}", name) is value[0]


@pytest.mark.parametrize(
    "module, name",
    [
        ("numpy.f2py.__main__", "ndarray"),
        ("numpy.lib.format", "dtype"),
        ("numpy._core.multiarray", "fromfile"),
        ("numpy", "scalar"),
    ],
)
def test_a_pickle_imports_nothing(module, name, cifar, tmp_path, capsys):
    (cifar / "meta").write_bytes(f"c{module}\n{name}\n.".encode())
    before = set(sys.modules)
    with pytest.raises(ValueError, match=f"it asks for {module}.{name}, which no data set needs"):
        load_cifar100(tmp_path, download=False)
    assert set(sys.modules) == before and capsys.readouterr() == ("", "")


def test_the_real_cifar100_where_it_is():
    root = Path(os.environ.get("SUPERMIX_CIFAR100", "nowhere"))
    if not (root / "cifar-100-python").is_dir():
        pytest.skip("SUPERMIX_CIFAR100 names no folder of the real one")
    data = load_data("cifar100", root)
    assert (len(data.train), len(data.test), len(data.info.classes)) == (50_000, 10_000, 100)
    assert data.train.labels.bincount().unique().tolist() == [500]


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


def test_imagenet(imagenet, tmp_path, monkeypatch):
    data = load_data("imagenet", tmp_path)
    assert data.info.classes == ("animal", "thing") and data.train.labels.tolist() == [0, 0, 1, 1]
    assert str(load_imagenet(imagenet)) == str(data)  # the folder itself will do as well as the one above it
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        shutil.copytree(imagenet / split, tmp_path / "data" / split)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(FileNotFoundError, match="no ImageNet in elsewhere"):  # and not another one's ./data
        load_imagenet("elsewhere")
    theirs = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    for i, path in enumerate(data.test.files):
        torch.testing.assert_close(data.test[i][0], theirs(Image.open(path).convert("RGB")), rtol=0, atol=1e-5)


def test_random_views_of_photographs(imagenet, seeded):
    train = load_imagenet(imagenet).train
    ((a, labels, where),) = train.batches(4, seed=0)
    assert a.shape == (4, 3, 224, 224) and torch.equal(labels, train.labels[where])
    views = train.draw(torch.zeros(200, dtype=torch.int64), seeded())  # of the first photograph, 200×150
    top, left, h, w = views.crop.T
    assert ((top >= 0) & (left >= 0) & (top + h <= 150) & (left + w <= 200)).all() and 60 < views.flip.sum() < 140
    one = Views(views.crop[:1], torch.tensor([True]))
    other = Views(views.crop[:1], torch.tensor([False]))
    zero = torch.tensor([0])
    assert torch.equal(train.fetch(zero, one).flip(-1), train.fetch(zero, other))


IMAGENET_DAMAGE = {
    "no train": (lambda folder: (folder / "train").rename(folder / "train.part"), "train is missing: .* incomplete"),
    "no val": (lambda folder: (folder / "val").rename(folder / "val.part"), "val is missing: .* incomplete"),
    "neither": (lambda folder: folder.rename(folder.parent / "imagenet.part"), "expected the folders train and val"),
    "a class less": (
        lambda folder: (folder / "val" / "thing").rename(folder / "thing"),
        r"train has 2 classes and val 1; only in one: \['thing'\]",
    ),
    "an empty class": (lambda folder: [f.unlink() for f in (folder / "val" / "thing").iterdir()], "thing"),
}


@pytest.mark.parametrize("case", IMAGENET_DAMAGE)
def test_damaged_imagenet(case, imagenet, tmp_path):
    damage, message = IMAGENET_DAMAGE[case]
    damage(imagenet)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_imagenet(tmp_path)


def png_with_a_broken_chunk(path):
    Image.effect_noise((300, 300), 50).save(path, format="PNG")
    content = bytearray(path.read_bytes())
    second = content.find(b"IDAT", content.find(b"IDAT") + 4)  # Pillow answers this one with a SyntaxError
    content[second : second + 4] = b"\0\1\2\3"
    path.write_bytes(content)


def png_header(width, height):
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">II", zlib.crc32(header), 100) + b"IDAT"


def a_link_to_itself(path):
    path.unlink()
    path.symlink_to(path.name)


def a_folder(path):
    path.unlink()
    path.mkdir()


def eps(path):
    Image.new("RGB", (40, 30)).save(path, format="EPS")


BROKEN, NO_IMAGE = "cannot be read as an image: .*Delete it", "cannot be read as an image: "
IMAGE_DAMAGE = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:2000]), BROKEN),
    "cut off early": (lambda path: path.write_bytes(path.read_bytes()[:30]), BROKEN),
    "empty": (lambda path: path.write_bytes(b""), BROKEN),
    "a broken PNG": (png_with_a_broken_chunk, BROKEN),
    "a web page": (lambda path: path.write_bytes(b"<html>404</html>"), NO_IMAGE + ".*begins with b'<html>404</h'"),
    "eps": (eps, NO_IMAGE + "EPS needs another program|^$"),
    "gone": (lambda path: path.unlink(), "There is no file .*"),
    "a folder": (a_folder, "is a folder: expected one image file"),
    "a loop": (a_link_to_itself, "[Tt]oo many levels of symbolic links|Symlink loop"),
    "a bomb": (lambda path: path.write_bytes(png_header(20_000, 20_000)), "more pixels than Pillow opens .*MAX_IMAGE"),
}


@pytest.mark.parametrize("case", IMAGE_DAMAGE)
def test_an_image_that_cannot_be_read_is_named(case, imagenet, seeded):
    if case == "eps" and shutil.which("gs"):
        pytest.skip("Ghostscript decodes it")
    train = load_imagenet(imagenet).train
    path, (damage, message) = Path(train.files[2]), IMAGE_DAMAGE[case]
    damage(path)
    for read in (lambda: train[2], lambda: list(train.batches(1, seed=0))):  # the second one in another thread
        with pytest.raises((ValueError, OSError), match=message) as raised:
            read()
        assert path.name in str(raised.value)
        assert ("Delete" in str(raised.value)) == (message == BROKEN)  # only what is broken should go


# ---- pictures of all kinds


def png_with_late_notes(path, kind, content):
    "Move or put a chunk behind the pixels of a PNG."
    png = path.read_bytes()
    start = png.find(kind)
    if start > 0 and kind == b"eXIf":
        length = struct.unpack(">I", png[start - 4 : start])[0]
        content, png = png[start + 4 : start + 4 + length], png[: start - 4] + png[start + 8 + length :]
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    end = png.rindex(b"IEND") - 4
    path.write_bytes(png[:end] + chunk + png[end:])


AS_STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # from upright to how the sensor lay


def lying(picture, orientation, path, **options):
    "Save a picture as a camera that was held otherwise does."
    notes, turn = Image.Exif(), AS_STORED[orientation]
    notes[274] = orientation
    (picture if turn is None else picture.transpose(turn)).save(path, exif=notes, **options)
    return path


@pytest.fixture
def cat(photos):
    return Image.fromarray(photos["chelsea"]).resize((90, 60))


ENDINGS = [
    "png",
    "tif",
    "jpg",
    "webp",
    pytest.param("avif", marks=pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")),
]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("orientation", AS_STORED)
def test_pictures_stand_upright(orientation, ending, cat, tmp_path):
    path = lying(cat, orientation, tmp_path / f"cat.{ending}")
    found = open_image(path)
    assert found.size == cat.size and image_size(path) == (60, 90) and found.getexif().get(274) is None
    off = np.abs(np.asarray(found).astype(int) - np.asarray(cat)).mean()
    assert off == 0 if ending in ("png", "tif") else off < 12  # another orientation is off by 40 and more
    with Image.open(path) as theirs:
        assert ImageOps.exif_transpose(theirs).convert("RGB").tobytes() == found.tobytes()
    assert to_rgb(found).tobytes() == found.tobytes()  # it is turned once only


def test_a_png_whose_notes_stand_behind_its_pixels(cat, tmp_path):
    path = lying(cat, 6, tmp_path / "exif.png")
    png_with_late_notes(path, b"eXIf", None)
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<rdf:Description tiff:Orientation="6"/>'
    cat.transpose(AS_STORED[6]).save(tmp_path / "xmp.png")
    png_with_late_notes(tmp_path / "xmp.png", b"iTXt", xmp)
    for path in (path, tmp_path / "xmp.png"):
        assert path.read_bytes().find(b"IDAT") < max(path.read_bytes().find(kind) for kind in (b"eXIf", b"iTXt"))
        assert image_size(path) == (60, 90) and open_image(path).tobytes() == cat.tobytes()


@pytest.mark.parametrize(
    "notes",
    [b"Exif\0\0nonsense", b"", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1" * 60],
    ids=["nonsense", "nothing", "cut off"],
)
def test_broken_notes_around_a_whole_picture(notes, cat, tmp_path):
    cat.save(tmp_path / "cat.jpg", exif=notes)
    assert open_image(tmp_path / "cat.jpg").size == (90, 60) and image_size(tmp_path / "cat.jpg") == (60, 90)


def test_every_view_is_of_the_upright_picture(cat, photos, tmp_path, seeded):
    pictures = [Image.fromarray(photo).resize((90, 60)) for photo in photos.values()]
    for i, picture in enumerate(pictures):
        for part, orientation in (("up", 1), ("lying", 5 + i)):
            (tmp_path / part / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
            lying(picture, orientation, tmp_path / part / f"class {i % 2}" / f"{i}.png")
    info = Info("photos", ("a", "b"), 32, (0.5,) * 3, (0.25,) * 3, crop_pct=0.875)
    up, down = (
        FolderImages(info, sorted((tmp_path / part).rglob("*.png")), torch.arange(4) % 2) for part in ("up", "lying")
    )
    assert torch.equal(up[:][0], down[:][0])
    views = up.draw(torch.arange(4), seeded())
    assert torch.equal(views.crop, down.draw(torch.arange(4), seeded()).crop)
    assert torch.equal(up.fetch(torch.arange(4), views), down.fetch(torch.arange(4), views))
    outside = Views(torch.tensor([[10, 0, 60, 40]]), torch.tensor([False]))
    with pytest.raises(ValueError, match="0.png has 60×90 pixels, .* drawn for another image"):
        up.fetch(torch.tensor([0]), outside)


def tiff(path, values, bits, white):
    "A grey TIFF, little-endian and uncompressed, in which 0 is black (`white` 1) or white (0)."
    pixels = values.astype("<u2")
    if bits == 12:
        a, b = pixels[:, ::2], pixels[:, 1::2]
        packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).tobytes()
    else:
        packed = pixels.tobytes()
    height, width = values.shape
    tags = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, white),
        (273, 8),
        (277, 1),
        (278, height),
        (279, len(packed)),
    ]
    path.write_bytes(
        b"II*\0"
        + struct.pack("<I", 8 + len(packed))
        + packed
        + struct.pack("<H", len(tags))
        + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        + bytes(4)
    )


def pgm(path, values, top):
    path.write_bytes(f"P5 {values.shape[1]} {values.shape[0]} {top}\n".encode() + values.astype(">u2").tobytes())


DEPTHS = {
    "16 bits.png": lambda path, grey: Image.fromarray((grey * 257).astype(np.uint16)).save(path),
    "16 bits.tif": lambda path, grey: Image.fromarray((grey * 257).astype(np.uint16)).save(path),
    "big-endian.tif": lambda path, grey: Image.fromarray((grey * 257).astype(">u2")).save(path),
    "12 bits.tif": lambda path, grey: tiff(path, grey * 4095 // 255, 12, 1),
    "0 is white.tif": lambda path, grey: tiff(path, 65535 - grey * 257, 16, 0),
    "16 bits.pgm": lambda path, grey: pgm(path, grey * 257, 65535),
    "10 bits.pgm": lambda path, grey: pgm(path, grey * 1023 // 255, 1023),
    "floats.tif": lambda path, grey: Image.fromarray((grey / 255).astype(np.float32)).save(path),
    "16 bits.jp2": lambda path, grey: Image.fromarray((grey * 257).astype(np.uint16)).save(path),
    "8 bits.png": lambda path, grey: Image.fromarray(grey.astype(np.uint8)).save(path),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_grey_pictures_of_every_depth(name, cat, tmp_path):
    grey = np.asarray(cat.convert("L")).astype(int)
    DEPTHS[name](tmp_path / name, grey)
    found = np.asarray(open_image(tmp_path / name)).astype(int)
    assert found.shape == (60, 90, 3) and np.abs(found - grey[..., None]).max() <= (name[:3] in ("12 ", "10 "))
    with Image.open(tmp_path / name) as picture:
        assert (np.asarray(to_rgb(picture)) == found).all()


@pytest.mark.parametrize(
    "values, message",
    [
        (np.array([[0, 70_000]], dtype=np.int32), "I pixels of more than 16 bits do not say what is white"),
        (np.array([[0, 255]], dtype=np.float32), "floats in 0 … 1, got 0 to 255"),
        (np.array([[-0.5, 1]], dtype=np.float32), "floats in 0 … 1, got -0.5 to 1"),
        (np.array([[float("nan"), 1]], dtype=np.float32), "floats in 0 … 1, got nan"),
    ],
)
def test_pictures_whose_white_is_unknown(values, message, tmp_path):
    Image.fromarray(values).save(tmp_path / "odd.tif")
    with pytest.raises(ValueError, match=f"odd.tif: .*{message}.* to 8 bits"):
        open_image(tmp_path / "odd.tif")
    with pytest.raises(ValueError, match=message):
        to_rgb(Image.fromarray(values))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_pictures_of_every_mode(mode, cat, tmp_path):
    cat.convert(mode).save(tmp_path / "a.tif" if mode != "P" else tmp_path / "a.gif")
    (path,) = tmp_path.glob("a.*")
    off = np.asarray(open_image(path)).astype(int) - np.asarray(cat.convert(mode).convert("RGB"))
    assert np.abs(off).mean() < 1


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_of_an_animation_the_first_frame(ending, cat, tmp_path):
    frames = [cat.transpose(Image.Transpose.ROTATE_180)] * 2
    cat.save(tmp_path / f"a.{ending}", save_all=True, append_images=frames)
    off = np.abs(np.asarray(open_image(tmp_path / f"a.{ending}")).astype(int) - np.asarray(cat))
    assert off.mean() < 15 and Image.open(tmp_path / f"a.{ending}").n_frames > 1


def test_an_image_with_transparency_is_read_as_rgb(tmp_path):
    Image.new("RGBA", (4, 3), (10, 20, 30, 128)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (10, 20, 30)


# ---- Fashion-MNIST: idx files


def idx(values):
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def put(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def of(folder, name):
    return next(folder.glob(f"{name}*"))


PIXELS, LABELS = np.arange(5 * 28 * 28).reshape(5, 28, 28) % 251, np.array([9, 0, 3, 3, 1])


@pytest.fixture(params=["gz", "plain"])
def fashion(request, tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for split, pixels in (("train", PIXELS[::-1]), ("t10k", PIXELS)):
        for kind, values in (("images-idx3-ubyte", pixels), ("labels-idx1-ubyte", LABELS)):
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


def test_what_was_deleted_is_downloaded_again(fashion, tmp_path, monkeypatch):
    "As the errors about files that are missing or spoilt advise, whether the folders are left or not."
    shutil.copytree(fashion.parent, tmp_path / "source")

    def download(place, download):
        shutil.copytree(tmp_path / "source", Path(place) / "FashionMNIST")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", download)
    monkeypatch.setattr(supermix.data, "_data_folders", lambda root=None: [tmp_path])  # and not the machine's
    for path in list(fashion.iterdir()):
        path.unlink()
        with nullcontext() if not any(fashion.iterdir()) else pytest.raises(FileNotFoundError, match="half downloaded"):
            assert len(load_fashion_mnist(tmp_path).test) == 5
    assert len(list(fashion.iterdir())) == 4
    shutil.rmtree(fashion)
    (fashion.parent / "notes.txt").write_text("mine")
    with pytest.raises(FileNotFoundError, match="has files, but none of Fashion-MNIST's. Delete this folder"):
        load_fashion_mnist(tmp_path)
    assert (fashion.parent / "notes.txt").read_text() == "mine"


FASHION_DAMAGE = {
    "one missing": (lambda folder: of(folder, "t10k-labels").unlink(), "half downloaded: t10k-labels-.* missing"),
    "cut off": (lambda folder: cut(of(folder, "train-images")), "train-images.* download it again"),
    "empty": (lambda folder: of(folder, "t10k-images").write_bytes(b""), "t10k-images.* download it again"),
    "a web page": (
        lambda folder: of(folder, "t10k-images").write_bytes(b"<html>404</html>"),
        "t10k-images.*(download it again|3c68746d)",
    ),
    "labels for images": (lambda folder: put(of(folder, "train-images"), idx(LABELS)), "train-images"),
    "fewer labels": (lambda folder: put(of(folder, "train-labels"), idx(LABELS[:4])), r"5 images, got labels \(4,\)"),
    "no labels": (lambda folder: put(of(folder, "train-labels"), idx(LABELS[:0])), "train-labels.* holds nothing"),
    "the same images": (lambda folder: put(of(folder, "train-images"), idx(PIXELS)), "the same images to train and to"),
    "fewer to train": (
        lambda folder: [
            put(of(folder, "train-images"), idx(PIXELS[:3])),
            put(of(folder, "train-labels"), idx(LABELS[:3])),
        ],
        "swapped",
    ),
}


@pytest.mark.parametrize("case", FASHION_DAMAGE)
def test_damaged_fashion_mnist(case, fashion, tmp_path):
    damage, message = FASHION_DAMAGE[case]
    damage(fashion)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_data("auto", tmp_path, download=False)


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(idx(PIXELS))[:10] + b"\xff" * 50,  # zlib: an invalid block type
        gzip.compress(idx(PIXELS))[:-8] + bytes(8),  # a wrong checksum
        gzip.compress(struct.pack(">HBB1I", 0, 13, 1, 2) + bytes(8)),  # floats
        gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1)),  # a product beyond 64 bits
        gzip.compress(idx(LABELS) + b"more"),
    ],
    ids=["block", "checksum", "floats", "endless", "too long"],
)
def test_a_broken_idx_file_is_named(content, tmp_path):
    (tmp_path / "broken.gz").write_bytes(content)
    with pytest.raises(ValueError, match="broken.gz"):
        _read_idx(tmp_path / "broken.gz")


# ---- what every data set does


@pytest.mark.parametrize("name, message", [("cifar10", "set 'cifar10'. Did you mean 'cifar100'"), ("", "set ''")])
def test_an_unknown_name(name, message):
    with pytest.raises(ValueError, match=f"Unknown data {message}"):
        load_data(name)


@pytest.mark.parametrize("name", ["auto", "fashion_mnist", "cifar100", "imagenet"])
def test_a_missing_folder(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        load_data(name, tmp_path / "no-such-folder")
    if name in ("cifar100", "imagenet"):  # a folder that is there, but not with these data
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            load_data(name, tmp_path, download=False)


@pytest.fixture(params=["array", "folder"])
def images(request):
    "Nine images in memory, or four in files."
    if request.param == "folder":
        return load_imagenet(request.getfixturevalue("imagenet")).train.subset(4)
    info = Info("noise", ("a", "b", "c"), 8, (0.5,) * 3, (0.25,) * 3)
    pixels = torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8)
    return ArrayImages(info, pixels, torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2]))


def test_the_same_seed_gives_the_same_batches(images):
    def one_pass(seed):
        return [torch.cat(parts) for parts in zip(*images.batches(2, seed))]

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
    together = [
        batches[0] if len(batches[0][2]) == 1 else [torch.cat(t) for t in zip(*batches)] for batches in zip(*ranks)
    ]
    assert all(torch.equal(torch.cat(a), b) for a, b in zip(zip(*together), whole)) and len(alike) == world
    full = [torch.cat(parts) for parts in zip(*images.batches(4, 3, epoch=2))]
    assert all(torch.equal(a, b[4 * start :]) for a, b in zip(whole, full))
    assert not torch.equal(full[2], torch.cat([i for _, _, i in images.batches(4, 3, epoch=1)]))


def test_plain_batches_are_the_images_in_order(images):
    batches = [x for x, _, _ in images.batches(2)]
    assert [len(x) for x in batches] == [2, 2] if len(images) == 4 else [2, 2, 2, 2, 1]
    assert torch.equal(torch.cat(batches), images[:][0]) and torch.equal(torch.cat(batches)[-1], images[-1][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_reads_them(images, workers):
    loaded = list(DataLoader(images, batch_size=3, num_workers=workers))
    for ours, theirs in zip(images[:], zip(*loaded)):
        assert torch.equal(ours, torch.cat(theirs))


def test_a_mask_chooses_images(images):
    chosen, labels = images[images.labels == 1]
    assert set(labels.tolist()) == {1} and len(chosen) == (images.labels == 1).sum()


def test_an_index_beyond_the_end(images):
    for i in (len(images), -len(images) - 1, [0, len(images)], torch.tensor([[0], [len(images)]])):
        with pytest.raises(IndexError, match=rf"Expected indices of {len(images)} images, got -?\d+"):
            images[i]
    assert [label for _, label in images] == images.labels.tolist()  # which Python ends by that error


def test_no_image_is_a_batch_of_none(images):
    for nothing in ([], slice(2, 2), images.labels == 7):
        x, labels = images[nothing]
        assert x.shape == (0, 3, images.info.size, images.info.size) and labels.shape == (0,)
    none = torch.zeros(0, dtype=torch.int64)
    assert images.fetch(none, images.draw(none, torch.Generator())).shape == x.shape


def test_only_bytes_are_normalised(images):
    floats = torch.full((1, 3, 4, 4), 255.0)
    with pytest.raises(ValueError, match=r"as bytes \(torch.uint8\), got torch.float32"):
        images.info.normalize(floats)


@pytest.mark.parametrize(
    "labels, message",
    [
        ([1, 10], "labels from 0 to 9, one per class, got 1 to 10"),
        ([-1, 3], "got -1 to 3"),
        ([0.7, 1.0], "whole numbers, got torch.float32"),
        ([True, False], "whole numbers, got torch.bool"),
    ],
)
def test_labels_of_images_in_memory_are_classes(labels, message, digits):
    with pytest.raises(ValueError, match=message):
        ArrayImages(digits.info, torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor(labels))


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
    labels = torch.randint(0, 7, (200,), generator=seeded()) ** 2 % 11  # some classes are empty
    order = torch.randperm(200, generator=torch.Generator().manual_seed(5)).tolist()  # as seed=5 below
    dealt, seen = [], {}
    for i in order:
        seen.setdefault(int(labels[i]), []).append(i)
    for number in range(max(map(len, seen.values()))):
        dealt += [i for i in order if number < len(seen[int(labels[i])]) and seen[int(labels[i])][number] == i]
    assert evenly(labels, 200, seed=5).tolist() == dealt


def test_evenly_chooses_from_as_many_images_as_imagenet_has(seeded):
    labels = torch.randint(0, 1000, (1_281_167,), generator=seeded())
    chosen = labels[evenly(labels, 50_000)[:50_000]].bincount()
    assert chosen.min() == chosen.max() == 50


@pytest.mark.parametrize(
    "pixels, labels, message",
    [
        (
            torch.zeros(2, 3, 8, 8),
            torch.zeros(2),
            r"uint8 pixels \(n, 1 or 3, H, W\), got torch.float32 \(2, 3, 8, 8\)",
        ),
        (torch.zeros(2, 8, 8).byte(), torch.zeros(2), r"got torch.uint8 \(2, 8, 8\)"),
        (torch.zeros(2, 2, 8, 8).byte(), torch.zeros(2), r"got torch.uint8 \(2, 2, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8).byte(), torch.zeros(3), r"a label for each of 2 images, got labels \(3,\)"),
    ],
)
def test_arrays_that_are_no_images(pixels, labels, message, digits):
    with pytest.raises(ValueError, match=message):
        ArrayImages(digits.info, pixels, labels)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(mean=(123.7, 116.3, 103.5)),
            r"Expected mean of three channels, each of pixels in 0 … 1 .*divide it by 255.*got \(123.7",
        ),
        (dict(std=(0.2, 0.0, 0.2)), "Expected std of three channels"),
        (dict(mean=0.5), "Expected mean of three channels.* got 0.5"),
        (dict(std=(0.5,)), "Expected std of three channels"),
    ],
)
def test_a_folder_under_an_odd_normalisation(options, message, photos, tmp_path):
    for name, photo in photos.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(photo[i : 200 + i, :200]).save(tmp_path / "photos" / name / f"{i}.png")
    data = load_folder(tmp_path / "photos", size=32, mean=[0.5, 0.5, 0.5], std=(0.5, 0.5, 0.5))
    assert len(data.train) + len(data.test) == 12 and data.train[:2][0].shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match=message):
        load_folder(tmp_path / "photos", **options)


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
from supermix.data import _download_to

def slow(place, download):
    Path(place, "set").mkdir()
    for name in "abc":
        Path(place, "set", name).write_text(name)
        time.sleep(0.2)
    with open(sys.argv[1] + "/log", "a") as log: log.write("made\\n")

_download_to(Path(sys.argv[1]) / "data", "set", slow)
assert sorted(p.name for p in Path(sys.argv[1], "data", "set").iterdir()) == ["a", "b", "c"]
"""


@pytest.mark.slow
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
    for name in names:
        shutil.copy(name, tmp_path / "data")
    assert str(tmp_path) not in str(_find_fashion()) and _find_fashion(tmp_path)[0].parent == tmp_path


def test_indices_are_whole_numbers_or_a_mask_of_all(digits):
    few = digits.train.subset(6)
    with pytest.raises(IndexError, match="whole numbers or a mask of 6, got torch.float"):
        few[1.7]
    with pytest.raises(IndexError, match="mask of 6, got torch.bool"):
        few[[True, False]]
    assert len(few[[]][0]) == 0 and len(few[few.labels >= 0][0]) == 6


def test_grey_images_stay_one_channel(digits):
    part, rest = digits.train.split(100)
    assert all(images.kept.shape[1] == 1 for images in (part, rest, digits.train.subset(50)))


def test_a_share_for_testing_is_a_share(tmp_path):
    for share in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1, a share"):
            load_folder(tmp_path, held_out=share)


# ---- pictures of one's own


@pytest.fixture
def put_pictures(cat, tmp_path):
    "Write one small picture under many names below `tmp_path / 'photos'`, two in each folder unless they are named."

    def write(*places, files=("0.jpg", "1.jpg")):
        for place in places:
            for file in files:
                path = tmp_path / "photos" / place / file
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.suffix in (".txt", ".xml", ".db", ".heic", ""):
                    path.write_bytes(b"no image")
                else:
                    cat.convert("RGB").save(path, format="JPEG" if path.suffix == ".JPG" else None)
        return tmp_path / "photos"

    return write


@pytest.mark.parametrize(
    "train, held",
    [
        ("Train", "Test"),
        ("training", "validation"),
        ("TRAIN", "valid"),
        ("train", "val"),
        ("Training", "Testing"),
        ("train", "Valid"),
    ],
)
def test_splits_by_all_their_names(train, held, put_pictures):
    root = put_pictures(*(f"{split}/{name}" for split in (train, held) for name in ("cat", "dog")))
    (root / held / "cat" / "1.jpg").unlink()
    data = load_folder(root)
    assert data.info.classes == ("cat", "dog") and (len(data.train), len(data.test)) == (4, 3)
    assert data.test.labels.tolist() == [0, 1, 1] and f"{os.sep}{held}{os.sep}" in data.test.files[0]


def test_validation_comes_before_testing(put_pictures):
    root = put_pictures(*(f"{split}/{name}" for split in ("train", "valid", "test") for name in ("cat", "dog")))
    assert "valid" in load_folder(root).test.files[0]


def test_folders_are_read_as_torchvision_reads_them(put_pictures):
    put_pictures("b cat", "A dog/deep/er", "A dog/a", "c", files=("b.jpg", "a.PNG", "Z.bmp", "10.tif", "9.webp"))
    root = put_pictures("A dog", files=("x.ppm",))
    theirs, ours = ImageFolder(str(root)), load_folder(root, held_out=0.4)
    files = {f: int(label) for part in (ours.train, ours.test) for f, label in zip(part.files, part.labels)}
    assert files == dict(theirs.samples) and list(ours.info.classes) == theirs.classes
    listed, labels, _ = supermix.data._read_classes(root, theirs.classes)
    assert list(zip(listed, labels.tolist())) == theirs.samples  # and in the same order


WRONG_PLACES = {
    "one folder too high": (
        ["photos/cat", "photos/dog"],
        r"should have .*at least two; found 1 folder \(photos\).*Are the classes in .*s/photos",
    ),
    "a single class": (["cat"], r"found 1 folder \(cat\)"),
    "splits under other names": (
        ["learn/cat", "learn/dog", "exam/cat", "exam/dog"],
        r"2 folders \(exam, learn\), and .*exam holds no images but folders \(cat, dog\)",
    ),
    "one nested class each": (["a/x", "b/y"], r"a holds no images but folders \(x\): is it a class"),
    "a class below": (["cat", "dog", "more/bird", "more/fish"], r"more holds no images but folders \(bird, fish\)"),
    "no split for testing": (
        ["Train/cat", "Train/dog"],
        r"val is missing: .* incomplete. Expected .*valid.*found 1 folder \(Train\)",
    ),
    "no split to train": (["Testing/cat", "Testing/dog"], r"train is missing: .*found 1 folder \(Testing\)"),
    "a split twice": (["Train/cat", "training/cat", "val/cat"], "Train and training, which name the same split"),
    "other classes": (
        ["train/cat", "train/dog", "Val/cat", "Val/bird"],
        r"train has 2 classes and Val 2; only in one: \['bird', 'dog'\]",
    ),
    "pictures without folders": (["."], r"should have one folder per class, .*found files \(2 .jpg\)"),
    "a flat split": (["train/cat", "train/dog", "test"], "train has 2 classes and test 0"),
    "a class called test": (["cat", "dog", "test"], r"train is missing: .*name them all: classes=\[…\]"),
}


@pytest.mark.parametrize("case", WRONG_PLACES)
def test_folders_that_are_no_classes(case, put_pictures):
    places, message = WRONG_PLACES[case]
    root = put_pictures(*places)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        load_folder(root)
    assert str(root) in str(raised.value)


def test_an_empty_class_is_named(put_pictures):
    root = put_pictures("train/cat", "train/dog", "val/cat")
    (root / "val" / "dog").mkdir()
    with pytest.raises(FileNotFoundError, match=r"class .*val/dog is empty: .*found nothing.*delete the folder"):
        load_folder(root)
    put_pictures("val/dog", files=("a.heic", "b.txt", "c.txt"))
    with pytest.raises(FileNotFoundError, match=r"val/dog is empty: .*found files \(2 .txt, 1 .heic\)"):
        load_folder(root)
    put_pictures("val/dog")
    with pytest.warns(UserWarning, match="3 files .*2 .txt, 1 .heic.*pillow-heif"):
        load_folder(root)


def test_one_image_of_a_class(put_pictures):
    put_pictures("cat")
    root = put_pictures("dog", files=("0.jpg",))
    with pytest.raises(ValueError, match="class .*photos/dog has one image: .*two at least.*train and val"):
        load_folder(root)
    put_pictures("dog")
    with pytest.raises(ValueError, match="held_out=0.1 of 4 images leaves 0 for testing"):
        load_folder(root, held_out=0.1)
    assert len(load_folder(root, held_out=0.25).test) == 1


def test_what_is_hidden_does_not_count(put_pictures):
    root = put_pictures("cat", "dog")
    before = load_folder(root, held_out=0.5)
    put_pictures(".ipynb_checkpoints", "__MACOSX/cat", "cat/.ipynb_checkpoints", "dog/__MACOSX", "@eaDir", ".git")
    put_pictures("cat", "dog", files=("._0.jpg", ".hidden.png", ".jpg"))
    (root / ".DS_Store").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_folder(root, held_out=0.5)
    assert data.info == before.info and data.train.files == before.train.files and data.test.files == before.test.files
    hidden = root.rename(root.parent / ".photos")  # below a hidden folder, only names further down count
    assert len(load_folder(hidden).train) == 3


def test_what_pillow_opens_is_opened_and_the_rest_is_counted(put_pictures):
    files = ["a.gif", "b.jfif", "c.JPG", "d.jp2", "e.tga", "f.qoi"] + ["g.avif"] * features.check("avif")
    root = put_pictures("cat", "dog", files=files)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_folder(root, size=32)
    assert len(data.train) + len(data.test) == 2 * len(files)
    reference = data.info.normalize(
        torch.from_numpy(np.asarray(centred(open_image(root / "cat" / "f.qoi"), data.info)).copy()).permute(2, 0, 1)
    )
    for part in (data.train, data.test):
        assert ((part[:][0] - reference).abs().mean((1, 2, 3)) < 0.2).all()
    put_pictures("cat", files=("list.txt", "box.xml", "more.txt", "README"))
    put_pictures(".", files=("cover.jpg", "about.txt"))
    with pytest.warns(UserWarning) as told:
        load_folder(root)
    message = str(told[0].message)
    assert "4 files that Pillow cannot decode (2 .txt, 1 .xml, 1 without ending)" in message
    assert "1 image in no class's folder (cover.jpg)" in message and str(root) in message
    assert Path(told[0].filename).name == "test_data.py"  # it points at the caller


def test_the_order_of_classes_can_be_the_teachers(put_pictures):
    root = put_pictures(*map(str, range(12)))
    assert load_folder(root).info.classes[:3] == ("0", "1", "10")
    data = load_folder(root, classes=[str(i) for i in range(12)])
    assert data.info.classes == tuple(map(str, range(12)))
    for file, label in zip(data.train.files, data.train.labels.tolist()):
        assert Path(file).parent.name == str(label)
    for classes, message in (
        ([str(i) for i in range(1, 13)], "classes names 12 without a folder, and the folders 0 are not in classes"),
        ([str(i) for i in range(11)], "the folders 11 are not in classes"),
        (["0"] * 12, "list of different names"),
        ("0", "list of different names"),
        (12, "list of different names"),
    ):
        with pytest.raises(ValueError, match=message):
            load_folder(root, classes=classes)


def test_classes_that_are_named_may_be_called_and_nested_as_one_likes(put_pictures):
    root = put_pictures("bus/red", "bus/blue", "train", "Test")
    data = load_folder(root, classes=["train", "bus", "Test"])
    assert data.info.classes == ("train", "bus", "Test") and len(data.train) + len(data.test) == 8
    root = put_pictures("sets/train/a/x", "sets/val/a/x", "sets/train/b", "sets/val/b") / "sets"
    assert load_folder(root, classes=["b", "a"]).test.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("size", [96, (96, 96), [3, 96, 96], np.int64(96)])
def test_a_size_in_every_spelling(size, put_pictures):
    data = load_folder(put_pictures("cat", "dog"), size=size)
    assert data.info.size == 96 and type(data.info.size) is int and data.train[0][0].shape == (3, 96, 96)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(size=(3, 224, 192)), r"square \(H, W\) or \(3, H, W\), got \(3, 224, 192\)"),
        (dict(size=(1, 28, 28)), r"got \(1, 28, 28\)"),
        (dict(size="224"), "got '224'"),
        (dict(size=0), "got 0"),
        (dict(size=224.0), "got 224.0"),
        (dict(size=True), "got True"),
        (dict(input_size=(3, 224)), r"got \(3, 224\)"),
        (dict(crop_pct=0), "crop_pct .* got 0"),
        (dict(crop_pct=87.5), "crop_pct .* got 87.5"),
        (dict(crop_pct="0.9"), "crop_pct .* got '0.9'"),
        (dict(mean=("a",) * 3), "Expected mean of three"),
        (dict(interpolation="bicubik"), "Unknown interpolation 'bicubik'. Did you mean 'bicubic'"),
        (dict(interpolation=3), "Unknown interpolation 3"),
        (dict(crop_mode="border"), "Unknown crop_mode 'border'"),
    ],
)
def test_settings_of_a_view_that_cannot_be(options, message, put_pictures):
    with pytest.raises(ValueError, match=message):
        load_folder(put_pictures("cat", "dog"), **options)


@pytest.mark.parametrize(
    "network",
    [
        "resnet18.a1_in1k",  # bicubic, 95 %
        "resnet18.tv_in1k",  # our defaults
        "tf_efficientnet_lite0.in1k",  # bicubic, mean and std ½
        "vit_base_patch16_clip_224.openai_ft_in1k",
        "mobilenetv3_large_100.ra_in1k",
        "volo_d4_448.sail_in1k",  # 115 %
        "eva_giant_patch14_336.m30m_ft_in22k_in1k",  # squash
    ],
)
def test_timms_settings_are_used(network, photos, tmp_path):
    for split in ("train", "val"):
        for name, photo in photos.items():
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            Image.fromarray(photo[:300, :420]).save(tmp_path / "photos" / split / name / "0.png")
    settings = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(network).to_dict())
    data = load_folder(tmp_path / "photos", **settings)
    theirs = timm.data.create_transform(**settings)  # as timm evaluates
    for i, path in enumerate(data.test.files):
        with Image.open(path) as picture:
            expected = theirs(picture)
        torch.testing.assert_close(data.test[i][0], expected, rtol=0, atol=1e-5)
    pixels = torch.stack([torch.from_numpy(photo[:300, :420]).permute(2, 0, 1) for photo in photos.values()])
    tensors = data.info.normalize(centred(pixels, data.info))  # torch rounds once, Pillow twice
    first = [list(photos).index(name) for name in data.info.classes]
    torch.testing.assert_close(tensors[first], data.test[:][0], rtol=0, atol=0.2)


def test_interpolation_reaches_random_views_and_the_fingerprint(put_pictures, seeded):
    root = put_pictures("cat", "dog")
    plain, cubic = (load_folder(root, size=64, interpolation=how).train for how in ("bilinear", "bicubic"))
    views = plain.draw(torch.tensor([0]), seeded())
    assert not torch.equal(plain.fetch(torch.tensor([0]), views), cubic.fetch(torch.tensor([0]), views))
    assert fingerprint(plain) != fingerprint(cubic)


def test_fingerprints_are_what_they_were_before_there_was_an_interpolation(digits, put_pictures):
    folder = load_folder(put_pictures("cat", "dog")).train
    for images in (digits.train, folder):
        i = images.info
        known = hashlib.sha256(json.dumps([i.name, i.size, i.mean, i.std, i.pad, i.flip, len(images)]).encode())
        known.update(images.labels.numpy().tobytes())
        known.update(
            images.kept.contiguous().numpy().tobytes()
            if images is not folder
            else "\n".join(f"{Path(f).parent.name}/{Path(f).name} {os.path.getsize(f)}" for f in images.files).encode()
        )
        assert fingerprint(images) == known.hexdigest()[:16]


def test_a_card_without_interpolation_still_opens(teacher):
    folder = Path(supermix.data.__file__).parent / "teachers"
    assert b"interpolation" not in (folder / "digits.safetensors").read_bytes()[:20_000]  # it is older than the field
    assert (teacher.info.interpolation, teacher.info.crop_mode) == ("bilinear", "center")


def test_imagenet_in_other_letters(imagenet):
    for split in ("train", "val"):
        (imagenet / split).rename(imagenet / split.upper())
    assert load_imagenet(imagenet).info.classes == ("animal", "thing")


def test_results_name_their_data_without_the_folder(tmp_path):
    data = load_data("digits")
    assert data.counts in str(data) and data.source in str(data)
    assert data.source not in data.counts and data.counts.startswith("digits: ")
