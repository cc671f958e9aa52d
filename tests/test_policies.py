"""Policies: the operations are torchvision's, each image has its own draw, the seed decides, files are checked."""

import json

import pytest
import torch
from PIL import Image
from supermix.data import ArrayImages, FolderImages, Info
from supermix.policies import (LEVELLED, OPS, POLICIES, SIGNED, Augmented, AugmentedViews, Ops, Policy, apply_ops,
                               check_subpolicies, cutout, load_policy, magnitudes, randaugment, save_policy)
from torchvision.transforms import v2

WITNESS = {"regular": v2.RandAugment(), "wide": v2.TrivialAugmentWide()}


@pytest.fixture(scope="module")
def photo(photos):
    image = torch.from_numpy(photos["coffee"]).permute(2, 0, 1)
    return lambda size: v2.functional.resize(image, [size, size], antialias=True)


def alone(op, magnitude, n=1): return Ops(torch.full((n, 1), OPS.index(op)), torch.full((n, 1), float(magnitude)))


# ---- operations

@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("space, bins, size", [("regular", 31, 33), ("regular", 10, 32), ("wide", 31, 28)])
def test_every_operation_is_torchvisions(op, space, bins, size, photo):
    image, witness = photo(size), WITNESS[space]
    if op == "Invert": values = torch.zeros(1)  # not in these two spaces, but in AutoAugment's
    else:
        values = witness._AUGMENTATION_SPACE[op][0](bins, size, size)
        values = torch.zeros(1) if values is None else values.float()
        torch.testing.assert_close(magnitudes(space, bins, size)[OPS.index(op)][:len(values)], values, rtol=0, atol=0)
    if op in SIGNED: values = torch.cat([values, -values])
    n = len(values)
    ours = apply_ops(image.expand(n, -1, -1, -1), Ops(torch.full((n, 1), OPS.index(op)), values[:, None]))
    for one, value in zip(ours, values.tolist()):
        theirs = witness._apply_image_or_video_transform(image, op, value, interpolation=witness.interpolation,
                                                         fill=witness._fill)
        assert (one != theirs).float().mean() < 1e-3  # none at all on processors that fuse multiply and add


@pytest.mark.parametrize("op, magnitude", [("ShearX", 0.2), ("ShearY", -0.3), ("TranslateX", -7.9), ("TranslateY", 3),
                                           ("Rotate", 25), ("Rotate", -90)])
def test_fill(op, magnitude, photo):
    witness = v2.RandAugment(fill=128)
    theirs = witness._apply_image_or_video_transform(photo(32), op, magnitude, interpolation=witness.interpolation,
                                                     fill=witness._fill)
    ours = apply_ops(photo(32)[None], alone(op, magnitude), fill=128)[0]
    assert (ours == 128).any() and (ours != theirs).float().mean() < 1e-3


def test_images_that_are_not_square(photo):
    image, witness = photo(40)[:, :24], WITNESS["regular"]
    for op, magnitude in (("ShearX", 0.3), ("ShearY", 0.3), ("TranslateX", 9), ("Rotate", 30)):
        theirs = witness._apply_image_or_video_transform(image, op, magnitude, interpolation=witness.interpolation,
                                                         fill=witness._fill)
        assert (apply_ops(image[None], alone(op, magnitude))[0] != theirs).float().mean() < 1e-3


def test_a_batch_is_its_images_one_by_one(photo, seeded):
    images = torch.randint(0, 256, (40, 3, 32, 32), generator=seeded(), dtype=torch.uint8)
    images[::2] = photo(32)
    for policy in (POLICIES["trivialaugment"], POLICIES["autoaugment_cifar10"], randaugment(3, 20)):
        ops = policy.draw(40, 32, seeded(1))
        before = images.clone()
        together = policy.apply(images, ops)
        assert torch.equal(images, before), "the input was changed"
        for i in range(40):
            single = policy.apply(images[i:i + 1], Ops(ops.op[i:i + 1], ops.magnitude[i:i + 1]))
            assert torch.equal(together[i:i + 1], single)


