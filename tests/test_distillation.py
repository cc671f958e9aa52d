"""Making mixes, and the loss of a student that learns from a teacher on natural and mixed images."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from supermix.checkpoints import checkpoints, load_checkpoint
from supermix.contrast import TERMS
from supermix.core import seeded as place
from supermix.data import Data
from supermix.distillation import MIXERS, Distillation, distill, make_mixes
from supermix.losses import LOGIT_LOSSES, see
from supermix.masks import areas, soft_labels
from supermix.mixers import CutMix, MixUp
from supermix.mixing import SuperMix, is_solved
from supermix.policies import Augmented, load_policy
from supermix.recipes import FAST, METHODS, Mixing, Terms, Training
from supermix.store import MixedDataset
from supermix.training import Batch, accuracy, train
from supermix.zoo import create
from torch import nn

SHORT = Training(epochs=1, batch_size=16, milestones=())


@pytest.fixture(scope="module")
def few(digits): return digits.train.subset(40)


@pytest.fixture(scope="module")
def mixes(teacher, few): return make_mixes(teacher, few, 60)


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
    with torch.no_grad(): logits = teacher(everything.images)
    torch.testing.assert_close(logits, everything.logits, rtol=2e-3, atol=2e-2)
    again, other = (make_mixes(teacher, few, 60, seed=seed).batch(range(60)).images for seed in (0, 1))
    assert torch.equal(everything.images, again) and not torch.equal(everything.images, other)


def test_a_stock_in_a_folder_is_found_again(teacher, few, tmp_path):
    first = make_mixes(teacher, few, 60, folder=tmp_path / "mixes")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "mixes").glob("*.safetensors")}
    again = make_mixes(teacher, few, 60, folder=tmp_path / "mixes")
    assert torch.equal(first.batch([3]).images, again.batch([3]).images)
    assert times == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "mixes").glob("*.safetensors")}
    with pytest.raises(ValueError, match="made otherwise"):
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


@pytest.mark.parametrize("method, mixer, passes", [
    ("kd", None, 16), ("kd", "mixup", 32), ("crd_kd", None, 16), ("crd_kd", "mixup", 32), ("at", None, 16),
    ("at", "mixup", 32), ("ab", None, 0), ("fsp", None, 0), ("alone", "mixup", 16)])
def test_the_teacher_sees_no_image_twice(method, mixer, passes, teacher, few):
    counted, shown = counting(teacher)
    student, terms = create("resnet8", 10), METHODS[method] if mixer is None else METHODS[method].mixed()
    objective = Distillation(counted, terms, mixer and MixUp(10), student, few, first_stage=1)
    if terms.features: objective.begin(student, 1)  # behind the first stage, where there is one
    else: objective.asked = [counted]               # no copy with folded norms
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
        objective.begin(student, epoch)
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
    few = mixes.small["lam"][:len(mixes), 0] > 0.6
    assert torch.equal(mixes.batch(few).images, mixes.batch(few.nonzero().flatten()).images) and few.sum() > 1
    assert mixes[torch.tensor(3)][0].shape == (3, 32, 32) and torch.equal(mixes[torch.tensor(3)][0], mixes[3][0])
    with pytest.raises(IndexError, match=f"a mask of {len(mixes)} rows, got one of 2"): mixes.batch([True, False])


@pytest.mark.parametrize("pad", [0, 2])
def test_a_sample_is_a_window_of_a_mix(pad, mixes, seeded):
    mixes.pad = pad
    views, known = mixes.sample(50, seeded())
    black = mixes.info.normalize(torch.zeros(3, 1, 1, dtype=torch.uint8))
    framed = black.expand(50, 3, 32 + 2 * pad, 32 + 2 * pad).clone()
    framed[..., pad:pad + 32, pad:pad + 32] = known.images
    # all there are; digits are never mirrored
    windows = framed.unfold(2, 32, 1).unfold(3, 32, 1).movedim(1, 3).reshape(50, -1, 3, 32, 32)
    assert (views.shape == (50, 3, 32, 32)
            and all((w == view).flatten(1).all(1).any() for w, view in zip(windows, views)))
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


@pytest.mark.parametrize("label", ["teacher", "softmax", "lam", "area"])
def test_what_label_a_mixed_image_gets(label, teacher, few, mixes):
    torch.manual_seed(0)
    student, batch = create("resnet8", 10).eval(), batch_of(few)
    mixed, known = mixes.sample(16, place(0))
    with torch.no_grad(): mt = teacher(mixed)
    wanted = {"teacher": mt.argmax(1), "softmax": mt.softmax(1), "lam": soft_labels(known.classes, known.lam, 10),
              "area": soft_labels(known.classes, areas(known.masks), 10)}[label]
    ours = Distillation(teacher, Terms(mixed_ce=1.0, label=label), mixes, student, few)(student, batch)
    torch.testing.assert_close(ours, F.cross_entropy(student(mixed), wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("mixer", [None, "mixup"])
def test_features_are_compared_on_natural_images_only(name, mixer, teacher, few):
    torch.manual_seed(0)
    student, terms = create("resnet8", 10).eval(), alone(name)
    if mixer: terms = terms.mixed()
    objective = Distillation(teacher, terms, MixUp(10) if mixer else None, student, few).eval()
    if not objective.features[name].later: return
    batch = batch_of(few)
    with torch.no_grad():
        ours, without = (
            obj(student, batch._replace(generator=place(0)))
            for obj in (objective, Distillation(teacher, replace(terms, features=()), objective.mixer, student, few)))
    g = place(0)
    if mixer: MixUp(10)(batch.images, batch.labels, generator=g)  # what is drawn for the mixes comes first
    with torch.no_grad():
        term = objective.features[name](see(student, batch.images), see(teacher, batch.images), batch.labels,
                                        batch.indices, g)
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
    history = distill(teacher.train(), student, few, "kd", mixer, SHORT, mixes=50)
    assert all(part.training for part in teacher.modules())  # as it was given; but it answered in evaluation mode,
    teacher.eval()
    assert all(torch.equal(before[name], t) for name, t in teacher.state_dict().items())  # for no statistics have moved
    assert (history.images == len(few) and history.test is None and not student.training
            and all(p.grad is None for p in teacher.parameters()))


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
        def begin(self, network, epoch):
            super().begin(network, epoch)
            own = {id(p) for p in self.features[name].first_parameters(network)}
            everything = [*network.parameters(), *self.features.parameters()]
            seen.append((self.first, all(p.requires_grad == (id(p) in own) for p in everything),
                         all(p.requires_grad for p in network.parameters())))

    recipe = Training(epochs=3, batch_size=20, lr=0.01, milestones=())
    history = train(student, few, recipe, Watched(teacher, alone(name), None, student, few, first_stage=1))
    assert [first for first, _, _ in seen] == [True, False, False] and seen[0][1] and seen[1][2] and seen[2][2]
    assert len(history.rows) == 3 and history.images == 3 * len(few)


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
    slower = distill(teacher, create("resnet8", 10), images.subset(20), alone(name),
                     recipe=replace(recipe, first_lr=0.001, epochs=4, milestones=()))
    assert [row["lr"] for row in slower.rows] == pytest.approx([0.001] * 3 + [lr])


@pytest.mark.parametrize("name", [name for name, term in TERMS.items() if term.first])
def test_the_weight_is_for_the_later_stage(name, teacher, few):
    torch.manual_seed(0)
    student, batch = create("resnet8", 10).eval(), batch_of(few)
    objective = Distillation(teacher, alone(name), None, student, few, first_stage=1).eval()
    objective.begin(student, 0)
    torch.testing.assert_close(objective(student, batch),
                               objective.features[name].first_loss(student, teacher, batch.images))


def test_crops_of_mixed_images(teacher, digits):
    images, students = digits.train.subset(20), []
    for mixer, options in (("supermix", {"mixed_pad": 0}), (make_mixes(teacher, images, 30, mixed_pad=0), {}),
                           ("supermix", {})):
        torch.manual_seed(0)
        students.append(create("resnet8", 10))
        distill(teacher, students[-1], images, "kd", mixer, SHORT, mixes=30, **options)
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
    for classes, message in ((12, "the same classes, got 12 and 10"),
                             (8, "a student of at least the 10 classes of digits, got 8")):
        with pytest.raises(ValueError, match=message):
            distill(teacher, create("resnet8", classes), few, "kd", "supermix", SHORT, folder=tmp_path)
    with pytest.raises(ValueError, match="a student of at least the 10"):
        distill(None, create("resnet8", 8), few, "alone", recipe=SHORT)
    assert not list(tmp_path.iterdir())


MISFITS = {
    "no mixer": (lambda t, few, m: distill(t, create("resnet8", 10), few, Terms(mixed_kd=1.0)), "give a mixer"),
    "no teacher": (lambda t, few, m: distill(None, create("resnet8", 10), few, "kd"), "needs a teacher, got None"),
    "no teacher for mixes": (
        lambda t, few, m: distill(None, create("resnet8", 10), few, Terms(mixed_ce=1.0, label="lam"), "supermix"),
        "needs a teacher, got None"),
    "method": (lambda t, few, m: distill(t, create("resnet8", 10), few, "fitnets", m),
               "'fitnets'. Did you mean 'fitnet'"),
    "mixer": (lambda t, few, m: distill(t, create("resnet8", 10), few, "kd", "mixupp"),
              "Unknown mixer 'mixupp'. Did you mean 'mixup'"),
    "label": (lambda t, few, m: distill(t, create("resnet8", 10), few, Terms(mixed_ce=1.0, label="arae"), m),
              "label of mixed images 'arae'. Did you mean 'area'"),
    "classes": (lambda t, few, m: distill(t, create("resnet8", 12), few, "kd", recipe=SHORT), "12.* 10|10.* 12"),
    "a teacher of too few classes": (
        lambda t, few, m: distill(nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)), create("resnet8", 10), few),
        "at least the 10 classes of digits, got 5"),
    "no mixes": (lambda t, few, m: make_mixes(t, few, 0), "Expected .*got.* 0"),
    "none of the stock": (
        lambda t, few, m: distill(t, create("resnet8", 10), few, "kd", "supermix", SHORT, mixes=0),
        "count of 1 or more.* got count 0"),
    "a number of mixes and no mixer": (
        lambda t, few, m: distill(t, create("resnet8", 10), few, "kd", mixes=100),
        "mixer='supermix' where a number of mixes is given, got None"),
    "a recipe in words": (lambda t, few, m: distill(t, create("resnet8", 10), few, recipe={"epochs": 3}),
                          "recipe that is a .*Training.*got dict"),
    "a pair": (lambda t, few, m: distill(t, create("resnet8", 10), few[:]),
               "data of `load_data` or `load_folder`.*got tuple"),
    "no student": (lambda t, few, m: distill(t, None, few), "student that is a network, got NoneType"),
    "the teacher itself": (lambda t, few, m: distill(t, t, few), "student beside the teacher"),
    **{f"a first stage of {method} and nothing after it": (
        lambda t, few, m, method=method: distill(t, create("resnet8", 10), few, method,
                                                 recipe=Training(epochs=5, milestones=(4,))),
        f"first stage of {method} of at least one epoch, and shorter than the 5 epochs .* got first_stage 30")
       for method in ("ab", "ft", "fsp")},
    "no first stage": (lambda t, few, m: distill(t, create("resnet8", 10), few, "ab",
                                                 recipe=Training(epochs=5, milestones=(), first_stage=0)),
                       "of at least one epoch, .* got first_stage 0"),
    "a loss that there is not": (
        lambda t, few, m: distill(t, create("resnet8", 10), few, Terms(kd=0.9, logits="dkdd"), "supermix"),
        "Unknown loss on logits 'dkdd'. Did you mean 'dkd'"),
    "no features": (
        lambda t, few, m: distill(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), create("resnet8", 10), few, "crd"),
        "teacher with `features` for 'crd', got Sequential: wrap it, as in Hooked"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_together(case, teacher, few, mixes):
    act, message = MISFITS[case]
    with pytest.raises(ValueError, match=message): act(teacher, few, mixes)


def test_a_stock_of_a_whole_data_set(teacher, digits):
    assert len(make_mixes(teacher, digits, 20)) == 20  # its training images


@pytest.mark.parametrize("method, epochs", [("kd", 2), ("alone", 1)])
def test_a_stock_is_mixed_ahead_and_changes_nothing(method, epochs, teacher, few, mixes, monkeypatch):
    "The images that are mixed in a thread while the network learns are those that it would mix itself."
    def go():
        torch.manual_seed(0)
        student, by = create("resnet8", 10), []
        kept = MixedDataset.sample
        monkeypatch.setattr(MixedDataset, "sample", lambda self, n, generator: by.append(
            threading.current_thread() is threading.main_thread()) or kept(self, n, generator))
        distill(teacher, student, few, method, mixes, replace(SHORT, epochs=epochs))
        monkeypatch.undo()
        return student.state_dict(), by
    ahead, by = go()
    assert by and not any(by)
    monkeypatch.setattr(Distillation, "prepare", None)
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
    with pytest.raises(ValueError, match="one head, got Two with auxiliary ones: make it with aux_logits=False"):
        distill(teacher, Two(), few, "kd", None, SHORT)
    class Sequence(nn.Module):  # as torchvision's Swin: `features` is no method
        def __init__(self):
            super().__init__()
            self.features, self.head = nn.Sequential(nn.Flatten()), nn.Linear(3 * 32 * 32, 10)
        def forward(self, x): return self.head(self.features(x))
    with pytest.raises(ValueError, match="Expected a student with `features` for 'at', got Sequence: wrap it"):
        distill(teacher, Sequence(), few, "at", None, SHORT)
