"One torch thread per process: results do not depend on how many processes share the cores."
import os

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import warnings

with warnings.catch_warnings():
    # timm, fastai and pandas use, at import, what their own dependencies deprecate
    warnings.simplefilter("ignore")
    import fastai.callback.schedule
    import fastai.vision.learner
    import torch

torch.set_num_threads(1)
