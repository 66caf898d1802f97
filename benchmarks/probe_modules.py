"""Which control tells an untrained stage: FMCS with its weights shuffled (`learnt`), or a linear probe?

    python benchmarks/probe_modules.py            # about 15 minutes on one core; resumes
    python benchmarks/probe_modules.py --report

EfficientNet-Lite0 with ImageNet weights, intact and with one stage re-initialised at a time, 64 px, 256 validation images.
Per module: `learnt` as in `fmce_report`; `probe`, the leave-one-out accuracy of a ridge probe on its channel means; `added`, that
minus the probe of newly initialised networks (2), with its 95 % interval; `stage_added`, minus the probe of the same network with
this stage re-initialised (2). `trained` is False in the row of the stage that was re-initialised. AUC: intact against re-initialised.
"""
import argparse
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from sklearn.metrics import roc_auc_score

from fmce_fastai.data.digits import digits_dls
from fmce_fastai.data.openclipart import openclipart_dls
from fmce_fastai.data.torchvision import fashion_mnist_dls
from fmce_fastai.maps.find import tap_plan
from fmce_fastai.maps.tap import FeatureTap
from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.report.probe import added_accuracy, probe_hits
from fmce_fastai.report.report import fmce_report
from untrained_stage import damaged, lite0

HERE = Path(__file__).resolve().parent
PATH = HERE/f"probe_modules_cpu_float32_torch{torch.__version__.split('+')[0]}.csv"
N, SIZE, N_FRESH = 256, 64, 2


def images(setting, root):
    "A loader, and its first N images (shuffled once) with their classes."
    makers = {"fashion_mnist": lambda: fashion_mnist_dls(size=SIZE, root=root, n_train=1000),
              "digits": lambda: digits_dls(size=SIZE), "openclipart": lambda: openclipart_dls(size=SIZE)}
    dls = makers[setting]()
    dl = dls.test if setting == "openclipart" else dls.valid
    batches = list(dl)
    x, y = (torch.cat([b[i].as_subclass(torch.Tensor) for b in batches]) for i in (0, 1))
    keep = torch.from_numpy(np.random.default_rng(0).permutation(len(x))[:N])
    return dl, x[keep], y[keep]

@torch.no_grad()
def hits(model, plan, x, y):
    "(M, N): which images each module's probe gets right."
    model.eval()
    tap, maps = FeatureTap(plan, keep_graph=False), []
    for part in x.split(64):
        with tap.on(model): model(part)
        maps.append({n: m.mean((2, 3)) for n, m in tap.take().items()})
    return np.stack([probe_hits(torch.cat([m[n] for m in maps]), y) for n in plan.names])

def fresh_network(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100 + seed)
        return timm.create_model("tf_efficientnet_lite0")

def rows(setting, seed, root):
    dl, x, y = images(setting, root)
    model = lite0()
    plan = tap_plan(model, size=SIZE)
    fresh = np.stack([hits(fresh_network(s), plan, x, y) for s in range(N_FRESH)])
    oracle = FMCENet.load(HERE/"oracles"/"universal_without_fashion.safetensors")
    out = []
    for stage in (None, *range(len(plan))):
        net = model if stage is None else damaged(model, plan, stage, seed)
        own = hits(net, plan, x, y)
        table = fmce_report(net, dl, n_images=N, oracle=oracle, bar=False, seed=seed).table
        for j, name in enumerate(plan.names):
            if stage not in (None, j): continue
            again = np.stack([hits(damaged(net, plan, j, 50 + s), plan, x, y)[j] for s in range(N_FRESH)])
            added, low, high = added_accuracy(own[j], fresh[:, j])
            out.append(dict(setting=setting, seed=seed, module=name, number=j, trained=stage is None, images=len(x), fmcs=table.fmcs[j], learnt=table.learnt[j],
                            probe=own[j].mean(), fresh=fresh[:, j].mean(), added=added, low=low, high=high,
                            stage_added=added_accuracy(own[j], again)[0], torch=torch.__version__))
    return pd.DataFrame(out).round(4)

def main(root):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for setting in ("fashion_mnist", "openclipart", "digits"):
        for seed in range(2):
            there = pd.read_csv(PATH) if PATH.exists() else pd.DataFrame(columns=["setting", "seed"])
            if ((there.setting == setting) & (there.seed == seed)).any(): continue
            rows(setting, seed, root).to_csv(PATH, mode="a", header=not PATH.exists(), index=False)
            print(setting, seed, flush=True)
    report()

def report():
    d = pd.read_csv(PATH)
    print(d.groupby(["setting", "module", "trained"], sort=False)[["fmcs", "learnt", "probe", "fresh", "added", "stage_added"]].mean().round(3).to_string())
    for setting, part in [*d.groupby("setting"), ("all", d)]:
        print(setting, {c: round(roc_auc_score(part.trained, part[c].fillna(0)), 3) for c in ("fmcs", "learnt", "added", "stage_added")})

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", default="/usr/share/datasets/fashion-mnist")
    p.add_argument("--report", action="store_true")
    a = p.parse_args()
    report() if a.report else main(a.root)
