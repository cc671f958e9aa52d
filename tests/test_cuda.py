"""On a GPU all goes as on a processor: what teaches, mixes, trains, stores, measures. Skipped where there is none."""

from dataclasses import replace

import pytest
import torch
from supermix import MixedDataset, SuperMix, accuracy, cli, create, distill, predict, pretrained, save
from supermix.data import Data
from supermix.distillation.distill import MIXERS, make_mixes
from supermix.experiments.race import race
from supermix.experiments.study import _core_trials, _run_trial
from supermix.mixing.engine import BLOCK, Engine, _Replayed, draw_block, draw_sets, solve_blocks
from supermix.mixing.generate import settle, generate
from supermix.mixing.quality import quality
from supermix.policies.policies import Augmented, load_policy
from supermix.recipes import FAST, METHODS, Generation, Mixing, Terms, Training
from supermix.training.checkpoints import checkpoints
from supermix.training.loop import Objective, label_objective, measure_bfloat16, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SHORT = Training(epochs=2, batch_size=32, lr=0.02, milestones=(1,), first_stage=1)


@pytest.fixture
def there():
    return pretrained("digits").cuda()


def few(digits, n=96):
    return Data(digits.info, digits.train.subset(n), digits.test, digits.source)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, digits, there):
    torch.manual_seed(0)
    history = distill(
        there if METHODS[method].teaches else None,
        create("resnet8", 10).cuda(),
        few(digits),
        method,
        "mixup" if METHODS[method].mixes else None,
        SHORT,
    )
    assert len(history.loss) == 2 and history.loss[1] != history.loss[0] and history.images == 192


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("method", ["kd", "alone"])
def test_every_mixer(method, mixer, digits, there):
    if mixer == "puzzlemix":
        pytest.importorskip("gco")
    history = distill(there, create("resnet8", 10).cuda(), few(digits), method, mixer, SHORT)
    assert history.loss[1] < history.loss[0] * 1.5


@pytest.mark.parametrize("at", ["cpu", "cuda"])
def test_a_stock_of_mixes(at, digits, there, tmp_path):
    images = digits.train.to(at)
    store = generate(Generation(data="digits", count=200, shard=256), tmp_path, images, there)
    mixed = MixedDataset(store.folder, images)
    batch = mixed.batch(range(200))
    with torch.no_grad():
        again = there(batch.images.cuda()).cpu()
    torch.testing.assert_close(again, batch.logits.cpu(), rtol=1e-2, atol=0.1)
    assert 0.5 < quality(mixed, there).solved[-1] <= 1


