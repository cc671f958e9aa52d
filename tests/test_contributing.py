"""CONTRIBUTING.md's worked examples run as they stand."""

import re
from pathlib import Path

import pytest
import torch
from supermix.distillation.losses import LOGIT_LOSSES
from supermix.mixing.mixers import Draw
from supermix.zoo import _NETWORKS

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
EXAMPLES = dict(re.findall(r"## Adding a (\w+)\n.*?```python\n(.*?)```", TEXT, re.DOTALL))


def test_there_is_one_for_each_kind():
    assert set(EXAMPLES) == {"mixer", "loss", "network"}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_an_example_runs(kind, monkeypatch):
    monkeypatch.setattr("supermix.distillation.losses.LOGIT_LOSSES", dict(LOGIT_LOSSES))
    made = {}
    exec(EXAMPLES[kind], made)
    assert len([line for line in EXAMPLES[kind].splitlines() if line.strip()]) <= 20
    if kind == "mixer":
        lam = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
        masks = made["Bands"](10).choose_masks(torch.rand(2, 2, 3, 4, 4), Draw(None, None, lam, 10))
        assert all(name in TEXT for name in ("MIXERS", "MIXER_NAMES"))  # for `distill`, and for the help of the shell
        assert torch.equal(masks.sum(1), torch.ones(2, 4, 4)) and masks[0, 0].sum() == 4 and masks[1, 0].sum() == 16
    if kind == "loss":
        assert made["mse_loss"](torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])) == 2.5
    if kind == "network":
        assert not set(made["NETWORKS"]) & set(_NETWORKS)


def test_its_links_lead_somewhere():
    root = Path(__file__).parent.parent
    assert all((root / link).exists() for link in re.findall(r"\]\(([\w./]+)\)", TEXT))
