"""What every network of the registry must do: gradients, features, pre-activations, layouts, precisions, sizes,
compilation."""

import copy
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from supermix.models.blocks import draw_network
from supermix.models.hooked import Hooked, imagenet_resnet
from supermix.models.mobilenetv2 import MobileNetV2
from supermix.models.resnet import BottleneckResNet, ResNet
from supermix.models.shakeshake import ShakeBlock, ShakeShake, _shake
from supermix.models.shufflenetv1 import ShuffleNetV1
from supermix.models.shufflenetv2 import ShuffleNetV2
from supermix.models.vgg import VGG
from supermix.models.wrn import WRN
from supermix.zoo import create, names
from torch import nn

SMALL = {  # a family each, small enough to run often
    "resnet": lambda: ResNet(10, depth=8),
    "bottleneck": lambda: BottleneckResNet(10, (1, 2), (8, 16, 32)),
    "wrn": lambda: WRN(10, 10, 1),
    "vgg": lambda: VGG(10, widths=(8, 8, 16, 16, 16)),
    "mobilenetv2": lambda: MobileNetV2(10, 0.25, 64),
    "shufflenetv1": lambda: ShuffleNetV1(10, (60, 120), (2, 2)),
    "shufflenetv2": lambda: ShuffleNetV2(10, (16, 32), (2, 2), 32),
    "shakeshake": lambda: ShakeShake(10, 8, 8),
    "imagenet_resnet": lambda: imagenet_resnet(10),
    "timm": lambda: Hooked(
        timm.create_model("regnetx_002", num_classes=10, zero_init_last=False),
        "stem",
        ["s1", "s2", "s3", "s4"],
        "head.fc",
    ),
}
LINEAR_ENDS = {"mobilenetv2", "shakeshake"}  # nothing of a ReLU stands at a stage's end
LARGE = {
    "wrn_28_10a",
    "shakeshake26_2x96d",
    "resnet50",
    "resnet32x4",
    "imagenet_resnet34",
    "imagenet_resnet50",
    "imagenet_resnet18",
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=SMALL)
def family(request):
    return request.param


@pytest.fixture
def network(family):
    "A network of the family, with averages of norms that fit: as if trained."
    net = SMALL[family]()
    for _ in range(3):
        net(torch.randn(16, 3, 32, 32))
    return net.eval()