def test_mixes_are_made_again_on_the_card(digits, there, tmp_path):
    "What a stock gives there is what it gives on a processor; only the masks' sigmoids are rounded otherwise."
    store = generate(Generation(data="digits", count=200, shard=128, top="all"), tmp_path, digits.train, there)
    here = MixedDataset(store.folder, digits.train)
    card = here.to("cuda")
    assert MixedDataset(store.folder, digits.train.to("cuda")).device.type == card.device.type == "cuda"
    picks = here.draw(64, torch.Generator().manual_seed(0))
    (images, known), (expected, theirs) = card.show(picks), here.show(picks)
    assert {t.device.type for t in (images, *known)} == {"cuda"} and torch.equal(known.sets.cpu(), theirs.sets)
    torch.testing.assert_close(images.cpu(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(known.logits.cpu(), theirs.logits)
    assert torch.equal(known.lam.cpu(), theirs.lam) and torch.equal(known.classes.cpu(), theirs.classes)
    assert quality(card, there).solved == quality(here, there).solved


def test_a_batch_of_a_stock_copies_a_few_numbers(digits, there, tmp_path):
    store = generate(Generation(data="digits", count=200, shard=128), tmp_path, digits.train, there)
    card, g = MixedDataset(store.folder, digits.train).to("cuda"), torch.Generator().manual_seed(0)
    card.show(card.draw(64, g))
    with torch.profiler.profile() as profile:
        card.show(card.draw(64, g))
        torch.cuda.synchronize()
    copies = [event for event in profile.events() if "Memcpy HtoD" in event.name or "Memcpy DtoH" in event.name]
    assert 1 <= len(copies) <= 3  # rows, crops, mirrors


@pytest.mark.parametrize("at", ["cpu", "cuda"])
def test_sets_are_drawn_for_the_card(at, digits, there):
    "Sixteen blocks at a time, ahead in a thread: the sets are those of the blocks, one by one."
    engine = Engine(there, digits.train[:2][0], Mixing(**FAST), 2048)
    drawn = list(draw_sets(engine, digits.train.to(at), 0, range(20)))
    assert [len(sets.index) for sets in drawn] == [2048, 512] and drawn[0].images.device.type == "cuda"
    for block in (0, 7, 15):
        alone = draw_block(digits.train, lambda x: there(x.cuda()), engine.mixing, 0, block)
        for a, b in zip(alone, drawn[0], strict=True):
            assert torch.equal(a, b[block * BLOCK : (block + 1) * BLOCK].cpu())


def test_a_student_learns_as_much(digits, there):
    def reached(device):
        torch.manual_seed(0)
        student, teacher = create("resnet8", 10).to(device), there.to(device)
        images = digits.train.subset(500).to(device)
        mixes = make_mixes(teacher, images, 1000, Mixing(**FAST))
        return distill(
            teacher,
            student,
            Data(digits.info, images, digits.test, digits.source),
            "kd",
            mixes,
            Training(epochs=15, batch_size=50, lr=0.1, milestones=(10,)),
        ).test

    here, gpu = reached("cpu"), reached("cuda")
    assert gpu > 80 and abs(here - gpu) < 8


def test_a_killed_run_goes_on(digits, tmp_path):
    def go(folder, epochs):
        torch.manual_seed(0)
        network = create("resnet8", 10).cuda()
        history = train(network, digits.train.subset(100).to("cuda"), replace(SHORT, epochs=epochs), folder=folder)
        return network.state_dict(), history

    whole, history = go(tmp_path / "whole", 2)
    newest = checkpoints(tmp_path / "whole")
    newest[-1].unlink()  # as if it had been killed in the second epoch
    again, other = go(tmp_path / "whole", 2)
    assert other.loss == pytest.approx(history.loss, rel=1e-2)
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("optimizer, lr", [("sgd", 0.02), ("adamw", 0.002)])
@pytest.mark.parametrize("first, then", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_goes_on_on_another_device(first, then, optimizer, lr, digits, tmp_path):
    def go(device, folder):
        torch.manual_seed(0)
        network = create("resnet8", 10).to(device)
        history = train(
            network, digits.train.subset(96).to(device), replace(SHORT, optimizer=optimizer, lr=lr), folder=folder
        )
        return {name: tensor.cpu() for name, tensor in network.state_dict().items()}, history

    go(first, tmp_path)
    checkpoints(tmp_path)[-1].unlink()  # as if it had been killed in the second epoch
    moved, history = go(then, tmp_path)
    stayed, expected = go(then, None)
    assert history.loss == pytest.approx(expected.loss, rel=2e-2) and history.images == 192
    for name, tensor in stayed.items():
        torch.testing.assert_close(moved[name], tensor, rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("options", [{"bfloat16": True}, {"compile": True}, {"bfloat16": True, "compile": True}])
def test_precision_and_compiler(options, digits):
    torch.manual_seed(0)
    history = train(
        create("resnet8", 10).cuda(),
        digits.train.subset(640).to("cuda"),
        Training(epochs=4, batch_size=64, milestones=(), **options),
    )
    assert history.loss[-1] < 0.8 * history.loss[0]


@pytest.mark.parametrize("mixer", ["none", "mixup", "supermix"])
def test_the_command_distils_from_a_file(mixer, there, tmp_path, capsys):
    save(there.cpu(), tmp_path / "teacher.safetensors")
    words = ["distill", "--data", "digits", "--scale", "smoke", "--teacher", str(tmp_path / "teacher.safetensors")]
    words += ["--student", "resnet8", "--train-images", "65", "--training.batch-size", "32", "--training.epochs", "1"]
    words += ["--training.milestones", "--mixer", mixer, "--out", str(tmp_path / "out"), "--device", "cuda"]
    cli.main(words + ["--mixes", "60"] * (mixer == "supermix"))
    assert "% of the test images after 1 epochs" in capsys.readouterr().out


def test_policies_and_mixes(digits, there):
    images = Augmented(digits.train.subset(96).to("cuda"), load_policy("trivialaugment", cutout=16), 2)
    history = distill(there, create("resnet8", 10).cuda(), images, "alone", "supermix", SHORT, mixes=200)
    assert len(history.loss) == 2


def test_a_race(digits, there):
    result = race(there, digits.train, rounds=1, blocks=1, batch=16)
    assert result["engine"]["solved"] > 0.5 and result["engine"]["ratio"] > 1


def search(there, images, slots=64, blocks=4):
    engine = Engine(there, images[:2][0], Mixing(**FAST), slots)
    return engine, solve_blocks(engine, images, 0, range(blocks))


@pytest.mark.parametrize("benchmark", [False, True])
def test_a_replayed_search_finds_what_the_search_finds(benchmark, digits, there, monkeypatch):
    "Also where a script has set cudnn.benchmark: the batch keeps its size, so nothing is searched for anew."
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    engine, found = search(there, digits.train)
    assert engine.how == "one graph per pass" and engine.tried == 4 * BLOCK
    monkeypatch.setattr(_Replayed, "record", lambda replayed: setattr(replayed, "why", "a test"))
    eager, expected = search(there, digits.train)
    assert eager.how == "one by one (a test)" and engine.passes == pytest.approx(eager.passes, rel=0.1)
    mine, theirs = (dict(zip(f.index.tolist(), f.code.float())) for f in (found, expected))
    both = mine.keys() & theirs.keys()
    assert len(both) > 0.9 * len(theirs)
    near = torch.stack([(mine[i] - theirs[i]).abs().mean() < 0.05 for i in both])
    assert near.float().mean() > 0.5  # Newton's bold steps make much of another order of additions


def test_the_same_search_twice_gives_the_same_bytes(digits, there):
    (_, first), (_, again) = search(there, digits.train), search(there, digits.train)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_newton_steps_of_the_oracle_in_float64(digits, there):
    "Three drivers take the reference's steps on a processor (tests/test_solver.py); a card's are those of a processor."
    x, lam = digits.train[:24][0].double().unflatten(0, (12, 2)), torch.full((12, 2), 0.5, dtype=torch.float64)
    here = SuperMix(pretrained("digits").double(), **FAST | {"max_iter": 3}).solve(x, lam)
    card = SuperMix(there.double(), **FAST | {"max_iter": 3}).solve(x.cuda(), lam.cuda())
    torch.testing.assert_close(card.theta.cpu(), here.theta, rtol=1e-6, atol=1e-8)
    assert torch.equal(card.solved.cpu(), here.solved)


def test_a_teacher_that_cannot_be_recorded_is_asked_pass_by_pass(digits, there):
    def looks(x):
        logits = there(x.cuda())
        return logits if logits.sum().item() < 1e9 else logits * 0

    engine, before = Engine(looks, digits.train[:2][0].cuda(), Mixing(**FAST), 64), torch.cuda.current_stream()
    found = solve_blocks(engine, digits.train, 0, range(2))
    assert "the recording failed" in engine.how and len(found.index) > BLOCK
    assert torch.cuda.current_stream() == before  # what the process does next is not on the recording's stream


def test_memory_stays_the_same_over_many_sets(digits, there):
    engine = Engine(there, digits.train[:2][0], Mixing(**FAST | {"max_iter": 4}), 1024)
    peaks = []
    for start in range(0, 800, 200):  # 100,000 sets
        torch.cuda.reset_peak_memory_stats()
        for _ in engine.run(draw_sets(engine, digits.train, 0, range(start, start + 200))):
            pass
        peaks.append(torch.cuda.max_memory_allocated())
    assert max(peaks[1:]) < 1.1 * peaks[0]


def test_slots_and_dtype_suit_a_card(digits, there):
    recipe = settle(Generation(data="digits"), digits.train, there)
    assert (recipe.slots, recipe.shard, recipe.bfloat16) == (
        2048,
        32_768,
        torch.cuda.is_bf16_supported(including_emulation=False),
    )
    assert settle(Generation(slots=64, bfloat16=False), digits.train, there).slots == 64


def test_the_interactive_solver(digits, there):
    x, labels = (t.cuda() for t in digits.train[:32])
    mixed, targets = SuperMix(there, **FAST)(x, labels, torch.Generator().manual_seed(0))
    assert mixed.device.type == targets.device.type == "cuda" and torch.isfinite(mixed).all()


def test_answers(digits, there):
    assert accuracy(there, digits.test) > 98
    assert len(predict(there, digits.test[:3][0])) == 3


def test_a_trial_of_the_study(digits, there, tmp_path):
    there.card = pretrained("digits").card
    trial = replace(_core_trials()[-1], images=100, mixes=1, updates=8, batch_size=50)
    result = _run_trial(trial, digits, there, tmp_path, "cuda")
    assert result["core_seconds"] is None and result["device"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("benchmark", [False, True], ids=["", "cudnn.benchmark"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"bfloat16": True}, {"clip_grad": 1.0, "nesterov": True}, {"views": 1}, {"compile": True}],
    ids=str,
)
def test_a_graph_makes_the_updates_of_the_loop(changes, benchmark, digits, monkeypatch):
    "200 images in batches of 32: six full batches an epoch, and one of 8 that is not replayed."
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    recipe = replace(SHORT, epochs=3, warmup=1, milestones=(2,), **changes)

    def trained():
        torch.manual_seed(0)
        network = create("resnet8", 10).cuda()
        history = train(network, digits.train.subset(200), recipe)
        return network.state_dict(), history

    ours, history = trained()
    assert history.how == "one graph per update"
    monkeypatch.setattr("supermix.training.loop._why_eager", lambda *_: "for comparison")
    eager, expected = trained()
    assert expected.how == "one by one (for comparison)"
    assert history.loss == pytest.approx(expected.loss, rel=5e-2) and [row["lr"] for row in history.rows] == (
        pytest.approx([row["lr"] for row in expected.rows])
    )
    for name, tensor in eager.items():
        assert (ours[name] - tensor).float().norm() <= 0.1 * tensor.float().norm() + 1e-2, name


def test_the_first_replays_are_near_to_the_bit(digits, monkeypatch):
    "In float32 without TF32, before rounding has grown: a wrong batch, rate or momentum would show at once."
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    recipe = replace(SHORT, epochs=1, batch_size=32, milestones=())

    def losses():
        torch.manual_seed(0)
        network, found = create("resnet8", 10).cuda(), []
        objective = Noting(found)
        train(network, digits.train.subset(256), recipe, objective)
        return torch.stack(found).cpu()

    class Noting(Objective):
        def __init__(self, found):
            super().__init__()
            self.found = found

        def forward(self, network, batch):
            return label_objective(network, batch)

        def capturable(self, epoch):
            return True

        def after_step(self, network):
            self.found.append(network.head.weight.detach().clone())

    ours = losses()
    monkeypatch.setattr("supermix.training.loop._why_eager", lambda *_: "for comparison")
    assert ours.shape[0] == 8
    torch.testing.assert_close(ours, losses(), rtol=1e-3, atol=1e-4)


REPLAYED = {
    "kd": ("kd", None, {}),
    "views looked up": ("kd", None, {"views": 2}),
    "moved mixes": ("kd", 2, {}),
    "unmoved mixes": ("kd", None, {"views": 2}),
    "no teacher": (Terms(ce=1.0, mixed_kd=0.9), None, {}),
}


@pytest.mark.parametrize("case", REPLAYED)
def test_a_graph_distils(case, digits, there, monkeypatch):
    method, pad, changes = REPLAYED[case]
    images = digits.train.subset(200)
    stock = make_mixes(there, images, 100, mixed_pad=pad) if "mixes" in case or case == "no teacher" else None

    def trained():
        torch.manual_seed(0)
        student = create("resnet8", 10).cuda()
        recipe = replace(SHORT, epochs=3, milestones=(), **changes)
        return distill(None if case == "no teacher" else there, student, images, method, stock, recipe)

    history = trained()
    assert history.how == "one graph per update"
    monkeypatch.setattr("supermix.training.loop._why_eager", lambda *_: "for comparison")
    assert history.loss == pytest.approx(trained().loss, rel=5e-2)


def test_a_replayed_run_goes_on(digits, tmp_path):
    def go(folder):
        torch.manual_seed(0)
        network = create("resnet8", 10).cuda()
        history = train(network, digits.train.subset(200), replace(SHORT, epochs=3), folder=folder)
        return network.state_dict(), history

    whole, history = go(tmp_path)
    checkpoints(tmp_path)[-1].unlink()  # as if it had been killed in the last epoch
    again, other = go(tmp_path)
    assert history.how == other.how == "one graph per update"
    assert other.loss == pytest.approx(history.loss, rel=1e-2)
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, rtol=5e-2, atol=5e-3)


def test_an_update_that_cannot_be_recorded_is_made_one_by_one(digits):
    class Looks(Objective):
        def forward(self, network, batch):
            loss = label_objective(network, batch)
            return loss if loss.item() < 1e9 else 2 * loss

        def capturable(self, epoch):
            return True

    before = torch.cuda.current_stream()
    history = train(create("resnet8", 10).cuda(), digits.train.subset(200), SHORT, Looks())
    assert "the recording failed" in history.how and len(history.rows) == 2
    assert torch.cuda.current_stream() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_graph_is_recorded_on_the_networks_gpu(digits):
    "Also where another GPU is the current one, and has recorded a graph before."
    losses = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        network = create("resnet8", 10).to(device)
        history = train(network, digits.train.subset(200), replace(SHORT, epochs=3))
        assert history.how == "one graph per update" and torch.cuda.current_device() == 0
        losses.append(history.loss)
    assert losses[0] == pytest.approx(losses[1], rel=5e-2)
    searches = [search(pretrained("digits").to(device), digits.train) for device in ("cuda:0", "cuda:1")]
    assert [engine.how for engine, _ in searches] == ["one graph per pass"] * 2
    (_, first), (_, second) = searches
    assert len(second.index) > 0.9 * len(first.index)


def test_a_replayed_run_that_blows_up_says_so(digits, tmp_path):
    with pytest.raises(FloatingPointError, match="try a lower learning rate"):
        train(
            create("resnet8", 10).cuda(),
            digits.train.subset(256),
            replace(SHORT, epochs=4, lr=1e8),
            folder=tmp_path,
        )


def test_memory_stays_the_same_over_epochs(digits):
    "Graph and tables are made once."
    found = []

    class Watching(Objective):
        def forward(self, network, batch):
            return label_objective(network, batch)

        def capturable(self, epoch):
            return True

        def begin_epoch(self, network, epoch):
            found.append(torch.cuda.memory_reserved())

    train(create("resnet8", 10).cuda(), digits.train.subset(320), replace(SHORT, epochs=12), Watching())
    assert found[-1] == found[3]


def test_what_is_not_replayed_says_why(digits, there):
    def how(method="kd", mixer=None, **changes):
        images = digits.train.subset(200)
        return distill(there, create("resnet8", 10).cuda(), images, method, mixer, replace(SHORT, **changes)).how

    assert how("crd") == "one by one (the objective is not capturable)"
    assert how("kd", "mixup") == "one by one (the objective is not capturable)"
    assert how(optimizer="adamw", lr=0.001) == "one by one (adamw is not recorded)"
    assert how(batch_size=128) == "one by one (fewer than four full batches)"


def test_bfloat16_is_measured(digits):
    assert 0.5 < measure_bfloat16("cuda") < 20
