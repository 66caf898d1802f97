"Broken files by the thousand: `python tests/soak.py 20000`. Every file that a reader is given is refused with its own error, or is whole; nothing else is raised, and memory is bounded. `make soak` runs it, with the leak run of `test_memory.py`."
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from fmce_fastai.oracle.files import OracleFileError
from fmce_fastai.oracle.base import FMCENet
from fmce_fastai.oracle.dataset import DatasetError, FMCSDataset
from fmce_fastai.train.recorder import FMCSRecorder
from fmce_fastai.study.arms import StudyError
from fmce_fastai.study.settings import Study
from fmce_fastai.study.rows import read_rows
from fmce_fastai.study.run import run_study, write_report
from helpers import make_model, make_oracle, tensor_learner


def broken(data, rng):
    "`data` with one thing wrong, and what it is."
    data, kind = bytearray(data), rng.choice(["cut", "bits", "bytes", "zeros", "twice", "inserted", "length", "text"])
    n = len(data)
    at = rng.randrange(n) if n else 0
    if kind == "cut": del data[at:]
    elif kind == "bits":
        for _ in range(rng.randint(1, 8)): data[rng.randrange(n)] ^= 1 << rng.randrange(8)
    elif kind == "bytes": data[at:at+rng.randint(1, 64)] = rng.randbytes(rng.randint(0, 64))
    elif kind == "zeros": data[at:at+rng.randint(1, 4096)] = bytes(rng.randint(1, 4096))
    elif kind == "twice": data += bytes(data)
    elif kind == "inserted": data[at:at] = rng.randbytes(rng.randint(1, 32))
    elif kind == "length": data[:8] = struct.pack("<Q", rng.choice([0, 1, n, 2**31, 2**40, 2**63, 2**64-1]))  # a header that promises terabytes
    else:  # numbers in text: shapes, offsets, versions
        digits = [i for i, b in enumerate(data[:4000]) if 48 <= b <= 57]
        if digits:
            at = rng.choice(digits)
            data[at:at+1] = rng.choice([b"9"*18, b"-1", b"1e999", b"null", b"0", b'"x"'])
    return bytes(data), kind

def fuzz(name, files, read, errors, n, rng):
    "`n` times: one of `files` broken, then `read()`."
    whole, seen, begun = {f: f.read_bytes() for f in files}, Counter(), time.time()
    for _ in range(n):
        f = rng.choice(files)
        data, kind = broken(whole[f], rng)
        if data == whole[f]: continue
        f.write_bytes(data)
        try:
            read()
            seen["read"] += 1
        except errors: seen["refused"] += 1
        finally: f.write_bytes(whole[f])
    read()
    print(f"{name}: {n} broken files, {seen['refused']} refused, {seen['read']} read (their form is whole), {time.time()-begun:.0f} s, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024:.0f} MB", flush=True)
    return seen

def data_set(folder, n_snapshots=4):
    learn = tensor_learner(n=160, metrics=[], cbs=FMCSRecorder(n_images=16, n_snapshots=n_snapshots, path=folder))
    learn.logger = lambda *_: None
    with learn.no_bar(): learn.fit(3, 1e-2)
    return FMCSDataset(folder)

def all_of(path):
    d = FMCSDataset(path)
    for i in range(len(d)):
        for n in d.plan.names: np.asarray(d.maps(n, i)).sum(dtype=float)
    try: d.convergence()
    except ValueError as e:
        if "finite" not in str(e): raise  # a loss that is not finite is a run's own trouble, and said so

def main(n=2000, seed=0):
    warnings.filterwarnings("ignore")
    rng, folder = random.Random(seed), Path(tempfile.mkdtemp())
    try:
        fitted, universal = folder/"fitted.safetensors", folder/"universal.safetensors"
        make_oracle(make_model()).save(fitted)
        FMCENet.universal().save(universal)
        for f in (fitted, universal):
            seen = fuzz(f"oracle ({f.stem})", [f], lambda f=f: FMCENet.load(f), OracleFileError, n, rng)
            assert not seen["read"], "a broken oracle was read"
        data_set(folder/"maps")
        fuzz("data set", [p for p in (folder/"maps").rglob("*") if p.is_file()], lambda: all_of(folder/"maps"), DatasetError, n//4, rng)
        study = Study(("plain", "scaled"), primary="scaled", n_train=64, n_eval=50, size=16, bs=32, epochs=1, seeds=(0, 1))
        run_study(study, folder/"study", bar=False)
        files = [folder/"study"/"study.json", *(folder/"study"/"runs").glob("*.json")]
        def report():
            Study.load(folder/"study")
            write_report(folder/"study")
        fuzz("study", files, report, StudyError, n//40, rng)
    finally: shutil.rmtree(folder)

if __name__ == "__main__": main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
