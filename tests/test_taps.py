"Contracts of taps: right maps and gradients, no trace left, the plan true for CNN families of timm and torchvision."
import copy
import random
import warnings

import numpy as np
import pytest
import timm
import torch
from torch import nn

from fmce_fastai.util.state import hook_count, unwrap
from fmce_fastai.maps.plan import find_backbone, Tap, TapError, TapPlan
from fmce_fastai.maps.pool import pool_map
from fmce_fastai.maps.tap import FeatureTap
from fmce_fastai.maps.probe import probe_input
from fmce_fastai.maps.find import tap_plan
from helpers import TinyNet, assert_same, make_model, rng_state, seed_all, weights

pytestmark = [
    # torch scripts, and timm builds, with what torch deprecates
    # fastai asks torchvision for weights in the old way
    pytest.mark.filterwarnings("ignore:The parameter 'pretrained' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:Arguments other than a weight enum or `None`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
]
FAST = ["test_resnet", "resnet10t", "test_efficientnet", "test_convnext", "test_byobnet", "mobilenetv3_small_050", "regnetx_002", "lcnet_035", "repvgg_a0", "ghostnet_050", "dla46_c", "poolformer_s12"]


def maps_by_hand(model, names, x):
    maps, handles = {}, []
    for n in names: handles.append(model.get_submodule(n).register_forward_hook(lambda m, a, o, n=n: maps.__setitem__(n, o)))
    try: out = model(x)
    finally:
        for h in handles: h.remove()
    return maps, out

def state_of(model):
    return weights(model), [(n, m.training) for n, m in model.named_modules()], rng_state(), hook_count(model), [p.requires_grad for p in model.parameters()], [p.grad for p in model.parameters()]

def assert_state(a, b):
    for k in a[0]: assert torch.equal(a[0][k], b[0][k]), k
    assert a[1:] == b[1:]


@pytest.mark.parametrize("arch", [None, "test_resnet", "test_efficientnet"])
@pytest.mark.parametrize("training", [True, False])
def test_maps_and_gradients_equal_those_by_hand(arch, training):
    model = make_model(arch).train(training)
    x = torch.randn(4, 3, 32, 32)
    plan = tap_plan(model, size=32)
    loss = lambda maps, out: sum((m**2).mean()*(i+1) for i, m in enumerate(maps.values())) + out.square().mean()
    found = []
    for how in ("tap", "hand"):
        torch.manual_seed(1)
        m = copy.deepcopy(model)
        if how == "tap":
            tap = FeatureTap(plan).arm(m)
            out = m(x)
            maps = tap.take()
        else: maps, out = maps_by_hand(m, plan.names, x)
        loss(maps, out).backward()
        found.append((maps, [p.grad for p in m.parameters()]))
        assert hook_count(m) == 0
    assert list(found[0][0]) == plan.names and not tap.maps
    for n in plan.names: torch.testing.assert_close(found[0][0][n], found[1][0][n], rtol=0, atol=0)
    for a, b in zip(found[0][1], found[1][1]): torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("arch", FAST)
def test_plan_is_timms_and_shapes_are_true(arch):
    model = make_model(arch)
    seed_all(3)
    for i, m in enumerate(model.modules()): m.training = i % 3 > 0 # modes that must come back one by one
    before = state_of(model)
    plan = tap_plan(model, size=64)
    assert_state(before, state_of(model))
    x = torch.randn(2, 3, 64, 64)
    model.eval()
    maps, _ = maps_by_hand(model, plan.names, x)
    for t in plan: assert t.to_nchw(maps[t.name]).shape == (2, t.channels, *t.grid)
    info = {d["module"]: d["num_chs"] for d in find_backbone(model)[1].feature_info}
    assert plan.source == "forward_intermediates" and all(info[t.name] == t.channels for t in plan)
    grids = [t.grid for t in plan]
    assert len(set(grids)) == len(grids) and grids == sorted(grids, reverse=True)
    depths = [t.depth for t in plan]
    assert depths == sorted(depths) and 0 < depths[0] and depths[-1] <= 1
    assert TapPlan.from_dict(plan.to_dict()) == plan
    # the last map is what the network's own head reads
    features = model.forward_features(x)
    if maps[plan.names[-1]].shape == features.shape: torch.testing.assert_close(maps[plan.names[-1]], features)


@pytest.mark.parametrize("size", [(32, 64), (48, 80)])
def test_images_need_not_be_square(size):
    model = make_model("test_resnet").eval()
    plan = tap_plan(model, size=size)
    tap = FeatureTap(plan).arm(model)
    model(torch.randn(1, 3, *size))
    for t, m in zip(plan, tap.take().values()): assert m.shape == (1, t.channels, *t.grid) and t.grid[0] < t.grid[1]


@pytest.mark.parametrize("model", [lambda: make_model("test_resnet", in_chans=1), lambda: make_model(channels=1), lambda: make_model("test_efficientnet", in_chans=4)])
def test_other_image_channels(model):
    plan = tap_plan(model(), size=32)
    assert plan.probe[1] in (1, 4) and len(plan) > 1


def test_torchvision_in_vision_learner():
    from fastai.vision.learner import create_vision_model
    from torchvision.models import resnet50, shufflenet_v2_x1_0
    for arch, kwargs, channels in [(resnet50, {}, [256, 512, 1024, 2048]), (shufflenet_v2_x1_0, dict(cut=-1), [116, 232, 1024])]:
        model = create_vision_model(arch, 10, pretrained=False, **kwargs)
        plan = tap_plan(model, size=64)
        assert [t.channels for t in plan][-len(channels):] == channels
        maps, _ = maps_by_hand(model.eval(), plan.names, torch.randn(1, 3, 64, 64))
        assert [tuple(m.shape[1:]) for m in maps.values()] == [(t.channels, *t.grid) for t in plan]


def test_timm_in_vision_learner_is_found():
    from fastai.vision.learner import create_timm_model
    model = create_timm_model("test_resnet", 10, pretrained=False)[0]
    bare = make_model("test_resnet")
    assert tap_plan(model, size=32).names == tap_plan(bare, size=32).names and find_backbone(model)[0]
    assert tap_plan(model, ["0.model.layer4"], size=32).names == ["layer4"]


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m), lambda m: nn.DataParallel(nn.DataParallel(m))], ids=["DataParallel", "compile", "twice"])
def test_wrapped_networks(wrap):
    model = make_model("test_resnet").eval()
    wrapped = wrap(model)
    assert unwrap(wrapped) is model and tap_plan(wrapped, size=32) == tap_plan(model, size=32)
    if isinstance(wrapped, nn.DataParallel):
        x = torch.randn(2, 3, 32, 32)
        tap = FeatureTap(tap_plan(model, size=32)).arm(wrapped)
        wrapped(x)
        got, want = tap.take(), maps_by_hand(model, tap.plan.names, x)[0]
        assert all(torch.equal(got[n], want[n]) for n in want) and hook_count(wrapped) == 0


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_chain_is_found_under_any_number_of_wrappers_beside_a_head_that_pools(depth):
    "fastai's body of torchvision's DenseNet is a Sequential in a Sequential, and the head beside it starts with pooling."
    stage = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())
    body = nn.Sequential(stage(3, 4), stage(4, 8), stage(8, 16))
    for _ in range(depth): body = nn.Sequential(body)
    model = nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)))
    assert tap_plan(model, size=32).names == ["0" + ".0"*depth + f".{i}" for i in range(3)]


