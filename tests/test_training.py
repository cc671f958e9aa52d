"""The loop against one written out in torch, its schedule against torch's, and the same bytes from the same seed."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from supermix.core import file_hash
from supermix.data import ArrayImages
from supermix.recipes import CIFAR100, IMAGENET, Training
from supermix.training import accuracy, train
from supermix.zoo import create
from torch import nn


@pytest.mark.parametrize("training", [CIFAR100.training, IMAGENET.training, Training(epochs=7, milestones=())],
                         ids=["CIFAR100", "IMAGENET", "constant"])
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


def test_the_loop_is_torchs_sgd(digits, seeded):
    torch.manual_seed(0)
    ours, images = create("resnet8", 10), digits.train.subset(40)
    theirs = copy.deepcopy(ours).to(memory_format=torch.channels_last)
    recipe = Training(epochs=3, batch_size=16, lr=0.05, milestones=(1, 2), decay=0.5, weight_decay=0.01, seed=5)
    history = train(ours, images, recipe)
    optimiser = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    schedule, generator, losses = torch.optim.lr_scheduler.MultiStepLR(optimiser, (1, 2), 0.5), seeded(5), []
    for _ in range(3):
        losses.append([])
        for x, y, _ in images.batches(16, generator):
            loss = F.cross_entropy(theirs(x.to(memory_format=torch.channels_last)), y)
            losses[-1].append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-3, atol=1e-5)
    assert history.loss == pytest.approx([sum(epoch) / 3 for epoch in losses], rel=1e-3)
    assert history.lr == pytest.approx([0.05, 0.025, 0.0125])
    assert history.images == 120 and history.speed > 0 and "3 epochs" in repr(history)
    assert not any(part.training for part in ours.modules()) and ours.info == images.info


SCRIPT = """
import sys, torch
from supermix.data import load_digits
from supermix.distillation import distill, make_mixes
from supermix.mixing import SuperMix
from supermix.recipes import Training
from supermix.zoo import create, pretrained, save
torch.set_num_threads(1)
images, teacher = load_digits().train.subset(48), pretrained("digits")
mixes = make_mixes(SuperMix(teacher, max_iter=8), images, 24, batch_size=32)
torch.manual_seed(0)
student = create("resnet8", 10)
distill(teacher, student, images, "soft", mixes, Training(epochs=2, batch_size=16, milestones=(1,)))
save(student, sys.argv[1])
"""


def test_two_processes_make_the_same_bytes(tmp_path):
    processes = []
    for n in "12":  # each with another seed of Python's hashes, whose order must not matter
        command, environment = [sys.executable, "-c", SCRIPT, str(tmp_path / n)], {**os.environ, "PYTHONHASHSEED": n}
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert file_hash(tmp_path / "1") == file_hash(tmp_path / "2")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_training(value, digits):
    network, seen = create("resnet8", 10), []

    def objective(net, images, labels):
        seen.append(len(images))
        return F.cross_entropy(net(images), labels) * (value if len(seen) == 3 else 1)

    with pytest.raises(FloatingPointError, match=f"The loss is {value} at epoch 2, batch 1 of 2"):
        train(network, digits.train.subset(20), Training(epochs=5, batch_size=16), objective)
    assert all(torch.isfinite(t).all() for t in network.state_dict().values())  # the bad step was not made


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
