"""Policies: the operations are torchvision's, each image has its own draw, the seed decides, files are checked."""

import json

import numpy as np
import pytest
import timm.data.auto_augment as timms
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from supermix.data import ArrayImages, FolderImages, Info
from supermix.policies.policies import (
    OPS,
    _LEVELLED,
    _PBA_OPS,
    _POLICIES,
    _SIGNED,
    Augmented,
    Policy,
    _AugmentedViews,
    _Ops,
    _apply_ops,
    _check_subpolicies,
    _cutout,
    _draw_places,
    _magnitude_at,
    _magnitudes,
    load_policy,
    randaugment,
    save_policy,
)
from supermix.recipes import CIFAR100_CLASSIFICATION
from torchvision.transforms import v2

WITNESS = {"regular": v2.RandAugment(), "wide": v2.TrivialAugmentWide()}


@pytest.fixture(scope="module")
def photo(photos):
    image = torch.from_numpy(photos["coffee"]).permute(2, 0, 1)
    return lambda size: v2.functional.resize(image, [size, size], antialias=True)


def alone(op, magnitude, n=1):
    return _Ops(torch.full((n, 1), OPS.index(op)), torch.full((n, 1), float(magnitude)))


# ---- operations


@pytest.mark.parametrize("op", OPS[:15])  # torchvision has no Cutout
@pytest.mark.parametrize("space, bins, size", [("regular", 31, 33), ("regular", 10, 32), ("wide", 31, 28)])
def test_every_operation_is_torchvisions(op, space, bins, size, photo):
    image, witness = photo(size), WITNESS[space]
    if op == "Invert":
        values = torch.zeros(1)  # not in these two spaces, but in AutoAugment's
    else:
        values = witness._AUGMENTATION_SPACE[op][0](bins, size, size)
        values = torch.zeros(1) if values is None else values.float()
        torch.testing.assert_close(_magnitudes(space, bins, size)[OPS.index(op)][: len(values)], values, rtol=0, atol=0)
    if op in _SIGNED:
        values = torch.cat([values, -values])
    n = len(values)
    ours = _apply_ops(image.expand(n, -1, -1, -1), _Ops(torch.full((n, 1), OPS.index(op)), values[:, None]))
    for one, value in zip(ours, values.tolist()):
        theirs = witness._apply_image_or_video_transform(
            image, op, value, interpolation=witness.interpolation, fill=witness._fill
        )
        apart = (one.int() - theirs.int()).abs()  # 0 where the processor fuses multiply and add; else a few round
        assert apart.max() <= 1 and (apart > 0).float().mean() < 0.05


@pytest.mark.parametrize(
    "op, magnitude",
    [("ShearX", 0.2), ("ShearY", -0.3), ("TranslateX", -7.9), ("TranslateY", 3), ("Rotate", 25), ("Rotate", -90)],
)
def test_fill(op, magnitude, photo):
    witness = v2.RandAugment(fill=128)
    theirs = witness._apply_image_or_video_transform(
        photo(32), op, magnitude, interpolation=witness.interpolation, fill=witness._fill
    )
    ours = _apply_ops(photo(32)[None], alone(op, magnitude), fill=128)[0]
    assert (ours == 128).any() and (ours != theirs).float().mean() < 1e-3


# What AutoAugment's authors do to a Pillow image at a level of 0 … 10, and Fast AutoAugment's at one of 0 … 1.
# `sign` is of what is mirrored at random; Pillow counts shifts to the left.


def affine(image, *numbers):
    return image.transform(image.size, Image.Transform.AFFINE, numbers)


def enhanced(image, op, factor):
    return getattr(ImageEnhance, op)(image).enhance(factor)


