"""The full runs in small: schedules walked through by hand, pairs built, commands started, killed and shared."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from supermix.cli import BASES, CLASSIFIER_BASES, parse_command
from supermix.core import file_hash
from supermix.experiments import runs
from supermix.experiments.published import _CLASSIFICATION, _COLUMNS, _DISTILLATION, published
from supermix.experiments.runs import (
    _ROW_MIXERS,
    _Impossible,
    _bytes_per_mix,
    _check_row,
    _load_accuracies,
    _make_miniature,
    _needs_teacher,
    _open_data,
    _open_teacher,
    _result_path,
    _write_cifar100,
    estimate_cost,
    family_table,
    find_result,
    run_classification,
    run_command,
    run_distillation,
    run_family,
)
from supermix.policies.policies import Augmented, load_policy, save_policy
from supermix.recipes import (
    CIFAR100,
    CIFAR100_CLASSIFICATION,
    CIFAR100_DISTILLATION,
    CRD_BENCHMARK,
    CRD_DISTILLATION,
    IMAGENET,
    IMAGENET_CLASSIFICATION,
    IMAGENET_DISTILLATION,
    METHODS,
    _METHOD_ROWS,
    _PAIRS,
    Variant,
    change,
    differences,
)
from supermix.training.checkpoints import checkpoints
from supermix.training.loop import accuracy
from supermix.zoo import _CRD_KEYS, _crd_keys, create, load, pretrained, save

FAMILIES = [
    CIFAR100_DISTILLATION,
    CRD_DISTILLATION,
    IMAGENET_DISTILLATION,
    CIFAR100_CLASSIFICATION,
    IMAGENET_CLASSIFICATION,
]


# ---- the recipes


@pytest.mark.parametrize(
    "recipe, steps",
    [
        (CIFAR100, [0.1] * 200 + [0.01] * 100 + [0.001] * 100 + [0.0001] * 100 + [0.00001] * 100),
        (
            CIFAR100.pair("vgg13", "mobilenetv2"),
            [0.02] * 200 + [0.002] * 100 + [0.0002] * 100 + [0.00002] * 100 + [0.000002] * 100,
        ),
        (CRD_BENCHMARK, [0.05] * 150 + [0.005] * 30 + [0.0005] * 30 + [0.00005] * 30),
        (
            CRD_BENCHMARK.pair("resnet32x4", "shufflenetv2"),
            [0.01] * 150 + [0.001] * 30 + [0.0001] * 30 + [0.00001] * 30,
        ),
        (IMAGENET, [0.025] * 30 + [0.0025] * 30 + [0.00025] * 30 + [0.000025] * 10),
        (CIFAR100.at("mini"), [0.1] * 10 + [0.01] * 5 + [0.001] * 5 + [0.0001] * 5 + [0.00001] * 5),
    ],
    ids=["600", "600 low", "240", "240 low", "100", "mini"],
)
def test_every_epoch_has_its_learning_rate(recipe, steps):
    training = recipe.training
    assert training.epochs == len(steps)
    for epoch, rate in enumerate(steps):
        for batch in (0, 0.5, 0.9975):
            assert training.lr_at(epoch + batch) == pytest.approx(rate, rel=1e-9)


PARAMETERS = {
    "wrn_40_2": 2_255_156,
    "wrn_40_1": 569_780,
    "wrn_16_2": 703_284,
    "resnet110": 1_736_564,
    "resnet56": 861_620,
    "resnet32": 472_756,
    "resnet20": 278_324,
    "resnet50": 23_705_252,
    "resnet32x4": 7_433_860,
    "resnet8x4": 1_233_540,
    "vgg13": 9_462_180,
    "vgg8": 3_965_028,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
}
KINDS = {
    "wrn": "WRN",
    "vgg": "VGG",
    "mob": "MobileNetV2",
    "shufflenetv1": "ShuffleNetV1",
    "shufflenetv2": "ShuffleNetV2",
    "resnet50": "BottleneckResNet",
}


@pytest.mark.parametrize("teacher, student", _PAIRS)
def test_every_pair_is_the_benchmarks(teacher, student):
    recipe = CIFAR100.pair(teacher, student)
    assert set(differences(CIFAR100, recipe)) <= {"teacher", "student", "training.lr"}
    for name in (recipe.teacher, recipe.student):
        with torch.device("meta"):
            network = create(name, 100)
        assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]
        assert (
            type(network).__name__ == KINDS.get(name, KINDS.get(name[:3], "ResNet"))
            and network.head.out_features == 100
        )
        assert type(network).__name__ in _CRD_KEYS and _crd_keys(network)
    low = student in ("mobilenetv2", "shufflenetv1", "shufflenetv2")
    assert (recipe.training.lr, CRD_BENCHMARK.pair(teacher, student).training.lr) == (
        (0.02, 0.01) if low else (0.1, 0.05)
    )


def test_no_two_families_meet_in_a_file():
    for scale in ("paper", "mini", "smoke"):
        files = [
            {_result_path(recipe, variant, "").name for recipe, _, variant in family.at(scale).runs()}
            for family in FAMILIES
        ]
        assert len(set.union(*files)) == sum(map(len, files))


def test_the_pairs_are_thirteen():
    assert len(set(_PAIRS)) == 13 and _COLUMNS == _PAIRS


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"{f.recipe.data}-{len(f.rows)}-rows")
@pytest.mark.parametrize("scale", ["paper", "mini", "smoke"])
def test_a_scale_changes_what_a_family_lists_and_nothing_else(family, scale):
    changed = {name: new for name, (_, new) in differences(family, family.at(scale)).items()}
    listed = family.scales[scale]
    assert changed.items() <= listed.items() and all(
        name in changed or runs_same(family, name, value) for name, value in listed.items()
    )
    assert len({(_result_path(recipe, variant, "").name) for recipe, _, variant in family.runs()}) == len(
        list(family.runs())
    )


def runs_same(family, name, value):
    "Whether a listed field has its value already."
    for part in name.split("."):
        family = getattr(family, part)
    return family == value


def test_rows_are_methods_and_mixers():
    for family in FAMILIES:
        for name, variant in family.rows.items():
            assert variant.method in METHODS and (variant.mixer or "") in runs._ROW_MIXERS, name
    assert {v.method for v in CIFAR100_DISTILLATION.rows.values()} == set(METHODS)


# ---- what is published


def test_published_results_are_those_of_the_copy():
    copy = json.loads((Path(__file__).parent / "data" / "published.json").read_text())
    assert {f"{t}→{s}": rows for (t, s), rows in _DISTILLATION.items()} == copy["accuracy"]
    assert {
        name: {row: v for row, v in rows.items() if row != "SuperMix + RandAugment"}
        for name, rows in _CLASSIFICATION.items()
    } == copy["error"]
    assert sum(map(len, _DISTILLATION.values())) == 7 * 22 - 1 + 6 * 4
    assert sum(rows["SuperMix + KD"] for rows in list(_DISTILLATION.values())[:7]) == pytest.approx(
        77.45 + 76.53 + 73.19 + 72.96 + 75.21 + 77.59 + 76.03
    )
    assert (
        published("imagenet_resnet50", "imagenet_resnet50", "SuperMix + RandAugment") == 78.2
        and published("vgg13", "vgg8", "none") is None
    )


# ---- what is possible


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    places = {"folder": folder, "results": folder / "results", "root": _make_miniature("cifar100", folder / "data")}
    data = _open_data(TINY, places["root"])
    assert accuracy(_open_teacher(TINY, data, folder), data.train) > 60, "whoever asks this teacher for mixes asks luck"
    return places


TINY = change(
    CIFAR100.at("smoke"),
    {
        "train_images": 40,
        "training.epochs": 2,
        "training.first_stage": 1,
        "training.milestones": (),
        "mixes": 24,
        "teacher": "resnet8",
        "training.lr": 0.01,
    },
)


@pytest.mark.parametrize(
    "teacher, student",
    [("wrn_40_2", "wrn_40_1"), ("vgg13", "mobilenetv2"), ("resnet32x4", "shufflenetv1"), ("resnet50", "vgg8")],
)
def test_fsp_needs_equal_channels_and_says_so_before_anything_is_trained(teacher, student, places, tmp_path):
    with pytest.raises(_Impossible, match=f"{teacher} → {student} by fsp: Expected .*channels"):
        run_distillation(
            CIFAR100.pair(teacher, student), "fsp", folder=tmp_path, results=tmp_path / "results", root=places["root"]
        )
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("teacher, student", [("wrn_40_2", "wrn_16_2"), ("resnet56", "resnet20"), ("vgg13", "vgg8")])
def test_fsp_is_possible_within_families(teacher, student, places):
    _check_row(CIFAR100.pair(teacher, student), Variant("fsp"), _open_data(CIFAR100, places["root"]).train)


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda places: run_distillation(TINY, "crb", **places), "Unknown method 'crb'. Did you mean 'crd'"),
        (
            lambda places: run_distillation(TINY, "kd", "supermx", **places),
            "Unknown mixer 'supermx'. Did you mean 'supermix'",
        ),
        (lambda places: run_distillation(TINY, "authors", **places), "pass a mixer"),
        (
            lambda places: run_classification(TINY, "randaugmnt", **places),
            "Unknown policy 'randaugmnt'. Did you mean 'randaugment'",
        ),
        (lambda places: run_distillation(replace(TINY, size=64), "kd", **places), "Expected size=None for cifar100"),
        (lambda places: TINY.at("papr"), "Unknown scale 'papr'. Did you mean 'paper'"),
    ],
)
def test_what_cannot_be_is_an_error(act, message, places):
    with pytest.raises(ValueError, match=message):
        act(places)


def test_a_missing_teacher_is_an_error(places):
    with pytest.raises(FileNotFoundError, match="no teacher's file .*nowhere.pth"):
        run_distillation(TINY, "kd", teacher="nowhere.pth", **places)


# ---- runs


@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_mixes(method, places):
    result = run_distillation(TINY, method, "cutmix", **places)
    figures = result["figures"]
    assert (
        figures["images"] == 80
        and figures["epochs"] == 2
        and 0 <= figures["test_accuracy"] <= 100
        and figures["loss"] == figures["loss"]
    )
    assert json.loads(_result_path(TINY, Variant(method, "cutmix"), places["results"]).read_text()) == result


@pytest.mark.parametrize("mixer", [mixer for mixer in runs._ROW_MIXERS if mixer not in ("", "cutmix", "puzzlemix")])
def test_every_mixer(mixer, places):
    assert run_distillation(TINY, "kd", mixer, **places)["variant"]["mixer"] == mixer


@pytest.mark.parametrize(
    "policy, mixer, label",
    [
        ("none", None, "lam"),
        ("randaugment", None, "lam"),
        ("autoaugment_cifar10", "supermix", "lam"),
        ("none", "supermix", "softmax"),
    ],
)
def test_classifiers(policy, mixer, label, places, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Augmented, "batches", lambda self, *args, kept=Augmented.batches: seen.append(args) or kept(self, *args)
    )
    result = run_classification(TINY, policy, mixer, label, **places)
    assert bool(seen) == (policy != "none") and (result["teacher"] is None) == (mixer is None)
    assert result["variant"]["label"] == (label if mixer else None)


def test_a_result_is_found_again_and_never_overwritten(places):
    first = run_distillation(TINY, "kd", "mixup", **places)
    path = _result_path(TINY, Variant("kd", "mixup"), places["results"])
    before = path.stat().st_mtime_ns
    assert run_distillation(TINY, "kd", "mixup", **places) == first and path.stat().st_mtime_ns == before
    # two recipes do not meet in a file
    assert _result_path(change(TINY, {"training.lr": 0.2}), Variant("kd", "mixup"), places["results"]) != path
    assert find_result(TINY, Variant("kd", "no"), places["results"]) is None


def test_a_teacher_from_a_file_of_the_benchmark(places, tmp_path):
    torch.manual_seed(5)
    network = create("wrn_16_1", 10)
    torch.save(
        {"epoch": 240, "model": {theirs: network.state_dict()[ours] for ours, theirs in _crd_keys(network).items()}},
        tmp_path / "ckpt.pth",
    )
    recipe = replace(TINY, teacher="wrn_16_1")
    opened = _open_teacher(recipe, _open_data(recipe, places["root"]), tmp_path, tmp_path / "ckpt.pth")
    assert (
        all(torch.equal(a, b) for a, b in zip(opened.state_dict().values(), network.state_dict().values(), strict=True))
        and not opened.training
    )
    run_distillation(
        recipe, "kd", folder=tmp_path, results=tmp_path, root=places["root"], teacher=tmp_path / "ckpt.pth"
    )
    assert not (tmp_path / "teachers").exists()


def test_minutes_are_those_of_the_teachers_training_too(places, monkeypatch):
    waits = []
    monkeypatch.setattr(
        runs, "train", lambda *args, kept=runs.train, **kw: waits.append(kw["minutes"]) or kept(*args, **kw)
    )
    recipe = change(
        TINY,
        {
            "training.epochs": 1,
            "training.milestones": (),
            "teacher_training.epochs": 1,
            "teacher_training.milestones": (),
            "teacher_training.lr": 0.03,
        },
    )
    run_distillation(recipe, "kd", minutes=0.5, **places)
    assert waits == [0.5]


@pytest.mark.parametrize("method", ["kd", "fitnet", "sp"])
def test_a_row_is_checked_where_its_teacher_is(method, digits, monkeypatch):
    "A file's teacher is on the run's device. Here that is torch's meta device, whose tensors have no values to check."
    monkeypatch.setattr("supermix.distillation.distill.check_teacher", lambda *_: None)
    monkeypatch.setattr("supermix.mixing.solver.check_logits", lambda logits, *_: logits)
    recipe = replace(TINY, training=replace(TINY.training, batch_size=39))  # the last batch is a single image
    teacher = create(recipe.teacher, 10).to("meta")
    _check_row(recipe, Variant(method), digits.train.subset(40), teacher)
    with pytest.raises(_Impossible, match="classes"):
        _check_row(recipe, Variant(method), digits.train.subset(40), create(recipe.teacher, 7).to("meta"))


def test_the_result_of_another_teacher_is_not_taken(places, tmp_path):
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        save(create("resnet8", 10), tmp_path / f"{name}.safetensors")
    go = lambda name: run_distillation(
        TINY,
        "kd",
        folder=tmp_path,
        results=tmp_path / "results",
        root=places["root"],
        teacher=tmp_path / f"{name}.safetensors",
    )
    first = go("first")
    assert go("first") == first
    with pytest.raises(ValueError, match="is the result of another teacher"):
        go("second")
    _result_path(TINY, Variant("kd"), tmp_path / "results").unlink()
    with pytest.raises(ValueError, match="teacher .* there, .* now"):
        go("second")  # nor are its checkpoints


def test_imagenet_in_small(tmp_path):
    recipe = change(
        IMAGENET.at("smoke"),
        {
            "training.epochs": 1,
            "training.milestones": (),
            "teacher_training.epochs": 1,
            "teacher_training.milestones": (),
        },
    )
    result = run_distillation(
        recipe, "kd", "mixup", folder=tmp_path, results=tmp_path, root=_make_miniature("imagenet", tmp_path)
    )
    assert result["figures"]["images"] == 96 and _open_data(recipe, tmp_path).train[0][0].shape == (3, 32, 32)


# ---- tables and costs


def test_a_table_lays_ours_beside_theirs(tmp_path):
    family = replace(CRD_DISTILLATION, rows={name: _METHOD_ROWS[name] for name in ("KD", "FSP")})
    for seed, reached, epochs in ((0, 74.0, 240), (1, 75.0, 240), (2, 10.0, 1)):
        recipe = change(CRD_BENCHMARK.pair("vgg13", "vgg8"), {"training.seed": seed, "training.epochs": epochs})
        path = _result_path(recipe, Variant("kd"), tmp_path)
        path.write_text(json.dumps({"recipe": runs._recipe_record(recipe), "figures": {"test_accuracy": reached}}))
    # one epoch is another recipe
    assert _load_accuracies(CRD_BENCHMARK.pair("vgg13", "vgg8"), Variant("kd"), tmp_path) == [74.0, 75.0]
    lines = family_table(family, tmp_path, (("vgg13", "vgg8"), ("wrn_40_2", "wrn_40_1"))).splitlines()
    assert lines[2:5] == [
        "| KD | 74.50 of 2 seeds (72.98) | not run (73.54) |",
        "| FSP | not run (70.23) | not run |",
        "",
    ]
    assert len(lines) == 6 and lines[5].endswith("(KD, FSP).")  # where the published values are from


def least_cost(*args, **options):
    "The least of five: what else the machine does, or a first call, makes any of them larger and none smaller."
    tried = [estimate_cost(*args, probe=4, **options) for _ in range(5)]
    return replace(tried[0], **{name: min(getattr(one, name) for one in tried) for name in ("training", "mixing")})


def test_costs_grow_with_what_is_asked(places):
    data = _open_data(TINY, places["root"])
    one, hundred = (
        least_cost(change(TINY, {"training.epochs": n, "mixes": 10 * n}), Variant("kd", "supermix"), data)
        for n in (1, 100)
    )
    assert (
        20 < hundred.training / one.training < 500
        and 20 < hundred.mixing / one.mixing < 500
        and hundred.mixes == pytest.approx(100 * one.mixes)
    )
    plain = estimate_cost(TINY, Variant("alone"), data, probe=4)
    assert (
        plain.teacher == plain.mixing == plain.mixes == 0 < plain.training
        and 100 < _bytes_per_mix(CIFAR100.mixing) < _bytes_per_mix(IMAGENET.mixing) < 1200
    )
    assert not _needs_teacher(Variant()) and _needs_teacher(Variant(mixer="supermix", label="lam"))


def test_a_memory_takes_time_and_room():
    recipe = change(CIFAR100, {"teacher": "resnet8", "student": "resnet8"})
    plain, crd, less = (
        least_cost(recipe_, Variant(method), steps=1)
        for recipe_, method in ((recipe, "kd"), (recipe, "crd"), (replace(recipe, train_images=10_000), "crd"))
    )
    vectors = lambda n: 2 * (2 * n * 128 * 4 + n * 8) / 1e9  # two checkpoints, each with two memories and the classes
    assert crd.checkpoints - plain.checkpoints == pytest.approx(
        vectors(50_000), rel=0.02
    ) and crd.checkpoints - less.checkpoints == pytest.approx(vectors(40_000), rel=0.001)
    assert crd.training > plain.training  # 16,384 negatives for each image


def test_weights_that_are_given_cost_no_training():
    recipe = change(CIFAR100, {"teacher": "resnet8", "student": "resnet8"})
    taught, given = (estimate_cost(recipe, probe=4, steps=1, given=given) for given in (False, True))
    assert taught.teacher > 0 == given.teacher and given.checkpoints < taught.checkpoints
    asked = (IMAGENET, 1000), (IMAGENET, 4), (CIFAR100, 1000)
    assert [runs._is_fetched(*each) for each in asked] == [True, False, False]
    with pytest.raises(ValueError, match="Unknown data set of known size 'digits'"):
        estimate_cost(replace(CIFAR100, data="digits"))


@pytest.mark.parametrize("name", ["ResNet18", "ResNet34", "ResNet50"])
def test_torchvisions_weights_are_those_of_plain_training(name):
    from torchvision.models import get_weight

    reached = get_weight(f"{name}_Weights.{runs._TEACHER_WEIGHTS}").meta["_metrics"]["ImageNet-1K"]["acc@1"]
    assert reached == {"ResNet18": 69.758, "ResNet34": 73.314, "ResNet50": 76.13}[name]
    if name == "ResNet50":  # not above what it shall teach
        assert abs(reached - published("imagenet_resnet50", "imagenet_resnet50", "baseline")) < 0.5


# ---- what is asked for is what is filed


def test_policies_of_one_name_do_not_share_a_result(tmp_path):
    rows = [
        Variant(policy=policy, cutout=cutout)
        for policy in ("policies/pba.json", "mine/pba.json", "none")
        for cutout in (None, 0, 16)
    ]
    assert len({_result_path(CIFAR100, row, tmp_path) for row in rows}) == len(rows)
    row = Variant(policy="mine.json")
    save_policy(load_policy("randaugment"), tmp_path / "mine.json")
    found = {"policy": runs._policy_hash(row, tmp_path)}
    runs._check_result_policy(found, row, tmp_path, tmp_path / "result.json")
    save_policy(load_policy("trivialaugment"), tmp_path / "mine.json")
    with pytest.raises(ValueError, match="result of another policy than mine.json contains now"):
        runs._check_result_policy(found, row, tmp_path, tmp_path / "result.json")


def test_a_teachers_file_of_another_network_is_an_error(digits, tmp_path):
    save(create("resnet8", 10), tmp_path / "teacher.safetensors")
    with pytest.raises(ValueError, match="holds a resnet8, and the .* is resnet14: use --teacher resnet8"):
        _open_teacher(CIFAR100.at("smoke"), digits, tmp_path, tmp_path / "teacher.safetensors")


# ---- commands


@pytest.mark.parametrize(
    "command, line, changes",
    [
        ("distill", "", {}),
        ("train", "", {}),
        (
            "distill",
            "--base crd_benchmark --scale mini --student shufflenetv1 --mixer supermix --mixing.k 3",
            {"student": "shufflenetv1", "mixing.k": 3, "training.lr": 0.01},
        ),
        *(
            (command, f"--base {base} --scale {scale}", {})
            for command in ("distill", "train")
            for base in BASES
            for scale in ("paper", "mini", "smoke")
        ),
        # what the first base has, too, is said all the same
        ("distill", "--base crd_benchmark --training.lr 0.1", {"training.lr": 0.1}),
        ("distill", "--base=imagenet --training.batch-size 128", {"training.batch_size": 128}),
        ("distill", "--student mobilenetv2 --training.lr 0.1", {"student": "mobilenetv2", "training.lr": 0.1}),
        ("distill", "--scale mini --training.epochs 600", {"training.epochs": 600}),
        (
            "distill",
            "--student mobilenetv2 --low-lr 0.005",
            {"student": "mobilenetv2", "low_lr": 0.005, "training.lr": 0.005},
        ),
        ("distill", "--student mobilenetv2 --low-lr None", {"student": "mobilenetv2", "low_lr": None}),
        ("distill", "--student mobilenetv2 --low-lr=none", {"student": "mobilenetv2", "low_lr": None}),
        ("distill", "--low-lr 0.005", {"low_lr": 0.005}),
        (
            "distill",
            "--scale smoke --student wrn_16_2 --teacher wrn_40_2",
            {"student": "wrn_16_2", "teacher": "wrn_40_2"},
        ),
        ("train", "--base crd_benchmark --student wrn_16_2", {"student": "wrn_16_2"}),
    ],
)
def test_options_change_the_base_at_its_scale(command, line, changes):
    said = line.replace("=", " ").split()
    of = lambda name, other: said[said.index(name) + 1] if name in said else other
    work = parse_command([command, *line.split()])
    base = (BASES if command == "distill" else CLASSIFIER_BASES)[of("--base", "cifar100")].at(of("--scale", "paper"))
    assert work.func is run_command and work.args[0] == change(base, changes)


def test_the_help_shows_the_bases_numbers(capsys):
    for line, rate in (
        ("", "0.1"),
        ("--base crd_benchmark", "0.05"),
        ("--base crd_benchmark --student mobilenetv2", "0.01"),
    ):
        with pytest.raises(SystemExit):
            parse_command(["distill", *line.split(), "--help"])
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert f"initial learning rate (S 1.1) (default: {rate})" in shown


THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
OPTIONS = ["--scale", "smoke", "--train-images", "96"]
MIXED = [*OPTIONS, "--mixer", "supermix", "--mixes", "24"]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    "A function that copies the smoke recipe's teacher to where a command finds it, and needs to train none."
    folder, recipe = tmp_path_factory.mktemp("taught"), CIFAR100.at("smoke")
    data = _open_data(recipe, _make_miniature("cifar100", folder / "miniature"))
    assert accuracy(_open_teacher(recipe, data, folder), data.train) > 60
    return lambda out: shutil.copytree(folder / "teachers", out / "teachers")


def start(*args, launcher=("-m", "supermix.experiments.runs")):
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, args)],
        env=THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return out


def student(folder):
    return next((folder / "students").glob("*.safetensors"))


@pytest.mark.slow
def test_distill_killed_and_started_again_ends_with_the_same_bytes(taught, tmp_path):
    for name in ("whole", "killed"):
        taught(tmp_path / name)
    options = ["distill", *MIXED, "--training.epochs", "7", "--minutes", "0", "--out"]
    ended(start(*options, tmp_path / "whole"))
    process = start(*options, tmp_path / "killed")
    while not list((tmp_path / "killed").glob("students/*/step*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list((tmp_path / "killed").glob("results/*.json")), "it was over before it was killed"
    assert checkpoints(next((tmp_path / "killed" / "students").iterdir()))
    out = ended(start(*options, tmp_path / "killed"))
    assert "after 7 epochs" in out and file_hash(student(tmp_path / "killed")) == file_hash(student(tmp_path / "whole"))
    one, two = (
        json.loads(next((tmp_path / name / "results").glob("*.json")).read_text())["figures"]
        for name in ("whole", "killed")
    )
    assert one["test_accuracy"] == two["test_accuracy"] and one["loss"] == two["loss"]


@pytest.mark.slow
def test_two_processes_distil_one_student(taught, tmp_path):
    taught(tmp_path)
    out = ended(
        start(
            "distill",
            *MIXED,
            "--method",
            "kd",
            "--out",
            tmp_path,
            launcher=(
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
                "-m",
                "supermix.experiments.runs",
            ),
        )
    )
    result = json.loads(next((tmp_path / "results").glob("*.json")).read_text())
    assert out.count("% of the test images") == 1 and result["processes"] == 2 and result["figures"]["images"] == 2 * 96
    assert load(student(tmp_path)).card["accuracy"] == result["figures"]["test_accuracy"]


def test_train_trains_a_classifier(tmp_path):
    out = ended(
        start(
            "train",
            *OPTIONS,
            "--policy",
            "randaugment",
            "--cutout",
            "16",
            "--out",
            tmp_path,
            launcher=("-c", "from supermix.cli import main; main()"),
        )
    )
    result = json.loads(next((tmp_path / "results").glob("*.json")).read_text())
    assert (
        "% of the test images" in out
        and result["variant"]["policy"] == "randaugment"
        and result["variant"]["cutout"] == 16
        and result["teacher"] is None
    )


@pytest.mark.slow
def test_a_command_says_first_what_it_will_cost(tmp_path):
    small = [
        "--data",
        "digits",
        "--teacher",
        "resnet8",
        "--student",
        "resnet8",
        "--train-images",
        "40",
        "--training.epochs",
        "1",
        "--teacher-training.epochs",
        "1",
        "--scale",
        "mini",
        "--out",
        tmp_path,
    ]
    assert ended(start("distill", *small, "--only-cost")).startswith("on 1 CPU threads: student") and not list(
        tmp_path.iterdir()
    )
    lines = ended(start("distill", *small)).splitlines()
    assert (
        lines[0].startswith("on 1 CPU threads: student")
        and "% of the test images after 1 epochs" in lines[1]
        and len(lines) == 2
    )
    assert ended(start("distill", *small)).splitlines() == lines[1:]  # done: it costs nothing any more


def test_a_mistake_is_one_line(tmp_path):
    process = start("distill", "--student", "resnet21", "--scale", "smoke", "--out", tmp_path)
    _, errors = process.communicate(timeout=600)
    assert (
        process.returncode == 1
        and errors.startswith("supermix: Unknown network 'resnet21'. Did you mean")
        and len(errors.splitlines()) == 1
    )


# ---- rows that need a policy file


def test_a_row_without_its_policy_file_says_how_to_give_one_and_quotes_the_published(tmp_path, capsys):
    rows = {name: CIFAR100_CLASSIFICATION.rows[name] for name in ("Fast AutoAugment", "PBA")}
    family = replace(CIFAR100_CLASSIFICATION.at("smoke"), pairs=(("wrn_28_10a", "wrn_28_10a"),), rows=rows)
    root = _make_miniature("cifar100", tmp_path)
    assert run_family(family, folder=tmp_path / "out", results=tmp_path / "results", root=root, policies=tmp_path) == []
    told = capsys.readouterr().out
    for name, value, source in (
        ("fast_autoaugment_cifar100", "82.70", "Fast AutoAugment"),
        ("pba_cifar100", "83.27", "PBA"),
    ):
        assert f"{tmp_path}/policies/{name}.json" in told and f"Published: {value} % (the {source} repository)" in told
    assert "make_density" in told and "chapter 47" in told
    shown = family_table(family, tmp_path / "results")
    assert (
        "| PBA | not run (83.27) |" in shown
        and "the PBA repository (PBA)" in shown
        and "the Fast AutoAugment repository (Fast AutoAugment)" in shown
    )


# ---- what a result, a teacher and a command refer to


def test_a_result_of_other_images_is_not_taken(tmp_path):
    roots = [_make_miniature("cifar100", tmp_path / "a"), tmp_path / "b"]
    data = _open_data(TINY, roots[0])
    mirrored = [(part.pixels.flip(3), part.labels) for part in (data.train, data.test)]
    _write_cifar100(roots[1], data.info.classes, *mirrored)
    places = {"folder": tmp_path / "out", "results": tmp_path / "results"}
    first = run_distillation(TINY, "alone", root=roots[0], **places)
    assert run_distillation(TINY, "alone", root=roots[0], **places) == first
    with pytest.raises(ValueError, match="is the result of other images"):
        run_distillation(TINY, "alone", root=roots[1], **places)


def test_a_teacher_of_other_images_is_not_taken(tmp_path):
    save(pretrained("fashion_mnist"), tmp_path / "fashion.safetensors")
    recipe = replace(TINY, data="digits", teacher="resnet20")
    with pytest.raises(ValueError, match="was trained on fashion_mnist, and you use it for digits"):
        run_distillation(recipe, "kd", folder=tmp_path, results=tmp_path, teacher=tmp_path / "fashion.safetensors")


def test_an_image_that_cannot_be_read_is_no_rows_fault(tmp_path):
    root = _make_miniature("imagenet", tmp_path)
    next((root / "imagenet" / "train").rglob("*.JPEG")).write_bytes(b"")
    family = IMAGENET_DISTILLATION.at("smoke")
    data = _open_data(family.recipe, root)
    broken = data.train.files.index(min(data.train.files))
    data.train.files[0], data.train.files[broken] = data.train.files[broken], data.train.files[0]
    (Path(data.train.files[0])).write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read") as caught:
        _check_row(family.recipe, Variant("kd"), data.train)
    assert not isinstance(caught.value, _Impossible)


@pytest.mark.parametrize("name, alpha", [("mixup", None), ("mixup_beta", 1.0), ("cutmix_beta", 1.0)])
def test_mixers_of_beta_draw_shares(name, alpha, digits):
    mixer = _ROW_MIXERS[name](None, digits.info)
    assert type(mixer).__name__ == ("CutMix" if "cutmix" in name else "MixUp")
    lam = mixer.draw_lam(2000, torch.Generator().manual_seed(0))[:, 0]
    assert lam.std() == pytest.approx(0.0 if alpha is None else 12**-0.5, abs=0.02)  # half and half, or even


@pytest.mark.parametrize(
    "change_, message", [({"training.held_out": 40}, "hold out fewer than the 40 images")]
)  # ranges without data: in the recipes' tests
def test_numbers_out_of_range(change_, message, places):
    recipe = change(TINY, change_)
    with pytest.raises(ValueError, match=message):
        run_distillation(recipe, "alone", **places)
    with pytest.raises(ValueError, match=message):
        estimate_cost(recipe, Variant("alone"))


def test_the_cost_is_that_of_the_data_that_are_named(tmp_path):
    root = _make_miniature("imagenet", tmp_path)
    small = [
        "--base",
        "imagenet",
        "--scale",
        "mini",
        "--size",
        "32",
        "--teacher",
        "resnet8",
        "--student",
        "resnet8",
        "--data-root",
        root,
        "--out",
        tmp_path / "out",
        "--only-cost",
    ]
    told = ended(start("distill", *small))
    assert "data 0.00 MB" in told and "150" not in told
