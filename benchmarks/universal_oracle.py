"""How accurate the universal oracle's scores are where it was not trained: one family of networks, one source of images or one type of task left out, one after the other.

    python benchmarks/universal_oracle.py RUNS          # RUNS: the folder of `fmce_pretrain`; about 15 minutes on one core; writes the CSV
    python benchmarks/universal_oracle.py --report

One row per way of leaving out, group left out and score (`labelled`, `free`: the oracle with and without labels; `cka_map`, `cka_means`: debiased kernel-target alignment, nothing learnt): rho and its 95 % bootstrap interval
over runs, rho of the last module, in eval and in training mode, MAE over all modules and snapshots and of the last module. Group `all`: mean over all modules and runs, not of the rows."""
import argparse, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from fmce_fastai.pretrain.features import read_tables
from fmce_fastai.pretrain.labels import read_runs
from fmce_fastai.pretrain.judge import judge_left_out

HERE = Path(__file__).resolve().parent
PATH = HERE/f"universal_oracle_cpu_float32_torch{torch.__version__.split('+')[0]}.csv"


def interval(g, n=1000, seed=0):
    "Bootstrap over runs: modules and modes of a run go together."
    runs = [r.rho.dropna().to_numpy() for _, r in g.groupby("run")]
    runs = [r for r in runs if len(r)]
    if len(runs) < 2: return np.nan, np.nan
    rng = np.random.default_rng(seed)
    means = [np.concatenate([runs[i] for i in rng.integers(0, len(runs), len(runs))]).mean() for _ in range(n)]
    return tuple(np.percentile(means, [2.5, 97.5]))

def summarise(by, d):
    for left, part in [("all", d), *d.groupby("left_out")]:
        for score, g in part.groupby("score"):
            sound = g[~g.spoilt]
            low, high = interval(sound)
            mean = lambda s: "" if not np.isfinite(s.mean()) else round(float(s.mean()), 4)
            yield dict(by=by, left_out=left, score=score, runs=g.run.nunique(), runs_with_rho=sound.dropna(subset="rho").run.nunique(), rho=mean(sound.rho), rho_low=round(low, 4), rho_high=round(high, 4), rho_last=mean(sound[sound["last"]].rho),
                       rho_eval=mean(sound[sound["mode"] == "eval"].rho), rho_train=mean(sound[sound["mode"] == "train"].rho), mae=mean(g.mae), mae_last=mean(g[g["last"]].mae), torch=torch.__version__)

def main(folder):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    runs = read_runs(folder)
    tables, rows = read_tables(folder, runs), []
    for by in ("source", "task", "family"):
        rows += summarise(by, judge_left_out(tables, runs, by))
        pd.DataFrame(rows).to_csv(PATH, index=False, na_rep="nan")
        report()

def report():
    d = pd.read_csv(PATH)
    print(d[d.left_out == "all"].drop(columns=["left_out", "torch"]).to_string(index=False))

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="?")
    p.add_argument("--report", action="store_true")
    a = p.parse_args()
    report() if a.report or not a.runs else main(a.runs)
