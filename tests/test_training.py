"""The loop against one written out in torch, its schedule against torch's, and the same bytes from the same seed."""

import copy
import os
import json
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from supermix.core import file_hash, load_tensors
from supermix.data import ArrayImages
from supermix.distillation.distill import distill
from supermix.mixing.mixers import CutMix
from supermix.policies.policies import Augmented, Policy, load_policy
from supermix.recipes import CIFAR100, IMAGENET, TEACHERS, Training
from supermix.training.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from supermix.training.logs import read_log
from supermix.training.loop import (
    Objective,
    _FunctionObjective,
    _Run,
    _run_epoch,
    _run_identity,
    _why_eager,
    accuracy,
    label_objective,
    make_teacher,
    measure_bfloat16,
    train,
)
from supermix.zoo import create, load
from torch import nn


@pytest.mark.parametrize(
    "training",
    [CIFAR100.training, IMAGENET.training, Training(epochs=7, milestones=())],
    ids=["CIFAR100", "IMAGENET", "constant"],
)
def test_the_schedule_is_torchs_in_every_epoch(training):
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=training.lr)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimiser, training.milestones, training.decay)
    for epoch in range(training.epochs):
        for moment in (epoch, epoch + 0.5, epoch + 0.999):
            assert training.lr_at(moment) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimiser.step()
        theirs.step()


def test_the_warm_up_rises_in_a_line_and_then_changes_nothing():
    warm, cold = Training(warmup=5), Training()
    assert [warm.lr_at(e) for e in (0, 1, 2.5, 5)] == pytest.approx([0, 0.02, 0.05, 0.1])
    assert all(warm.lr_at(e) == cold.lr_at(e) for e in range(5, 600))


@pytest.mark.parametrize("warmup", [0, 4])
def test_the_cosine_is_torchs(warmup):
    training, optimiser = (
        Training(epochs=20, schedule="cosine", warmup=warmup),
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1),
    )
    rate, annealing = torch.optim.lr_scheduler, torch.optim.lr_scheduler.CosineAnnealingLR
    theirs = (
        annealing(optimiser, 20)
        if not warmup
        else rate.SequentialLR(
            optimiser, [rate.LinearLR(optimiser, 1e-9, total_iters=4), annealing(optimiser, 16)], [4]
        )
    )
    for epoch in range(20):
        assert training.lr_at(epoch) == pytest.approx(theirs.get_last_lr()[0], rel=1e-6, abs=1e-9)
        optimiser.step()
        theirs.step()
    assert training.lr_at(19.999) < 1e-8


OPTIMISERS = {
    "AdamW": (
        dict(optimizer="adamw", lr=0.002, weight_decay=0.05, momentum=0.8),
        lambda p: torch.optim.AdamW(p, lr=0.002, betas=(0.8, 0.999), weight_decay=0.05),
    ),
    "Nesterov": (
        dict(nesterov=True, lr=0.05),
        lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=5e-4, nesterov=True),
    ),
    "cosine": (dict(schedule="cosine", lr=0.05), lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=5e-4)),
    "smoothing": (dict(label_smoothing=0.2, lr=0.05), lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=5e-4)),
    "clipping": (dict(clip_grad=0.5, lr=0.05), lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=5e-4)),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_other_optimisers_are_torchs_too(name, digits):
    changes, make = OPTIMISERS[name]
    torch.manual_seed(0)
    ours, images = create("resnet8", 10), digits.train.subset(40)
    theirs = copy.deepcopy(ours).to(memory_format=torch.channels_last)
    recipe = Training(epochs=2, batch_size=16, milestones=(), **changes)
    train(ours, images, recipe)
    optimiser, norms = make(theirs.parameters()), []
    for update, (x, y, _) in enumerate(batch for epoch in (0, 1) for batch in images.batches(16, 0, epoch)):
        if recipe.schedule == "cosine":
            for group in optimiser.param_groups:
                group["lr"] = recipe.lr_at(update / 3)
        optimiser.zero_grad()
        F.cross_entropy(
            theirs(x.to(memory_format=torch.channels_last)), y, label_smoothing=recipe.label_smoothing
        ).backward()
        if recipe.clip_grad:
            norms.append(nn.utils.clip_grad_norm_(theirs.parameters(), recipe.clip_grad).item())
        optimiser.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-3, atol=1e-5)
    assert all(norm > recipe.clip_grad for norm in norms)  # there was something to clip


def test_a_method_smooths_the_labels_of_natural_images_only(digits, teacher):
    def first(method, smoothing):
        torch.manual_seed(0)
        recipe = Training(epochs=1, batch_size=16, milestones=(), label_smoothing=smoothing)
        return distill(teacher, create("resnet8", 10), digits.train.subset(16), method, recipe=recipe).loss[0]

    plain, smooth = first("alone", 0.0), first("alone", 0.3)
    x, y, _ = next(digits.train.subset(16).batches(16, 0, 0))
    torch.manual_seed(0)
    logits = create("resnet8", 10).train()(x)
    assert plain == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-4)
    assert smooth == pytest.approx(F.cross_entropy(logits, y, label_smoothing=0.3).item(), rel=1e-4)


def test_the_loop_is_torchs_sgd(digits):
    torch.manual_seed(0)
    ours, images = create("resnet8", 10), digits.train.subset(40)
    theirs = copy.deepcopy(ours).to(memory_format=torch.channels_last)
    recipe = Training(epochs=3, batch_size=16, lr=0.05, milestones=(1, 2), decay=0.5, weight_decay=0.01, seed=5)
    history = train(ours, images, recipe)
    optimiser = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    schedule, losses = torch.optim.lr_scheduler.MultiStepLR(optimiser, (1, 2), 0.5), []
    for epoch in range(3):
        losses.append([])
        for x, y, _ in images.batches(16, 5, epoch):
            loss = F.cross_entropy(theirs(x.to(memory_format=torch.channels_last)), y)
            losses[-1].append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-3, atol=1e-5)
    assert history.loss == pytest.approx([sum(epoch) / 3 for epoch in losses], rel=1e-3)
    assert [row["lr"] for row in history.rows] == pytest.approx([0.05, 0.025, 0.0125])
    assert [row["step"] for row in history.rows] == [3, 6, 9] and [row["epoch"] for row in history.rows] == [1, 2, 3]
    assert history.images == 120 and history.speed > 0 and "3 epochs" in repr(history)
    assert not any(part.training for part in ours.modules()) and ours.info == images.info


