"How people really use fastai and timm, beside the settings of `settings.py`: each situation trained in, and what is to come of it."
import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import SchedCos
from fastai.callback.tracker import TerminateOnNaNCallback
from fastai.callback.training import BnFreeze, GradientAccumulation
from fastai.callback.data import partial_dataloaders, weighted_dataloaders
from fastai.data.block import DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import RandomSplitter
from fastai.learner import load_learner
from fastai.losses import LabelSmoothingCrossEntropyFlat
from fastai.optimizer import SGD, ranger
from fastai.vision.data import ImageBlock, MaskBlock
from fastai.vision.learner import unet_learner, vision_learner
from PIL import Image
from torch import nn

import fastai.callback.hook
import fastai.callback.schedule
from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.report.report import fmce_report
from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.util.state import hook_count
from helpers import assert_same, make_learner, make_model, make_oracle, tensor_dls, tensor_learner, weights


@pytest.fixture(autouse=True)
def calm(monkeypatch):
    "No progress bars."
    for e in ("before_fit", "before_epoch", "before_train", "before_validate", "after_train", "after_validate", "after_batch", "after_fit"): monkeypatch.setattr(ProgressCallback, e, lambda self: None, raising=False)

def ral_learner(arch=None, alpha=.5, cbs=(), ral=None, oracle=None, **kwargs):
    learn = tensor_learner(arch, metrics=[], cbs=[FMCECallback(alpha, oracle, **(ral or {})), *cbs], **kwargs)
    learn.logger = lambda *_: None
    return learn

def last(cb):
    "The newest epoch's row."
    return cb.history.iloc[-1]

def check(learn, cb=None, steps=None):
    "RAL acted in every step; nothing is left."
    cb = cb or learn.fmce
    h = cb.history
    assert (h.acted == h.steps).all() and np.isfinite(h.fmcs_loss).all() and hook_count(learn.model) == 0
    if steps: assert h.groupby(["fit", "epoch"]).steps.first().sum() == steps


# Loops, folds, copies --------------------------------------------------------------------------------------------
def test_k_folds_with_a_callback_each():
    x, y = torch.randn(60, 3, 16, 16), torch.arange(60) % 3
    scores = []
    for fold in range(3):
        held = torch.arange(60) % 3 == fold
        parts = [torch.utils.data.TensorDataset(x[m], y[m]) for m in (~held, held)]
        learn = make_learner(dls=DataLoaders(*(DataLoader(p, bs=20, shuffle=True, num_workers=0) for p in parts)), metrics=[], cbs=FMCECallback(.5))
        learn.logger = lambda *_: None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a fold's classes may lack pairs
            learn.fit(1, 1e-3)
        scores.append(last(learn.fmce).fmcs)
        assert hook_count(learn.model) == 0
    assert len(set(scores)) == 3

@pytest.mark.parametrize("kind", ["universal", "fitted"])
def test_one_callback_for_several_learners(kind):
    "In turn: each fit reads the network that trains, and the history counts on."
    cb = FMCECallback(.5, make_oracle(make_model()) if kind == "fitted" else None)
    for i in (1, 2, 3):
        learn = tensor_learner(seed=0, metrics=[])
        learn.logger = lambda *_: None
        learn.fit(1, 1e-3, cbs=cb)
        assert hook_count(learn.model) == 0 and cb.learn is None and last(cb).fit == i
        check(learn, cb)

def test_one_callback_for_two_architectures():
    cb = FMCECallback(.5)
    for arch, names in ((None, "stage2"), ("vit", "blocks.2")):
        learn = tensor_learner(arch, metrics=[])
        learn.logger = lambda *_: None
        learn.fit(1, 1e-3, cbs=cb)
        assert last(cb).module == names and last(cb).acted == last(cb).steps

def test_a_copied_learner_trains_by_itself():
    learn = ral_learner()
    learn.fit(1, 1e-3)
    other = copy.deepcopy(learn)
    other.fmce.oracle = FMCENet.universal()  # copies leave the oracle's weights out, as exports do
    other.fit(1, 1e-3)
    assert last(other.fmce).fit == 2 and last(learn.fmce).fit == 1 and other.fmce.learn is other
    check(other)

