"""What a GPU records as a graph makes no copy between processor and GPU, and waits for nothing.

Tensors that have shapes and a device but no content (PyTorch's fake tensors) show it without a GPU. Only the backward
pass is left out: autograd's engine asks the driver for a real one."""

import copy

import pytest
import torch
from supermix import MixedDataset, create
from supermix.distillation.distill import Distillation
from supermix.mixing import smoothing
from supermix.mixing.engine import _Slots, _step_slots, draw_block
from supermix.mixing.generate import generate
from supermix.recipes import FAST, FAST_0_1, METHODS, Generation, Mixing, Terms, Training
from supermix.training.loop import _FunctionObjective, _Replayed, _Run, label_objective
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = (DataDependentOutputException, DynamicOutputShapeException)


class Crossings(TorchDispatchMode):
    "Notes the operations whose tensors lie on several devices."

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if len({t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}) > 1:
            self.found.append(str(func))
        return out


class Fake:
    "A GPU that is none: what `on` gives lies there; `watch` is the block in which crossings are noted."

    def __init__(self):
        self.mode = FakeTensorMode()

    def on(self, tensor):
        with self.mode:
            return self.mode.from_tensor(tensor).to("cuda")

    def images(self, images):
        there = copy.copy(images)
        kept, there.labels = self.on(images.kept), self.on(images.labels)
        with self.mode:
            there.pixels = kept.expand(-1, 3, -1, -1)
        return there

    def network(self, network):
        there = copy.deepcopy(network)
        for module in there.modules():
            for name, p in module._parameters.items():
                module._parameters[name] = p if p is None else torch.nn.Parameter(self.on(p.detach()), p.requires_grad)
            for name, b in module._buffers.items():
                module._buffers[name] = b if b is None else self.on(b)
        return there

    def stock(self, stock):
        there = copy.copy(stock)
        there.source = self.images(stock.source)
        there.small = {name: self.on(t) for name, t in stock.small.items()}
        there.parts = [self.on(torch.cat(stock.parts))]
        return there

    def watch(self, work):
        "The crossings of some work; an error where it looks at what a tensor holds."
        with self.mode, Crossings() as crossings:
            work()
        return crossings.found


@pytest.fixture
def gpu():
    yield Fake()
    for kept in (smoothing._band, smoothing._bands):
        kept.cache_clear()  # of tensors without content


@pytest.fixture(scope="module")
def stock(digits, teacher, tmp_path_factory):
    recipe = Generation(data="digits", count=60, shard=128, slots=64, bfloat16=False, top="all")
    return MixedDataset(generate(recipe, tmp_path_factory.mktemp("mixes"), digits.train, teacher).folder, digits.train)


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.tensor([1.0, 2.0], device="cuda"),
        lambda: torch.ones(3, device="cuda")[torch.ones(2, dtype=torch.long)],
        lambda: torch.ones(3, device="cuda").cpu(),
    ],
    ids=["a number from Python", "an index from the processor", "a copy to the processor"],
)
def test_a_copy_is_noted(work, gpu):
    assert gpu.watch(work)


@pytest.mark.parametrize("look", [torch.Tensor.item, bool, torch.nonzero], ids=["item", "bool", "nonzero"])
def test_a_wait_is_an_error(look, gpu):
    with pytest.raises(WAITS):
        gpu.watch(lambda: look(torch.ones((), device="cuda").sum()))


@pytest.mark.parametrize("pad", [2, None])
def test_a_stock_is_mixed_again_where_its_sources_are(pad, stock, gpu):
    there = gpu.stock(stock)
    there.pad = pad
    picks = there.draw(16, torch.Generator().manual_seed(0))
    picks = type(picks)(*(t if t is None else gpu.on(t) for t in picks))
    seen = []

    def work():
        images, known = there.show(picks)
        seen.extend([images, known.target, known.area, known.logits])

    assert gpu.watch(work) == [] and {t.device.type for t in seen} == {"cuda"}
    assert seen[0].shape == (16, 3, 32, 32)


SEARCHES = {"FAST": FAST, "version 0.1": FAST_0_1, "k = 3": FAST | {"k": 3}, "the paper's": {}}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_pass_of_the_search(name, digits, teacher, gpu, monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, leaf: (torch.zeros_like(leaf),))
    mixing = Mixing(**SEARCHES[name])
    sets = draw_block(digits.train, teacher, mixing, 0, 0)
    there, network = type(sets)(*map(gpu.on, sets)), gpu.network(teacher.eval().requires_grad_(False))
    with gpu.mode:
        slots = _Slots(network, mixing, iter(()), 16, torch.device("cuda"))
        slots.open(there)
    gpu.watch(lambda: _step_slots(slots))  # in the first pass the filter's kernel is made, and kept
    assert gpu.watch(lambda: _step_slots(slots)) == []


UPDATES = {
    "labels": None,
    "KD": METHODS["kd"],
    "KD and mixes": METHODS["kd"].mixed(),
    "mixes as they were made": METHODS["kd"].mixed(),
    "mixes by their areas": Terms(ce=1.0, mixed_ce=1.0, label="area"),
}


@pytest.mark.parametrize("name", UPDATES)
def test_an_update(name, digits, teacher, stock, gpu, monkeypatch):
    "Batch, mixes, teacher, student and loss."
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    terms, recipe = UPDATES[name], Training(batch_size=16, milestones=())
    student = gpu.network(create("resnet8", 10).train())
    mixer, prepared = None, None
    if terms is not None and terms.mixes:
        mixer = gpu.stock(stock)
        mixer.pad = None if "as they" in name else 2
        drawn = mixer.draw(16, torch.Generator().manual_seed(0))
        prepared = type(drawn)(*(t if t is None else gpu.on(t) for t in drawn))
    if terms is None:
        objective = _FunctionObjective(label_objective)
    else:
        objective = Distillation(teacher.eval().requires_grad_(False), terms, mixer)
        objective._outside = [gpu.network(teacher)]
    images = gpu.images(digits.train.subset(64))

    losses = []
    with gpu.mode:
        run = _Run(student, objective, recipe, images)
        update = _Replayed(run, run.loss, images)
        update.prepared, run.optimiser.step = prepared, lambda: None
    assert gpu.watch(lambda: losses.append(update.body())) == []
    assert losses[0].shape == () and losses[0].device.type == "cuda"