SCRIPT = """
import sys, torch
from supermix.data import load_digits
from supermix.distillation.distill import distill, make_mixes
from supermix.recipes import Training
from supermix.zoo import create, pretrained, save
torch.set_num_threads(1)
images, teacher = load_digits().train.subset(48), pretrained("digits")
mixes = make_mixes(teacher, images, 24)
torch.manual_seed(0)
student = create("resnet8", 10)
distill(teacher, student, images, "crd_kd", mixes, Training(epochs=2, batch_size=16, milestones=(1,)))
save(student, sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_make_the_same_bytes(tmp_path):
    processes = []
    for n in "12":  # each with another seed of Python's hashes, whose order must not matter
        command, environment = [sys.executable, "-c", SCRIPT, str(tmp_path / n)], {**os.environ, "PYTHONHASHSEED": n}
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    assert file_hash(tmp_path / "1") == file_hash(tmp_path / "2")


def test_two_threads_make_the_same_bits_twice(digits, teacher):
    "But not those of one thread: the sums over a batch are added in another order, and only nearly the same."

    def go(threads):
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(0)
            student = create("resnet8", 10)
            distill(
                teacher,
                student,
                digits.train.subset(64),
                "kd",
                recipe=Training(epochs=1, batch_size=32, lr=0.01, milestones=()),
            )
            return student.state_dict()
        finally:
            torch.set_num_threads(1)

    one, two, again = go(1), go(2), go(2)
    assert same(two, again)
    torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_training(value, digits, tmp_path):
    network, seen = create("resnet8", 10), []

    def objective(net, batch):
        seen.append(len(batch.images))
        return F.cross_entropy(net(batch.images), batch.labels) * (value if len(seen) == 3 else 1)

    with pytest.raises(
        FloatingPointError,
        match=rf"The loss is {value} at update 3 \(epoch 2, batch 1 of 2\).*"
        r"checkpoint is .*step-000000002",
    ):
        train(network, digits.train.subset(20), Training(epochs=5, batch_size=16), objective, folder=tmp_path)
    assert all(torch.isfinite(t).all() for t in network.state_dict().values())  # the bad step was not made
    assert load_checkpoint(checkpoints(tmp_path)[-1])["position"] == [1, 0, 2]


@pytest.mark.parametrize("at", [2, 3, 6])  # the last batch of an epoch, the first of one, the very last
def test_weights_that_a_gradient_spoils_are_in_no_checkpoint(at, digits, tmp_path):
    network, seen = create("resnet8", 10), []

    def objective(net, batch):
        seen.append(len(batch.images))
        loss = F.cross_entropy(net(batch.images), batch.labels)
        # the root of 0 is 0, and its slope no number
        return loss + (net.head.bias.sum() - net.head.bias.sum().detach()).abs().sqrt() if len(seen) == at else loss

    with pytest.raises(
        FloatingPointError,
        match="head.bias is NaN or infinite after update 2|checkpoint is .*step-00000000[24]-"
        if at == 3
        else f"head.bias is NaN or infinite after update {at}",
    ):
        train(network, digits.train.subset(20), Training(epochs=3, batch_size=16), objective, folder=tmp_path)
    for path in checkpoints(tmp_path):
        assert all(torch.isfinite(t).all() for t in load_checkpoint(path)["network"].values())
    assert len(checkpoints(tmp_path)) == {2: 0, 3: 1, 6: 2}[at]


class Learning(Objective):
    "An objective with a weight, a memory and draws of its own; its memory counts how often each image was seen."

    def __init__(self, n):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(n))

    def forward(self, network, batch):
        self.seen[batch.indices] += 1
        # its own, and torch's
        noise = torch.rand(len(batch.images), generator=batch.generator) + 0.1 * torch.rand(len(batch.images))
        return (F.cross_entropy(network(batch.images) * self.scale, batch.labels, reduction="none") * noise).mean()


def test_an_objective_may_have_a_rate_of_its_own(digits):
    class Slow(Objective):
        def forward(self, network, batch):
            return F.cross_entropy(network(batch.images), batch.labels)

        def learning_rate(self, recipe, epoch):
            return 0.001 if epoch < 1 else recipe.lr_at(epoch)

    recipe, nets = Training(epochs=1, batch_size=16, lr=0.05, milestones=()), []
    for objective, lr in ((Slow(), 0.05), (label_objective, 0.001)):
        torch.manual_seed(0)
        nets.append(create("resnet8", 10))
        history = train(nets[-1], digits.train.subset(48), replace(recipe, lr=lr), objective)
        assert history.rows[0]["lr"] == 0.001
    assert torch.equal(nets[0].head.weight, nets[1].head.weight)


RECIPE = Training(epochs=4, batch_size=16, lr=0.05, milestones=(2,), seed=3)


def whole(images, folder=None, objective=None, recipe=RECIPE, **options):
    torch.manual_seed(1)
    network, objective = create("resnet8", 10), objective or Learning(len(images))
    history = train(network, images, recipe, objective, folder=folder, **options)
    return {**network.state_dict(), **{f"objective.{k}": v for k, v in objective.state_dict().items()}}, history


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


class Stopped(Exception):
    pass


class Stopping(Learning):
    "The same, but it stops at an update, as a machine that goes down."

    def __init__(self, n, at):
        super().__init__(n)
        self.left = at

    def forward(self, network, batch):
        self.left -= 1
        if self.left < 0:
            raise Stopped
        return super().forward(network, batch)


@pytest.fixture(scope="module")
def uninterrupted(digits):
    "What a run without a stop ends with, and its history."
    return whole(digits.train.subset(40))


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8, 11])  # three updates an epoch: within epochs and between them
def test_stopped_and_resumed_it_ends_with_the_same_bits(at, uninterrupted, digits, tmp_path):
    images, (expected, history) = digits.train.subset(40), uninterrupted
    with pytest.raises(Stopped):
        whole(images, tmp_path, Stopping(40, at), minutes=0)
    ended, resumed = whole(images, tmp_path, minutes=0)
    assert same(ended, expected) and ended["objective.seen"].tolist() == [4] * 40
    assert resumed.loss == history.loss and resumed.images == history.images == 160
    assert [row["epoch"] for row in read_log(tmp_path / "log.csv")] == [1, 2, 3, 4]
    assert len(checkpoints(tmp_path)) == 2
    again, _ = whole(images, tmp_path)  # finished: nothing is trained any more
    assert same(again, expected)


# ---- what `train` asks of an objective


class Telling(Objective):
    "An objective that tells which of its methods is called, with what."

    def __init__(self):
        super().__init__()
        self.calls, self.networks = [], set()

    def called(self, name, *what, network=None):
        self.calls.append((name, *what))
        if network is not None:
            self.networks.add(id(network))

    def forward(self, network, batch):
        self.called("forward", batch.prepared, network=network)
        return F.cross_entropy(network(batch.images), batch.labels)

    def begin_epoch(self, network, epoch):
        assert network.training
        self.called("begin_epoch", epoch, network=network)

    def resets_optimiser(self, epoch):
        self.called("resets_optimiser", epoch)

    def reaches_all(self, epoch):
        self.called("reaches_all", epoch)
        return True

    def learning_rate(self, recipe, epoch):
        self.called("learning_rate", epoch)
        return recipe.lr_at(epoch)

    def prepares(self, epoch):
        self.called("prepares", epoch)
        return epoch == 1

    def prepare(self, batch):
        return len(batch.images)  # in another thread: its turn is not fixed

    def after_step(self, network):
        assert not torch.is_grad_enabled()
        self.called("after_step", network=network)

    def log_entries(self):
        self.called("log_entries")
        return {"entry": len(self.calls)}


def test_the_order_in_which_an_objective_is_asked(digits):
    objective, network = Telling(), create("resnet8", 10)
    recipe = Training(epochs=2, batch_size=16, lr=0.01, milestones=())
    history = train(network, digits.train.subset(20), recipe, objective)

    def epoch_of(epoch, *prepared):
        begin = [(name, epoch) for name in ("begin_epoch", "resets_optimiser", "reaches_all", "prepares")]
        updates = [
            call
            for i in (0, 1)
            for call in (("learning_rate", epoch + i / 2), ("forward", prepared[i]), ("after_step",))
        ]
        return [*begin, *updates, ("log_entries",)]

    assert objective.calls == [*epoch_of(0, None, None), *epoch_of(1, 16, 4)]
    assert objective.networks == {id(network)} and [row["entry"] for row in history.rows] == [11, 22]


def test_an_objective_with_defaults_only_is_the_function(digits):
    class Labels(Objective):
        def forward(self, network, batch):
            return label_objective(network, batch)

    networks = []
    for objective in (label_objective, Labels()):
        torch.manual_seed(0)
        networks.append(create("resnet8", 10))
        train(networks[-1], digits.train.subset(40), RECIPE, objective)
    assert same(*(network.state_dict() for network in networks))


class MovingAverage(Objective):
    "The labels, and a moving average of the network's weights that nobody looks at but the checkpoint."

    def __init__(self, network):
        super().__init__()
        self.average = copy.deepcopy(network).requires_grad_(False)

    def forward(self, network, batch):
        return F.cross_entropy(network(batch.images), batch.labels)

    def after_step(self, network):
        for mean, new in zip(self.average.parameters(), network.parameters()):
            mean.lerp_(new, 0.1)


def test_what_an_objective_does_after_a_step_is_in_the_checkpoint(digits, tmp_path):
    def go(folder=None, steps=None):
        class Stopping(MovingAverage):
            left = steps

            def after_step(self, network):
                super().after_step(network)
                if self.left is not None:
                    self.left -= 1
                if self.left == -1:
                    raise Stopped

        torch.manual_seed(0)
        network = create("resnet8", 10)
        objective = Stopping(network)
        train(network, digits.train.subset(40), RECIPE, objective, folder=folder, minutes=0)
        return objective.state_dict()

    expected = go()
    with pytest.raises(Stopped):
        go(tmp_path, 5)
    assert load_checkpoint(checkpoints(tmp_path)[-1])["position"] == [1, 2, 5]
    assert same(go(tmp_path), expected)


def test_an_optimiser_that_is_reset_has_no_momentum(digits):
    class Anew(Objective):
        def forward(self, network, batch):
            return F.cross_entropy(network(batch.images), batch.labels)

        def resets_optimiser(self, epoch):
            return epoch == 1

    torch.manual_seed(0)
    ours, images = create("resnet8", 10), digits.train.subset(32)
    theirs = copy.deepcopy(ours).to(memory_format=torch.channels_last)
    train(ours, images, Training(epochs=2, batch_size=16, lr=0.05, milestones=()), Anew())
    for epoch in (0, 1):
        optimiser = torch.optim.SGD(theirs.parameters(), 0.05, 0.9, weight_decay=5e-4)
        for x, y, _ in images.batches(16, 0, epoch):
            optimiser.zero_grad()
            F.cross_entropy(theirs(x.to(memory_format=torch.channels_last)), y).backward()
            optimiser.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-3, atol=1e-5)


def test_objectives_of_another_identity_do_not_go_on(digits, tmp_path):
    class Weighted(Objective):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, network, batch):
            return self.weight * F.cross_entropy(network(batch.images), batch.labels)

        def identity(self):
            return {"weight": self.weight}

    def go(weight):
        recipe = replace(RECIPE, epochs=1, milestones=())
        train(create("resnet8", 10), digits.train.subset(16), recipe, Weighted(weight), folder=tmp_path)

    go(0.5)
    with pytest.raises(ValueError, match=r"another recipe: weight \(0.5 there, 0.25 now\)"):
        go(0.25)


def twice_the_loss(network, batch):
    return 2 * label_objective(network, batch)


def by_a_factor(network, batch, factor):
    return factor * label_objective(network, batch)


def test_a_run_by_another_function_is_not_resumed(digits, tmp_path):
    images, recipe = digits.train.subset(16), replace(RECIPE, epochs=1, milestones=())

    def go(objective, folder):
        return train(create("resnet8", 10), images, recipe, objective, folder=folder).loss

    assert go(twice_the_loss, tmp_path / "twice") == go(twice_the_loss, tmp_path / "twice")
    with pytest.raises(ValueError, match=r"objective.function \(\S+twice_the_loss there, label_objective now\)"):
        go(label_objective, tmp_path / "twice")
    go(label_objective, tmp_path / "labels")
    for other in (partial(by_a_factor, factor=2.0), lambda network, batch: twice_the_loss(network, batch)):
        with pytest.raises(ValueError, match=r"objective.function \(label_objective there, \S+(factor|lambda>) now\)"):
            go(other, tmp_path / "labels")


def test_a_run_by_a_function_that_an_earlier_version_began_goes_on(digits, tmp_path):
    "Its checkpoint does not name the function."

    def go():
        return train(create("resnet8", 10), digits.train.subset(16), RECIPE, twice_the_loss, folder=tmp_path).loss

    expected, newest = go(), checkpoints(tmp_path)[-1]
    state = load_checkpoint(newest)
    recipe = json.loads(state["recipe"])
    assert recipe.pop("objective.function").endswith("test_training.twice_the_loss")
    newest.unlink()
    save_checkpoint(tmp_path, state["position"][2], state | {"recipe": json.dumps(recipe)})
    with pytest.warns(UserWarning, match="did not record objective.function"):
        assert go() == expected


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_numbers_of_numpys_do_not_spoil_a_checkpoint(optimizer, digits, tmp_path):
    class Noting(Objective):
        def forward(self, network, batch):
            return label_objective(network, batch)

        def learning_rate(self, recipe, epoch):
            return np.interp(epoch, [0, 2], [0.01, 0.002])

        def log_entries(self):
            return {"mean": np.mean([1.0, 2.0]), "most": np.int64(3), "last": torch.tensor(0.5)}

    numbers = {"momentum": np.float64(0.8), "weight_decay": np.logspace(-4, -3, 2)[0], "lr": np.float64(0.01)}
    recipe = Training(epochs=2, batch_size=16, milestones=(), optimizer=optimizer, **numbers)
    history = train(create("resnet8", 10), digits.train.subset(32), recipe, Noting(), folder=tmp_path)
    assert [row["lr"] for row in history.rows] == pytest.approx([0.008, 0.004])
    assert [(row["mean"], row["most"], row["last"]) for row in history.rows] == [(1.5, 3, 0.5)] * 2
    assert load_checkpoint(checkpoints(tmp_path)[-1])["history"]["rows"] == history.rows
    assert read_log(tmp_path / "log.csv")[-1]["mean"] == 1.5
    checkpoints(tmp_path)[-1].unlink()  # as if it had been killed in the second epoch
    assert (
        train(create("resnet8", 10), digits.train.subset(32), recipe, Noting(), folder=tmp_path).loss[0]
        == (history.loss[0])
    )


@pytest.mark.parametrize("ends", [None, KeyboardInterrupt, Stopped])
def test_what_an_objective_froze_learns_again_after_the_training(ends, digits):
    "Whatever ends the training; what was frozen before it stays so."

    class Freezing(Objective):
        def forward(self, network, batch):
            return label_objective(network, batch)

        def begin_epoch(self, network, epoch):
            network.stages.requires_grad_(False)
            network.stem.requires_grad_(True)

        def after_step(self, network):
            if ends is not None:
                raise ends

    network = create("resnet8", 10)
    network.stem.requires_grad_(False)
    with pytest.raises(ends) if ends else nullcontext():
        train(network, digits.train.subset(16), replace(RECIPE, epochs=1, milestones=()), Freezing())
    flags = {name: p.requires_grad for name, p in network.named_parameters()}
    assert flags == {name: not name.startswith("stem.") for name in flags}


def test_a_schedule_is_as_long_as_the_training(digits, teacher, tmp_path):
    "A policy that changes over 10 epochs would be over after a tenth of 100."
    policy = Policy("later", later=((0.5, ((("Rotate", 1.0, 5),),)),))
    images, recipe = Augmented(digits.train.subset(32), policy, epochs=10), replace(RECIPE, epochs=2, milestones=())
    for go in (
        lambda: train(create("resnet8", 10), images, recipe, folder=tmp_path / "run"),
        lambda: distill(teacher, create("resnet8", 10), images, "kd", "supermix", recipe, folder=tmp_path / "run"),
    ):
        with pytest.raises(ValueError, match="the training's 2 epochs, .* over 10: Augmented.images, policy, epochs=2"):
            go()
    assert not list(tmp_path.iterdir())
    assert len(train(create("resnet8", 10), Augmented(images.images, policy, 2), recipe).rows) == 2


@pytest.mark.parametrize(
    "objective, message",
    [
        (Learning, r"got the class Learning: pass Learning\(\), an object"),
        (nn.CrossEntropyLoss(), "derived from supermix.training.Objective, got CrossEntropyLoss: derive its class"),
        ("labels", r"Expected a function \(network, batch\) -> loss, .*got str"),
    ],
)
def test_what_is_no_objective_is_told_before_anything(objective, message, digits, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(create("resnet8", 10), digits.train.subset(16), RECIPE, objective, folder=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_an_objective_without_a_loss_is_told(digits):
    with pytest.raises(NotImplementedError, match="Expected Objective to define forward"):
        train(create("resnet8", 10), digits.train.subset(16), RECIPE, Objective())


@pytest.mark.parametrize("objective", [None, Learning])
def test_the_entries_of_a_checkpoint_stay(objective, digits, tmp_path):
    "Runs that an earlier version has begun go on: what they wrote, and what stands there, is the same."
    images = digits.train.subset(16)
    train(
        create("resnet8", 10),
        images,
        replace(RECIPE, epochs=1, milestones=()),
        objective(16) if objective else label_objective,
        folder=tmp_path,
    )
    state = load_checkpoint(checkpoints(tmp_path)[-1])
    assert set(state) == {"network", "optimiser", "objective", "random", "position", "losses", "history", "recipe"}
    assert set(state["objective"]) == ({"scale", "seen"} if objective else set())
    assert {"rows", "images", "seconds", "test"} == set(state["history"])


SCRIPT_OF_A_RUN = """
import sys, torch
from supermix.data import load_digits
from supermix.recipes import Training
from supermix.training.loop import train
from supermix.zoo import create, save
torch.set_num_threads(1)
torch.manual_seed(0)
network = create("resnet8", 10)
train(network, load_digits().train.subset(400), Training(epochs=6, batch_size=32, milestones=(3,)), \
folder=sys.argv[1], minutes=0.0005)
save(network, sys.argv[2])
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    def start(folder):
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT_OF_A_RUN, tmp_path / folder, tmp_path / f"{folder}.safetensors"],
            stderr=subprocess.DEVNULL,
        )

    def at_work(folder):
        "A process that has just written its first checkpoint, or has ended."
        names = lambda: [p.name for p in checkpoints(tmp_path / folder)]
        before, process = names(), start(folder)
        while names() == before and process.poll() is None:
            time.sleep(0.01)
        return process

    process, begun = at_work("whole"), time.monotonic()
    assert process.wait() == 0
    took, chance, kills = time.monotonic() - begun, random.Random(0), 0
    while kills < 2:
        process = at_work("killed")
        time.sleep(chance.uniform(0, 0.4) * took)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert kills > 0 and start("killed").wait() == 0
    assert file_hash(tmp_path / "killed.safetensors") == file_hash(tmp_path / "whole.safetensors")


