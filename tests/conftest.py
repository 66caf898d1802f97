"One torch thread per process: results do not depend on how many processes share the cores."
import gc
import os
import warnings

import pytest

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    "The libraries, in every process that runs tests. The one that only hands them out to xdist's workers starts at once."
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"): return
    with warnings.catch_warnings():
        # timm, fastai and pandas use, at import, what their own dependencies deprecate
        warnings.simplefilter("ignore")
        import fastai.callback.schedule
        import fastai.vision.learner
        import torch
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def old_objects_aside():
    "What imports and earlier files have made is left out of the garbage collection, which would look at all of it each time."
    gc.collect()
    gc.freeze()