@pytest.mark.parametrize("name", names())
def test_every_parameter_of_every_network_gets_a_gradient(name):
    network = create(name)
    size = 32 if name not in LARGE else 16
    network(torch.randn(4, 3, size, size)).square().mean().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []
    network.eval()  # a bias in front of a norm has a gradient of 0 in training, and another one here
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    network.zero_grad()
    F.cross_entropy(network(torch.randn(4, 3, size, size)) / 1e3, torch.arange(4)).backward()
    assert [n for n, p in network.named_parameters() if not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("name", names())
def test_layout_and_precision_leave_the_logits(name):
    network, size = create(name, 10), 32 if name not in LARGE else 16
    for _ in range(2):
        network(torch.randn(8, 3, size, size))  # averages of norms as after training
    network, x = network.eval(), torch.randn(2, 3, size, size)
    with torch.no_grad():
        want = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(x)
        laid_out = network.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert (laid_out - want).norm() <= 1e-4 * want.norm()
    assert rough.dtype == torch.bfloat16 and (rough.float() - want).norm() <= 0.1 * want.norm()


def test_features_are_one_contract(network, family):
    x = torch.randn(3, 3, 32, 40)
    with torch.no_grad():
        features, logits = network.features(x), network(x)
    assert all(f.ndim == 4 and len(f) == 3 for f in features[:-1]) and features[-1].ndim == 2
    assert len(features) == 2 + len([name for name in network.parts() if name.startswith("stage")])
    head = network.parts()["head"]
    torch.testing.assert_close(head(features[-1]), logits)
    assert sum(p.numel() for part in network.parts().values() for p in part.parameters()) == sum(
        p.numel() for p in network.parameters()
    )


@pytest.mark.parametrize("training", [False, True])
def test_preactivations_come_before_the_relu(network, family, training):
    if family == "shakeshake" and training:
        pytest.skip("two passes are shaken differently")
    network.train(training)
    x, twin = torch.randn(3, 3, 32, 32), copy.deepcopy(network)
    with torch.no_grad():
        features, before = network.features(x), twin.preactivations(x)
    torch.testing.assert_close(before[0], features[0])
    torch.testing.assert_close(before[-1], features[-1])
    # the norms' averages moved once, as in one pass
    torch.testing.assert_close(twin.state_dict(), network.state_dict())
    for u, h in zip(before[1:-1], features[1:-1], strict=True):
        assert u.shape == h.shape and (u < 0).any()
        if family in LINEAR_ENDS:
            torch.testing.assert_close(u, h)
        elif family != "wrn":
            torch.testing.assert_close(u.relu(), h)


def test_the_pre_activation_of_a_wide_network_is_its_next_norm():
    network, heard = SMALL["wrn"]().eval(), []
    for norm in [network.stages[1][0].norm1, network.stages[2][0].norm1, network.neck[0]]:
        norm.register_forward_hook(lambda m, args, output: heard.append(output.clone()))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = network.preactivations(x)
    for want, u in zip(heard, before[1:-1], strict=True):
        torch.testing.assert_close(u, want)


def test_gradients_reach_features(network, family):
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    for f in network.features(x):
        assert torch.autograd.grad(f.square().sum(), x, retain_graph=True)[0].abs().sum() > 0
    for f in network.preactivations(x):
        assert torch.autograd.grad(f.square().sum(), x, retain_graph=True)[0].abs().sum() > 0


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: ResNet(depth=21), "6n \\+ 2"),
        (lambda: WRN(depth=20), "6n \\+ 4"),
        (lambda: ShakeShake(depth=20, width=4), None),
        (lambda: ShakeShake(depth=21), "6n \\+ 2"),
        (lambda: VGG(depth=9), "Unknown depth 9"),
        (lambda: imagenet_resnet(depth=20), "Unknown depth 20"),
        (
            lambda: VGG(10)(torch.zeros(1, 3, 4, 40)),
            r"VGG expected images \(B, 3, H, W\) of at least 8×8 pixels, got \(1, 3, 4, 40\)",
        ),
        (
            lambda: ResNet(10, 8)(torch.zeros(1, 1, 28, 28)),
            r"ResNet expected images \(B, 3, H, W\), got \(1, 1, 28, 28\)",
        ),
        (lambda: ResNet(10, 8).features(torch.zeros(3, 28, 28)), r"got \(3, 28, 28\)"),
        (lambda: Hooked(torchvision.models.resnet18(), "maxpool", ["layer"], "fc"), "Unknown module of ResNet 'layer'"),
    ],
)
def test_what_cannot_be_built_or_seen(act, message):
    if message is None:
        act()
        return
    with pytest.raises(ValueError, match=message):
        act()


class Odd(nn.Module):
    "A network with a part that never runs, a part that gives a pair, and a head."

    def __init__(self):
        super().__init__()
        self.idle, self.stem, self.pair, self.head = (
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(3, 4, 1),
            nn.MaxPool2d(2, return_indices=True),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        return self.head(self.pair(self.stem(x))[0].mean((2, 3)))


@pytest.mark.parametrize(
    "stem, stages, message",
    [
        ("stem", ["idle"], "Expected idle to be called when Odd runs"),
        ("idle", ["stem"], "Expected idle to be called"),
        ("stem", ["pair"], "Expected a tensor at 'pair', got a tuple"),
    ],
)
def test_a_module_that_says_nothing_or_no_tensor_is_named(stem, stages, message):
    for method in ("features", "preactivations"):
        wrapped = Hooked(Odd(), stem, stages, "head")
        with pytest.raises(ValueError, match=message):
            getattr(wrapped, method)(torch.zeros(1, 3, 4, 4))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in wrapped.modules())


