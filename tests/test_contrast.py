"""CRD against plain loops: the loss, the draws, the memory; checkpoints, and two processes that must stay equal."""

import math
import socket

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from supermix.distillation.contrast import (
    CRD,
    _draw_negatives,
    _estimate_log_z,
    _gather_ranks,
    _similarities,
    _update_memory,
    nce_loss,
)
from supermix.distillation.losses import Outputs


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(B=st.integers(1, 4), K=st.integers(1, 6), T=st.sampled_from([0.07, 0.5]), seed=st.integers(0, 1000))
def test_the_loss_in_plain_loops(B, K, T, seed):
    similarity, n, z = random(seed, B, K + 1).tanh(), 11, 3.5
    expected = 0
    for row in similarity.tolist():
        p = [math.exp(x / T) / z for x in row]
        expected -= math.log(p[0] / (p[0] + K / n)) + sum(math.log((K / n) / (q + K / n)) for q in p[1:])
    ours = nce_loss(similarity, torch.tensor(z, dtype=torch.float64).log(), n, T)
    assert ours.item() == pytest.approx(expected / B, rel=1e-9)


def test_the_loss_is_finite_for_any_similarity():
    for value in (-1.0, 1.0):
        x = torch.full((2, 5), value, requires_grad=True)
        loss = nce_loss(x, torch.tensor(0.0), 10, temperature=0.005)
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all()


def test_the_losss_gradient():
    assert torch.autograd.gradcheck(
        lambda x: nce_loss(x, torch.tensor(1.0).double(), 10, 0.5), random(0, 2, 4).requires_grad_()
    )


@given(n=st.integers(1, 30), K=st.integers(1, 20), number=st.integers(1, 4), seed=st.integers(0, 1000))
def test_negatives_are_of_other_classes(n, K, number, seed):
    g = torch.Generator().manual_seed(seed)
    classes = torch.randint(-1, number, (n,), generator=g)
    labels = torch.randint(0, number, (3,), generator=g)
    drawn = _draw_negatives(labels, classes, K, g)
    assert drawn.shape == (3, K) and drawn.min() >= 0 and drawn.max() < n
    for label, row in zip(labels, drawn):
        if (classes != label).any():
            assert (classes[row] != label).all()


def test_negatives_are_uniform_and_repeatable(seeded):
    classes = torch.arange(12) % 3
    drawn = _draw_negatives(torch.tensor([1]), classes, 80_000, seeded(1))
    assert torch.equal(drawn, _draw_negatives(torch.tensor([1]), classes, 80_000, seeded(1)))
    counts = drawn.flatten().bincount(minlength=12).double()
    assert not counts[classes == 1].any()
    chi2 = ((counts[classes != 1] - 10_000) ** 2 / 10_000).sum()
    assert chi2 < 24.3  # 7 degrees of freedom, 1 in 1000


@pytest.mark.parametrize("n, K", [(7, 50), (900, 2)])  # one matrix product, or rows fetched
def test_similarities_in_plain_loops_and_their_gradient(n, K):
    u, memory = random(0, 3, 5).requires_grad_(), random(1, n, 5)
    chosen = torch.randint(n, (3, K), generator=torch.Generator().manual_seed(2))
    ours = _similarities(u, memory, chosen)
    expected = torch.stack([torch.stack([(u[i] * memory[j]).sum() for j in chosen[i]]) for i in range(3)])
    torch.testing.assert_close(ours, expected)
    weights = random(3, 3, K)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), u)
    memory.zero_()  # it changes between loss and gradient
    torch.testing.assert_close(torch.autograd.grad((ours * weights).sum(), u)[0], wanted)


@given(seed=st.integers(0, 1000), momentum=st.sampled_from([0.0, 0.5, 0.9]))
def test_remembering_in_plain_loops(seed, momentum):
    memory, new = F.normalize(random(seed, 6, 4)), F.normalize(random(seed + 1, 4, 4))
    indices = torch.randint(6, (4,), generator=torch.Generator().manual_seed(seed))
    expected = memory.clone()
    for at in set(indices.tolist()):
        first = indices.tolist().index(at)
        row = momentum * memory[at] + (1 - momentum) * new[first]
        expected[at] = row / math.sqrt(sum(v * v for v in row.tolist()))
    _update_memory(memory, indices, new, momentum)
    torch.testing.assert_close(memory, expected)


def seen(seed, B=6, width=8, graph=False):
    return Outputs(
        [random(seed, B, 4, 2, 2), random(seed + 1, B, 4, 2, 2), random(seed + 2, B, width).requires_grad_(graph)],
        random(seed + 3, B, 3),
    )


def term(images=20, **options):
    torch.manual_seed(0)
    return CRD(seen(0), seen(10, width=5), images, dim=4, **options).double()


LABELS, INDICES = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([3, 1, 4, 15, 9, 2])


def test_the_whole_term_in_plain_loops():
    crd, s, t = term(negatives=7), seen(1), seen(11, width=5)
    memory_s, memory_t = crd.memory_student.clone(), crd.memory_teacher.clone()
    classes = torch.full((20,), -1)
    classes[INDICES] = LABELS
    chosen = _draw_negatives(LABELS, classes, 7, torch.Generator().manual_seed(5))
    us, ut = [
        list(F.normalize(embed(x.features[-1]), dim=1).detach())
        for embed, x in ((crd.embed_student, s), (crd.embed_teacher, t))
    ]
    expected = 0
    for u, memory in ((us, memory_t), (ut, memory_s)):
        e = [[math.exp(float(u[i] @ memory[j]) / 0.07) for j in [INDICES[i], *chosen[i]]] for i in range(6)]
        z = 20 * sum(map(sum, e)) / (6 * 8)
        for row in e:
            p = [v / z for v in row]
            expected -= (math.log(p[0] / (p[0] + 7 / 20)) + sum(math.log((7 / 20) / (q + 7 / 20)) for q in p[1:])) / 6
    loss = crd(s, t, LABELS, INDICES, torch.Generator().manual_seed(5))
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert torch.equal(crd.classes, classes)
    for memory, before, new in ((crd.memory_student, memory_s, us), (crd.memory_teacher, memory_t, ut)):
        after = before.clone()
        for i, at in enumerate(INDICES):
            after[at] = F.normalize(0.5 * before[at] + 0.5 * new[i], dim=0)
        torch.testing.assert_close(memory, after)


