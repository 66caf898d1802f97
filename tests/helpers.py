"Small networks, loaders and oracles with fixed seeds, shared by the contract tests."
import random
import warnings

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from torch import nn

from fmce_fastai.data.digits import digits_dls
from fmce_fastai.oracle.fitted import FittedFMCENet
from fmce_fastai.maps.find import tap_plan


class TinyNet(nn.Module):
    "Three stages with BatchNorm and ReLU in place, and dropout: what a real network has, in 2,000 weights."
    def __init__(self, channels=3, n_classes=10, dropout=.2):
        super().__init__()
        stage = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))
        self.stem, self.stage1, self.stage2 = stage(channels, 8), stage(8, 12), stage(12, 16)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(16, n_classes)
    def forward(self, x): return self.head(self.drop(self.stage2(self.stage1(self.stem(x))).mean((2, 3))))


def seed_all(seed=0):
    random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)

def make_model(arch=None, seed=0, **kwargs):
    seed_all(seed)
    if arch is None: return TinyNet(**kwargs)
    if arch == "vit":
        from timm.models.vision_transformer import VisionTransformer
        return VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=10, **kwargs)
    import timm
    return timm.create_model(arch, num_classes=10, **kwargs)

def make_learner(arch=None, seed=0, dls=None, size=16, n_train=64, bs=16, metrics=accuracy, lr=1e-2, **kwargs):
    "A quiet learner; two with the same arguments are equal to the last bit, and so is the random state after."
    dls = digits_dls(size=size, n_train=n_train, bs=bs, seed=seed) if dls is None else dls
    learn = Learner(dls, make_model(arch, seed), loss_func=CrossEntropyLossFlat(), metrics=metrics, lr=lr, **kwargs)
    seed_all(seed)
    return learn

def make_oracle(model, seed=0, size=16, width=8, **kwargs):
    "An oracle with random weights: right for everything that does not ask what its scores mean."
    plan = tap_plan(model, size=size, **kwargs)
    state = rng_state()
    torch.manual_seed(seed)
    oracle = FittedFMCENet(plan, width=width).freeze()
    torch.set_rng_state(torch.tensor(state[2], dtype=torch.uint8))
    return oracle

def rng_state(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

def weights(model): return {k: v.detach().clone() for k, v in model.state_dict().items()}

def assert_same(a, b):
    "Two dicts of tensors are equal to the last bit."
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]), k


class Probe(Callback):
    "Writes down what happens in training: losses, targets, and (after the others' `before_step`) every gradient."
    order, run_valid = 900, False
    def __init__(self): self.losses, self.seen, self.grads = [], [], []
    def after_loss(self): self.losses.append(self.loss.detach().clone()); self.seen.append(self.xb[0].sum().item())
    def before_step(self): self.grads.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})


class RaiseAt(Callback):
    "Raises `error` at `event`, once, from the `skip`-th time on."
    def __init__(self, event, error, skip=0, order=0, training=None):
        self.event, self.error, self.left, self.order, self.in_training = event, error, skip, order, training
        setattr(self, event, self._act)
    def _act(self):
        if self.left == 0: self.left = -1; raise self.error
        self.left -= 1


def tensor_dls(n=64, n_valid=16, bs=16, size=16, channels=3, seed=0, drop_last=None, torch_loaders=False):
    "Loaders over random images in memory, each class a shade of its own; the cheapest data that trains."
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    gen = torch.Generator().manual_seed(seed)
    def part(k):
        y = torch.arange(k) % 10
        return torch.utils.data.TensorDataset(torch.randn(k, channels, size, size, generator=gen) + y[:, None, None, None]/3, y)
    random.seed(seed)
    train, valid = part(n), part(n_valid)
    cls = torch.utils.data.DataLoader if torch_loaders else DataLoader
    name = "batch_size" if torch_loaders else "bs"
    extra = {} if drop_last is None else dict(drop_last=drop_last)
    if torch_loaders: extra["generator"] = torch.Generator().manual_seed(seed)
    return DataLoaders(cls(train, **{name: bs}, shuffle=True, num_workers=0, **extra), cls(valid, **{name: bs}, num_workers=0))

def tensor_learner(arch=None, seed=0, **kwargs):
    "`make_learner` on `tensor_dls`."
    own = {k: kwargs.pop(k) for k in ("n", "n_valid", "bs", "size", "channels", "drop_last", "torch_loaders") if k in kwargs}
    return make_learner(arch, seed, dls=tensor_dls(seed=seed, **own), **kwargs)
