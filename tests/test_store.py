"""Stores of mixed images: exact, small, guarded; and what is made of them."""

import csv
import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from supermix.core import weights_hash
from supermix.data import ArrayImages, FolderImages, Info, fingerprint
from supermix.distillation import distill
from supermix.engine import Engine, Found, draw_block
from supermix.generate import generate
from supermix.masks import sparsity
from supermix.mixing import is_solved
from supermix.quality import plot_quality, quality, show_extremes, total_variation
from supermix.recipes import FAST, Generation, Mixing, Training
from supermix.store import MixedDataset, Store, export_images, pack, unpack_logits
from supermix.training import accuracy
from supermix.zoo import create
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as VF

RECIPE = Generation(data="digits", count=300, shard=256, mixing=Mixing(**FAST))


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return generate(RECIPE, tmp_path_factory.mktemp("store") / "mixes").folder


@pytest.fixture(scope="module")
def mixed(folder, digits): return MixedDataset(folder, digits.train)


def test_a_store_is_what_the_solver_saw(mixed, teacher, digits):
    assert len(mixed) == 300 and "300 mixed images of digits" in repr(mixed)
    batch = mixed.batch(range(300))
    engine = Engine(teacher, digits.train[:2][0], RECIPE.mixing)
    with torch.no_grad(): logits = engine.ask(batch.images)
    torch.testing.assert_close(logits, batch.logits, rtol=2e-3, atol=2e-2)
    assert is_solved(batch.logits, batch.classes).all()
    assert sparsity(batch.masks).mean() < 0.075
    drawn = draw_block(digits.train, engine.see, RECIPE.mixing, 0, 0)
    first = mixed.small["index"][:50].long()
    assert torch.equal(batch.sets[:50], drawn.images[first]) and torch.equal(batch.lam[:50], drawn.lam[first])
    torch.testing.assert_close(batch.target.sum(1), torch.ones(300))


def test_every_image_is_one_that_the_teacher_was_shown(teacher, digits, tmp_path):
    "To the bit: all images that the teacher sees are written down, with its logits."
    shown = {}
    def watched(images):
        logits = teacher.eval()(images)
        shown.update(zip((image.numpy().tobytes() for image in images.detach().contiguous()), logits.detach()))
        return logits
    mixed = MixedDataset(
        generate(replace(RECIPE, count=150, shard=128), tmp_path / "store", digits.train, watched).folder, digits.train)
    batch = mixed.batch(range(150))
    for image, logits in zip(batch.images, batch.logits):
        assert image.numpy().tobytes() in shown
        told = shown[image.numpy().tobytes()].double()
        total = told.logsumexp(0)
        assert torch.equal((total.float() + (told - total).half().double()).float(), logits)


@pytest.mark.parametrize("size", [1, 7, 128])
def test_an_image_does_not_depend_on_its_batch(mixed, size):
    rows = torch.randperm(300, generator=torch.Generator().manual_seed(size))[:size]
    assert torch.equal(mixed.batch(rows).images, torch.cat([mixed.batch([r]).images for r in rows.tolist()]))