PLAIN = {"AutoContrast": ImageOps.autocontrast, "Equalize": ImageOps.equalize, "Invert": ImageOps.invert}
AUTHORS = {
    "ShearX": lambda image, level, sign: affine(image, 1, sign * 0.3 * level / 10, 0, 0, 1, 0),
    "ShearY": lambda image, level, sign: affine(image, 1, 0, 0, sign * 0.3 * level / 10, 1, 0),
    "TranslateX": lambda image, level, sign: affine(image, 1, 0, -sign * level, 0, 1, 0),
    "TranslateY": lambda image, level, sign: affine(image, 1, 0, 0, 0, 1, -sign * level),
    "Rotate": lambda image, level, sign: image.rotate(sign * (30 * level // 10)),
    "Posterize": lambda image, level, sign: (  # of late Pillow wants a bit at least
        ImageOps.posterize(image, 4 - 4 * level // 10) if level < 10 else image.point(lambda _: 0)
    ),
    "Solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - 256 * level // 10),
    **{op: lambda image, level, sign, op=op: enhanced(image, op, 1.8 * level / 10 + 0.1) for op in _SIGNED[5:]},
    **{op: lambda image, level, sign, op=op: PLAIN[op](image) for op in PLAIN},
}
FAA = {
    "ShearX": lambda image, level, sign: affine(image, 1, sign * (0.6 * level - 0.3), 0, 0, 1, 0),
    "ShearY": lambda image, level, sign: affine(image, 1, 0, 0, sign * (0.6 * level - 0.3), 1, 0),
    "TranslateX": lambda image, level, sign: affine(image, 1, 0, -sign * (0.9 * level - 0.45) * image.width, 0, 1, 0),
    "TranslateY": lambda image, level, sign: affine(image, 1, 0, 0, 0, 1, -sign * (0.9 * level - 0.45) * image.height),
    "Rotate": lambda image, level, sign: image.rotate(sign * (60 * level - 30)),
    "Posterize": lambda image, level, sign: ImageOps.posterize(image, int(4 + 4 * level)),
    "Solarize": lambda image, level, sign: ImageOps.solarize(image, 256 * level),
    **{op: lambda image, level, sign, op=op: enhanced(image, op, 1.8 * level + 0.1) for op in _SIGNED[5:]},
    **{op: lambda image, level, sign, op=op: PLAIN[op](image) for op in PLAIN},
}


@pytest.mark.parametrize("op", AUTHORS)
@pytest.mark.parametrize("space", ["authors", "faa"])
def test_the_authors_levels_are_those_of_their_pillow_code(space, op, photo):
    image = photo(32)
    table, bins, levels = (
        (AUTHORS, 11, list(range(11)))
        if space == "authors"
        else (FAA, 2, [0.0, 0.013, 0.24988, 0.5, 0.61803, 0.75, 0.99, 1.0])
    )
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
    for sign in (1, -1) if op in _SIGNED[:5] else (1,):
        policy = Policy("p", [[[op, 1.0, level]] for level in levels], space, bins)
        m = _magnitude_at(op, torch.tensor(levels, dtype=torch.float64), space, bins, 32) * sign
        ours = _apply_ops(image.expand(len(m), -1, -1, -1), _Ops(torch.full((len(m), 1), OPS.index(op)), m[:, None]))
        drawn = policy.draw(400, 32, torch.Generator().manual_seed(0)).magnitude.unique().tolist()
        assert set(drawn) == {v * s for v in m.tolist() for s in ((1, -1) if op in _SIGNED[:5] else (1,))}
        for got, level in zip(ours, levels):
            theirs = torch.from_numpy(np.array(table[op](pillow, level, sign))).permute(2, 0, 1)
            far = (got.int() - theirs.int()).abs()
            if op.startswith("Shear"):  # where a shift is half a pixel, either neighbour will do
                shift = 0.5 + m[levels.index(level)].item() * (torch.arange(32) + 0.5)
                clear = (shift - shift.round()).abs() > 1e-4
                far *= clear[:, None] if op == "ShearX" else clear
            if op in _SIGNED[:5]:
                assert (far > 0).float().mean() < 2e-3, level
            elif op in ("Posterize", "Solarize", "Equalize", "Invert"):
                assert not far.any(), level
            else:
                assert far.max() <= 2, level  # Pillow rounds greys and means, torchvision does not


def test_levels_differ_between_torchvision_and_the_authors():
    "The four examples by which the two policies of the same list differ, and the published errors."
    ours, authors = _POLICIES["autoaugment_cifar10"], _POLICIES["autoaugment_cifar10_authors"]
    assert ours.subpolicies == authors.subpolicies
    for op, level, theirs, torchvisions in (
        ("TranslateX", 9, 9, 14),
        ("Posterize", 7, 2, 5),
        ("Solarize", 9, 26 / 255, 0),
        ("Brightness", 3, 0.64 - 1, 0.3),
    ):
        for policy, expected in ((authors, theirs), (ours, torchvisions)):
            one = Policy("p", [[[op, 1.0, level]]], policy.space, policy.bins).draw(50, 32, torch.Generator())
            found = {float(m) if op != "TranslateX" else float(m.trunc()) for m in one.magnitude.flatten()}
            signs = (1, -1) if op == "TranslateX" or policy is ours and op == "Brightness" else (1,)
            assert sorted(found) == pytest.approx(sorted(expected * s for s in signs))
    assert CIFAR100_CLASSIFICATION.rows["AutoAugment"].policy == authors.name
    assert CIFAR100_CLASSIFICATION.rows["AutoAugment"].cutout == 16


def test_timms_randaugment_9_is_27_here():
    for level, share in ((9, 0.3), (27, 0.9)):
        turn = randaugment(2, level).draw(500, 32, torch.Generator().manual_seed(0))
        turn = turn.magnitude[turn.op == OPS.index("Rotate")].abs()
        assert turn.unique().tolist() == pytest.approx([share * 30])
    assert abs(timms.LEVEL_TO_ARG["Rotate"](9, {})[0]) == pytest.approx(0.9 * 30)
    assert "rand-m9" in randaugment.__doc__


def test_outside_is_the_mean_colour(digits, seeded):
    policy = Policy("p", [[["TranslateX", 1.0, 10]]], "authors", 11, fill=None)
    images = Augmented(digits.train, policy)
    which, colour = torch.arange(20), torch.tensor([round(255 * m) for m in digits.train.info.mean])
    views = images.draw(which, seeded())
    pixels = images.fetch(which, views)
    outside = torch.where(views.ops.magnitude[:, :1] > 0, torch.arange(32) < 10, torch.arange(32) >= 22)
    expected = colour[None, :, None, None].expand_as(pixels).to(torch.uint8)
    outside = outside[:, None, None, :].expand_as(pixels)
    assert torch.equal(pixels[outside], expected[outside])


def test_images_that_are_not_square(photo):
    image, witness = photo(40)[:, :24], WITNESS["regular"]
    for op, magnitude in (("ShearX", 0.3), ("ShearY", 0.3), ("TranslateX", 9), ("Rotate", 30)):
        theirs = witness._apply_image_or_video_transform(
            image, op, magnitude, interpolation=witness.interpolation, fill=witness._fill
        )
        assert (_apply_ops(image[None], alone(op, magnitude))[0] != theirs).float().mean() < 1e-3


def test_a_batch_is_its_images_one_by_one(photo, seeded):
    images = torch.randint(0, 256, (40, 3, 32, 32), generator=seeded(), dtype=torch.uint8)
    images[::2] = photo(32)
    holes = Policy(
        "holes",
        [[["Cutout", 1.0, 0.9], ["Rotate", 0.5, 0.1]], [["Color", 0.7, 0.2], ["Cutout", 0.6, 0.4]]],
        "faa",
        2,
        cutout=8,
        fill=None,
    )
    for policy in (_POLICIES["trivialaugment"], _POLICIES["autoaugment_cifar10"], randaugment(3, 20), holes):
        ops = policy.draw(40, 32, seeded(1))
        before = images.clone()
        together = policy.apply(images, ops)
        assert torch.equal(images, before), "the input was changed"
        for i in range(40):
            single = policy.apply(images[i : i + 1], ops[i : i + 1])
            assert torch.equal(together[i : i + 1], single)


def test_operations_are_applied_in_their_order(photo):
    a = _Ops(torch.tensor([[OPS.index("Invert"), OPS.index("Solarize")]]), torch.tensor([[0.0, 0.5]]))
    b = _Ops(a.op.flip(1), a.magnitude.flip(1))
    x = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    assert _apply_ops(x, a).unique().tolist() == [100]  # 100 → 155 → 100
    assert _apply_ops(x, b).unique().tolist() == [155]  # 100 → 100 → 155


def test_wrong_images():
    with pytest.raises(ValueError, match="Expected uint8 images .* got torch.float32"):
        _apply_ops(torch.zeros(1, 3, 8, 8), alone("Invert", 0))
    with pytest.raises(ValueError, match="each of 2 images, got 1"):
        _apply_ops(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), alone("Invert", 0))
    with pytest.raises(ValueError, match="Expected `place`, the middles of the squares"):
        _apply_ops(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), alone("Cutout", 4))


def test_an_empty_batch():
    nothing = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
    for policy in (*_POLICIES.values(), Policy("p", [[["Cutout", 1.0, 9]], [["Color", 1.0, 9]]], picks=(0.2, 0.8))):
        assert policy.apply(nothing, policy.draw(0, 8, torch.Generator())).shape == nothing.shape


# ---- Cutout


@pytest.mark.parametrize("length", [1, 4, 5, 16, 40])
def test_cutout_by_a_loop(length, seeded):
    images = torch.rand((30, 3, 20, 24), generator=seeded()) + 1
    middle = torch.stack(
        [torch.randint(20, (30,), generator=seeded(1)), torch.randint(24, (30,), generator=seeded(2))], 1
    )
    ours = _cutout(images, middle, length, torch.tensor([0.1, 0.2, 0.3]))
    for image, (row, column), got in zip(images, middle.tolist(), ours):
        top, left = row - length // 2, column - length // 2
        expected = image.clone()
        expected[:, max(0, top) : max(0, top + length), max(0, left) : max(0, left + length)] = torch.tensor(
            [0.1, 0.2, 0.3]
        )[:, None, None]
        assert torch.equal(got, expected)


def test_cutout_with_a_length_for_each_image():
    middle, lengths = torch.tensor([[3, 4], [0, 9], [5, 5]]), torch.tensor([0, 5, 20])
    together = _cutout(torch.ones(3, 1, 8, 10), middle, lengths)
    for i, length in enumerate(lengths.tolist()):
        assert torch.equal(together[i : i + 1], _cutout(torch.ones(1, 1, 8, 10), middle[i : i + 1], length))


def test_the_operation_cutout_is_fast_autoaugments(seeded):
    "Pillow draws the rectangle, both ends included, from a corner that is moved to the border at the left and the top."
    for level in (0.003, 0.31, 0.5, 0.77, 1.0):
        policy = Policy("p", [[["Cutout", 1.0, level]]], "faa", 2)
        ops, v = policy.draw(300, 32, seeded(1)), 0.2 * level * 32
        draws = seeded(1)  # what the policy draws: a row, a coin and a sign first
        torch.randint(1, (300, 1), generator=draws), torch.rand((300, 1), generator=draws)
        torch.rand((300, 1), generator=draws)
        u = torch.rand((300, 1, 2), generator=draws, dtype=torch.float64)[:, 0] * 32
        images = policy.apply(torch.full((300, 3, 32, 32), 9, dtype=torch.uint8), ops, torch.tensor([125, 123, 114]))
        for image, (row, column) in zip(images, u.tolist()):
            top, left = int(max(0, row - v / 2)), int(max(0, column - v / 2))
            expected = Image.new("RGB", (32, 32), (9, 9, 9))
            ImageDraw.Draw(expected).rectangle((left, top, min(32, left + v), min(32, top + v)), (125, 123, 114))
            assert torch.equal(image, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    still = Policy("p", [[["Cutout", 1.0, 0.0]]], "faa", 2)
    assert (still.apply(images, still.draw(300, 32, seeded())) == images).all()


def test_the_operation_cutout_is_autoaugments(seeded):
    "A square of twice the level around one of all pixels, cut off at the border."
    for level in (0, 1, 4, 9):
        places = _draw_places(torch.full((5000, 1), 2.0 * level), 32, "authors", seeded()).flatten(0, 1)
        assert (places.amin(0).tolist(), places.amax(0).tolist()) == ([0, 0], [31, 31])
        policy = Policy("p", [[["Cutout", 1.0, level]]], "authors", 11)
        ops = policy.draw(200, 32, seeded())
        covered = policy.apply(torch.zeros(200, 3, 32, 32, dtype=torch.uint8), ops, 1)
        for image, (row, column) in zip(covered, ops.place[:, 0].tolist()):
            expected = torch.zeros(3, 32, 32, dtype=torch.uint8)
            expected[:, max(0, row - level) : row + level, max(0, column - level) : column + level] = 1
            assert torch.equal(image, expected)


def test_cutout_covers_the_mean_colour(digits, seeded):
    images = Augmented(digits.train, Policy("holes", cutout=16))
    which = torch.arange(64)
    views = images.draw(which, seeded())
    holes = _cutout(torch.zeros(64, 1, 32, 32), views.ops.hole, 16, 1).bool().expand(-1, 3, -1, -1)
    pixels = images.info.normalize(images.fetch(which, views))
    assert pixels[holes].abs().max() < 0.5 / 255 / 0.3240 + 1e-6  # half a grey level, normalised
    plain = images.info.normalize(digits.train.fetch(which, views))
    assert torch.equal(pixels[~holes], plain[~holes])


# ---- what is drawn


def test_draws_follow_the_policy(seeded):
    policy = Policy(
        "p",
        [
            [["Rotate", 0.3, 9], ["Equalize", 1, None]],
            [["Solarize", 0.0, 5], ["Color", 0.6, 2]],
            [["Posterize", 1.0, 9]],
        ],
    )
    n = 60_000
    ops = policy.draw(n, 32, seeded())
    count = {(op, place): (ops.op[:, place] == OPS.index(op)).sum().item() / n for op in OPS for place in (0, 1)}
    expected = {
        ("Rotate", 0): 0.1,
        ("Equalize", 1): 1 / 3,
        ("Color", 1): 0.2,
        ("Posterize", 0): 1 / 3,
        ("Identity", 0): 1 - 0.1 - 1 / 3,
        ("Identity", 1): 1 - 1 / 3 - 0.2,
    }
    for key, share in count.items():
        assert share == pytest.approx(expected.get(key, 0), abs=0.01)
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
    assert first.float().mean().item() == pytest.approx(0.5, abs=0.02) and first.all(
        1
    ).float().mean().item() == pytest.approx(1 / 8, abs=0.02)


def test_chances_of_numbers_of_operations(seeded):
    "PBA's way, against its authors' procedure: in random order, each with its probability, until enough have happened."
    shares = {"Invert": 1.0, "Equalize": 0.5, "AutoContrast": 0.25, "Rotate": 0.0}
    policy = Policy("p", [[[op, p, 9]] for op, p in shares.items()], picks=(0.1, 0.5, 0.4))
    random, n = np.random.default_rng(0), 20_000
    counted = {}
    for _ in range(n):
        left, happened = random.choice(3, p=[0.1, 0.5, 0.4]), ()
        for op in random.permutation(list(shares)):
            if left and random.random() < shares[op]:
                left, happened = left - 1, (*happened, str(op))
        counted[happened] = counted.get(happened, 0) + 1
    ops = policy.draw(n, 32, seeded())
    assert ops.op.shape == (n, 2)
    ours = {}
    for row in ops.op.tolist():
        happened = tuple(OPS[code] for code in row if code)
        ours[happened] = ours.get(happened, 0) + 1
    assert set(ours) == set(counted) and len(ours) == 1 + 3 + 6
    for happened, count in counted.items():
        assert abs(count - ours[happened]) < 5 * (2 * count) ** 0.5
    assert not ((ops.op[:, 0] == 0) & (ops.op[:, 1] > 0)).any()  # what happens comes first
    assert not ops.magnitude[ops.op == 0].any()


def test_published_policies_draw_evenly(seeded):
    ops = _POLICIES["randaugment"].draw(56_000, 32, seeded())
    pairs = torch.bincount(ops.op[:, 0] * 14 + ops.op[:, 1], minlength=196)
    assert len(pairs) == 196 and pairs.min() > 200 and pairs.max() < 380  # 286 expected
    assert {round(m, 4) for m in ops.magnitude[ops.op == OPS.index("Rotate")].tolist()} == {-9.0, 9.0}
    ops = _POLICIES["trivialaugment"].draw(62_000, 32, seeded())
    assert ops.op.shape == (62_000, 1) and torch.bincount(ops.op.flatten()).min() > 4000  # 4,429 expected
    turned = ops.magnitude[ops.op == OPS.index("Rotate")].abs()
    assert len(turned.unique()) == 31 and turned.mean().item() == pytest.approx(67.5, abs=3)


def test_autoaugment_is_torchvisions_list():
    for name, policy in (
        ("autoaugment_cifar10", v2.AutoAugmentPolicy.CIFAR10),
        ("autoaugment_cifar10_authors", v2.AutoAugmentPolicy.CIFAR10),
        ("autoaugment_imagenet", v2.AutoAugmentPolicy.IMAGENET),
    ):
        theirs = v2.AutoAugment(policy)._policies
        assert [[(op, p, level or 0) for op, p, level in line] for line in theirs] == [
            list(line) for line in _POLICIES[name].subpolicies
        ]


def test_the_seed_decides(digits, seeded):
    state = torch.random.get_rng_state()
    images = Augmented(digits.train.subset(100), load_policy("trivialaugment", cutout=16))
    a, b, c = ([(x, y, i) for x, y, i in images.batches(32, s)] for s in (0, 0, 1))
    assert all(torch.equal(s, t) for x, y in zip(a, b) for s, t in zip(x, y)) and not torch.equal(a[0][0], c[0][0])
    torch.manual_seed(99)
    assert torch.equal(next(images.batches(32, 0))[0], a[0][0]), "torch's global generator matters"
    torch.random.set_rng_state(state)
    views = images.draw(torch.arange(50), seeded(3))
    assert isinstance(views, _AugmentedViews)
    assert torch.equal(images.fetch(torch.arange(50), views), images.fetch(torch.arange(50), views))


def test_each_image_has_its_own_draw(digits, seeded):
    images = Augmented(digits.train, _POLICIES["trivialaugment"])
    same = torch.zeros(64, dtype=torch.int64)
    views = images.draw(same, seeded())
    assert len(views.ops.op.unique()) == 14 and len(images.fetch(same, views).flatten(1).unique(dim=0)) > 40


# ---- schedules


def test_a_schedule_follows_the_epochs(digits, seeded):
    policy = Policy(
        "s", [[["Invert", 1.0, None]]], later=[(0.5, [[["Solarize", 1.0, 9]]]), (0.75, [[["Equalize", 1.0, None]]])]
    )
    images = Augmented(digits.train.subset(20), policy, epochs=4)
    seen = []
    for epoch in range(4):
        for _ in images.batches(10, 0, epoch):
            seen.append(OPS[images.draw(torch.arange(1), seeded()).ops.op.item()])
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
    for policy in (
        *_POLICIES.values(),
        Policy(
            "ü",
            [[["Color", 0.25, 3]], [["Invert", 0, None], ["ShearX", 1, 9], ["Rotate", 1, 0]]],
            "wide",
            12,
            16,
            128,
            3,
            [(0.1, []), (0.9, [[["Color", 0.25, 11]]])],
            {"found": "by hand", "n": 3},
        ),
        Policy("faa", [[["Cutout", 0.25, 0.3333333333333333], ["Rotate", 1, 1]]], "faa", 2, fill=None),
        Policy("pba", [[["Cutout", 0.25, 10]]], "authors", 11, picks=(0.2, 0.3, 0.5)),
    ):
        again = load_policy(save_policy(policy, tmp_path / "deep" / "p.json"))
        assert again == policy and again.about == policy.about


def test_a_plain_list(tmp_path):
    (tmp_path / "turns.json").write_text('[[["Rotate", 0.7, 2], ["TranslateX", 0.3, 9]]]')
    policy = load_policy(tmp_path / "turns.json", cutout=16)
    assert policy == Policy("turns", ((("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),), cutout=16)


def test_fast_autoaugments_list(tmp_path, seeded):
    "As its authors publish it: real levels, geometric operations mirrored at random, enhancements not, and Cutout."
    lines = [
        [["Contrast", 0.83207, 0.49884], ["TranslateX", 0.418499, 0.394023]],
        [["Rotate", 1.0, 0.9], ["Cutout", 1.0, 0.61]],  # in this order, or a square at a corner leaves with it
        [["Posterize", 1.0, 0.99], ["Solarize", 1.0, 0.25]],
    ]
    (tmp_path / "faa.json").write_text(json.dumps(lines))
    policy = load_policy(tmp_path / "faa.json")
    assert (policy.space, policy.bins, policy.fill, len(policy.subpolicies)) == ("faa", 2, 0, 3)
    assert [[list(entry) for entry in line] for line in policy.subpolicies] == lines
    ops = policy.draw(30_000, 32, seeded())

    def drawn(op):
        return ops.magnitude[ops.op == OPS.index(op)]

    assert drawn("Contrast").unique().tolist() == pytest.approx([1.8 * 0.49884 + 0.1 - 1])
    assert drawn("TranslateX").unique().tolist() == [-3, 3]  # (0.9 · 0.394023 - 0.45) · 32 = -3.05
    assert drawn("Rotate").unique().tolist() == pytest.approx([-24, 24])
    assert (drawn("Rotate") > 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert drawn("Posterize").unique().tolist() == [7] and drawn("Cutout").long().unique().tolist() == [4]
    assert len(drawn("Contrast")) / 10_000 == pytest.approx(0.832, abs=0.03)
    assert len(drawn("TranslateX")) / 10_000 == pytest.approx(0.418, abs=0.03)
    squares = policy.apply(torch.zeros(30, 3, 32, 32, dtype=torch.uint8), ops[:30], 255)
    assert ((squares == 255).flatten(1).any(1) | ~(ops.op[:30] == OPS.index("Cutout")).any(1)).all()


def copies(*lines):
    return "".join(f"{line!r}\n" for line in lines)


def pba_numbers(share, level):
    return [share, level] * 30


def test_a_published_pba_schedule(tmp_path):
    """Lines of [copy, original, epochs of both, numbers of the original, of the copy]. A copy begins at the original's
    epoch, and what stands before a break in the chain belongs to others."""
    a, b, c, d = (pba_numbers(n, n) for n in (0, 2, 5, 9))
    d[2 * 29 :] = [10, 3]  # Cutout in the second half
    (tmp_path / "rcifar.txt").write_text(
        copies(
            ["5", "6", 3, 3, d, a],
            ["9", "8", 11, 12, a, b],
            ["7", "9", 35, 34, {"hp_policy": b}, {"hp_policy": c}],
            ["0", "7", 35, 34, c, b],
            ["3", "0", 90, 90, b, d],
        )
    )
    policy = load_policy(tmp_path / "rcifar.txt", cutout=16, epochs=200)
    assert (policy.name, policy.space, policy.bins, policy.cutout, policy.picks, policy.fill) == (
        "rcifar",
        "authors",
        11,
        16,
        (0.2, 0.3, 0.5),
        None,
    )
    assert [share for share, _ in policy.later] == [12 / 200, 34 / 200, 90 / 200]
    for epoch, numbers in ((0, a), (11, a), (12, b), (33, b), (34, b), (89, b), (90, d), (199, d)):
        now = policy.at(epoch / 200).subpolicies
        assert len(now) == 30 and [line[0][0] for line in now] == [*_PBA_OPS, *_PBA_OPS]
        assert [[round(10 * p), level] for ((_, p, level),) in now] == [numbers[i : i + 2] for i in range(0, 60, 2)]
    again = load_policy(save_policy(policy, tmp_path / "rcifar.json"))
    assert again == policy and again.about["epochs"] == 200


def test_wrong_pba_schedules(tmp_path):
    a, path = pba_numbers(3, 3), tmp_path / "pba.txt"
    path.write_text(copies(["1", "0", 12, 12, a, a]))
    with pytest.raises(ValueError, match=r"does not say how long its search was: load_policy\(…, epochs=200\)"):
        load_policy(path)
    with pytest.raises(ValueError, match="pba.txt is not a policy file: expected changes .* within the 10 epochs"):
        load_policy(path, epochs=10)
    for lines, message in (
        ("", "expected lines of six entries"),
        ("hello\n", "is not a policy file"),
        ("[1, 2]\n", "expected lines of six entries"),
        ("12\n13\n", "expected lines of six entries"),
        (copies(["1", "0", 2, 2, a, a[:-1]]), "expected 60 numbers .* got 59"),
        (copies(["1", "0", 2, 2, a, ["x"] * 60]), "expected lines of six entries"),
        (copies(["1", "0", 2, 2, a, [11, 3] * 30]), "expected a probability from 0 to 1, got 1.1"),
        (copies(["1", "0", 2, 2, a, [3, 11] * 30]), "expected a level, a whole number from 0 to 10, got 11"),
        (copies(["1", "0", 9, 9, a, a], ["2", "1", 5, 5, a, a]), "one after the other"),
    ):
        path.write_text(lines)
        with pytest.raises(ValueError, match=message) as error:
            load_policy(path, epochs=200)
        assert "pba.txt" in str(error.value)


WRONG = {
    "[[": "is not a policy file: Expecting",
    '"text"': "expected a list of sub-policies or the fields of a policy, got 'text'",
    "[1]": "Sub-policy 1: expected a list of .* got 1",
    "[[]]": "Sub-policy 1: expected a list",
    '[[["Rotate", 1]]]': r"Sub-policy 1, entry 1: expected \[operation, probability, level\], got \['Rotate', 1\]",
    '[[["Rotate", 1, 1]], [["Invert", 1, null], ["Rotat", 1, 1]]]': "2, entry 2: .*'Rotat'. Did you mean 'Rotate'",
    '[[[["a"], 1, 1]]]': "Sub-policy 1, entry 1: ",
    '[[["Rotate", "often", 1]]]': r"entry 1 \(Rotate\): expected a probability from 0 to 1, got 'often'",
    '[[["Rotate", -0.1, 1]]]': "expected a probability from 0 to 1, got -0.1",
    '[[["Rotate", NaN, 1]]]': "expected a probability from 0 to 1, got nan",
    '[[["Rotate", true, 1]]]': "expected a probability from 0 to 1, got True",
    '[[["Rotate", 1, null]]]': "expected a level, a whole number from 0 to 9, got None",
    '[[["Rotate", 1, 2.5]]]': "expected a level, a number from 0 to 1, got 2.5",  # real levels are Fast AutoAugment's
    '{"subpolicies": [[["Rotate", 1, 2.5]]], "bins": 10}': "expected a level, a whole number from 0 to 9, got 2.5",
    '[[["Rotate", 1, 0.5]], [["Rotate", 1, 7]]]': "expected a level, a number from 0 to 1, got 7",
    '[[["Rotate", 1, 0.5]], [["Rotate", 1, NaN]]]': "expected a level, a number from 0 to 1, got nan",
    "[" * 200_000: "is not a policy file",
    '[[["Rotate", 1, 10]]]': "from 0 to 9, got 10",
    '{"subpolicys": []}': "Unknown field 'subpolicys'. Did you mean 'subpolicies'",
    '{"subpolicies": 3}': "Expected a list of sub-policies, got int",
    '{"space": "narrow"}': "Unknown space 'narrow'",
    '{"bins": 1}': "Expected bins to be a whole number from 2 to 10000, got 1",
    '{"cutout": -1}': "Expected cutout",
    '{"fill": 256}': "Expected fill",
    '{"space": "authors"}': "Expected bins=11 in the space 'authors', whose levels go from 0 to 10, got 10",
    '{"space": "faa", "bins": 31}': "Expected bins=2 in the space 'faa'",
    '{"picks": [0.5, 0.6]}': "Expected picks to be chances of 0, 1, 2, … operations that sum to 1",
    '{"picks": [1]}': "Expected picks to be chances",
    '{"picks": ["a", 1]}': "Expected picks to be chances",
    '{"picks": [0.5, 0.5], "subpolicies": [[["Invert", 1, 0], ["Invert", 1, 0]]]}': "of one operation each",
    '{"space": ["regular"]}': "Unknown space",
    '{"later": [[0.5]]}': "Expected `later` to be a list",
    '{"later": [[0.5, []], [0.4, []]]}': "each above the last, got",
    '{"later": [[0.5, [[["Rotate", 1, 10]]]]]}': r"Sub-policy 1, entry 1 \(Rotate\)",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_files(text, tmp_path):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=WRONG[text]) as error:
        load_policy(path)
    assert "wrong.json" in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no policy file"):
        load_policy(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="Did you mean 'trivialaugment'"):
        load_policy("trivialaugmnt")
    with pytest.raises(ValueError, match="Expected picks to be a whole number from 1 to 100, got 0"):
        randaugment(0)
    with pytest.raises(ValueError, match="from 0 to 30, got 31"):
        randaugment(2, 31)


def test_levels_of_operations_without_one():
    assert _check_subpolicies([[["Invert", 1, 7]]], 10) == ((("Invert", 1.0, 7),),) and "Invert" not in _LEVELLED
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
    images = Augmented(digits.train, _POLICIES["none"])
    for (x, y, i), (a, b, c) in zip(images.batches(300, 2), digits.train.batches(300, 2)):
        assert torch.equal(x, a) and torch.equal(y, b) and torch.equal(i, c)


def test_subset_and_devices(digits):
    images = Augmented(digits.train, _POLICIES["randaugment"]).subset(30)
    assert isinstance(images, Augmented) and len(images) == 30 and images.labels.bincount().tolist() == [3] * 10
    assert isinstance(images.to("cpu").images, ArrayImages) and images.to("cpu").policy == images.policy


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu(digits):
    images, g = (
        Augmented(digits.train.to("cuda"), load_policy("trivialaugment", cutout=16)),
        torch.Generator("cuda").manual_seed(0),
    )
    which = torch.arange(256)
    views = images.draw(which, g)
    pixels = images.fetch(which, views)
    on_cpu = Augmented(digits.train, images.policy).fetch(
        which, _AugmentedViews(views.crop.cpu(), views.flip.cpu(), views.ops.to("cpu"))
    )
    assert pixels.device.type == "cuda" and (pixels.cpu() != on_cpu).float().mean() < 1e-3
    policy = Policy("p", [[["Cutout", 1.0, 9]], [["ShearX", 1.0, 5]]], "authors", 11, picks=(0.2, 0.3, 0.5), fill=None)
    x, ops, colour = digits.train.fetch(which), policy.draw(256, 32, g), torch.tensor([9, 99, 200])
    assert ops.op.device.type == "cuda" and len(ops.op.unique()) == 3
    there, here = policy.apply(x.cuda(), ops, colour.cuda()).cpu(), policy.apply(x, ops.to("cpu"), colour)
    assert (there != here).float().mean() < 1e-3


def test_files_are_plain_json(tmp_path):
    content = json.loads(save_policy(_POLICIES["autoaugment_cifar10"], tmp_path / "a.json").read_text())
    assert content["subpolicies"][1] == [["Rotate", 0.7, 2], ["TranslateX", 0.3, 9]] and content["bins"] == 10
