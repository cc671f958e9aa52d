"""Masks, mixed images and soft labels: the invariants of equations (1) to (3), for any shape and value."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from supermix.mixing.masks import areas, masks_from_theta, mix, show_mixes, soft_labels, sparsity

extremes = st.sampled_from([0.0, 1e-30, 1.0, 30.0, 1e4, 1e30])


@st.composite
def thetas(draw, dtypes=(torch.float32, torch.float64)):
    "θ of any shape with entries of any size, and the size of the images."
    B, k, w = draw(st.integers(1, 3)), draw(st.integers(2, 5)), draw(st.integers(1, 8))
    g, dtype = torch.Generator().manual_seed(draw(st.integers(0, 1000))), draw(st.sampled_from(dtypes))
    theta = draw(extremes) * torch.randn(B, k, w, w, generator=g, dtype=torch.float64)
    return theta.to(dtype), (draw(st.integers(w, 20)), draw(st.integers(w, 20)))


@given(thetas())
def test_masks_are_shares(problem):
    theta, size = problem
    masks = masks_from_theta(theta, size)
    assert masks.shape == (*theta.shape[:2], *size) and masks.dtype == theta.dtype
    assert masks.min() >= 0 and masks.max() <= 1
    torch.testing.assert_close(masks.sum(1), torch.ones_like(masks[:, 0]))
    torch.testing.assert_close(areas(masks).sum(1), torch.ones_like(masks[:, 0, 0, 0]))
    bound = (theta.shape[1] - 1) / theta.shape[1] ** 2
    assert ((sparsity(masks) >= 0) & (sparsity(masks) <= bound + 1e-6)).all()


@given(thetas(dtypes=(torch.float64,)), st.randoms(use_true_random=False))
def test_permuting_the_sources_permutes_the_masks(problem, random):
    theta, size = problem
    order = random.sample(range(theta.shape[1]), theta.shape[1])
    torch.testing.assert_close(masks_from_theta(theta[:, order], size), masks_from_theta(theta, size)[:, order])


@pytest.mark.parametrize("w, factor", [(1, 6), (3, 4), (8, 2)])
def test_the_formula_with_scipys_bilinear_zoom(w, factor):
    theta = 3 * torch.randn(2, 3, w, w, dtype=torch.float64)
    large = ndimage.zoom(theta.numpy(), (1, 1, factor, factor), order=1, mode="nearest", grid_mode=True)
    s = torch.from_numpy(large).sigmoid()
    torch.testing.assert_close(masks_from_theta(theta, (w * factor,) * 2), s / s.sum(1, keepdim=True))


@given(thetas(), st.integers(1, 4), extremes)
def test_a_mixed_pixel_is_inside_the_range_of_its_sources(problem, channels, scale):
    theta, size = problem
    sets = scale * torch.randn(*theta.shape[:2], channels, *size)
    mixed = mix(sets, masks_from_theta(theta, size))
    assert mixed.shape == (len(theta), channels, *size) and mixed.dtype == sets.dtype
    assert ((mixed >= sets.amin(1) - 1e-6 * scale) & (mixed <= sets.amax(1) + 1e-6 * scale)).all()


def test_binary_masks_copy_pixels():
    owner = torch.randint(3, (2, 5, 6))
    masks, sets = F.one_hot(owner, 3).movedim(-1, 1).float(), torch.randn(2, 3, 4, 5, 6)
    copied = sets.gather(1, owner[:, None, None].expand(2, 1, 4, 5, 6))[:, 0]
    assert torch.equal(mix(sets, masks), copied) and sparsity(masks).tolist() == [0, 0]


@given(k=st.integers(2, 5), N=st.integers(1, 9), seed=st.integers(0, 1000))
def test_soft_labels_are_weighted_one_hots(k, N, seed):
    g = torch.Generator().manual_seed(seed)
    classes, lam = torch.randint(N, (4, k), generator=g), torch.rand(4, k, generator=g).softmax(1)
    target = soft_labels(classes, lam, N)  # a class that comes twice gets the sum
    torch.testing.assert_close(target, (F.one_hot(classes, N) * lam[..., None]).sum(1))


@pytest.mark.parametrize("k, titles", [(2, None), (3, ["one", "two"])])
def test_the_picture_has_a_panel_for_each_source_mask_and_mix(k, titles, digits):
    import matplotlib.pyplot as plt

    figure = show_mixes(digits.info, torch.randn(2, k, 3, 8, 8), torch.full((2, k, 8, 8), 1 / k), titles, "a mixer")
    assert len(figure.axes) == 2 * (2 * k + 1) and all(len(axes.images) == 1 for axes in figure.axes)
    plt.close(figure)
