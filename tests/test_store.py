"""Stores of mixed images: exact, small, guarded; and what is made of them."""

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as to_safetensors
from supermix.core import file_hash, load_tensors, weights_hash
from supermix.data import ArrayImages, FolderImages, Info, fingerprint
from supermix.distillation.distill import distill
from supermix.mixing.engine import Engine, Found, draw_block, joined
from supermix.mixing.generate import generate
from supermix.mixing.masks import sparsity
from supermix.mixing.quality import plot_quality, quality, show_extremes, total_variation
from supermix.mixing.solver import is_solved
from supermix.mixing.store import (
    MixedDataset,
    Store,
    _as_json,
    _folder_names,
    _hash_of,
    _load_card,
    _pack,
    _run_of,
    _same_logits,
    _unpack_logits,
    begin,
    export_images,
    finish,
    teacher_identity,
)
from supermix.policies.policies import _POLICIES, Augmented
from supermix.recipes import FAST, FAST_0_1, Generation, Mixing, Training
from supermix.training.loop import accuracy
from supermix.zoo import create
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as VF

RECIPE = Generation(data="digits", count=300, shard=256, slots=128, bfloat16=False, mixing=Mixing(**FAST))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return generate(RECIPE, tmp_path_factory.mktemp("store") / "mixes").folder


@pytest.fixture(scope="module")
def mixed(folder, digits):
    return MixedDataset(folder, digits.train)


