"""KD and the student's loss against torch, scipy, the benchmark's value, and the scale of the gradient."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr, softmax
from supermix.losses import kd_loss, student_loss
from supermix.recipes import METHODS, Terms


def random(seed, *shape): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


zs, zt = random(1, 8, 10), random(2, 8, 10)


def test_the_benchmarks_value():
    values = json.loads((Path(__file__).parent / "data" / "crd_losses.json").read_text())["values"]
    assert kd_loss(zs, zt, tau=4).item() == pytest.approx(values["kd(zs, zt, tau=4)"], rel=1e-12)


@given(B=st.integers(1, 6), N=st.integers(1, 12), tau=st.sampled_from([0.5, 1.0, 4.0, 20.0]),
       scale=st.sampled_from([0.0, 1.0, 50.0]), seed=st.integers(0, 1000))
def test_torchs_and_scipys_divergence(B, N, tau, scale, seed):
    s, t = scale * random(seed, B, N), scale * random(seed + 1, B, N)
    scipys = tau ** 2 * rel_entr(softmax(t.numpy() / tau, 1), softmax(s.numpy() / tau, 1)).sum() / B
    torch.testing.assert_close(kd_loss(s, t, tau), KL(s, t, tau), rtol=1e-9, atol=1e-9)
    assert kd_loss(s, t, tau).item() == pytest.approx(scipys, rel=1e-6, abs=1e-9)
    assert kd_loss(t + 7, t, tau).abs() < 1e-9  # a constant added to all logits changes no probability


@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_sure_logits_give_a_finite_loss_and_gradient(scale):
    s, t = (scale * zs).float().requires_grad_(), (scale * zt).float()
    loss = kd_loss(s, t)
    gradient, = torch.autograd.grad(loss, s)
    a, b = s.detach().numpy() / 4, t.numpy() / 4
    by_scipy = 16 * (softmax(b, 1) * (log_softmax(b, 1) - log_softmax(a, 1))).sum() / 8
    assert loss.item() == pytest.approx(float(by_scipy), rel=1e-4) and torch.isfinite(gradient).all()


def test_tau_squared_keeps_the_gradients_scale():
    def gradient(tau): return torch.autograd.grad(kd_loss(z := zs.clone().requires_grad_(), zt, tau), z)[0]
    centred = (zs - zs.mean(1, keepdim=True)) - (zt - zt.mean(1, keepdim=True))
    torch.testing.assert_close(gradient(1e4), centred / 10 / 8, rtol=1e-3, atol=1e-6)  # Hinton et al. 2015, equation 4
    sizes = [gradient(tau).norm() for tau in (1, 4, 16, 64)]
    assert max(sizes) / min(sizes) < 2.5  # without τ² they would fall by 4096


def KL(s, t, tau=4): return tau ** 2 * F.kl_div((s / tau).log_softmax(1), (t / tau).softmax(1), reduction="batchmean")


CE = F.cross_entropy
y, ms, mt = torch.arange(8), random(3, 5, 10), random(4, 5, 10)
hard = CE(ms, mt.argmax(1))
EXPECTED = {
    "alone": CE(zs, y), "kd": 0.1 * CE(zs, y) + 0.9 * KL(zs, zt), "hard": CE(zs, y) + hard,
    "soft": 0.1 * CE(zs, y) + 0.9 * KL(zs, zt) + 0.9 * KL(ms, mt),
    "hard_authors": 2.0 * (CE(zs, y) + hard), "soft_authors": 1.8 * (CE(zs, y) + hard) + 0.2 * KL(zs, zt),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_terms_of_each_method(method):
    torch.testing.assert_close(student_loss(METHODS[method], zs, y, zt, ms, mt), EXPECTED[method])


def test_the_temperature_of_both_kl_terms():
    loss = student_loss(Terms(kd=2.0, mixed_kd=3.0, tau=2.0), zs, y, zt, ms, mt)
    torch.testing.assert_close(loss, 2 * KL(zs, zt, 2) + 3 * KL(ms, mt, 2))
