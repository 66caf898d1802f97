"""How well the quality oracle predicts held-out quality where it was not trained: families, or sources of images, left out.

    fmce_pretrain RUNS                            # records the runs; about 70 core-minutes
    python benchmarks/quality_oracle.py RUNS      # reads them (about 15 core-minutes), trains and judges; writes the CSV
    python benchmarks/quality_oracle.py --report

One row per way of leaving out, mode of the images (`eval` and `train`: training images; `held`: held-out ones), number
of images and score: see `SCORES` in `fmce_fastai.pretrain.agreement`. Spearman's rho with the quality: between the
modules of a network at one moment, of one module over training, pooled; `mae`: mean error of the quality. `..._ahead`:
how far ahead of the better one of left-out error and alignment, with a 95 % bootstrap interval over runs. A second
CSV holds the mean quality where the score has a certain value (`calibration`)."""
import argparse
import warnings
from pathlib import Path

import pandas as pd
import torch

from fmce_fastai.pretrain.agreement import agreement, calibration, left_out_frame
from fmce_fastai.pretrain.labels import read_runs
from fmce_fastai.pretrain.readings import read_readings, write_readings

HERE = Path(__file__).resolve().parent
VERSION = f"cpu_float32_torch{torch.__version__.split('+')[0]}"
PATH = HERE/f'quality_oracle_{VERSION}.csv'
CALIBRATION = HERE/f'calibration_of_quality_{VERSION}.csv'

def main(folder, only_read):
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    runs = {n:r for n,r in read_runs(folder).items() if not only_read or (Path(folder)/f'{n}.readings.pt').exists()}
    for n in runs: write_readings(folder, n)
    tables,parts,bins = read_readings(folder, runs),[],[]
    for by in ('family', 'source'):
        d = left_out_frame(tables, runs, by)
        parts.append(agreement(d).assign(left_out=by, families=len({r['family'] for r in runs.values()}), torch=torch.__version__))
        bins.append(calibration(d).assign(left_out=by, torch=torch.__version__))
        print(parts[-1].drop(columns=['torch', 'families']).round(3).to_string(), flush=True)
    if only_read: return
    pd.concat(parts).round(4).to_csv(PATH, index=False)
    pd.concat(bins).round(4).to_csv(CALIBRATION, index=False)

def report(): print(pd.read_csv(PATH).drop(columns='torch').round(2).to_string(index=False))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='?')
    p.add_argument('--only-read', action='store_true', help='use the runs that are read already, and write no CSV')
    p.add_argument('--report', action='store_true')
    a = p.parse_args()
    report() if a.report or not a.runs else main(a.runs, a.only_read)
