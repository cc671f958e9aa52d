"""Partners, weights, MixUp and CutMix: torchvision's with the same draw, and labels that agree with the pixels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from supermix.masks import mix, soft_labels
from supermix.mixers import CutMix, Draw, MixUp, box_masks, draw_lam, draw_partners
from supermix.mixing import SuperMix
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
    for i in range(k): assert stats.kstest(lam[:, i].double().numpy(), marginal.cdf).pvalue > 1e-3


@pytest.mark.parametrize("which", ["MixUp", "CutMix", "SuperMix"])
def test_a_generator_decides_everything(which, teacher, digits, seeded):
    mixers = {"MixUp": MixUp(10, alpha=1.0), "CutMix": CutMix(10, alpha=1.0), "SuperMix": SuperMix(teacher, max_iter=2)}
    mixer, (images, labels) = mixers[which], digits.test[:8]
    state = torch.get_rng_state()
    (a, ya), (b, yb), (c, yc) = (mixer(images, labels, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and torch.equal(ya, yb) and not torch.equal(a, c) and not torch.equal(ya, yc)
    assert torch.equal(torch.get_rng_state(), state)  # torch's global generator was not touched
    torch.manual_seed(0)
    d, _ = mixer(images, labels)                      # without one it is the global generator that decides
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
    "soft labels": ((images, torch.eye(4)), r"class indices \(4,\), one an image, got torch.float32 \(4, 4\)"),
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
    with pytest.raises(ValueError, match=message): MixUp(10)(*arguments)


@pytest.mark.parametrize("mixer", [MixUp, CutMix])
@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_an_alpha_that_no_dirichlet_distribution_has(mixer, alpha):
    with pytest.raises(ValueError, match=f"alpha.* got {alpha}"): mixer(10, alpha=alpha)


def test_what_makes_no_batch_is_said(digits):
    x, labels = digits.train[:4]
    with pytest.raises(ValueError, match="samples that are alike"): MixUp(10)((x[0], labels))
    with pytest.raises(ValueError, match=r"samples \(image, label\), got 3"): MixUp(10)([(i, 1, 2) for i in x])
    with pytest.raises(ValueError, match="alpha of at least 0.01"): draw_lam(4, 2, 0.001)