def test_a_store_is_what_the_solver_saw(mixed, teacher, digits):
    assert len(mixed) == 300 and "300 mixed images of digits" in repr(mixed)
    batch = mixed.batch(range(300))
    engine = Engine(teacher, digits.train[:2][0], RECIPE.mixing)
    logits = engine.source_logits(batch.images)
    torch.testing.assert_close(logits, batch.logits, rtol=2e-3, atol=2e-2)
    assert is_solved(batch.logits, batch.classes).all()
    assert sparsity(batch.masks).mean() < 0.075
    drawn = draw_block(digits.train, engine.source_logits, RECIPE.mixing, 0, 0)
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
        generate(replace(RECIPE, count=150, shard=128), tmp_path / "store", digits.train, watched).folder, digits.train
    )
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
        with pytest.raises(IndexError, match="rows from 0 to 299"):
            mixed.batch(rows)
    for part in (slice(3, 9), slice(None, None, 100), slice(295, 400), slice(5, 5)):
        assert torch.equal(mixed.batch(part).images, mixed.batch(list(range(300))[part]).images)
    a, b = (mixed.sample(20, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and a[0].shape == a[1].images.shape == (20, 3, 32, 32)


def test_mixes_are_drawn_and_then_made(mixed):
    "What is drawn are a few numbers; what is made of them needs no further chance."
    picks = mixed.draw(20, torch.Generator().manual_seed(1))
    images, batch = mixed.show(picks)
    expected, known = mixed.sample(20, torch.Generator().manual_seed(1))
    assert torch.equal(images, expected) and torch.equal(batch.images, known.images)
    assert torch.equal(batch.images, mixed.batch(picks.rows).images) and sum(t.nbytes for t in picks) < 600
    g = torch.Generator().manual_seed(1)  # the order of the draws is that of earlier versions
    rows, crop = torch.randint(300, (20,), generator=g), torch.randint(5, (20, 2), generator=g)
    assert torch.equal(picks.rows, rows) and torch.equal(picks.crop, crop) and not picks.flip.any()
    assert mixed.to("cpu") is mixed and mixed.device.type == "cpu" and mixed.nbytes > mixed.source.kept.nbytes


def test_a_student_learns_from_a_store(mixed, teacher, digits):
    torch.manual_seed(0)
    student = create("resnet8", 10)
    history = distill(teacher, student, digits.train, "kd", mixed, Training(epochs=1, batch_size=128, milestones=()))
    assert history.images == 1297 and history.loss[0] > 0


def test_the_store_is_small(mixed, folder, tmp_path):
    out = export_images(mixed, tmp_path / "pictures")
    files = sorted(out.rglob("*.png"))
    assert len(files) == 300 and {f.parent.name for f in files} <= set("0123456789")
    pictures = sum(f.stat().st_size for f in files) / 300
    store = sum(f.stat().st_size for f in folder.iterdir()) / mixed.starts[-1]
    assert pictures > 5 * store
    with open(out / "labels.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 300 and abs(float(rows[7]["lambda_1"]) + float(rows[7]["lambda_2"]) - 1) < 1e-3
    batch = mixed.batch([7])
    assert (
        rows[7]["class_1"] == str(batch.classes[0, 0].item())
        and int(rows[7]["source_1"]) == mixed.small["sources"][7, 0]
    )
    pixels = VF.pil_to_tensor(Image.open(out / rows[7]["file"])) / 255
    assert (pixels - mixed.info.denormalize(batch.images[0])).abs().max() <= 0.5 / 255 + 1e-6
    with pytest.raises(ValueError, match="not empty"):
        export_images(mixed, out)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "manifest.json").unlink(), "is not a store of mixed images"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda f: (f / "00001.safetensors").unlink(), "00001.safetensors is missing"),
        (
            lambda f: (f / "00000.safetensors").write_bytes((f / "00000.safetensors").read_bytes()[:-5]),
            "00000.safetensors was changed",
        ),
        (
            lambda f: (f / "00001.safetensors").write_bytes((f / "00000.safetensors").read_bytes()),
            "00001.safetensors was changed",
        ),
        (
            lambda f: Store(f).write({k: v for k, v in Store(f).manifest().items() if k not in ("shards", "images")}),
            "is not finished",
        ),
        (
            lambda f: (f / "manifest.json").write_text(
                (f / "manifest.json").read_text().replace('"seed": 0', '"seed": 1')
            ),
            "manifest.json is not a manifest that supermix wrote: its content",
        ),
    ],
)
def test_a_spoilt_store_is_named(spoil, message, folder, digits, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    spoil(tmp_path / "copy")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        MixedDataset(tmp_path / "copy", digits.train)


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
    again = _unpack_logits(best.values - total[:, None], best.indices, total, 100)
    torch.testing.assert_close(again.logsumexp(1), logits.logsumexp(1))
    torch.testing.assert_close(again.gather(1, best.indices), best.values)
    rest = again.softmax(1).scatter(1, best.indices, 0)
    torch.testing.assert_close(rest.sum(1), logits.softmax(1).scatter(1, best.indices, 0).sum(1), atol=1e-5, rtol=1e-3)
    whole = logits.topk(100)
    again = _unpack_logits(whole.values - total[:, None], whole.indices, total, 100)
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("largest", [255, 256, 1000, 32_767, 32_768, 3_000_000_000])
def test_many_updates_are_counted_rightly(largest):
    "A recipe may allow more updates than a byte can count."
    few = Found(
        torch.tensor([1, 0]),
        torch.zeros(2, 2, dtype=torch.int64),
        torch.zeros(2, 2, 2, dtype=torch.int64),
        torch.zeros(2, 2, dtype=torch.bool),
        torch.full((2, 2), 0.5),
        torch.zeros(2, 2, dtype=torch.int64),
        torch.zeros(2, 1, 4, 4).half(),
        torch.rand(2, 10),
        torch.tensor([largest, 3]),
    )
    kept = _pack(few, 10)
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
            Image.fromarray(photo[i * 20 :, i * 30 :]).save(tmp_path / "data" / name / f"{i}.jpg", quality=95)
    files = sorted((tmp_path / "data").rglob("*.jpg"))
    info = Info("photos", tuple(photos), 64, (0.5,) * 3, (0.5,) * 3)
    images = FolderImages(info, files, torch.tensor([list(photos).index(f.parent.name) for f in files]))
    teacher = fitted(images)
    assert accuracy(teacher, images) == 100
    recipe = replace(RECIPE, count=20, shard=128)
    mixed = MixedDataset(generate(recipe, tmp_path / "mixes", images, teacher).folder, images)
    batch = mixed.batch(range(20))
    assert mixed.small["crop"].shape[2] == 4 and batch.images.shape == (20, 3, 64, 64)
    with pytest.raises(ValueError, match="Expected sources in memory, .* got FolderImages"):
        mixed.to("cuda")
    engine = Engine(teacher, images[:2][0], recipe.mixing)
    torch.testing.assert_close(engine.source_logits(batch.images), batch.logits, rtol=5e-3, atol=5e-2)


def test_quality(mixed, teacher):
    report = quality(mixed, teacher, limit=200)
    assert (
        len(report.kl) == 200
        and 0.5 < report.solved[-1] <= 1
        and report.solved[0] == 0
        and sorted(report.solved) == report.solved
    )
    batch = mixed.batch(range(200))
    torch.testing.assert_close(
        report.kl,
        (batch.target * (batch.target.clamp_min(1e-30).log() - batch.logits.log_softmax(1))).sum(1),
        rtol=1e-4,
        atol=1e-4,
    )
    torch.testing.assert_close(report.areas.sum(1), torch.ones(200))
    # here the second network is the teacher itself
    torch.testing.assert_close(report.second, report.teacher, atol=1e-2, rtol=1e-1)
    for text in ("KL(ŷ ‖ p)", "second sees of the least", "|area − λ|"):
        assert text in str(report)
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
    with pytest.raises(ValueError, match=r"with other settings \(recipe.seed: 0 there, 1 now\)"):
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
    again = _unpack_logits((best.values - total[:, None]).half(), best.indices, total.float(), 30).double().softmax(1)
    want = logits.softmax(1).gather(1, best.indices)
    torch.testing.assert_close(again.gather(1, best.indices), want, rtol=0.02, atol=1e-4)


def test_images_that_are_moved_otherwise_are_other_images(folder, digits):
    for change in ({"pad": 4}, {"flip": True}):
        other = ArrayImages(replace(digits.info, **change), digits.train.kept, digits.train.labels)
        with pytest.raises(ValueError, match="was made from digits"):
            MixedDataset(folder, other)


def test_a_store_of_another_format(teacher, digits, tmp_path):
    store = generate(replace(RECIPE, count=20, shard=128), tmp_path / "store", digits.train, teacher)
    manifest = json.loads(store.manifest_path.read_text())
    store.manifest_path.write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(ValueError, match="format 2, and this version"):
        MixedDataset(store.folder, digits.train)


OLD = Path(__file__).parent / "data" / "store_format_3"  # as supermix wrote it before manifests had hashes, cards runs
OLD_RECIPE = Generation(data="digits", count=150, shard=128, slots=128, bfloat16=False, mixing=Mixing(**FAST_0_1))


@pytest.fixture
def old(tmp_path):
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def unfinished(folder):
    "As before the end: without a list of shards, and without a hash where there was none."
    content = json.loads((folder / "manifest.json").read_text())
    for key in ("shards", "images"):
        content.pop(key)
    if "hash" in content:
        Store(folder).write(content)
    else:
        (folder / "manifest.json").write_text(_as_json(content))


def test_a_store_of_an_earlier_version_opens(old, teacher, digits):
    before = {p.name: p.read_bytes() for p in old.iterdir()}
    for check in (True, False):
        mixed = MixedDataset(old, digits, check=check)
        assert len(mixed) == 150 and "hash" not in mixed.manifest and "run" not in _load_card(old / "00000.safetensors")
        batch = mixed.batch(range(150))
        with torch.no_grad():
            torch.testing.assert_close(teacher(batch.images), batch.logits, rtol=0.01, atol=0.1)
    generate(OLD_RECIPE, old)  # finished: nothing is to do, and nothing is changed
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before


def test_a_store_of_an_earlier_version_gets_back_a_shard_that_was_deleted(old, teacher, digits):
    (old / "00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="00001.safetensors is missing"):
        MixedDataset(old, digits)
    begin(Store(old), OLD_RECIPE, digits.train, teacher)  # and is killed
    with pytest.raises(ValueError, match="is not finished"):
        MixedDataset(old, digits)
    generate(OLD_RECIPE, old)
    assert len(MixedDataset(old, digits)) == 150
    assert "run" not in _load_card(old / "00000.safetensors") and "run" in _load_card(old / "00001.safetensors")


def test_whose_the_shards_of_an_earlier_version_are_only_its_list_can_tell(old, digits):
    unfinished(old)
    with pytest.raises(ValueError, match="00000.safetensors is of an unfinished store of an earlier version"):
        generate(OLD_RECIPE, old)
    shutil.copy(OLD / "manifest.json", old)
    (old / "00000.safetensors").write_bytes((old / "00001.safetensors").read_bytes())
    for check in (True, False):
        with pytest.raises(ValueError, match="00000.safetensors was changed"):
            MixedDataset(old, digits, check=check)


@pytest.mark.parametrize("other", ["seed", "k", "data", "teacher"])
@pytest.mark.parametrize("lost", ["the manifest", "a shard"])
def test_another_runs_shards_are_not_taken(other, lost, folder, teacher, digits, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    recipe, images, network = RECIPE, digits.train, teacher
    if other == "seed":
        recipe = replace(RECIPE, seed=1)
    if other == "k":
        recipe = replace(RECIPE, mixing=Mixing(**FAST, k=3))
    if other == "data":
        images = digits.train.subset(1000)
    if other == "teacher":

        def network(x):
            return 2 * teacher(x)

    if lost == "the manifest":
        (copy / "manifest.json").unlink()
    else:  # an unfinished store with a foreign shard of the right number
        begin(Store(tmp_path / "begun"), recipe, images, network)
        shutil.copy(tmp_path / "begun" / "manifest.json", copy)
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    with pytest.raises(ValueError, match="00000.safetensors is of another run"):
        generate(recipe, copy, images, network)
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before


def test_a_shard_of_another_run_is_not_read(folder, digits, tmp_path):
    "Not even where somebody has put its hash into the manifest."
    other = generate(replace(RECIPE, seed=5), tmp_path / "other").folder
    shutil.copy(folder / "00000.safetensors", other)
    entries = Store(folder).manifest()["shards"][:1] + Store(other).manifest()["shards"][1:]
    Store(other).write(Store(other).manifest() | {"shards": entries})
    for check in (True, False):
        with pytest.raises(ValueError, match="00000.safetensors is of another run"):
            MixedDataset(other, digits, check=check)


def test_without_its_manifest_the_same_run_goes_on(folder, digits, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for name in ("manifest.json", "00001.safetensors"):
        (copy / name).unlink()
    generate(RECIPE, copy)
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


class Weightless(torch.nn.Module):
    "A module without a single weight, whose network is hidden."

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


@pytest.mark.parametrize("wrap", [lambda f: f, Weightless], ids=["function", "module without weights"])
def test_two_functions_are_two_teachers(wrap, teacher, digits, tmp_path):
    recipe, g = replace(RECIPE, count=30, shard=128), torch.Generator().manual_seed(0)
    first = wrap(lambda x: teacher(x))
    store = generate(recipe, tmp_path / "store", digits.train, first)
    before = {p.name: p.read_bytes() for p in store.folder.iterdir()}
    assert store.manifest()["teacher"]["weights"] is None and len(store.manifest()["teacher"]["logits"]) == 64
    noisy = wrap(lambda x: teacher(x) * (1 + 1e-5 * torch.randn(len(x), 10, generator=g)))
    for same in (first, wrap(lambda x: teacher(x)), noisy):
        generate(recipe, store.folder, digits.train, same)
    for other in (
        lambda x: teacher(x).flip(1),
        lambda x: 1.05 * teacher(x),
        lambda x: teacher(x.flip(3)),
        lambda x: teacher(x)[:, :9],
        teacher,
    ):
        with pytest.raises(ValueError, match="with other settings .*teacher"):
            generate(recipe, store.folder, digits.train, other if other is teacher else wrap(other))
    assert {p.name: p.read_bytes() for p in store.folder.iterdir()} == before


def test_a_network_is_known_by_its_weights_whatever_is_around_it(teacher, digits):
    plain = teacher_identity(teacher, digits.train)
    assert plain == {"name": "resnet20", "weights": weights_hash(teacher)}
    assert plain == teacher_identity(torch.nn.DataParallel(teacher), digits.train)
    assert not _same_logits([], []) and not _same_logits([1.0], [1.0, 2.0]) and _same_logits([1.0, 1.0], [1.0, 1.0])


def test_what_mixed_images_are_made_from(folder, digits):
    by_hand = MixedDataset(folder, digits.train).batch(range(5)).images
    for images in (digits, Augmented(digits.train, _POLICIES["randaugment"]), replace(digits, test=digits.train)):
        assert torch.equal(MixedDataset(folder, images).batch(range(5)).images, by_hand)
    x = digits.train[:4][0]
    for wrong in (x, torch.utils.data.TensorDataset(x), None, "digits", list(x)):
        with pytest.raises(ValueError, match="Expected images of `load_data` or `load_folder`, got"):
            MixedDataset(folder, wrong)


def test_images_that_a_stock_was_made_from(mixed, digits):
    train = digits.train

    def seen(**changes):
        return ArrayImages(replace(digits.info, **changes), train.kept, train.labels)

    assert mixed.made_from(train) and mixed.made_from(digits) and not mixed.differences(digits)
    assert mixed.made_from(Augmented(train, _POLICIES["randaugment"])) and not mixed.made_from(digits.test)
    for changes in ({"mean": (0.5,) * 3}, {"std": (0.5,) * 3}, {"pad": 4}, {"flip": True}):
        assert not mixed.made_from(seen(**changes)) and list(mixed.differences(seen(**changes))) == list(changes)
    assert mixed.differences(train.subset(50)) == {} and not mixed.made_from(train.subset(50))


@pytest.mark.parametrize(
    "first, kind",
    [(246, torch.uint8), (247, torch.int16), (32_758, torch.int16), (32_759, torch.int32), (70_000, torch.int32)],
)
def test_class_numbers_of_any_size(first, kind, teacher, digits, tmp_path):
    "The digits are the last of so many classes and ten more."

    def wide(x):
        return torch.nn.functional.pad(teacher(x), (first, 0), value=-30.0)

    store = generate(replace(RECIPE, count=20, shard=128), tmp_path / "store", digits.train, wide)
    mixed = MixedDataset(store.folder, digits)
    assert mixed.num_classes == first + 10 and mixed.small["classes"].dtype == mixed.small["top_classes"].dtype == kind
    batch = mixed.batch(range(20))
    assert (batch.classes >= first).all() and is_solved(batch.logits, batch.classes).all()
    with torch.no_grad():
        wanted = wide(batch.images).softmax(1).gather(1, batch.classes)
    torch.testing.assert_close(batch.logits.softmax(1).gather(1, batch.classes), wanted, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "",
        "/",
        "../../evil",
        "/tmp/evil",
        "a/../../b",
        "x\0y",
        " ",
        "labels.csv",
        "~",
        "é" * 300,
        "con",
        "line\nbreak",
        "\ud800",
    ],
)
def test_pictures_stay_in_their_folder(name, folder, digits, tmp_path):
    classes = (name, "B", "b", *"3456789")
    images = ArrayImages(replace(digits.info, classes=classes), digits.train.kept, digits.train.labels)
    home = tmp_path / "home" / "inner" / "most"
    home.mkdir(parents=True)
    out = export_images(MixedDataset(folder, images), home / "pictures")
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and out not in p.parents]
    assert not outside and os.listdir(home) == ["pictures"] and not Path("/tmp/evil").exists()
    files = list(out.rglob("*.png"))
    assert len(files) == 300 and all(p.parent.parent == out for p in files)
    with open(out / "labels.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len({row["file"].split("/")[0] for row in rows}) == len({p.parent for p in files}) == 10
    assert {row["file"] for row in rows} == {p.relative_to(out).as_posix() for p in files}


@given(st.lists(st.text(max_size=8), max_size=6))
@example(["a", "A 2", "A", "a 2"])
@example(["ß", "ss", "é", "e\u0301"])
def test_folder_names_are_safe_and_differ(names):
    found = _folder_names(names)
    assert len(found) == len(names) == len({name.casefold() for name in found})
    for name in found:
        assert name and name.isprintable() and name == Path(name).name and len(name.encode()) <= 255
        assert name not in (".", "..", "labels.csv") and not name.startswith((".", " "))
        assert _folder_names([name]) == [name]  # what is safe stays as it is


# Manifests and cards that something has changed

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.sampled_from([10**9, 2**63, 10**400, -1])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["../00000.safetensors", "00000.safetensors", "/etc/passwd", "0" * 16]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def places(value, path=()):
    "Every place in a value of JSON."
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def spoilt(value, path, how, junk):
    "A value of JSON, changed at one place: replaced, taken away, doubled, more beside it, or wrapped."
    if not path:
        return {"replace": junk, "wrap": [value], "more": {**value, "more": junk}}.get(how, value)
    value, (key, *rest) = (dict(value) if isinstance(value, dict) else list(value)), path
    if rest:
        value[key] = spoilt(value[key], rest, how, junk)
    elif how == "remove":
        value.pop(key)
    elif how == "double" and isinstance(value, list):
        value.insert(key, value[key])
    elif how == "more" and isinstance(value, dict):
        value["more"] = junk
    elif how == "wrap":
        value[key] = [value[key]]
    else:
        value[key] = junk
    return value


CHANGES = st.tuples(st.integers(0, 10**6), st.sampled_from(["replace", "remove", "double", "more", "wrap"]), JUNK)


def change(content, changes):
    for where, how, junk in changes:
        there = list(places(content)) if isinstance(content, (dict, list)) else [()]
        content = spoilt(content, there[where % len(there)], how, junk) if isinstance(content, dict) else junk
    return content


def reads_the_same_or_says_why(copy, original, digits, checks=(True, False)):
    "A changed store is a ValueError or FileNotFoundError that names the file or folder, or gives what it gave."
    want = MixedDataset(original, digits)
    for check in checks:
        try:
            got = MixedDataset(copy, digits, check=check)
        except (ValueError, FileNotFoundError) as error:
            assert str(copy) in str(error)
        else:
            assert len(got) == len(want) and got.num_classes == want.num_classes
            a, b = got.batch(range(len(got))), want.batch(range(len(want)))
            assert all(torch.equal(x, y) for x, y in zip(a, b))


def resumes_or_says_why(copy, recipe, teacher, digits):
    "So does a run that begins and ends over it; what it leaves can be read."
    store = Store(copy)
    try:
        begin(store, recipe, digits.train, teacher)
        finish(store)
    except (ValueError, FileNotFoundError) as error:
        assert str(copy) in str(error)
    else:
        MixedDataset(copy, digits)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


KINDS = pytest.mark.parametrize("kind", ["of today", "of an earlier version", "hashed again"])


@KINDS
@given(changes=st.lists(CHANGES, min_size=1, max_size=3))
def test_any_change_of_a_manifest(kind, folder, teacher, digits, scratch, changes):
    original, recipe = (OLD, OLD_RECIPE) if kind == "of an earlier version" else (folder, RECIPE)
    shutil.rmtree(scratch / "copy", ignore_errors=True)
    copy = Path(shutil.copytree(original, scratch / "copy"))
    content = change(json.loads((copy / "manifest.json").read_text()), changes)
    if kind == "hashed again" and isinstance(content, dict):  # as by a program that means it
        content = {key: value for key, value in content.items() if key != "hash"}
        content["hash"] = _hash_of(content)
    (copy / "manifest.json").write_text(json.dumps(content))
    reads_the_same_or_says_why(copy, original, digits)
    resumes_or_says_why(copy, recipe, teacher, digits)


@KINDS
@given(changes=st.lists(CHANGES, min_size=1, max_size=3), shard=st.integers(0, 1), listed=st.booleans())
def test_any_change_of_a_card(kind, folder, teacher, digits, scratch, changes, shard, listed):
    original, recipe = (OLD, OLD_RECIPE) if kind == "of an earlier version" else (folder, RECIPE)
    shutil.rmtree(scratch / "copy", ignore_errors=True)
    copy = Path(shutil.copytree(original, scratch / "copy"))
    path = copy / f"{shard:05d}.safetensors"
    tensors, card = load_tensors(path)
    path.write_bytes(to_safetensors(tensors, {"card": json.dumps(change(card, changes))}))
    if listed:  # somebody has put the new file's hash into the manifest
        text = (copy / "manifest.json").read_text().replace(file_hash(original / path.name), file_hash(path))
        content = {key: value for key, value in json.loads(text).items() if key != "hash"}
        if kind == "of an earlier version":
            (copy / "manifest.json").write_text(_as_json(content))
        else:
            Store(copy).write(content)
    reads_the_same_or_says_why(copy, original, digits)
    resumes_or_says_why(copy, recipe, teacher, digits)


@KINDS
@given(
    name=st.sampled_from(["manifest.json", "00000.safetensors"]),
    where=st.integers(0, 10**6),
    piece=st.binary(max_size=3),
    cut=st.booleans(),
)
def test_any_change_of_bytes(kind, folder, digits, scratch, name, where, piece, cut):
    original = OLD if kind == "of an earlier version" else folder
    shutil.rmtree(scratch / "copy", ignore_errors=True)
    copy = Path(shutil.copytree(original, scratch / "copy"))
    content = (copy / name).read_bytes()
    at = where % len(content)
    (copy / name).write_bytes(content[:at] + piece + (b"" if cut else content[at + len(piece) :]))
    if name != "manifest.json" or kind == "of today":
        reads_the_same_or_says_why(copy, original, digits, [True])
    else:
        try:
            MixedDataset(copy, digits)  # without a hash of its own a digit may differ, such as the recipe's seed
        except (ValueError, FileNotFoundError) as error:
            assert str(copy) in str(error)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 1000 + "]" * 1000, "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "expected entries in braces"),
        ("null", "got None"),
        ("{}", "store of format None"),
        ('{"format": 3}', "data is missing"),
        ('{"format": 3, "format": 3}', "an entry is in it twice"),
        ('{"format": NaN}', "NaN is no number"),
        ('{"format": 1e999}', "no finite number"),
        ('{"format": [' + "[" * 900 + "]" * 900 + "]}", "manifest.json"),
        ("\udcff", "cannot be read"),
        ('{"format": ' + "9" * 5000 + "}", "manifest.json"),
        ("", "cannot be read"),
        ('{"format": true}', "format True"),
        ('{"format": 3.0, "data": 1}', "teacher is missing"),
    ],
    ids=range(15),
)
def test_odd_manifests(text, message, folder, digits, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "manifest.json")) / "manifest.json"  # a folder of this name
    copy.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="manifest.json") as error:
        MixedDataset(copy.parent, digits)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images": -1}, "images should be a whole number of 1 or more, and is -1"),
        ({"images": 10.5}, "and is 10.5"),
        ({"images": 10**9}, "1,000,000,000 images are not those"),
        ({"images": 299}, "299 images are not those"),
        ({"recipe": None}, "recipe should have entries, and is None"),
        ({"shards": []}, "its 300 images"),
        ({"shards": {}}, "shards should be a list"),
        ({"shards": [[]]}, "shards[0] should have entries"),
        ({"data": []}, "data should have entries, and is a list"),
        ({"teacher": "x"}, "teacher should have entries"),
        ({"more": 1}, "'more' is unknown"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_said(changes, message, folder, digits, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    content = {key: value for key, value in json.loads((copy / "manifest.json").read_text()).items() if key != "hash"}
    (copy / "manifest.json").write_text(json.dumps(content | changes))
    with pytest.raises(ValueError) as error:
        MixedDataset(copy, digits)
    assert message in str(error.value) and str(copy / "manifest.json") in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: [s[0], s[0]], "listed twice"),
        (lambda s: [s[1], s[0]], "not in order"),
        (lambda s: s[1:], "a shard is missing"),
        (lambda s: [{**s[0], "sets": 0}, s[1]], "shards[0].sets should be a whole number of 1 or more"),
        (lambda s: [{**s[0], "images": 10**9}, s[1]], "more images than sets"),
        (
            lambda s: [{**s[0], "file": "../copy/00000.safetensors"}, s[1]],
            "shards[0].file should be the name of a shard",
        ),
        (lambda s: [{**s[0], "sets": 300}, s[1]], "00000.safetensors was changed: the manifest says"),
        (lambda s: [{k: v for k, v in s[0].items() if k != "sha256"}, s[1]], "shards[0].sha256 is missing"),
    ],
)
def test_what_is_wrong_with_a_list_of_shards_is_said(change, message, folder, digits, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    content = Store(copy).manifest()
    Store(copy).write(content | {"shards": change(content["shards"])})
    with pytest.raises(ValueError) as error:
        MixedDataset(copy, digits)
    assert message in str(error.value) and str(copy) in str(error.value)


@pytest.mark.parametrize("changes", [{"hold": None, "start": "flat"}, {"k": 3}, {"mask_size": 16}])
def test_another_recipe_in_an_old_manifest_is_seen_in_the_shapes(changes, old, digits):
    content = json.loads((old / "manifest.json").read_text())
    content["recipe"]["mixing"] |= changes
    (old / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="00000.safetensors was changed: .*expected"):
        MixedDataset(old, digits)


def test_an_empty_shard_among_others(teacher, digits, tmp_path):
    "Kept, listed, and passed over in reading."
    recipe, store = replace(RECIPE, count=250, shard=128), Store(tmp_path / "store")
    engine = Engine(teacher, digits.train[:2][0], replace(RECIPE.mixing, max_iter=1, give_up=1.0))
    begin(store, recipe, digits.train, teacher)
    rows = []
    for shard in range(5):
        found = joined(engine.run([draw_block(digits.train, engine.source_logits, RECIPE.mixing, 0, shard)]))
        few = Found(*(t[: 0 if shard in (0, 2, 3) else None] for t in found))
        store.keep(shard, few, 128, recipe.top)
        rows += sorted(few.index.tolist())
    store.write(store.manifest() | {"recipe": {**store.manifest()["recipe"], "count": len(rows)}})
    finish(Store(tmp_path / "store"))
    mixed = MixedDataset(tmp_path / "store", digits)
    assert [entry["images"] > 0 for entry in mixed.manifest["shards"]] == [False, True, False, False, True]
    assert mixed.small["index"].tolist() == rows and len(mixed) == len(rows)
    whole = mixed.batch(range(len(mixed)))
    assert torch.equal(whole.images, torch.cat([mixed.batch([row]).images for row in range(len(mixed))]))


def test_a_run_does_not_depend_on_the_number_of_images(teacher, digits, tmp_path):
    one, two = (begin(Store(tmp_path / str(n)), replace(RECIPE, count=n), digits.train, teacher) for n in (5, 500))
    assert _run_of(one) == _run_of(two) and one != two
    assert _run_of(one) != _run_of(begin(Store(tmp_path / "x"), replace(RECIPE, shard=512), digits.train, teacher))


def test_all_logits_are_kept_in_their_order(teacher, digits, tmp_path):
    recipe = replace(RECIPE, count=100, shard=128, top="all")
    folder = generate(recipe, tmp_path / "all", digits.train, teacher).folder
    tensors, _ = load_tensors(folder / "00000.safetensors")
    n = len(tensors["index"])
    assert tensors["top_log_p"].shape == (n, 10) and tensors["top_classes"].shape == (n, 0)
    kept, some = MixedDataset(folder, digits.train, pad=None), MixedDataset(folder, digits.train)
    assert kept.keeps_all and some.keeps_all
    with torch.no_grad():
        asked = teacher.eval()(kept.batch(range(100)).images)
    torch.testing.assert_close(kept.batch(range(100)).logits, asked, rtol=2e-3, atol=2e-2)
    views, known = kept.sample(30, torch.Generator().manual_seed(0))
    assert torch.equal(views, known.images)


def test_too_few_logits_for_a_student_without_a_teacher(mixed, folder, digits, teacher, tmp_path):
    assert mixed.keeps_all and MixedDataset(folder, digits.train, pad=None).keeps_all  # ten of ten
    few = generate(replace(RECIPE, count=60, shard=128, top=4), tmp_path / "few", digits.train, teacher).folder
    assert not MixedDataset(few, digits.train).keeps_all
    with pytest.raises(ValueError, match="keeps 4 of the teacher's 10 logits; pad=None needs all\\. .*--top all"):
        MixedDataset(few, digits.train, pad=None)


@pytest.mark.parametrize("N", [10, 100, 300])
def test_the_size_of_all_logits(N, seeded):
    logits = torch.randn(5, N, generator=seeded()) * 4
    found = Found(
        index=torch.arange(5),
        sources=torch.zeros(5, 2, dtype=torch.long),
        crop=torch.zeros(5, 2, 2, dtype=torch.long),
        flip=torch.zeros(5, 2, dtype=torch.bool),
        lam=torch.full((5, 2), 0.5),
        classes=torch.zeros(5, 2, dtype=torch.long),
        code=torch.zeros(5, 1, 8, 8),
        steps=torch.ones(5, dtype=torch.long),
        logits=logits,
    )
    packed = _pack(found, "all")
    assert packed["top_log_p"].nbytes + packed["top_classes"].nbytes == 5 * 2 * N
    again = _unpack_logits(packed["top_log_p"], packed["top_classes"], packed["log_sum_exp"], N)
    torch.testing.assert_close(again, logits, rtol=1e-3, atol=2e-2)
