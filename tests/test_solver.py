"""The solver against its oracle and a slow twin, on any shape, with other people's networks, and with bad input."""

import copy
import json
import math
import re
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import pytest
import supermix.explore.trace
import supermix.mixing.engine
import supermix.mixing.solver
import timm
import torch
import torch.nn.functional as F
import torchvision
import tyro
from hypothesis import given
from hypothesis import strategies as st
from supermix.core import compare_classes
from supermix.data import load_data
from supermix.explore.trace import Setting, trace
from supermix.mixing.engine import Engine, Sets, decode, solve_blocks
from supermix.mixing.generate import command
from supermix.mixing.masks import masks_from_theta, mix, regions, soft_labels, sparsity
from supermix.mixing.solver import (
    SuperMix,
    _hidden_networks,
    check_teacher,
    hinge,
    is_solved,
    newton_step,
    objective,
    search_step,
)
from supermix.mixing.store import _MANIFEST, _settings
from supermix.recipes import FAST, Mixing, _later, as_named
from supermix.training.loop import accuracy, check_teacher_labels
from supermix.zoo import create, pretrained
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-9)
double = partial(torch.tensor, dtype=torch.float64)


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the oracle: three problems, four updates each, made by another program

ORACLE = json.loads((Path(__file__).parent / "data" / "newton_steps.json").read_text())["cases"]
W1, W2, W3 = random(101, 64, 48) / 48**0.5, random(102, 10, 64) / 8, random(103, 10, 48) / 48**0.5


def oracle_teacher(x):
    p = F.adaptive_avg_pool2d(x, 4).flatten(1)
    w1, w2, w3 = (w.to(x) for w in (W1, W2, W3))
    return 2 * (4 * F.relu(4 * p @ w1.T) @ w2.T + 8 * p @ w3.T)


def oracle_problem(case):
    "The sources, the sets and weights made of them, and a function that gives the solver for a number of updates."
    k, size, w, sigma = (float(part.split("=")[1]) for part in case.split())
    sources = F.interpolate(random(7 + int(k), 6, 3, 4, 4), size=int(size), mode="bilinear")
    sets = torch.stack([sources[(torch.arange(int(k)) + b) % 6] for b in range(6)])
    solver = partial(SuperMix, oracle_teacher, k=int(k), mask_size=int(w), sigma=sigma)
    return sources, sets, double(ORACLE[case]["lam"]), solver


@pytest.mark.parametrize("case", ORACLE)
def test_every_number_of_the_oracle(case):
    want = ORACLE[case]
    sources, sets, lam, solver = oracle_problem(case)
    assert oracle_teacher(sources).argmax(1).tolist() == want["teacher_classes_of_images"]
    masks = torch.full((6, sets.shape[1], *sets.shape[-2:]), 1 / sets.shape[1], dtype=torch.float64)  # θ = 0
    logits, solved = oracle_teacher(mix(sets, masks)), torch.zeros(6, dtype=torch.bool)
    for n, step in enumerate(want["steps"], 1):
        got = solver(max_iter=n).solve(sets, lam)
        loss = objective(logits, got.target, masks, 25.0)  # of the state before this update; a solved set is frozen
        close(loss.masked_fill(solved, 0), double(step["loss_before"]))
        close(got.theta[0, 0, 0], double(step["theta_set0_map0_row0"]))
        close(got.theta[5, -1].diagonal(), double(step["theta_set5_lastmap_diag"]))
        close(got.theta.mean(), double(step["theta_mean"]))
        close(got.logits[1], double(step["logits_set1"]))
        assert (~got.solved).double().tolist() == step["unsolved"]
        logits, masks, solved = got.logits, got.masks, got.solved


# ---- one step, three drivers: solver, engine and explorer take the steps of a reference, whatever the settings


def hats(w, n):
    "The matrix (n, w) that enlarges a row of w cells to n pixels, linearly between their middles."
    at = ((torch.arange(n, dtype=torch.float64) + 0.5) * w / n - 0.5).clamp(0, w - 1)
    return (1 - (at[:, None] - torch.arange(w)).abs()).clamp(min=0)


def shares_of(theta, n):
    large = torch.einsum("ay,kyx,bx->kab", hats(theta.shape[-1], n), theta, hats(theta.shape[-1], n))
    return large.sigmoid() / large.sigmoid().sum(0)


def grey(theta, n):
    return (shares_of(theta, n) * (1 - shares_of(theta, n))).mean()


def held(theta, target, n, rounds):
    theta = theta - theta.amax(0)
    for _ in range(rounds):
        theta = theta * (grey(theta - 3, n) / target).clamp(0.3, 8)
    return theta - 3


def sectors(lam, m, n):
    "A partition at angle 0."
    k, at = len(lam), (torch.arange(m.mask_size, dtype=torch.float64) + 0.5) * 2 / m.mask_size - 1
    ramps = torch.stack(
        [math.cos(math.tau * i / k) * at[None] + math.sin(math.tau * i / k) * at[:, None] for i in range(k)]
    )
    offset = torch.zeros(k, 1, 1, dtype=torch.float64)
    for _ in range(12):
        offset += 0.5 * (lam - (30 * (ramps + offset)).softmax(0).mean((1, 2)))[:, None, None]
    return held(4 * (ramps + offset), m.hold, n, 3)


