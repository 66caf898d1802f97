"""Does `fmce_report` tell modules that were never trained? Each stage's `learnt`: its FMCS minus that with the entries of its own weight tensors shuffled.

    python benchmarks/untrained_modules.py            # about ten minutes on one core; writes the CSV, goes on where it was stopped
    python benchmarks/untrained_modules.py --report

Small networks from a random start, before and after five epochs on digits (32 px, 2 seeds, shipped oracle: it has seen training images of digits; scored are validation images), and EfficientNet-Lite0 with ImageNet weights on FashionMNIST images (64 px, an oracle that has seen none of it), intact and with one
stage re-initialised; and the same on images that are foreign to the network, handwritten digits (settings `digits_foreign`, and at 32 px `digits_foreign_32`). `trained` says whether the row's stage is."""
import argparse, copy, warnings
from pathlib import Path

import pandas as pd
import torch
from fastai.torch_core import set_seed
from fastai.vision.learner import vision_learner

import fastai.callback.schedule
from fmce_fastai.data.digits import digits_dls
from fmce_fastai.data.torchvision import fashion_mnist_dls
from fmce_fastai.report.control import LEAST_LEARNT
from fmce_fastai.report.report import fmce_report
from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.study.learner import timm_kwargs
from fmce_fastai.maps.find import tap_plan
from untrained_stage import damaged, lite0

HERE = Path(__file__).resolve().parent
PATH = HERE/f"untrained_modules_cpu_float32_torch{torch.__version__.split('+')[0]}.csv"
SMALL = ("test_resnet", "resnet10t", "test_vit", "test_convnext", "test_efficientnet")


def rows_of(table, **which):
    return [dict(**which, module=r.module, number=i, fmcs=round(r.fmcs, 4), rise=round(r.fmcs - table.fmcs.iloc[i-1], 4) if i else float("nan"), learnt=round(r.learnt, 4), torch=torch.__version__) for i, r in enumerate(table.itertuples())]

def small(arch, seed):
    "Before and after training."
    dls, rows = digits_dls(size=32, bs=64), []
    set_seed(seed)
    learn = vision_learner(dls, arch, pretrained=False, **timm_kwargs(arch, 32, 10))
    learn.unfreeze()
    for trained in (False, True):
        if trained:
            with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(5, 3e-3)
        rows += [{**r, "trained": trained} for r in rows_of(fmce_report(learn, control=2, new_networks=0, bar=False, seed=seed).table, arch=arch, seed=seed, setting="digits")]
    return rows

def large(root, seed, setting):
    "Intact, and each stage re-initialised in turn: only that stage is then an untrained one; those after it are left out."
    size = 32 if setting == "digits_foreign_32" else 64
    dl, model, rows = (digits_dls(size=size) if "foreign" in setting else fashion_mnist_dls(size=size, root=root, n_train=1000)).valid, lite0(), []
    oracle = FMCENet.load(HERE/"oracles"/"universal_without_fashion.safetensors")
    plan = tap_plan(model, size=size)
    for stage in (None, *range(len(plan))):
        net = model if stage is None else damaged(model, plan, stage, seed)
        found = rows_of(fmce_report(net, dl, oracle=oracle, control=2, new_networks=0, bar=False, seed=seed).table, arch="tf_efficientnet_lite0", seed=seed, setting=setting)
        rows += [{**r, "trained": stage is None} for r in found if stage in (None, r["number"])]
    return rows

def main(root):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    there = pd.read_csv(PATH) if PATH.exists() else pd.DataFrame(columns=["arch", "seed", "setting"])
    for arch, setting in (*((a, "digits") for a in SMALL), ("tf_efficientnet_lite0", "fashion_mnist"), ("tf_efficientnet_lite0", "digits_foreign"), ("tf_efficientnet_lite0", "digits_foreign_32")):
        for seed in range(2):
            if ((there.arch == arch) & (there.seed == seed) & (there.setting == setting)).any(): continue
            pd.DataFrame(small(arch, seed) if arch in SMALL else large(root, seed, setting)).to_csv(PATH, mode="a", header=not PATH.exists(), index=False, na_rep="nan")
            print(arch, setting, seed, flush=True)
    report()

def report():
    d = pd.read_csv(PATH)
    print(d.groupby(["arch", "setting", "module", "trained"], sort=False)[["fmcs", "rise", "learnt"]].mean().round(3).to_string())
    d = d[d.learnt.notna() & (d.number > 0)]
    print(d.assign(flagged=d.learnt < LEAST_LEARNT).groupby(["setting", "trained"]).flagged.agg(["sum", "count"]).to_string())

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", default="/usr/share/datasets/fashion-mnist")
    p.add_argument("--report", action="store_true")
    a = p.parse_args()
    report() if a.report else main(a.root)
