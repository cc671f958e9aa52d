"""The losses of logits and the student's loss against torch, scipy, plain loops and the benchmark's value; the form of
terms."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr, softmax
from supermix.distillation.contrast import TERMS
from supermix.distillation.losses import (
    LOGIT_LOSSES,
    Outputs,
    Term,
    _correlation,
    _standardize,
    dist_loss,
    dkd_loss,
    kd_loss,
    outputs_of,
    stage_pairs,
    std_loss,
    student_loss,
    vector_pair,
)
from supermix.recipes import METHODS, _FEATURES, Terms
from supermix.zoo import create


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


zs, zt = random(1, 8, 10), random(2, 8, 10)


def test_a_constant_row_has_no_correlation_and_no_gradient():
    a = torch.full((3, 7), 0.1)
    a[2] = torch.randn(7, generator=torch.Generator().manual_seed(0))
    b = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    b[1] = 0.3
    a.requires_grad_()
    r = _correlation(a, b)
    assert r[:2].tolist() == [0, 0]
    assert r[2].item() == pytest.approx(torch.corrcoef(torch.stack([a[2], b[2]])).detach()[0, 1].item())
    (gradient,) = torch.autograd.grad(r.sum(), a)
    assert not gradient[:2].any() and gradient[2].any()


def test_the_benchmarks_value():
    values = json.loads((Path(__file__).parent / "data" / "crd_losses.json").read_text())["values"]
    assert kd_loss(zs, zt, tau=4).item() == pytest.approx(values["kd(zs, zt, tau=4)"], rel=1e-12)


@given(
    B=st.integers(1, 6),
    N=st.integers(1, 12),
    tau=st.sampled_from([0.5, 1.0, 4.0, 20.0]),
    scale=st.sampled_from([0.0, 1.0, 50.0]),
    seed=st.integers(0, 1000),
)
def test_torchs_and_scipys_divergence(B, N, tau, scale, seed):
    s, t = scale * random(seed, B, N), scale * random(seed + 1, B, N)
    scipys = tau**2 * rel_entr(softmax(t.numpy() / tau, 1), softmax(s.numpy() / tau, 1)).sum() / B
    torch.testing.assert_close(kd_loss(s, t, tau), KL(s, t, tau), rtol=1e-9, atol=1e-9)
    assert kd_loss(s, t, tau).item() == pytest.approx(scipys, rel=1e-6, abs=1e-9)
    assert kd_loss(t + 7, t, tau).abs() < 1e-9  # a constant added to all logits changes no probability


@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_sure_logits_give_a_finite_loss_and_gradient(scale):
    s, t = (scale * zs).float().requires_grad_(), (scale * zt).float()
    loss = kd_loss(s, t)
    (gradient,) = torch.autograd.grad(loss, s)
    a, b = s.detach().numpy() / 4, t.numpy() / 4
    by_scipy = 16 * (softmax(b, 1) * (log_softmax(b, 1) - log_softmax(a, 1))).sum() / 8
    assert loss.item() == pytest.approx(float(by_scipy), rel=1e-4) and torch.isfinite(gradient).all()


def test_tau_squared_keeps_the_gradients_scale():
    def gradient(tau):
        return torch.autograd.grad(kd_loss(z := zs.clone().requires_grad_(), zt, tau), z)[0]

    centred = (zs - zs.mean(1, keepdim=True)) - (zt - zt.mean(1, keepdim=True))
    torch.testing.assert_close(gradient(1e4), centred / 10 / 8, rtol=1e-3, atol=1e-6)  # Hinton et al. 2015, equation 4
    sizes = [gradient(tau).norm() for tau in (1, 4, 16, 64)]
    assert max(sizes) / min(sizes) < 2.5  # without τ² they would fall by 4096


def KL(s, t, tau=4):
    return tau**2 * F.kl_div((s / tau).log_softmax(1), (t / tau).softmax(1), reduction="batchmean")


CE = F.cross_entropy
y, ms, mt = torch.arange(8), random(3, 5, 10), random(4, 5, 10)
hard = CE(ms, mt.argmax(1))
EXPECTED = {
    ("alone", False): CE(zs, y),
    ("kd", False): 0.1 * CE(zs, y) + 0.9 * KL(zs, zt),
    ("alone", True): CE(zs, y) + hard,
    ("kd", True): 0.1 * CE(zs, y) + 0.9 * KL(zs, zt) + 0.9 * KL(ms, mt),
    ("at", False): CE(zs, y),
    ("at", True): CE(zs, y) + hard,
    ("crd_kd", True): CE(zs, y) + KL(zs, zt) + KL(ms, mt),
    ("std", False): 0.1 * CE(zs, y) + 9 * std_loss(zs, zt, 2.0),
    ("dist", True): CE(zs, y) + dist_loss(zs, zt, 4.0) + dist_loss(ms, mt, 4.0),
    ("dkd", True): CE(zs, y) + dkd_loss(zs, zt, y, 4.0) + dkd_loss(ms, mt, mt.argmax(1), 4.0),
    ("authors", True): 2.0 * (CE(zs, y) + hard),
    ("authors_kd", True): 1.8 * (CE(zs, y) + hard) + 0.2 * KL(zs, zt),
}


@pytest.mark.parametrize("method, mixed", EXPECTED)
def test_the_terms_of_each_method(method, mixed):
    terms = METHODS[method].mixed() if mixed else METHODS[method]
    torch.testing.assert_close(student_loss(terms, zs, y, zt, ms, mt), EXPECTED[method, mixed])


def test_every_feature_method_has_its_term():
    named = {name for terms in METHODS.values() for name, _ in terms.features}
    assert named | {"ab_free"} == set(TERMS) == set(_FEATURES)


def test_the_temperature_of_both_kl_terms():
    loss = student_loss(Terms(kd=2.0, mixed_kd=3.0, tau=2.0), zs, y, zt, ms, mt)
    torch.testing.assert_close(loss, 2 * KL(zs, zt, 2) + 3 * KL(ms, mt, 2))


def softmaxed(row, tau):
    e = [math.exp(v / tau) for v in row]
    return [v / sum(e) for v in e]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def pearson(a, b):
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    cov = sum((x - ma) * (y - mb) for x, y in zip(a, b))
    return cov / math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))


@given(B=st.integers(1, 4), N=st.integers(2, 6), tau=st.sampled_from([1.0, 4.0]), seed=st.integers(0, 1000))
def test_dkd_in_plain_loops(B, N, tau, seed):
    s, t, target = random(seed, B, N), random(seed + 1, B, N), torch.arange(B) % N
    expected = 0
    for zs, zt, y in zip(s.tolist(), t.tolist(), target.tolist()):
        p, q = softmaxed(zt, tau), softmaxed(zs, tau)
        tckd = divergence([p[y], 1 - p[y]], [q[y], 1 - q[y]])
        rest = [n for n in range(N) if n != y]
        nckd = divergence([p[n] / (1 - p[y]) for n in rest], [q[n] / (1 - q[y]) for n in rest])
        expected += tau**2 * (0.7 * tckd + 3.0 * nckd) / B
    assert dkd_loss(s, t, target, tau, alpha=0.7, beta=3.0).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_dkd_with_kds_own_weights_is_kd():
    target = torch.arange(8)
    doubt = 1 - (zt / 4).softmax(1)[target, target]
    parts = torch.stack([dkd_loss(zs[i : i + 1], zt[i : i + 1], target[i : i + 1], beta=doubt[i]) for i in range(8)])
    torch.testing.assert_close(parts.mean(), kd_loss(zs, zt), rtol=1e-12, atol=1e-12)


@given(B=st.integers(2, 5), N=st.integers(2, 6), tau=st.sampled_from([1.0, 4.0]), seed=st.integers(0, 1000))
def test_dist_in_plain_loops(B, N, tau, seed):
    s, t = random(seed, B, N), random(seed + 1, B, N)
    p, q = ([softmaxed(row, tau) for row in z.tolist()] for z in (s, t))
    rows = sum(1 - pearson(a, b) for a, b in zip(p, q)) / B
    columns = sum(1 - pearson(a, b) for a, b in zip(zip(*p), zip(*q))) / N
    assert dist_loss(s, t, tau, beta=0.5, gamma=3.0).item() == pytest.approx(
        tau**2 * (0.5 * rows + 3 * columns), rel=1e-6, abs=1e-9
    )


def test_dist_of_a_single_image_has_no_columns():
    s = zs[:1].clone().requires_grad_()
    loss = dist_loss(s, zt[:1], beta=0.0, gamma=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(16) and s.grad.isfinite().all()


@given(B=st.integers(1, 4), N=st.integers(2, 6), seed=st.integers(0, 1000))
def test_standardisation_in_plain_loops(B, N, seed):
    s, t = random(seed, B, N), random(seed + 1, B, N)

    def standard(row):
        mean = sum(row) / N
        return [(v - mean) / math.sqrt(sum((w - mean) ** 2 for w in row) / (N - 1)) for v in row]

    expected = (
        sum(
            9 * divergence(softmaxed(standard(b), 3), softmaxed(standard(a), 3)) for a, b in zip(s.tolist(), t.tolist())
        )
        / B
    )
    assert std_loss(s, t, 3.0).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert _standardize(100 * s + 7).sub(_standardize(s)).abs().max() < 1e-4


def test_equal_logits_of_an_image_stay_finite_when_standardised():
    flat = torch.ones(2, 5, dtype=torch.float64, requires_grad=True)
    std_loss(flat, zt[:2, :5]).backward()
    assert not _standardize(flat).any() and flat.grad.isfinite().all()


@pytest.mark.parametrize("name", LOGIT_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_losses_of_logits_are_called_alike(name, dtype):
    s, t, target = zs.to(dtype).requires_grad_(), zt.to(dtype), torch.arange(8)
    loss = LOGIT_LOSSES[name](s, t, target, 2.0)
    assert loss.shape == () and loss.dtype == dtype and loss > 0.01
    assert torch.autograd.grad(loss, s)[0].abs().sum() > 0
    assert LOGIT_LOSSES[name](t + 5, t, target, 2.0).abs() < 1e-4
    assert torch.autograd.gradcheck(
        lambda z: LOGIT_LOSSES[name](z, zt[:3], target[:3], 2.0), zs[:3].clone().requires_grad_()
    )


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_very_sure_logits(name):
    s = (1e4 * zs).float().requires_grad_()
    loss = LOGIT_LOSSES[name](s, (1e4 * zt).float(), torch.arange(8), 4.0)
    assert loss.isfinite() and torch.autograd.grad(loss, s)[0].isfinite().all()


def test_the_named_functions_are_in_the_table():
    target = torch.arange(8)
    by_name = {
        "kd": kd_loss(zs, zt, 3),
        "dkd": dkd_loss(zs, zt, target, 3),
        "dist": dist_loss(zs, zt, 3),
        "std": std_loss(zs, zt, 3),
    }
    assert by_name == {name: loss(zs, zt, target, 3) for name, loss in LOGIT_LOSSES.items()}


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv2"])
def test_seeing_costs_one_pass_and_gives_the_networks_logits(name, digits):
    network, images = create(name, num_classes=10).eval(), digits.test[:3][0]
    passes = []
    network.stem.register_forward_hook(lambda *_: passes.append(1))
    seen = outputs_of(network, images)
    assert len(passes) == 1
    torch.testing.assert_close(seen.logits, network(images))
    assert [f.shape for f in seen.features] == [f.shape for f in network.features(images)]


def test_a_network_of_torchvision_is_seen_too():
    network = create("imagenet_resnet18", num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    passes = []
    network.network.conv1.register_forward_hook(lambda *_: passes.append(1))
    seen = outputs_of(network, images)
    assert len(passes) == 1 and len(seen.features) == 6 and torch.equal(seen.logits, network(images))


def test_pairs_and_vectors_cut_the_teachers_graph():
    student, teacher = (
        Outputs([random(i, 2, 4, 3, 3).requires_grad_() for i in range(3)] + [random(9, 2, 4).requires_grad_()], zs)
        for _ in range(2)
    )
    assert len(stage_pairs(student, teacher)) == 2
    for s, t in [*stage_pairs(student, teacher), vector_pair(student, teacher)]:
        assert s.requires_grad and not t.requires_grad
    with pytest.raises(ValueError, match="as many stages as its teacher, got 2 and 1"):
        stage_pairs(student, Outputs(teacher.features[1:], zs))
    with pytest.raises(ValueError, match="got 0 and 0"):
        stage_pairs(Outputs(teacher.features[2:], zs), Outputs(teacher.features[2:], zs))


def test_a_bare_term_says_what_it_lacks():
    seen = Outputs([zs, zs, zs], zs)
    term = Term(seen, seen, 10)
    assert (term.first, term.later) == (False, True)
    with pytest.raises(NotImplementedError):
        term(seen, seen, torch.arange(8), torch.arange(8))
    with pytest.raises(NotImplementedError):
        term.first_loss(None, None, zs)
