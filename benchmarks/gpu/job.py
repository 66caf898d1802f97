"What one call is to do: where, for how long, and how large."
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import fastai
import timm
import torch

from fmce_fastai import __version__
from ledger import Budget, Rows

# float32 as PyTorch's defaults have it: on a GPU its convolutions may use TF32 (column `conv_tf32`)
PRECISIONS = ("float32", "bfloat16", "float32_channels_last", "bfloat16_channels_last")

# Everything that `--tiny` makes small. A run of part c has the defaults of `fmce_train`, but all 60,000
# training images, and batches of 256 so that more seeds fit. `oracle_epochs=None`: about 800 steps.
FULL = dict(
    overhead=dict(arch="resnet50", size=224, bs=64, rows=3, steps=64, n_images=256, n_snapshots=16),
    precisions=PRECISIONS,
    cells=("resnet50", "torchvision.shufflenet_v2_x1_0"),
    run=dict(size=32, n_train=60_000, n_test=10_000, bs=256, epochs=12, oracle_epochs=None,
             ral_epochs=4, lr=3e-3, ral_lr=3e-4, alpha=.9, n_images=256, n_snapshots=16))
TINY = dict(
    overhead=dict(arch="test_resnet", size=32, bs=8, rows=1, steps=8, n_images=16, n_snapshots=3),
    precisions=("float32", "bfloat16_channels_last"),
    cells=("test_resnet", "torchvision.shufflenet_v2_x0_5"),
    run=dict(size=32, n_train=640, n_test=200, bs=32, epochs=4, oracle_epochs=1, ral_epochs=1,
             lr=3e-3, ral_lr=3e-4, alpha=.9, n_images=32, n_snapshots=4))


@dataclass
class Job:
    "One call of the script."
    bundle: Path  # Made by `pack`
    out: Path     # Folder of the CSV files
    state: Path   # Folder of what a second call needs: start weights and oracles
    budget: Budget
    tiny: bool    # In miniature
    seeds: int    # Most seeds for each network of part c

    @property
    def sizes(self): return TINY if self.tiny else FULL

    @property
    def device(self): return torch.device("cpu" if self.tiny else "cuda")

    @property
    def device_name(self):
        "As file names have it."
        name = "cpu" if self.tiny else torch.cuda.get_device_name()
        return re.sub(r"[^0-9A-Za-z]+", "_", name)

    def rows(self, what, precision=None):
        "The rows of a measure; the conditions are in the file's name."
        version = "torch" + torch.__version__.split("+")[0]
        parts = ["tiny" if self.tiny else None, what, self.device_name, precision, version]
        return Rows(self.out/f"{'_'.join(filter(None, parts))}.csv")

    def conditions(self, precision):
        "The last columns of every row."
        return dict(device=self.device_name, precision=precision,
                    conv_tf32=torch.backends.cudnn.allow_tf32, torch=torch.__version__,
                    timm=timm.__version__, fastai=fastai.__version__, fmce_fastai=__version__,
                    python=platform.python_version())
