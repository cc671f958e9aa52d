"""The paper's numbers, and the switch that changes only what it lists."""

from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest
from supermix.data import DATA_SETS
from supermix.distillation.contrast import TERMS
from supermix.experiments.runs import _result_path
from supermix.mixing.mixers import CutMix, MixUp
from supermix.mixing.solver import SuperMix
from supermix.recipes import (
    CIFAR100,
    CIFAR100_DISTILLATION,
    CRD_BENCHMARK,
    DEMO,
    FAST,
    IMAGENET,
    METHODS,
    TEACHERS,
    _FEATURES,
    Generation,
    Mixing,
    Recipe,
    Terms,
    Training,
    Variant,
    as_named,
    change,
    differences,
    later_defaults,
)
from supermix.training.loop import short_hash
from supermix.zoo import create, names

RECIPES = {"CIFAR100": CIFAR100, "CRD_BENCHMARK": CRD_BENCHMARK, "IMAGENET": IMAGENET, "DEMO": DEMO}


@pytest.mark.parametrize(
    "recipe, training, mixing",
    [
        (
            CIFAR100,
            dict(
                epochs=600,
                batch_size=128,
                lr=0.1,
                momentum=0.9,
                weight_decay=5e-4,
                decay=0.1,
                milestones=(200, 300, 400, 500),
                warmup=0,
            ),
            dict(
                k=2,
                mask_size=8,
                sigma=1,
                lambda_s=25,
                alpha=3,
                max_iter=50,
                step=1,
                hold=None,
                margin=0,
                start="flat",
                give_up=None,
                lead=1,
                momentum=0,
                anneal=0,
                tau=1,
                sigma_end=1,
            ),
        ),
        (
            IMAGENET,
            dict(
                epochs=100,
                batch_size=256,
                lr=0.025,
                momentum=0.9,
                weight_decay=1e-4,
                milestones=(30, 60, 90),
                decay=0.1,
                warmup=0,
            ),
            dict(
                k=2,
                mask_size=16,
                sigma=2,
                lambda_s=25,
                alpha=3,
                max_iter=50,
                step=1,
                hold=None,
                margin=0,
                start="flat",
                give_up=None,
                lead=1,
                momentum=0,
                anneal=0,
                tau=1,
                sigma_end=1,
            ),
        ),
    ],
    ids=["CIFAR100", "IMAGENET"],
)
def test_the_papers_numbers(recipe, training, mixing):
    assert training.items() <= asdict(recipe.training).items() and asdict(recipe.mixing) == mixing
    assert CIFAR100.mixes == 500_000


def test_the_papers_kd():
    assert (METHODS["kd"].ce, METHODS["kd"].kd, METHODS["kd"].tau) == (0.1, 0.9, 4.0)  # λ_KD = 0.9, τ = 4


def test_a_mixing_recipe_is_what_the_mixer_takes():
    quick = Mixing(**FAST)
    assert SuperMix(lambda x: x).mixing == Mixing() and SuperMix(lambda x: x, **asdict(quick)).mixing == quick


@pytest.mark.parametrize("name, scale", [(name, scale) for name, recipe in RECIPES.items() for scale in recipe.scales])
def test_a_scale_changes_what_it_lists_and_nothing_else(name, scale):
    recipe, other = RECIPES[name], RECIPES[name].at(scale)
    changed = {field: new for field, (_, new) in differences(recipe, other).items()}
    assert changed == recipe.scales[scale]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_things_that_exist(name):
    recipe = RECIPES[name]
    assert recipe.data in {*DATA_SETS, "auto"} and {recipe.teacher, recipe.student} <= set(names())


