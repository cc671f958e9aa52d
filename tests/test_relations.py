"""Losses of relations against the benchmark's values and plain loops; what moving, turning and scaling may not
change."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from supermix.distillation.contrast import TERMS
from supermix.distillation.losses import Outputs, Term, outputs_of
from supermix.distillation.relations import (
    CC,
    PKT,
    RKD,
    SP,
    _distances_and_angles,
    _pick_probabilities,
    _similarity_matrix,
    cc_loss,
    pkt_loss,
    rkd_loss,
    sp_loss,
)
from supermix.zoo import create


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


VALUES = json.loads((Path(__file__).parent / "data" / "crd_losses.json").read_text())["values"]
FS = [random(10 + i, 8, c, h, h).relu() for i, (c, h) in enumerate([(6, 8), (8, 4), (12, 2)])]
FT = [random(20 + i, 8, c, h, h).relu() for i, (c, h) in enumerate([(10, 8), (14, 4), (18, 2)])]
PS, PT, ES, ET = random(3, 8, 16).relu(), random(4, 8, 24).relu(), random(5, 8, 16), random(6, 8, 16)


@pytest.mark.parametrize(
    "key, ours",
    [
        ("sp per stage (fs, ft)", [sp_loss(s, t) for s, t in zip(FS, FT)]),
        ("cc(es, et)", [cc_loss(ES, ET)]),
        ("rkd(ps, pt) w_d=25 w_a=50", [rkd_loss(PS, PT)]),
        ("pkt(ps, pt)", [pkt_loss(PS, PT)]),
    ],
)
def test_the_benchmarks_values(key, ours):
    wanted = VALUES[key] if isinstance(VALUES[key], list) else [VALUES[key]]
    assert [x.item() for x in ours] == pytest.approx(wanted, rel=1e-10)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def length(a):
    return math.sqrt(dot(a, a))


def minus(a, b):
    return [x - y for x, y in zip(a, b)]


def huber(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


sizes = dict(B=st.integers(2, 4), d=st.integers(1, 3), D=st.integers(1, 3), seed=st.integers(0, 1000))


@given(**sizes)
def test_sp_in_plain_loops(B, d, D, seed):
    s, t = random(seed, B, d, 2, 2), random(seed + 1, B, D, 3, 3)

    def rows(maps):
        flat = maps.flatten(1).tolist()
        return [[g / length(row) for g in row] for row in ([dot(a, b) for b in flat] for a in flat)]

    expected = sum((x - y) ** 2 for a, b in zip(rows(s), rows(t)) for x, y in zip(a, b)) / B**2
    assert sp_loss(s, t).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(**sizes)
def test_cc_in_plain_loops(B, d, D, seed):
    s, t = random(seed, B, d), random(seed + 1, B, d)
    off = [[abs(x) for x in minus(a, b)] for a, b in zip(s.tolist(), t.tolist())]
    assert cc_loss(s, t).item() == pytest.approx(sum(dot(a, b) for a, b in zip(off, off[1:])) / (B - 1), rel=1e-12)


@given(**sizes)
def test_rkd_in_plain_loops(B, d, D, seed):
    s, t = random(seed, B, d), random(seed + 1, B, D)

    def shape(points):
        far = [[length(minus(a, b)) for b in points] for a in points]
        mean = sum(map(sum, far)) / (B * (B - 1))
        angles = [
            [
                [
                    dot(minus(b, a), minus(c, a)) / (length(minus(b, a)) * length(minus(c, a)))
                    if b is not a is not c
                    else 0.0
                    for c in points
                ]
                for b in points
            ]
            for a in points
        ]
        return [x / mean for row in far for x in row], [x for plane in angles for row in plane for x in row]

    (ds, angles_s), (dt, angles_t) = shape(s.tolist()), shape(t.tolist())
    distance = sum(huber(x - y) for x, y in zip(ds, dt)) / B**2
    angle = sum(huber(x - y) for x, y in zip(angles_s, angles_t)) / B**3
    assert rkd_loss(s, t, 3.0, 7.0).item() == pytest.approx(3 * distance + 7 * angle, rel=1e-9, abs=1e-12)


@given(**sizes)
def test_pkt_in_plain_loops(B, d, D, seed):
    s, t = random(seed, B, d), random(seed + 1, B, D)

    def probabilities(points):
        unit = [[x / (length(a) + 1e-7) for x in a] for a in points]
        kernel = [[(dot(a, b) + 1) / 2 for b in unit] for a in unit]
        return [[k / sum(row) for k in row] for row in kernel]

    p, q = probabilities(t.tolist()), probabilities(s.tolist())
    expected = sum(x * math.log((x + 1e-7) / (y + 1e-7)) for a, b in zip(p, q) for x, y in zip(a, b)) / B**2
    assert pkt_loss(s, t).item() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_what_may_be_done_to_the_students_vectors():
    turn = torch.linalg.qr(random(7, 16, 16))[0]
    assert sp_loss(2 * PS @ turn, PS) < 1e-20 < sp_loss(PS + 1, PS)
    assert rkd_loss(2 * PS @ turn + 1, PS) < 1e-20
    assert pkt_loss(2 * PS @ turn, PS).abs() < 1e-9 < pkt_loss(PS + 1, PS)
    torch.testing.assert_close(_similarity_matrix(PS).norm(dim=1), torch.ones(8).double())
    torch.testing.assert_close(_pick_probabilities(PS).sum(1), torch.ones(8).double())
    distance, angles = _distances_and_angles(PS)
    assert distance.sum().item() == pytest.approx(56) and angles.abs().max() < 1 + 1e-12


LOSSES = [sp_loss, cc_loss, rkd_loss, pkt_loss]


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_and_dtypes(loss):
    s, t = random(1, 4, 3), random(2, 4, 3)
    assert torch.autograd.gradcheck(lambda x: loss(x, t), s.clone().requires_grad_())
    assert loss(s.float(), t.float()).dtype == torch.float32


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", ["one image", "equal images", "all zero"])
def test_poor_batches_stay_finite(loss, case):
    s = {
        "one image": random(1, 1, 3),
        "equal images": random(1, 1, 3).repeat(4, 1),
        "all zero": torch.zeros(4, 3).double(),
    }[case]
    s = s.requires_grad_()
    value = loss(s, random(2, len(s), 3))
    value.backward()
    assert value.isfinite() and s.grad.isfinite().all()
    if case == "one image":
        assert value.abs() < 1e-12


def seen(seed, width=6, graph=False):
    features = [random(seed + i, 5, 4 + i, 4, 4).requires_grad_(graph) for i in range(3)]
    return Outputs([*features, random(seed + 9, 5, width).requires_grad_(graph)], random(seed + 10, 5, 2))


@pytest.mark.parametrize("term", [SP, CC, RKD, PKT])
def test_gradients_reach_student_and_own_parts_only(term):
    s, t = seen(0, graph=True), seen(100, width=9, graph=True)
    made = term(s, t, 9).double()
    loss = made(s, t, None, None, None)
    loss.backward()
    at = -2 if term is SP else -1
    assert s.features[at].grad.abs().sum() > 0 and all(f.grad is None for f in t.features)
    assert all(p.grad.abs().sum() > 0 for p in made.parameters()) and bool(list(made.parameters())) == (term is CC)


def test_what_the_terms_look_at():
    s, t = seen(0), seen(100, width=9)
    vectors = s.features[-1], t.features[-1]
    assert RKD(s, t, 9)(s, t, None, None) == rkd_loss(*vectors) and PKT(s, t, 9)(s, t, None, None) == pkt_loss(*vectors)
    assert SP(s, t, 9)(s, t, None, None) == sp_loss(s.features[2], t.features[2])
    both = sp_loss(s.features[1], t.features[1]) + sp_loss(s.features[2], t.features[2])
    assert SP(s, t, 9, all_stages=True)(s, t, None, None) == both
    cc = CC(s, t, 9, dim=3).double()
    assert cc(s, t, None, None) == cc_loss(cc.embed_student(vectors[0]), cc.embed_teacher(vectors[1]))
    with pytest.raises(ValueError, match="as many stages as its teacher, got 1 and 2"):
        SP(Outputs(s.features[1:], None), t, 9, all_stages=True)


def test_the_table_of_all_methods():
    assert len(TERMS) == 13 and all(issubclass(term, Term) for term in TERMS.values())
    assert {name for name, term in TERMS.items() if term.first} == {"ab", "ab_free", "ft", "fsp"}
    assert {name for name, term in TERMS.items() if not term.later} == {"ab", "ab_free", "fsp"}


@pytest.mark.parametrize("name", [name for name, term in TERMS.items() if term.later])
def test_terms_compute_in_full_precision_under_autocast(name, digits):
    torch.manual_seed(0)
    student, teacher = (create(network, num_classes=10).eval() for network in ("resnet8", "resnet14"))
    images, labels = digits.train[:8]
    with torch.autocast("cpu", torch.bfloat16):
        half = outputs_of(student, images), outputs_of(teacher, images)
    assert half[0].features[1].dtype == torch.bfloat16
    whole = [Outputs([f.float() for f in seen.features], seen.logits) for seen in half]
    term = TERMS[name](*whole, 20).eval()
    rest = labels, torch.arange(8)
    wanted = term(*whole, *rest, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = term(*half, *rest, torch.Generator().manual_seed(0))
    assert loss.dtype == torch.float32 and torch.equal(loss, wanted)
    loss.backward()
    assert student.stages[0][0].a[0].weight.grad.abs().sum() > 0
