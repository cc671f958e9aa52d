"""The Gaussian filter against scipy's and torchvision's."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import ndimage
from supermix.mixing.smoothing import gaussian_kernel, smooth
from torchvision.transforms.v2 import functional as VF

sigmas = st.floats(0, 6, allow_subnormal=False)


@given(sigma=sigmas, h=st.integers(1, 20), w=st.integers(1, 20), seed=st.integers(0, 1000))
@example(sigma=1e-200, h=3, w=3, seed=0)  # its square is 0
@example(sigma=2.0, h=16, w=16, seed=0)  # an even 5σ: the filter must not shift the map
@example(sigma=6.0, h=1, w=2, seed=0)  # all taps but a few fall outside
def test_agrees_with_scipy(sigma, h, w, seed):
    maps = torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    t = np.arange(-int(5 * sigma / 2), int(5 * sigma / 2) + 1)
    taps = np.exp(-((t / sigma) ** 2) / 2) if sigma else np.ones(1)
    theirs = maps.numpy()
    for axis in (2, 3):
        theirs = ndimage.correlate1d(theirs, taps / taps.sum(), axis, mode="constant")
    np.testing.assert_allclose(smooth(maps, sigma), theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 3.3])
def test_agrees_with_torchvision_away_from_the_border(sigma):
    size = len(gaussian_kernel(sigma))
    maps, inner = torch.randn(2, 3, 40, 30), (..., slice(size // 2, 40 - size // 2), slice(size // 2, 30 - size // 2))
    theirs = VF.gaussian_blur(maps, [size, size], [sigma, sigma])
    torch.testing.assert_close(smooth(maps, sigma)[inner], theirs[inner], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sigma, taps", [(0, 1), (0.39, 1), (0.4, 3), (1, 5), (2, 11), (3, 15)])
def test_the_kernel_has_an_odd_number_of_taps_that_sum_to_one(sigma, taps):
    kernel = gaussian_kernel(sigma, torch.float64)
    assert len(kernel) == taps and torch.equal(kernel, kernel.flip(0))
    assert abs(kernel.sum() - 1) < 1e-12 and kernel.argmax() == taps // 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sigma_zero_is_the_identity_in_every_dtype(dtype):
    maps = torch.randn(2, 5, 4).to(dtype)
    assert torch.equal(smooth(maps, 0), maps) and smooth(maps, 1.0).dtype == dtype


def test_autocast_does_not_round_the_filter():
    maps = torch.randn(2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = smooth(maps, 1.0)
    assert torch.equal(inside, smooth(maps, 1.0))


@pytest.mark.parametrize("sigma", [-1, float("nan"), float("inf")])
def test_a_sigma_that_is_none(sigma):
    with pytest.raises(ValueError, match=f"Expected sigma of 0 or more, got {sigma}"):
        gaussian_kernel(sigma)
