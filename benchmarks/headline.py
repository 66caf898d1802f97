"""Does the one line do harm? `cbs=FMCECallback(alpha=0.9)` against no callback, paired over seeds, on FashionMNIST.

    python benchmarks/headline.py --setting scratch --seeds 0-9       # resnet18 from a random start, 32 px, 10,000 images, 3 epochs
    python benchmarks/headline.py --setting pretrained --seeds 0-9    # EfficientNet-Lite0 with ImageNet weights, 64 px, 2,000 images, 2 epochs
    python benchmarks/headline.py --report

The oracle is `oracles/universal_without_fashion.safetensors`: it has seen no FashionMNIST. `fmcs_other` is what a second such oracle, trained with another seed, says of the last map on 256 test images
in eval mode, with labels. Rows are written as they come; what is there is not run again. Accuracy is on the 10,000 test images. Same start weights, same batches in the same order in both arms."""
import argparse, csv, time, warnings
from pathlib import Path

import fastai.callback.schedule
import pandas as pd
import timm, torch
from fastai.basics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.learner import vision_learner

from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.data.torchvision import fashion_mnist_dls
from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.study.weights import load_efficientnet_lite
from fmce_fastai.maps.tap import FeatureTap
from fmce_fastai.study.statistics import paired_difference
from fmce_fastai.maps.find import tap_plan

HERE = Path(__file__).resolve().parent
PATH = HERE/f"headline_cpu_float32_torch{torch.__version__.split('+')[0]}.csv"
SETTINGS = {"scratch": dict(arch="resnet18", size=32, n_train=10_000, epochs=3, lr=3e-3), "pretrained": dict(arch="tf_efficientnet_lite0", size=64, n_train=2_000, epochs=2, lr=1e-3)}
COLUMNS = "setting arch size n_train epochs lr arm alpha seed accuracy acted steps fmcs_other seconds torch timm".split()


def oracle(name="universal_without_fashion"): return FMCENet.load(HERE/"oracles"/f"{name}.safetensors")

def run(setting, arm, seed, root, alpha=.9):
    s, start = SETTINGS[setting], time.time()
    set_seed(seed)
    dls = fashion_mnist_dls(size=s["size"], bs=64, n_train=s["n_train"], seed=seed, root=root)
    test = dls.test.new(bs=250)
    dls.loaders[1] = dls.valid.new(n=64)  # the table's figures are not used
    cbs = [FMCECallback(alpha, oracle())] if arm == "ral" else []
    learn = vision_learner(dls, s["arch"], pretrained=False, metrics=accuracy, cbs=cbs)
    if setting == "pretrained": load_efficientnet_lite(learn.model[0].model)
    set_seed(seed)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(s["epochs"], s["lr"])
    history = learn.fmce.history if cbs else None
    for cb in cbs: learn.remove_cb(cb)
    with learn.no_bar(): p, y = learn.get_preds(dl=test)
    x, t = next(iter(test.new(bs=256)))
    with torch.no_grad():
        plan = tap_plan(learn.model, x=x[:2].as_subclass(torch.Tensor))
        learn.model.eval()
        tap = FeatureTap(plan, keep_graph=False).arm(learn.model)
        learn.model(x)
        other = oracle("universal_without_fashion_seed1").on(plan)(tap.take(), t.as_subclass(torch.Tensor))
    last = history[history.module == history.module.iloc[-1]] if cbs else None
    return dict(setting=setting, **s, arm=arm, alpha=alpha if cbs else 0, seed=seed, accuracy=round(float((p.argmax(1) == y).float().mean()), 5), acted=int(last.acted.sum()) if cbs else 0,
                steps=int(last.steps.sum()) if cbs else "", fmcs_other=round(float(other.fmcs[:, -1].mean()), 4), seconds=round(time.time()-start, 1), torch=torch.__version__, timm=timm.__version__)

def read(): return list(csv.DictReader(PATH.open())) if PATH.exists() else []

def report():
    d = pd.DataFrame(read()).astype({"accuracy": float, "fmcs_other": float, "seed": int})
    for setting, g in d.groupby("setting"):
        wide = g.pivot(index="seed", columns="arm", values=["accuracy", "fmcs_other"]).dropna()
        d = paired_difference(100*(wide["accuracy", "ral"] - wide["accuracy", "plain"]))
        accuracy, other = 100*wide["accuracy"].mean(), wide["fmcs_other"]
        print(f"{setting}: {d['seeds']} seeds, plain {accuracy['plain']:.2f}, ral {accuracy['ral']:.2f}, difference {d['difference']:+.2f} points, "
              f"95 % interval {d['low']:+.2f} to {d['high']:+.2f}; another oracle's FMCS of the last map: plain {other['plain'].mean():.3f}, "
              f"ral {other['ral'].mean():.3f}, higher in {int((other['ral'] > other['plain']).sum())} of {d['seeds']}")

def main(setting, seeds, root):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for seed in seeds:
        for arm in ("plain", "ral"):
            if any((r["setting"], r["arm"], int(r["seed"])) == (setting, arm, seed) for r in read()): continue
            row = run(setting, arm, seed, root)
            new = not PATH.exists()
            with PATH.open("a", newline="") as f:
                w = csv.DictWriter(f, COLUMNS)
                if new: w.writeheader()
                w.writerow(row)
            print({k: row[k] for k in ("setting", "arm", "seed", "accuracy", "acted", "steps", "fmcs_other", "seconds")}, flush=True)

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--setting", choices=SETTINGS, default="scratch")
    p.add_argument("--seeds", default="0-9", help="first-last")
    p.add_argument("--root", default="/usr/share/datasets/fashion-mnist")
    p.add_argument("--report", action="store_true")
    a = p.parse_args()
    first, last = map(int, a.seeds.split("-"))
    report() if a.report else main(a.setting, range(first, last+1), a.root)
