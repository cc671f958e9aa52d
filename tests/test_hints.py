"""Losses of maps against the benchmark's values and plain loops; what their terms learn, need and refuse."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from supermix.distillation.hints import (
    AB,
    AT,
    FSP,
    FT,
    NST,
    VID,
    FitNet,
    FreeAB,
    _StageSum,
    _attention,
    _flow_matrix,
    _regressor,
    _same_size,
    ab_loss,
    at_loss,
    fsp_loss,
    ft_loss,
    hint_loss,
    nst_loss,
    vid_loss,
)
from supermix.distillation.losses import Outputs, outputs_of
from supermix.zoo import create


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


VALUES = json.loads((Path(__file__).parent / "data" / "crd_losses.json").read_text())["values"]
STUDENT = [(6, 8), (8, 4), (12, 2)]
FS, SAME, RAW, RAWT = ([random(seed + i, 8, c, h, h) for i, (c, h) in enumerate(STUDENT)] for seed in (10, 30, 40, 50))
FT_ = [random(20 + i, 8, c, h, h).relu() for i, (c, h) in enumerate([(10, 8), (14, 4), (18, 2)])]
FS, SAME = [f.relu() for f in FS], [f.relu() for f in SAME]


@pytest.mark.parametrize(
    "key, ours",
    [
        ("fitnet hint(fs[1]-shaped 30.., same shape ft_same[1])", [hint_loss(FS[1], SAME[1])]),
        ("at per stage (fs, ft)", [at_loss(s, t) for s, t in zip(FS, FT_)]),
        ("nst per stage (fs, ft_same)", [nst_loss(s, t) for s, t in zip(FS, SAME)]),
        (
            "fsp per pair of neighbouring stages (fs, ft_same)",
            [fsp_loss(FS[i], FS[i + 1], SAME[i], SAME[i + 1]) for i in (0, 1)],
        ),
        ("ft(fs[2], ft_same[2]) p1=2 p2=1", [ft_loss(FS[2], SAME[2])]),
        (
            "ab per stage (pre-activations raw, rawt) margin=1, stage weights 2^(i-2), / batch * 3/1000",
            [3 / 1000 * 2.0 ** (i - 2) * ab_loss(RAW[i], RAWT[i]) for i in range(3)],
        ),
    ],
)
def test_the_benchmarks_values(key, ours):
    wanted = VALUES[key] if isinstance(VALUES[key], list) else [VALUES[key]]
    assert [x.item() for x in ours] == pytest.approx(wanted, rel=1e-10)


def pooled(maps, h):
    "Maps as nested lists, averaged over blocks to the size h."
    B, C, H, _ = maps.shape
    k = H // h
    return [
        [
            [
                [
                    sum(maps[b, c, k * y + i, k * x + j].item() for i in range(k) for j in range(k)) / k**2
                    for x in range(h)
                ]
                for y in range(h)
            ]
            for c in range(C)
        ]
        for b in range(B)
    ]


def looped_attention(image):
    q = [
        sum(channel[y][x] ** 2 for channel in image) / len(image)
        for y in range(len(image[0]))
        for x in range(len(image[0]))
    ]
    length = math.sqrt(sum(v * v for v in q))
    return [v / length for v in q]


def test_attention_in_plain_loops():
    s, t = random(1, 2, 3, 4, 4), random(2, 2, 5, 2, 2)
    pairs = [(looped_attention(a), looped_attention(b)) for a, b in zip(pooled(s, 2), pooled(t, 2))]
    squares = [(u - v) ** 2 for a, b in pairs for u, v in zip(a, b)]
    assert at_loss(s, t).item() == pytest.approx(sum(squares) / 8, rel=1e-12)
    assert at_loss(t, s).item() == pytest.approx(sum(squares) / 8, rel=1e-12)  # whoever is larger
    differences = [abs(u - v) for a, b in pairs for u, v in zip(a, b)]
    assert ft_loss(s, t).item() == pytest.approx(sum(differences) / 8, rel=1e-12)
    torch.testing.assert_close(_attention(s).square().sum(1), torch.ones(2).double())


def test_nst_in_plain_loops():
    s, t = random(1, 2, 3, 4, 4), random(2, 2, 5, 2, 2)

    def channels(image):
        flat = [[v for row in channel for v in row] for channel in image]
        return [[v / math.sqrt(sum(w * w for w in c)) for v in c] for c in flat]

    def kernel(a, b):
        return sum(sum(x * y for x, y in zip(u, v)) ** 2 for u in a for v in b) / len(a) / len(b)

    expected = 0
    for a, b in zip(pooled(s, 2), pooled(t, 2)):
        a, b = channels(a), channels(b)
        expected += (kernel(b, b) + kernel(a, a) - 2 * kernel(a, b)) / 2
    assert nst_loss(s, t).item() == pytest.approx(expected, rel=1e-10)
    assert nst_loss(s, s[:, [2, 0, 1]]).abs() < 1e-12 < nst_loss(s, t)


def test_fsp_in_plain_loops():
    lower, upper = random(1, 2, 3, 4, 4), random(2, 2, 5, 2, 2)
    small = pooled(lower, 2)
    for b in range(2):
        for c in range(3):
            for d in range(5):
                mean = sum(small[b][c][y][x] * upper[b, d, y, x].item() for y in range(2) for x in range(2)) / 4
                assert _flow_matrix(lower, upper)[b, c, d].item() == pytest.approx(mean, rel=1e-10)
    torch.testing.assert_close(fsp_loss(lower, upper, 2 * lower, upper), _flow_matrix(lower, upper).square().mean())


@given(margin=st.sampled_from([0.5, 1.0, 2.0]), seed=st.integers(0, 1000))
def test_ab_in_plain_loops(margin, seed):
    s, t, total = random(seed, 3, 2, 2, 2), random(seed + 1, 3, 2, 2, 2), 0
    for u, v in zip(s.flatten().tolist(), t.flatten().tolist()):
        if v > 0 and u < margin:
            total += (margin - u) ** 2
        if v <= 0 and u > -margin:
            total += (margin + u) ** 2
    assert ab_loss(s, t, margin).item() == pytest.approx(total / 3, rel=1e-12)


def test_a_teachers_neuron_at_zero_is_not_active():
    assert (
        ab_loss(torch.full((1, 1, 1, 1), -1.0), torch.zeros(1, 1, 1, 1))
        == 0
        != ab_loss(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    )


def test_vid_in_plain_loops():
    m, t, v, total = random(1, 2, 3, 2, 2), random(2, 2, 3, 2, 2), random(3, 3).exp(), 0
    for b in range(2):
        for c in range(3):
            for a, w in zip(m[b, c].flatten().tolist(), t[b, c].flatten().tolist()):
                total += ((w - a) ** 2 / v[c].item() + math.log(v[c].item())) / 2
    assert vid_loss(m, t, v).item() == pytest.approx(total / 24, rel=1e-12)


@pytest.mark.parametrize("loss", [hint_loss, at_loss, nst_loss, ab_loss, ft_loss])
def test_gradients_and_dtypes(loss):
    s, t = random(1, 2, 2, 3, 3), random(2, 2, 2, 3, 3)
    assert torch.autograd.gradcheck(lambda x: loss(x, t), s.clone().requires_grad_())
    assert loss(s.float(), t.float()).dtype == torch.float32


@pytest.mark.parametrize("loss", [at_loss, nst_loss, ft_loss])
def test_dead_maps_stay_finite(loss):
    s = torch.zeros(2, 3, 4, 4, requires_grad=True)
    value = loss(s, torch.ones(2, 3, 4, 4))
    value.backward()
    assert value.isfinite() and s.grad.isfinite().all()


def test_sizes_are_matched_axis_by_axis():
    a, b = _same_size(random(1, 2, 3, 8, 4), random(2, 2, 5, 4, 8))
    assert a.shape == (2, 3, 4, 4) and b.shape == (2, 5, 4, 4)
    same = random(1, 2, 3, 4, 4)
    assert torch.equal(_same_size(same, same)[0], same)


@pytest.mark.parametrize(
    "size, wanted", [((4, 4), (4, 4)), ((8, 8), (4, 4)), ((4, 4), (8, 8)), ((7, 5), (4, 4)), ((2, 2), (1, 1))]
)
@pytest.mark.parametrize("act", [True, False])
def test_regressors(size, wanted, act):
    torch.manual_seed(0)
    out = _regressor(torch.Size((2, 3, *size)), torch.Size((2, 5, *wanted)), act)(torch.randn(2, 3, *size))
    assert out.shape == (2, 5, *wanted) and bool((out < 0).any()) != act
    with pytest.raises(ValueError, match=r"teacher's \(9, 9\), as large or larger, got \(4, 4\)"):
        _regressor(torch.Size((2, 3, 4, 4)), torch.Size((2, 5, 9, 9)))


def seen(seed, channels=(4, 4, 6), sizes=(8, 8, 4), graph=False):
    features = [
        random(seed + i, 3, c, h, h).relu().requires_grad_(graph) for i, (c, h) in enumerate(zip(channels, sizes))
    ]
    return Outputs([*features, random(seed + 9, 3, 5)], random(seed + 10, 3, 2))


def call(term, s, t):
    return term(s, t, torch.zeros(3).long(), torch.arange(3), None)


def test_terms_sum_the_losses_of_their_stages():
    s, t, wide = seen(0), seen(100), seen(200, channels=(4, 7, 9), sizes=(8, 4, 4))
    assert call(AT(s, wide, 9), s, wide) == at_loss(s.features[1], wide.features[1]) + at_loss(
        s.features[2], wide.features[2]
    )
    assert call(NST(s, wide, 9), s, wide) == nst_loss(s.features[1], wide.features[1]) + nst_loss(
        s.features[2], wide.features[2]
    )

    class Means(_StageSum):
        "A term of one's own: the squared difference of the maps' means."

        compare = staticmethod(lambda a, b: (a.mean() - b.mean()).square())

    means = [(f.mean() - g.mean()) ** 2 for f, g in zip(s.features[1:-1], wide.features[1:-1])]
    torch.testing.assert_close(call(Means(s, wide, 9), s, wide), sum(means))
    both = [(*s.features[i : i + 2], *t.features[i : i + 2]) for i in (0, 1)]
    torch.testing.assert_close(FSP(s, t, 9)(s, t), fsp_loss(*both[0]) + fsp_loss(*both[1]))


def test_fitnet_and_vid_with_their_parts():
    s, wide = seen(0), seen(200, channels=(4, 7, 9), sizes=(8, 4, 4))
    fitnet = FitNet(s, wide, 9, stage=1).double()
    torch.testing.assert_close(call(fitnet, s, wide), F.mse_loss(fitnet.regressor(s.features[1]), wide.features[1]))
    vid = VID(s, wide, 9).double()
    variances = [F.softplus(scale) + 1e-5 for scale in vid.scale]
    torch.testing.assert_close(variances[1], torch.full((9,), 5.0).double(), rtol=1e-6, atol=1e-6)
    first = vid_loss(vid.guess[0](F.adaptive_avg_pool2d(s.features[1], 4)), wide.features[1], variances[0])
    torch.testing.assert_close(
        call(vid, s, wide), first + vid_loss(vid.guess[1](s.features[2]), wide.features[2], variances[1])
    )


@pytest.mark.parametrize("term", [FitNet, AT, NST, VID, FT])
def test_gradients_reach_student_and_own_parts_only(term):
    s, t = seen(0, graph=True), seen(100, graph=True)
    made = term(s, t, 9).double()
    loss = call(made, s, t)
    loss.backward()
    assert loss.shape == () and any(f.grad is not None and f.grad.abs().sum() > 0 for f in s.features[1:-1])
    assert all(f.grad is None for f in t.features[:-1])
    learned = dict(made.named_parameters())
    if term is FT:
        learned = {k: p for k, p in learned.items() if k.startswith("translate")}  # the rest has its own stage
    assert all(p.grad.abs().sum() > 0 for p in learned.values())


NETWORKS = ("resnet8", "resnet14")


@pytest.mark.parametrize("term", [FSP, AB, FT])
def test_a_first_stage_computes_in_float32(term, digits):
    torch.manual_seed(0)
    student, teacher = (create(name, num_classes=10).eval() for name in NETWORKS)
    images = digits.train[:8][0]
    made, heard = term(outputs_of(student, images), outputs_of(teacher, images), 9).eval(), []
    for part in made.modules():
        if not list(part.children()):
            part.register_forward_hook(lambda m, args, output: heard.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = made.first_loss(student, teacher, images)
    assert loss.dtype == torch.float32 and set(heard) <= {torch.float32}
    assert loss.item() == pytest.approx(made.first_loss(student, teacher, images).item(), rel=0.05)


@pytest.mark.parametrize("term", [FSP, AB, FT])
def test_first_stages(term, digits):
    torch.manual_seed(0)
    student, teacher = (create(name, num_classes=10) for name in NETWORKS)
    teacher.eval()
    images = digits.train[:8][0]
    made = term(outputs_of(student, images), outputs_of(teacher, images), 9)
    assert made.first and made.later == (term is FT)
    parameters = made.first_parameters(student)
    optimiser = torch.optim.Adam(parameters, lr=1e-3)
    losses = []
    while len(losses) < 8 or not losses[-1] < losses[0]:
        assert len(losses) < 100, "the loss does not fall"
        loss = made.first_loss(student, teacher, images)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert all(p.grad is None for p in teacher.parameters())
    touched = {id(p) for p in [*student.parameters(), *made.parameters()] if p.grad is not None}
    assert touched <= {id(p) for p in parameters} and (
        term is not FT or not {id(p) for p in student.parameters()} & touched
    )


def test_abs_first_loss_is_the_benchmarks_sum(digits):
    torch.manual_seed(0)
    student, teacher = (create(name, num_classes=10).double().eval() for name in NETWORKS)
    images = digits.train[:4][0].double()
    made = AB(outputs_of(student, images), outputs_of(teacher, images), 9)
    s, t = student.preactivations(images)[1:-1], teacher.preactivations(images)[1:-1]
    expected = 3 / 1000 * (ab_loss(s[0], t[0]) / 4 + ab_loss(s[1], t[1]) / 2 + ab_loss(s[2], t[2]))
    torch.testing.assert_close(made.first_loss(student, teacher, images), expected)
    assert not list(made.parameters())  # equal shapes need no connector


def test_ab_connects_other_shapes(digits):
    torch.manual_seed(0)
    student, teacher = create("resnet8", num_classes=10), create("wrn_16_2", num_classes=10).eval()
    images = digits.train[:4][0]
    made = AB(outputs_of(student, images), outputs_of(teacher, images), 9)
    made.first_loss(student, teacher, images).backward()
    assert made.connectors[0][0].weight.shape == (32, 16, 1, 1) and all(
        p.grad.abs().sum() > 0 for p in made.connectors.parameters()
    )


def test_impossible_pairs():
    s, four, wide = seen(0), seen(50, channels=(4, 4, 6, 8), sizes=(8, 8, 4, 2)), seen(70, channels=(4, 4, 7))
    for term in (AT, NST, VID, AB):
        with pytest.raises(ValueError, match="as many stages as its teacher, got 2 and 3"):
            term(s, four, 9)
    with pytest.raises(ValueError, match=r"channels of its teacher, \[4, 4, 7\], got \[4, 4, 6\]"):
        FSP(s, wide, 9)
    with pytest.raises(ValueError, match=r"\[4, 4, 6, 8\], got \[4, 4, 6\]"):
        FSP(s, four, 9)
    with pytest.raises(ValueError, match="of 3 stages or more, got 2 and 3"):
        FitNet(s, four, 9, stage=3)
    with pytest.raises(ValueError, match="of 1 channel or more, got 0.1 of 6 channels"):
        FT(s, s, 9, rate=0.1)
    with pytest.raises(ValueError, match="half as large"):
        FitNet(seen(0, sizes=(8, 4, 1)), seen(0), 9)


PAIRS = [
    ("vgg13", "vgg8"),
    ("wrn_40_2", "wrn_40_1"),
    ("vgg13", "mobilenetv2"),
    ("resnet50", "mobilenetv2"),
    ("resnet50", "vgg8"),
    ("resnet32x4", "shufflenetv1"),
    ("resnet32x4", "shufflenetv2"),
    ("wrn_40_2", "shufflenetv1"),
]


@pytest.mark.parametrize("teacher, student", PAIRS)
def test_the_papers_pairs(teacher, student):
    "Every term but FSP can be made for every pair, and FSP for those alone that have equal channels."
    with torch.device("meta"):
        s, t = (outputs_of(create(name).eval(), torch.empty(2, 3, 32, 32)) for name in (student, teacher))
    with torch.device("meta"):
        made = [term(s, t, 9) for term in (FitNet, AT, NST, AB, FT, VID)]
    for term in made:
        if term.later:
            assert call(term, s, t).shape == ()
    if (teacher, student) == ("vgg13", "vgg8"):
        FSP(s, t, 9)
    else:
        with pytest.raises(ValueError, match="channels of its teacher"):
            FSP(s, t, 9)


def prepare(student, teacher, batches, held):
    "Two updates of AB's first stage, with the network's own parts: what stands behind the stages is held, or not."
    student.train()
    if held:
        student.neck.eval()
    own = [student.stem, student.stages] if held else [student]
    optimiser = torch.optim.SGD([p for part in own for p in part.parameters()], lr=0.05, momentum=0.9)
    for x in batches:
        with torch.no_grad():
            theirs = teacher.preactivations(x)[1:-1]
        maps = student.features(x)[1:-1]
        norms = [stage[0].norm1 for stage in student.stages[1:]]
        ours = [norm(h) for norm, h in zip(norms, maps)]  # the norms of the next stages, in training mode
        # the last norm as it was made is the identity
        ours.append(maps[-1] / (1 + student.neck[0].eps) ** 0.5 if held else student.neck[0](maps[-1]))
        loss = 3 / 1000 * sum(2.0 ** (i - 2) * ab_loss(s, t) for i, (s, t) in enumerate(zip(ours, theirs)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {name: p.detach().clone() for name, p in student.named_parameters()}


@pytest.mark.parametrize("kind, held", [(AB, True), (FreeAB, False)])
def test_the_last_norm_of_a_wrn_is_held_as_in_the_benchmark(kind, held):
    torch.manual_seed(0)
    start, teacher = create("wrn_16_1", 10).double(), create("wrn_40_1", 10).double().eval()
    batches = [random(seed, 8, 3, 32, 32) for seed in (1, 2)]
    wanted = prepare(copy.deepcopy(start), teacher, batches, held)
    student = copy.deepcopy(start).train()
    term = kind(outputs_of(start, batches[0]), outputs_of(teacher, batches[0]), 16)
    optimiser = torch.optim.SGD(term.first_parameters(student), lr=0.05, momentum=0.9)
    for x in batches:
        optimiser.zero_grad()
        term.first_loss(student, teacher, x).backward()
        optimiser.step()
    got = dict(student.named_parameters())
    assert max((got[name] - p).abs().max() for name, p in wanted.items() if not name.startswith("head")) < 1e-11
    last, moved = student.neck[0], (got["neck.0.weight"] - 1).abs().max()
    assert student.training and last.training
    assert (moved == 0 and not last.running_mean.any()) if held else moved > 1e-3
    assert (got["stem.weight"] - dict(start.named_parameters())["stem.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["resnet8", "vgg8"])
def test_other_networks_are_prepared_the_same_either_way(name):
    torch.manual_seed(0)
    x, start = random(1, 4, 3, 32, 32), create(name, 10).double().train()
    tutor, grads = copy.deepcopy(start).eval(), []
    for kind in (AB, FreeAB):
        student = copy.deepcopy(start)
        kind(outputs_of(tutor, x), outputs_of(tutor, x), 4).first_loss(student, tutor, x).backward()
        grads.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])