def test_operations_are_applied_in_their_order(photo):
    a = Ops(torch.tensor([[OPS.index("Invert"), OPS.index("Solarize")]]), torch.tensor([[0.0, 0.5]]))
    b = Ops(a.op.flip(1), a.magnitude.flip(1))
    x = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    assert apply_ops(x, a).unique().tolist() == [100]  # 100 → 155 → 100
    assert apply_ops(x, b).unique().tolist() == [155]  # 100 → 100 → 155


def test_wrong_images():
    with pytest.raises(ValueError, match="Expected uint8 images .* got torch.float32"):
        apply_ops(torch.zeros(1, 3, 8, 8), alone("Invert", 0))
    with pytest.raises(ValueError, match="each of 2 images, got 1"):
        apply_ops(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), alone("Invert", 0))


def test_an_empty_batch():
    nothing = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
    for policy in POLICIES.values():
        assert policy.apply(nothing, policy.draw(0, 8, torch.Generator())).shape == nothing.shape


# ---- Cutout

@pytest.mark.parametrize("length", [1, 4, 5, 16, 40])
def test_cutout_by_a_loop(length, seeded):
    images = torch.rand((30, 3, 20, 24), generator=seeded()) + 1
    middle = torch.stack([torch.randint(20, (30,), generator=seeded(1)),
                          torch.randint(24, (30,), generator=seeded(2))], 1)
    ours = cutout(images, middle, length, torch.tensor([0.1, 0.2, 0.3]))
    for image, (row, column), got in zip(images, middle.tolist(), ours):
        top, left = row - length // 2, column - length // 2
        expected = image.clone()
        expected[:, max(0, top):max(0, top + length), max(0, left):max(0, left + length)] = (
            torch.tensor([0.1, 0.2, 0.3])[:, None, None])
        assert torch.equal(got, expected)


def test_cutout_covers_the_mean_colour(digits, seeded):
    images = Augmented(digits.train, Policy("holes", cutout=16))
    which = torch.arange(64)
    views = images.draw(which, seeded())
    holes = cutout(torch.zeros(64, 1, 32, 32), views.ops.hole, 16, 1).bool().expand(-1, 3, -1, -1)
    pixels = images.info.normalize(images.fetch(which, views))
    assert pixels[holes].abs().max() < 0.5 / 255 / 0.3240 + 1e-6  # half a grey level, normalised
    plain = images.info.normalize(digits.train.fetch(which, views))
    assert torch.equal(pixels[~holes], plain[~holes])


# ---- what is drawn

