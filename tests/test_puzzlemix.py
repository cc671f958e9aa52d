"""PuzzleMix: the energy in plain loops, the cut against all labelings and a greatest flow, plans against all
permutations."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_flow
from supermix.mixing.masks import areas, mix, soft_labels
from supermix.mixing.puzzlemix import (
    PuzzleMix,
    _Energy,
    _block_shares,
    _border_gaps,
    _distances,
    _energy_terms,
    _graph_cuts,
    _min_cut,
    _minimise,
    _move_blocks,
    _puzzle_masks,
    _saliency,
    _transport,
    _transport_plans,
)


def pairs(seed, B, H, W, C=3):
    "Random sources, their maps and weights."
    g = torch.Generator().manual_seed(seed)
    lam = torch.rand(B, 1, generator=g)
    return (
        torch.rand(B, 2, C, H, W, generator=g),
        torch.rand(B, 2, H, W, generator=g) ** 6,
        torch.cat([lam, 1 - lam], 1),
    )


def papers_energy(z, s, pixels, lam, m, beta, gamma, eta):
    """The formula, block by block, for one pair whose blocks are single pixels: z (h, w), s (2, h, w), pixels
    (2, C, h, w)."""
    (h, w), total = z.shape, 0.0
    scale = beta / 16 / max(h, w)
    for i, j in itertools.product(range(h), range(w)):
        u = round(z[i, j] * m)
        total -= z[i, j] * s[0, i, j] + (1 - z[i, j]) * s[1, i, j]
        total -= eta / (h * w) * math.log(math.comb(m, u) * lam**u * (1 - lam) ** (m - u))
        for k, l in ((i + 1, j), (i, j + 1)):
            if k >= h or l >= w:
                continue
            d = [[abs(pixels[a, :, i, j] - pixels[b, :, k, l]).mean() for b in (0, 1)] for a in (0, 1)]
            here, there = (z[i, j], 1 - z[i, j]), (z[k, l], 1 - z[k, l])
            phi = sum(here[a] * there[b] * d[a][b] for a in (0, 1) for b in (0, 1))
            total += scale * ((z[i, j] - z[k, l]) ** 2 + gamma * phi)
    return float(total)


@given(
    seed=st.integers(0, 10**6),
    grid=st.sampled_from([(1, 2), (2, 2), (2, 3), (3, 1)]),
    labels=st.sampled_from([2, 3, 4]),
    beta=st.sampled_from([0.0, 1.2, 8.0, 60.0]),
    gamma=st.sampled_from([0.0, 0.5, 1.0]),
    eta=st.sampled_from([0.0, 0.2, 2.0]),
)
def test_no_labeling_is_better_than_the_cuts(seed, grid, labels, beta, gamma, eta):
    if labels == 4 and grid == (2, 3):
        labels = 3  # 4096 labelings take long in plain loops
    sets, maps, lam = pairs(seed, 1, *grid)
    weights, m = {"beta": beta, "gamma": gamma, "eta": eta}, labels - 1
    shares = _block_shares(maps, grid)
    found = _minimise(_energy_terms(shares, _border_gaps(sets, grid, 1), lam[:, 0], labels, **weights))[0].numpy() / m
    value = lambda z: papers_energy(z, shares[0].numpy(), sets[0].double().numpy(), lam[0, 0].item(), m, **weights)
    best = min(value(np.array(u).reshape(grid) / m) for u in itertools.product(range(labels), repeat=grid[0] * grid[1]))
    assert value(found) <= best + 1e-5 * max(1, abs(best))


@given(seed=st.integers(0, 10**6), labels=st.integers(2, 6), n=st.sampled_from([2, 4, 8]))
def test_the_energy_of_real_blocks_differs_from_the_formula_by_a_constant(seed, labels, n):
    sets, maps, lam = pairs(seed, 2, n, n)
    shares, rng, m = _block_shares(maps, (n, n)), np.random.default_rng(seed), labels - 1
    energy = _energy_terms(shares, _border_gaps(sets, (n, n), 1), lam[:, 0], labels, beta=20.0, gamma=1.0)
    assert (
        (energy.down >= 0).all()
        and (energy.right >= 0).all()
        and (energy.site.diff(dim=-1).diff(dim=-1) > -1e-12).all()
    )
    apart = []
    for u in rng.integers(0, labels, (4, n, n)):
        z = u / m
        site = sum(energy.site[1, i, j, u[i, j]].item() for i, j in itertools.product(range(n), range(n)))
        joint = (energy.down[1].numpy() * z[:-1] * z[1:]).sum() + (energy.right[1].numpy() * z[:, :-1] * z[:, 1:]).sum()
        slow = papers_energy(z, shares[1].numpy(), sets[1].double().numpy(), lam[1, 0].item(), m, 20.0, 1.0, 0.2)
        apart.append(site - joint - slow)
    assert np.ptp(apart) < 1e-9


@given(seed=st.integers(0, 10**6), N=st.integers(2, 80), density=st.integers(0, 300))
def test_the_cut_is_the_greatest_flow(seed, N, density):
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.integers(0, N, (density, 2)), axis=1)
    first, second = np.unique(ends[ends[:, 0] < ends[:, 1]], axis=0).T  # with strides
    weights, costs = rng.integers(0, 500, len(first)), rng.integers(-800, 800, N)
    bits = _min_cut(first, second, weights, costs)
    tails = np.concatenate([first, second, np.full(N, N), np.arange(N)])
    heads = np.concatenate([second, first, np.arange(N), np.full(N, N + 1)])
    room = np.concatenate([weights, weights, np.maximum(-costs, 0), np.maximum(costs, 0)]).astype(np.int32)
    flow = maximum_flow(coo_array((room, (tails, heads)), shape=(N + 2, N + 2)).tocsr(), N, N + 1).flow_value
    assert (costs * bits).sum() + weights[bits[first] != bits[second]].sum() == flow + np.minimum(costs, 0).sum()


def test_a_batch_is_cut_as_its_pairs_are():
    sets, maps, lam = pairs(3, 9, 16, 16)
    energy = _energy_terms(_block_shares(maps, (8, 8)), _border_gaps(sets, (8, 8), 2), lam[:, 0])
    alone = [_minimise(_Energy(*(t[i : i + 1] for t in energy)))[0] for i in range(9)]
    assert torch.equal(_minimise(energy), torch.stack(alone))
    assert _minimise(_Energy(*(1e-9 * t for t in energy))).equal(_minimise(energy))  # a scale changes nothing


@pytest.mark.parametrize("n, labels", [(2, 2), (4, 3), (8, 3), (8, 5), (16, 3)])
def test_areas_follow_lambda(n, labels):
    sets, maps, _ = pairs(n, 12, 32, 32)
    held = []
    for share in torch.linspace(0, 1, 11).tolist():
        masks = _puzzle_masks(sets, maps, torch.tensor([[share, 1 - share]]).expand(12, 2), n, labels=labels)
        torch.testing.assert_close(masks.sum(1), torch.ones(12, 32, 32))
        held.append(areas(masks)[:, 0])
    held = torch.stack(held)
    assert (held[0] == 0).all() and (held[-1] == 1).all() and (held.diff(dim=0) >= 0).all()


@pytest.mark.parametrize("eta", [1e-6, 0.2, 50.0])
@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_whole_images_whatever_the_saliency(lam, eta):
    maps = torch.zeros(2, 2, 16, 16)
    maps[:, :, 5, 5] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # all of one source's saliency in one block
    masks = _puzzle_masks(torch.rand(2, 2, 3, 16, 16), maps, torch.tensor([[lam, 1 - lam]] * 2), 4, eta=eta)
    assert (masks[:, 0] == lam).all()


def test_without_neighbours_and_prior_the_more_salient_source_wins():
    sets, maps, lam = pairs(1, 5, 16, 16)
    masks = _puzzle_masks(sets, maps, lam, 8, beta=0.0, eta=0.0)
    shares = _block_shares(maps, (8, 8))
    assert torch.equal(masks[:, 0, ::2, ::2], (shares[:, 0] > shares[:, 1]).float())
    calm = _puzzle_masks(sets, maps, torch.full((5, 2), 0.5), 8, beta=1e5, gamma=0.0)
    assert (calm[:, 0] == calm[:, 0, :1, :1]).all()  # with dear seams there is none


def test_masks_of_a_rectangle_and_of_other_dtypes():
    sets, maps, lam = pairs(2, 3, 12, 24)
    masks = _puzzle_masks(sets, maps, lam, 4)
    assert masks.shape == (3, 2, 12, 24) and masks.dtype == torch.float32
    assert _puzzle_masks(sets.double(), maps, lam.double(), 4).dtype == torch.float64
    assert torch.equal(_puzzle_masks(sets.double(), maps, lam, 4, std=[0.25] * 3), masks)


def test_border_gaps_by_plain_loops():
    sets, h, w, cell = torch.rand(2, 2, 3, 8, 12), 2, 3, 2
    down, right = _border_gaps(sets, (h, w), cell)
    assert down.shape == (2, 2, 2, 1, 3) and right.shape == (2, 2, 2, 2, 2)
    mean = lambda b, a, i, j: sets[b, a, :, i : i + cell, j : j + cell].double().mean((1, 2))
    for b, a, c in itertools.product((0, 1), repeat=3):
        for j in range(w):
            want = [(mean(b, a, 2, x) - mean(b, c, 4, x)).abs().mean() for x in (4 * j, 4 * j + 2)]
            torch.testing.assert_close(down[b, a, c, 0, j], sum(want) / 2)
        for i, j in itertools.product(range(h), range(w - 1)):
            want = [(mean(b, a, x, 4 * j + 2) - mean(b, c, x, 4 * j + 4)).abs().mean() for x in (4 * i, 4 * i + 2)]
            torch.testing.assert_close(right[b, a, c, i, j], sum(want) / 2)


@given(
    seed=st.integers(0, 10**6),
    grid=st.sampled_from([(1, 1), (2, 2), (2, 3), (1, 6)]),
    xi=st.sampled_from([0.0, 0.02, 0.3, 5.0]),
)
def test_no_permutation_is_better_than_the_plan(seed, grid, xi):
    rng, size = np.random.default_rng(seed), grid[0] * grid[1]
    shares, seen = rng.dirichlet(np.full(size, 0.5)), rng.random(size) < 0.5
    where = np.array(list(itertools.product(range(grid[0]), range(grid[1])))) / max(max(grid) - 1, 1)

    def cost(comes):
        return sum(xi * ((where[i] - where[j]) ** 2).sum() - shares[i] * seen[j] for j, i in enumerate(comes))

    plan = _transport_plans(torch.tensor(shares).view(1, *grid), torch.tensor(seen).view(1, *grid), xi)
    assert sorted(plan[0].tolist()) == list(range(size))
    assert cost(plan[0].tolist()) <= min(map(cost, itertools.permutations(range(size)))) + 1e-12


def test_distances_by_hand():
    assert _distances((1, 3)).tolist() == [[0, 0.25, 1], [0.25, 0, 0.25], [1, 0.25, 0]]
    assert _distances((1, 1)).tolist() == [[0]]


def test_moved_blocks_are_where_the_plan_says():
    images, grid = torch.rand(3, 2, 6, 8), (3, 4)
    plans = torch.stack([torch.randperm(12) for _ in range(3)])
    moved = _move_blocks(images, plans, grid)
    for b, place in itertools.product(range(3), range(12)):
        (i, j), (k, l) = divmod(place, 4), divmod(plans[b, place].item(), 4)
        assert torch.equal(
            moved[b, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2], images[b, :, 2 * k : 2 * k + 2, 2 * l : 2 * l + 2]
        )


def test_transport_brings_saliency_into_view():
    sets, maps, _ = pairs(5, 6, 16, 16)
    masks = _puzzle_masks(sets, maps, torch.full((6, 2), 0.5), 4, labels=2)
    seen = lambda m: ((masks > 0) * m).sum((2, 3))
    for xi, grows in ((0.0, True), (0.01, True), (1e6, False)):
        moved = _transport(maps[:, :, None], maps, masks, 4, 2, xi)[:, :, 0]
        assert (seen(moved) >= seen(maps) - 1e-5).all() and torch.equal(moved, maps) != grows
        assert torch.equal(moved.flatten(2).sort().values, maps.flatten(2).sort().values)


def test_saliency_of_a_linear_teacher_and_the_teacher_is_left_alone(teacher, digits):
    A, x, y = torch.randn(5, 48), torch.randn(6, 3, 4, 4), torch.arange(6) % 5
    p = (x.flatten(1) @ A.T).softmax(1)
    want = ((p - torch.nn.functional.one_hot(y, 5)) @ A).view(6, 3, 4, 4).norm(dim=1)
    torch.testing.assert_close(_saliency(lambda v: v.flatten(1) @ A.T, x, y)[0], want)
    images, _ = digits.test[:4]
    teacher.train()
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    with torch.inference_mode():
        maps, logits = _saliency(teacher, images)
    assert teacher.training and all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters()) and not logits.requires_grad and maps.shape == (4, 32, 32)
    teacher.eval()
    torch.testing.assert_close(maps, _saliency(teacher, images, teacher(images).argmax(1))[0])


@pytest.mark.parametrize("moves", [True, False])
def test_the_mixer_is_its_parts(moves, teacher, digits, seeded):
    images, labels = digits.test[:12]
    mixer = PuzzleMix(teacher, transport=moves, xi=0.01)
    mixed, targets = mixer(images, labels, seeded())
    draw = mixer.draw(images, labels, seeded())
    sets, masks = images[draw.partners], mixer.choose_masks(images[draw.partners], draw)
    moved = mixer.move(sets, masks, draw)
    assert torch.equal(moved, sets) != moves
    assert torch.equal(mix(moved, masks), mixed) and torch.equal(draw.classes, labels[draw.partners])
    assert torch.equal(soft_labels(draw.classes, areas(masks), 10), targets)
    assert (draw.partners[:, 0] != draw.partners[:, 1]).all()
    for n, mask in zip(draw.blocks.tolist(), masks[:, 0]):
        side = 32 // n
        assert torch.equal(mask, mask[::side, ::side].repeat_interleave(side, 0).repeat_interleave(side, 1))


def test_a_generator_decides_everything(teacher, digits, seeded):
    mixer, (images, labels) = PuzzleMix(teacher), digits.test[:8]
    state = torch.get_rng_state()
    (a, ya), (b, yb), (c, _) = (mixer(images, labels, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and torch.equal(ya, yb) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    d, _ = mixer(images, labels)
    torch.manual_seed(0)
    assert torch.equal(mixer((images, labels))[0], d) and not torch.equal(mixer(images, labels)[0], d)


def test_without_labels_the_teacher_tells_the_classes(teacher, digits, seeded):
    images, _ = digits.test[:8]
    mixed, targets = PuzzleMix(teacher, blocks=4)(images, generator=seeded())
    again, same = PuzzleMix(teacher, blocks=(4,))(images, teacher(images).argmax(1), generator=seeded())
    assert torch.equal(mixed, again) and torch.equal(targets, same)


def test_a_mixer_of_half_precision(teacher, digits, seeded):
    images, labels = digits.test[:4]
    mixed, targets = PuzzleMix(lambda x: teacher(x.float()))(images.half(), labels, seeded())
    assert (
        mixed.dtype == torch.float16 and torch.isfinite(mixed).all() and torch.allclose(targets.sum(1), torch.ones(4))
    )


def test_a_teacher_without_doubts_gives_equal_shares(seeded):
    constant = lambda x: 0 * x.flatten(1)[:, :3] + torch.tensor([100.0, 0, 0])
    mixed, targets = PuzzleMix(constant, blocks=(2, 4))(
        torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.long), seeded()
    )
    assert torch.isfinite(mixed).all() and torch.equal(targets, torch.tensor([[1.0, 0, 0]] * 4))


SETTINGS = [
    ({"alpha": 0.0}, "alpha above 0 and finite, or None, got 0.0"),
    ({"blocks": ()}, r"blocks of 2 or more .* got \(\)"),
    ({"blocks": (1, 2)}, r"blocks of 2 or more .* got \(1, 2\)"),
    ({"labels": 1}, "labels from 2 to 16, got 1"),
    ({"labels": 2.5}, "labels from 2 to 16, got 2.5"),
    ({"beta": -1.0}, "beta of 0 or more, got -1"),
    ({"eta": float("nan")}, "eta of 0 or more, got nan"),
    ({"gamma": 1.5}, "gamma from 0 to 1 .* got 1.5"),
    ({"xi": float("inf")}, "xi of 0 or more, got inf"),
    ({"size": 0}, "size of 1 pixel or more, got 0"),
    ({"border": 0.5}, "border of 1 pixel or more, got 0.5"),
    ({"std": 0.0}, "std above 0, got 0.0"),
    ({"std": (0.2, -1.0)}, "std above 0"),
]


@pytest.mark.parametrize("settings, message", SETTINGS)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PuzzleMix(lambda x: x, **settings)


images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
linear = lambda x: x.flatten(1)[:, :4] * 3
BAD = {
    "no teacher": (lambda: PuzzleMix("resnet20"), "Expected a teacher that maps images to logits, got str"),
    "blocks that do not divide": (
        lambda: PuzzleMix(linear)(images, labels),
        r"blocks that divide the images, got \(2, 4, 8, 16\) for 8×8",
    ),
    "a teacher without a gradient": (
        lambda: PuzzleMix(lambda x: linear(x).detach(), blocks=4)(images, labels),
        "teacher that is differentiable",
    ),
    "a teacher that gives maps": (
        lambda: PuzzleMix(lambda x: x, blocks=4)(images, labels),
        r"Expected the teacher to give logits \(4, N\), got \(4, 3, 8, 8\)",
    ),
    "a label too large": (
        lambda: PuzzleMix(linear, blocks=4)(images, labels + 1),
        "Expected labels from 0 to 3, got 1 to 4",
    ),
    "bytes": (lambda: PuzzleMix(linear, blocks=4)((255 * images).byte(), labels), "Expected normalised float images"),
    "NaN": (
        lambda: PuzzleMix(linear, blocks=4)(images.index_fill(0, labels[:1], float("nan")), labels),
        "NaN or infinity in 1 of 4",
    ),
    "a grid that does not fit maps": (
        lambda: _block_shares(torch.rand(2, 8, 8), (3, 4)),
        "blocks that divide the maps, got 3×4 for 8×8",
    ),
    "soft labels of fewer classes": (
        lambda: PuzzleMix(linear, blocks=4)(images, torch.eye(4)[:, :3] + 1 / 3),
        "whose rows sum to 1",
    ),
    "soft labels of more classes": (
        lambda: PuzzleMix(linear, blocks=4)(images, torch.eye(4, 5)),
        "soft labels of the mixer's 4 classes, got 5",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_single_image_comes_back_as_it_is():
    with pytest.warns(UserWarning, match="1 images of 1 classes cannot be mixed in sets of 2.*drop_last=True"):
        mixed, soft = PuzzleMix(linear, blocks=4)(images[2:3], labels[2:3])
    assert torch.equal(mixed, images[2:3]) and torch.equal(soft, torch.eye(4)[2:3])


def test_one_hot_labels_give_what_class_indices_give():
    (a, hard), (b, soft) = (
        PuzzleMix(linear, blocks=4)(images, y, generator=torch.Generator().manual_seed(0))
        for y in (labels, torch.eye(4)[labels])
    )
    assert torch.equal(a, b)
    torch.testing.assert_close(hard, soft)


def test_where_the_package_is_missing():
    "In a process that cannot import it: the module can be imported, the mixer says what to install."
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "gco": raise ModuleNotFoundError("No module named 'gco'")
sys.meta_path.insert(0, Refuse())
import supermix
from supermix.mixing.puzzlemix import PuzzleMix
try: PuzzleMix(lambda x: x)
except ImportError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gco-wrapper" in done.stdout and "pip install 'supermix[puzzle]'" in done.stdout
    assert _graph_cuts().__name__ == "gco"


def test_blocks_that_move_are_no_smaller_than_size_and_not_too_many():
    g = torch.Generator().manual_seed(0)
    sets, maps = torch.rand(1, 2, 3, 56, 56, generator=g), torch.rand(1, 2, 56, 56, generator=g)
    half = torch.zeros(1, 2, 4, 4)
    half[:, 0, :, :2], half[:, 1, :, 2:] = 1, 1
    masks = half.repeat_interleave(14, 2).repeat_interleave(14, 3)
    moved = _transport(sets, maps, masks, 4, size=4, xi=0.0)  # cells of 14 pixels: blocks of 7
    pieces = lambda x: {
        p.numpy().tobytes() for p in x.unfold(2, 7, 7).unfold(3, 7, 7).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 7, 7)
    }
    assert pieces(moved[:, 0]) == pieces(sets[:, 0]) and not torch.equal(moved, sets)
    wide = half.repeat_interleave(72, 2).repeat_interleave(72, 3)
    with pytest.raises(ValueError, match="at most 4,096 blocks .* got 72×72: raise size"):
        _transport(torch.rand(1, 2, 3, 288, 288), torch.rand(1, 2, 288, 288), wide, 4, size=4)


@pytest.mark.parametrize("edge, block", [(32, 4), (64, 4), (96, 8), (224, 16)])
def test_larger_images_move_larger_blocks(edge, block):
    sets, maps = (torch.rand(1, 2, *c, edge, edge, generator=torch.Generator().manual_seed(0)) for c in ((3,), ()))
    masks = torch.zeros(1, 2, edge, edge)
    masks[:, 0, :, : edge // 2], masks[:, 1, :, edge // 2 :] = 1, 1
    moved = _transport(sets, maps, masks, 2, xi=0.0)
    assert torch.equal(moved, _transport(sets, maps, masks, 2, size=block, xi=0.0))
    assert not torch.equal(moved, _transport(sets, maps, masks, 2, size=2 * block, xi=0.0))