def test_an_exported_learner_is_loaded_given_an_oracle_and_trained(tmp_path):
    learn = make_learner(path=tmp_path, metrics=[], cbs=FMCECallback(.5))
    learn.logger = lambda *_: None
    learn.fit(1, 1e-3)
    learn.export("l.pkl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fastai's, of pickles
        loaded = load_learner(tmp_path/"l.pkl")
    loaded.dls = tensor_dls()
    loaded.logger = lambda *_: None
    loaded.fmce.oracle = FMCENet.universal()
    loaded.fit(1, 1e-3)
    assert last(loaded.fmce).fit == 2
    check(loaded)

def test_added_for_one_fit_and_removed_for_another():
    learn = tensor_learner(metrics=[])
    learn.logger = lambda *_: None
    cb = FMCECallback(.5)
    with learn.added_cbs(cb):
        learn.fit(1, 1e-3)
        with learn.removed_cbs(cb): learn.fit(1, 1e-3)
        learn.fit(1, 1e-3)
    assert cb.history.fit.unique().tolist() == [1, 2] and not hasattr(learn, "fmce")
    check(learn, cb)


# Ways to call fit --------------------------------------------------------------------------------------------------
def test_fine_tune_twice():
    learn = ral_learner()
    for _ in range(2): learn.fine_tune(1, 1e-3, freeze_epochs=1)
    assert learn.fmce.history.fit.unique().tolist() == [1, 2, 3, 4]
    check(learn)

@pytest.mark.parametrize("call", ["fit_flat_cos", "fit_sgdr", "fit_one_cycle"])
def test_other_schedules(call):
    learn = ral_learner(alpha=SchedCos(.9, .1))
    learn.fit_sgdr(2, 1, 1e-3) if call == "fit_sgdr" else getattr(learn, call)(2, 1e-3)
    alphas = learn.fmce.history.groupby("epoch").alpha.first()
    assert alphas.is_monotonic_decreasing
    check(learn)

def test_discriminative_rates_and_freeze_to():
    learn = make_learner(dls=tensor_dls(), metrics=[], cbs=FMCECallback(.5), splitter=lambda m: [list(p.parameters()) for p in (m.stem, nn.ModuleList([m.stage1, m.stage2]), m.head)])
    learn.logger = lambda *_: None
    learn.freeze_to(-2)
    before = weights(learn.model.stem[0])
    learn.fit_one_cycle(1, slice(1e-5, 1e-3))
    assert_same(before, weights(learn.model.stem[0]))
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-5, 1e-3))
    check(learn)

def test_a_fit_of_no_epoch():
    learn = ral_learner()
    learn.fit(0)
    assert len(learn.fmce.history) == 0 and hook_count(learn.model) == 0
    learn.fit(1, 1e-3)
    check(learn)