def test_draws_follow_the_policy(seeded):
    policy = Policy("p", [[["Rotate", 0.3, 9], ["Equalize", 1, None]], [["Solarize", 0.0, 5], ["Color", 0.6, 2]],
                          [["Posterize", 1.0, 9]]])
    n = 60_000
    ops = policy.draw(n, 32, seeded())
    count = {(op, place): (ops.op[:, place] == OPS.index(op)).sum().item() / n for op in OPS for place in (0, 1)}
    expected = {("Rotate", 0): 0.1, ("Equalize", 1): 1 / 3, ("Color", 1): 0.2, ("Posterize", 0): 1 / 3,
                ("Identity", 0): 1 - 0.1 - 1 / 3, ("Identity", 1): 1 - 1 / 3 - 0.2}
    for key, share in count.items(): assert share == pytest.approx(expected.get(key, 0), abs=0.01)
    turned = ops.magnitude[:, 0][ops.op[:, 0] == OPS.index("Rotate")]
    assert set(turned.tolist()) == {-30.0, 30.0} and (turned > 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (ops.magnitude[:, 0][ops.op[:, 0] == OPS.index("Posterize")] == 4).all()  # bits have no sign
    assert not ops.magnitude[ops.op == 0].any()
    both = (ops.op[:, 0] == OPS.index("Rotate")) & (ops.op[:, 1] == OPS.index("Color"))
    assert not both.any()  # entries of different sub-policies never meet


def test_several_picks(seeded):
    policy = Policy("p", [[["Rotate", 1.0, 9], ["Equalize", 1, None]], [["Invert", 0.5, None]]], picks=3)
    ops = policy.draw(20_000, 32, seeded())
    assert ops.op.shape == (20_000, 6)
    pairs = ops.op.view(-1, 3, 2)
    first = pairs[..., 0] == OPS.index("Rotate")
    assert ((pairs[..., 1] == OPS.index("Equalize")) == first).all()  # the entries of a sub-policy stay together
    assert (first.float().mean().item() == pytest.approx(0.5, abs=0.02)
            and first.all(1).float().mean().item() == pytest.approx(1 / 8, abs=0.02))


def test_published_policies_draw_evenly(seeded):
    ops = POLICIES["randaugment"].draw(56_000, 32, seeded())
    pairs = torch.bincount(ops.op[:, 0] * 14 + ops.op[:, 1], minlength=196)
    assert len(pairs) == 196 and pairs.min() > 200 and pairs.max() < 380  # 286 expected
    assert {round(m, 4) for m in ops.magnitude[ops.op == OPS.index("Rotate")].tolist()} == {-9.0, 9.0}
    ops = POLICIES["trivialaugment"].draw(62_000, 32, seeded())
    assert ops.op.shape == (62_000, 1) and torch.bincount(ops.op.flatten()).min() > 4000  # 4,429 expected
    turned = ops.magnitude[ops.op == OPS.index("Rotate")].abs()
    assert len(turned.unique()) == 31 and turned.mean().item() == pytest.approx(67.5, abs=3)


def test_autoaugment_is_torchvisions_list():
    for name, policy in (("autoaugment_cifar10", v2.AutoAugmentPolicy.CIFAR10),
                         ("autoaugment_imagenet", v2.AutoAugmentPolicy.IMAGENET)):
        theirs = v2.AutoAugment(policy)._policies
        assert ([[(op, p, level or 0) for op, p, level in line] for line in theirs]
                == [list(line) for line in POLICIES[name].subpolicies])


def test_the_seed_decides(digits, seeded):
    state = torch.random.get_rng_state()
    images = Augmented(digits.train.subset(100), load_policy("trivialaugment", cutout=16))
    a, b, c = ([(x, y, i) for x, y, i in images.batches(32, s)] for s in (0, 0, 1))
    assert all(torch.equal(s, t) for x, y in zip(a, b) for s, t in zip(x, y)) and not torch.equal(a[0][0], c[0][0])
    torch.manual_seed(99)
    assert torch.equal(next(images.batches(32, 0))[0], a[0][0]), "torch's global generator matters"
    torch.random.set_rng_state(state)
    views = images.draw(torch.arange(50), seeded(3))
    assert isinstance(views, AugmentedViews)
    assert torch.equal(images.fetch(torch.arange(50), views), images.fetch(torch.arange(50), views))


def test_each_image_has_its_own_draw(digits, seeded):
    images = Augmented(digits.train, POLICIES["trivialaugment"])
    same = torch.zeros(64, dtype=torch.int64)
    views = images.draw(same, seeded())
    assert len(views.ops.op.unique()) == 14 and len(images.fetch(same, views).flatten(1).unique(dim=0)) > 40


# ---- schedules

def test_a_schedule_follows_the_epochs(digits, seeded):
    policy = Policy("s", [[["Invert", 1.0, None]]],
                    later=[(0.5, [[["Solarize", 1.0, 9]]]), (0.75, [[["Equalize", 1.0, None]]])])
    images = Augmented(digits.train.subset(20), policy, epochs=4)
    seen = []
    for epoch in range(4):
        for _ in images.batches(10, 0, epoch): seen.append(OPS[images.draw(torch.arange(1), seeded()).ops.op.item()])
        list(images.batches(10))  # a plain pass is no epoch
    assert seen[::2] == seen[1::2] == ["Invert", "Invert", "Solarize", "Equalize"]
    with pytest.raises(ValueError, match="is a schedule: expected the number of epochs"):
        Augmented(digits.train, policy)


@pytest.mark.parametrize("share", [-1, 0, 0.49, 0.5, 0.99, 1, 2])
def test_at(share):
    policy = Policy("s", [[["Invert", 1.0, None]]], later=[(0.5, [])], cutout=4)
    now = policy.at(share)
    assert now.later == () and now.cutout == 4 and len(now.subpolicies) == (share < 0.5)


# ---- files

def test_round_trip(tmp_path):
    for policy in (*POLICIES.values(),
                   Policy("ü", [[["Color", 0.25, 3]], [["Invert", 0, None], ["ShearX", 1, 9], ["Rotate", 1, 0]]],
                          "wide", 12, 16, 128, 3, [(0.1, []), (0.9, [[["Color", 0.25, 11]]])],
                          {"found": "by hand", "n": 3})):
        again = load_policy(save_policy(policy, tmp_path / "deep" / "p.json"))
        assert again == policy and again.about == policy.about


def test_a_plain_list(tmp_path):
    (tmp_path / "turns.json").write_text('[[["Rotate", 0.7, 2], ["TranslateX", 0.3, 9]]]')
    policy = load_policy(tmp_path / "turns.json", cutout=16)
    assert policy == Policy("turns", ((("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),), cutout=16)


WRONG = {
    "[[": "is not a policy file: Expecting",
    '"text"': "expected a list of sub-policies or the fields of a policy, got 'text'",
    "[1]": "Sub-policy 1: expected a list of .* got 1",
    "[[]]": "Sub-policy 1: expected a list",
    '[[["Rotate", 1]]]': r"Sub-policy 1, entry 1: expected \[operation, probability, level\], got \['Rotate', 1\]",
    '[[["Rotate", 1, 1]], [["Invert", 1, null], ["Rotat", 1, 1]]]':
        "Sub-policy 2, entry 2: Unknown operation 'Rotat'. Did you mean 'Rotate'",
    '[[[["a"], 1, 1]]]': "Sub-policy 1, entry 1: ",
    '[[["Rotate", "often", 1]]]': r"entry 1 \(Rotate\): expected a probability from 0 to 1, got 'often'",
    '[[["Rotate", -0.1, 1]]]': "expected a probability from 0 to 1, got -0.1",
    '[[["Rotate", NaN, 1]]]': "expected a probability from 0 to 1, got nan",
    '[[["Rotate", true, 1]]]': "expected a probability from 0 to 1, got True",
    '[[["Rotate", 1, null]]]': "expected a level, a whole number from 0 to 9, got None",
    '[[["Rotate", 1, 2.5]]]': "expected a level, a whole number from 0 to 9, got 2.5",
    '[[["Rotate", 1, 10]]]': "from 0 to 9, got 10",
    '{"subpolicys": []}': "Unknown field 'subpolicys'. Did you mean 'subpolicies'",
    '{"subpolicies": 3}': "Expected a list of sub-policies, got int",
    '{"space": "narrow"}': "Unknown space 'narrow'",
    '{"bins": 1}': "Expected bins to be a whole number from 2 to 10000, got 1",
    '{"cutout": -1}': "Expected cutout",
    '{"fill": 256}': "Expected fill",
    '{"space": ["regular"]}': "Unknown space",
    '{"later": [[0.5]]}': "Expected `later` to be a list",
    '{"later": [[0.5, []], [0.4, []]]}': "each above the last, got",
    '{"later": [[0.5, [[["Rotate", 1, 10]]]]]}': r"Sub-policy 1, entry 1 \(Rotate\)",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_files(text, tmp_path):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=WRONG[text]) as error: load_policy(path)
    assert "wrong.json" in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no policy file"): load_policy(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="Did you mean 'trivialaugment'"): load_policy("trivialaugmnt")
    with pytest.raises(ValueError, match="Expected picks to be a whole number from 1 to 100, got 0"): randaugment(0)
    with pytest.raises(ValueError, match="from 0 to 30, got 31"): randaugment(2, 31)


def test_levels_of_operations_without_one():
    assert check_subpolicies([[["Invert", 1, 7]]], 10) == ((("Invert", 1.0, 7),),) and "Invert" not in LEVELLED
    assert Policy("p", [[["Invert", 1, 7]]]).draw(5, 32, torch.Generator()).magnitude.abs().sum() == 0


# ---- whole data sets

def test_photographs_in_files(tmp_path, photos, seeded):
    labels = []
    for i, (name, photo) in enumerate(photos.items()):
        Image.fromarray(photo).resize((120 + 10 * i, 100)).save(tmp_path / f"{name}.JPEG", quality=90)
        labels.append(i % 2)
    info = Info("four", ("even", "odd"), 64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    plain = FolderImages(info, sorted(tmp_path.glob("*.JPEG")), torch.tensor(labels))
    images = Augmented(plain, load_policy("autoaugment_imagenet", cutout=16))
    assert torch.equal(images[:][0], plain[:][0]) and "autoaugment_imagenet" in repr(images)
    one, two = (list(images.batches(3, 5)) for _ in range(2))
    assert [len(x) for x, _, _ in one] == [3, 1] and all(torch.equal(a[0], b[0]) for a, b in zip(one, two))
    assert torch.cat([i for _, _, i in one]).sort().values.tolist() == [0, 1, 2, 3]
    which = torch.arange(4)
    views = images.draw(which, seeded(5))
    expected = images.policy.apply(plain.fetch(which, views), views.ops, torch.tensor([124, 116, 104]))
    assert torch.equal(images.fetch(which, views), expected) and not torch.equal(expected, plain.fetch(which, views))
    assert len(images.subset(2)) == 2 and images.subset(2).policy == images.policy


def test_processes_share_a_batch(digits):
    images = Augmented(digits.train.subset(50), load_policy("randaugment", cutout=8))
    whole = next(images.batches(40, 1))[0]
    halves = [next(images.batches(40, 1, share=(rank, 2)))[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), whole)


def test_a_policy_on_a_policy_is_an_error(digits):
    under = Augmented(digits.train, load_policy("randaugment"))
    with pytest.raises(ValueError, match="images without a policy, got .* under"):
        Augmented(under, load_policy("trivialaugment"))


def test_no_policy_is_the_plain_images(digits):
    images = Augmented(digits.train, POLICIES["none"])
    for (x, y, i), (a, b, c) in zip(images.batches(300, 2), digits.train.batches(300, 2)):
        assert torch.equal(x, a) and torch.equal(y, b) and torch.equal(i, c)


def test_subset_and_devices(digits):
    images = Augmented(digits.train, POLICIES["randaugment"]).subset(30)
    assert isinstance(images, Augmented) and len(images) == 30 and images.labels.bincount().tolist() == [3] * 10
    assert isinstance(images.to("cpu").images, ArrayImages) and images.to("cpu").policy == images.policy


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu(digits):
    images, g = (Augmented(digits.train.to("cuda"), load_policy("trivialaugment", cutout=16)),
                 torch.Generator("cuda").manual_seed(0))
    which = torch.arange(256)
    views = images.draw(which, g)
    pixels = images.fetch(which, views)
    on_cpu = Augmented(digits.train, images.policy).fetch(
        which, AugmentedViews(views.crop.cpu(), views.flip.cpu(), views.ops.to("cpu")))
    assert pixels.device.type == "cuda" and (pixels.cpu() != on_cpu).float().mean() < 1e-3


def test_files_are_plain_json(tmp_path):
    content = json.loads(save_policy(POLICIES["autoaugment_cifar10"], tmp_path / "a.json").read_text())
    assert content["subpolicies"][1] == [["Rotate", 0.7, 2], ["TranslateX", 0.3, 9]] and content["bins"] == 10
