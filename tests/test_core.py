"""Files that are whole or absent, tensors that come back as they went, and models that are left as they were."""

import multiprocessing
import os
import signal
import time
from itertools import count

import pytest
import torch
from safetensors.torch import save as to_safetensors
from supermix.core import (
    evaluating,
    file_hash,
    fitting,
    load_tensors,
    lookup,
    plain_state,
    save_tensors,
    unwrapped,
    weights_hash,
    write_atomic,
)
from torch import nn
from torchvision.transforms import v2


@pytest.mark.parametrize(
    "name, message",
    [
        ("resnet21", r"^Unknown network 'resnet21'\. Did you mean 'resnet20'\? Known: resnet20, wrn_40_2\.$"),
        ("vgg", r"^Unknown network 'vgg'\. Known: resnet20, wrn_40_2\.$"),
        (20, "^Unknown network 20"),
        ("ResNet20", "Did you mean 'resnet20'"),
        ("40_2", "Did you mean 'wrn_40_2'"),
    ],
)
def test_lookup_shows_what_there_is(name, message):
    with pytest.raises(ValueError, match=message):
        lookup({"resnet20": 1, "wrn_40_2": 2}, name, "network")


def test_a_file_of_torch_save_is_named(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "teacher.pt")
    with pytest.raises(ValueError, match=r"teacher.pt is not a whole safetensors file .* written by `torch.save`"):
        load_tensors(tmp_path / "teacher.pt")


SIZE = 2_000_000


def write_for_ever(path):
    for i in count():
        write_atomic(path, bytes([i % 256]) * SIZE)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_writer_leaves_no_torn_file(tmp_path):
    path = tmp_path / "result"
    for n in range(8):
        writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(path,))
        writer.start()
        try:
            seen, end = set(), time.monotonic() + 0.15 + 0.013 * n  # another moment of its loop each time
            # a reader beside it sees whole files only, too; and several, so that it is really written to all the while
            while time.monotonic() < end or len(seen) < 4:
                assert time.monotonic() < end + 60
                content = path.read_bytes() if path.exists() else None
                assert content is None or content == content[:1] * SIZE
                seen.add(content and content[0])
        finally:
            writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        content = path.read_bytes()
        assert content == content[:1] * SIZE


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_atomic(tmp_path / "folder", b"a folder is in the way")
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "file", "text, not bytes")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"] and not list((tmp_path / "folder").iterdir())


def test_a_written_file_may_be_read_by_those_who_may_read_the_folder(tmp_path):
    before = os.umask(0o022)
    try:
        assert write_atomic(tmp_path / "new" / "file", b"").stat().st_mode & 0o777 == 0o644
    finally:
        assert os.umask(before) == 0o022  # the umask itself is as it was


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).view(2, 3).T,
        torch.randn(3, dtype=torch.float64),
        torch.randn(3).bfloat16(),
        torch.tensor(7),
        torch.tensor([True, False]),
        torch.zeros(0, 4),
        torch.ones(1).expand(5),
        torch.arange(3.0).requires_grad_(),
    ],
    ids=lambda t: f"{t.dtype}{tuple(t.shape)}",
)
def test_tensors_come_back_as_they_went(tensor, tmp_path):
    card = {"accuracy": 75.61, "classes": ["ä", "b"], "nested": {"none": None}}
    tensors, read = load_tensors(save_tensors(tmp_path / "t.safetensors", {"a name": tensor}, card))
    assert read == card and list(tensors) == ["a name"]
    torch.testing.assert_close(tensors["a name"], tensor.detach(), rtol=0, atol=0)


WHOLE = to_safetensors({"a": torch.arange(100.0)}, {"card": "{}"})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        WHOLE[:4],
        WHOLE[:40],
        WHOLE[:-1],
        WHOLE + b"more",
        b"\xff" * 100,
        b"<html>404</html>" * 10,
        to_safetensors({"a": torch.zeros(1)}, {"card": "{cut off"}),
        to_safetensors({"a": torch.zeros(1)}, {"card": "[]"}),
        to_safetensors({"a": torch.zeros(1)}, {"card": "[" * 100_000}),
    ],
    ids=[
        "empty",
        "length cut",
        "header cut",
        "data cut",
        "too long",
        "noise",
        "a web page",
        "broken card",
        "a list",
        "lists within lists",
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(content, tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="damaged.safetensors"):
        load_tensors(tmp_path / "damaged.safetensors")


def test_file_hash_is_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # the example of FIPS 180-2, appendix B.1
    assert file_hash(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_evaluating_restores_every_part_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm2d(1), nn.Dropout())).train()
    model[1][0].eval()
    modes = [part.training for part in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(part.training for part in model.modules())
        raise KeyError
    assert [part.training for part in model.modules()] == modes == [True, True, True, False, True]


def compiled(module):
    return torch.compile(module, backend="eager")  # needs no C++ compiler


WRAPPERS = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "both": lambda net: compiled(nn.DataParallel(net)),
    "a compiled part": lambda net: nn.Sequential(compiled(net[0]), net[1]),
    "a part in both": lambda net: nn.Sequential(net[0], nn.DataParallel(compiled(net[1]))),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_changes_neither_names_nor_hash(name):
    "A part that is itself called `module` keeps its name."
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential())
    net[1].add_module("module", nn.Linear(3, 2))
    wrapped = WRAPPERS[name](net)
    assert wrapped.state_dict().keys() != net.state_dict().keys() == plain_state(wrapped).keys()
    assert weights_hash(wrapped) == weights_hash(net) and plain_state(net).keys() == net.state_dict().keys()
    torch.testing.assert_close(plain_state(wrapped), dict(net.state_dict()), rtol=0, atol=0)
    if "part" not in name:
        assert unwrapped(wrapped) is net
    with torch.no_grad():
        net[1].module.weight[0, 0] += 1
    before = weights_hash(wrapped)
    with torch.no_grad():
        net[1].module.weight[0, 0] -= 1
    assert weights_hash(wrapped) != before


def grey():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())


@pytest.mark.parametrize(
    "network, images, message",
    [
        (
            grey(),
            torch.zeros(2, 3, 8, 8),
            r"student does not take images \(2, 3, 8, 8\) of torch.float32: .* takes 1 channel, and the images have 3: "
            r".*nn.Sequential\(v2.Grayscale\(\), network\)",
        ),
        (
            nn.Conv2d(4, 2, 3),
            torch.zeros(2, 3, 8, 8),
            "takes 4 channels, and the images have 3: make a network for 3",
        ),
        (grey().half(), torch.zeros(2, 1, 8, 8), r"weights are torch.float16: pass `network.float\(\)`"),
        (grey(), torch.zeros(2, 1, 8, 8).double(), r"weights are torch.float32: pass `images.float\(\)`"),
        (grey(), torch.zeros(2, 1, 8, 8).half(), r"weights are torch.float32: pass `images.float\(\)`"),
        (grey(), torch.zeros(2, 1, 8, 8).byte(), r"Pass normalised floats, as `Info.normalize`"),
        (nn.Linear(5, 2), torch.zeros(2, 3, 8, 8), "does not take images"),
    ],
)
def test_a_network_that_does_not_take_the_images(network, images, message):
    with pytest.raises(ValueError, match=f"(?s){message}"), fitting(network, images, "student"):
        network(images)


def test_what_helps_a_network_of_one_channel_does_help():
    images = torch.rand(2, 3, 8, 8)
    assert nn.Sequential(v2.Grayscale(), grey())(images).shape == (2, 72)
    with pytest.raises(RuntimeError, match="mine"), fitting(torch.relu, images):
        raise RuntimeError("mine")
