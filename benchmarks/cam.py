"""Does a network's attention become finer as alpha rises? Grad-CAM of EfficientNet-Lite0 with ImageNet weights, fine-tuned on 5 FashionMNIST images a class at 112 px, plainly, with RAL at four alphas, and with a placebo.

    python benchmarks/cam.py                 # about two minutes a seed on one core; goes on where it was stopped
    python benchmarks/cam.py --report
    python benchmarks/cam.py --picture       # nbs/images/cam_grid.png alone, of seed 1

50 training images, batches of 25, 10 epochs of AdamW with one cycle, rate 0.003 and 0.001 for the body (as in the study of 5 images a class; chosen for plain training there, at 48 px and 50 epochs; nothing was tuned here), batch norm in eval mode, linear head. RAL by an oracle
that has seen no FashionMNIST, default taps. All arms of a seed start from the same weights and see the same batches (`fine_tune_alphas`, checked). The maps: 30 test images, 3 a class, the same in every seed; explained is the class that the seed's plain network predicts; the deepest map of at least
7x7 (`blocks.4`). Rows are means over those images whose map is blank (no cell speaks for the class) in no trained arm; `images` says how many, `blank` how many maps are blank in the arm itself. Accuracy: 300 test images. Fixed beforehand: the claim is read from the slope of the entropy over alpha
(`trend`); everything else is exploratory."""
import argparse, time, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.callback.channelslast import ChannelsLast
from importlib.metadata import version

from fmce_fastai.study.alphas import fine_tune_alphas
from fmce_fastai.study.cam_statistics import cam_statistics
from fmce_fastai.study.cams import compare_cams, MEASURES
from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.study.settings import Study
from fmce_fastai.study.matched import NormEval
from fmce_fastai.study.learner import build_learner, eval_dl, study_dls

HERE = Path(__file__).resolve().parent
PATH = HERE/f"cam_cpu_float32_torch{torch.__version__.split('+')[0]}.csv"
PICTURE = HERE.parent/"nbs"/"images"/"cam_grid.png"
PICTURED = 1  # seed of the picture
ALPHAS, EPOCHS, LR, A_CLASS = (.7, .8, .9, .95), 10, 3e-3, 3
STUDY = Study(data="fashion_mnist", n_train=50, size=112, bs=25, arch="tf_efficientnet_lite0", weights="efficientnet-lite0", epochs=EPOCHS, lrs=(LR,), body_lr=.3, head="linear")


def images(dls):
    "The same test images for every seed, `A_CLASS` of each class: (x, y)."
    x, y = [], []
    order = np.random.default_rng(0).permutation(len(dls[2].dataset))[:300]
    for xb, yb in dls.test_dl([dls[2].dataset.items[i] for i in order], with_labels=True, bs=100): x.append(xb); y.append(yb)
    x, y = torch.cat(x).as_subclass(torch.Tensor), torch.cat(y).as_subclass(torch.Tensor)
    keep = torch.cat([(y == c).nonzero().flatten()[:A_CLASS] for c in range(dls.c)])
    return x[keep], y[keep]

def learner(seed, root):
    from dataclasses import replace
    dls = study_dls(replace(STUDY, root=root), seed)
    learn = build_learner(STUDY, dls, seed, cbs=[NormEval(body=True), ChannelsLast()])
    test, shown = eval_dl(dls, "test", 300), images(dls)
    dls.loaders[1] = dls.valid.new(n=STUDY.bs)  # validation inside the fits is not read
    return learn, test, shown

def run(seed, root):
    "The comparison of one seed, and the accuracies."
    learn, test, shown = learner(seed, root)
    oracle = FMCENet.load(HERE/"oracles"/"universal_without_fashion.safetensors")
    learners = fine_tune_alphas(learn, ALPHAS, EPOCHS, slice(LR*STUDY.body_lr, LR), oracle=oracle, seed=seed, bar=False)
    accuracy = {}
    for name, one in learners.items():
        with one.no_bar(): p, y = one.get_preds(dl=test)
        accuracy[name] = float((p.argmax(1) == y).float().mean())
    return compare_cams(learners, shown, seed=seed, rows=6), accuracy

def rows_of(seed, cams, accuracy, seconds):
    wide = cams.frame.pivot_table(index="image", columns="name", values="entropy", dropna=False)
    use = wide.drop(columns="before").dropna().index
    found = cams.frame[cams.frame.image.isin(use)].groupby("name", sort=False)[["probability", *MEASURES]].mean()
    tap = cams.frame.iloc[0]
    for name, r in found.iterrows():
        alpha = cams.frame[cams.frame.name == name].alpha.iloc[0]
        yield dict(seed=seed, name=name, alpha=max(ALPHAS) if name == "placebo" else alpha, accuracy=round(accuracy[name], 4), **r.round(5).to_dict(), images=len(use), blank=int(wide[name].isna().sum()), tap=tap.tap, grid=tap.grid, size=STUDY.size, n_train=STUDY.n_train,
                   bs=STUDY.bs, epochs=EPOCHS, lr=LR, body_lr=STUDY.body_lr, arch=STUDY.arch, weights=STUDY.weights, oracle="universal_without_fashion", seconds=round(seconds), torch=torch.__version__, timm=version("timm"), fastai=version("fastai"), grad_cam=version("grad-cam"))

def read(): return pd.read_csv(PATH) if PATH.exists() else pd.DataFrame(columns=["seed"])

def report():
    t = read()
    print(t.groupby("name", sort=False)[["accuracy", "probability", *MEASURES, "blank", "images"]].mean().round(3).to_string(), end="\n\n")
    print(cam_statistics(t, measures=(*MEASURES, "accuracy")).round(4).to_string(index=False))

def picture(cams):
    from PIL import Image
    PICTURE.parent.mkdir(exist_ok=True)
    cams.plot([A_CLASS*c for c in (0, 1, 5, 7, 8)]).savefig(PICTURE, dpi=84)  # the first image of five of the ten classes
    Image.open(PICTURE).convert("RGB").quantize(256, kmeans=1).save(PICTURE, optimize=True)

def main(seeds, root):
    for seed in seeds:
        if (read().seed == seed).any(): continue
        start = time.time()
        cams, accuracy = run(seed, root)
        rows = pd.DataFrame(rows_of(seed, cams, accuracy, time.time()-start))
        pd.concat([read(), rows]).to_csv(PATH, index=False) if PATH.exists() else rows.to_csv(PATH, index=False)
        if seed == PICTURED: picture(cams)
        print(rows[["seed", "name", "accuracy", "probability", *MEASURES, "blank"]].to_string(index=False), f"{time.time()-start:.0f} s", flush=True)

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", default="0-9", help="first-last")
    p.add_argument("--root", default="/usr/share/datasets/fashion-mnist")
    p.add_argument("--report", action="store_true")
    p.add_argument("--picture", action="store_true")
    a = p.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    first, last = map(int, a.seeds.split("-"))
    if a.report: report()
    elif a.picture: picture(run(PICTURED, a.root)[0])
    else: main(range(first, last+1), a.root)