def test_as_a_dataset(mixed):
    image, soft = mixed[3]
    assert image.shape == (3, 32, 32) and torch.equal(image, mixed.batch([3]).images[0])
    assert soft.shape == (10,) and soft.sum().item() == pytest.approx(1)
    images, softs = next(iter(DataLoader(mixed, batch_size=16)))
    assert torch.equal(images, mixed[:16][0]) and torch.equal(softs, mixed[:16][1])
    for rows in ([300], [-1], [0, 999]):
        with pytest.raises(IndexError, match="rows from 0 to 299"): mixed.batch(rows)
    a, b = (mixed.sample(20, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and a[0].shape == a[1].images.shape == (20, 3, 32, 32)


def test_a_student_learns_from_a_store(mixed, teacher, digits):
    torch.manual_seed(0)
    student = create("resnet8", 10)
    history = distill(teacher, student, digits.train.subset(100), "kd", mixed,
                      Training(epochs=1, batch_size=25, milestones=()))
    assert history.images == 100 and history.loss[0] > 0


def test_the_store_is_small(mixed, folder, tmp_path):
    out = export_images(mixed, tmp_path / "pictures")
    files = sorted(out.rglob("*.png"))
    assert len(files) == 300 and {f.parent.name for f in files} <= set("0123456789")
    pictures = sum(f.stat().st_size for f in files) / 300
    store = sum(f.stat().st_size for f in folder.iterdir()) / mixed.starts[-1]
    assert pictures > 5 * store
    with open(out / "labels.csv") as file: rows = list(csv.DictReader(file))
    assert len(rows) == 300 and abs(float(rows[7]["lambda_1"]) + float(rows[7]["lambda_2"]) - 1) < 1e-3
    batch = mixed.batch([7])
    assert (rows[7]["class_1"] == str(batch.classes[0, 0].item())
            and int(rows[7]["source_1"]) == mixed.small["sources"][7, 0])
    pixels = VF.pil_to_tensor(Image.open(out / rows[7]["file"])) / 255
    assert (pixels - mixed.info.denormalize(batch.images[0])).abs().max() <= 0.5 / 255 + 1e-6
    with pytest.raises(ValueError, match="not empty"): export_images(mixed, out)


@pytest.mark.parametrize("spoil, message", [
    (lambda f: (f / "manifest.json").unlink(), "is not a store of mixed images"),
    (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    (lambda f: (f / "00001.safetensors").unlink(), "00001.safetensors is missing"),
    (lambda f: (f / "00000.safetensors").write_bytes((f / "00000.safetensors").read_bytes()[:-5]),
     "00000.safetensors was changed"),
    (lambda f: (f / "00001.safetensors").write_bytes((f / "00000.safetensors").read_bytes()),
     "00001.safetensors was changed"),
    (lambda f: Store(f).write({k: v for k, v in Store(f).manifest().items() if k not in ("shards", "images")}),
     "is not finished"),
    (lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace(
        '"seed": 0', '"seed": 1')), "manifest.json is not a manifest that supermix wrote: its content has not the hash"),
])
def test_a_spoilt_store_is_named(spoil, message, folder, digits, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    spoil(tmp_path / "copy")
    with pytest.raises((ValueError, FileNotFoundError), match=message): MixedDataset(tmp_path / "copy", digits.train)


def test_other_data_is_an_error(folder, digits):
    with pytest.raises(ValueError, match=r"made from digits \(1,297 images, \w+\), not from digits \(500 images"):
        MixedDataset(folder, digits.test)
    changed = digits.train.subset(1297)
    changed.labels = changed.labels.clone()
    changed.labels[0] = (changed.labels[0] + 1) % 10
    assert fingerprint(changed) != fingerprint(digits.train.subset(1297))


def test_logits_from_the_largest():
    logits = 4 * torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    best, total = logits.topk(10), logits.logsumexp(1)
    again = unpack_logits(best.values - total[:, None], best.indices, total, 100)
    torch.testing.assert_close(again.logsumexp(1), logits.logsumexp(1))
    torch.testing.assert_close(again.gather(1, best.indices), best.values)
    rest = again.softmax(1).scatter(1, best.indices, 0)
    torch.testing.assert_close(rest.sum(1), logits.softmax(1).scatter(1, best.indices, 0).sum(1), atol=1e-5, rtol=1e-3)
    whole = logits.topk(100)
    again = unpack_logits(whole.values - total[:, None], whole.indices, total, 100)
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("largest", [255, 256, 1000, 32_767, 32_768, 3_000_000_000])
def test_many_updates_are_counted_rightly(largest):
    "A recipe may allow more updates than a byte can count."
    few = Found(torch.tensor([1, 0]), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, 2, dtype=torch.int64),
                torch.zeros(2, 2, dtype=torch.bool), torch.full((2, 2), 0.5), torch.zeros(2, 2, dtype=torch.int64),
                torch.zeros(2, 1, 4, 4).half(), torch.rand(2, 10), torch.tensor([largest, 3]))
    kept = pack(few, 10)
    assert kept["steps"].tolist() == [3, largest] and kept["index"].tolist() == [0, 1]
    assert (kept["steps"].dtype == torch.uint8) == (largest < 256)


def test_hashes(teacher):
    before = weights_hash(teacher)
    other = create("resnet20", 10)
    other.load_state_dict(teacher.state_dict())
    assert weights_hash(other) == before
    other.head.bias.data[0] += 1e-6
    assert weights_hash(other) != before


def fitted(images):
    "A teacher in closed form: the least squares between colours on a 4×4 grid and classes, over random views."
    which, g = torch.arange(len(images)).repeat(20), torch.Generator().manual_seed(0)
    views = images.info.normalize(images.fetch(which, images.draw(which, g)))
    seen = F.pad(F.adaptive_avg_pool2d(views, 4).flatten(1).double(), (0, 1), value=1.0)
    wanted = 10 * F.one_hot(images.labels[which]).double()
    weights = torch.linalg.solve(seen.T @ seen + 0.1 * torch.eye(seen.shape[1]).double(), seen.T @ wanted).T.float()
    teacher = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, len(images.info.classes)))
    teacher[2].weight.data, teacher[2].bias.data = weights[:, :-1].contiguous(), weights[:, -1].contiguous()
    return teacher.eval()