def test_teachers_are_of_data_sets():
    assert set(TEACHERS) <= set(DATA_SETS)


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: CIFAR100.at("papr"), "Unknown scale 'papr'. Did you mean 'paper'"),
        (lambda: change(CIFAR100, {"training.epoch": 1}), "Unknown field of Training 'epoch'. Did you mean 'epochs'"),
        (lambda: change(CIFAR100, {"trainin.epochs": 1}), "Unknown field of Recipe 'trainin'. Did you mean 'training'"),
        (lambda: change(CIFAR100, {"mixes.epochs": 1}), "'epochs'"),
    ],
)
def test_an_unknown_scale_or_field(act, message):
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Training(epochs="3"), "Expected epochs of Training to be of type int, got '3'"),
        (lambda: Training(epochs=3.0), "Expected epochs of Training to be of type int, got 3.0"),
        (lambda: Training(epochs=True), "Expected epochs of Training to be of type int, got True"),
        (lambda: Training(lr="0.1"), "Expected lr of Training to be of type float, got '0.1'"),
        (lambda: Training(lr=None), "Expected lr of Training to be of type float, got None"),
        (lambda: Training(bfloat16=1), "Expected bfloat16 of Training to be of type bool, got 1"),
        (lambda: Training(milestones=200), r"Expected milestones of Training to be of type tuple\[int, ...\], got 200"),
        (
            lambda: Training(milestones=[200, 300]),
            r"Expected milestones of Training to be of type tuple\[int, ...\], got \[200, 300\]",
        ),
        (
            lambda: Training(milestones=(200, "300")),
            r"Expected milestones of Training to be of type tuple\[int, ...\], got \(200, '300'\)",
        ),
        (lambda: Mixing(k=2.5), "Expected k of Mixing to be of type int, got 2.5"),
        (lambda: Mixing(hold="0.06"), r"Expected hold of Mixing to be of type float \| None, got '0.06'"),
        (lambda: Mixing(start=None), "Expected start of Mixing to be of type str, got None"),
        (lambda: Generation(count=1e6), "Expected count of Generation to be of type int, got 1000000.0"),
        (lambda: Generation(mixing={"k": 2}), "Expected mixing of Generation to be of type Mixing, got {'k': 2}"),
        (
            lambda: Terms(features=("crd", 0.8)),
            r"Expected features of Terms to be of type tuple\[tuple\[str, float\], ...\], got",
        ),
        (lambda: Terms(features=(("crd", "0.8"),)), "Expected features of Terms"),
        (lambda: Variant(k="2"), r"Expected k of Variant to be of type int \| None, got '2'"),
        (lambda: Recipe(training=Mixing()), "Expected training of Recipe to be of type Training, got Mixing"),
        (lambda: replace(CIFAR100, mixes="32"), "Expected mixes of Recipe to be of type int, got '32'"),
        (lambda: change(CIFAR100, {"training.lr": "0.1"}), "Expected lr of Training to be of type float, got '0.1'"),
        (
            lambda: replace(CIFAR100, scales={"paper": {}, "odd": {"mixing.k": "2"}}).at("odd"),
            "Expected k of Mixing to be of type int, got '2'",
        ),
        (lambda: replace(CIFAR100_DISTILLATION, pairs=("vgg13", "vgg8")), "Expected pairs of Family"),
    ],
)
def test_a_value_of_another_type(make, message):
    with pytest.raises(ValueError, match=message):
        make()


