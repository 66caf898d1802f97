"Grad-CAM against an independent formula, on every layout; nothing is left behind; the measures of planted maps; copies are trained on the same batches."
import copy
import sys
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the package's own dependencies deprecate at import
    import pytorch_grad_cam.metrics.road

from fmce_fastai.report.cam import cam_plan, CamError, grad_cam, predicted
from fmce_fastai.report.cam_measures import cam_entropy, cam_removal, cam_top_share
from fmce_fastai.study.alphas import fine_tune_alphas
from fmce_fastai.study.cam_statistics import cam_statistics
from fmce_fastai.study.cams import compare_cams
from fmce_fastai.util.state import hook_count
from fmce_fastai.maps.intermediates import randomize_scales
from helpers import RaiseAt, TinyNet, assert_same, make_learner, rng_state, tensor_dls, tensor_learner, weights


def tiny(seed=0):
    torch.manual_seed(seed)
    net = randomize_scales(TinyNet(n_classes=4)).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(); m.running_var.uniform_(.5, 2)
    return net

def images(n=3, h=32, w=32, seed=1): return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(seed))

def by_hand(first, rest, x, classes, grid=None):
    "Grad-CAM by its formula: `first` gives the map, `rest` the scores from it; tokens (B, 1 + h*w, C) are cut into the grid row by row."
    a = first(x).detach().requires_grad_()
    g = torch.autograd.grad(rest(a)[torch.arange(len(x)), classes].sum(), a)[0]
    if grid is not None: a, g = (t[:, -grid[0]*grid[1]:].reshape(len(x), *grid, -1).permute(0, 3, 1, 2) for t in (a, g))
    return (g.mean((2, 3), keepdim=True)*a).sum(1).clamp(min=0).detach().numpy()


@pytest.mark.parametrize("tap", [None, "stage1.1"])
def test_equals_the_formula(tap):
    "The deepest map of 7x7; and one that a ReLU overwrites in place."
    net, x, c = tiny(), images(), torch.tensor([0, 3, 1])
    plan = cam_plan(net, x, tap)
    assert plan.taps[0].grid == (8, 8) and plan.taps[0].inplace == (tap is not None)
    if tap is None: first, rest = lambda x: net.stage1(net.stem(x)), lambda a: net.head(net.stage2(a).mean((2, 3)))
    else: first, rest = lambda x: net.stage1[1](net.stage1[0](net.stem(x))), lambda a: net.head(net.stage2(a.clone().relu()).mean((2, 3)))
    maps = grad_cam(net, x, c, plan, bs=2)
    assert maps.max() > 0 and maps.min() >= 0
    np.testing.assert_allclose(maps, by_hand(first, rest, x, c), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(grad_cam(net, x), grad_cam(net, x, net(x).argmax(1)))
    assert hook_count(net) == 0

def test_a_stage_that_returns_several_tensors():
    class Pair(nn.Module):
        def __init__(self, stage): super().__init__(); self.stage = stage
        def forward(self, x): y = self.stage(x); return 2*y, {"map": y}
    class Net(nn.Module):
        def __init__(self, net): super().__init__(); self.stem, self.pair, self.last, self.head = net.stem, Pair(net.stage1), net.stage2, net.head
        def forward(self, x): a, b = self.pair(self.stem(x)); return self.head(self.last(a + b["map"]).mean((2, 3)))
    net, x, c = Net(tiny()).eval(), images(), torch.tensor([2, 2, 0])
    whole, stage, end = net(x), lambda x: net.pair.stage(net.stem(x)), lambda a: net.head(net.last(a).mean((2, 3)))
    first = cam_plan(net, x, "pair[0]")
    second = replace(first, taps=[replace(first.taps[0], name="pair[1][map]", element=(1, "map"))])
    # The outputs are 2y and y, and the network goes on with their sum: what flows back to the first goes through it alone, to the second through both
    np.testing.assert_allclose(grad_cam(net, x, c, first), by_hand(lambda x: 2*stage(x), lambda a: end(a + a.detach()/2), x, c), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grad_cam(net, x, c, second), by_hand(stage, lambda a: end(3*a), x, c), rtol=1e-4, atol=1e-6)
    assert torch.equal(net(x), whole) and hook_count(net) == 0


def vit(pool):
    import timm
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=5, img_size=(112, 160), global_pool=pool, class_token=True).eval()