def test_two_threads_hear_their_own_images():
    network = Hooked(torchvision.models.resnet18(num_classes=3), "maxpool", ["layer1", "layer2"], "fc").eval()
    wrong = []

    def hear(n):
        for _ in range(20):
            for method in (network.features, network.preactivations):
                with torch.no_grad():
                    wrong.extend(f.shape for f in method(torch.zeros(n, 3, 32, 32)) if len(f) != n)

    threads = [threading.Thread(target=hear, args=(n,)) for n in (1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_layer_that_is_changed_in_place_is_found_out():
    wrong = Hooked(torchvision.models.resnet18(num_classes=3), "bn1", ["layer1"], "fc").eval()
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode(), pytest.raises(ValueError, match="'bn1' is changed in place"):
            wrong.features(torch.randn(1, 3, 32, 32))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in wrong.modules())


def test_a_drawing_of_every_family(network, family):
    figure = draw_network(network)
    text = " ".join(t.get_text() for t in figure.axes[0].texts)
    assert "stage 2" in text and f"{sum(p.numel() for p in network.parameters()):,}" in figure.axes[0].get_title()
    figure.clear()


# Shake-Shake


def test_shaking_takes_its_value_from_alpha_and_its_gradient_from_beta():
    a, b = (torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    alpha, beta = torch.rand(2, 4, 1, 1, 1, dtype=torch.float64)
    y, weights = _shake(a, b, alpha, beta), torch.randn(4, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(y, alpha * a + (1 - alpha) * b)
    da, db = torch.autograd.grad((y * weights).sum(), (a, b))
    torch.testing.assert_close(da, beta * weights)
    torch.testing.assert_close(db, (1 - beta) * weights)
    assert (da - alpha * weights).abs().max() > 0.05


def test_a_block_draws_per_image_and_not_in_evaluation():
    block, x = ShakeBlock(4, 4), torch.randn(1, 4, 5, 5).expand(64, -1, -1, -1)
    block.eval().training = True
    with torch.no_grad():
        shares = (
            ((block(x) - x - block.second(x)) / (block.first(x) - block.second(x)))
            .median(3)
            .values.median(2)
            .values.median(1)
            .values
        )
        assert (
            len(shares.unique()) == 64
            and shares.min() > -1e-3
            and shares.max() < 1 + 1e-3
            and 0.35 < shares.mean() < 0.65
        )
        block.training = False
        torch.testing.assert_close(block(x), x + (block.first(x) + block.second(x)) / 2)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_shaking_under_autocast(device):
    network, x = ShakeShake(10, 8, 8).to(device), torch.randn(8, 3, 32, 32, device=device)
    with torch.autocast(device, torch.bfloat16):
        loss = F.cross_entropy(network(x).float(), torch.arange(8, device=device))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


WORKER = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from supermix.models.shakeshake import ShakeShake
torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
network = DistributedDataParallel(ShakeShake(10, 8, 4))
torch.manual_seed(1 + dist.get_rank())
for _ in range(2):
    with torch.autocast("cpu", torch.bfloat16): loss = network(torch.randn(4, 3, 16, 16)).float().square().mean()
    network.zero_grad()
    loss.backward()
gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
both = [torch.zeros_like(gradient) for _ in range(2)]
dist.all_gather(both, gradient)
assert torch.equal(*both) and gradient.abs().sum() > 0
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_shaking_in_two_processes(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        tmp_path / "worker.py",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler here")
def test_compiled_networks_give_the_same(network, family):
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want, got = network(x), torch.compile(network)(x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


# ---- channels last and tokens, of other libraries


def by_hand(network, x, names):
    "A torchvision network's maps, from its own parts; (B, H, W, C) for Swin, tokens for ViT."
    if isinstance(network, torchvision.models.VisionTransformer):
        tokens = network._process_input(x)
        found = [network.conv_proj(x)]
        h = torch.cat([network.class_token.expand(len(x), -1, -1), tokens], 1) + network.encoder.pos_embedding
        for name, layer in network.encoder.layers.named_children():
            h = layer(h)
            if f"encoder.layers.{name}" in names:
                found.append(torch.zeros_like(found[0]))
                for i in range(4):  # place by place
                    for j in range(4):
                        found[-1][:, :, i, j] = h[:, 1 + 4 * i + j]
        return found
    maps = [network.features[: int(name.rpartition(".")[2]) + 1](x) for name in names]
    return [f.permute(0, 3, 1, 2) for f in maps] if hasattr(network, "permute") else maps


FEATURES = [f"features.{i}" for i in (0, 1, 3, 5, 7)]
TORCHVISION = {
    "swin_t": ({}, FEATURES, "head"),
    "swin_v2_t": ({}, FEATURES, "head"),
    "convnext_tiny": ({}, FEATURES, "classifier.2"),
    "vit_b_16": (
        {"image_size": 64},
        ["conv_proj", *(f"encoder.layers.encoder_layer_{i}" for i in (2, 5, 11))],
        "heads.head",
    ),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_transformers_give_maps(name):
    options, names, head = TORCHVISION[name]
    network = getattr(torchvision.models, name)(num_classes=10, **options).eval()
    wrapped, x = Hooked(network, names[0], names[1:], head), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for method in (wrapped.features, wrapped.preactivations, wrapped.features):
            *maps, vector = method(x)
            for got, want in zip(maps, by_hand(network, x, names), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(network.get_submodule(head)(vector), network(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in wrapped.modules())


TIMM = {
    "swin_tiny_patch4_window7_224": ({"img_size": (64, 96), "window_size": 2}, "patch_embed", "layers.{}", "head.fc"),
    "convnext_atto": ({}, "stem", "stages.{}", "head.fc"),
    "vit_tiny_patch16_224": ({"img_size": (64, 96)}, "patch_embed", "blocks.{}", "head"),
    "vit_small_patch16_dinov3": ({"img_size": (64, 96)}, "patch_embed", "blocks.{}", "head"),  # four registers
    "deit_tiny_distilled_patch16_224": ({"img_size": (64, 96)}, "patch_embed", "blocks.{}", "head"),  # two tokens
    "mixer_s16_224": ({"img_size": 96}, "stem", "blocks.{}", "head"),  # none
}


@pytest.mark.parametrize("name", TIMM)
def test_timms_own_maps(name):
    "The oracle: what timm's networks say of themselves, as (B, C, H, W)."
    options, stem, stages, head = TIMM[name]
    network = timm.create_model(name, num_classes=10, **options).eval()
    x = torch.randn(2, 3, 96 if name.startswith("mixer") else 64, 96)
    which = [0, 3] if "blocks" in stages else [0, 1, 2, 3]
    wrapped = Hooked(network, stem, [stages.format(i) for i in which], head)
    with torch.no_grad():
        *maps, vector = wrapped.features(x)
        want = network.forward_intermediates(x, indices=which, norm=False, intermediates_only=True, output_fmt="NCHW")
    for got, theirs in zip(maps[1:], want, strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-4)
    assert maps[0].shape[2] * 96 == maps[0].shape[3] * x.shape[2] and vector.ndim == 2


class Square(nn.Module):
    "Maps that are as wide as they have channels, channels first or last, from layers that do not tell (`quiet`)."

    def __init__(self, last: bool, quiet: bool):
        super().__init__()
        self.last, self.stem, self.stage = last, nn.Conv2d(3, 8, 1), nn.Identity()
        self.next = nn.Identity() if quiet else nn.Linear(8, 8) if last else nn.Conv2d(8, 8, 1)
        self.first, self.head = nn.Identity(), nn.Linear(8, 2)

    def forward(self, x):
        h = self.stem(x)
        h = self.next(self.stage(self.first((h.permute(0, 2, 3, 1) if self.last else h).clone())))
        return self.head(h.mean((1, 2) if self.last else (2, 3)))


@pytest.mark.parametrize("last", [False, True])
def test_a_map_as_wide_as_its_channels(last):
    x = torch.randn(2, 3, 8, 8)
    told, quiet = Square(last, False), Square(last, True)
    h = told.stem(x)
    torch.testing.assert_close(Hooked(told, "stem", ["stage"], "head").features(x)[1], h)
    layout = "BHWC" if last else "BCHW"
    torch.testing.assert_close(Hooked(quiet, "first", ["stage"], "head", layout=layout).features(x)[1], quiet.stem(x))
    unsaid = Hooked(quiet, "first", ["stage"], "head").features(x)[1]  # nobody tells: as convolutional networks have it
    torch.testing.assert_close(unsaid, quiet.stem(x).permute(0, 2, 3, 1) if last else quiet.stem(x))


class Tokens(nn.Module):
    "Tokens (B, L, C) or (B, C, L) that no layer tells of."

    def __init__(self, last: bool):
        super().__init__()
        self.last, self.stem, self.stage, self.head = last, nn.Conv2d(3, 5, 4, 4), nn.Identity(), nn.Linear(5, 2)

    def forward(self, x):
        h = self.stage((self.stem(x).flatten(2).transpose(1, 2) if self.last else self.stem(x).flatten(2)).clone())
        return self.head(h.mean(1 if self.last else 2))


@pytest.mark.parametrize("last", [False, True])
def test_tokens_of_which_nothing_is_known(last):
    network, x = Tokens(last), torch.randn(2, 3, 8, 12)
    with pytest.raises(ValueError, match=r"Cannot tell the channels' axis of 'stage', .* pass layout="):
        Hooked(network, "stem", ["stage"], "head").features(x)
    known = Hooked(network, "stem", ["stage"], "head", layout="BLC" if last else "BCL")
    torch.testing.assert_close(known.features(x)[1], network.stem(x))
    with pytest.raises(ValueError, match="grid of the images' proportions, 10×12"):
        known.features(x[:, :, [0, 0, *range(8)]])


def test_what_stands_in_front_of_the_head():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"Expected vectors \(B, width\) in front of '2', got \(1, 4, 8, 8\)"):
        Hooked(network, "0", ["1"], "2").features(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="Unknown layout 'NHWC'. Did you mean 'BHWC'"):
        Hooked(network, "0", ["1"], "2", layout="NHWC")