def reference(images, lam, m):
    "θ before each pass over one set, to the last, and whether it is solved there; by nothing of the package."
    n, k, speed = images.shape[-1], len(lam), 0.0
    classes = oracle_teacher(images).argmax(1)
    others = [c for c in range(10) if c not in classes]
    want = sum(share * F.one_hot(c, 10) for share, c in zip(lam, classes))
    theta = sectors(lam, m, n) if m.start == "regions" else torch.zeros(k, m.mask_size, m.mask_size).double()
    way = []
    for updates in range(m.max_iter + 1):
        way.append(theta)
        left = max(0, 1 - updates / m.anneal) if m.anneal else 0
        tau, sigma = 1 + (m.tau - 1) * left, m.sigma * (m.sigma_end + (1 - m.sigma_end) * left if m.anneal else 1)
        leaf = theta.clone().requires_grad_()
        z = oracle_teacher((shares_of(leaf, n)[:, None] * images).sum(0)[None])[0]
        lack = (m.lead + z[others].max() - z[classes].min()).clamp(min=0)
        if updates and set(z.argsort()[-k:].tolist()) == set(classes.tolist()):
            return way, True
        if updates > 1 and m.give_up is not None and lack > m.give_up:
            break
        warm = want ** (1 / tau) / (want ** (1 / tau)).sum()
        loss = tau**2 * (warm * (warm.clamp(min=1e-99).log() - (z / tau).log_softmax(0))).sum()
        if updates >= m.anneal:
            loss = loss + m.margin * lack
        if m.hold is None:
            loss = loss + m.lambda_s * grey(leaf, n)
        (grad,) = torch.autograd.grad(loss, leaf)
        taps = torch.arange(-int(2.5 * sigma), int(2.5 * sigma) + 1).double()
        taps = (-(taps**2) / (2 * sigma**2)).exp() / (-(taps**2) / (2 * sigma**2)).exp().sum()
        d = F.conv2d(grad[:, None], (taps[:, None] * taps)[None, None], padding=len(taps) // 2)[:, 0]
        speed = m.momentum * speed - (m.step * loss.detach() / ((grad * d).sum() + 1e-10)).clamp(1e-4, 2000) * d
        theta = theta + speed
        if m.hold is not None:
            theta = held(theta, m.hold, n, 1)
    return way, False


def by_solver(teacher, sets, lam, mixing):
    SuperMix(teacher, mixing).solve(sets, lam)


def by_explorer(teacher, sets, lam, mixing):
    trace(SuperMix(teacher, mixing), sets, lam)


def by_engine(teacher, sets, lam, mixing):
    n, k = sets.shape[:2]
    engine = Engine(teacher, sets[:, 0], mixing, slots=4)  # fewer than there are sets: some wait
    engine.dtype = torch.float64
    nothing = torch.zeros(n, k, 1)
    list(
        engine.run(
            [
                Sets(
                    torch.arange(n),
                    nothing,
                    nothing,
                    nothing,
                    lam,
                    torch.zeros(n),
                    teacher(sets.flatten(0, 1)).argmax(1).view(n, k),
                    sets,
                )
            ]
        )
    )


DRIVERS = {
    "solver": (by_solver, supermix.mixing.solver),
    "engine": (by_engine, supermix.mixing.engine),
    "explorer": (by_explorer, supermix.explore.trace),
}


def recorded(driver, sets, lam, mixing, monkeypatch):
    "θ before each pass over each set, and whether it is solved at the last, as a driver hands them to the step."
    drive, module = DRIVERS[driver]
    ways, solved = [[] for _ in sets], [False] * len(sets)

    def step(teacher, problem, state, *rest):
        now = search_step(teacher, problem, state, *rest)
        for images, at, done in zip(problem.sets, state.theta, now.solved.tolist()):
            b = next(b for b, other in enumerate(sets) if torch.equal(images, other))
            ways[b].append(at.clone())
            solved[b] = done
        return now

    monkeypatch.setattr(module, "search_step", step)
    if driver == "engine":
        monkeypatch.setattr(module, "_round_theta", lambda theta, held: theta)  # to 16 bits
    drive(oracle_teacher, sets, lam, mixing)
    return ways, solved


def problem_of(k):
    "Six sets of k images of the oracle's, and their shares."
    sources = F.interpolate(random(7 + k, 6, 3, 4, 4), size=16, mode="bilinear")
    sets = torch.stack([sources[(torch.arange(k) + b) % 6] for b in range(6)])
    return sets, 0.1 / k + 0.9 * random(12, 6, k).softmax(1)


def same_ways(ours, theirs):
    return all(
        len(a) == len(b)
        and all(x.shape == y.shape and torch.allclose(x, y, rtol=1e-6, atol=1e-9) for x, y in zip(a, b))
        for a, b in zip(ours, theirs)
    )


SLOW = Mixing(max_iter=5, step=0.3)  # small steps: sets stay open for some updates
HELD = replace(SLOW, hold=0.06)
HINGED = replace(SLOW, margin=2.0)
ANNEALED = replace(HINGED, anneal=3, tau=2.0, sigma_end=0.5)
ONE_FIELD = [
    (SLOW, {}),
    (SLOW, {"k": 3}),
    (SLOW, {"mask_size": 5}),
    (SLOW, {"sigma": 2.0}),
    (SLOW, {"lambda_s": 5.0}),
    (SLOW, {"max_iter": 3}),
    (SLOW, {"step": 0.5}),
    (SLOW, {"hold": 0.06}),
    (SLOW, {"margin": 2.0}),
    (SLOW, {"give_up": 1.0}),
    (HELD, {"start": "regions"}),
    (HINGED, {"lead": 0.2}),
    (HELD, {"momentum": 0.5}),
    (ANNEALED, {"anneal": 2}),
    (ANNEALED, {"tau": 3.0}),
    (ANNEALED, {"sigma_end": 0.2}),
]


@pytest.mark.parametrize("base, field", ONE_FIELD, ids=lambda part: " ".join(part) if isinstance(part, dict) else "")
def test_three_drivers_take_the_same_steps_and_know_every_setting(base, field, monkeypatch):
    mixing = replace(base, **field)
    sets, lam = problem_of(mixing.k)
    ways, solved = zip(*(reference(*pair, mixing) for pair in zip(sets, lam)))
    for driver in DRIVERS:
        ours, done = recorded(driver, sets, lam, mixing, monkeypatch)
        assert same_ways(ours, ways) and done == list(solved), driver
    if field and "k" not in field:
        assert not same_ways(ways, [reference(*pair, base)[0] for pair in zip(sets, lam)])


def test_every_field_of_the_search_is_tried():
    assert {f.name for f in fields(Mixing)} == {name for _, field in ONE_FIELD for name in field} | {"alpha"}


# ---- settings are one object


def test_settings_by_name_are_a_shorthand(teacher, digits, seeded):
    images = digits.test[:12][0]
    for by_name, by_object in (
        (SuperMix(teacher, k=3, sigma=2.0, max_iter=2), SuperMix(teacher, Mixing(k=3, sigma=2.0, max_iter=2))),
        (SuperMix(teacher, Mixing(sigma=2.0, max_iter=2), k=3), SuperMix(teacher, Mixing(sigma=2.0, max_iter=2, k=3))),
    ):
        assert by_name.mixing == by_object.mixing
        for ours, theirs in zip(by_name(images, generator=seeded()), by_object(images, generator=seeded())):
            assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="Expected settings as a `Mixing` or by their names, such as k=3, got 3"):
        SuperMix(teacher, 3)
    with pytest.raises(ValueError, match="sigm.*Did you mean 'sigma'"):
        SuperMix(teacher, sigm=2.0)