def swin():
    from timm.models.swin_transformer import SwinTransformer
    torch.manual_seed(0)
    return SwinTransformer(img_size=(64, 96), patch_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=4, num_classes=5).eval()

@pytest.mark.parametrize("net, grid, layout, where", [(vit("avg"), (7, 10), "NLC", "blocks.5"), (vit("token"), (7, 10), "NLC", "blocks.4"), (swin(), (8, 12), "NHWC", "layers.1")], ids=["vit", "vit, class token", "swin"])
def test_lights_up_where_the_image_differs(net, grid, layout, where):
    "Without attention a cell knows its own patch alone: one patch that differs is one cell of the map that differs, and the right one. The images are no squares."
    x = torch.zeros(1, 3, *(dict(NLC=(112, 160), NHWC=(64, 96))[layout]))
    h, w = x.shape[2]//grid[0], x.shape[3]//grid[1]
    net = randomize_scales(copy.deepcopy(net))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "pos_embed" in name: p.zero_()
            # The class token must attend to the others, in the last block
            if "attn.proj" in name and not name.startswith("blocks.5"): p.zero_()
        # The image's norm layers would make every plain patch the same
        for i, j in ((1, grid[1]-2), (grid[0]-1, 0)):
            x.zero_()[..., i*h:(i+1)*h, j*w:(j+1)*w] = torch.randn(3, h, w, generator=torch.Generator().manual_seed(0))
            plan = cam_plan(net, x.repeat(2, 1, 1, 1))
            assert (plan.taps[0].name, plan.taps[0].layout, plan.taps[0].grid) == (where, layout, grid)
            maps = grad_cam(net, x.repeat(5, 1, 1, 1), range(5), plan)
            maps = maps[maps.reshape(5, -1).max(1) > 0]
            assert len(maps)
            odd = np.abs(maps - np.median(maps.reshape(len(maps), -1), axis=1)[:, None, None])
            rest = odd.copy(); rest[:, i, j] = 0
            assert (odd[:, i, j] > 1e3*rest.reshape(len(maps), -1).max(1) + 1e-9).any()
    assert hook_count(net) == 0

def test_equals_the_formula_on_tokens():
    net, x, c = vit("token"), images(2, 112, 160), torch.tensor([4, 1])
    def rest(a): return net.forward_head(net.norm(net.blocks[5](a)))
    def first(x): return net.blocks[:5](net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(x)))))
    np.testing.assert_allclose(grad_cam(net, x, c), by_hand(first, rest, x, c, (7, 10)), rtol=1e-4, atol=1e-8)
    assert "the class scores do not depend on the grid of the last map, blocks.5" in cam_plan(net, x).note


def state(net): return [(p.requires_grad, p.grad) for p in net.parameters()], [m.training for m in net.modules()], [b.clone() for b in net.buffers()]

def same(a, b): return all(f == g and p is q for (f, p), (g, q) in zip(a[0], b[0])) and a[1] == b[1] and all(map(torch.equal, a[2], b[2]))

@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_is_changed(around):
    "Modes, gradients, flags, buffers and random numbers; also of a frozen network, and where autograd is off."
    net, x, c = tiny(), images(), [0, 3, 1]
    net(x).sum().backward()
    net.train(); net.stage1.eval(); net.stem.requires_grad_(False)
    before, random = state(net), rng_state()
    with around(): maps = grad_cam(net, x, c)
    assert maps.max() > 0 and same(before, state(net)) and random == rng_state() and hook_count(net) == 0
    net.requires_grad_(False)
    np.testing.assert_array_equal(grad_cam(net, x, c), maps)
    assert not any(p.requires_grad for p in net.parameters())

