"""Making mixes, and the loss of a student that learns from a teacher on natural and mixed images."""

import copy
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from supermix.core import seeded as place
from supermix.data import ArrayImages, Data
from supermix.distillation.contrast import TERMS
from supermix.distillation.distill import (
    MIXERS,
    Distillation,
    Ensemble,
    _OneOf,
    _foreign_mixes,
    _mix_batch,
    distill,
    make_mixes,
)
from supermix.distillation.losses import LOGIT_LOSSES, outputs_of
from supermix.mixing.masks import areas, soft_labels
from supermix.mixing.mixers import CutMix, MixUp
from supermix.mixing.solver import SuperMix, is_solved
from supermix.mixing.store import MixedDataset
from supermix.policies.policies import Augmented, load_policy
from supermix.recipes import FAST, METHODS, Mixing, Terms, Training
from supermix.training import loop
from supermix.training.checkpoints import checkpoints, load_checkpoint
from supermix.training.logs import read_log
from supermix.training.loop import Batch, accuracy, train
from supermix.zoo import create
from torch import nn
from torchvision.transforms import v2

SHORT = Training(epochs=1, batch_size=16, milestones=())


@pytest.fixture(scope="module")
def few(digits):
    return digits.train.subset(40)


@pytest.fixture(scope="module")
def mixes(teacher, few):
    return make_mixes(teacher, few, 60)


def alone(name):
    "The method of a term on features."
    return METHODS.get(name) or Terms(ce=1.0, features=((name, 1.0),))


def batch_of(images, n=16, seed=0):
    x, y = images[:n]
    return Batch(x, y, torch.arange(n), place(seed))


def test_a_stock_of_mixes_is_solved_and_counted(teacher, mixes, few):
    everything = mixes.batch(range(60))
    assert everything.images.shape == (60, 3, 32, 32) and len(mixes) == 60
    assert is_solved(everything.logits, everything.classes).all()
    with torch.no_grad():
        logits = teacher(everything.images)
    torch.testing.assert_close(logits, everything.logits, rtol=2e-3, atol=2e-2)
    again, other = (make_mixes(teacher, few, 60, seed=seed).batch(range(60)).images for seed in (0, 1))
    assert torch.equal(everything.images, again) and not torch.equal(everything.images, other)


def test_a_stock_in_a_folder_is_found_again(teacher, few, tmp_path):
    first = make_mixes(teacher, few, 60, folder=tmp_path / "mixes")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "mixes").glob("*.safetensors")}
    again = make_mixes(teacher, few, 60, folder=tmp_path / "mixes")
    assert torch.equal(first.batch([3]).images, again.batch([3]).images)
    assert times == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "mixes").glob("*.safetensors")}
    with pytest.raises(ValueError, match="with other settings"):
        make_mixes(teacher, few, 60, seed=1, folder=tmp_path / "mixes")


def test_sets_that_are_never_solved_end_in_an_error(few):
    def in_between(x):  # the third class is always second, and no source is of it
        side = x[..., :16].mean((1, 2, 3)) - x[..., 16:].mean((1, 2, 3))
        return torch.stack([side, -side, torch.zeros_like(side)], 1)

    with pytest.raises(ValueError, match="None of the sets was solved: is the teacher trained"):
        make_mixes(in_between, few, 4, Mixing(max_iter=2))


def counting(teacher):
    "The teacher, and a list that gets the number of images of each of its passes."
    shown = []
    counted = copy.deepcopy(teacher)
    counted.stem.register_forward_hook(lambda module, args, output: shown.append(len(output)))
    return counted, shown


@pytest.mark.parametrize(
    "method, mixer, passes",
    [
        ("kd", None, 16),
        ("kd", "mixup", 32),
        ("crd_kd", None, 16),
        ("crd_kd", "mixup", 32),
        ("at", None, 16),
        ("at", "mixup", 32),
        ("ab", None, 0),
        ("fsp", None, 0),
        ("alone", "mixup", 16),
    ],
)
def test_the_teacher_sees_no_image_twice(method, mixer, passes, teacher, few):
    counted, shown = counting(teacher)
    student, terms = create("resnet8", 10), METHODS[method] if mixer is None else METHODS[method].mixed()
    objective = Distillation(counted, terms, mixer and MixUp(10), student, few, first_stage=1)
    if terms.features:
        objective.begin_epoch(student, 1)  # behind the first stage, where there is one
    else:
        objective._outside = [counted]  # no copy with folded norms
    shown.clear()
    objective(student, batch_of(few))
    assert sum(shown) == passes


def test_a_terms_first_weights_follow_the_seed(teacher, few):
    def go(seed, noise):
        torch.manual_seed(1)
        student = create("resnet14", 10)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        loss = distill(teacher, student, few, "fitnet", recipe=replace(SHORT, seed=seed)).loss
        assert torch.equal(torch.get_rng_state(), before)
        return loss

    assert go(0, 1) == go(0, 2) != go(1, 1)


def test_what_was_frozen_stays_frozen(teacher, few):
    student = create("resnet8", 10)
    student.stem.requires_grad_(False)
    objective = Distillation(teacher, METHODS["ab"], None, student, few, first_stage=1)
    for epoch in (0, 1):
        objective.begin_epoch(student, epoch)
        assert not any(p.requires_grad for p in student.stem.parameters())
        assert all(p.requires_grad for p in student.stages.parameters())


@pytest.mark.parametrize("label", ["lam", "area"])
def test_a_student_may_have_more_classes_than_the_mixes_labels(label, teacher, mixes, few):
    wide, terms = create("resnet8", 12), Terms(ce=1.0, mixed_ce=1.0, label=label)
    for mixer in (MixUp(10) if label == "lam" else CutMix(10), mixes):
        loss = Distillation(None, terms, mixer, wide, few)(wide, batch_of(few))
        assert torch.isfinite(loss)
    narrow = Distillation(None, terms, MixUp(12) if label == "lam" else CutMix(12), create("resnet8", 10), few)
    with pytest.raises(ValueError, match="student of the 12 classes of the mixes' labels, got 10"):
        narrow(create("resnet8", 10), batch_of(few))


def test_a_teacher_in_training_mode_is_an_error(teacher, few):
    learning = copy.deepcopy(teacher).train()
    with pytest.raises(ValueError, match="teacher in evaluation mode"):
        Distillation(learning, METHODS["at"], None, create("resnet8", 10), few)


def test_puzzlemix_gets_the_deviation_of_the_data(teacher, digits):
    pytest.importorskip("gco", reason="no graph cuts here")
    assert MIXERS["puzzlemix"](teacher, digits.info).energy["std"] == digits.info.std


def test_rows_of_a_store_are_numbers_or_a_mask(mixes):
    few = mixes.small["lam"][: len(mixes), 0] > 0.6
    assert torch.equal(mixes.batch(few).images, mixes.batch(few.nonzero().flatten()).images) and few.sum() > 1
    assert mixes[torch.tensor(3)][0].shape == (3, 32, 32) and torch.equal(mixes[torch.tensor(3)][0], mixes[3][0])
    with pytest.raises(IndexError, match=f"a mask of {len(mixes)} rows, got one of 2"):
        mixes.batch([True, False])


