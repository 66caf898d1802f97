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
    "Memory by tracemalloc (Python's objects), of all tensors, and resident memory, every `every` steps of training."
    order, run_valid = 10_000, False
    def __init__(self, every): self.every, self.seen, self.n = every, [], 0
    def after_batch(self):
        self.n += 1
        if self.n % self.every: return
        gc.collect()
        held = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        self.seen.append((self.n, tracemalloc.get_traced_memory()[0]/1e6, sum(o.numel()*o.element_size() for o in held if not o.is_meta)/1e6, resident()))

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
    # fastai's recorder keeps a loss and a rate of every step, FMCSRecorder too: some numbers; one map of a step has 16 kB, all of them 60
    assert (tensors1 - tensors0)/(n1 - n0) < 1e-3, seen
    assert (mb1 - mb0)/(n1 - n0) < .02, seen

@pytest.mark.parametrize("memory", [0, 32])
def test_no_map_of_an_earlier_step_is_alive(memory, tmp_path):
    "Nor its graph, which would hold it. Looked for in the middle of the next step; what `memory` keeps are copies without graph."
    class Look(Callback):
        order, run_valid = FMCECallback.order + 1, False
        def __init__(self): self.maps, self.scores, self.alive = [], [], []
        def before_fit(self):
            score = self.learn.fmce._score
            def noted(maps):
                s = score(maps)
                self.now = [weakref.ref(m) for m in maps.values()] + [weakref.ref(s.logits)]
                return s
            self.learn.fmce._score = noted
        def after_loss(self):
            gc.collect()
            if self.maps: self.alive.append(sum(r() is not None for r in self.maps))
            self.maps = self.now
    look = Look()
    learn = tensor_learner(path=tmp_path, metrics=[], cbs=[FMCECallback(.5, memory=memory), look])
    learn.logger = lambda *_: None
    with learn.no_bar(): learn.fit(2)
    assert len(look.alive) == 7 and not any(look.alive)

@pytest.mark.parametrize("arch", [None, "vit"])
@pytest.mark.parametrize("oracle, memory", [("fitted", 0), ("universal", 0), ("universal", 32)])
def test_learner_callback_and_network_are_collected(arch, oracle, memory, tmp_path):
    learn = tensor_learner(arch, path=tmp_path, metrics=[], cbs=FMCSRecorder(n_images=16, n_snapshots=3))
    learn.add_cb(FMCECallback(.5, make_oracle(learn.model) if oracle == "fitted" else None, memory=memory))
    learn.logger = lambda *_: None
    with learn.no_bar(): learn.fit(1)
    dead = [weakref.ref(o) for o in (learn, learn.fmce, learn.model, learn.fmcs_recorder, learn.fmce.oracle)]
    del learn
    gc.collect()
    assert [d() for d in dead] == [None]*5

if __name__ == "__main__":
    import tempfile
    warnings.filterwarnings("ignore")
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    for oracle in ("fitted", "universal"):
        print(f"{oracle} oracle, callback and recorder\n  step  Python MB  tensors MB  resident MB")
        for n, mb, tensors, rss in long_fit(steps, steps//8, Path(tempfile.mkdtemp()), oracle): print(f"{n:>6} {mb:>10.2f} {tensors:>11.3f} {rss:>12.1f}")
