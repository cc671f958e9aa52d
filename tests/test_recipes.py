"""The paper's numbers, and the switch that changes only what it lists."""

from dataclasses import FrozenInstanceError, asdict, fields, replace
from inspect import signature

import pytest
from supermix.data import DATA_SETS
from supermix.mixing import SuperMix
from supermix.recipes import (CIFAR100, CIFAR100_DISTILLATION, CRD_BENCHMARK, DEMO, IMAGENET, METHODS, TEACHERS,
                              Generation, Mixing, Recipe, Terms, Training, Variant, change, differences)
from supermix.zoo import names

RECIPES = {"CIFAR100": CIFAR100, "CRD_BENCHMARK": CRD_BENCHMARK, "IMAGENET": IMAGENET, "DEMO": DEMO}


@pytest.mark.parametrize("recipe, training, mixing", [
    (CIFAR100, dict(epochs=600, batch_size=128, lr=0.1, momentum=0.9, weight_decay=5e-4, decay=0.1,
                    milestones=(200, 300, 400, 500), warmup=0),
     dict(k=2, mask_size=8, sigma=1, lambda_s=25, alpha=3, max_iter=50, step=1, hold=None, margin=0, start="flat",
          give_up=None)),
    (IMAGENET, dict(epochs=100, batch_size=256, lr=0.025, momentum=0.9, weight_decay=1e-4, milestones=(30, 60, 90),
                    decay=0.1, warmup=0),
     dict(k=2, mask_size=16, sigma=2, lambda_s=25, alpha=3, max_iter=50, step=1, hold=None, margin=0, start="flat",
          give_up=None)),
], ids=["CIFAR100", "IMAGENET"])
def test_the_papers_numbers(recipe, training, mixing):
    assert training.items() <= asdict(recipe.training).items() and asdict(recipe.mixing) == mixing
    assert CIFAR100.mixes == 500_000


def test_the_papers_kd():
    assert (METHODS["kd"].ce, METHODS["kd"].kd, METHODS["kd"].tau) == (0.1, 0.9, 4.0)  # λ_KD = 0.9, τ = 4


def test_a_mixing_recipe_is_what_the_mixer_takes():
    takes = {name: p.default for name, p in signature(SuperMix).parameters.items() if name != "teacher"}
    assert takes == asdict(Mixing())


@pytest.mark.parametrize("name, scale", [(name, scale) for name, recipe in RECIPES.items() for scale in recipe.scales])
def test_a_scale_changes_what_it_lists_and_nothing_else(name, scale):
    recipe, other = RECIPES[name], RECIPES[name].at(scale)
    changed = {field: new for field, (_, new) in differences(recipe, other).items()}
    assert changed == recipe.scales[scale]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_things_that_exist(name):
    recipe = RECIPES[name]
    assert recipe.data in {*DATA_SETS, "auto"} and {recipe.teacher, recipe.student} <= set(names())


def test_teachers_are_of_data_sets(): assert set(TEACHERS) <= set(DATA_SETS)


@pytest.mark.parametrize("act, message", [
    (lambda: CIFAR100.at("papr"), "Unknown scale 'papr'. Did you mean 'paper'"),
    (lambda: change(CIFAR100, {"training.epoch": 1}), "Unknown field of Training 'epoch'. Did you mean 'epochs'"),
    (lambda: change(CIFAR100, {"trainin.epochs": 1}), "Unknown field of Recipe 'trainin'. Did you mean 'training'"),
    (lambda: change(CIFAR100, {"mixes.epochs": 1}), "'epochs'"),
])
def test_an_unknown_scale_or_field(act, message):
    with pytest.raises(ValueError, match=message): act()


@pytest.mark.parametrize("make, message", [
    (lambda: Training(epochs="3"), "Expected epochs of Training to be of type int, got '3'"),
    (lambda: Training(epochs=3.0), "Expected epochs of Training to be of type int, got 3.0"),
    (lambda: Training(epochs=True), "Expected epochs of Training to be of type int, got True"),
    (lambda: Training(lr="0.1"), "Expected lr of Training to be of type float, got '0.1'"),
    (lambda: Training(lr=None), "Expected lr of Training to be of type float, got None"),
    (lambda: Training(bfloat16=1), "Expected bfloat16 of Training to be of type bool, got 1"),
    (lambda: Training(milestones=200), r"Expected milestones of Training to be of type tuple\[int, ...\], got 200"),
    (lambda: Training(milestones=[200, 300]),
     r"Expected milestones of Training to be of type tuple\[int, ...\], got \[200, 300\]"),
    (lambda: Training(milestones=(200, "300")),
     r"Expected milestones of Training to be of type tuple\[int, ...\], got \(200, '300'\)"),
    (lambda: Mixing(k=2.5), "Expected k of Mixing to be of type int, got 2.5"),
    (lambda: Mixing(hold="0.06"), r"Expected hold of Mixing to be of type float \| None, got '0.06'"),
    (lambda: Mixing(start=None), "Expected start of Mixing to be of type str, got None"),
    (lambda: Generation(count=1e6), "Expected count of Generation to be of type int, got 1000000.0"),
    (lambda: Generation(mixing={"k": 2}), "Expected mixing of Generation to be of type Mixing, got {'k': 2}"),
    (lambda: Terms(features=("crd", 0.8)),
     r"Expected features of Terms to be of type tuple\[tuple\[str, float\], ...\], got"),
    (lambda: Terms(features=(("crd", "0.8"),)), "Expected features of Terms"),
    (lambda: Variant(k="2"), r"Expected k of Variant to be of type int \| None, got '2'"),
    (lambda: Recipe(training=Mixing()), "Expected training of Recipe to be of type Training, got Mixing"),
    (lambda: replace(CIFAR100, mixes="32"), "Expected mixes of Recipe to be of type int, got '32'"),
    (lambda: change(CIFAR100, {"training.lr": "0.1"}), "Expected lr of Training to be of type float, got '0.1'"),
    (lambda: replace(CIFAR100, scales={"paper": {}, "odd": {"mixing.k": "2"}}).at("odd"),
     "Expected k of Mixing to be of type int, got '2'"),
    (lambda: replace(CIFAR100_DISTILLATION, pairs=("vgg13", "vgg8")), "Expected pairs of Family"),
])
def test_a_value_of_another_type(make, message):
    with pytest.raises(ValueError, match=message): make()


def test_what_stands_for_a_float_or_nothing():
    assert (Training(lr=1, warmup=0).lr == 1 and Mixing(hold=None, sigma=2).sigma == 2
            and Recipe(low_lr=None, size=64).size == 64)
    assert (Terms(features=(("at", 1000),)).features == (("at", 1000),)
            and replace(CIFAR100_DISTILLATION, rows={}).rows == {})


@pytest.mark.parametrize("record", [CIFAR100, Training(), Mixing(), METHODS["kd"]], ids=lambda r: type(r).__name__)
def test_nobody_rewrites_a_recipe(record):
    for field in fields(record):
        with pytest.raises(FrozenInstanceError): setattr(record, field.name, None)
