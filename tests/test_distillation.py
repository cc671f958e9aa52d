"""Making mixes, and the loss of a student that learns from a teacher on natural and mixed images."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from supermix.distillation import Distillation, distill, make_mixes
from supermix.losses import kd_loss
from supermix.mixers import CutMix, MixUp
from supermix.mixing import SuperMix
from supermix.recipes import METHODS, Training
from supermix.training import accuracy, train
from supermix.zoo import create

SHORT = Training(epochs=1, batch_size=16, milestones=())


@pytest.fixture(scope="module")
def few(digits): return digits.train.subset(40)


@pytest.fixture(scope="module")
def mixes(teacher, few): return make_mixes(SuperMix(teacher, max_iter=10), few, 30, batch_size=24)


def test_a_stock_of_mixes_is_solved_and_counted(teacher, mixes, few):
    assert mixes.images.shape == (30, 3, 32, 32) and len(mixes) == 30 and mixes.tried % 24 == 0 and mixes.tried >= 30
    with torch.no_grad(): top = teacher(mixes.images).softmax(1).topk(2).values
    assert (top.sum(1) > 0.5).float().mean() > 0.8  # the teacher sees two classes, and little else
    again, other = (make_mixes(SuperMix(teacher, max_iter=10), few, 30, seed, batch_size=24) for seed in (0, 1))
    assert torch.equal(mixes.images, again.images) and not torch.equal(mixes.images, other.images)
    assert f"30 images, {30 / mixes.tried:.0%} of {mixes.tried} sets" in repr(mixes)


def test_sets_that_are_never_solved_end_in_an_error(few):
    def in_between(x):  # the third class is always second, and no source is of it
        side = x[..., :16].mean((1, 2, 3)) - x[..., 16:].mean((1, 2, 3))
        return torch.stack([side, -side, torch.zeros_like(side)], 1)

    with pytest.raises(RuntimeError, match="None of 160 sets was solved in 2 updates"):
        make_mixes(SuperMix(in_between, max_iter=2), few, 4, batch_size=16)


@pytest.mark.parametrize("pad", [0, 2])
def test_a_sample_is_a_window_of_a_mix(pad, mixes, seeded):
    mixes = replace(mixes, pad=pad)
    views = mixes.sample(50, seeded())
    black = mixes.info.normalize(torch.zeros(3, 1, 1, dtype=torch.uint8))
    framed = black.expand(30, 3, 32 + 2 * pad, 32 + 2 * pad).clone()
    framed[..., pad:pad + 32, pad:pad + 32] = mixes.images
    # all that there are; digits are never mirrored
    windows = framed.unfold(2, 32, 1).unfold(3, 32, 1).movedim(1, 3).reshape(-1, 3, 32, 32)
    assert views.shape == (50, 3, 32, 32) and all((windows == view).flatten(1).all(1).any() for view in views)
    assert torch.equal(views, mixes.sample(50, seeded()))
    assert not torch.equal(views, mixes.sample(50, seeded(1)))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "alone"])
def test_the_loss_of_a_step(method, teacher, few, mixes, seeded):
    torch.manual_seed(0)
    student, terms = create("resnet8", 10).eval(), METHODS[method]
    (images, labels), mixed = few[:16], mixes.sample(16, seeded())
    ours = Distillation(teacher, terms, mixes, seeded())(student, images, labels)
    zs, zt, ms, mt = student(images), teacher(images), student(mixed), teacher(mixed)
    theirs = terms.ce * F.cross_entropy(zs, labels) + terms.kd * kd_loss(zs, zt)
    if terms.mixes: theirs += terms.mixed_ce * F.cross_entropy(ms, mt.argmax(1)) + terms.mixed_kd * kd_loss(ms, mt)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_student_alone_is_trained_by_its_labels(few):
    networks = []
    for go in (lambda net: distill(None, net, few, "alone", recipe=SHORT), lambda net: train(net, few, SHORT)):
        torch.manual_seed(0)
        networks.append(create("resnet8", 10))
        go(networks[-1])
    assert all(torch.equal(a, b) for a, b in zip(*(net.state_dict().values() for net in networks), strict=True))


@pytest.mark.parametrize("source", ["mixes", "SuperMix", "MixUp", "CutMix"])
def test_mixed_images_come_from_a_stock_or_a_mixer(source, teacher, few, mixes):
    mixers = {"mixes": mixes, "SuperMix": SuperMix(teacher, max_iter=2), "MixUp": MixUp(10), "CutMix": CutMix(10)}
    student = create("resnet8", 10)
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    history = distill(teacher.train(), student, few, "soft", mixers[source], SHORT)
    assert all(part.training for part in teacher.modules())  # as it was given; but it answered in evaluation mode,
    teacher.eval()
    assert all(torch.equal(before[name], t) for name, t in teacher.state_dict().items())  # for no statistics have moved
    assert history.images == 2 * len(few) and not student.training and all(p.grad is None for p in teacher.parameters())


def test_any_number_of_images_can_be_mixed_within_the_batch(teacher, digits):
    images = digits.train.subset(33)  # the last batch is a single image
    distill(teacher, create("resnet8", 10), images, "hard", MixUp(10), SHORT)


MISFITS = {
    "no mixer": (lambda t, few, m: distill(t, create("resnet8", 10), few, "hard"), "'hard' needs mixed images"),
    "an idle mixer": (lambda t, few, m: distill(t, create("resnet8", 10), few, "kd", m), "'kd' has no term for mixed"),
    "no teacher": (lambda t, few, m: distill(None, create("resnet8", 10), few, "kd"), "'kd' needs a teacher"),
    "method": (lambda t, few, m: distill(t, create("resnet8", 10), few, "sofd", m), "'sofd'. Did you mean 'soft'"),
    "classes": (lambda t, few, m: distill(t, create("resnet8", 12), few, "kd", recipe=SHORT), "12.* 10|10.* 12"),
    "no mixes": (lambda t, few, m: make_mixes(SuperMix(t), few, 0), "Expected .*got 0"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_together(case, teacher, few, mixes):
    act, message = MISFITS[case]
    with pytest.raises(ValueError, match=message): act(teacher, few, mixes)


@pytest.mark.slow
def test_a_teacher_helps(teacher, digits):
    images, reached = digits.train.subset(200), {}
    mixes = make_mixes(SuperMix(teacher), images, 400)
    for method in ("alone", "soft"):
        reached[method] = []
        for seed in range(3):
            torch.manual_seed(seed)
            student = create("resnet8", 10)
            source = mixes if METHODS[method].mixes else None
            distill(teacher, student, images, method, source, Training(epochs=40, batch_size=32, milestones=(25, 35)))
            reached[method].append(accuracy(student, digits.test))
    assert sum(reached["soft"]) > sum(reached["alone"])
