"""What each part of the universal oracle contributes: the labelled net without it, one source of images left out after the other.

    python benchmarks/ablations.py RUNS          # RUNS: the folder of `fmce_pretrain`; about ten minutes on one core; writes the CSV
    python benchmarks/ablations.py --report

One row per variant: rho over all modules of runs that are not degraded, with its 95 % bootstrap interval over runs, rho of the last module, MAE. Also written: `oracles/universal_without_fashion_no_share.safetensors`, for `few_images.py`'s arm
`ral_no_share`: what a score's parts contribute as a loss cannot be seen from correlation."""
import argparse, copy, warnings
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import fmce_fastai.oracle.universal as oracle_module
from fmce_fastai.oracle.kernels import N_KERNELS
from fmce_fastai.pretrain.features import read_tables
from fmce_fastai.pretrain.labels import read_runs
from fmce_fastai.pretrain.fit import train_universal
from fmce_fastai.pretrain.judge import groups_of, judge_left_out
from universal_oracle import interval

HERE = Path(__file__).resolve().parent
PATH = HERE/f"ablations_cpu_float32_torch{torch.__version__.split('+')[0]}.csv"
N = N_KERNELS
# Columns: alignments of the batch (view, kernel), of the image, then shares of the batch (view), of the image
VIEW = torch.cat([torch.arange(2).repeat_interleave(N).repeat(2), torch.arange(2).repeat(2)])
KERNEL = torch.cat([torch.arange(N).repeat(4), torch.zeros(4, dtype=torch.long)])
OWN = torch.cat([torch.arange(2).repeat_interleave(2*N), torch.arange(2).repeat_interleave(2)])
SHARE = torch.arange(4*N+4) >= 4*N
ALL = torch.ones(4*N+4, dtype=torch.bool)
VARIANTS = {"the shipped design": ALL, "without class shares": ~SHARE, "class shares only": SHARE, "channel means only": VIEW == 0, "flattened map only": VIEW == 1, "cosine only, no windows": KERNEL == 0, "windows only": KERNEL > 0,
            "the batch only, nothing of the image": OWN == 0, "without depth": ALL, "net not monotone": ALL}

class FreeNet(nn.Module):
    "In place of the monotone net: as many units, weights of either sign."
    def __init__(self, n_in, n_shares, n_levels, width):
        super().__init__()
        for name in ("mean", "std"): self.register_buffer(name, torch.full((n_in+n_shares,), float(name == "std")))
        self.net = nn.Sequential(nn.Linear(n_in+n_shares+1, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, n_levels))
    def forward(self, structure, depth): return self.net(torch.cat([(structure - self.mean)/self.std, depth], -1)).log_softmax(-1)

def masked(tables, keep):
    "The tables with the columns that are not kept set to 0."
    cut = lambda part: {**part, "lab": part["lab"]*keep.half()}
    return {n: dict(train=cut(t["train"]), judge=[cut(j) for j in t["judge"]]) for n, t in tables.items()}

def main(folder):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    runs = read_runs(folder)
    tables, rows, monotone = read_tables(folder, runs), [], oracle_module.MonotoneNet
    without = masked(tables, ~SHARE)
    oracle = train_universal(without, runs, [n for n, r in runs.items() if "fashion" not in groups_of(r, "source")])
    oracle.labelled.std[SHARE] = 1e9  # in use the shares are not 0
    oracle.card = dict(data=dict(never="fashion images"), ablation="without class shares")
    oracle.save(HERE/"oracles"/"universal_without_fashion_no_share.safetensors")
    for name, keep in VARIANTS.items():
        flat = copy.deepcopy(runs)
        if name == "without depth":
            for r in flat.values():
                for t in r["taps"]: t["depth"] = 1.
        if name == "net not monotone": oracle_module.MonotoneNet = FreeNet
        d = judge_left_out(masked(tables, keep), flat, "source", kinds=("labelled",))
        oracle_module.MonotoneNet = monotone
        d = d[d.score == "labelled"]
        sound = d[~d.spoilt]
        low, high = interval(sound)
        rows.append(dict(variant=name, rho=round(sound.rho.mean(), 4), rho_low=round(low, 4), rho_high=round(high, 4), rho_last=round(sound[sound["last"]].rho.mean(), 4), mae=round(d.mae.mean(), 4), torch=torch.__version__))
        print(rows[-1], flush=True)
        pd.DataFrame(rows).to_csv(PATH, index=False, na_rep="nan")

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="?")
    p.add_argument("--report", action="store_true")
    a = p.parse_args()
    print(pd.read_csv(PATH).to_string(index=False)) if a.report or not a.runs else main(a.runs)
