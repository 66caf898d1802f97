"The networks that the method's papers use, and one network per kind of tap plan: recorder and RAL for a few steps."
import numpy as np
import pytest
import torch
import torchvision
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastai.vision.learner import create_vision_model, vision_learner

from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.convergence.run import ConvergenceWarning
from fmce_fastai.data.digits import digits_dls
from fmce_fastai.oracle.fitted import FittedFMCENet
from fmce_fastai.train.recorder import FMCSRecorder
from fmce_fastai.util.state import hook_count
from fmce_fastai.maps.find import tap_plan

NETWORKS = {
    "resnet50 (timm)": ("resnet50", {}, 5, 2048),
    "resnet50 (torchvision)": (torchvision.models.resnet50, {}, 5, 2048),
    "shufflenet_v2_x1_0 (torchvision)": (torchvision.models.shufflenet_v2_x1_0, dict(cut=-1), 4, 1024),
    "efficientnet_lite0 (timm)": ("tf_efficientnet_lite0", {}, 5, 320),
    "convnext (timm)": ("test_convnext", {}, 4, 64),
    "mobilenetv3 (timm)": ("mobilenetv3_small_050", {}, 5, 288),
    "densenet (torchvision)": (torchvision.models.densenet121, {}, 5, 1024),
}


def build(dls, arch, cbs=None, cut=None):
    "A learner; fastai 2.8.12's `vision_learner` takes `cut` and forgets it, so a network that needs one is built in two steps."
    if cut is None: return vision_learner(dls, arch, pretrained=False, cbs=cbs)
    return Learner(dls, create_vision_model(arch, dls.c, pretrained=False, cut=cut), cbs=cbs)


def run(arch, kwargs, device):
    "Three recorded steps, then three with RAL: the tap plan, the recorder, the learner."
    set_seed(0)
    dls = digits_dls(size=64, bs=8, n_train=24, device=torch.device(device))
    dls.loaders[1] = dls.valid.new(n=8)
    recorder = FMCSRecorder(n_images=8, n_snapshots=2)
    learn = build(dls, arch, recorder, **kwargs)
    learn.model.to(device)
    plan = tap_plan(learn.model, size=64)
    with learn.no_bar(), learn.no_logging():
        with pytest.warns(ConvergenceWarning): learn.fit(1, 1e-3)  # three steps are no run
        learn.remove_cb(recorder)
        torch.manual_seed(0)
        learn.add_cb(FMCECallback(alpha=0.9, oracle=FittedFMCENet(plan)))
        learn.fit(1, 1e-3)
    return plan, recorder, learn


# fastai still passes torchvision its old `pretrained` argument
@pytest.mark.filterwarnings("ignore:The parameter 'pretrained' is deprecated:UserWarning", "ignore:Arguments other than a weight enum:UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_recorder_and_ral(name, device="cpu"):
    arch, kwargs, n_taps, channels = NETWORKS[name]
    plan, recorder, learn = run(arch, kwargs, device)
    assert (len(plan), plan.taps[-1].channels) == (n_taps, channels)
    assert recorder.dataset.plan == plan
    assert not np.array_equal(recorder.dataset.maps(plan.names[-1], 0), recorder.dataset.maps(plan.names[-1], 1))
    history = learn.fmce.history
    assert list(history.module) == plan.names
    assert (history.acted == 3).all()
    assert (history.gradient_ratio > 0).all()
    assert np.isfinite(history.fmcs_loss).all()
    assert hook_count(learn.model) == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_recorder_and_ral_on_cuda(): test_recorder_and_ral("resnet50 (timm)", "cuda")