def test_a_mixers_settings_can_be_read_and_not_set(teacher):
    mixing = Mixing(k=3, **FAST)
    mixer = SuperMix(teacher, mixing)
    assert {f.name: getattr(mixer, f.name) for f in fields(Mixing)} == vars(mixing)
    with pytest.raises(AttributeError):
        mixer.k = 2  # which would say something else than its `mixing`


@dataclass(frozen=True)
class Wider(Mixing):
    "What `Mixing` is after a setting was added to it."

    tilt: float = _later(0.5)


def test_a_new_setting_is_known_wherever_settings_go(teacher, digits, capsys):
    assert SuperMix(teacher, Wider(), tilt=2.0).mixing.tilt == 2.0
    assert Engine(teacher, digits.test[:2][0], Wider(tilt=2.0)).mixing.tilt == 2.0
    assert set(_settings(Wider)) == set(_settings(Mixing)) | {"tilt?"}  # earlier stores lack it
    assert set(_settings(Mixing)) == set(_MANIFEST["recipe"]["mixing"])
    assert as_named(Wider()) == as_named(Mixing()) and as_named(Wider(tilt=2.0))["tilt"] == 2.0
    assert {f.name for f in fields(Mixing)} < {f.name for f in fields(Setting)}
    with pytest.raises(SystemExit):
        tyro.cli(command, args=["--help"])
    shown = capsys.readouterr().out
    assert all(f"--mixing.{f.name.replace('_', '-')} " in shown for f in fields(Mixing))


def test_the_settings_are_listed_in_one_place():
    "Most are read by the step alone; who names one elsewhere has a use for just that one."
    package = Path(supermix.mixing.solver.__file__).parent.parent
    names = [f.name for f in fields(Mixing)]
    for path in package.rglob("*.py"):
        if path.name in ("recipes.py", "solver.py", "_modidx.py"):
            continue
        text = path.read_text()
        listed = [name for name in names if re.search(rf"\b{name}\b", text)]
        assert not {"give_up", "alpha", "step", "margin"} <= set(listed), path


# ---- equations (1) to (4) again, in plain loops over plain numbers; the gradient by central differences


def slow_masks(theta, H, W):
    k, w = len(theta), len(theta[0])
    masks = [[[0.0] * W for _ in range(H)] for _ in range(k)]
    for r in range(H):
        for c in range(W):
            y, x = (max((at + 0.5) * w / n - 0.5, 0) for at, n in ((r, H), (c, W)))
            y0, x0 = int(y), int(x)
            y1, x1, fy, fx = min(y0 + 1, w - 1), min(x0 + 1, w - 1), y - y0, x - x0
            s = []
            for t in theta:
                top, bottom = t[y0][x0] * (1 - fx) + t[y0][x1] * fx, t[y1][x0] * (1 - fx) + t[y1][x1] * fx
                s.append(1 / (1 + math.exp(-(top * (1 - fy) + bottom * fy))))
            for i in range(k):
                masks[i][r][c] = s[i] / sum(s)
    return masks


def slow_logits(weights, images, masks):
    H, W, pixels = len(masks[0]), len(masks[0][0]), []
    for channel in range(len(images[0])):
        for r in range(H):
            for c in range(W):
                pixels.append(sum(m[r][c] * x[channel][r][c] for m, x in zip(masks, images)))
    return [4 * math.tanh(sum(a * p for a, p in zip(row, pixels))) for row in weights]


def slow_loss(theta, weights, images, target, lambda_s):
    H, W, k = len(images[0][0]), len(images[0][0][0]), len(theta)
    masks = slow_masks(theta, H, W)
    z = slow_logits(weights, images, masks)
    log_sum = math.log(sum(math.exp(v) for v in z))
    kl = sum(y * (math.log(y) - (v - log_sum)) for y, v in zip(target, z) if y > 0)
    return kl + lambda_s * sum(v * (1 - v) for m in masks for row in m for v in row) / (k * H * W), z


def slow_solve(weights, images, lam, w, sigma, lambda_s, max_iter):
    k, H, W = len(images), len(images[0][0]), len(images[0][0][0])
    ones, zeros = [[1.0] * W] * H, [[0.0] * W] * H
    seen = [slow_logits(weights, images, [ones if j == i else zeros for j in range(k)]) for i in range(k)]
    classes = [z.index(max(z)) for z in seen]
    target = [sum(share for share, c in zip(lam, classes) if c == n) for n in range(len(weights))]
    radius = int(5 * sigma / 2)
    taps = {t: math.exp(-t * t / (2 * sigma * sigma)) if sigma else 1.0 for t in range(-radius, radius + 1)}
    total = sum(taps.values()) ** 2
    theta = [[[0.0] * w for _ in range(w)] for _ in range(k)]
    cells = [(i, r, c) for i in range(k) for r in range(w) for c in range(w)]
    for step in range(1, max_iter + 1):
        loss, _ = slow_loss(theta, weights, images, target, lambda_s)
        grad = {}
        for i, r, c in cells:
            here, sides = theta[i][r][c], []
            for h in (1e-5, -1e-5):
                theta[i][r][c] = here + h
                sides.append(slow_loss(theta, weights, images, target, lambda_s)[0])
            theta[i][r][c] = here
            grad[i, r, c] = (sides[0] - sides[1]) / 2e-5
        d = {}
        for i, r, c in cells:
            d[i, r, c] = sum(taps[a] * taps[b] * grad.get((i, r + a, c + b), 0.0) for a in taps for b in taps) / total
        length = min(max(loss / (sum(grad[at] * d[at] for at in cells) + 1e-10), 1e-4), 2000)
        for i, r, c in cells:
            theta[i][r][c] -= length * d[i, r, c]
        _, z = slow_loss(theta, weights, images, target, lambda_s)
        highest = sorted(range(len(z)), key=lambda n: -z[n])[:k]
        if sorted(highest) == sorted(classes):
            return theta, z, step, True
    return theta, z, max_iter, False