def test_a_run_with_another_recipe_is_not_resumed(digits, tmp_path):
    images = digits.train.subset(40)
    whole(images, tmp_path)
    with pytest.raises(ValueError, match=r"another recipe: lr \(0.05 there, 0.1 now\), seed \(3 there, 4 now\)"):
        whole(images, tmp_path, recipe=replace(RECIPE, lr=0.1, seed=4))


def test_a_run_on_other_images_or_of_another_network_or_policy_is_not_resumed(digits, teacher, tmp_path):
    def go(images, network="resnet8", mixer="cutmix"):
        return distill(
            teacher, create(network, 10), images, "kd", mixer, replace(RECIPE, epochs=1, milestones=()), folder=tmp_path
        )

    few = digits.train.subset(32)
    assert go(few).loss == go(few).loss
    changed = [
        ({"images": digits.train.subset(40)}, r"images \(ArrayImages\(digits: 32 .* there, .*digits: 40 .* now"),
        ({"images": digits.train.subset(32, seed=1)}, "images .* there"),
        ({"images": Augmented(few, load_policy("randaugment"))}, "images .* there"),
        ({"images": few, "network": "resnet14"}, "network .* there"),
        ({"images": few, "mixer": CutMix(10, 1.0)}, r"mixer \(CutMix .*None.* there, CutMix .*1.0.* now\)"),
    ]
    for options, message in changed:
        with pytest.raises(ValueError, match=message):
            go(**options)