@pytest.mark.parametrize("pad", [0, 2])
def test_a_sample_is_a_window_of_a_mix(pad, mixes, seeded):
    mixes.pad = pad
    views, known = mixes.sample(50, seeded())
    black = mixes.info.normalize(torch.zeros(3, 1, 1, dtype=torch.uint8))
    framed = black.expand(50, 3, 32 + 2 * pad, 32 + 2 * pad).clone()
    framed[..., pad : pad + 32, pad : pad + 32] = known.images
    # all there are; digits are never mirrored
    windows = framed.unfold(2, 32, 1).unfold(3, 32, 1).movedim(1, 3).reshape(50, -1, 3, 32, 32)
    assert views.shape == (50, 3, 32, 32) and all(
        (w == view).flatten(1).all(1).any() for w, view in zip(windows, views)
    )
    assert torch.equal(views, mixes.sample(50, seeded())[0]) and not torch.equal(views, mixes.sample(50, seeded(1))[0])
    mixes.pad = 2


SOFT = {"alone": Terms(ce=1.0, mixed_ce=1.0), "kd": Terms(ce=0.1, kd=0.9, mixed_kd=0.9)}


@pytest.mark.parametrize("method", [name for name, terms in METHODS.items() if not terms.features])
def test_the_loss_of_a_step(method, teacher, few, mixes):
    torch.manual_seed(0)
    student, terms = create("resnet8", 10).eval(), METHODS[method].mixed()
    batch, mixed = batch_of(few), mixes.sample(16, place(0))[0]
    ours = Distillation(teacher, terms, mixes, student, few)(student, batch)
    zs, zt, ms, mt = student(batch.images), teacher(batch.images), student(mixed), teacher(mixed)
    D = LOGIT_LOSSES[terms.logits]
    theirs = terms.ce * F.cross_entropy(zs, batch.labels) + terms.kd * D(zs, zt, batch.labels, terms.tau)
    theirs += terms.mixed_ce * F.cross_entropy(ms, mt.argmax(1)) + terms.mixed_kd * D(ms, mt, mt.argmax(1), terms.tau)
    assert terms.mixes and terms == SOFT.get(method, terms)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_function_matching_looks_at_mixed_images_only(teacher, few, mixes):
    "The natural images of a batch change neither its loss nor the statistics of batch norm."
    losses, counts = [], []
    for scale in (1.0, 3.0):
        torch.manual_seed(0)
        student, batch = create("resnet8", 10), batch_of(few)
        batch = batch._replace(images=scale * batch.images, labels=batch.labels.roll(1))
        losses.append(Distillation(teacher, METHODS["function_matching"], mixes, student, few)(student, batch).item())
        counts.append({name: t.clone() for name, t in student.named_buffers()})
    assert losses[0] == losses[1] > 0
    torch.testing.assert_close(counts[0], counts[1], rtol=0, atol=0)


