"""Which score tells how much a module's map is worth on new images? The shipped oracles and the alignment, against a probe.

    fmce_pretrain RUNS                          # records the runs; about 70 core-minutes
    python benchmarks/held_out_quality.py RUNS  # about 10 core-minutes; writes the CSV
    python benchmarks/held_out_quality.py --report

111 runs of 33 small networks (28 families) on 16 tasks. The truth is the accuracy of a linear probe, fitted to training
images and read on held-out ones, relative to chance and to the best on the task (`fmce_pretrain` records it). All scores
read the same batches, with class labels: 64 or 256 images, training images in eval and in training mode, or held-out ones.
`ridge`: FMCS of the ridge oracle; `universal`: FMCS of the universal oracle (64 images); `error`: 1 - the left-out error;
`alignment`: debiased; `ceiling`: a probe fitted to held-out images. Spearman's rho with the truth: between the modules of
a network at one moment; of one module over training; pooled. `..._ahead`: how far a score is ahead of the better one of
error and alignment, with a 95 % bootstrap interval over runs. The universal oracle was trained on runs of most of these
families and of four of the six sources of images, so its row flatters it.

The form of the ridge oracle's FMCS was chosen on the runs in `held_out_quality_developed_with.txt`; `subset` is `other`
for the rows of the other runs, and `all` for those of all."""
import argparse
import warnings
from pathlib import Path

import pandas as pd
import torch

from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.pretrain import agreement as agree
from fmce_fastai.pretrain.labels import read_runs
from fmce_fastai.pretrain.readings import judged_scores, read_readings, write_readings

HERE = Path(__file__).resolve().parent
PATH = HERE/f"held_out_quality_cpu_float32_torch{torch.__version__.split('+')[0]}.csv"
SCORES = ('ridge', 'universal', 'error', 'alignment', 'ceiling')

def main(folder):
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    runs = read_runs(folder)
    for n in runs: write_readings(folder, n)
    tables = read_readings(folder, runs)
    d = agree.quality_frame(None, tables, runs, [n for n in runs if runs[n]['n_held']])
    own = {n:judged_scores(FMCENet.universal(), folder, n) for n in d.run.unique()}
    def universal(r):
        scores = own[r.run].get((r.mode == 'held', r.images))
        return float('nan') if scores is None else float(scores[r.snapshot,r.module])
    d['universal'] = [universal(r) for r in d.itertuples()]
    used = (HERE/'held_out_quality_developed_with.txt').read_text().split()
    subsets = dict(other=d[~d.run.isin(used)], all=d)
    tables = [agree.agreement(part, scores=SCORES).assign(subset=k) for k,part in subsets.items()]
    pd.concat(tables).drop(columns='mae').assign(torch=torch.__version__).round(4).to_csv(PATH, index=False)
    report()

def report(): print(pd.read_csv(PATH).drop(columns='torch').round(2).to_string(index=False))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='?')
    p.add_argument('--report', action='store_true')
    a = p.parse_args()
    report() if a.report or not a.runs else main(a.runs)