def test_gradients_reach_student_and_embeddings_but_not_the_teacher(seeded):
    crd, s, t = term(), seen(1, graph=True), seen(11, width=5, graph=True)
    crd(s, t, LABELS, INDICES, seeded(0)).backward()  # although the memory has changed by now
    assert s.features[-1].grad.abs().sum() > 0 and t.features[-1].grad is None
    assert all(p.grad.abs().sum() > 0 for p in crd.parameters())


def test_z_is_estimated_once(seeded):
    crd = term()
    assert crd.log_z.isinf().all()
    crd(seen(1), seen(11, width=5), LABELS, INDICES, seeded(0))
    first = crd.log_z.clone()
    crd(seen(2), seen(12, width=5), LABELS, INDICES, seeded(0))
    assert first.isfinite().all() and torch.equal(crd.log_z, first)


def test_nothing_is_written_in_evaluation_mode(seeded):
    crd = term().eval()
    before = {k: v.clone() for k, v in crd.state_dict().items()}
    one, two = (crd(seen(1), seen(11, width=5), LABELS, INDICES, seeded(0)) for _ in range(2))
    assert torch.equal(one, two) and all(torch.equal(v, before[k]) for k, v in crd.state_dict().items())


def test_a_run_that_goes_on_from_a_checkpoint_is_the_same(seeded, tmp_path):
    def step(crd, i):
        return crd(seen(i), seen(10 + i, width=5), LABELS, INDICES, seeded(i)).item()

    through, first = term(), term()
    for i in range(2):
        assert step(through, i) == step(first, i)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(99)
    later = CRD(seen(0), seen(10, width=5), 20, dim=4).double()
    later.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for i in (2, 3):
        assert step(through, i) == step(later, i)


def test_small_sets_and_mistakes():
    assert CRD(seen(0), seen(1), 20).negatives == 19
    assert CRD(seen(0), seen(1), 20_000).negatives == 16_384
    with pytest.raises(ValueError, match="at least 2 training images to tell apart, got 1"):
        CRD(seen(0), seen(1), 1)


def test_lower_precision_of_what_is_seen():
    torch.manual_seed(0)
    crd = CRD(seen(0), seen(10, width=5), 20, dim=4)
    s, t = (Outputs([f.float() for f in x.features], x.logits) for x in (seen(1), seen(11, width=5)))
    loss = crd(s, t, LABELS, INDICES, torch.Generator().manual_seed(0))
    assert loss.dtype == torch.float32 and loss.isfinite()


def work(rank, port, folder):
    "One of two processes: its part of a batch, then what its memory holds."
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    part = slice(0, 4) if rank == 0 else slice(4, 6)  # parts of different lengths
    crd, losses = term(negatives=7), []
    for i in range(3):
        s, t = ([f[part] for f in x.features] for x in (seen(i), seen(10 + i, width=5)))
        losses.append(
            crd(
                Outputs(s, None), Outputs(t, None), LABELS[part], INDICES[part], torch.Generator().manual_seed(rank)
            ).item()
        )
    torch.save(
        (crd.state_dict(), losses, _gather_ranks(torch.arange(3)[part.start // 2 :] + 10 * rank)), f"{folder}/{rank}.pt"
    )
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_keep_equal_memories(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(tmp_path)), nprocs=2)
    (one, losses_one, gathered), (two, losses_two, _) = (
        torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2)
    )
    assert all(torch.equal(v, two[k]) for k, v in one.items()) and one["log_z"].isfinite().all()
    assert gathered.tolist() == [0, 1, 2, 12]
    assert losses_one != losses_two
    alone = term(negatives=7)  # what one process would remember of the whole batches
    for i in range(3):
        alone(seen(i), seen(10 + i, width=5), LABELS, INDICES, torch.Generator().manual_seed(0))
    for name in ("memory_student", "memory_teacher", "classes"):
        torch.testing.assert_close(one[name], alone.state_dict()[name])


def test_z_is_n_times_the_mean():
    x = random(0, 5, 4).tanh()
    assert _estimate_log_z(x, 30, 0.5).exp().item() == pytest.approx(
        30 * sum(math.exp(v / 0.5) for v in x.flatten().tolist()) / 20, rel=1e-12
    )


@pytest.mark.slow
def test_compiled_it_has_the_same_gradient():
    def gradients(wrap):
        torch.manual_seed(0)
        student, teacher = (Outputs([torch.randn(32, 64)], torch.randn(32, 10)) for _ in range(2))
        term, indices = CRD(student, teacher, 80).train(), torch.randperm(80)[:32]
        wrap(lambda s, t: 2 * term(s, t, torch.arange(32) % 10, indices, torch.Generator().manual_seed(1)))(
            student, teacher
        ).backward()
        return [p.grad for p in term.parameters()] + [term.memory_student, term.memory_teacher]

    torch.testing.assert_close(gradients(torch.compile), gradients(lambda f: f), rtol=1e-4, atol=1e-5)