@pytest.mark.parametrize("label", ["teacher", "softmax", "lam", "area"])
def test_what_label_a_mixed_image_gets(label, teacher, few, mixes):
    torch.manual_seed(0)
    student, batch = create("resnet8", 10).eval(), batch_of(few)
    mixed, known = mixes.sample(16, place(0))
    with torch.no_grad():
        mt = teacher(mixed)
    wanted = {
        "teacher": mt.argmax(1),
        "softmax": mt.softmax(1),
        "lam": soft_labels(known.classes, known.lam, 10),
        "area": soft_labels(known.classes, areas(known.masks), 10),
    }[label]
    ours = Distillation(teacher, Terms(mixed_ce=1.0, label=label), mixes, student, few)(student, batch)
    torch.testing.assert_close(ours, F.cross_entropy(student(mixed), wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("mixer", [None, "mixup"])
def test_features_are_compared_on_natural_images_only(name, mixer, teacher, few):
    torch.manual_seed(0)
    student, terms = create("resnet8", 10).eval(), alone(name)
    if mixer:
        terms = terms.mixed()
    objective = Distillation(teacher, terms, MixUp(10) if mixer else None, student, few, first_stage=1).eval()
    if not objective.features[name].later:
        return
    batch = batch_of(few)
    with torch.no_grad():
        ours, without = (
            obj(student, batch._replace(generator=place(0)))
            for obj in (objective, Distillation(teacher, replace(terms, features=()), objective.mixer, student, few))
        )
    g = place(0)
    if mixer:
        MixUp(10)(batch.images, batch.labels, generator=g)  # what is drawn for the mixes comes first
    with torch.no_grad():
        natural = outputs_of(student, batch.images), outputs_of(teacher, batch.images)
        term = objective.features[name](*natural, batch.labels, batch.indices, g)
    torch.testing.assert_close(ours, without + dict(terms.features)[name] * term, rtol=1e-3, atol=1e-4)


def test_a_student_alone_is_trained_by_its_labels(few):
    networks = []
    for go in (lambda net: distill(None, net, few, "alone", recipe=SHORT), lambda net: train(net, few, SHORT)):
        torch.manual_seed(0)
        networks.append(create("resnet8", 10))
        go(networks[-1])
    assert all(torch.equal(a, b) for a, b in zip(*(net.state_dict().values() for net in networks), strict=True))


@pytest.mark.parametrize("source", ["mixes", "an object", *MIXERS])
def test_mixed_images_come_from_a_stock_a_mixer_or_a_name(source, teacher, digits, mixes, few):
    mixer = {"mixes": mixes, "an object": SuperMix(teacher, **{**FAST, "max_iter": 2})}.get(source, source)
    student = create("resnet8", 10)
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    history = distill(teacher.train(), student, few, "kd", mixer, SHORT, mixes=50 if source == "supermix" else None)
    assert all(part.training for part in teacher.modules())  # as it was given; but it answered in evaluation mode,
    teacher.eval()
    assert all(torch.equal(before[name], t) for name, t in teacher.state_dict().items())  # for no statistics have moved
    assert (
        history.images == len(few)
        and history.test is None
        and not student.training
        and all(p.grad is None for p in teacher.parameters())
    )


def test_a_data_set_with_test_images_is_told_their_accuracy(teacher, digits, few):
    student = create("resnet8", 10)
    history = distill(teacher, student, Data(digits.info, few, digits.test, "here"), recipe=SHORT)
    assert history.test == accuracy(student, digits.test)


def test_any_number_of_images_can_be_mixed_within_the_batch(teacher, digits):
    images = digits.train.subset(33)  # the last batch is a single image
    distill(teacher, create("resnet8", 10), images, "alone", "mixup", SHORT)


@pytest.mark.parametrize("name", [name for name, term in TERMS.items() if term.first])
def test_a_first_stage_trains_what_it_should_and_counts_as_epochs(name, teacher, few):
    torch.manual_seed(0)
    student, seen = create("resnet8", 10), []

    class Watched(Distillation):
        def begin_epoch(self, network, epoch):
            super().begin_epoch(network, epoch)
            own = {id(p) for p in self.features[name].first_parameters(network)}
            everything = [*network.parameters(), *self.features.parameters()]
            seen.append(
                (
                    self.in_first_stage,
                    all(p.requires_grad == (id(p) in own) for p in everything),
                    all(p.requires_grad for p in network.parameters()),
                )
            )

    recipe = Training(epochs=3, batch_size=20, lr=0.01, milestones=())
    history = train(student, few, recipe, Watched(teacher, alone(name), None, student, few, first_stage=1))
    assert [first for first, _, _ in seen] == [True, False, False] and seen[0][1] and seen[1][2] and seen[2][2]
    assert len(history.rows) == 3 and history.images == 3 * len(few)


@pytest.mark.parametrize("name", [name for name, term in TERMS.items() if term.first])
def test_a_student_whose_first_stage_was_interrupted_learns_afterwards(name, teacher, few):
    "The same cell again, with the same student: nothing of it is frozen any more."

    class Stopping(Distillation):
        def after_step(self, network):
            raise KeyboardInterrupt

    student, recipe = create("resnet8", 10), Training(epochs=2, batch_size=20, lr=0.01, milestones=(), first_stage=1)
    with pytest.raises(KeyboardInterrupt):
        train(student, few, recipe, Stopping(teacher, alone(name), None, student, few, first_stage=1))
    assert all(p.requires_grad for p in student.parameters())
    before = copy.deepcopy(student)
    distill(teacher, student, few, alone(name), recipe=recipe)
    for part in ("stem", "stages", "head"):
        old, new = (torch.cat([p.detach().flatten() for p in getattr(n, part).parameters()]) for n in (before, student))
        assert not torch.equal(old, new), part


def test_one_objective_trains_several_students(teacher, few):
    "What may learn is looked up for each."
    recipe = Training(epochs=2, batch_size=20, lr=0.01, milestones=())
    objective = Distillation(teacher, METHODS["ft"], None, create("resnet8", 10), few, first_stage=1)
    for _ in range(2):
        student = create("resnet8", 10)
        before = student.head.weight.detach().clone()
        train(student, few, recipe, objective)
        assert not torch.equal(before, student.head.weight)


@pytest.mark.parametrize("name", [name for name, term in TERMS.items() if term.first])
@pytest.mark.parametrize("lr", [0.1, 0.02])
def test_first_stages_learn_at_a_rate_of_their_own(name, lr, teacher, digits):
    """At the paper's rate, with the benchmark's weights, on few images: the first stage's loss falls, and then the
    student's."""
    torch.manual_seed(0)
    images, student = digits.train.subset(160), create("resnet8", 10)
    recipe = Training(epochs=9, batch_size=16, lr=lr, milestones=(8,), first_stage=3)
    history = distill(teacher, student, images, alone(name), recipe=recipe)
    own = 0.01 if name == "ft" else min(lr, 0.05)
    assert [row["lr"] for row in history.rows] == pytest.approx([own] * 3 + [lr] * 5 + [lr / 10])
    assert history.loss[2] < history.loss[0] and history.loss[8] < history.loss[3]
    slower = distill(
        teacher,
        create("resnet8", 10),
        images.subset(20),
        alone(name),
        recipe=replace(recipe, first_lr=0.001, epochs=4, milestones=()),
    )
    assert [row["lr"] for row in slower.rows] == pytest.approx([0.001] * 3 + [lr])


@pytest.mark.parametrize("name", [name for name, term in TERMS.items() if term.first])
def test_the_weight_is_for_the_later_stage(name, teacher, few):
    torch.manual_seed(0)
    student, batch = create("resnet8", 10).eval(), batch_of(few)
    objective = Distillation(teacher, alone(name), None, student, few, first_stage=1).eval()
    objective.begin_epoch(student, 0)
    torch.testing.assert_close(
        objective(student, batch), objective.features[name].first_loss(student, teacher, batch.images)
    )


def test_crops_of_mixed_images(teacher, digits):
    images, students = digits.train.subset(20), []
    for mixer, options in (
        ("supermix", {"mixes": 30, "mixed_pad": 0}),
        (make_mixes(teacher, images, 30, mixed_pad=0), {}),
        ("supermix", {"mixes": 30}),
    ):
        torch.manual_seed(0)
        students.append(create("resnet8", 10))
        distill(teacher, students[-1], images, "kd", mixer, SHORT, **options)
    first, by_hand, default = (student.head.weight for student in students)
    assert torch.equal(first, by_hand) and not torch.equal(first, default)


def test_what_is_held_out_is_in_no_memory(teacher, digits, tmp_path):
    images = digits.train.subset(40)
    distill(teacher, create("resnet8", 10), images, "crd", recipe=replace(SHORT, held_out=10), folder=tmp_path)
    state = load_checkpoint(checkpoints(tmp_path)[-1])["objective"]
    assert state["features.crd.memory_student"].shape == state["features.crd.memory_teacher"].shape == (30, 128)
    # each row belongs to an image that is learned from
    assert torch.equal(state["features.crd.classes"], images.split(10)[1].labels)


def test_networks_that_do_not_fit_are_told_before_anything_is_mixed(teacher, few, tmp_path):
    for classes, message in (
        (12, "the same classes, got 12 and 10"),
        (8, "a student of at least the 10 classes of digits, got 8"),
    ):
        with pytest.raises(ValueError, match=message):
            distill(teacher, create("resnet8", classes), few, "kd", "supermix", SHORT, folder=tmp_path)
    with pytest.raises(ValueError, match="a student of at least the 10"):
        distill(None, create("resnet8", 8), few, "alone", recipe=SHORT)
    assert not list(tmp_path.iterdir())


MISFITS = {
    "no mixer": (lambda t, few, m: distill(t, create("resnet8", 10), few, Terms(mixed_kd=1.0)), "pass a mixer"),
    "no teacher": (lambda t, few, m: distill(None, create("resnet8", 10), few, "kd"), "needs a teacher, got None"),
    "no teacher for mixes": (
        lambda t, few, m: distill(None, create("resnet8", 10), few, Terms(mixed_ce=1.0, label="lam"), "supermix"),
        "needs a teacher, got None",
    ),
    "method": (
        lambda t, few, m: distill(t, create("resnet8", 10), few, "fitnets", m),
        "'fitnets'. Did you mean 'fitnet'",
    ),
    "another method": (
        lambda t, few, m: distill(t, create("resnet8", 10), few, "crb", m),
        "Unknown method 'crb'. Did you mean 'crd'",
    ),
    "mixer": (
        lambda t, few, m: distill(t, create("resnet8", 10), few, "kd", "mixupp"),
        "Unknown mixer 'mixupp'. Did you mean 'mixup'",
    ),
    "label": (
        lambda t, few, m: distill(t, create("resnet8", 10), few, Terms(mixed_ce=1.0, label="arae"), m),
        "label of mixed images 'arae'. Did you mean 'area'",
    ),
    "classes": (lambda t, few, m: distill(t, create("resnet8", 12), few, "kd", recipe=SHORT), "12.* 10|10.* 12"),
    "a teacher of too few classes": (
        lambda t, few, m: distill(nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)), create("resnet8", 10), few),
        "at least the 10 classes of digits, got 5",
    ),
    "no mixes": (lambda t, few, m: make_mixes(t, few, 0), "Expected .*got.* 0"),
    "none of the stock": (
        lambda t, few, m: distill(t, create("resnet8", 10), few, "kd", "supermix", SHORT, mixes=0),
        "count of 1 or more.* got count 0",
    ),
    "a number of mixes and no mixer": (
        lambda t, few, m: distill(t, create("resnet8", 10), few, "kd", mixes=100),
        "mixer='supermix' with a number of mixes, got None",
    ),
    "a number of mixes for another mixer": (
        lambda t, few, m: distill(t, create("resnet8", 10), few, "kd", "mixup", mixes=100),
        "only with this mixer, got mixes: leave them out, or use this mixer",
    ),
    "a search, and no mixer": (
        lambda t, few, m: distill(t, create("resnet8", 10), few, "kd", mixing=Mixing()),
        "only with this mixer, got mixing: leave them out",
    ),
    "unmoved mixes of a stock": (
        lambda t, few, m: distill(t, create("resnet8", 10), few, "kd", m, mixing=Mixing(), mixed_pad=None),
        r"got mixing, mixed_pad: a stock is made with its own, as in make_mixes\(.*mixed_pad=None\)",
    ),
    "an objective without the mixer that it needs": (
        lambda t, few, m: Distillation(t, Terms(mixed_kd=1.0)),
        "has a term for mixed images: pass a mixer, or a stock",
    ),
    "an objective with a mixer that it does not need": (
        lambda t, few, m: Distillation(t, METHODS["kd"], MixUp(10)),
        r"has no term for mixed images: use terms.mixed\(\), or leave out the mixer",
    ),
    **{
        f"an objective of {method} without a first stage": (
            lambda t, few, m, method=method: Distillation(t, METHODS[method], None, create("resnet8", 10), few),
            f"a first stage of {method} of at least one epoch, got first_stage 0",
        )
        for method in ("ab", "ft", "fsp")
    },
    "an objective with nothing after the first stage": (
        lambda t, few, m: train(
            create("resnet8", 10), few, SHORT, Distillation(t, METHODS["ft"], None, create("resnet8", 10), few, 1)
        ),
        "a first stage shorter than the 1 epochs of the training, got first_stage 1",
    ),
    "a recipe in words": (
        lambda t, few, m: distill(t, create("resnet8", 10), few, recipe={"epochs": 3}),
        "recipe that is a .*Training.*got dict",
    ),
    "a pair": (
        lambda t, few, m: distill(t, create("resnet8", 10), few[:]),
        "data of `load_data` or `load_folder`.*got tuple",
    ),
    "no student": (lambda t, few, m: distill(t, None, few), "student that is a network, got NoneType"),
    "the teacher itself": (lambda t, few, m: distill(t, t, few), "student other than the teacher"),
    **{
        f"a first stage of {method} and nothing after it": (
            lambda t, few, m, method=method: distill(
                t, create("resnet8", 10), few, method, recipe=Training(epochs=5, milestones=(4,))
            ),
            f"first stage of {method} of at least one epoch, and shorter than the 5 epochs .* got first_stage 30",
        )
        for method in ("ab", "ft", "fsp")
    },
    "no first stage": (
        lambda t, few, m: distill(
            t, create("resnet8", 10), few, "ab", recipe=Training(epochs=5, milestones=(), first_stage=0)
        ),
        "of at least one epoch, .* got first_stage 0",
    ),
    "a loss that there is not": (
        lambda t, few, m: distill(t, create("resnet8", 10), few, Terms(kd=0.9, logits="dkdd"), "supermix"),
        "Unknown loss on logits 'dkdd'. Did you mean 'dkd'",
    ),
    "no features": (
        lambda t, few, m: distill(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), create("resnet8", 10), few, "crd"),
        "teacher with `features` for 'crd', got Sequential: wrap it, as in Hooked",
    ),
    "a function, which has no features": (
        lambda t, few, m: distill(lambda x: t(x), create("resnet8", 10), few, "crd"),
        "teacher with `features` for 'crd', got function: wrap it, as in Hooked",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_together(case, teacher, few, mixes):
    act, message = MISFITS[case]
    with pytest.raises(ValueError, match=message):
        act(teacher, few, mixes)


def test_a_stock_of_a_whole_data_set(teacher, digits):
    assert len(make_mixes(teacher, digits, 20)) == 20  # its training images


@pytest.mark.parametrize("method, epochs", [("kd", 2), ("alone", 1)])
def test_a_stock_is_mixed_ahead_and_changes_nothing(method, epochs, teacher, few, mixes, monkeypatch):
    "The images that are mixed in a thread while the network learns are those that it would mix itself."

    def go():
        torch.manual_seed(0)
        student, by = create("resnet8", 10), []
        kept = MixedDataset.show
        monkeypatch.setattr(
            MixedDataset,
            "show",
            lambda self, picks: by.append(threading.current_thread() is threading.main_thread()) or kept(self, picks),
        )
        distill(teacher, student, few, method, mixes, replace(SHORT, epochs=epochs))
        monkeypatch.undo()
        return student.state_dict(), by

    ahead, by = go()
    assert by and not any(by)
    monkeypatch.setattr(Distillation, "prepares", lambda self, epoch: False)
    plain, by = go()
    assert all(by) and all(torch.equal(ahead[name], plain[name]) for name in plain)


@pytest.mark.slow
def test_a_teacher_helps(teacher, digits):
    images, reached = digits.train.subset(200), {}
    mixes = make_mixes(teacher, images, 400)
    for method, mixer in (("alone", None), ("kd", mixes)):
        reached[method] = []
        for seed in range(3):
            torch.manual_seed(seed)
            student = create("resnet8", 10)
            distill(teacher, student, images, method, mixer, Training(epochs=40, batch_size=32, milestones=(25, 35)))
            reached[method].append(accuracy(student, digits.test))
    assert sum(reached["kd"]) > sum(reached["alone"])


def test_images_under_a_policy_are_mixed_without_it(teacher, few):
    under = Augmented(few, load_policy("randaugment"))
    mixes = make_mixes(teacher, under, 20)
    assert mixes.source is few and len(mixes) == 20
    student = create("resnet8", 10)
    assert len(distill(teacher, student, under, "kd", "supermix", SHORT, mixes=20).loss) == 1


def test_students_of_another_contract_are_told_what_is_missing(teacher, few):
    class Two(nn.Module):  # as torchvision's GoogLeNet
        aux_logits = True

    with pytest.raises(ValueError, match="one head, got Two with auxiliary ones: create it with aux_logits=False"):
        distill(teacher, Two(), few, "kd", None, SHORT)

    class Sequence(nn.Module):  # as torchvision's Swin: `features` is no method
        def __init__(self):
            super().__init__()
            self.features, self.head = nn.Sequential(nn.Flatten()), nn.Linear(3 * 32 * 32, 10)

        def forward(self, x):
            return self.head(self.features(x))

    with pytest.raises(ValueError, match="Expected a student with `features` for 'at', got Sequence: wrap it"):
        distill(teacher, Sequence(), few, "at", None, SHORT)


class Bare(nn.Module):
    "A network that shows its features and its head alone."

    def __init__(self, network):
        super().__init__()
        self.body, self.head = network, network.head

    def features(self, x):
        return self.body.features(x)

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("name", ["ab", "ab_free", "ft", "fsp", "at"])
def test_what_a_term_needs_of_networks_is_told_before_anything(name, who, teacher, few, tmp_path):
    "AB looks in front of the activations; the others need features alone."
    student, recipe = create("resnet14", 10), replace(SHORT, epochs=2, lr=0.01, first_stage=1)
    tutor = Bare(teacher) if who == "teacher" else teacher
    student = Bare(student) if who == "student" else student
    missing = {("ab", "student"): "`preactivations` and `parts`"}.get((name, who), "`preactivations`")
    go = lambda mixer, folder: distill(tutor, student, few, alone(name), mixer, recipe, folder=folder)
    if name in ("ab", "ab_free"):
        with pytest.raises(ValueError, match=f"Expected a {who} with {missing} for '{name}', got Bare: wrap it, as in"):
            go("supermix", tmp_path / "run")
    else:
        assert len(go(None, tmp_path / "run").rows) == 2
    assert (tmp_path / "run").exists() == (name not in ("ab", "ab_free"))


# ---- mixers of other libraries


def timms(**options):
    timm = pytest.importorskip("timm.data.mixup", reason="timm is not here")
    return timm.Mixup(num_classes=10, **options)


FOREIGN = {
    "torchvision's MixUp": lambda: v2.MixUp(num_classes=10),
    "torchvision's CutMix": lambda: v2.CutMix(num_classes=10, alpha=0.5),
    "one of both": lambda: v2.RandomChoice([v2.MixUp(num_classes=10), v2.CutMix(num_classes=10)]),
    "timm's": lambda: timms(mixup_alpha=0.8, cutmix_alpha=1.0),
    "timm's for each image": lambda: timms(mixup_alpha=0.8, cutmix_alpha=1.0, mode="elem"),
    "timm's for each pair": lambda: timms(mixup_alpha=0.8, mode="pair", label_smoothing=0.0),
    "a function": lambda: lambda x, y: ((x + x.roll(1, 0)) / 2, (F.one_hot(y, 10) + F.one_hot(y.roll(1, 0), 10)) / 2),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("method, label", [("kd", "teacher"), ("alone", "teacher"), ("alone", "lam")])
def test_mixers_of_other_libraries_are_taken_as_they_are(name, method, label, teacher, few, tmp_path):
    "The loss is that of what they make; their draws follow the batch's generator, and leave the global ones alone."
    mixer, batch = FOREIGN[name](), batch_of(few, 16, seed=5)
    kept, noise, numpy_noise = batch.images.clone(), torch.get_rng_state(), np.random.get_state()[1].copy()
    terms = replace(METHODS[method].mixed(), label=label)
    torch.manual_seed(0)
    student = create("resnet8", 10).eval()
    noise = torch.get_rng_state()
    loss = Distillation(teacher, terms, mixer)(student, batch)
    assert torch.equal(batch.images, kept)  # timm mixes in place
    assert torch.equal(torch.get_rng_state(), noise) and np.array_equal(np.random.get_state()[1], numpy_noise)
    mixed, soft = _foreign_mixes(mixer, batch_of(few, 16, seed=5))
    assert not torch.equal(mixed, kept) and soft.shape == (16, 10)
    with torch.no_grad():
        zs, zt, zs_mixed, zt_mixed = student(kept), teacher(kept), student(mixed), teacher(mixed)
    if method == "kd":
        wanted = (
            0.1 * F.cross_entropy(zs, batch.labels)
            + 0.9 * LOGIT_LOSSES["kd"](zs, zt, None, 4.0)
            + 0.9 * LOGIT_LOSSES["kd"](zs_mixed, zt_mixed, None, 4.0)
        )
    else:
        wanted = F.cross_entropy(zs, batch.labels) + F.cross_entropy(
            zs_mixed, soft if label == "lam" else zt_mixed.argmax(1)
        )
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["torchvision's MixUp", "timm's"])
def test_a_run_with_another_librarys_mixer_is_resumed(name, teacher, digits, tmp_path, monkeypatch):
    "33 images in batches of 16: the last one is a single image, for timm too few."
    images, mixer, recipe, calls = digits.train.subset(33), FOREIGN[name](), replace(SHORT, epochs=2), []

    class Stopped(Exception):
        pass

    def stops(*args):  # in the second epoch
        calls.append(1)
        if len(calls) == 5:
            raise Stopped
        return _foreign_mixes(*args)

    def go(folder):
        torch.manual_seed(0)
        student = create("resnet8", 10)
        distill(teacher, student, images, "kd", mixer, recipe, folder=folder)
        return student.state_dict()

    whole = go(None)
    monkeypatch.setattr("supermix.distillation.distill._foreign_mixes", stops)
    with pytest.raises(Stopped):
        go(tmp_path)
    monkeypatch.undo()
    assert len(checkpoints(tmp_path)) == 1
    resumed = go(tmp_path)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


BAD_MIXERS = {
    "of fewer classes": (lambda: v2.MixUp(num_classes=3), "does not take images .* RuntimeError"),
    "of more classes": (lambda: v2.MixUp(num_classes=30), "student of the 30 classes of the mixes' labels, got 10"),
    "without soft labels": (lambda: lambda x, y: (x, y), r"soft labels \(4, N\) .*got .*and \(4,\)"),
    "a class": (lambda: MixUp, "a mixer that makes mixed images .*, got MixUp"),
    "a number": (lambda: 5, "Expected a mixer: a name.* got int"),
    "our own of fewer classes": (lambda: MixUp(3), "labels from 0 to 2"),
}


@pytest.mark.parametrize("case", BAD_MIXERS)
def test_a_mixer_that_does_not_fit_is_told_before_anything(case, teacher, few, tmp_path):
    make, message = BAD_MIXERS[case]
    with pytest.raises(ValueError, match=message):
        distill(
            teacher,
            create("resnet8", 10),
            few,
            replace(METHODS["alone"].mixed(), label="lam"),
            make(),
            SHORT,
            folder=tmp_path / "run",
        )
    assert not list(tmp_path.iterdir())


# ---- several mixers, several teachers


def test_a_list_of_mixers_takes_turns(teacher, few, mixes, seeded):
    named = {"mixup": MixUp(10), "cutmix": CutMix(10)}
    turns, g = _OneOf([*named.values(), mixes], [0.5, 0.2, 0.2]), seeded()
    drawn = [turns.choose(g) for _ in range(4000)]
    for mixer, share in zip([*named.values(), mixes, None], [0.5, 0.2, 0.2, 0.1]):
        assert sum(d is mixer for d in drawn) / 4000 == pytest.approx(share, abs=0.03)
    assert _OneOf(["mixup"]).alone == "mixup" and _OneOf(["mixup"], 0.5).shares == [0.5]
    assert _OneOf(["a", "b", "c"]).choose(seeded()) is not None and _OneOf(["a", "b"], 0.4).shares == [0.2, 0.2]
    kinds = set()
    for seed in range(30):
        made = _mix_batch(turns, batch_of(few, 16, seed), "teacher")
        kinds.add(None if made is None else tuple(made[0].shape))
    assert kinds == {None, (16, 3, 32, 32)}


@pytest.mark.parametrize("probability", [None, 0.5, [0.2, 0.3, 0.2, 0.1]])
def test_a_student_of_a_list_of_mixers(probability, teacher, few):
    mixers = ["mixup", "cutmix_authors", v2.CutMix(num_classes=10), "supermix"]
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(
            distill(
                teacher,
                create("resnet8", 10),
                few,
                "kd",
                mixers,
                replace(SHORT, epochs=2),
                mixes=30,
                probability=probability,
            ).loss
        )
    assert losses[0] == losses[1]


def test_the_same_mixer_alone_and_in_a_list(teacher, few):
    students = []
    for mixer, options in (
        ("mixup", {}),
        (["mixup"], {}),
        (["mixup"], {"probability": 1.0}),
        ("mixup", {"probability": 1}),
        (["mixup", "cutmix"], {"probability": [0.0, 0.0001]}),
    ):
        torch.manual_seed(0)
        students.append(create("resnet8", 10))
        distill(teacher, students[-1], few, "kd", mixer, SHORT, **options)
    weights = [student.head.weight for student in students]
    assert all(torch.equal(weights[0], other) for other in weights[1:4])
    torch.manual_seed(0)
    plain = create("resnet8", 10)
    distill(teacher, plain, few, "kd", None, SHORT)
    assert torch.equal(weights[4], plain.head.weight)  # no batch had mixes


@pytest.mark.parametrize(
    "probability", [0, 1.5, -0.1, float("nan"), [0.5], [0.7, 0.7], [0.5, -0.1], "often", [None, 1]]
)
def test_probabilities_that_there_are_not(probability, teacher, few):
    with pytest.raises(ValueError, match="probability above 0 and of 1 at most"):
        distill(teacher, create("resnet8", 10), few, "kd", ["mixup", "cutmix"], SHORT, probability=probability)


def test_a_list_of_teachers_is_the_mean_of_their_logits(teacher, few):
    torch.manual_seed(3)
    other = create("resnet8", 10).eval()
    x, students = few[:8][0], []
    with torch.no_grad():
        torch.testing.assert_close(Ensemble([teacher, other])(x), (teacher(x) + other(x)) / 2)
    for tutor in ([teacher, other], lambda x: (teacher(x) + other(x)) / 2, [teacher, teacher], teacher):
        torch.manual_seed(0)
        students.append(create("resnet8", 10))
        distill(tutor, students[-1], few, "kd", None, SHORT)
    both, by_hand, twice, once = (student.head.weight for student in students)
    torch.testing.assert_close(both, by_hand, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(twice, once, rtol=1e-3, atol=1e-3)  # a network alone has its norms folded
    assert not torch.allclose(both, once, atol=1e-2)
    assert len(make_mixes([teacher, teacher], few, 20)) == 20


TEACHERS = {
    "none": (lambda t: [], "Expected networks in a list of teachers, got none"),
    "functions": (lambda t: [t, lambda x: t(x)], "networks in a list of teachers, got function: pass one function"),
    "of other classes": (lambda t: [t, create("resnet8", 12).eval()], r"same classes, got .* \(\d, 10\), \(\d, 12\)"),
    "the student": (lambda t: "student", "a student other than the teacher"),
}


@pytest.mark.parametrize("case", TEACHERS)
def test_lists_of_teachers_that_cannot_be_one(case, teacher, few):
    make, message = TEACHERS[case]
    student = create("resnet8", 10)
    tutors = make(teacher) if case != "the student" else [teacher, student]
    with pytest.raises(ValueError, match=message):
        distill(tutors, student, few, "kd", None, SHORT)


def test_maps_of_several_teachers_have_no_mean(teacher, few):
    with pytest.raises(ValueError, match="Expected one teacher for 'at', which compares maps, got a list of 2"):
        distill([teacher, teacher], create("resnet8", 10), few, "at", None, SHORT)


# ---- what is found out before anything long


@pytest.mark.parametrize("mixer", [None, "supermix"])
def test_the_teacher_is_compared_with_the_labels(mixer, teacher, digits, few, tmp_path):
    history = distill(teacher, create("resnet8", 10), few, "kd", mixer, SHORT, mixes=mixer and 20, folder=tmp_path)
    with torch.no_grad():
        right = 100 * (teacher(few[:][0]).argmax(1) == few.labels).float().mean().item()
    assert history.teacher == pytest.approx(right) and f"a teacher that is right in {right:.1f} %" in repr(history)
    assert read_log(tmp_path / "log.csv")[0]["teacher"] == pytest.approx(right)
    assert distill(None, create("resnet8", 10), few, "alone", None, SHORT).teacher is None


@pytest.mark.parametrize("mixer", [None, "supermix"])
def test_a_teacher_whose_classes_are_in_another_order_is_told(mixer, teacher, few):
    names = sorted(map(str, range(10)), reverse=True)  # as another program may have sorted the folders
    order = torch.tensor([int(name) for name in names])
    wrong = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in wrong.head.parameters():
            p.copy_(p[order])
    with pytest.warns(UserWarning, match="where chance is 10.0 %.*classes are in another order.*mean or std.*its head"):
        history = distill(wrong, create("resnet8", 10), few, "kd", mixer, SHORT, mixes=mixer and 20)
    assert history.teacher < 20
    with pytest.warns(UserWarning, match="classes are in another order"):
        make_mixes(wrong, few, 20)


OTHERS = {
    "other images": lambda few, digits: digits.train.subset(40, seed=1),
    "fewer of them": lambda few, digits: few.subset(30),
    "another mean": lambda few, digits: ArrayImages(replace(few.info, mean=(0.5,) * 3), few.kept, few.labels),
    "another std": lambda few, digits: ArrayImages(replace(few.info, std=(0.25,) * 3), few.kept, few.labels),
    "other labels": lambda few, digits: ArrayImages(few.info, few.kept, few.labels.flip(0)),
    "another pixel": lambda few, digits: ArrayImages(
        few.info, few.kept ^ (torch.arange(few.kept.numel()) == 77).byte().view_as(few.kept), few.labels
    ),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("listed", [False, True])
def test_a_stock_of_other_images_is_an_error(case, listed, teacher, digits, few, mixes, tmp_path):
    other = OTHERS[case](few, digits)
    with pytest.raises(ValueError, match=r"The stock was made from .*, and the student learns from .*make_mixes\("):
        distill(
            teacher,
            create("resnet8", 10),
            other,
            "kd",
            ["mixup", mixes] if listed else mixes,
            SHORT,
            folder=tmp_path / "run",
        )
    assert not list(tmp_path.iterdir())


def test_a_stock_of_the_same_images_is_taken(teacher, few, mixes):
    twin = ArrayImages(few.info, few.kept.clone(), few.labels.clone())
    for images in (few, twin, Augmented(twin, load_policy("randaugment"))):
        distill(teacher, create("resnet8", 10), images, "kd", mixes, SHORT)
    with pytest.raises(ValueError, match="of which held_out leaves images.split"):
        distill(teacher, create("resnet8", 10), few, "kd", mixes, replace(SHORT, held_out=10))
    learned = few.split(10)[1]
    distill(teacher, create("resnet8", 10), few, "kd", make_mixes(teacher, learned, 20), replace(SHORT, held_out=10))


REFUSED = {
    "masks larger than the images": (dict(mixing=Mixing(mask_size=64)), "mask_size 64"),
    "more sources than classes": (dict(mixing=Mixing(k=11)), "k|top"),
    "a mixing in words": (dict(mixing={"k": 2}), "Expected a mixing that is a .*Mixing.*got dict"),
    "no mixes": (dict(mixes=0), "count .*1 or more"),
    "half a mix": (dict(mixes=2.5), "count of Generation to be of type int, got 2.5"),
    "a pad below 0": (dict(mixed_pad=-1), "mixed_pad of 0 or more pixels, or None, got -1"),
    "half a pixel": (dict(mixed_pad=1.5), "mixed_pad of 0 or more pixels, or None, got 1.5"),
    "a method that there is not": (dict(method="attention"), "The CRD benchmark's method of this name is 'at' here"),
    "a mixer that there is not": (dict(mixer=["supermix", "cutmx"]), "Unknown mixer 'cutmx'. Did you mean 'cutmix'"),
    "more held out than there are": (dict(recipe=replace(SHORT, held_out=40)), "hold out fewer than the 40"),
    "an option of nobody": (dict(titel="x"), "Unknown option of `train` 'titel'. Did you mean 'title'"),
    "a probability of 2": (dict(probability=2), "probability above 0"),
    "no room for a first stage": (dict(method="ab"), "first stage of ab of at least one epoch"),
    "a student of fewer classes": (dict(student=lambda: create("resnet8", 8)), "at least the 10 classes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_call_leaves_nothing_behind(case, teacher, few, tmp_path):
    changes, message = REFUSED[case]
    settings = (
        dict(
            method="kd",
            mixer="supermix",
            recipe=SHORT,
            mixes=20,
            folder=tmp_path / "run",
            student=lambda: create("resnet8", 10),
        )
        | changes
    )
    student = settings.pop("student")()
    before = {name: t.clone() for name, t in student.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        distill(teacher, student, few, **settings)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(before[name], t) for name, t in student.state_dict().items())


def test_a_folder_that_is_a_file_is_refused(teacher, few, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in (file, 5):
        with pytest.raises(ValueError, match="Expected a folder, or a path where one can be created"):
            distill(teacher, create("resnet8", 10), few, "kd", "supermix", SHORT, mixes=20, folder=folder)
        with pytest.raises(ValueError, match="Expected a folder"):
            make_mixes(teacher, few, 20, folder=folder)
    assert file.read_text() == "mine"


def test_a_folder_of_another_run_gets_no_mixes(teacher, few, tmp_path):
    distill(teacher, create("resnet8", 10), few, "kd", None, SHORT, folder=tmp_path)
    for method in ("dkd", "alone"):
        with pytest.raises(ValueError, match="holds a run with another recipe: terms"):
            distill(teacher, create("resnet8", 10), few, method, "supermix", SHORT, mixes=20, folder=tmp_path)
    assert not (tmp_path / "mixes").exists()


# ---- wrapped networks

WRAPPERS = {"DataParallel": nn.DataParallel, "compiled": lambda n: torch.compile(n, backend="eager")}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("method, mixer", [("kd", "mixup"), ("at", None), ("ab", None), ("crd_kd", "supermix")])
def test_wrapped_networks_learn_the_same(wrap, method, mixer, teacher, few):
    recipe, students = Training(epochs=2, batch_size=20, lr=0.01, milestones=(), first_stage=1), []
    for laid in (lambda network: network, WRAPPERS[wrap]):
        torch.manual_seed(0)
        students.append(create("resnet8", 10))
        distill(
            laid(teacher), laid(students[-1]), few, method, mixer, recipe, mixes=20 if mixer == "supermix" else None
        )
    one, other = (student.state_dict() for student in students)
    assert all(torch.allclose(one[key].float(), other[key].float(), atol=1e-6) for key in one)


def test_the_teacher_within_a_wrapper_is_no_student(teacher, few):
    with pytest.raises(ValueError, match="a student other than the teacher"):
        distill(teacher, nn.DataParallel(teacher), few, "kd", None, SHORT)


@pytest.fixture(scope="module")
def still(teacher, few):
    return make_mixes(teacher, few, 60, mixed_pad=None)


class Counting(nn.Module):
    "A teacher that counts the images that it, or a folded copy, is shown."

    images = 0

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        Counting.images += len(x)
        return self.network(x)


@pytest.mark.parametrize(
    "terms",
    [*(Terms(mixed_kd=0.9, logits=name) for name in LOGIT_LOSSES)]
    + [*(Terms(ce=1.0, mixed_ce=1.0, label=label) for label in ("teacher", "softmax"))],
    ids=lambda terms: terms.logits if terms.mixed_kd else terms.label,
)
def test_stored_logits_give_the_loss_of_the_loop_with_the_teacher(terms, teacher, few, still):
    torch.manual_seed(0)
    student, batch = create("resnet8", 10).eval(), batch_of(few, 40)
    mixed, _ = still.sample(40, place(0))
    assert {image.numpy().tobytes() for image in mixed} <= {i.numpy().tobytes() for i in still.batch(range(60)).images}
    asked = Distillation(teacher, terms, still)
    asked.prepare = lambda batch: _mix_batch(still, batch, terms.label)._replace(logits=None)
    kept = Distillation(None, terms, still)(student, batch)
    torch.testing.assert_close(kept, asked(student, batch_of(few, 40)), rtol=3e-3, atol=1e-4)


def test_a_stock_of_unmoved_mixes_needs_no_teacher(few, still, tmp_path):
    terms = Terms(ce=1.0, mixed_kd=0.9)
    recipe = replace(SHORT, epochs=2)

    def student_of(folder):
        torch.manual_seed(0)
        student = create("resnet8", 10)
        distill(None, student, few, terms, still, recipe, folder=folder)
        return student.state_dict()

    whole = student_of(tmp_path)
    checkpoints(tmp_path)[-1].unlink()  # as if it had been killed in the second epoch
    for tensors in (student_of(tmp_path), student_of(None)):
        assert all(torch.equal(a, b) for a, b in zip(whole.values(), tensors.values(), strict=True))


def test_the_teacher_sees_natural_images_alone_and_each_view_once(teacher, few):
    counting = Counting(teacher).eval()
    still = make_mixes(counting, few, 30, mixed_pad=None)

    def shown(mixer, **changes):
        Counting.images = 0
        torch.manual_seed(0)
        distill(counting, create("resnet8", 10), few, "kd", mixer, replace(SHORT, **changes))
        return Counting.images

    looks = shown(still) - 40  # before the training, of checks
    assert shown(still, epochs=5) - looks == 5 * 40
    assert shown(still, epochs=5, views=2) - looks == 2 * 40
    looks = shown(None) - 40
    assert shown(None, epochs=5, views=2) - looks == 2 * 40


@pytest.mark.parametrize("mixer", [None, "still"])
def test_looked_up_logits_are_the_teachers(mixer, teacher, few, still, tmp_path):
    mixer = mixer and still
    recipe = replace(SHORT, epochs=3, views=2, held_out=0 if mixer else 8)

    def history_of(method, folder=None):
        torch.manual_seed(0)
        student = create("resnet8", 10)
        return distill(teacher, student, few, method, mixer, recipe, folder=folder), student.state_dict()

    kept, tensors = history_of("kd", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("supermix.distillation.distill._KnownLogits", lambda *_: None)
        asked, _ = history_of("kd")
    assert kept.loss[0] == pytest.approx(asked.loss[0], rel=3e-3) and kept.loss != asked.loss
    checkpoints(tmp_path)[-1].unlink()  # in the third epoch, which shows the first view again
    _, again = history_of("kd", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(tensors.values(), again.values(), strict=True))


FEW_KEPT = {
    "a term on natural logits": ("kd", None, "compares natural ones, too: pass the teacher"),
    "a term on features": ("crd", None, "compares natural ones, too: pass the teacher"),
    "mixes that are moved": (Terms(ce=1.0, mixed_kd=0.9), 2, "needs a teacher, got None. A stock has .*pad=None"),
    "another mixer beside it": (Terms(ce=1.0, mixed_kd=0.9), "mixup", "needs a teacher, got None."),
}


@pytest.mark.parametrize("case", FEW_KEPT)
def test_what_cannot_be_known_without_a_teacher(case, few, still, tmp_path):
    method, other, message = FEW_KEPT[case]
    mixer = still
    if other == 2:
        mixer = copy.copy(still)
        mixer.pad = 2
    elif other:
        mixer = [still, other]
    with pytest.raises(ValueError, match=message):
        distill(None, create("resnet8", 10), few, method, mixer, SHORT, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_logits_of_another_teacher_are_refused(few, still):
    with pytest.raises(ValueError, match=r"logits of another teacher \(resnet20, .* given one \(resnet8"):
        distill(create("resnet8", 10).eval(), create("resnet8", 10), few, "kd", still, SHORT)


def test_a_stock_by_name_of_unmoved_mixes(teacher, few, tmp_path):
    history = distill(
        teacher, create("resnet8", 10), few, "kd", "supermix", SHORT, mixes=30, mixed_pad=None, folder=tmp_path
    )
    stock = MixedDataset(tmp_path / "mixes", few, pad=None)
    assert stock.manifest["recipe"]["top"] == "all" and len(history.loss) == 1
    with pytest.raises(ValueError, match="top: 'all' there, 10 now"):
        make_mixes(teacher, few, 30, folder=tmp_path / "mixes")


REPLAYED = {
    "kd": ("kd", None, {}),
    "views looked up": ("kd", None, {"views": 2}),
    "moved mixes": ("kd", "mixes", {}),
    "unmoved mixes": ("kd", "still", {"views": 2}),
    "soft labels of mixes": (Terms(ce=1.0, mixed_ce=1.0, label="area"), "mixes", {}),
    "no teacher": (Terms(ce=1.0, mixed_kd=0.9), "still", {}),
    "dkd": ("dkd", "still", {}),
}


@pytest.mark.parametrize("case", REPLAYED)
def test_a_replayed_distillation_is_the_same(case, teacher, few, mixes, still, monkeypatch):
    "Updates as a GPU replays them: 40 images in batches of 16, so two of three are replayed."
    method, stock, changes = REPLAYED[case]
    recipe = replace(SHORT, epochs=3, lr=0.02, **changes)

    def trained():
        torch.manual_seed(0)
        student = create("resnet8", 10)
        mixer = {None: None, "mixes": mixes, "still": still}[stock]
        history = distill(None if case == "no teacher" else teacher, student, few, method, mixer, recipe)
        return student.state_dict(), history

    eager, expected = trained()
    monkeypatch.setattr(loop, "_why_eager", lambda run, *_: "" if run.objective.capturable(run.epoch) else "no")
    ours, history = trained()
    assert history.how == "one graph per update" and "GPU" in expected.how
    assert history.loss == pytest.approx(expected.loss, rel=1e-3)
    for a, b in zip(ours.values(), eager.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("case", [case for case in REPLAYED if REPLAYED[case][1]])
@pytest.mark.parametrize("replayed", [False, True])
def test_mixes_made_within_the_update_are_the_same(replayed, case, teacher, few, mixes, still, monkeypatch):
    "As where the stock's sources are on a GPU: only what chance decides is prepared, and bits stay the same."
    method, stock, changes = REPLAYED[case]
    if replayed:
        monkeypatch.setattr(loop, "_why_eager", lambda *_: "")

    def trained():
        torch.manual_seed(0)
        student, mixer = create("resnet8", 10), {"mixes": mixes, "still": still}[stock]
        recipe = replace(SHORT, epochs=2, lr=0.02, **changes)
        history = distill(None if case == "no teacher" else teacher, student, few, method, mixer, recipe)
        return student.state_dict(), history.loss

    usual, expected = trained()
    monkeypatch.setattr("supermix.distillation.distill._is_on_gpu", lambda mixer: isinstance(mixer, MixedDataset))
    monkeypatch.setattr("supermix.distillation.distill._mix_batch", None)  # is not called
    ours, loss = trained()
    assert loss == expected and all(torch.equal(a, b) for a, b in zip(ours.values(), usual.values(), strict=True))


@pytest.mark.parametrize("method, mixer", [("crd", None), ("kd", "mixup"), ("kd", ["mixup", "cutmix"])])
def test_what_is_not_replayed(method, mixer, teacher, few):
    distillation = []

    class Seen(Distillation):
        def begin_epoch(self, network, epoch):
            super().begin_epoch(network, epoch)
            distillation.append(self.capturable(epoch))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("supermix.distillation.distill.Distillation", Seen)
        distill(teacher, create("resnet8", 10), few, method, mixer, SHORT)
    assert distillation == [False]