@pytest.mark.parametrize("error", [IndexError, RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(error, capsys):
    "The package's own `with` would swallow an IndexError and print it."
    net, x = tiny().train(), images()
    plan, before = cam_plan(net, x), state(net)
    def fail(module, args): raise error("planted")
    handle = net.stage2.register_forward_pre_hook(fail)
    with pytest.raises(error, match="planted"): grad_cam(net, x, [0, 0, 0], plan)
    handle.remove()
    assert hook_count(net) == 0 and same(before, state(net)) and capsys.readouterr() == ("", "")

def test_other_dtypes():
    "In bfloat16, and in float64: near to float32, and the tensors are the network's own."
    net, x, c = tiny(), images(), [0, 3, 1]
    maps = grad_cam(net, x, c)
    np.testing.assert_allclose(grad_cam(copy.deepcopy(net).double(), x, c), maps, rtol=1e-4, atol=1e-7)
    half = copy.deepcopy(net).bfloat16()
    assert np.corrcoef(grad_cam(half, x, c).ravel(), maps.ravel())[0, 1] > .98
    np.testing.assert_allclose(cam_removal(half, x, c, maps), cam_removal(net, x, c, maps), atol=.03)

def test_hooks_of_others_stay():
    net, seen = tiny(), []
    net.stage1.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    grad_cam(net, images(), [0, 0, 0])
    assert hook_count(net) == 1 and seen


def test_numbers_of_planted_maps():
    flat, one, half, none = np.ones((7, 7)), np.zeros((7, 7)), np.zeros((7, 7)), np.zeros((7, 7))
    one[2, 3], half[:, 0], half[0, 0] = 5., 1., 0.
    np.testing.assert_allclose(cam_entropy(np.stack([flat, one, half, none])), [1, 0, np.log(6)/np.log(49), np.nan], atol=1e-12)
    np.testing.assert_allclose(cam_top_share(np.stack([flat, one, half, none])), [.1, 1, 4.9/6, np.nan], atol=1e-12)
    assert cam_top_share(3e-9*half[None]) == pytest.approx(4.9/6)

class Corner(nn.Module):
    "Its score of class 1 is the brightness of the top left quarter."
    def __init__(self): super().__init__(); self.gain = nn.Parameter(torch.tensor(8.))
    def forward(self, x): s = self.gain*(x[:, :, :16, :16].mean((1, 2, 3)) - .5); return torch.stack([-s, s], 1)

def test_removal_of_what_matters():
    net, random = Corner(), rng_state()
    x = torch.zeros(3, 3, 32, 32)
    x[:, :, 2:14, 2:14] = 1.
    there, elsewhere = np.zeros((8, 8), np.float32), np.zeros((8, 8), np.float32)
    there[:4, :4] = elsewhere[4:, 4:] = 1.
    maps = np.stack([there, elsewhere, 0*there])
    most, least = cam_removal(net, x, [1, 1, 1], maps, shares=(.25,))
    assert most[0] > .3 > .05 > abs(least[0]) and abs(most[1]) < .05 and np.isnan([most[2], least[2]]).all()
    again = cam_removal(net, x, [1, 1, 1], maps, shares=(.25,))
    np.testing.assert_array_equal(again, (most, least))
    assert rng_state() == random


def test_refusals(monkeypatch):
    net = tiny()
    with pytest.raises(CamError, match="No map of TinyNet has 7x7 cells on images of 12x12: the finest is 6x6. Give larger images .56 px are enough for the last map., or min_grid=6."): cam_plan(net, images(h=12, w=12))
    assert cam_plan(net, images(h=12, w=12), min_grid=6).names == ["stem"]
    assert cam_plan(net, images()).note.endswith("the last map, stage2, is 4x4: images of 56 px make it 7x7") and cam_plan(net, images(h=56, w=56)).names == ["stage2"]
    with pytest.raises(CamError, match=r"The network returns \(\d+,\); Grad-CAM explains the score of one class of several"): grad_cam(nn.Sequential(net.stem, nn.Flatten(1), nn.Flatten(0)), images())
    with pytest.raises(CamError, match="do not depend on the map"):
        dead = tiny()
        nn.init.zeros_(dead.head.weight)
        cam_plan(dead, images())
    with pytest.raises(CamError, match="Alphas alone train nothing"): compare_cams([.9])
    with pytest.raises(CamError, match="A network alone has no images"): compare_cams(dict(plain=net))
    with pytest.raises(CamError, match="the networks are plain"): compare_cams(dict(plain=net), images(), reference="before")
    with pytest.raises(CamError, match="epochs: settings of training go with alphas"): compare_cams(dict(plain=net), images(), epochs=2)
    with pytest.raises(CamError, match="'other' scores 7 classes and 'plain' 4"): compare_cams(dict(plain=net, other=TinyNet(n_classes=7)), images(), removal=False)
    with pytest.raises(CamError, match="one or more different values"): fine_tune_alphas(tensor_learner(), [])
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(CamError, match=r"pip install 'fmce_fastai\[cam\]'"): grad_cam(net, images())


@pytest.mark.parametrize("torch_loaders", [False, True])
def test_copies_see_the_same_batches(torch_loaders):
    "At alpha 0 the callback changes no bit: the copy is the plain one's twin. The Learner that was given stays as it is, with the order of its next batches."
    make = lambda: tensor_learner(n=48, size=16, torch_loaders=torch_loaders)
    learn, twin = make(), make()
    first, random = weights(learn.model), rng_state()
    trained = fine_tune_alphas(learn, (0., .9), epochs=1, placebo=.9, bar=False)
    assert list(trained) == ["before", "plain", "alpha 0.00", "alpha 0.90", "placebo"] and trained["before"] is learn
    assert random == rng_state() and learn.opt is None
    assert_same(first, weights(learn.model))
    plain, zero, ral, placebo = (weights(trained[n].model) for n in list(trained)[1:])
    assert_same(plain, zero)
    for other in (first, ral, placebo): assert not torch.equal(plain["head.weight"], other["head.weight"])
    assert not any(cb.name in ("fmce", "step_seeds", "noted") for l in trained.values() for cb in l.cbs)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(learn.dls.train, twin.dls.train))
    assert_same(plain, weights(fine_tune_alphas(learn, (.9,), epochs=1, placebo=0, bar=False)["plain"].model))

def test_batches_that_cannot_be_repeated_are_refused():
    class Drifts(torch.utils.data.Dataset):
        calls = 0
        def __len__(self): return 32
        def __getitem__(self, i): Drifts.calls += 1; return torch.full((3, 16, 16), Drifts.calls/100), i % 10
    dls = tensor_dls(n=32)
    dls.loaders[0] = dls.train.new(dataset=Drifts())
    with pytest.raises(CamError, match="'alpha 0.90' was trained on other batches than 'plain'"): fine_tune_alphas(make_learner(dls=dls), (.9,), epochs=1, bar=False)

def test_copies_keep_callbacks_but_ral():
    from fmce_fastai.train.callback import FMCECallback
    learn = tensor_learner(n=32, cbs=[FMCECallback(.5), RaiseAt("after_batch", RuntimeError("planted"), skip=1000)])
    copied = fine_tune_alphas(learn, (.9,), epochs=1, placebo=0, bar=False)["plain"]
    assert hasattr(learn, "fmce") and learn.fmce.history.empty and not any(isinstance(cb, FMCECallback) for cb in copied.cbs)
    mine, theirs = (next(cb for cb in l.cbs if isinstance(cb, RaiseAt)) for l in (learn, copied))
    assert mine is not theirs and mine.learn is learn and theirs.learn is copied and copied.model is not learn.model and copied.dls is learn.dls


def test_comparison_of_learners():
    "Same images, classes of the plain network in every column, measures of the maps."
    learn = tensor_learner(n=32, n_valid=12, size=32)
    nets = dict(plain=learn, other=tiny().train())
    nets["other"].head = nn.Linear(16, 10)
    c = compare_cams(nets, 5, seed=3)
    of, chosen = c.frame.set_index(["name", "image"]), np.sort(np.random.default_rng(3).permutation(12)[:5])
    assert torch.equal(c.images, torch.stack([learn.dls.valid.dataset[i][0] for i in chosen])) and [int(t[-1]) for t in of.loc["plain"].true] == [learn.dls.valid.dataset[i][1] for i in chosen]
    np.testing.assert_array_equal(c.classes, predicted(learn.model, c.images)[0])
    for name, net in (("plain", learn.model), ("other", nets["other"])):
        np.testing.assert_array_equal(c.maps[name], grad_cam(net, c.images, c.classes))
        np.testing.assert_array_equal(of.loc[name].entropy, cam_entropy(c.maps[name]))
        np.testing.assert_allclose(of.loc[name].probability, predicted(net, c.images)[1][range(5), c.classes])
    assert c.pictures.shape == (5, 32, 32, 3) and 0 <= c.pictures.min() and c.pictures.max() <= 1
    html = c._repr_html_()
    assert html.count("<img alt=") == 1 and "stage1, 8x8 on images of 32x32" in html and "entropy" in repr(c) and len(c.summary()) == 2
    alone = compare_cams(dict(net=learn.model), c.images, removal=False, rows=[4, 0])
    assert alone.reference == "net" and alone.frame.label.str.startswith("class ").all() and alone.frame.true.isna().all() and "drop" not in alone.summary() and len(alone.figure.axes) == 2*2 + 1
    assert list(compare_cams(dict(net=learn.model), (c.images, torch.arange(5)), removal=False).frame.true) == [f"class {i}" for i in range(5)]
    assert nets["other"].training and hook_count(learn.model) == hook_count(nets["other"]) == 0


def planted(rng, gain=.02, seeds=6):
    rows = []
    for s in range(seeds):
        for n, a in (("plain", np.nan), ("alpha 0.70", .7), ("alpha 0.80", .8), ("alpha 0.95", .95)):
            for i in range(4): rows.append(dict(seed=s, name=n, image=i, entropy=.5 + .1*s + (0 if n == "plain" else gain*(a-.7)*10) + rng.normal(0, 1e-3)))
    return pd.DataFrame(rows)

def test_statistics_equal_a_paired_test():
    frame = planted(np.random.default_rng(0))
    t = cam_statistics(frame, measures=("entropy",)).set_index("name")
    wide = frame.groupby(["seed", "name"]).entropy.mean().unstack()
    test = stats.ttest_rel(wide["alpha 0.95"], wide["plain"])
    low, high = test.confidence_interval()
    r = t.loc["alpha 0.95"]
    np.testing.assert_allclose([r.difference, r.low, r.high, r.p], [(wide["alpha 0.95"] - wide["plain"]).mean(), low, high, test.pvalue], rtol=1e-9)
    assert r.seeds == 6 and r.above == 6 and r.p_holm >= r.p and t.loc["trend"].low < .02 < t.loc["trend"].high and abs(t.loc["trend"].difference - .02) < 1e-3
    with pytest.raises(CamError, match="lacks seed"): cam_statistics(frame.drop(columns="seed"), measures=("entropy",))
    with pytest.raises(CamError, match="the frame has plain"): cam_statistics(frame, "before", measures=("entropy",))

def test_statistics_pair_image_by_image():
    "An image whose map is blank in one network is left out in both: here the image with the high entropy."
    frame = planted(np.random.default_rng(0), gain=0.)
    frame.loc[frame.image == 0, "entropy"] += 1.
    frame.loc[(frame.image == 0) & (frame.name == "alpha 0.80"), "entropy"] = np.nan
    t = cam_statistics(frame, measures=("entropy",)).set_index("name")
    assert abs(t.loc["alpha 0.80"].difference) < 5e-3 and t.loc["alpha 0.80"]["mean"] < t.loc["plain"]["mean"] - .2