def test_lr_find_between_two_fits(tmp_path):
    learn = ral_learner(path=tmp_path)
    learn.fit(1, 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fastai unpickles NumPy scalars by an old name
        learn.lr_find(num_it=4, show_plot=False)
    learn.fit(1, 1e-3)
    assert learn.fmce.history.fit.unique().tolist() == [1, 2]
    check(learn)

class Validate(Callback):
    "Validates inside training, every second step, as large data sets ask for."
    order, run_valid = 80, False
    def after_batch(self):
        if self.iter % 2: return
        model, was = self.model, self.model.training
        model.eval()
        with torch.no_grad(): model(self.xb[0])
        model.train(was)

def test_forward_passes_of_other_callbacks_are_not_read():
    learn = ral_learner(cbs=[Validate()])
    learn.fit(2, 1e-3)
    check(learn, steps=8)

def test_terminate_on_nan():
    class Bad(Callback):
        order, run_valid = -20, False
        def before_batch(self):
            if self.train_iter == 2: self.learn.xb = (self.xb[0]*float("nan"),)
    learn = ral_learner(cbs=[TerminateOnNaNCallback(), Bad()])
    learn.fit(2, 1e-3)
    h = learn.fmce.history
    assert h.epoch.max() == 0 and h.acted.iloc[0] >= 2 and hook_count(learn.model) == 0 and learn.metrics == []


# Loaders ---------------------------------------------------------------------------------------------------------------
def items_dls(n=64, cls=None, **kwargs):
    "Loaders of fastai's own kind, from a DataBlock over numbers."
    x, y = torch.randn(n, 3, 16, 16), torch.arange(n) % 4
    block = DataBlock(get_x=lambda i: x[i], get_y=lambda i: y[i], splitter=lambda o: (list(range(n-16)), list(range(n-16, n))))
    return getattr(block.datasets(list(range(n))), cls or "dataloaders")(bs=16, num_workers=0, **kwargs)

@pytest.mark.parametrize("cls, kwargs", [("dataloaders", {}), ("weighted_dataloaders", dict(wgts=np.arange(1., 49.))), ("partial_dataloaders", dict(partial_n=32))])
def test_weighted_and_partial_loaders(cls, kwargs):
    learn = make_learner(dls=items_dls(cls=cls, **kwargs), metrics=[], cbs=FMCECallback(.5))
    learn.logger = lambda *_: None
    learn.fit(1, 1e-3)
    check(learn)

class Stream(torch.utils.data.IterableDataset):
    "Images that are read one after the other."
    def __iter__(self):
        gen = torch.Generator().manual_seed(0)
        for i in range(48): yield torch.randn(3, 16, 16, generator=gen), i % 3

    def __len__(self): return 48

def test_a_stream_of_images():
    learn = make_learner(dls=DataLoaders(*[torch.utils.data.DataLoader(Stream(), batch_size=16)]*2), metrics=[], cbs=FMCECallback(.5))
    learn.logger = lambda *_: None
    learn.fit(1, 1e-3)
    check(learn, steps=3)

def test_sorted_images():
    "One class a batch: no image of another class, until the bank remembers some."
    x, y = torch.randn(64, 3, 16, 16), torch.arange(64)//16
    dl = DataLoader(torch.utils.data.TensorDataset(x, y), bs=16, shuffle=False, num_workers=0)
    learn = make_learner(dls=DataLoaders(dl, dl), metrics=[], cbs=FMCECallback(.5))
    learn.logger = lambda *_: None
    with pytest.warns(UserWarning, match="memory bank"): learn.fit(2, 1e-3)
    h = learn.fmce.history.groupby("epoch")[["acted", "not_valid"]].first()
    assert h.acted.tolist() == [2, 4] and h.not_valid.tolist() == [2, 0]

def test_progressive_resizing_with_memory():
    learn = ral_learner(ral=dict(memory=32))
    for size in (16, 24, 32):
        learn.dls = tensor_dls(size=size)
        learn.fit(1, 1e-3)
    check(learn, steps=12)

def test_accumulated_mixed_and_smoothed_with_memory():
    learn = ral_learner(cbs=[GradientAccumulation(32), MixUp()], ral=dict(memory=32))
    learn.loss_func = LabelSmoothingCrossEntropyFlat()
    learn.fit(2, 1e-3)
    check(learn, steps=8)

def test_another_batch_size_in_the_next_fit():
    learn = ral_learner()
    learn.fit(1, 1e-3)
    learn.dls = tensor_dls(bs=32)
    learn.fit(1, 1e-3)
    check(learn, steps=6)


# Networks ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_in", [1, 4, 13])
def test_vision_learner_with_other_channels(n_in):
    dls = tensor_dls(channels=n_in, size=32)
    dls.c = 10
    learn = vision_learner(dls, "test_resnet", n_in=n_in, pretrained=False, normalize=False, loss_func=nn.CrossEntropyLoss(), metrics=[], cbs=FMCECallback(.5))
    learn.logger = lambda *_: None
    learn.fit(1, 1e-3)
    check(learn)

def test_images_that_are_not_square():
    x, y = torch.randn(32, 3, 16, 40), torch.arange(32) % 4
    dl = DataLoader(torch.utils.data.TensorDataset(x, y), bs=16, num_workers=0)
    learn = make_learner(dls=DataLoaders(dl, dl), metrics=[], cbs=FMCECallback(.5))
    learn.logger = lambda *_: None
    learn.fit(1, 1e-3)
    check(learn)

def test_frozen_batch_norm():
    learn = ral_learner(cbs=[BnFreeze()])
    learn.model.stem[1].requires_grad_(False)
    stats = learn.model.stem[1].running_mean.clone()
    learn.fit(1, 1e-3)
    assert torch.equal(stats, learn.model.stem[1].running_mean)
    check(learn)

@pytest.mark.parametrize("norm", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.spectral_norm])
def test_parametrised_weights(norm):
    learn = ral_learner()
    for stage in (learn.model.stem, learn.model.stage1): norm(stage[0])
    learn.fit(1, 1e-3)
    check(learn)

