"FashionMNIST as tensors on the device, in fastai's DataLoaders: the CPU only draws the order."
import random
from pathlib import Path

import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.vision.core import imagenet_stats

from fmce_fastai.data.images import fit_square
from fmce_fastai.data.torchvision import torchvision_sets


def read_fashion_mnist(root):
    "Training and test (images, labels): bytes (N, 28, 28) and class numbers."
    spec = torchvision_sets["fashion_mnist"]
    train, test, _ = spec.read(Path(root), spec)
    return train, test


class DeviceImages:
    "The first `n` images and labels, on the device; the data set of a loader."
    def __init__(self, part, n, size, device):
        images, labels = (torch.as_tensor(o)[:n] for o in part)
        self.images = fit_square(images[:, None], size).to(device)
        self.labels = labels.long().to(device)
        self.mean, self.std = (torch.tensor(o, device=device)[:, None, None] for o in imagenet_stats)

    def __len__(self): return len(self.images)

    def __getitem__(self, i):
        x, y = self.batch([i])
        return x[0], y[0]

    def batch(self, indices):
        "Images, normalised (B, 3, size, size), and labels (B,)."
        i = torch.as_tensor(list(indices), device=self.images.device)
        return (self.images[i].float()/255 - self.mean)/self.std, self.labels[i]


class DeviceLoader(DataLoader):
    "Reads a batch at once."
    def create_batches(self, samps): yield from map(self.dataset.batch, self.chunkify(samps))


def device_dls(train, test, bs, seed=0, n=None):
    """Loaders of `DeviceImages`: training, one batch to validate, the test set.

    `seed` decides the order of the first `n` training images."""
    device = train.images.device
    options = dict(num_workers=0, device=device)
    loaders = [DeviceLoader(train, bs=bs, n=n, shuffle=True, drop_last=True, **options),
               DeviceLoader(test, bs=bs, n=bs, **options), DeviceLoader(test, bs=250, **options)]
    dls = DataLoaders(*loaders, device=device)
    dls.train.rng = random.Random(seed)
    dls.c = 10
    return dls
