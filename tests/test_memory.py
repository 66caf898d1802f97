"Nothing grows with the number of steps, and nothing outlives its learner. `python tests/test_memory.py` (in `make soak`) does 2,000 steps and prints the figures."
import gc
import sys
import tracemalloc
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback

from fmce_fastai.callback import FMCECallback
from fmce_fastai.recorder import FMCSRecorder
from helpers import make_oracle, tensor_learner

pytestmark = pytest.mark.filterwarnings("ignore::fmce_fastai.convergence.ConvergenceWarning")  # so short a run has no scores


def resident():
    "MB of memory that the process holds."
    return int(Path("/proc/self/statm").read_text().split()[1])*4096/1e6 if Path("/proc/self/statm").exists() else float("nan")

class Watch(Callback):
    "Memory by tracemalloc (Python's objects), number of tensors and resident memory, every `every` steps of training."
    order, run_valid = 10_000, False
    def __init__(self, every): self.every, self.seen, self.n = every, [], 0
    def after_batch(self):
        self.n += 1
        if self.n % self.every: return
        gc.collect()
        tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        self.seen.append((self.n, tracemalloc.get_traced_memory()[0]/1e6, tensors, resident()))

def long_fit(steps, every, path, oracle="universal", memory=64):
    watch = Watch(every)
    learn = tensor_learner(n=64, bs=16, path=path, metrics=[])
    given = make_oracle(learn.model) if oracle == "fitted" else None
    learn.add_cbs([FMCECallback(.5, given, memory=0 if given is not None else memory), FMCSRecorder(n_images=16, n_snapshots=4), watch])
    learn.logger = lambda *_: None
    tracemalloc.start()
    try:
        with learn.no_bar(): learn.fit(steps//4, 1e-3)
    finally: tracemalloc.stop()
    return watch.seen

@pytest.mark.parametrize("oracle", ["fitted", "universal"])
def test_memory_is_flat(oracle, tmp_path):
    seen = long_fit(120, 20, tmp_path, oracle)
    (n0, mb0, tensors0, _), (n1, mb1, tensors1, _) = seen[1], seen[-1]
    # fastai's recorder keeps a loss and a rate of every step, FMCSRecorder too: four small tensors or numbers
    assert tensors1 - tensors0 <= 4*(n1 - n0), seen
    assert (mb1 - mb0)/(n1 - n0) < .02, seen

def test_no_graph_is_alive_after_a_step(tmp_path):
    class Look(Callback):
        order, run_valid = 10_000, False
        def after_loss(self): self.graph = weakref.ref(self.learn.loss_grad)
        def before_batch(self):
            if getattr(self, "graph", None) is not None:
                gc.collect()
                alive.append(self.graph() is not None and self.graph() is not self.learn.loss_grad)
    alive = []
    learn = tensor_learner(path=tmp_path, metrics=[], cbs=[FMCECallback(.5, memory=32), Look()])
    learn.logger = lambda *_: None
    with learn.no_bar(): learn.fit(2)
    assert alive and not any(alive)

def test_learner_callback_and_network_are_collected(tmp_path):
    learn = tensor_learner(path=tmp_path, metrics=[], cbs=[FMCECallback(.5), FMCSRecorder(n_images=16, n_snapshots=3)])
    learn.logger = lambda *_: None
    with learn.no_bar(): learn.fit(1)
    dead = [weakref.ref(o) for o in (learn, learn.fmce, learn.model)]
    del learn
    gc.collect()
    assert [d() for d in dead] == [None]*3

if __name__ == "__main__":
    import tempfile
    warnings.filterwarnings("ignore")
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    for oracle in ("fitted", "universal"):
        print(f"{oracle} oracle, callback and recorder\n  step  Python MB  tensors  resident MB")
        for n, mb, tensors, rss in long_fit(steps, steps//8, Path(tempfile.mkdtemp()), oracle): print(f"{n:>6} {mb:>10.2f} {tensors:>8} {rss:>12.1f}")
