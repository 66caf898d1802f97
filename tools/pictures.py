"The README's picture, of a real run: `python tools/pictures.py` trains a resnet10t on scikit-learn's digits for eight epochs (about a minute on one core) and writes nbs/images/report.png."
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from fastai.torch_core import set_seed
from fastai.vision.learner import vision_learner

import fastai.callback.schedule
from fmce_fastai.all import FMCECallback, digits_dls, fmce_report

OUT = Path(__file__).resolve().parents[1] / "nbs" / "images" / "report.png"


def main():
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    set_seed(0)
    learn = vision_learner(digits_dls(size=32, bs=64), "resnet10t", pretrained=False, cbs=FMCECallback(alpha=0.9))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8, 3e-3)
    figure = plt.figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15])
    left.suptitle("fmce_report(learn).plot()", family="monospace", fontsize="medium")
    right.suptitle("learn.fmce.plot()", family="monospace", fontsize="medium")
    fmce_report(learn, bar=False).plot(left.subplots())
    learn.fmce.plot(axs=right.subplots(2, 1, sharex=True, height_ratios=[3, 1.3]))
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, dpi=100)


if __name__ == "__main__": main()