def test_files_as_sources(photos, tmp_path):
    "Image files as sources: boxes are stored, and give the same images again."
    for name, photo in photos.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(photo[i * 20:, i * 30:]).save(tmp_path / "data" / name / f"{i}.jpg", quality=95)
    files = sorted((tmp_path / "data").rglob("*.jpg"))
    info = Info("photos", tuple(photos), 64, (0.5,) * 3, (0.5,) * 3)
    images = FolderImages(info, files, torch.tensor([list(photos).index(f.parent.name) for f in files]))
    teacher = fitted(images)
    assert accuracy(teacher, images) == 100
    recipe = replace(RECIPE, count=20, shard=128)
    mixed = MixedDataset(generate(recipe, tmp_path / "mixes", images, teacher).folder, images)
    batch = mixed.batch(range(20))
    assert mixed.small["crop"].shape[2] == 4 and batch.images.shape == (20, 3, 64, 64)
    engine = Engine(teacher, images[:2][0], recipe.mixing)
    with torch.no_grad(): torch.testing.assert_close(engine.ask(batch.images), batch.logits, rtol=5e-3, atol=5e-2)


def test_quality(mixed, teacher):
    report = quality(mixed, teacher, limit=200)
    assert (len(report.kl) == 200 and 0.5 < report.solved[-1] <= 1 and report.solved[0] == 0
            and sorted(report.solved) == report.solved)
    batch = mixed.batch(range(200))
    torch.testing.assert_close(
        report.kl, (batch.target * (batch.target.clamp_min(1e-30).log() - batch.logits.log_softmax(1))).sum(1),
        rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(report.areas.sum(1), torch.ones(200))
    # here the second network is the teacher itself
    torch.testing.assert_close(report.second, report.teacher, atol=1e-2, rtol=1e-1)
    for text in ("KL(ŷ ‖ p)", "second sees of the least", "|area − λ|"): assert text in str(report)
    figure = plot_quality({name: report for name in "abcde"})  # more than there are colours
    assert len(figure.axes[0].lines) == 5 and len(figure.axes[1].lines) == 5
    figure.clear()
    show_extremes(mixed, report, 1).clear()


def test_total_variation():
    masks = torch.zeros(1, 1, 4, 4)
    masks[..., 2:] = 1
    assert total_variation(masks).item() == pytest.approx(1 / 3)
    assert total_variation(torch.rand(1, 1, 1, 1).expand(1, 2, 5, 5)).item() == 0


def test_a_folder_of_another_run(folder, tmp_path):
    with pytest.raises(ValueError, match=r"made otherwise \(recipe.seed: 0 there, 1 now\)"):
        generate(replace(RECIPE, seed=1), folder)
    assert Store(folder).manifest()["images"] == 300
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    generate(RECIPE, folder)  # finished: nothing is to do
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("offset", [0.0, -300.0, 1e3, 1e5])
def test_kept_probabilities_do_not_depend_on_the_logits_offset(offset, mixed):
    logits = 5 * torch.randn(40, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = (logits + offset).logsumexp(1)
    best = (logits + offset).topk(8, dim=1)
    again = unpack_logits((best.values - total[:, None]).half(), best.indices, total.float(), 30).double().softmax(1)
    want = logits.softmax(1).gather(1, best.indices)
    torch.testing.assert_close(again.gather(1, best.indices), want, rtol=0.02, atol=1e-4)


def test_images_that_are_moved_otherwise_are_other_images(folder, digits):
    for change in ({"pad": 4}, {"flip": True}):
        other = ArrayImages(replace(digits.info, **change), digits.train.kept, digits.train.labels)
        with pytest.raises(ValueError, match="was made from digits"): MixedDataset(folder, other)


def test_a_store_of_another_format(teacher, digits, tmp_path):
    store = generate(replace(RECIPE, count=20, shard=128), tmp_path / "store", digits.train, teacher)
    manifest = json.loads(store.manifest_path.read_text())
    store.manifest_path.write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(ValueError, match="format 2, and this version"): MixedDataset(store.folder, digits.train)
