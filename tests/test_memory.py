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
from torch._subclasses.fake_tensor import FakeTensor

from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.train.recorder import FMCSRecorder
from helpers import make_oracle, tensor_learner

pytestmark = pytest.mark.filterwarnings("ignore::fmce_fastai.convergence.run.ConvergenceWarning")  # so short a run has no scores


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
        held = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not issubclass(type(o), FakeTensor)]  # of a compiled network, in an earlier test: they have sizes but no memory
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

@pytest.mark.parametrize("arch, oracle, memory", [(None, "universal", 0), (None, "universal", 32), (None, "fitted", 0), ("vit", "universal", 32), ("vit", "fitted", 0)])
def test_no_map_of_an_earlier_step_is_alive(arch, oracle, memory, tmp_path):
    "Nor its graph, which would hold it. Looked for in the middle of the next step; what `memory` keeps are copies without graph."
    class Look(Callback):
        order, run_valid = FMCECallback.order + 1, False
        def __init__(self): self.maps, self.scores, self.alive = [], [], []
        def before_fit(self):
            score = self.learn.fmce.score_maps
            def noted(maps):
                s = score(maps)
                self.now = [weakref.ref(m) for m in maps.values()] + [weakref.ref(s.logits)]
                return s
            self.learn.fmce.score_maps = noted
        def after_loss(self):
            gc.collect()
            if self.maps: self.alive.append(sum(r() is not None for r in self.maps))
            self.maps = self.now
    look = Look()
    learn = tensor_learner(arch, path=tmp_path, metrics=[])
    learn.add_cbs([FMCECallback(.5, make_oracle(learn.model) if oracle == "fitted" else None, memory=memory), look])
    learn.logger = lambda *_: None
    with learn.no_bar(): learn.fit(2)
    assert len(look.alive) == 7 and not any(look.alive)

class CtrlC(Callback):
    "In the fit's third step, with maps in hand."
    order, run_valid = FMCECallback.order + 1, False
    def after_loss(self):
        if self.iter == 2: raise KeyboardInterrupt

@pytest.mark.parametrize("arch, oracle, memory", [(None, "universal", 0), (None, "fitted", 0), ("vit", "universal", 32), ("vit", "fitted", 0)])
@pytest.mark.parametrize("end", ["whole", "Ctrl-C"])
def test_learner_callbacks_oracle_and_network_are_collected(arch, oracle, memory, end, tmp_path):
    "With what the recorder has written into a folder of its own; the data set outlives the learner as long as somebody holds it."
    learn = tensor_learner(arch, path=tmp_path, metrics=[])
    learn.add_cbs([FMCECallback(.5, make_oracle(learn.model) if oracle == "fitted" else None, memory=memory), FMCSRecorder(n_images=16, n_snapshots=3), *([CtrlC()] if end == "Ctrl-C" else [])])
    learn.logger = lambda *_: None
    with learn.no_bar():
        if end == "whole": learn.fit(1)
        else:
            with pytest.raises(KeyboardInterrupt): learn.fit(1)
    dataset = learn.fmcs_recorder.finish()
    folder = dataset.path
    dead = {type(o).__name__: weakref.ref(o) for o in (learn, learn.fmce, learn.fmce.oracle, learn.fmcs_recorder, learn.model, next(learn.model.parameters()), next(learn.fmce.oracle.buffers()))}
    sys.last_exc = sys.last_value = sys.last_traceback = None
    del learn
    gc.collect()
    assert not [name for name, d in dead.items() if d() is not None]
    assert len(dataset) >= 2 and folder.is_dir()
    del dataset
    gc.collect()
    assert not folder.exists()

if __name__ == "__main__":
    import tempfile
    warnings.filterwarnings("ignore")
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    for oracle in ("fitted", "universal"):
        print(f"{oracle} oracle, callback and recorder\n  step  Python MB  tensors MB  resident MB")
        for n, mb, tensors, rss in long_fit(steps, steps//8, Path(tempfile.mkdtemp()), oracle): print(f"{n:>6} {mb:>10.2f} {tensors:>11.3f} {rss:>12.1f}")