@pytest.mark.parametrize(
    "k, w, sigma, lambda_s, H, W",
    [(2, 2, 1.0, 25.0, 3, 4), (3, 3, 0.6, 25.0, 5, 3), (2, 1, 0.0, 1.0, 2, 2), (4, 2, 2.0, 5.0, 2, 3)],
)
def test_a_slow_twin_takes_the_same_steps(k, w, sigma, lambda_s, H, W):
    weights, sets = random(1, 6, 2 * H * W) / (2 * H * W) ** 0.5, random(2, 3, k, 2, H, W)
    lam = random(3, 3, k).softmax(1)
    mixer = SuperMix(
        lambda x: 4 * torch.tanh(x.flatten(1) @ weights.T),
        Mixing(k=k, mask_size=w, sigma=sigma, lambda_s=lambda_s, max_iter=3),
    )
    got = mixer.solve(sets, lam)
    for b in range(3):
        theta, z, steps, solved = slow_solve(weights.tolist(), sets[b].tolist(), lam[b].tolist(), w, sigma, lambda_s, 3)
        torch.testing.assert_close(got.theta[b], double(theta), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(got.logits[b], double(z), rtol=1e-5, atol=1e-7)
        assert (got.steps[b].item(), got.solved[b].item()) == (steps, solved)


@pytest.mark.parametrize("loss, grad, length", [(1.0, 2.0, 0.25), (1.0, 1e-3, 2e3), (1e-9, 1.0, 1e-4), (1.0, 0.0, 2e3)])
def test_the_length_of_a_step_is_clipped(loss, grad, length):
    grad = torch.full((1, 1, 1, 1), grad)
    close(newton_step(torch.ones_like(grad), torch.tensor([loss]), grad, sigma=0), 1 - length * grad, rtol=1e-5)


@given(
    N=st.integers(2, 8),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    lambda_s=st.sampled_from([0.0, 25.0]),
)
def test_the_objective_is_torchs_kl_plus_sparsity(N, seed, scale, lambda_s):
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(3, N, generator=g, dtype=torch.float64)
    lam = torch.rand(3, 2, generator=g, dtype=torch.float64).softmax(1)
    target = soft_labels(torch.randint(N, (3, 2), generator=g), lam, N)
    masks = torch.rand(3, 2, 4, 5, generator=g, dtype=torch.float64).softmax(1)
    each = [
        F.kl_div(z.log_softmax(1), y, reduction="batchmean") + lambda_s * (m - m**2).mean()
        for z, y, m in zip(logits.split(1), target.split(1), masks)
    ]
    close(objective(logits, target, masks, lambda_s), torch.stack(each))


# ---- what every result must be


def pooled(x):
    return F.adaptive_avg_pool2d(x.mean(1, keepdim=True), 3).flatten(1) @ random(5, 9, 7).to(x)


@st.composite
def problems(draw):
    k, B, C = draw(st.integers(2, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    H, W, scale = draw(st.integers(1, 14)), draw(st.integers(1, 14)), draw(st.sampled_from([0.0, 1e-6, 1.0, 1e4]))
    dtype, seed = draw(st.sampled_from([torch.float32, torch.float64])), draw(st.integers(0, 1000))
    sets = (scale * random(seed, B, k, C, H, W)).to(dtype)
    lam = draw(st.sampled_from([F.one_hot(torch.arange(B) % k, k), (3 * random(seed, B, k)).softmax(1)])).to(dtype)
    mixer = SuperMix(
        pooled,
        k=k,
        mask_size=draw(st.integers(1, min(H, W))),
        sigma=draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
        lambda_s=draw(st.sampled_from([0.0, 25.0, 1e4])),
        max_iter=draw(st.integers(1, 6)),
    )
    return mixer, sets, lam


@given(problems())
def test_any_shape_and_size(problem):
    mixer, sets, lam = problem
    (B, k, C, H, W), scale = sets.shape, sets.abs().max().item()
    got = mixer.solve(sets, lam)
    assert got.images.shape == (B, C, H, W) and got.masks.shape == (B, k, H, W)
    assert got.theta.shape == (B, k, mixer.mask_size, mixer.mask_size) and len(got) == B
    assert got.logits.shape == got.target.shape == (B, 7) and f"{B} sets of {k} images, {H}×{W}" in repr(got)
    assert {t.dtype for t in (got.images, got.masks, got.theta, got.lam, got.logits)} == {sets.dtype}
    assert torch.isfinite(got.theta).all() and 0 <= got.masks.min() and got.masks.max() <= 1
    torch.testing.assert_close(got.masks.sum(1), torch.ones(B, H, W, dtype=sets.dtype))
    assert ((got.images >= sets.amin(1) - 1e-6 * scale) & (got.images <= sets.amax(1) + 1e-6 * scale)).all()
    torch.testing.assert_close(pooled(got.images), got.logits, rtol=1e-4, atol=1e-5 * max(scale, 1))
    assert torch.equal(got.classes, pooled(sets.flatten(0, 1)).argmax(1).view(B, k)) and torch.equal(got.lam, lam)
    top, classes = got.logits.topk(k).indices.tolist(), got.classes.tolist()
    assert got.solved.tolist() == [sorted(a) == sorted(b) for a, b in zip(top, classes)]
    assert (got.steps >= 1).all() and (got.steps <= mixer.max_iter).all()
    assert (got.steps[~got.solved] == mixer.max_iter).all()


def test_a_set_that_lacks_much_is_given_up():
    "In double precision: how a sum is rounded may depend on the other sets of a batch, and decides close cases."
    teacher = pretrained("digits").requires_grad_(False).double()
    images = load_data("digits").train[:64][0].double()
    patient, hasty = (SuperMix(teacher, max_iter=12, give_up=bound) for bound in (None, 2.0))
    draw = patient.draw(images, generator=torch.Generator().manual_seed(0))
    want, got = (mixer.solve(images[draw.partners], draw.lam, draw=draw) for mixer in (patient, hasty))
    gone = ~got.solved & (got.steps < 12)
    assert gone.sum() > 5 and (got.steps[gone] > 1).all() and (hinge(got.logits, got.classes)[gone] > 2).all()
    assert (
        got.solved.sum() > 5
        and (want.solved | ~got.solved).all()
        and torch.equal(want.steps[got.solved], got.steps[got.solved])
    )
    late = ~gone & (got.steps > 1) & (got.steps < 12)
    assert (hinge(got.logits, got.classes)[late] <= 2).all()


def test_the_check_comes_after_an_update_and_stops_a_set_at_once():
    means = lambda x: x.mean((2, 3))  # a class for each channel
    flat = 5 * torch.eye(3)[:, :, None, None].expand(3, 3, 4, 4)
    sets = torch.stack([flat[[0, 1]], flat[[2, 2]], flat[[0, 1]]])  # the second is never solved, and no error
    got = SuperMix(means, mask_size=4, max_iter=7).solve(sets, torch.tensor([[0.6, 0.4]] * 3))
    assert is_solved(means(sets.mean(1)), got.classes).tolist() == [True, False, True]  # the flat average would do
    assert got.steps.tolist() == [1, 7, 1] and got.solved.tolist() == [True, False, True]


# ---- a teacher of just k classes


def pair(x, net=pretrained("digits")):
    return net(x)[:, [3, 8]]  # a teacher that tells a 3 from an 8


def threes_and_eights(digits, n=48):
    return digits.train[(digits.train.labels % 5 == 3).nonzero().flatten()[:n]][0]


@pytest.mark.parametrize(
    "options, share, grey",
    [
        ({}, 0.7, 1 / 8),
        (FAST, 0.9, 1 / 8),
        ({"hold": 0.2}, 0.7, 1 / 4),
        (FAST | {"hold": 0.09, "margin": 0.0}, 0.9, 1 / 8),
    ],
)
def test_two_classes_ask_for_sharp_masks_that_the_teacher_sees(options, share, grey, digits, seeded):
    images, mixer = threes_and_eights(digits), SuperMix(pair, **options)
    draw = mixer.draw(images, generator=seeded())
    theta = mixer.first_theta(draw.lam, (32, 32), seeded())
    got = mixer.solve(images[draw.partners], draw.lam, theta, draw)
    kl = objective(got.logits, got.target, got.masks, 0.0)
    good = (kl <= math.log(2)) & (sparsity(got.masks) <= grey)
    assert torch.equal(good, got.solved) and share < good.float().mean()
    first = SuperMix(pair, **{**options, "max_iter": 1}).solve(images[draw.partners], draw.lam, theta, draw)
    assert torch.equal(got.steps == 1, first.solved) and first.solved.float().mean() < good.float().mean() - 0.05


def test_the_engine_has_the_same_rule_for_two_classes(digits):
    images = digits.train.subset(400)
    images = images._take((images.labels % 5 == 3).nonzero().flatten())
    for options in ({"max_iter": 20}, FAST):
        mixing = Mixing(**options)
        engine = Engine(pair, images[:2][0], mixing)
        found = solve_blocks(engine, images, 0, [0])
        masks = masks_from_theta(decode(found.code, mixing.hold is not None), (32, 32))
        target = soft_labels(found.classes, found.lam, 2)
        assert (sparsity(masks) <= 1 / 8 + 1e-6).all() and engine.tried >= len(found.index) > 64
        assert (objective(found.logits, target, masks, 0.0) <= math.log(2) + 1e-5).all() and (found.steps > 1).any()


def test_the_rule_for_k_classes_needs_the_masks():
    z, classes = torch.zeros(1, 3), torch.tensor([[2, 0, 1]])
    with pytest.raises(ValueError, match="Expected target and masks for a teacher of 3 classes and sets of 3 images"):
        is_solved(z, classes)
    binary = F.one_hot(torch.arange(9) % 3, 3).T.reshape(1, 3, 3, 3).double()
    assert is_solved(z, classes, torch.tensor([[0.2, 0.3, 0.5]]), binary).all()
    assert not is_solved(z, torch.tensor([[2, 0, 2]]), torch.tensor([[0.2, 0.0, 0.8]]), binary).any()  # one class twice


def test_sets_neither_know_each_other_nor_when_they_were_begun():
    _, sets, lam, solver = oracle_problem("k=3 size=32 w=8 sigma=1")
    given_sets, start = sets.clone(), random(9, 6, 3, 8, 8) / 10
    given_start = start.clone()
    together = solver(max_iter=6).solve(sets, lam, start)
    assert together.solved.any() and not together.solved.all()
    alone = [solver(max_iter=6).solve(sets[b : b + 1], lam[b : b + 1], start[b : b + 1]) for b in range(6)]
    close(torch.cat([one.theta for one in alone]), together.theta)
    assert torch.cat([one.steps for one in alone]).tolist() == together.steps.tolist()
    first = solver(max_iter=2).solve(sets, lam, start)
    rest = solver(max_iter=4).solve(sets, lam, first.theta)
    close(rest.theta[~first.solved], together.theta[~first.solved])
    assert torch.equal(sets, given_sets) and torch.equal(start, given_start)  # nothing that was given has changed


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_permuting_the_sources_permutes_the_masks(k):
    images, lam = F.interpolate(random(8, 5, 3, 4, 4), size=20)[None, :k], random(9, 1, k).softmax(1)
    order = torch.arange(k).roll(1)
    solver = SuperMix(oracle_teacher, k=k, max_iter=5)
    a, b = solver.solve(images, lam), solver.solve(images[:, order], lam[:, order])
    close(b.masks, a.masks[:, order])
    close(b.images, a.images)


# ---- the drop-in call


@pytest.mark.parametrize("k", [2, 3, 5])
def test_it_stands_where_torchvisions_mixup_stands(k, teacher, digits, seeded):
    images, labels = digits.test[:24]
    mixer = SuperMix(teacher, k=k, max_iter=1)
    mixed, targets = mixer(images, labels, generator=seeded())
    for ours, theirs in zip((mixed, targets), v2.MixUp(num_classes=10)(images, labels)):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    draw = mixer.draw(images, generator=seeded())
    with torch.no_grad():
        classes = teacher(images).argmax(1)[draw.partners]
    assert torch.equal(classes, draw.classes) and all(len(set(row)) == k for row in classes.tolist())
    torch.testing.assert_close(targets, (F.one_hot(classes, 10) * draw.lam[..., None]).sum(1))  # ŷ of equation (2)
    solved = mixer.solve(images[draw.partners], draw.lam)
    assert torch.equal(solved.images, mixed) and not solved.solved.all()  # unsolved ones included
    assert not any(torch.equal(row, images[i]) for row, sources in zip(mixed, draw.partners) for i in sources)
    for other in (None, (labels + 1) % 10):  # the classes are the teacher's: labels make no difference
        again, their_targets = mixer(images, other, generator=seeded())
        assert torch.equal(again, mixed) and torch.equal(their_targets, targets)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_student_trains_from_a_loader_that_mixes(workers, labelled, teacher, digits):
    samples = digits.test.subset(48)
    samples = samples if labelled else list(samples[:][0])
    student = create("resnet8", 10).train()
    before = [p.clone() for p in student.parameters()]
    optimiser, batches = torch.optim.SGD(student.parameters(), lr=0.1), 0
    mixer, start = SuperMix(teacher, k=3, max_iter=2), "spawn" if workers and torch.cuda.is_available() else None
    for images, targets in DataLoader(
        samples, batch_size=24, num_workers=workers, collate_fn=mixer, multiprocessing_context=start
    ):  # autograd beside a GPU forbids to fork
        assert images.shape == (24, 3, 32, 32) and (targets > 0).sum(1).tolist() == [3] * 24
        F.cross_entropy(student(images), targets).backward()
        optimiser.step()
        batches += 1
    assert batches == 2 and all((p != q).any() for p, q in zip(student.parameters(), before))
    assert all(p.grad is None for p in teacher.parameters())


# ---- any teacher, and as it was afterwards

TEACHERS = {
    "torchvision's resnet18": lambda: torchvision.models.resnet18(num_classes=7),
    # it gives a tuple of three in training mode, in which it is made
    "torchvision's googlenet": lambda: torchvision.models.googlenet(num_classes=7, init_weights=False),
    "timm's vision transformer": lambda: timm.create_model("test_vit", num_classes=7, img_size=(64, 48)),
    "timm's convnext": lambda: timm.create_model("test_convnext", num_classes=7),
    "a function of one": lambda: lambda x, net=create("wrn_16_1", 7).eval(): net(x),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_other_peoples_networks(name, photos):
    torch.manual_seed(0)
    small = [v2.functional.resize(torch.from_numpy(p).movedim(-1, 0), [64, 48]) / 128 - 1 for p in photos.values()]
    sets = torch.stack(small)[torch.tensor([[0, 1, 2], [3, 0, 1]])]
    got = SuperMix(TEACHERS[name](), k=3, mask_size=5, max_iter=3).solve(sets, torch.full((2, 3), 1 / 3))
    assert got.images.shape == (2, 3, 64, 48) and got.logits.shape == (2, 7)
    assert (got.theta.flatten(1) != 0).any(1).all() and torch.isfinite(got.theta).all()  # its gradient came through


def hidden(way, net):
    "A callable that hides a network."

    class Caller:
        def __init__(self):
            self.inside = {"nets": [net]}

        def __call__(self, x):
            return self.inside["nets"][0](x)

        def look(self, x):
            return self(x)

    class Slots:
        __slots__ = ("net",)

        def __call__(self, x):
            return self.net(x)

    class Unregistered(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = [net]

        def forward(self, x):
            return self.nets[0](x)

    slots = Slots()
    slots.net = net
    scope = {"net": net}
    exec("def f(x): return (lambda y: net(y))(x)", scope)
    return {
        "closure": lambda x: net(x),
        "global of a lambda within": scope["f"],
        "default": lambda x, net=net: net(x),
        "partial": partial(lambda net, x: net(x), net),
        "object": Caller(),
        "method": Caller().look,
        "function in a function": lambda x, f=lambda y: net(y): f(x),
        "slots": slots,
        "module": Unregistered(),
    }[way]


WAYS = [
    "closure",
    "global of a lambda within",
    "default",
    "partial",
    "object",
    "method",
    "function in a function",
    "module",
    "slots",
]


def calls(name):
    return {
        "draw": lambda teacher, x: SuperMix(teacher)(x),
        "check": check_teacher,
        "solve": lambda teacher, x: SuperMix(teacher).solve(x.view(4, 2, *x.shape[1:]), torch.full((4, 2), 0.5)),
        "engine": lambda teacher, x: Engine(teacher, x[:2]),
    }[name]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["check", "draw", "solve", "engine"])
def test_a_hidden_network_in_training_mode(way, name, digits):
    net, x = torchvision.models.resnet18(num_classes=3), digits.test[:8][0]
    before, random_state = [t.clone() for t in net.state_dict().values()], torch.get_rng_state()
    with pytest.raises(ValueError, match="Expected a teacher in evaluation mode.*" + r"\.eval\(\)" * (way != "slots")):
        calls(name)(hidden(way, net), x)
    if way == "slots":  # Python does not show it: two passes, and no more
        assert net.bn1.num_batches_tracked <= 2
        return
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values())) and net.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert net in _hidden_networks(hidden(way, net)).values()
    check_teacher(hidden(way, net.eval()), x)


class Odd(nn.Module):
    "A network that is never quite in evaluation mode."

    def __init__(self, **options):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **options), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(F.dropout(self.norm(self.conv(x)).relu().mean((2, 3)), self.p))


@pytest.mark.parametrize("p, options", [(0.5, {}), (0.0, {"track_running_stats": False})])
def test_logits_that_depend_on_the_batch_even_in_evaluation_mode(p, options, digits):
    net = Odd(**options)
    net.p = p
    with pytest.raises(ValueError, match="evaluation mode.*`F.dropout`.*running statistics"):
        SuperMix(net)(digits.test[:8][0])


def test_a_batch_norm_that_refuses_a_single_image(digits):
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"evaluation mode.*Call net.eval\(\)"):
        SuperMix(lambda x: net(x))(digits.test[:8][0])


