"""The five lines that bring mixes into loops that people already have: taken from chapter 80, and run in such loops."""

import json
import re
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from supermix.data import load_digits
from supermix.distillation.distill import make_mixes
from supermix.zoo import pretrained
from torch.utils.data import DataLoader, default_collate

CHAPTER = Path(__file__).parent.parent / "nbs" / "80_experiments.photographs.ipynb"


def lines_of(heading):
    "The first code below a heading of the chapter: a cell, or a fenced block."
    cells = json.loads(CHAPTER.read_text())["cells"]
    start = next(i for i, cell in enumerate(cells) if "".join(cell["source"]).strip() == f"### {heading}")
    for cell in cells[start + 1 :]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            return text
        if fenced := re.search(r"```python\n(.*?)```", text, re.DOTALL):
            return textwrap.dedent(fenced[1])


@pytest.fixture(scope="module")
def stock():
    "Digits, their shipped teacher, and a stock of 40 mixes."
    images, teacher = load_digits().train.subset(64), pretrained("digits")
    return images, teacher, make_mixes(teacher, images, 40)


class Small(torch.nn.Module):
    "A linear network that remembers how many images it was asked about."

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(3 * 32 * 32, 10), []

    def forward(self, x):
        self.seen.append(len(x))
        return self.layer(x.flatten(1))


@pytest.fixture
def loop(stock):
    "The names that the chapter's lines use."
    images, _, mixes = stock
    torch.manual_seed(0)
    student = Small()
    return {
        "torch": torch,
        "F": F,
        "mixes": mixes,
        "student": student,
        "default_collate": default_collate,
        "loader": DataLoader(images, batch_size=16),
        "optimizer": torch.optim.SGD(student.parameters(), lr=0.01),
        "generator": torch.Generator().manual_seed(0),
    }


@pytest.mark.parametrize(
    "heading", ["Plain PyTorch", "timm", "torchvision's reference script", "Lightning", "Hugging Face Trainer"]
)
def test_they_are_few(heading):
    assert 5 <= len(lines_of(heading).strip().splitlines()) <= 7


def test_plain_pytorch(loop):
    student, twin = loop["student"], Small()
    twin.load_state_dict(student.state_dict())
    exec(lines_of("Plain PyTorch"), loop)
    assert student.seen == [16] * 8  # natural and mixed, four batches of each
    step, chance = torch.optim.SGD(twin.parameters(), lr=0.01), torch.Generator().manual_seed(0)
    for x, labels in loop["loader"]:
        mixed, known = loop["mixes"].sample(16, chance)
        soft = known.logits.softmax(1)
        step.zero_grad()
        loss = -twin(x).log_softmax(1)[range(16), labels].mean() - (soft * twin(mixed).log_softmax(1)).sum(1).mean()
        loss.backward()
        step.step()
    torch.testing.assert_close(student.layer.weight, twin.layer.weight)


def test_timm(loop):
    timm = pytest.importorskip("timm")
    soft_cross_entropy = pytest.importorskip("timm.loss").SoftTargetCrossEntropy()
    exec(lines_of("timm"), loop)
    x, target = next(iter(loop["loader"]))
    mixed, soft = loop["mixup_fn"](x, target)
    theirs = timm.data.Mixup(mixup_alpha=1.0, label_smoothing=0.0, num_classes=10)(x.clone(), target)
    assert mixed.shape == theirs[0].shape and soft.shape == theirs[1].shape and soft.dtype == theirs[1].dtype
    assert torch.equal(mixed[::2], x[::2]) and not torch.equal(mixed[1::2], x[1::2])
    assert torch.equal(soft[::2], F.one_hot(target[::2], 10).float())
    torch.testing.assert_close(soft.sum(1), torch.ones(16))
    assert ((soft[1::2] > 0).sum(1) == 2).all()  # the two sources of a mix
    assert soft_cross_entropy(loop["student"](mixed), soft).isfinite()


def test_torchvisions_script(loop, stock):
    exec(lines_of("torchvision's reference script"), loop)
    batches = list(DataLoader(stock[0], batch_size=16, collate_fn=loop["collate_fn"]))
    assert [x.shape for x, _ in batches] == [(32, 3, 32, 32)] * 4
    for (x, target), (natural, labels) in zip(batches, loop["loader"]):
        assert torch.equal(x[:16], natural) and torch.equal(target[:16].argmax(1), labels)
        torch.testing.assert_close(target.sum(1), torch.ones(32))
        assert torch.nn.CrossEntropyLoss(label_smoothing=0.1)(loop["student"](x), target).isfinite()


@pytest.mark.filterwarnings("ignore")
def test_workers_draw_different_mixes(loop, stock):
    exec(lines_of("torchvision's reference script"), loop)
    torch.manual_seed(0)
    # forked, because a function of an executed text cannot be pickled for a worker that is started anew
    batches = DataLoader(
        stock[0], batch_size=16, collate_fn=loop["collate_fn"], num_workers=2, multiprocessing_context="fork"
    )
    mixes = [x[16:] for x, _ in batches]
    assert all(not torch.equal(a, b) for i, a in enumerate(mixes) for b in mixes[:i])


def test_lightning(loop, tmp_path):
    lightning = pytest.importorskip("lightning", reason="no Lightning here: pip install lightning")
    exec(lines_of("Lightning"), loop)

    class Student(lightning.LightningModule):
        training_step = loop["training_step"]

        def __init__(self):
            super().__init__()
            self.network = loop["student"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    before = loop["student"].layer.weight.clone()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(Student(), loop["loader"])
    assert loop["student"].seen == [16] * 16 and not torch.equal(before, loop["student"].layer.weight)


def test_the_hugging_face_trainer(loop, stock, tmp_path):
    transformers = pytest.importorskip("transformers", reason="no transformers here: pip install transformers")
    pytest.importorskip("accelerate", reason="no accelerate here: pip install accelerate")
    exec(lines_of("Hugging Face Trainer"), loop | {"Trainer": transformers.Trainer}, loop)

    class SuperMixTrainer(transformers.Trainer):
        compute_loss = loop["compute_loss"]

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10)
    model = transformers.ResNetForImageClassification(config)
    asked = []
    model.register_forward_pre_hook(lambda _, __, given: asked.append("labels" in given), with_kwargs=True)
    settings = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=3, per_device_train_batch_size=16, report_to=[], use_cpu=True, save_strategy="no"
    )
    rows = [{"pixel_values": x, "labels": label} for x, label in (stock[0][i] for i in range(64))]
    trainer = SuperMixTrainer(model=model, args=settings, train_dataset=rows)
    assert trainer.train().global_step == 3 and asked == [True, False] * 3
