"""The three stages on real data, one row per run: accuracies, how well the oracle does on held-out images, time.

    python benchmarks/three_stages.py --fashion-mnist /usr/share/datasets/fashion-mnist

Rows are added to the CSV as they come; a run that is already there is not repeated. One seed per row: the accuracies compare
nothing (that takes many seeds and more controls), the oracle's figures are what this table is for.
"""
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
from fastcore.script import call_parse

from fmce_fastai import __version__

HERE = Path(__file__).parent
RUNS = [dict(data="digits", arch="resnet10t"),
        dict(data="digits", arch="test_resnet"),
        dict(data="fashion_mnist", arch="resnet10t", n_train=10_000, epochs=6, ral_epochs=2),
        dict(data="fashion_mnist", arch="torchvision.shufflenet_v2_x1_0", cut=-1, n_train=10_000, epochs=8, ral_epochs=2)]


def fmce_train(options, threads):
    "Run the command with `options`; what its results.json holds."
    folder = Path(tempfile.mkdtemp(prefix="three_stages_"))
    try:
        args = [a for k, v in options.items() for a in ("--" + k.replace("_", "-"), str(v))]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run([Path(sys.executable).with_name("fmce_train"), *args, "--out", folder / "run"], check=True, env=env)
        return json.loads((folder / "run" / "results.json").read_text())
    finally: shutil.rmtree(folder)


def row_of(results, threads):
    "One CSV row of a finished run."
    cfg = results["options"]
    last = results["stage2"]["scores"][-2:]
    row = {k: cfg[k] for k in ("data", "arch", "n_train", "size", "bs", "epochs", "ral_epochs", "alpha", "lr", "n_images", "n_snapshots", "seed")}
    row["n_train"] = results["stage1"]["n_train"]
    row |= {f"accuracy_{k}": round(results[s]["test"]["accuracy"], 4) for k, s in (("before", "stage1"), ("plain", "stage3_plain"), ("ral", "stage3_ral"))}
    row["last_module"] = last[0]["module"]
    row |= {f"{k}_{r['mode']}": round(r[k], 4) for r in last for k in ("mae", "rho")}
    row["run"] = results["stage1"]["run"]["status"]
    row |= {f"seconds_{s}": round(results[s]["seconds"], 1) for s in ("stage1", "stage2", "stage3_plain", "stage3_ral")}
    return row | dict(threads=threads, torch=torch.__version__, timm=timm.__version__, fmce_fastai=__version__, python=platform.python_version())


@call_parse
def main(
    fashion_mnist: str = None,  # Folder with FashionMNIST's IDX files; without it only digits runs
    seeds: int = 1,  # Seeds 0, 1, ...
    threads: int = 1,  # Torch threads
    out: str = None,  # CSV to add to
):
    "Run the three stages on digits and FashionMNIST and add a row per run to a CSV"
    path = Path(out or HERE / f"three_stages_cpu_float32_torch{torch.__version__.split('+')[0]}.csv")
    done = list(csv.DictReader(path.open())) if path.exists() else []
    for seed in range(seeds):
        for run in RUNS:
            if any((d["data"], d["arch"], d["seed"]) == (run["data"], run["arch"], str(seed)) for d in done): continue
            if run["data"] == "fashion_mnist":
                if fashion_mnist is None: continue
                run = {**run, "root": fashion_mnist}
            row = row_of(fmce_train({**run, "seed": seed}, threads), threads)
            with path.open("a", newline="") as f:
                writer = csv.DictWriter(f, row)
                if f.tell() == 0: writer.writeheader()
                writer.writerow(row)
            print(row, flush=True)
