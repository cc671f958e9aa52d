"""Searching for policies: scores, sorting, breeding and lineage, each against a loop or a case worked out by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from supermix.policies.policies import OPS, _POLICIES, Augmented, Policy, load_policy
from supermix.policies.search import (
    _SEARCHED,
    DensityFound,
    DensityRecipe,
    PopulationFound,
    PopulationRecipe,
    _exploit,
    _explore,
    _judge_policy,
    make_density,
    make_population,
    _parameter_lines,
    _random_policy,
    _round_training,
    _split_images,
    compare_policies,
    search_density,
    search_population,
)
from supermix.recipes import Training
from supermix.zoo import create

ONE = Training(epochs=1, batch_size=32, lr=0.05, milestones=())
FILES = Path(__file__).parent.parent / "policies"


# ---- parts


def test_parts_share_nothing(digits):
    a, b = _split_images(digits.train, 300, 200, seed=1)
    assert (len(a), len(b)) == (300, 200)
    together = torch.cat([part.fetch(torch.arange(len(part))) for part in (a, b)])
    expected = digits.train.subset(500, seed=1).fetch(torch.arange(500))

    def rows(pixels):
        return sorted(pixels.flatten(1).sum(1).tolist())

    assert rows(together) == rows(expected)
    again, _ = _split_images(digits.train, 300, 200, seed=1)
    assert torch.equal(a.labels, again.labels)
    assert torch.cat([a.labels, b.labels]).bincount().tolist() == [50] * 10
    with pytest.raises(ValueError, match="Expected 1 to 1297 images, got 1400"):
        _split_images(digits.train, 1300, 100)


# ---- density matching


def test_judging_is_a_loop(digits, teacher):
    images = digits.test.subset(50)
    policy = Policy("p", [[["Rotate", 0.5, 9], ["Invert", 0.5, None]]])
    losses = _judge_policy(teacher, images, policy, draws=3, seed=4, batch_size=20)
    assert losses.shape == (3, 50)
    g = torch.Generator().manual_seed(4)
    for part in torch.arange(50).split(20):
        for draw in range(3):
            pixels = policy.apply(images.fetch(part), policy.draw(len(part), 32, g))
            with torch.no_grad():
                logits = teacher(images.info.normalize(pixels))
            expected = F.cross_entropy(logits, images.labels[part], reduction="none")
            torch.testing.assert_close(losses[draw, part], expected, rtol=1e-3, atol=1e-3)


def test_the_judge_is_left_as_it_was(digits, teacher):
    teacher.train()
    _judge_policy(teacher, digits.test.subset(20), _POLICIES["none"], 1)
    assert teacher.training and all(m.training for m in teacher.modules())
    teacher.eval()


def test_random_policies_are_even(seeded):
    entries = [entry for line in _random_policy(20_000, seeded()).subpolicies for entry in line]
    assert {op for op, _, _ in entries} == set(_SEARCHED) == set(OPS) - {"Identity", "Cutout"} and all(
        len(set(column)) == n for column, n in zip(zip(*entries), (14, 10, 10))
    )
    assert min(p for _, p, _ in entries) == 0.1 and max(p for _, p, _ in entries) == 1.0
    assert sum(level for _, _, level in entries) / 40_000 == pytest.approx(4.5, abs=0.05)
    assert _random_policy(3, seeded(1)) == _random_policy(3, seeded(1)) != _random_policy(3, seeded(2))


def test_the_search_sorts(digits, teacher):
    images, recipe = digits.test.subset(40), DensityRecipe(candidates=6, lines=2, draws=2, keep=2)
    found = search_density(teacher, images, recipe)
    assert len(found.candidates) == 6 and (found.best.diff() >= 0).all() and "6 candidates" in repr(found)
    for policy, best, mean in zip(found.candidates, found.best, found.mean):
        losses = _judge_policy(teacher, images, policy, 2, recipe.seed)
        torch.testing.assert_close(losses.amin(0).mean(), best)
        torch.testing.assert_close(losses.mean(), mean)
    again = search_density(teacher, images, recipe)
    assert again.candidates == found.candidates and torch.equal(again.best, found.best)
    merged = found.policy(2, "both", by="test")
    assert merged.subpolicies == found.candidates[0].subpolicies + found.candidates[1].subpolicies and merged.about == {
        "by": "test"
    }


def test_density_prefers_what_the_judge_knows(digits, teacher):
    "Digits that are moved out of the picture are harder for the teacher than digits that are sharpened."
    images = digits.test.subset(100)
    far, mild = (Policy("p", [[[op, 1.0, 9]]]) for op in ("TranslateX", "Sharpness"))
    assert _judge_policy(teacher, images, far).mean() > _judge_policy(teacher, images, mild).mean() + 0.5


# ---- the population


def test_exploit_by_hand(seeded):
    losses = torch.tensor([5.0, 1, 7, 2, 6, 3, 8, 4])
    for seed in range(20):
        parents = _exploit(losses, seeded(seed)).tolist()
        assert [parents[i] for i in (0, 1, 3, 4, 5, 7)] == [0, 1, 3, 4, 5, 7]  # all but the worst two stay
        assert {parents[2], parents[6]} <= {1, 3}  # which copy one of the best two
    assert {_exploit(losses, seeded(s))[6].item() for s in range(20)} == {1, 3}


def test_explore_stays_within_limits(seeded):
    for start in (torch.zeros(200, 14, 2, dtype=torch.int64), torch.tensor([10, 9]).expand(200, 14, 2)):
        near = _explore(start, seeded())
        assert near.shape == start.shape and near.dtype == torch.int64 and near.min() >= 0
        assert (near.amax((0, 1)) <= torch.tensor([10, 9])).all() and not torch.equal(near, start)
        far = ((near - start).abs() > 3).float().mean().item()
        assert far == pytest.approx(0.2 * 0.62, abs=0.03)  # redrawn, and more than three away


def test_parameters_are_lines():
    parameters = torch.zeros(14, 2, dtype=torch.int64)
    parameters[4] = torch.tensor([7, 3])
    lines = _parameter_lines(parameters)
    assert len(lines) == 14 and lines[4] == (("Rotate", 0.7, 3),) and lines[0] == (("ShearX", 0.0, 0),)
    Policy("p", lines, picks=2)


def test_lineage_and_schedule_by_hand():
    # 1 copies 0, then 2 copies 1, then nothing counts any more
    parents = torch.tensor([[0, 0, 2], [0, 1, 1], [0, 1, 2]])
    losses = torch.tensor([[1.0, 3, 2], [2, 1, 3], [3, 2, 1]])
    parameters = torch.arange(9).view(3, 3, 1, 1).expand(3, 3, 14, 2)
    found = PopulationFound(parameters, losses, parents)
    assert found.lineage() == [0, 1, 2]  # the best at the end is 2, which was 1, which was 0
    schedule = found.schedule("s")
    assert [schedule.at(s).subpolicies[0][0][2] for s in (0, 0.34, 0.67, 1)] == [0, 4, 8, 8] and schedule.picks == 2
    assert [share for share, _ in schedule.later] == [1 / 3, 2 / 3]
    still = replace(found, parameters=torch.full_like(parameters, 3))
    assert still.schedule().later == ()


def test_a_small_population(digits):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    recipe = PopulationRecipe(members=4, rounds=3, every=1, training=replace(ONE, epochs=3))
    learn, judged = _split_images(digits.train, 96, 60)
    found = search_population(learn, judged, recipe)
    assert torch.equal(torch.random.get_rng_state(), state), "torch's global generator moved"
    assert found.parameters.shape == (3, 4, 14, 2) and found.losses.shape == found.parents.shape == (3, 4)
    for r in (0, 1):
        for member, parent in enumerate(found.parents[r].tolist()):
            if member == parent:
                assert torch.equal(found.parameters[r + 1, member], found.parameters[r, member])
        assert (found.parents[r] != torch.arange(4)).sum() == 1 and found.parents[r][
            found.losses[r].argmax()
        ] == found.losses[r].argmin()
    again = search_population(learn, judged, recipe)
    assert torch.equal(again.parameters, found.parameters) and torch.allclose(again.losses, found.losses)
    assert "4 members, 3 rounds" in repr(found)


@pytest.mark.parametrize("schedule", ["steps", "cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_rate_of_a_round_is_that_of_its_middle(schedule, warmup):
    "Constant in the round, so that it decays once, and above 0 in the first round of a warm-up."
    milestones = (4,) if schedule == "steps" else ()
    whole = Training(epochs=6, batch_size=32, lr=0.05, milestones=milestones, schedule=schedule, warmup=warmup)
    recipe = PopulationRecipe(members=4, rounds=3, every=2, training=whole, seed=5)
    for r in range(3):
        short = _round_training(recipe, r, 2)
        assert [short.lr_at(moment) for moment in (0, 0.5, 1, 1.9)] == [whole.lr_at(2 * r + 1)] * 4
        assert short.lr > 0 and (short.epochs, short.seed) == (2, 5 + 4 * r + 2)


def test_the_rates_of_the_committed_search_stay():
    recipe = PopulationRecipe()
    assert [_round_training(recipe, r, 0).lr for r in range(9)] == [recipe.training.lr_at(2 * r) for r in range(9)]


def test_what_cannot_be_searched(digits):
    recipe = PopulationRecipe(members=4, rounds=2, every=2, training=replace(ONE, epochs=3))
    with pytest.raises(ValueError, match="rounds that make the 3 epochs of the training, got 2 of 2"):
        search_population(digits.train.subset(60), digits.test.subset(30), recipe)
    with pytest.raises(ValueError, match="Expected a policy of one moment"):
        _judge_policy(create("resnet8", 10), digits.test.subset(30), Policy("later", later=((0.5, ()),)))


# ---- files


def test_commands_write_files(tmp_path, monkeypatch):
    small = DensityRecipe(images=60, judged=30, training=ONE, candidates=3, lines=2, draws=1, keep=2)
    policy = load_policy(make_density("digits", tmp_path / "a.json", small))
    assert (
        len(policy.subpolicies) == 4
        and policy.name == "a"
        and policy.about["recipe"]["candidates"] == 3
        and policy.about["data"] == "digits"
    )
    few = PopulationRecipe(images=60, judged=30, members=4, rounds=2, every=1, training=replace(ONE, epochs=2))
    schedule = load_policy(make_population("digits", tmp_path / "b.json", few))
    assert schedule.picks == 2 and len(schedule.subpolicies) == 14 and len(schedule.about["losses"]) == 2
    assert json.loads((tmp_path / "b.json").read_text())["about"]["recipe"]["members"] == 4


@pytest.mark.parametrize("name", ["fast_autoaugment_fashion", "pba_fashion"])
def test_the_committed_files(name, digits, seeded):
    policy = load_policy(FILES / f"{name}.json")
    assert policy.name == name and policy.about["data"] == "fashion_mnist" and "command" in policy.about
    images = Augmented(digits.train.subset(40), load_policy(FILES / f"{name}.json", cutout=16), epochs=2)
    assert sum(len(x) for _ in range(2) for x, _, _ in images.batches(16, seeded())) == 80
    assert (FILES / f"{name}.json").stat().st_size < 30_000


def test_the_committed_schedule_is_a_schedule():
    policy = load_policy(FILES / "pba_fashion.json")
    assert policy.later and all(len(lines) == 14 for _, lines in policy.later)


def test_comparing(digits):
    train, test = digits.train.subset(64), digits.test.subset(50)
    reached = compare_policies(
        {"a": _POLICIES["none"], "b": _POLICIES["none"], "c": _POLICIES["trivialaugment"]}, train, test, ONE, seeds=2
    )
    assert (
        list(reached) == ["a", "b", "c"] and all(len(v) == 2 for v in reached.values()) and reached["a"] == reached["b"]
    )


def test_found_is_a_record():
    assert "2 candidates: loss 0.100 for the best" in repr(
        DensityFound((_POLICIES["none"],) * 2, torch.tensor([0.1, 0.2]), torch.tensor([0.2, 0.3]), 0.15)
    )