def test_a_network_in_bfloat16():
    learn = ral_learner()
    learn.model.bfloat16()
    learn.loss_func = lambda o, y: F.cross_entropy(o.float(), y)  # fastai averages losses in float32
    learn.dls = DataLoaders(*(DataLoader([(x.bfloat16(), y) for x, y in dl.dataset], bs=16, num_workers=0) for dl in learn.dls))
    learn.fit(1, 1e-3)
    check(learn)

@pytest.mark.parametrize("opt", [SGD, ranger])
def test_other_optimisers(opt):
    learn = ral_learner(opt_func=opt)
    learn.fit(1, 1e-3)
    check(learn)

def test_the_head_is_exchanged_between_two_fits():
    "Another task for the same body."
    learn = ral_learner()
    learn.fit(1, 1e-3)
    learn.model.head = nn.Linear(16, 3)
    learn.dls = DataLoaders(*(DataLoader([(x, y % 3) for x, y in dl.dataset], bs=16, shuffle=True, num_workers=0) for dl in learn.dls))
    learn.create_opt()
    learn.fit(1, 1e-3)
    check(learn)

def test_summary_training_loop_and_report_between_fits(capsys):
    learn = ral_learner()
    learn.fit(1, 1e-3)
    learn.summary()
    learn.show_training_loop()
    capsys.readouterr()
    fmce_report(learn, n_images=16, control=0, bar=False)
    learn.fit(1, 1e-3)
    check(learn)


# Other tasks, as fastai sets them up ---------------------------------------------------------------------------------
def picture_files(folder, n=24):
    "Noise of two brightnesses, and a mask for each."
    rng = np.random.default_rng(0)
    for i in range(n):
        x = rng.integers(0, 128, (32, 32, 3)) + 127*(i % 2)
        Image.fromarray(x.astype(np.uint8)).save(folder/f"{i:02}.png")
        Image.fromarray((x[..., 0] > 127).astype(np.uint8)).save(folder/f"{i:02}_mask.png")
    return sorted(f for f in folder.iterdir() if "mask" not in f.name)

def test_multi_category_block(tmp_path):
    picture_files(tmp_path)
    labels = lambda f: ["bright" if int(f.stem) % 2 else "dark"] + ["fourth"]*(int(f.stem) % 4 == 0)
    block = DataBlock((ImageBlock, MultiCategoryBlock), get_items=lambda p: sorted(f for f in p.iterdir() if "mask" not in f.name), get_y=labels, splitter=RandomSplitter(seed=0))
    learn = vision_learner(block.dataloaders(tmp_path, bs=8, num_workers=0), "test_resnet", pretrained=False, metrics=[], cbs=FMCECallback(.9))
    learn.logger = lambda *_: None
    learn.fit(1, 1e-3)
    check(learn, steps=2)

def test_unet_learner(tmp_path):
    picture_files(tmp_path)
    block = DataBlock((ImageBlock, MaskBlock(["dark", "bright"])), get_items=lambda p: sorted(f for f in p.iterdir() if "mask" not in f.name), get_y=lambda f: f.with_name(f"{f.stem}_mask.png"), splitter=RandomSplitter(seed=0))
    learn = unet_learner(block.dataloaders(tmp_path, bs=8, num_workers=0), torchvision.models.resnet18, pretrained=False, metrics=[], cbs=FMCECallback(.9))
    learn.logger = lambda *_: None
    own = hook_count(learn.model)  # fastai's, for its cross connections
    with pytest.warns(UserWarning, match="RAL cannot act in this fit.*the targets are masks or images, as in segmentation"): learn.fit(1, 1e-3)
    assert (learn.fmce.history.watched == learn.fmce.history.steps).all() and hook_count(learn.model) == own

def test_regression_block(tmp_path):
    picture_files(tmp_path)
    block = DataBlock((ImageBlock, RegressionBlock), get_items=lambda p: sorted(f for f in p.iterdir() if "mask" not in f.name), get_y=lambda f: float(f.stem)/10, splitter=RandomSplitter(seed=0))
    learn = vision_learner(block.dataloaders(tmp_path, bs=8, num_workers=0), "test_resnet", pretrained=False, n_out=1, metrics=[], cbs=FMCECallback(.9))
    learn.logger = lambda *_: None
    with pytest.warns(UserWarning, match="RAL cannot act in this fit.*as in regression"): learn.fit(1, 1e-3)
    assert (learn.fmce.history.watched == learn.fmce.history.steps).all()