NAN, INF = float("nan"), float("inf")
OUT_OF_RANGE = [
    (Training, dict(epochs=0), "epochs of 1 or more, got 0"),
    (Training, dict(epochs=-3), "epochs of 1 or more, got -3"),
    (Training, dict(batch_size=0), "batch_size of 1 or more, got 0"),
    (Training, dict(lr=0.0), "lr above 0, got 0.0"),
    (Training, dict(lr=NAN), "lr above 0, got nan"),
    (Training, dict(lr=INF), "lr above 0, got inf"),
    (Training, dict(lr=-0.1), "lr above 0, got -0.1"),
    (Training, dict(first_lr=0.0), "first_lr above 0"),
    (Training, dict(momentum=2.0), "momentum of 0 or more and below 1, got 2.0"),
    (Training, dict(momentum=-0.1), "momentum of 0 or more and below 1"),
    (Training, dict(momentum=NAN), "momentum"),
    (Training, dict(weight_decay=1e9), "weight_decay of 0 or more and of 1 at most, got 1000000000.0"),
    (Training, dict(weight_decay=-1e-4), "weight_decay of 0 or more"),
    (Training, dict(weight_decay=NAN), "got nan"),
    (Training, dict(decay=0.0), "decay above 0"),
    (Training, dict(decay=2.0), "decay above 0 and of 1 at most, got 2.0"),
    (Training, dict(milestones=(300, 200)), r"milestones in ascending order, .* got \(300, 200\)"),
    (Training, dict(milestones=(-1, 5)), r"milestones .* each of 1 or more epochs, got \(-1, 5\)"),
    (Training, dict(milestones=(0,)), "each of 1 or more epochs"),
    (Training, dict(warmup=-2), "warmup of 0 or more, got -2"),
    (Training, dict(epochs=5, warmup=6), "warm-up no longer than the run's 5 epochs, got warmup 6"),
    (Training, dict(held_out=-1), "held_out of 0 or more"),
    (Training, dict(first_stage=-1), "first_stage of 0 or more"),
    (Training, dict(seed=2**64), "seed of .* got 18446744073709551616"),
    (Training, dict(optimizer="adam"), "Unknown optimizer 'adam'. Did you mean 'adamw'"),
    (Training, dict(schedule="cosin"), "Unknown schedule 'cosin'. Did you mean 'cosine'"),
    (Training, dict(label_smoothing=1.0), "label_smoothing of 0 or more and below 1, got 1.0"),
    (Training, dict(clip_grad=0.0), "clip_grad above 0, or None, got 0.0"),
    (Training, dict(clip_grad=INF), "clip_grad above 0, or None, got inf"),
    (Training, dict(nesterov=True, momentum=0.0), "nesterov=True with .* a momentum above 0, got 'sgd' and 0.0"),
    (Training, dict(nesterov=True, optimizer="adamw"), "nesterov=True with optimizer='sgd'"),
    (Mixing, dict(k=1), "k of 2 or more images per set, got 1"),
    (Mixing, dict(mask_size=0), "mask_size of 1 or more"),
    (Mixing, dict(max_iter=0), "max_iter of 1 or more"),
    (Mixing, dict(sigma=-1.0), "sigma of 0 or more, got -1.0"),
    (Mixing, dict(lambda_s=NAN), "lambda_s of 0 or more, got nan"),
    (Mixing, dict(margin=-0.5), "margin of 0 or more"),
    (Mixing, dict(alpha=0.0), "alpha above 0"),
    (Mixing, dict(alpha=INF), "alpha above 0, got inf"),
    (Mixing, dict(step=0.0), "step above 0"),
    (Mixing, dict(give_up=0.5), "give_up of 1 or more, or None, got 0.5"),
    (Mixing, dict(hold=0.25), "hold above 0 and below 0.25, or None, got 0.25"),
    (Mixing, dict(k=3, hold=0.23), "hold above 0 and below 0.222"),
    (Mixing, dict(hold=0.0), "hold above 0"),
    (Mixing, dict(start="region", hold=0.06), "Unknown start 'region'. Did you mean 'regions'"),
    (Mixing, dict(start="regions"), "sparsity to hold for start='regions', such as hold=0.06, got None"),
    (Generation, dict(count=0), "count of 1 or more .* got count 0"),
    (Generation, dict(shard=100), "multiple of 128"),
    (Generation, dict(shard=0), "multiple of 128"),
    (Generation, dict(top=1), "top of at least k = 2 logits, .* got 1"),
    (Generation, dict(top="al"), "top of at least k = 2 logits, .* or 'all', got 'al'"),
    (Generation, dict(slots=0), "slots of 1 or more"),
    (Generation, dict(train_images=0), "train_images of 1 or more"),
    (Terms, dict(), "a weight above 0 among ce, kd, mixed_ce, mixed_kd and features, got none"),
    (Terms, dict(ce=0.0, features=(("crd", 0.0),)), "a weight above 0"),
    (Terms, dict(kd=-1.0), "kd of 0 or more, got -1.0"),
    (Terms, dict(ce=NAN), "ce of 0 or more, got nan"),
    (Terms, dict(ce=1.0, mixed_kd=-0.1), "mixed_kd of 0 or more"),
    (Terms, dict(kd=1.0, tau=0.0), "tau above 0, got 0.0"),
    (Terms, dict(kd=1.0, tau=-1.0), "tau above 0, got -1.0"),
    (Terms, dict(kd=1.0, dkd_beta=-8.0), "dkd_beta of 0 or more"),
    (Terms, dict(features=(("crdd", 0.8),)), "Unknown term on features 'crdd'. Did you mean 'crd'"),
    (Terms, dict(features=(("crd", -0.8),)), r"weights of features of 0 or more, got \(\('crd', -0.8\),\)"),
    (Terms, dict(features=(("crd", NAN),)), "weights of features of 0 or more"),
    (Terms, dict(features=(("at", 1), ("at", 2))), "each term on features once"),
    (Terms, dict(mixed_ce=1.0, label="arae"), "Unknown label of mixed images 'arae'. Did you mean 'area'"),
    (Recipe, dict(low_lr=0.0), "low_lr above 0, or None"),
    (Recipe, dict(mixes=0), "mixes of 1 or more"),
    (Recipe, dict(mixed_pad=-1), "mixed_pad of 0 or more"),
    (Training, dict(views=0), "views of 1 or more, or None, got 0"),
    (Recipe, dict(size=0), "size of 1 or more, or None, got 0"),
    (Variant, dict(k=1), "k of 2 or more images per set, or None, got 1"),
    (Variant, dict(cutout=-1), "cutout of 0 or more"),
    (Variant, dict(label="lamb"), "Unknown label of mixed images 'lamb'. Did you mean 'lam'"),
]