def test_a_run_by_another_method_or_teacher_is_not_resumed(digits, teacher, tmp_path):
    def go(method, tutor=teacher, mixer=None):
        return distill(
            tutor,
            create("resnet8", 10),
            digits.train.subset(40),
            method,
            mixer,
            replace(RECIPE, epochs=1, milestones=()),
            folder=tmp_path,
        )

    assert go("kd").loss == go("kd").loss
    for method, tutor, mixer, message in (
        ("dkd", teacher, None, r"terms.ce \(0.1 there, 1.0 now\).* terms.logits \(kd there, dkd now\)"),
        ("kd", create("resnet8", 10), None, "teacher .* there"),
        ("kd", teacher, "cutmix", r"mixer \(None there, CutMix \{'num_classes': 10, 'alpha': None\} now\)"),
    ):
        with pytest.raises(ValueError, match=message):
            go(method, tutor, mixer)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda info, pixels: (info, pixels.roll(1, 0)),
            r"recipe: images.fingerprint \([0-9a-f]{16} there, [0-9a-f]{16} now\)",
        ),
        (
            lambda info, pixels: (info, pixels ^ (torch.arange(len(pixels)) == 7).view(-1, 1, 1, 1).byte()),
            "images.fingerprint",
        ),
        (
            lambda info, pixels: (replace(info, mean=(0.5,) * 3), pixels),
            r"images.mean \(\[0.3059, .* there, \[0.5, .* now\)",
        ),
        (
            lambda info, pixels: (replace(info, std=(0.5,) * 3), pixels),
            r"images.std \(\[0.324, .* there, \[0.5, .* now\)",
        ),
        (lambda info, pixels: (replace(info, size=28), F.pad(pixels, (-2,) * 4)), r"images.size \(32 there, 28 now\)"),
        (lambda info, pixels: (replace(info, classes=("a", *info.classes[1:])), pixels), r"images.classes \("),
    ],
    ids=["order", "one bit", "mean", "std", "size", "names"],
)
@pytest.mark.parametrize("mixer", [None, "supermix"])
def test_a_run_on_other_pixels_is_not_resumed(change, message, mixer, digits, teacher, tmp_path):
    few = digits.train.subset(32)
    recipe = Training(epochs=1, batch_size=16, lr=0.05, milestones=())
    if mixer is None:
        train(create("resnet8", 10), few, recipe, folder=tmp_path)
    else:
        save_checkpoint(tmp_path, 1, {"recipe": json.dumps(_run_identity(create("resnet8", 10), few, recipe))})
    info, pixels = change(few.info, few.kept)
    before, other = contents(tmp_path), ArrayImages(info, pixels, few.labels)
    with pytest.raises(ValueError, match=message):
        if mixer is None:
            train(create("resnet8", 10), other, recipe, folder=tmp_path)
        else:
            distill(teacher, create("resnet8", 10), other, "kd", mixer, recipe, folder=tmp_path)
    assert contents(tmp_path) == before  # nothing was mixed or written before that was found out


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_of_an_earlier_version_goes_on(digits, tmp_path):
    "It knows nothing of pixels, of optimizers and of schedules: the first is said, the others have their defaults."
    expected, _ = whole(digits.train.subset(40))
    with pytest.raises(Stopped):
        whole(digits.train.subset(40), tmp_path, Stopping(40, 5), minutes=0)
    newest = checkpoints(tmp_path)[-1]
    state = load_checkpoint(newest)
    recipe = json.loads(state["recipe"])
    new = {"optimizer", "schedule", "nesterov", "label_smoothing", "clip_grad"}
    assert new <= set(recipe) and "images.fingerprint" in recipe
    state["recipe"] = json.dumps({k: v for k, v in recipe.items() if k not in new and not k.startswith("images.")})
    for path in checkpoints(tmp_path):
        path.unlink()
    save_checkpoint(tmp_path, state["position"][2], state)
    with pytest.raises(ValueError, match=r"another recipe: optimizer \(sgd there, adamw now\)"):
        whole(digits.train.subset(40), tmp_path, recipe=replace(RECIPE, optimizer="adamw"))
    with pytest.warns(UserWarning, match="earlier version, .* it is resumed without a check of these"):
        resumed, _ = whole(digits.train.subset(40), tmp_path)
    assert same(resumed, expected)
    assert "images.fingerprint" in json.loads(load_checkpoint(checkpoints(tmp_path)[-1])["recipe"])  # from now on


