"""Partners, weights, MixUp and CutMix: torchvision's with the same draw, and labels that agree with the pixels."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from supermix.mixing.masks import areas, mix, soft_labels
from supermix.mixing.mixers import CutMix, CutMixInside, Draw, MixUp, box_masks, constant_masks, draw_lam, draw_partners
from supermix.mixing.solver import SuperMix
from torch.utils.data import DataLoader
from torchvision.transforms import v2


def torchvisions(transform, seed, images, labels):
    "What torchvision makes of a batch with a seed, and the λ that it drew."
    torch.manual_seed(seed)
    lam = float(transform._dist.sample(()))  # the first draw of both its transforms
    torch.manual_seed(seed)
    return *transform(images, labels), lam


def neighbours(images, labels, lam):
    "Sets of each image and the one before it, as torchvision pairs them."
    B = len(images)
    partners = torch.stack([torch.arange(B), torch.arange(B).roll(1)], 1)
    return images[partners], Draw(partners, labels[partners], torch.tensor([[lam, 1 - lam]]).repeat(B, 1), 10)


@given(seed=st.integers(0, 10**6), B=st.integers(2, 5), H=st.integers(1, 24), W=st.integers(1, 24))
def test_torchvisions_mixup_with_the_same_draw(seed, B, H, W):
    images, labels = torch.randn(B, 3, H, W), torch.arange(B)
    their_images, their_labels, lam = torchvisions(v2.MixUp(num_classes=10), seed, images, labels)
    ours = MixUp(10, alpha=1.0)
    sets, draw = neighbours(images, labels, lam)
    masks = ours.choose_masks(sets, draw)
    torch.testing.assert_close(mix(sets, masks), their_images)
    torch.testing.assert_close(soft_labels(draw.classes, ours.weights(masks, draw), 10), their_labels)


@given(seed=st.integers(0, 10**6), B=st.integers(2, 5), H=st.integers(1, 24), W=st.integers(1, 24))
def test_torchvisions_cutmix_with_the_same_draw(seed, B, H, W):
    images, labels = torch.randn(B, 3, H, W), torch.arange(B)
    their_images, their_labels, lam = torchvisions(v2.CutMix(num_classes=10), seed, images, labels)
    torch.manual_seed(seed)
    v2.CutMix(num_classes=10)._dist.sample(())
    column, row = int(torch.randint(W, ())), int(torch.randint(H, ()))  # its next two draws: the box's centre
    sets, draw = neighbours(images, labels, lam)
    masks = box_masks(draw.lam, (H, W), torch.tensor([[row, column]]).expand(B, 2))
    torch.testing.assert_close(mix(sets, masks), their_images)
    torch.testing.assert_close(soft_labels(draw.classes, CutMix(10).weights(masks, draw), 10), their_labels)


@pytest.mark.parametrize("mixer", [MixUp(10), MixUp(10, alpha=1.0), CutMix(10), CutMix(10, alpha=0.3)])
def test_the_label_is_what_the_pixels_hold(mixer, seeded):
    labels = torch.arange(10)  # each image is filled with its class, so that a mixed image's mean is its label's
    images = labels[:, None, None, None].expand(-1, 3, 12, 17).double()
    mixed, targets = mixer(images, labels, seeded())
    assert mixed.shape == images.shape and mixed.dtype == images.dtype
    torch.testing.assert_close(targets.double() @ labels.double(), mixed.mean((1, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(targets.sum(1), torch.ones(10))
    assert not torch.equal(mixed, images)


@given(classes=st.lists(st.integers(0, 6), min_size=5, max_size=30), k=st.integers(2, 5), seed=st.integers(0, 1000))
def test_partners_have_different_classes(classes, k, seed):
    classes, g = torch.tensor(classes), torch.Generator().manual_seed(seed)
    if len(classes.unique()) < k:
        with pytest.raises(ValueError, match=f"at least k = {k} different classes .* got {len(classes.unique())}"):
            draw_partners(classes, k, g)
    else:
        partners = draw_partners(classes, k, g)
        assert partners.shape == (len(classes), k) and torch.equal(partners[:, 0], torch.arange(len(classes)))
        assert all(len(row.unique()) == k for row in classes[partners])


@pytest.mark.parametrize("k, alpha", [(2, 1.0), (2, 3.0), (3, 3.0), (5, 0.3)])
def test_weights_follow_a_dirichlet_distribution(k, alpha, seeded):
    lam = draw_lam(20_000, k, alpha, seeded())
    torch.testing.assert_close(lam.sum(1), torch.ones(20_000))
    marginal = stats.beta(alpha, (k - 1) * alpha)
    for i in range(k):
        assert stats.kstest(lam[:, i].double().numpy(), marginal.cdf).pvalue > 1e-3


@pytest.mark.parametrize("which", ["MixUp", "CutMix", "SuperMix"])
def test_a_generator_decides_everything(which, teacher, digits, seeded):
    mixers = {"MixUp": MixUp(10, alpha=1.0), "CutMix": CutMix(10, alpha=1.0), "SuperMix": SuperMix(teacher, max_iter=2)}
    mixer, (images, labels) = mixers[which], digits.test[:8]
    state = torch.get_rng_state()
    (a, ya), (b, yb), (c, yc) = (mixer(images, labels, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and torch.equal(ya, yb) and not torch.equal(a, c) and not torch.equal(ya, yc)
    assert torch.equal(torch.get_rng_state(), state)  # torch's global generator was not touched
    torch.manual_seed(0)
    d, _ = mixer(images, labels)  # without one it is the global generator that decides
    torch.manual_seed(0)
    assert torch.equal(mixer((images, labels))[0], d) and not torch.equal(mixer(images, labels)[0], d)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_collate_function(workers, digits):
    loader = DataLoader(digits.test.subset(20), batch_size=10, num_workers=workers, collate_fn=CutMix(10, alpha=1.0))
    for images, targets in loader:
        assert images.shape == (10, 3, 32, 32) and targets.shape == (10, 10)
        torch.testing.assert_close(targets.sum(1), torch.ones(10))


images, labels = torch.zeros(4, 3, 8, 8), torch.arange(4)
BAD = {
    "no labels": ((images,), "Expected labels as class indices"),
    "soft labels of fewer classes": ((images, torch.eye(4)), "soft labels of the mixer's 10 classes, got 4"),
    "soft labels that do not sum to 1": ((images, torch.ones(4, 10)), "whose rows sum to 1, got sums from 10 to 10"),
    "soft labels below 0": ((images, 2 * torch.eye(4, 10) - torch.eye(4, 10).roll(1, 1)), "of 0 or more.*smallest -1"),
    "soft labels of fewer images": ((images, torch.eye(3, 10)), r"\(4, N\), got torch.float32 \(3, 10\)"),
    "floats": ((images, labels.float()), r"class indices \(4,\), one per image, .*got torch.float32 \(4,\)"),
    "too few labels": ((images, labels[:3]), r"class indices \(4,\), .* got torch.int64 \(3,\)"),
    "a list of labels": ((images, [0, 1, 2, 3]), r"class indices \(4,\), .* got list"),
    "a label too large": ((images, labels + 7), "10"),
    "a label below 0": ((images, labels - 1), "-1"),
    "one image": ((images[0], labels), r"Expected images \(B, C, H, W\), got shape \(3, 8, 8\)"),
    "bytes": ((images.byte(), labels), "Expected normalised float images, got torch.uint8"),
    "an array": ((images.numpy(), labels), r"Expected a tensor of images \(B, C, H, W\), got ndarray"),
    "infinity": ((images.index_fill(0, labels[1:3], float("inf")), labels), r"infinity in 2 of 4: at index \[1, 2\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        MixUp(10)(*arguments)


@pytest.mark.parametrize("mixer", [MixUp, CutMix])
@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_an_alpha_that_no_dirichlet_distribution_has(mixer, alpha):
    with pytest.raises(ValueError, match=f"alpha.* got {alpha}"):
        mixer(10, alpha=alpha)


def test_what_makes_no_batch_is_said(digits):
    x, labels = digits.train[:4]
    with pytest.raises(ValueError, match="samples of equal shape"):
        MixUp(10)((x[0], labels))
    with pytest.raises(ValueError, match=r"samples \(image, label\), got 3"):
        MixUp(10)([(i, 1, 2) for i in x])
    with pytest.raises(ValueError, match="alpha of at least 0.01"):
        draw_lam(4, 2, 0.001)


# ---- batches that cannot be mixed


class Quick(SuperMix):
    "SuperMix without its search: what is tested stands before it."

    def choose_masks(self, sets, draw, generator=None):
        return constant_masks(draw.lam, sets.shape[-2:])


def of_class(digits, label, n):
    images, labels = digits.train[:400]
    return images[labels == label][:n], labels[labels == label][:n]


@pytest.mark.parametrize("n", [1, 5, 17])
def test_a_batch_of_one_class_comes_back_as_it_is(n, teacher, digits):
    images, labels = of_class(digits, 5, n)
    mixer = SuperMix(teacher, max_iter=2)
    with pytest.warns(UserWarning, match=f"{n} images of 1 classes cannot be mixed in sets of 2.*drop_last=True"):
        mixed, soft = mixer(images, labels)
    assert torch.equal(mixed, images) and torch.equal(soft, torch.eye(10)[labels])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        mixed, soft = mixer(images, torch.eye(10)[labels])
    assert torch.equal(mixed, images) and torch.equal(soft, torch.eye(10)[labels])


@pytest.mark.parametrize("make", [MixUp, CutMix, CutMixInside])
def test_a_single_image_comes_back_as_it_is(make, digits):
    images, labels = digits.test[:1]
    with pytest.warns(UserWarning, match="1 images of 1 classes cannot be mixed in sets of 2.*drop_last=True"):
        mixed, soft = make(10)(images, labels)
    assert torch.equal(mixed, images) and torch.equal(soft, torch.eye(10)[labels])
    with pytest.raises(ValueError, match="labels from 0 to 9, got 12 to 12"):
        make(10)(images, torch.tensor([12]))


def test_a_single_image_without_a_label_has_the_teachers(teacher, digits):
    images, _ = digits.test[:1]
    with pytest.warns(UserWarning, match="cannot be mixed"):
        mixed, soft = SuperMix(teacher)(images)
    with torch.no_grad():
        assert torch.equal(soft, torch.eye(10)[teacher(images).argmax(1)])
    assert torch.equal(mixed, images)


@pytest.mark.filterwarnings("ignore:A batch of")
def test_epochs_of_small_batches_of_two_classes_do_not_end_early(teacher, digits, seeded):
    "Two classes in batches of 4: some batches have one class only, and some a single image that the teacher misreads."
    images, labels = digits.train[:]
    few = (labels == 3) | (labels == 9)
    data = torch.utils.data.TensorDataset(images[few], labels[few])
    mixer, seen, alone = Quick(teacher), 0, 0
    for x, y in DataLoader(data, batch_size=4, shuffle=True, generator=seeded()):
        mixed, soft = mixer(x, y)
        seen, alone = seen + len(mixed), alone + torch.equal(mixed, x)
    assert seen == len(data) and 0 < alone < len(data) / 8


def blind(x):
    return torch.tensor([[2.0, 1.0, 0.0]]).repeat(len(x), 1) + 0 * x.mean((1, 2, 3))[:, None]


@pytest.mark.filterwarnings("ignore:A batch of")
def test_a_teacher_that_sees_one_class_everywhere_is_still_an_error(digits):
    images, labels = digits.train[:64]
    with pytest.raises(ValueError, match="sees at least k = 2 different classes in the 64 images, got 1"):
        SuperMix(blind)(images, labels % 3)
    with pytest.raises(ValueError, match="sees at least k = 2"):
        SuperMix(blind)(images[:8])  # nothing else is known
    with pytest.raises(ValueError, match="sees at least k = 2"):
        SuperMix(blind)(images[:40], labels[:40] % 2)
    mixer = SuperMix(blind)
    for _ in range(8):
        mixer(images[:4], torch.tensor([0, 1, 2, 0]))  # it may happen in a small batch
    with pytest.raises(ValueError, match="sees at least k = 2"):
        mixer(images[:4], torch.tensor([0, 1, 2, 0]))


def test_a_teacher_with_other_names_for_its_classes_is_told(teacher, digits):
    "After 300 images with their labels, and once."
    images, labels = digits.train[:320]
    for tutor, times in ((lambda x: teacher(x).flip(1), [0, 0, 0, 1, 0]), (teacher, [0] * 5)):
        mixer, told = Quick(tutor), []
        for x, y in (*zip(images.split(80), labels.split(80)), (images[:80], labels[:80])):
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                mixer(x, y)
            told.append(sum("its classes are in another order" in str(w.message) for w in heard))
        assert told == times


# ---- labels that are soft already


@pytest.mark.parametrize("make", [MixUp, CutMix, CutMixInside])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
def test_one_hot_labels_give_what_class_indices_give(make, dtype, digits, seeded):
    images, labels = digits.test[:8]
    (a, hard), (b, soft) = (
        make(10, alpha=1.0)(images, y, generator=seeded()) for y in (labels, torch.eye(10)[labels].to(dtype))
    )
    assert torch.equal(a, b)
    torch.testing.assert_close(soft, hard)


def test_soft_labels_are_mixed_as_torchvision_mixes_them(digits):
    images, labels = digits.test[:8]
    smooth = 0.9 * torch.eye(10)[labels] + 0.01
    torch.manual_seed(0)
    _, theirs = v2.MixUp(num_classes=10)(images, smooth)
    torch.manual_seed(0)
    lam = float(v2.MixUp(num_classes=10)._dist.sample(()))

    class Neighbours(MixUp):  # torchvision's pairs and λ
        def draw(self, images, labels, generator=None):
            return neighbours(images, labels, lam)[1]

    torch.testing.assert_close(Neighbours(10)(images, smooth)[1], theirs)
    torch.testing.assert_close(theirs.sum(1), torch.ones(8))


def test_supermix_labels_by_the_teachers_classes_whatever_comes_in(teacher, digits, seeded):
    images, labels = digits.test[:8]
    mixer = SuperMix(teacher, max_iter=2)
    (_, hard), (_, soft) = (mixer(images, y, generator=seeded()) for y in (labels, torch.eye(10)[labels]))
    assert torch.equal(hard, soft)


def test_a_collate_function_takes_samples_with_one_hot_labels(digits):
    samples = [(x, torch.eye(10)[y]) for x, y in (digits.test[i] for i in range(4))]
    mixed, soft = MixUp(10)(samples)
    assert mixed.shape == (4, 3, 32, 32) and torch.equal(soft.sort(1).values[:, -2:].sum(1), torch.ones(4))


# ---- the box of the SuperMix authors' comparison


def test_a_box_inside_has_one_area_and_all_places(seeded):
    draw = Draw(torch.zeros(4000, 2).long(), torch.zeros(4000, 2).long(), torch.full((4000, 2), 0.5), 10)
    sets = torch.zeros(1, 2, 1, 32, 32).expand(4000, -1, -1, -1, -1)
    masks = CutMixInside(10).choose_masks(sets, draw, seeded())
    assert torch.equal(areas(masks)[:, 1], torch.full((4000,), 22 * 22 / 1024))  # the authors' 22×22, always whole
    rows, columns = (masks[:, 1].amax(axis) for axis in (2, 1))
    for seen in (rows, columns):
        assert torch.equal(seen.sum(1), torch.full((4000,), 22.0))
        first = seen.argmax(1).bincount()
        assert len(first) == 11 and stats.chisquare(first.numpy()).pvalue > 1e-3  # corners 0 … 10, each as likely


@given(lam=st.floats(0.0, 1.0), H=st.integers(1, 40), W=st.integers(1, 40), seed=st.integers(0, 1000))
def test_a_box_inside_is_the_middle_box_moved(lam, H, W, seed):
    draw = Draw(torch.zeros(3, 2).long(), torch.zeros(3, 2).long(), torch.tensor([[1 - lam, lam]] * 3), 10)
    masks = CutMixInside(10).choose_masks(torch.zeros(3, 2, 1, H, W), draw, torch.Generator().manual_seed(seed))
    middle = box_masks(draw.lam, (H, W), torch.tensor([[H // 2, W // 2]] * 3))
    assert torch.equal(areas(masks), areas(middle))
    assert torch.equal(masks.sum(1), torch.ones(3, H, W))