@pytest.mark.parametrize("kind, wrong, message", OUT_OF_RANGE, ids=lambda part: str(getattr(part, "__name__", part)))
def test_a_value_out_of_its_range(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind(**wrong)


@pytest.mark.parametrize(
    "record",
    [Training(), Mixing(**FAST), Generation(), METHODS["crd_kd"], CIFAR100, IMAGENET],
    ids=lambda r: type(r).__name__,
)
def test_every_number_of_a_recipe_has_a_range(record):
    "No field takes a number that is none, and none takes an endless one."
    for field in fields(record):
        if not isinstance(getattr(record, field.name), float):
            continue
        for wrong in (NAN, INF, -INF):
            with pytest.raises(ValueError, match=f"Expected {field.name} .*got {wrong}"):
                replace(record, **{field.name: wrong})


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(mask_size=8.0), "mask_size of Mixing to be of type int, got 8.0"),
        (dict(mask_size="8"), "mask_size .*got '8'"),
        (dict(k=2.0), "k of Mixing to be of type int, got 2.0"),
        (dict(max_iter=INF), "max_iter .* type int, got inf"),
        (dict(alpha=None), "alpha of Mixing to be of type float, got None"),
        (dict(sigma="1"), "sigma .*got '1'"),
        (dict(k=True), "k of Mixing to be of type int, got True"),
        (dict(start=0), "start of Mixing to be of type str"),
        (dict(lambda_s=-25.0), "lambda_s of 0 or more"),
        (dict(k=3, hold=0.23), "hold .* below 0.222"),
    ],
)
def test_a_mixer_checks_its_settings_as_a_recipe_does(settings, message):
    with pytest.raises(ValueError, match=message):
        SuperMix(lambda x: x, **settings)
    with pytest.raises(ValueError, match=message):
        Mixing(**settings)


@pytest.mark.parametrize("make", [MixUp, CutMix, lambda n: create("resnet8", n)], ids=["MixUp", "CutMix", "create"])
@pytest.mark.parametrize("number", ["10", 10.0, 0, -1, True])
def test_a_number_of_classes_is_a_whole_number(make, number):
    message = f"Expected num_classes, a whole number of 1 or more.* got {number!r}"
    with pytest.raises(ValueError, match=message):
        make(number)


@pytest.mark.parametrize("alpha", ["1", 0, -1.0, NAN, INF, True, (1.0,)])
def test_an_alpha_is_a_number_above_0(alpha):
    with pytest.raises(ValueError, match="Expected alpha above 0 and finite, or None"):
        MixUp(10, alpha)


def test_fields_that_fit_together_only_change_together():
    base = replace(CIFAR100, training=replace(CIFAR100.training, epochs=50, warmup=40))
    short = change(base, {"training.epochs": 3, "training.warmup": 1, "mixing.start": "regions", "mixing.hold": 0.06})
    assert (short.training.epochs, short.training.warmup, short.mixing.start) == (3, 1, "regions")
    with pytest.raises(ValueError, match="warm-up no longer than the run's 3 epochs"):
        change(base, {"training.epochs": 3})


def test_terms_on_features_are_those_that_there_are():
    assert set(_FEATURES) == set(TERMS)


def test_new_fields_leave_old_names_as_they_are():
    "These names were given before `Training` had optimizer, schedule, nesterov, label_smoothing and clip_grad."
    for recipe, name in (
        (CIFAR100, "e0a00002"),
        (CIFAR100.at("mini"), "9c3701a8"),
        (IMAGENET, "4a6e4de9"),
        (CRD_BENCHMARK, "e7cff4fa"),
    ):
        assert _result_path(recipe, Variant("kd", "supermix"), "").name.split("-")[-2] == name
        other = replace(recipe, training=replace(recipe.training, schedule="cosine"))
        assert _result_path(other, Variant("kd", "supermix"), "").name.split("-")[-2] != name
    assert short_hash(as_named(CIFAR100.teacher_training)) == "999f9e36"
    assert later_defaults(Training) == {
        "optimizer": "sgd",
        "schedule": "steps",
        "nesterov": False,
        "label_smoothing": 0.0,
        "clip_grad": None,
        "bfloat16_if_faster": False,
        "views": None,
    }


def test_what_stands_for_a_float_or_nothing():
    assert (
        Training(lr=1, warmup=0).lr == 1
        and Mixing(hold=None, sigma=2).sigma == 2
        and Recipe(low_lr=None, size=64).size == 64
    )
    assert (
        Terms(features=(("at", 1000),)).features == (("at", 1000),)
        and replace(CIFAR100_DISTILLATION, rows={}).rows == {}
    )


@pytest.mark.parametrize("record", [CIFAR100, Training(), Mixing(), METHODS["kd"]], ids=lambda r: type(r).__name__)
def test_nobody_rewrites_a_recipe(record):
    for field in fields(record):
        with pytest.raises(FrozenInstanceError):
            setattr(record, field.name, None)