def test_a_run_by_another_function_as_teacher_is_not_resumed(digits, teacher, tmp_path):
    "It has no weights: what it says of some images tells it from others."

    def go(tutor):
        return distill(
            tutor,
            create("resnet8", 10),
            digits.train.subset(32),
            "kd",
            recipe=replace(RECIPE, epochs=1, milestones=()),
            folder=tmp_path,
        )

    first = go(lambda x: teacher(x))
    assert go(lambda x: teacher(x) * (1 + 1e-6)).loss == first.loss  # the same but for its rounding
    with pytest.raises(ValueError, match=r"teacher \(logits \[.*\] … there, logits \[.*\] … now\)"):
        go(lambda x: teacher(x.flip(3)))
    with pytest.raises(ValueError, match=r"teacher \(logits \[.*\] … there, [0-9a-f]{16} now\)"):
        go(teacher)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_of_a_machine_with_gpus_goes_on_here(optimizer, digits, tmp_path):
    "Its checkpoint holds random states of GPUs that are not here; all else is the same."
    recipe = replace(RECIPE, optimizer=optimizer, lr=0.05 if optimizer == "sgd" else 0.002)
    expected, _ = whole(digits.train.subset(40), recipe=recipe)
    with pytest.raises(Stopped):
        whole(digits.train.subset(40), tmp_path, Stopping(40, 5), recipe, minutes=0)
    state = load_checkpoint(checkpoints(tmp_path)[-1])
    there = torch.cuda.device_count()
    state["random"]["cuda"] = [*state["random"]["cuda"], *[torch.zeros(16, dtype=torch.uint8)] * 3]
    assert len(state["random"]["cuda"]) == there + 3
    for path in checkpoints(tmp_path):
        path.unlink()
    save_checkpoint(tmp_path, state["position"][2], state)
    resumed, _ = whole(digits.train.subset(40), tmp_path, recipe=recipe)
    assert same(resumed, expected)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(options={"epochs": 3}), "Unknown option of `train` 'epochs'"),
        (dict(options={"minute": 3}), "Unknown option of `train` 'minute'. Did you mean 'minutes'"),
        (dict(mixed_pad=-1), "mixed_pad of 0 or more pixels, or None, got -1"),
        (dict(mixes=2.5), "count .* type int, got 2.5"),
        (dict(mixing={"k": 2}), "a mixing that is a `supermix.recipes.Mixing`, got dict"),
        (dict(mixes=-5), "count of 1 or more"),
        (dict(held_out=32), "hold out fewer than the 32 images"),
    ],
)
def test_a_refused_distillation_leaves_nothing_behind(wrong, message, digits, teacher, tmp_path):
    wrong, recipe = dict(wrong), Training(epochs=1, milestones=(), held_out=wrong.get("held_out", 0))
    wrong.pop("held_out", None)
    with pytest.raises(ValueError, match=message):
        distill(
            teacher,
            create("resnet8", 10),
            digits.train.subset(32),
            "kd",
            "supermix",
            recipe,
            folder=tmp_path / "run",
            **{"mixes": 24, **wrong.pop("options", {}), **wrong},
        )
    assert not list(tmp_path.rglob("*.*"))