def test_a_teacher_is_checked_once_and_nothing_is_said_of_harmless_ones(digits):
    passes = 0
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)).double()

    def teacher(x):  # in training mode, but nothing in it depends on that
        nonlocal passes
        passes += 1
        return net(x.double()).float()

    mixer, x = SuperMix(teacher, max_iter=1), digits.test[:8][0]
    counts = []
    for _ in range(3):
        before = passes
        mixer.solve(x.view(4, 2, 3, 32, 32), torch.full((4, 2), 0.5))
        counts.append(passes - before)
    assert counts == [counts[1] + 2, counts[1], counts[1]]
    for shape in ((1, 3, 8, 8), (2, 3, 1, 1), (5, 3, 7, 4)):
        check_teacher(lambda x: x.flatten(1)[:, :3], torch.randn(shape))


WRAPPERS = {"compiled": partial(torch.compile, backend="eager"), "DataParallel": nn.DataParallel}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_teacher_is_the_teacher(name, teacher, digits, seeded):
    x, wrapped = digits.test[:12][0], WRAPPERS[name](pretrained("digits").train())
    want, got = (SuperMix(t, max_iter=3)(x, generator=seeded()) for t in (teacher, wrapped))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert wrapped.training and all(m.training for m in wrapped.modules())
    assert accuracy(wrapped, digits.test) == accuracy(teacher, digits.test)