class Overwritten(nn.Module):
    "The first layer's output is overwritten by the second."
    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3, 2, 1)
    def forward(self, x): return self.last(self.act(self.first(x)))

def test_a_map_that_is_overwritten_in_place():
    seed_all()
    model = Overwritten()
    plan = tap_plan(model, ["first", "last"], size=16)
    assert [t.inplace for t in plan] == [True, False]
    x = torch.randn(2, 3, 16, 16)
    tap = FeatureTap(plan).arm(model)
    out = model(x)
    m = tap.take()["first"]
    assert torch.equal(m, model.first(x)) and bool((m < 0).any())
    (m.sum() + out.sum()).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    z = model.first(x)
    (z.sum() + model.last(z.relu()).sum()).backward()
    for a, p in zip(grads, model.parameters()): torch.testing.assert_close(a, p.grad)


class Fails(nn.Module):
    "A last stage that raises `error` as long as there is one."
    def __init__(self, error): super().__init__(); self.error = error
    def forward(self, x):
        if self.error is not None: raise self.error
        return x

@pytest.mark.parametrize("keep_graph", [True, False])
def test_a_forward_that_raises_leaves_neither_hook_nor_map(keep_graph):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), Fails(None))
    plan = tap_plan(model, ["0", "1"], size=16)
    model[2].error = RuntimeError("out of memory")
    tap = FeatureTap(plan, keep_graph=keep_graph).arm(model)
    with pytest.raises(RuntimeError): model(torch.randn(1, 3, 16, 16))
    assert hook_count(model) == 0 and not tap.maps