def test_images_that_are_held_out_are_never_trained_on(digits, tmp_path):
    objective = Learning(100)
    _, history = whole(digits.train.subset(100), tmp_path, objective, replace(RECIPE, held_out=30), test=digits.test)
    assert objective.seen.tolist() == [4] * 70 + [0] * 30 and history.images == 280
    held = [row["held_out"] for row in history.rows]
    assert history.best == (1 + held.index(max(held)), max(held)) and len(held) == 4
    assert read_log(tmp_path / "log.csv")[-1]["held_out"] == pytest.approx(held[-1])
    assert "held-out images right in epoch" in repr(history) and f"{history.test:.2f} % of the test images" in repr(
        history
    )


def test_tensorboard_reads_what_was_logged(digits, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, history = whole(digits.train.subset(40), tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (row["epoch"], pytest.approx(row["loss"])) for row in history.rows
    ]


@pytest.mark.slow
def test_compiled_it_learns_the_same(digits):
    def losses(compile):
        torch.manual_seed(1)
        return train(create("resnet8", 10), digits.train.subset(64), replace(RECIPE, epochs=2, compile=compile)).loss

    assert losses(True) == pytest.approx(losses(False), rel=0.02)


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
from supermix.data import load_digits
from supermix.recipes import Training
from supermix.distillation.distill import distill
from supermix.training.loop import join, world
from supermix.zoo import create, pretrained, save
join("cpu")
for method in sys.argv[2:]:
    torch.manual_seed(0)
    student = create("resnet8", 10)
    for m in student.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.eval(); m.train = lambda mode=True: None\
       # statistics are each process's own: without them all is equal
    history = distill(pretrained("digits"), student, load_digits().train.subset(70), method, None,
                      Training(epochs=2, batch_size=32, lr=0.01, milestones=(1,), first_stage=1), \
folder=f"{sys.argv[1]}/{method}-run")
    if world()[0] == 0: save(student, f"{sys.argv[1]}/{method}", loss=history.loss, seen=history.images)
if dist.is_initialized(): dist.destroy_process_group()
"""
TOGETHER = ("kd", "crd_kd", "ab", "fsp", "ft")


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    "Folders with the students of one process, and of two."
    folder = tmp_path_factory.mktemp("together")
    (folder / "script.py").write_text(DISTRIBUTED)
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for name, launcher in (("one", ()), ("two", two)):
        command = [sys.executable, *launcher, folder / "script.py", folder / name, *TOGETHER]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600
        )
        assert done.returncode == 0, done.stderr
    return folder / "one", folder / "two"


@pytest.mark.slow
@pytest.mark.parametrize("method", TOGETHER)
def test_two_processes_make_the_updates_of_one(method, one_and_two):
    (one, card), (two, other) = (load_tensors(folder / method) for folder in one_and_two)
    assert card["seen"] == other["seen"] == 140
    if method not in ("crd_kd", "ft"):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    else:  # CRD draws other negatives in each process, FT's translator has batch norm: near, and not the same
        assert other["loss"] == pytest.approx(card["loss"], rel=0.1)
    assert checkpoints(one_and_two[1] / f"{method}-run")


def test_bfloat16_trains_and_keeps_float32_weights(digits):
    torch.manual_seed(0)
    network = create("resnet8", 10)
    history = train(network, digits.train.subset(200), Training(epochs=4, batch_size=20, bfloat16=True))
    assert {p.dtype for p in network.parameters()} == {torch.float32} and history.loss[-1] < 0.8 * history.loss[0]


def test_accuracy_counts_and_leaves_the_network_as_it_was(digits):
    pixels = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1).expand(7, 1, 32, 32) * 20
    images = ArrayImages(digits.info, pixels, torch.tensor([0, 1, 2, 3, 4, 0, 0]))  # by brightness, but for two

    class Brightness(nn.Sequential):
        def forward(self, x):
            assert not self.training and not torch.is_grad_enabled()
            brightness = digits.info.denormalize(x).mean((1, 2, 3)) * 255 / 20
            return -(brightness[:, None] - torch.arange(10)).abs()

    network = Brightness(nn.BatchNorm1d(10)).train()
    assert accuracy(network, images, batch_size=3) == pytest.approx(100 * 5 / 7) and network.training


def test_what_was_trained_can_be_asked_whoever_made_it(digits):
    from supermix.zoo import predict

    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    train(network, digits.train.subset(100), Training(epochs=1, batch_size=50, lr=0.01, milestones=()))
    assert predict(network, digits.test[:3][0]).labels[0] in digits.info.classes


def test_a_last_batch_that_batch_norm_cannot_learn_from_names_the_batch_size(digits):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10), nn.BatchNorm1d(10))
    with pytest.raises(ValueError, match="single image.* choose another batch_size than 16"):
        train(network, digits.train.subset(17), Training(epochs=1, batch_size=16, milestones=()))


def test_seconds_count_all_sittings(digits, tmp_path):
    class Slow(Objective):
        asked = 0

        def forward(self, network, batch):
            time.sleep(0.1)
            self.asked += 1
            if self.asked == 8 and not list(tmp_path.glob("resumed")):
                raise KeyboardInterrupt
            return nn.functional.cross_entropy(network(batch.images), batch.labels)

    recipe = Training(epochs=1, batch_size=10, lr=0.01, milestones=())

    def go():
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
        return train(network, digits.train.subset(100), recipe, Slow(), folder=tmp_path / "run", minutes=0)

    with pytest.raises(KeyboardInterrupt):
        go()
    (tmp_path / "resumed").touch()
    history = go()
    assert history.seconds > 1.0 and history.images == 100 and history.speed < 100


NOT_JOINED = """
import os, sys, torch
from supermix.data import load_digits
from supermix.recipes import Training
from supermix.distillation.distill import distill
from supermix.training.loop import train
from supermix.zoo import create, pretrained
images, recipe = load_digits().train.subset(64), Training(epochs=1, batch_size=16, milestones=())
for call in (lambda: train(create("resnet8", 10), images, recipe, folder=sys.argv[1]),
             lambda: distill(pretrained("digits"), create("resnet8", 10), images, "kd", "supermix", recipe, mixes=24, \
folder=sys.argv[1])):
    try: call()
    except ValueError as error: print(os.environ["RANK"], error, flush=True)
"""


@pytest.mark.slow
def test_processes_that_did_not_join_are_told_how(tmp_path):
    "Each would train everything, and all would write into one folder."
    (tmp_path / "script.py").write_text(NOT_JOINED)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        tmp_path / "script.py",
        tmp_path / "run",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for rank in "01":
        said = f"This is process {rank} of 2 that have not joined. Call device = supermix.training.join() first"
        assert done.stdout.count(said) == 2  # the two write at the same time
    assert not (tmp_path / "run").exists()


# ---- Ctrl-C


class Lossy(Objective):
    "At one update Ctrl-C falls into a weak reference's callback, where Python drops it."

    def __init__(self, at):
        super().__init__()
        self.left = at

    def forward(self, network, batch):
        self.left -= 1
        if self.left == 0:
            thing = nn.Module()
            reference = weakref.ref(thing, lambda gone: signal.raise_signal(signal.SIGINT))  # noqa: F841
            del thing
        return F.cross_entropy(network(batch.images), batch.labels)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_ends_the_run_all_the_same(digits):
    network, objective = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), Lossy(3)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(network, digits.train.subset(100), Training(epochs=50, batch_size=10, lr=0.01, milestones=()), objective)
    assert objective.left == 0 and signal.getsignal(signal.SIGINT) is before  # not one update later


def interrupted(work, delay: float) -> int:
    "The exit status of a forked process that works, and gets Ctrl-C after a while; 130 where it ended by that."
    ready, went = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.write(went, b"x")
            work()
            os._exit(0)
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException:
            os._exit(1)
    os.read(ready, 1)
    for end in (ready, went):
        os.close(end)
    time.sleep(delay)
    os.kill(pid, signal.SIGINT)
    watch = threading.Timer(60, os.kill, (pid, signal.SIGKILL))
    watch.start()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    watch.cancel()
    return status


@pytest.mark.skipif(not hasattr(os, "fork") or torch.cuda.is_available(), reason="forked processes, and no GPU's")
@pytest.mark.parametrize("kind", ["training", "a batch ahead"])
def test_ctrl_c_ends_a_run_whenever_it_comes(kind, digits, teacher, tmp_path, request):
    images, recipe = digits.train.subset(64), Training(epochs=10_000, batch_size=4, lr=0.001, milestones=())

    class Ahead(Objective):
        "Work for another thread, and threads that come and go: where Python has the callbacks that drop interrupts."

        def prepares(self, epoch):
            return True

        def prepare(self, batch):
            return threading.Thread(target=len, args=([],))

        def forward(self, network, batch):
            batch.prepared.start()
            batch.prepared.join()
            return F.cross_entropy(network(batch.images), batch.labels)

    def work():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
        train(
            network,
            images,
            recipe,
            label_objective if kind == "training" else Ahead(),
            folder=tmp_path / "run" if kind == "training" else None,
        )

    chance = random.Random(kind)
    times = [chance.uniform(0, 0.5) for _ in range(300 if request.config.getoption("--slow") else 12)]
    assert [interrupted(work, delay) for delay in times] == [130] * len(times)


@pytest.mark.skipif(not hasattr(os, "fork") or torch.cuda.is_available(), reason="forked processes, and no GPU's")
def test_ctrl_c_ends_the_mixing_whenever_it_comes(digits, teacher, tmp_path, request):
    from supermix.distillation.distill import make_mixes

    chance = random.Random(0)
    times = [chance.uniform(0, 1.0) for _ in range(100 if request.config.getoption("--slow") else 4)]
    for number, delay in enumerate(times):
        assert interrupted(lambda: make_mixes(teacher, digits, 100_000, folder=tmp_path / str(number)), delay) == 130


@pytest.mark.parametrize("gain", [0.7, 1.05, 1.6])
def test_bfloat16_is_chosen_where_it_is_measured_to_be_faster(gain, digits, tmp_path, monkeypatch):
    "The choice gives the bits of the recipe that says so itself, is logged, and stays where a run goes on elsewhere."
    recipe = Training(epochs=2, batch_size=32, milestones=())
    images = digits.train.subset(64)

    def trained(folder=None, **changes):
        torch.manual_seed(0)
        network = create("resnet8", 10)
        history = train(network, images, replace(recipe, **changes), folder=folder)
        return network.state_dict(), history

    monkeypatch.setattr("supermix.training.loop.measure_bfloat16", lambda device: gain)
    chosen, history = trained(tmp_path, bfloat16_if_faster=True)
    given, _ = trained(bfloat16=gain > 1.1)
    assert all(torch.equal(a, b) for a, b in zip(chosen.values(), given.values(), strict=True))
    assert [row["bfloat16"] for row in history.rows] == [int(gain > 1.1)] * 2
    checkpoints(tmp_path)[-1].unlink()  # as if it had been killed in the second epoch
    monkeypatch.setattr("supermix.training.loop.measure_bfloat16", lambda device: 1 / gain)
    again, _ = trained(tmp_path, bfloat16_if_faster=True)
    assert all(torch.equal(a, b) for a, b in zip(chosen.values(), again.values(), strict=True))


def test_measuring_bfloat16_leaves_the_draws_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert 0 < measure_bfloat16(seconds=0) < 100 and torch.equal(before, torch.get_rng_state())


def test_a_checkpoint_without_the_choice_goes_on(digits, tmp_path):
    "Checkpoints of earlier versions do not say in which precision the run was: the recipe did."
    images = digits.train.subset(40)
    expected, _ = whole(images, None, recipe=replace(RECIPE, epochs=2))
    whole(images, tmp_path, recipe=replace(RECIPE, epochs=2))
    checkpoints(tmp_path)[-1].unlink()
    path = checkpoints(tmp_path)[-1]
    state = load_checkpoint(path)
    identity = json.loads(state["recipe"])
    for name in ("bfloat16_if_faster", "views"):
        identity.pop(name)
    path.unlink()
    assert "bfloat16" not in state  # but where it was measured
    old = state | {"recipe": json.dumps(identity)}
    save_checkpoint(tmp_path, state["position"][2], old)
    again, _ = whole(images, tmp_path, recipe=replace(RECIPE, epochs=2))
    assert same(again, expected)


@pytest.fixture
def replayed(monkeypatch):
    "Updates are made as a GPU replays them, on the same memory each time; only the recording itself needs a GPU."
    monkeypatch.setattr("supermix.training.loop._why_eager", lambda run, images, device: run.not_recorded)


def close(a, b, rtol=1e-3, atol=1e-4):
    for x, y in zip(a.values(), b.values(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


REPLAYED = Training(epochs=2, batch_size=16, lr=0.02, milestones=(1,), warmup=1, seed=3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"momentum": 0.0},
        {"nesterov": True},
        {"clip_grad": 0.5, "label_smoothing": 0.1},
        {"views": 1},
        {"held_out": 8},
    ],
    ids=str,
)
def test_a_replayed_update_is_the_same(changes, digits, request):
    "50 images in batches of 16: three full batches an epoch, and one of 2 that is not replayed."
    images, recipe = digits.train.subset(50), replace(REPLAYED, **changes)

    def trained():
        torch.manual_seed(1)
        network = create("resnet8", 10)
        history = train(network, images, recipe)
        return network.state_dict(), history

    eager, expected = trained()
    request.getfixturevalue("replayed")
    ours, history = trained()
    assert history.how == "one graph per update" and expected.how == "one by one (not on a GPU)"
    assert history.loss == pytest.approx(expected.loss, rel=1e-4) and history.rows[-1]["lr"] == expected.rows[-1]["lr"]
    close(ours, eager)


@pytest.mark.parametrize("where", ["first epoch", "second epoch"])
def test_a_replayed_run_goes_on_with_the_same_bits(where, digits, tmp_path, replayed):
    images = digits.train.subset(50)

    def trained(folder=None, **options):
        torch.manual_seed(1)
        network = create("resnet8", 10)
        train(network, images, REPLAYED, folder=folder, **options)
        return network.state_dict()

    whole_run = trained(tmp_path, minutes=0)
    found = {load_checkpoint(path)["position"][2]: path for path in checkpoints(tmp_path)}
    assert same(whole_run, trained())
    stopped = 2 if where == "first epoch" else 6

    class Stopping(Objective):
        def __init__(self):
            super().__init__()
            self.made = 0

        def forward(self, network, batch):
            return label_objective(network, batch)

        def capturable(self, epoch):
            return True

        def after_step(self, network):
            self.made += 1
            if self.made == stopped + 1:
                raise KeyboardInterrupt

    assert found
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        train(create("resnet8", 10), images, REPLAYED, Stopping(), folder=tmp_path / "killed", minutes=0)
    state = load_checkpoint(checkpoints(tmp_path / "killed")[-1])
    assert state["position"][2] == stopped
    groups = state["optimiser"]["param_groups"]
    assert all(isinstance(group["lr"], float) and group["fused"] is None for group in groups)
    assert same(whole_run, trained(tmp_path / "killed", minutes=0))


def test_a_recording_that_fails_goes_on_update_by_update(digits, replayed, monkeypatch):
    def failing(self, prepared):
        if self.feed.place.item() < 16:
            return self.body()
        self.recording = True
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr("supermix.training.loop._Replayed.__call__", failing)
    torch.manual_seed(1)
    network = create("resnet8", 10)
    history = train(network, digits.train.subset(50), REPLAYED)
    assert history.how == "one by one (the recording failed: operation not permitted when stream is capturing)"
    assert history.rows[-1]["step"] == 8


@pytest.mark.parametrize("why", ["the optimiser is reset", "an epoch is not replayed"])
def test_a_new_graph_has_the_learning_rate(why, digits, replayed, monkeypatch):
    "Also where the rate stays the same from epoch to epoch."
    resets = why == "the optimiser is reset"
    if not resets:
        eager = lambda run, images, device: "a test" if run.epoch == 1 else run.not_recorded
        monkeypatch.setattr("supermix.training.loop._why_eager", eager)

    class Anew(Objective):
        def __init__(self):
            super().__init__()
            self.weights = []

        def forward(self, network, batch):
            return label_objective(network, batch)

        def capturable(self, epoch):
            return True

        def resets_optimiser(self, epoch):
            return resets and epoch == 1

        def after_step(self, network):
            self.weights.append(network.head.weight.detach().clone())

    objective = Anew()
    recipe = replace(REPLAYED, epochs=3, milestones=(), warmup=0)
    history = train(create("resnet8", 10), digits.train.subset(64), recipe, objective)
    assert history.how == "one graph per update"
    assert len(objective.weights) == 12 and [row["lr"] for row in history.rows] == [0.02] * 3
    assert not any(torch.equal(a, b) for a, b in zip(objective.weights, objective.weights[1:]))


@pytest.mark.parametrize("policy", [None, "randaugment"])
def test_images_under_a_policy_are_why_nothing_is_replayed(policy, digits):
    plain = digits.train.subset(80)
    images = Augmented(plain, load_policy(policy)) if policy else plain
    run = _Run(create("resnet8", 10), _FunctionObjective(label_objective), replace(REPLAYED, batch_size=16), images)
    expected = "the images are under a policy" if policy else "the images are not on the GPU"
    assert _why_eager(run, images, torch.device("cuda")) == expected


def test_a_loss_that_is_no_number_ends_a_replayed_run(digits, replayed):
    with pytest.raises(FloatingPointError, match="try a lower learning rate"):
        train(create("resnet8", 10), digits.train.subset(64), replace(REPLAYED, lr=1e6, warmup=0))


def test_strides_of_gradients_are_their_weights():
    "Of a 1×1 kernel's many strides the fused optimiser wants those of the weight."
    from supermix.training.loop import _share_layout

    weight = nn.Parameter(torch.randn(8, 4, 1, 1).to(memory_format=torch.channels_last))
    optimiser = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    gradient = torch.randn(8, 4).view(8, 4, 1, 1)
    expected = weight.detach() - 0.1 * gradient
    weight.grad = gradient.as_strided((8, 4, 1, 1), (4, 1, 1, 1))
    assert weight.grad.stride() != weight.stride()
    _share_layout(optimiser)
    assert weight.grad.stride() == weight.stride() and torch.equal(weight.grad, gradient)
    optimiser.step()
    torch.testing.assert_close(weight.detach(), expected)


def test_a_teachers_training_goes_on_where_it_was_stopped(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(TEACHERS, "digits", Training(epochs=2, batch_size=256, lr=0.05, milestones=()))
    whole = file_hash(make_teacher("digits", tmp_path, "resnet8", device="cpu"))
    for file in (checkpoints(tmp_path / "digits_resnet8_training")[-1], tmp_path / "digits_resnet8.safetensors"):
        file.unlink()  # as if it had been stopped in the second epoch
    begun = []
    monkeypatch.setattr(
        "supermix.training.loop._run_epoch",
        lambda run, *args, kept=_run_epoch: begun.append(run.epoch) or kept(run, *args),
    )
    assert file_hash(make_teacher("digits", tmp_path, "resnet8", device="cpu")) == whole and begun == [1]


def test_a_teacher_in_16_bits_has_the_accuracy_of_its_file(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(TEACHERS, "digits", Training(epochs=2, batch_size=64, lr=0.05, milestones=()))
    path = make_teacher("digits", tmp_path, "resnet8", device="cpu", half=True)
    card = json.loads(path.with_suffix(".json").read_text())
    assert path.name == "digits_resnet8.safetensors" and card["sha256"] == file_hash(path)
    assert card["test_accuracy"] == round(accuracy(load(path), digits.test), 2) > 10
    assert card["command"] == "supermix teacher --data digits --network resnet8 --half" and card["device"] == "cpu"
    assert path.stat().st_size < 2.2 * card["parameters"] + 20_000


TEACHER_OF_TWO = """
import sys, torch.distributed as dist
from supermix.recipes import TEACHERS, Training
from supermix.training.loop import make_teacher
TEACHERS["digits"] = Training(epochs=1, batch_size=256, lr=0.05, milestones=())
assert make_teacher("digits", sys.argv[1], "resnet8", device="cpu").with_suffix(".json").is_file()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_one_of_two_processes_writes_the_teacher(digits, tmp_path):
    (tmp_path / "script.py").write_text(TEACHER_OF_TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, tmp_path / "script.py", tmp_path / "out"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    path = tmp_path / "out" / "digits_resnet8.safetensors"
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["sha256"] == file_hash(path)
    # each process has its own batch norm statistics: the card's accuracy must be of the very weights in the file
    assert card["test_accuracy"] == pytest.approx(accuracy(load(path), digits.test), abs=0.01)