# ---- are these the teacher's classes?


def test_the_agreement_with_labels_is_the_accuracy(teacher, digits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        everything = check_teacher_labels(teacher, digits.test, 10**6)
        a, b = (check_teacher_labels(teacher.train(), digits.test, 100) for _ in range(2))
    assert everything == pytest.approx(accuracy(teacher.eval(), digits.test))
    few = digits.test.subset(100)
    assert few.labels.bincount().tolist() == [10] * 10 and a == b == pytest.approx(accuracy(teacher, few))


@pytest.mark.parametrize("classes", [10, 11, 100])
def test_classes_in_the_order_of_their_names_are_found_out(classes, recwarn):
    "As folders sort them: '10' before '2'. Of a hundred, twelve keep their places, and of eleven, two."
    order = torch.tensor([sorted(map(str, range(classes))).index(str(n)) for n in range(classes)])
    labels = torch.arange(classes).repeat(4)
    right = compare_classes(order[labels], labels)
    assert right == pytest.approx(100 * (order == torch.arange(classes)).float().mean().item())
    found = [str(w.message) for w in recwarn]
    assert len(found) == (classes > 10) and all("another order" in text and "head is wrong" in text for text in found)


@pytest.mark.parametrize("share, told", [(0.02, True), (0.5, True), (0.57, True), (0.6, False), (1.0, False)])
def test_two_classes_are_near_chance_at_a_half(share, told, recwarn):
    labels = torch.cat([torch.zeros(300), torch.ones(100)]).long()  # the larger class does not count for more
    wrong = torch.cat([torch.arange(300) >= 300 * share, torch.arange(100) >= 100 * share])
    assert compare_classes(labels ^ wrong, labels) == pytest.approx(100 * share, abs=0.5) and len(recwarn) == told
    assert compare_classes(labels[:30] + 1, labels[:30]) == 0 and len(recwarn) == told  # a single class says nothing


@pytest.mark.parametrize("shift, told", [(0, 0), (1, 1)])
@pytest.mark.parametrize("soft", [False, True])
def test_a_mixer_warns_once_of_labels_that_are_not_its_teachers(shift, told, soft, teacher, digits, recwarn):
    mixer = SuperMix(teacher, max_iter=1)
    for start in range(0, 480, 60):
        x, labels = digits.test[start : start + 60]
        labels = (labels + shift) % 10
        mixer(x, F.one_hot(labels, 10).float() if soft else labels)
        assert len(recwarn) == (told if start >= 240 else 0)  # the first 300 are compared


class Student(nn.Sequential):
    "A network in the middle of its training: parts frozen, gradients kept, dropout, one part in evaluation mode."

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(create("resnet8", 10), nn.Dropout(0.5))
        self.train()
        F.cross_entropy(self(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
        self[0].stages[0].eval()
        self[0].stem.requires_grad_(False)
        self[0].head.bias.grad = None

    def state(self):
        return {
            "modes": [m.training for m in self.modules()],
            "frozen": [p.requires_grad for p in self.parameters()],
            "weights": [t.tolist() for t in self.state_dict().values()],
            "gradients": [None if p.grad is None else p.grad.tolist() for p in self.parameters()],
        }


CONTEXTS = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_the_teacher_is_left_as_it_was_wherever_it_is_called(name, digits):
    with CONTEXTS[name]():
        sets, lam = digits.test[:8][0].view(4, 2, 3, 32, 32), torch.full((4, 2), 0.5)  # made in the context, too
        with torch.inference_mode(False):
            network = Student()
        before = network.state()
        got = SuperMix(network, max_iter=2).solve(sets, lam)
        assert not got.images.requires_grad
    assert network.state() == before
    if name == "autocast":
        return
    plain = SuperMix(network.eval(), max_iter=2).solve(sets.clone(), lam.clone())
    assert torch.equal(got.theta, plain.theta) and torch.equal(got.images, plain.images)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_the_teacher_is_left_as_it_was_after_an_error(fails_at, digits):
    class Failing(Student):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * (float("nan") if self.calls > fails_at else 1)

    network = Failing()
    network.calls, before = 0, network.state()
    with pytest.raises(ValueError, match="Expected finite logits"):
        SuperMix(network).solve(digits.test[:8][0].view(4, 2, 3, 32, 32), torch.full((4, 2), 0.5))
    assert network.calls > fails_at and network.state() == before


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_network_but_not_the_solver(device, dtype, teacher, digits):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    network = create("resnet20", 10).to(device)
    network.load_state_dict(teacher.state_dict())
    sets, lam = digits.test[:16][0].view(8, 2, 3, 32, 32).to(device), torch.tensor([[0.7, 0.3]] * 8, device=device)
    solver = SuperMix(network, max_iter=1)
    exact = solver.solve(sets, lam)
    with torch.autocast(device, dtype):
        rounded = solver.solve(sets, lam)
    assert {t.dtype for t in (rounded.images, rounded.masks, rounded.theta, rounded.logits)} == {torch.float32}
    torch.testing.assert_close(rounded.masks.sum(1), torch.ones(8, 32, 32, device=device))
    assert (rounded.masks - exact.masks).abs().mean() < 0.02 < exact.masks.std()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("generators_device", ["cpu", "cuda", None])
def test_a_gpu_gives_what_the_cpu_gives(generators_device, seeded):
    _, sets, lam, solver = oracle_problem("k=2 size=32 w=8 sigma=1")
    here = solver(max_iter=6).solve(sets, lam)
    there = solver(max_iter=6).solve(sets.cuda(), lam)  # the weights may stay on the CPU
    close(there.theta.cpu(), here.theta)
    assert there.images.device.type == "cuda" and there.steps.tolist() == here.steps.tolist()
    generator = seeded(0, generators_device) if generators_device else None
    mixed, targets = solver(max_iter=6)(sets[:, 0].cuda(), generator=generator)
    assert (mixed.device.type, mixed.shape) == ("cuda", (6, 3, 32, 32))
    assert (targets.device.type, targets.shape) == ("cuda", (6, 10))


# ---- bad input says what was expected and what came


def nets(logits):
    return lambda x: logits(x.flatten(1)[:, :10])


BAD = {
    "k = 1": (lambda t, s, lam: SuperMix(t, k=1), "Expected k of 2 or more images per set, got 1"),
    "half an image": (lambda t, s, lam: SuperMix(t, k=2.5), "k.* got 2.5"),
    "no mask": (lambda t, s, lam: SuperMix(t, mask_size=0), "Expected mask_size of 1 or more, got 0"),
    "half a cell": (lambda t, s, lam: SuperMix(t, mask_size=7.5), "mask_size.* got 7.5"),
    "no updates": (lambda t, s, lam: SuperMix(t, max_iter=0), "Expected max_iter of 1 or more, got 0"),
    "what is solved given up": (
        lambda t, s, lam: SuperMix(t, give_up=0.5),
        "Expected give_up of 1 or more, or None, got 0.5",
    ),
    "sigma": (lambda t, s, lam: SuperMix(t, sigma=-1.0), "Expected sigma of 0 or more, got -1.0"),
    "lambda_s": (lambda t, s, lam: SuperMix(t, lambda_s=float("nan")), "Expected lambda_s of 0 or more, got nan"),
    "alpha": (lambda t, s, lam: SuperMix(t, alpha=0), "alpha above 0.* got 0"),
    "endless alpha": (lambda t, s, lam: SuperMix(t, alpha=float("inf")), "alpha.* got inf"),
    "no teacher": (lambda t, s, lam: SuperMix("resnet20"), "Expected a teacher that maps images to logits, got str"),
    "other k": (lambda t, s, lam: SuperMix(t, k=3).solve(s, lam), "Expected sets of k = 3 images, got 2"),
    "rank": (
        lambda t, s, lam: SuperMix(t).solve(s[0], lam),
        r"Expected images \(B, k, C, H, W\), got shape \(2, 3, 32, 32\)",
    ),
    "bytes": (lambda t, s, lam: SuperMix(t).solve(s.byte(), lam), "Expected normalised float images, got torch.uint8"),
    "an array": (
        lambda t, s, lam: SuperMix(t).solve(s.numpy(), lam),
        r"Expected a tensor of images \(B, k, C, H, W\), got ndarray",
    ),
    "NaN": (
        lambda t, s, lam: SuperMix(t).solve(s.log(), lam),
        r"Expected finite images, got NaN or infinity in 4 of 4: at index \[0, 1, 2, 3\]",
    ),
    "no sets": (lambda t, s, lam: SuperMix(t).solve(s[:0], lam[:0]), r"\(0, 2, 3, 32, 32\)|[Ee]mpty|at least (1|one)"),
    "a large mask": (lambda t, s, lam: SuperMix(t, mask_size=31).solve(s[..., :30], lam), "got mask_size 31 for 32×30"),
    "lam's sum": (lambda t, s, lam: SuperMix(t).solve(s, lam * 1.1), r"sum to 1, got sums \[1.1"),
    "lam below 0": (
        lambda t, s, lam: SuperMix(t).solve(s, lam + torch.tensor([1.0, -1.0])),
        r"0 or more .* smallest -",
    ),
    "lam is NaN": (lambda t, s, lam: SuperMix(t).solve(s, lam * float("nan")), r"sum to 1, got sums \[nan"),
    "lam's shape": (lambda t, s, lam: SuperMix(t).solve(s, lam[:3]), r"Expected lam \(4, 2\), .* got \(3, 2\)"),
    "lam in a list": (lambda t, s, lam: SuperMix(t).solve(s, lam.tolist()), r"Expected lam \(4, 2\)"),
    "theta's shape": (
        lambda t, s, lam: SuperMix(t).solve(s, lam, torch.zeros(4, 2, 4, 4)),
        r"Expected theta \(4, 2, 8, 8\), got \(4, 2, 4, 4\)",
    ),
    "theta is NaN": (lambda t, s, lam: SuperMix(t).solve(s, lam, torch.full((4, 2, 8, 8), float("nan"))), "theta"),
    "theta in a list": (lambda t, s, lam: SuperMix(t).solve(s, lam, [0]), "Expected theta"),
    "infinite logits": (
        lambda t, s, lam: SuperMix(nets(lambda x: x / 0)).solve(s, lam),
        "Expected finite logits, got NaN or infinity",
    ),
    "maps": (lambda t, s, lam: SuperMix(lambda x: x).solve(s, lam), r"logits \(8, N\), got \(8, 3, 32, 32\)"),
    "a tuple": (lambda t, s, lam: SuperMix(lambda x: (x,)).solve(s, lam), r"logits \(8, N\), got tuple"),
    "one logit": (
        lambda t, s, lam: SuperMix(lambda x: x.flatten(1)[:, :1]).solve(s, lam),
        "at least k = 2 classes, got 1",
    ),
    "no gradient": (lambda t, s, lam: SuperMix(nets(torch.detach)).solve(s, lam), "[Gg]radient|differentiable|detach"),
    "one class": (
        lambda t, s, lam: SuperMix(t)(s[:1, 0].repeat(5, 1, 1, 1)),
        "sees at least k = 2 different classes in the 5 images, got 1: .*size, mean and std",
    ),
    "a softmax at the end": (
        lambda t, s, lam: SuperMix(nets(lambda z: z.softmax(1)))(s[:, 0]),
        "Expected logits, got rows that .* sum to 1",
    ),
    "a teacher in half precision": (
        lambda t, s, lam: SuperMix(copy.deepcopy(t).half())(s[:, 0]),
        r"does not take images \(4, 3, 32, 32\) of torch.float32",
    ),
    "grey images": (
        lambda t, s, lam: SuperMix(torchvision.models.resnet18(num_classes=10).eval())(s[:, 0, :1]),
        r"does not take images \(4, 1, 32, 32\)",
    ),
    "channels last": (
        lambda t, s, lam: SuperMix(torchvision.models.resnet18(num_classes=10).eval())(s[:, 0].permute(0, 2, 3, 1)),
        r"does not take images \(4, 32, 32, 3\)",
    ),
    "too few soft labels": (
        lambda t, s, lam: SuperMix(t)(s[:, 0], torch.eye(3)),
        r"class indices \(4,\), .* got torch.float32 \(3, 3\)",
    ),
    "an empty list": (lambda t, s, lam: SuperMix(t)([]), "[Ee]mpty|at least|0 images"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, teacher, digits):
    call, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        call(teacher, digits.test[:8][0].view(4, 2, 3, 32, 32), torch.full((4, 2), 0.5))


def test_regions_are_the_start_where_none_is_given(teacher, digits):
    mixer = SuperMix(teacher, **FAST | {"max_iter": 1})
    sets, lam = digits.train[:8][0].view(4, 2, 3, 32, 32), torch.tensor([[0.5, 0.5]] * 4)
    given = mixer.solve(sets, lam, regions(lam, 8, torch.zeros(4), mixer.hold, (32, 32)))
    assert torch.equal(mixer.solve(sets, lam).masks, given.masks)