def test_ctrl_c_inside_forward_is_healed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Fails(None))
    tap = FeatureTap(tap_plan(model, ["0"], size=16)).arm(model)
    x = torch.randn(1, 3, 16, 16)
    for heal in ("detach", "arm", "forward"):
        model[1].error = KeyboardInterrupt()
        tap.arm(model)
        with pytest.raises(KeyboardInterrupt): model(x)
        model[1].error = None
        if heal == "detach": tap.detach()
        if heal == "arm": tap.arm(model); assert not tap.maps
        if heal != "detach": model(x); tap.take()
        assert hook_count(model) == 0 and not tap.maps


def test_with_form_leaves_nothing():
    model = make_model()
    tap = FeatureTap(tap_plan(model, size=16), keep_graph=False)
    x = torch.randn(2, 3, 16, 16)
    with tap.on(model):
        for _ in range(2): model(x); assert len(tap.take()) == 3
    assert hook_count(model) == 0
    with pytest.raises(KeyError):
        with tap.on(model): model(x); raise KeyError
    assert hook_count(model) == 0


def test_a_module_that_gives_no_map():
    class Flat(nn.Module):
        def forward(self, x): return x.flatten(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), Flat())
    with pytest.raises(TapError, match="not a .B, C, H, W. map"): tap_plan(model, ["1"], size=16)
    tap = FeatureTap(TapPlan("x", "given", [Tap("1", 4, (7, 7), 1.)])).arm(model)
    with pytest.raises(TapError, match=r"returns \(1, 196\), but the tap .1. reads \(B, C, H, W\)"): model(torch.randn(1, 3, 16, 16))
    assert hook_count(model) == 0
    for bad, error in [("layr1", TapError), (["*9"], TapError), (3, TypeError), ([3], TypeError), ([nn.Linear(2, 2)], TapError)]:
        with pytest.raises(error): tap_plan(model, bad, size=16)
    with pytest.raises(TapError, match="nearest names are .*layer4"): tap_plan(make_model("test_resnet"), ["layer5"], size=32)
    with pytest.raises(TypeError): tap_plan("resnet18")
    with pytest.raises(TapError, match="does not run on"): tap_plan(model, x=torch.randn(2, 5, 16, 16))
    assert hook_count(model) == 0


def test_an_empty_container_is_a_module_too():
    "An identity by way of an empty Sequential, as shortcuts often are."
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(), nn.Conv2d(4, 4, 3))
    plan = tap_plan(model, ["1"], size=16)
    tap = FeatureTap(plan).arm(model)
    model(torch.randn(1, 3, 16, 16))
    assert list(tap.take()) == ["1"]
    # inside a wrapper, where only the backbone knows the name
    model.feature_info = [dict(module="1", num_chs=4, reduction=1)]
    assert list(plan.resolve(nn.Sequential(nn.Sequential(model), nn.Flatten()))) == ["1"]


def test_wildcards_and_modules():
    model = make_model("test_resnet")
    assert tap_plan(model, "layer*", size=32).names == ["layer1", "layer2", "layer3", "layer4"]
    assert tap_plan(model, [model.layer3, "layer1"], size=32).names == ["layer1", "layer3"]


def test_pool_map():
    x = torch.randn(2, 3, 20, 5)
    assert pool_map(x).shape == (2, 3, 7, 5) and pool_map(x.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(pool_map(torch.arange(14.).reshape(1, 1, 14, 1))[0, 0, :, 0], torch.arange(.5, 14, 2))


@pytest.mark.parametrize("arch, size", [(None, 16), ("vit", 16), ("test_resnet", 32)])
@pytest.mark.parametrize("keep_graph", [True, False])
def test_a_read_network_trains_to_the_same_bit(arch, size, keep_graph):
    "Outputs, gradients, buffers, modes and random state of five steps, each read, are those without a tap."
    seen = []
    for read in (False, True):
        model = make_model(arch, drop_rate=.2) if arch else make_model()
        tap = FeatureTap(tap_plan(model, size=size), keep_graph=keep_graph)
        opt, steps = torch.optim.SGD(model.parameters(), .1), []
        seed_all(1)
        for _ in range(5):
            x = torch.randn(8, 3, size, size)
            if read: tap.arm(model)
            out = model(x)
            if read:
                maps = tap.take()
                assert len(maps) == len(tap.plan) and all(m.requires_grad == keep_graph for m in maps.values())
            opt.zero_grad()
            out.square().mean().backward()
            opt.step()
            steps.append(out.detach())
        assert hook_count(model) == 0
        seen.append((torch.stack(steps), weights(model), [m.training for m in model.modules()], rng_state()))
    assert torch.equal(seen[0][0], seen[1][0]) and seen[0][2:] == seen[1][2:]
    assert_same(seen[0][1], seen[1][1])
