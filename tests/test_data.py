"Contracts of the data module: fixed splits, untouched random states, equal pixels by every way in, errors that name the file."
import copy
import gzip
import hashlib
import io
import os
import pickle
import random
import shutil
import struct
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

with warnings.catch_warnings():
    # fastai, when it is imported, uses what torch and pandas deprecate
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "The 'mode.chained_assignment' option is deprecated")
    import fastai.vision.learner

import fmce_fastai.data.folder as folder_module
import fmce_fastai.data.loaders as loaders_module
import fmce_fastai.data.torchvision as torchvision_module
from fmce_fastai.data.images import as_bytes, DataError, fit_square
from fmce_fastai.data.arrays import array_dls
from fmce_fastai.data.clipart import decode_drawing, MAX_PIXELS
from fmce_fastai.data.digits import digits_dls, digits_split
from fmce_fastai.data.torchvision import cifar100_dls, cifar10_dls, fashion_mnist_dls, mnist_dls
from fmce_fastai.data.folder import folder_dls
from fmce_fastai.data.fonts import CHARACTERS, find_faces, read_glyphs
from fmce_fastai.data.glyphs import clone_pairs, glyphs_dls, split_glyphs, typeface_groups
from fmce_fastai.data.groups import group_split, linked_groups, similar_pairs
from fmce_fastai.data.names import data_sets, get_dls
from fmce_fastai.data.openclipart import (
    centred_thumbs, drawing_family, drawing_groups, openclipart_dls, OPENCLIPART_PLACEHOLDERS, OPENCLIPART_ROOT, read_openclipart, SIMILAR, split_drawings)
from fmce_fastai.data.subsets import class_shares, stratified_subset

pytestmark = [
    # fastai and torch say these about their own code, not about ours
    pytest.mark.filterwarnings("ignore:load_learner. uses Python's insecure pickle:UserWarning"),
    # matplotlib copies an image in NumPy 2's way, which fastai's tensors do not know
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
IDX = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_figures_left():
    import matplotlib.pyplot as plt
    yield
    plt.close("all")


@pytest.fixture(autouse=True)
def own_data_folder(tmp_path, monkeypatch):
    "No test looks into, or writes to, the data folder of whoever runs it."
    monkeypatch.setattr(torchvision_module, "fastai_path", lambda name: tmp_path/"fastai"/name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))


def all_pixels(dl): return torch.stack([o.pixels for o in dl.dataset.items])
def targets(dl): return [y.tolist() for _, y in dl]
def listing(folder): return sorted((str(o.relative_to(folder)), o.stat().st_size, o.stat().st_mtime_ns) for o in folder.rglob("*"))


# ---- splits, seeds, order -------------------------------------------------------------------------------------------

def test_digits_split_never_changes():
    "The split is part of every published figure: pinned by a checksum of the images' numbers."
    from sklearn.datasets import load_digits
    labels = load_digits().target
    split = digits_split(labels)
    assert [len(o) for o in split] == [1197, 300, 300]
    assert sorted(np.concatenate(split).tolist()) == list(range(1797))
    assert hashlib.sha1(np.concatenate(split).astype("<i8").tobytes()).hexdigest() == "1ba156b60371280d20bd46ffe8e7adab271ba766"
    for part in split: # each class has its share, within one image
        expected = np.bincount(labels)*len(part)/len(labels)
        assert np.abs(np.bincount(labels[part]) - expected).max() <= 1


def test_digits_pixels_are_the_scaled_originals():
    from sklearn.datasets import load_digits
    d = load_digits()
    dls = digits_dls(size=8)
    train, valid, test = digits_split(d.target)
    for dl, idx in zip(dls.loaders, (train, valid, test)):
        assert np.array_equal(all_pixels(dl)[:, 0].numpy(), np.rint(d.images[idx]*255/16).astype(np.uint8))
        assert [int(o.label) for o in dl.dataset.items] == d.target[idx].tolist()


@pytest.mark.parametrize("n", [10, 11, 100, 1196])
def test_subset_depends_on_seed_and_leaves_validation_and_test_alone(n):
    a, b, c = (digits_dls(n_train=n, seed=s) for s in (3, 3, 4))
    assert len(a.train_ds) == n
    assert torch.equal(all_pixels(a.train), all_pixels(b.train))
    assert not torch.equal(all_pixels(a.train), all_pixels(c.train))
    for i in (1, 2): assert torch.equal(all_pixels(a[i]), all_pixels(c[i]))


def test_shares_add_up_and_every_class_is_there():
    gen = np.random.default_rng(1)
    for _ in range(300):
        counts = gen.integers(0, 40, gen.integers(2, 12))
        counts[0] += 1
        n = int(gen.integers((counts > 0).sum(), counts.sum()+1))
        shares = class_shares(counts, n)
        assert shares.sum() == n and (shares <= counts).all() and ((shares > 0) == (counts > 0)).all()
        quota = n*counts/counts.sum()
        if (quota[counts > 0] >= 1).all(): assert np.abs(shares-quota).max() < 1


def test_order_of_batches_is_the_seeds():
    a, b, c = (digits_dls(seed=s) for s in (0, 0, 1))
    for epoch in range(2):
        first, second, third = targets(a.train), targets(b.train), targets(c.train)
        assert first == second and first != third
        if epoch: assert first != before
        before = first
    assert targets(a.test) == targets(c.test)


def test_building_leaves_random_states_alone():
    states = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    before = states()
    digits_dls(n_train=50, seed=7)
    stratified_subset(np.arange(20) % 2, 10)
    assert states() == before


@pytest.mark.parametrize("outside", [0, 1])
def test_nothing_depends_on_the_random_states_outside(outside):
    random.seed(outside); np.random.seed(outside); torch.manual_seed(outside)
    assert targets(digits_dls(n_train=64, bs=16, seed=5).train) == targets(digits_dls(n_train=64, bs=16, seed=5).train)
    key = hashlib.sha1(str(targets(digits_dls(n_train=64, bs=16, seed=5).train)).encode()).hexdigest()
    assert test_nothing_depends_on_the_random_states_outside.__dict__.setdefault("key", key) == key


# ---- batches --------------------------------------------------------------------------------------------------------

def test_reading_batches_equals_reading_items():
    from fastai.data.core import TfmdDL
    for dls in (digits_dls(size=20), digits_dls(size=20, normalize=False)):
        plain = dls.valid.new(cls=TfmdDL)
        assert dls.valid._reads_batches()
        for (x, y), (x2, y2) in zip(dls.valid, plain):
            assert torch.equal(x, x2) and torch.equal(y, y2)
            assert (type(x), type(y), x.dtype, y.dtype, x.stride()) == (type(x2), type(y2), x2.dtype, y2.dtype, x2.stride())


def test_item_transforms_are_not_skipped():
    from fasttransform import Transform
    from fastai.torch_core import TensorImage
    class Black(Transform):
        def encodes(self, x: TensorImage): return x*0
    dls = digits_dls(normalize=False)
    dls.add_tfms([Black()], "after_item")
    assert not dls.valid._reads_batches()
    assert dls.valid.one_batch()[0].max() == 0


def test_test_dl_of_stored_items_reads_batches_and_keeps_labels():
    dls = digits_dls()
    dl = dls.test_dl(dls.test_ds.items, with_labels=True)
    assert dl._reads_batches() and targets(dl) == targets(dls.test)
    assert len(dls.test_dl(dls.test_ds.items).one_batch()) == 1


def test_worker_processes_change_nothing():
    a, b = digits_dls(num_workers=0), digits_dls(num_workers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning) # forking a process that has threads, Python 3.12 and later
        for (x, y), (x2, y2) in zip(a.train, b.train): assert torch.equal(x, x2) and torch.equal(y, y2)


def test_resizing_per_batch_or_once_is_the_same(monkeypatch):
    once = digits_dls(size=20)
    monkeypatch.setattr(loaders_module, "MEMORY_BUDGET", 0)
    later = digits_dls(size=20)
    assert later.train_ds.items[0].store.images.shape[-1] == 8
    assert torch.equal(once.valid.one_batch()[0], later.valid.one_batch()[0])


def test_small_training_set_makes_one_batch():
    dls = digits_dls(n_train=10, bs=64, val_bs=100)
    assert len(dls.train) == 1 and len(dls.train.one_batch()[1]) == 10
    assert len(dls.valid) == 3


def test_normalised_once_by_every_way_into_vision_learner(tmp_path):
    import timm
    from fastai.data.transforms import Normalize
    from fastai.vision.learner import _add_norm, _timm_norm, vision_learner
    from fastai.vision.core import imagenet_stats
    from torchvision.models import resnet18
    count = lambda dls: [sum(isinstance(f, Normalize) for f in dl.after_batch.fs) for dl in dls.loaders]
    cfg = dict(mean=(.5,)*3, std=(.5,)*3)
    for normalize in (True, False):
        dls = digits_dls(normalize=normalize)
        assert count(dls) == [int(normalize)]*3
        _timm_norm(dls, cfg, True); _add_norm(dls, dict(stats=imagenet_stats), True)
        assert count(dls) == [1]*3
    dls = digits_dls()
    x, _ = dls.valid.one_batch()
    file = tmp_path/"weights.pth"
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), file)
    vision_learner(dls, "test_resnet", pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    vision_learner(dls, resnet18, pretrained=False)
    assert count(dls) == [1]*3 and torch.equal(dls.valid.one_batch()[0], x)
    mean, std = (torch.tensor(o).view(3, 1, 1) for o in imagenet_stats)
    torch.testing.assert_close(torch.Tensor(x[0]).cpu(), (dls.valid_ds.items[0].pixels/255-mean)/std)


def test_augment_trains_only():
    from fastai.vision.augment import Brightness
    plain, dls = digits_dls(), digits_dls(augment=[Brightness(max_lighting=.9, p=1.)])
    assert torch.equal(plain.valid.one_batch()[0], dls.valid.one_batch()[0])
    assert torch.equal(plain.test.one_batch()[0], dls.test.one_batch()[0])
    assert not torch.equal(plain.train.one_batch()[0], dls.train.one_batch()[0])


def test_batches_are_float_images_of_three_equal_grey_channels():
    x, y = digits_dls(size=40, bs=16, normalize=False).one_batch()
    assert x.shape == (16, 3, 40, 40) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert torch.equal(x[:, 0], x[:, 2]) and x.min() >= 0 and .9 < x.max() <= 1


# ---- equal pixels by every way in -----------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [12, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_memory_and_png_give_the_same_pixels(tmp_path, size, channels):
    images = rng.integers(0, 256, (6, 28, 28) + ((3,) if channels == 3 else ()), dtype=np.uint8)
    dls = array_dls((images, np.arange(6) % 2), (images, np.arange(6) % 2), size=size)
    batch, _ = dls.valid.one_batch()
    paths = []
    for i, o in enumerate(images):
        Image.fromarray(o).save(tmp_path/f"{i}.png")
        paths.append(tmp_path/f"{i}.png")
    from_files, = dls.test_dl(paths).one_batch()
    # one level of 255, over the smallest standard deviation: the byte interpolation may round differently by channel layout
    torch.testing.assert_close(batch, from_files, atol=1.01/255/.224, rtol=0)


def test_fit_square_is_pillows_bilinear():
    x = torch.from_numpy(rng.integers(0, 256, (1, 3, 31, 31), dtype=np.uint8))
    for size in (8, 30, 64):
        pillow = np.array(Image.fromarray(x[0].permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(fit_square(x, size)[0].permute(1, 2, 0).numpy().astype(int) - pillow).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "1", "CMYK"])
def test_image_modes(tmp_path, mode):
    im = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).convert(mode)
    x = as_bytes(im)
    assert x.shape == (3, 9, 11) and x.dtype == torch.uint8
    if mode != "CMYK": # PNG has no CMYK
        im.save(tmp_path/"x.png")
        assert torch.equal(as_bytes(tmp_path/"x.png"), x)


@pytest.mark.parametrize("bad, error, words", [
    (np.zeros((2, 3, 4, 5), np.uint8), DataError, "shape (H, W)"), (np.zeros((3, 8, 8), np.uint8), DataError, "1 or 3 channels"),
    (np.full((4, 4), 2.), DataError, "0..1"), (np.full((4, 4), np.nan), DataError, "0..1"), (np.full((4, 4), 300), DataError, "0..255"),
    (np.full((4, 4), -1), DataError, "0..255"), (np.zeros((4, 4), bool), TypeError, "bool"), (np.zeros((0, 4), np.uint8), DataError, "one pixel"),
    (Image.new("RGB", (0, 5)), DataError, "got size 0x5 for Image"), (Image.new("L", (4, 0)), DataError, "at least one pixel"),
    (torch.zeros(2, 4, 4), DataError, "1 or 3 channels"), (torch.zeros(4), DataError, "tensor must have"), (b"no image", DataError, "8 bytes"),
    ("gone.png", FileNotFoundError, "gone.png"), (None, TypeError, "NoneType"), (7, TypeError, "int")])
def test_what_is_no_image(bad, error, words):
    with pytest.raises(error) as e: as_bytes(bad)
    assert words in str(e.value)


# ---- a learner ------------------------------------------------------------------------------------------------------

@pytest.fixture
def learn(tmp_path):
    import fastai.callback.progress  # gives learners no_bar
    from fastai.metrics import accuracy
    from fastai.vision.learner import vision_learner
    learn = vision_learner(digits_dls(n_train=100, bs=50), "test_resnet", pretrained=False, metrics=accuracy, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        yield learn


def test_showing(learn):
    from fastai.interpret import ClassificationInterpretation
    from matplotlib import pyplot as plt
    learn.dls.show_batch(max_n=4)
    titles = [ax.get_title() for ax in plt.gcf().axes]
    assert len(titles) == 4 and set(titles) <= set(learn.dls.vocab)
    learn.show_results(max_n=4)
    for ds_idx in (1, 2):
        interpretation = ClassificationInterpretation.from_learner(learn, ds_idx=ds_idx)
        interpretation.plot_top_losses(4)
        interpretation.plot_confusion_matrix()
        assert interpretation.confusion_matrix().sum() == 300
    inputs, _, targs, _, losses = interpretation[[5, 2]] # reads items again by index
    assert targs.tolist() == [int(learn.dls.test_ds.items[i].label) for i in (5, 2)]


def test_every_way_to_predict(learn, tmp_path):
    from fastai.vision.core import PILImage
    item = learn.dls.test_ds.items[3]
    pixels = item.pixels.permute(1, 2, 0).numpy()
    png = tmp_path/"x.png"
    Image.fromarray(pixels).save(png)
    preds, targs = learn.get_preds(dl=learn.dls.test)
    ways = [item, png, str(png), png.read_bytes(), Image.fromarray(pixels), pixels, pixels[..., 0], pixels/255, item.pixels,
            learn.dls.test_ds[3][0], PILImage.create(png)]
    for way in ways:
        name, number, probabilities = learn.predict(way)
        assert name == learn.dls.vocab[number]
        torch.testing.assert_close(probabilities, preds[3], atol=1e-5, rtol=0)
        torch.testing.assert_close(learn.get_preds(dl=learn.dls.test_dl([way, way]))[0], preds[[3, 3]], atol=1e-5, rtol=0)
    *_, with_input = learn.predict(png, with_input=True)[::-1]
    assert with_input.shape == (3, 32, 32)


def test_labels_of_test_items(learn, tmp_path):
    (tmp_path/"7").mkdir()
    Image.new("L", (9, 9)).save(tmp_path/"7"/"x.png")
    items = [tmp_path/"7"/"x.png", str(tmp_path/"7"/"x.png"), learn.dls.valid_ds.items[0], (np.zeros((5, 5), np.uint8), "2")]
    dl = learn.dls.test_dl(items, with_labels=True)
    assert targets(dl) == [[7, 7, int(items[2].label), 2]]
    assert len(learn.validate(dl=dl)) == 2
    with pytest.raises(TypeError, match="pairs .image, class name."): learn.dls.test_dl([np.zeros((5, 5), np.uint8)], with_labels=True).one_batch()


def test_export_leaves_the_images_behind(learn, tmp_path):
    from fastai.learner import load_learner
    item = learn.dls.test_ds.items[3]
    Image.fromarray(item.pixels.permute(1, 2, 0).numpy()).save(tmp_path/"x.png")
    expected = learn.predict(tmp_path/"x.png")
    learn.export("small.pkl")
    weights = sum(o.numel()*o.element_size() for o in learn.model.state_dict().values())
    many = array_dls((np.zeros((5000, 28, 28), np.uint8), np.arange(5000) % 10), (np.zeros((500, 28, 28), np.uint8), np.arange(500) % 10))
    learn.dls = many
    learn.export("large.pkl")
    small, large = ((tmp_path/o).stat().st_size for o in ("small.pkl", "large.pkl"))
    assert small < weights + 200_000 and large < small + 2_000, (small, large, weights)
    again = load_learner(tmp_path/"small.pkl")
    assert list(again.dls.vocab) == [str(i) for i in range(10)] and again.dls.c == 10
    with again.no_bar(): name, number, probabilities = again.predict(tmp_path/"x.png")
    assert name == expected[0]
    torch.testing.assert_close(probabilities, expected[2].cpu(), atol=1e-5, rtol=0)
    assert len(learn.dls.train_ds) == 5000 # the learner itself keeps its data


def test_copies_keep_the_images():
    dls = digits_dls(n_train=50)
    for same in (copy.deepcopy(dls.valid_ds), pickle.loads(pickle.dumps(dls.valid_ds))):
        assert torch.equal(same[7][0], dls.valid_ds[7][0])


# ---- IDX files ------------------------------------------------------------------------------------------------------

def idx_bytes(x):
    x = np.asarray(x, np.uint8)
    return (0x800+x.ndim).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in x.shape) + x.tobytes()


def write_idx(root, n_train=60, n_test=20, gz=False, dotted=False):
    root.mkdir(parents=True, exist_ok=True)
    gen = np.random.default_rng(1)
    arrays = [gen.integers(0, 256, (n_train, 28, 28)), np.arange(n_train) % 10, gen.integers(0, 256, (n_test, 28, 28)), np.arange(n_test) % 10]
    for name, x in zip(IDX, arrays):
        if dotted: name = name.replace("-idx", ".idx")
        (root/(name+".gz" if gz else name)).write_bytes(gzip.compress(idx_bytes(x)) if gz else idx_bytes(x))
    return arrays


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("where", ["MNIST/raw", "MNIST", "raw", ""])
def test_idx_layouts(tmp_path, where, gz):
    x, y, x_test, y_test = write_idx(tmp_path/where, gz=gz)
    before = listing(tmp_path)
    dls = mnist_dls(size=28, root=tmp_path, bs=10)
    assert np.array_equal(all_pixels(dls.train)[:, 0], x[:50]) and np.array_equal(all_pixels(dls.valid)[:, 0], x[50:])
    assert np.array_equal(all_pixels(dls.test)[:, 0], x_test)
    assert sum(targets(dls.valid), []) == y[50:].tolist() and sum(targets(dls.test), []) == y_test.tolist()
    assert list(dls.vocab) == [str(i) for i in range(10)]
    assert listing(tmp_path) == before # nothing is written into root


def test_idx_with_a_dot_as_kaggle_has_it(tmp_path):
    write_idx(tmp_path, dotted=True)
    assert len(mnist_dls(root=str(tmp_path)).train_ds) == 50


def test_plain_torchvision_reads_the_same(tmp_path):
    from torchvision.datasets import FashionMNIST
    write_idx(tmp_path/"FashionMNIST"/"raw")
    dls = fashion_mnist_dls(size=28, root=tmp_path)
    tv = FashionMNIST(tmp_path, train=False)
    assert torch.equal(all_pixels(dls.test)[:, 0], tv.data) and sum(targets(dls.test), []) == tv.targets.tolist()
    assert list(dls.vocab) == FashionMNIST.classes


@pytest.mark.parametrize("name", IDX)
@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("harm", ["missing", "empty", "header", "half", "garbage", "longer"])
def test_harmed_idx_files_are_named(tmp_path, name, gz, harm):
    write_idx(tmp_path, gz=gz)
    file = tmp_path/(name+".gz" if gz else name)
    content = file.read_bytes()
    if harm == "missing": file.unlink()
    else: file.write_bytes({"empty": b"", "header": content[:6], "half": content[:len(content)//2], "garbage": b"<html>not here</html>",
                            "longer": gzip.compress(gzip.decompress(content)+b"x") if gz else content+b"x"}[harm])
    with pytest.raises(FileNotFoundError if harm == "missing" else DataError) as e: mnist_dls(root=tmp_path)
    message = str(e.value)
    assert name in message and "root=" in message and "download=True" in message
    words = dict(missing="missing", empty="empty", half="truncated", longer="specifies").get(harm)
    if words: assert words in message


@pytest.mark.parametrize("a, b, words", [(0, 1, "are the two files swapped"), (2, 3, "are the two files swapped"),
                                         (0, 2, "do not belong together"), (1, 3, "do not belong together")])
def test_swapped_idx_files(tmp_path, a, b, words):
    write_idx(tmp_path)
    a, b = tmp_path/IDX[a], tmp_path/IDX[b]
    a.rename(tmp_path/"x"); b.rename(a); (tmp_path/"x").rename(b)
    with pytest.raises(DataError, match=words): mnist_dls(root=tmp_path)


def test_train_and_test_swapped(tmp_path):
    write_idx(tmp_path, n_train=20, n_test=60)
    with pytest.raises(DataError, match="are they swapped"): mnist_dls(root=tmp_path)


def test_wrong_idx_contents(tmp_path):
    write_idx(tmp_path)
    (tmp_path/IDX[1]).write_bytes(idx_bytes(np.arange(60)))
    with pytest.raises(DataError, match="holds the label 59"): mnist_dls(root=tmp_path)
    (tmp_path/IDX[1]).write_bytes(idx_bytes(np.zeros(60)))
    with pytest.raises(DataError, match="one class"): mnist_dls(root=tmp_path)
    (tmp_path/IDX[0]).write_bytes(idx_bytes(np.zeros((60, 32, 32))))
    with pytest.raises(DataError, match="28x28"): mnist_dls(root=tmp_path)


def test_default_folder_is_fastais(tmp_path):
    with pytest.raises(FileNotFoundError, match="No FashionMNIST files.*fastai.*download=True"): fashion_mnist_dls()
    write_idx(tmp_path/"fastai"/"data"/"FashionMNIST"/"raw")
    assert len(fashion_mnist_dls().train_ds) == 50


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist():
    dls = fashion_mnist_dls(size=28, root=DEBIAN)
    spec = data_sets["fashion_mnist"]
    assert [len(o.dataset) for o in dls.loaders] == [spec.n_train, spec.n_valid, spec.n_test] == [50_000, 10_000, 10_000]
    y = np.frombuffer(gzip.decompress((DEBIAN/"train-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    assert [dls.vocab.o2i[o.label] for o in dls.valid_ds.items] == y[50_000:].tolist()


# ---- CIFAR ----------------------------------------------------------------------------------------------------------

@pytest.fixture(params=["CIFAR10", "CIFAR100"])
def cifar(request, tmp_path, monkeypatch):
    "Small files in CIFAR's format, whose checksums torchvision is told to expect."
    import torchvision
    cls = getattr(torchvision.datasets, request.param)
    folder = tmp_path/"files"/cls.base_folder
    folder.mkdir(parents=True)
    n_classes, key = (10, "labels") if request.param == "CIFAR10" else (100, "fine_labels")
    gen = np.random.default_rng(2)
    md5 = lambda p: hashlib.md5(p.read_bytes()).hexdigest()
    def write(name, n):
        entry = {"data": gen.integers(0, 256, (n, 3072), dtype=np.uint8), key: [i % n_classes for i in range(n)]}
        (folder/name).write_bytes(pickle.dumps(entry))
        return [name, md5(folder/name)]
    monkeypatch.setattr(cls, "train_list", [write(name, 1000//len(cls.train_list)) for name, _ in cls.train_list])
    monkeypatch.setattr(cls, "test_list", [write(name, 100) for name, _ in cls.test_list])
    meta = folder/cls.meta["filename"]
    meta.write_bytes(pickle.dumps({cls.meta["key"]: [f"class {i}" for i in range(n_classes)]}))
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(meta)})
    archive = tmp_path/"archive"/cls.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar: tar.add(folder, cls.base_folder)
    monkeypatch.setattr(cls, "tgz_md5", md5(archive))
    return cls, folder, archive, (cifar10_dls if request.param == "CIFAR10" else cifar100_dls)


def test_cifar_by_folder_and_archive(cifar):
    cls, folder, archive, build = cifar
    before = listing(archive.parent), listing(folder)
    loaders = [build(root=o, bs=10) for o in (folder.parent, folder, archive.parent)]
    tv = cls(folder.parent, train=True)
    for dls in loaders:
        assert [len(o.dataset) for o in dls.loaders] == [800, 200, 100] # validation: the last fifth
        assert np.array_equal(all_pixels(dls.valid).permute(0, 2, 3, 1), tv.data[800:])
        assert list(dls.vocab) == tv.classes and dls.c == len(tv.classes)
    assert (listing(archive.parent), listing(folder)) == before


@pytest.mark.parametrize("harm", ["missing", "empty", "changed"])
@pytest.mark.parametrize("which", ["train", "test", "meta"])
def test_only_official_cifar_files_are_opened(cifar, harm, which):
    cls, folder, archive, build = cifar
    file = folder/dict(train=cls.train_list[-1][0], test=cls.test_list[0][0], meta=cls.meta["filename"])[which]
    class Bomb:
        def __reduce__(self): return (shutil.rmtree, (str(folder),))
    if harm == "missing": file.unlink()
    else: file.write_bytes(b"" if harm == "empty" else pickle.dumps(Bomb()))
    with pytest.raises(FileNotFoundError if harm == "missing" else DataError) as e: build(root=folder.parent)
    assert str(file) in str(e.value) and harm in str(e.value) and "download=True" in str(e.value)
    assert folder.is_dir()


def test_cifar_archive_cut_short(cifar):
    cls, folder, archive, build = cifar
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(DataError, match="truncated or changed"): build(root=archive.parent)


# ---- downloads ------------------------------------------------------------------------------------------------------

def test_download_moves_complete_files_only(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST
    def download(self):
        write_idx(Path(self.raw_folder)); write_idx(Path(self.raw_folder), gz=True)
    monkeypatch.setattr(MNIST, "download", download)
    root = tmp_path/"new"
    assert len(mnist_dls(root=root, download=True).train_ds) == 50
    assert sorted(o.name for o in root.rglob("*") if o.is_file()) == sorted(IDX)
    monkeypatch.setattr(MNIST, "download", lambda self: pytest.fail("complete files were downloaded again"))
    assert len(mnist_dls(root=root, download=True).train_ds) == 50


def test_download_replaces_broken_files(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST
    write_idx(tmp_path/"MNIST"/"raw")
    (tmp_path/"MNIST"/"raw"/IDX[0]).write_bytes(b"")
    monkeypatch.setattr(MNIST, "download", lambda self: write_idx(Path(self.raw_folder)))
    assert len(mnist_dls(root=tmp_path, download=True).train_ds) == 50


def test_failed_download_leaves_nothing(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10, FashionMNIST
    from urllib.error import URLError
    def break_off(self):
        folder = Path(self.root)/"FashionMNIST"/"raw"
        folder.mkdir(parents=True)
        (folder/IDX[0]).write_bytes(b"half")
        raise RuntimeError("Error downloading train-labels-idx1-ubyte.gz")
    monkeypatch.setattr(FashionMNIST, "download", break_off)
    with pytest.raises(DataError, match="fashion_mnist could not be downloaded.*Nothing was left"): fashion_mnist_dls(root=tmp_path/"a", download=True)
    assert not list((tmp_path/"a").rglob("*"))
    def offline(self): raise URLError("no route")
    monkeypatch.setattr(CIFAR10, "download", offline)
    with pytest.raises(DataError, match="cifar10 could not be downloaded.*no route"): cifar10_dls(root=tmp_path/"b", download=True)
    assert not list((tmp_path/"b").rglob("*"))


# ---- folders --------------------------------------------------------------------------------------------------------

def write_folder(folder, n=10, classes=("cat", "dog", "emu"), shape=(20, 30)):
    for name in classes:
        (folder/name).mkdir(parents=True, exist_ok=True)
        for i in range(n): Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder/name/f"{i}.png")
    return folder


@pytest.mark.parametrize("in_memory", [True, False])
def test_folder_split_is_stratified_and_fixed(tmp_path, in_memory):
    write_folder(tmp_path)
    a, b = (folder_dls(tmp_path, size=16, bs=4, seed=s, in_memory=in_memory, num_workers=0) for s in (0, 1))
    assert [len(o.dataset) for o in a.loaders] == [18, 6, 6]
    for i in (1, 2):
        assert targets(a[i]) == targets(b[i]) and np.bincount(sum(targets(a[i]), [])).tolist() == [2, 2, 2]
        for (x, _), (x2, _) in zip(a[i], b[i]): assert torch.equal(x, x2)
    assert targets(a.train) != targets(b.train)
    assert a.c == 3 and list(a.vocab) == ["cat", "dog", "emu"]


def test_folder_in_memory_or_not_is_the_same_and_works_with_workers(tmp_path):
    write_folder(tmp_path)
    kept, read, workers = (folder_dls(tmp_path, size=16, bs=4, n_train=9, seed=2, in_memory=m, num_workers=w) for m, w in ((True, 0), (False, 0), (False, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning) # forking a process that has threads, Python 3.12 and later
        for same in (read, workers):
            for dl, dl2 in zip(kept.loaders[1:], same.loaders[1:]):
                for (x, y), (x2, y2) in zip(dl, dl2): assert torch.equal(x, x2) and torch.equal(y, y2)
    assert len(kept.train_ds) == len(read.train_ds) == 9 and targets(kept.train) == targets(read.train)


def test_folder_threshold(tmp_path, monkeypatch):
    write_folder(tmp_path)
    assert isinstance(folder_dls(tmp_path, size=16).train_ds.items[0], loaders_module.StoredImage)
    monkeypatch.setattr(folder_module, "FOLDER_BUDGET", 30*3*16*16-1)
    dls = folder_dls(tmp_path, size=16, num_workers=0)
    assert isinstance(dls.train_ds.items[0], Path) and dls.show_batch(max_n=2) is None


def test_folder_layouts(tmp_path):
    write_folder(tmp_path/"train"); write_folder(tmp_path/"test", n=2)
    assert [len(o.dataset) for o in folder_dls(tmp_path, size=16).loaders] == [24, 6, 6]
    write_folder(tmp_path/"validation", n=3)
    assert [len(o.dataset) for o in folder_dls(tmp_path, size=16).loaders] == [30, 9, 6]
    shutil.rmtree(tmp_path/"test")
    with pytest.raises(DataError, match="no test split"): folder_dls(tmp_path, size=16).test
    write_folder(tmp_path/"validation", n=3, classes=["fox"])
    with pytest.raises(DataError, match="no training images for the classes fox"): folder_dls(tmp_path, size=16)


def test_folder_passes_over_what_is_no_image(tmp_path):
    write_folder(tmp_path)
    (tmp_path/".cache").mkdir(); (tmp_path/"cat"/".DS_Store").write_bytes(b"x"); (tmp_path/"cat"/"notes.txt").write_text("x")
    assert [len(o.dataset) for o in folder_dls(tmp_path, size=16).loaders] == [18, 6, 6]


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"): folder_dls(tmp_path/"nowhere")
    with pytest.raises(DataError, match="No class folders"): folder_dls(tmp_path)
    write_folder(tmp_path, classes=["cat"])
    with pytest.raises(DataError, match="Only one class folder .*'cat'"): folder_dls(tmp_path)
    (tmp_path/"dog").mkdir()
    with pytest.raises(DataError, match="dog is empty"): folder_dls(tmp_path)
    (tmp_path/"dog"/"notes.txt").write_text("x")
    with pytest.raises(DataError, match="no image .the first is notes.txt."): folder_dls(tmp_path)
    write_folder(tmp_path, classes=["dog"], n=2)
    with pytest.raises(DataError, match="too few to split"): folder_dls(tmp_path)
    assert len(folder_dls(tmp_path, size=16, test_pct=0).loaders) == 2
    with pytest.raises(DataError, match="valid_pct=0.6, test_pct=0.5"): folder_dls(tmp_path, valid_pct=.6, test_pct=.5)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("content", ["text", "cut", "empty"])
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_broken_image_files_are_named(tmp_path, in_memory, content, kind):
    write_folder(tmp_path, n=4, shape=(64, 64))
    for o in (tmp_path/"cat").glob("*.png"):
        im = Image.open(o); im.save(o.with_suffix("."+kind)); im.close()
        file = o.with_suffix("."+kind)
        whole = file.read_bytes()
        file.write_bytes({"text": b"no image", "cut": whole[:len(whole)//2], "empty": b""}[content])
    with pytest.raises(DataError, match=f"{tmp_path/'cat'}/..{kind} is not an image"):
        for _ in folder_dls(tmp_path, size=16, bs=2, in_memory=in_memory, num_workers=0).train: pass


# ---- drawings and glyphs --------------------------------------------------------------------------------------------

def png(im):
    f = io.BytesIO(); im.save(f, "PNG")
    return f.getvalue()


def write_drawings(root, n=20, names="abcdefghijklmnopqrst", categories=("animals/birds", "animals/bugs")):
    "Per category `n` drawings of random discs or boxes, coloured and as line art, the latter under the same name with `_bw`."
    own = np.random.default_rng(1)
    for kind, category in zip(("ellipse", "rectangle"), categories):
        (root/category).mkdir(parents=True)
        for name in names[:n]:
            boxes, colours = own.integers(5, 28, (5, 4)).tolist(), [tuple(o) for o in own.integers(0, 256, (5, 3)).tolist()]
            for end, fills in (("", colours), ("_bw", [None]*5)):
                im = Image.new("RGBA", (60, 80), (0, 0, 0, 0))
                for (x, y, w, h), fill in zip(boxes, fills): getattr(ImageDraw.Draw(im), kind)((x, y, x+w, y+h), fill, "black")
                im.save(root/category/f"{kind[:4]}{name}{end}_01.png")
    return dict(root=root, categories=categories, min_images=5)


def test_drawings_of_one_family_stay_on_one_side(tmp_path):
    args = write_drawings(tmp_path)
    d = read_openclipart(size=24, **args)
    part, groups = split_drawings(d), drawing_groups(d)
    assert len(d.paths) == 80 and 30 <= groups.max()+1 <= 40
    for g in set(groups): assert len(set(part[groups == g])) == 1
    for k, path in zip(part, d.paths): assert k == part[d.paths.index(path.replace("_01.png", "_bw_01.png").replace("_bw_bw", "_bw"))]
    # without the groups the same pictures do leak: the test above can fail
    alone = group_split(d.labels, np.arange(80), (.4, .15, .45), d.paths)
    assert any(alone[i] != alone[d.paths.index(o.replace("_01", "_bw_01"))] for i, o in enumerate(d.paths) if "_bw" not in o)
    dls = openclipart_dls(size=24, bs=8, **args)
    assert [len(o.dataset) for o in dls.loaders] == np.bincount(part).tolist() and np.abs(np.bincount(part)-[32, 12, 36]).max() <= 2
    seen = [o.pixels.numpy().tobytes() for dl in dls.loaders for o in dl.dataset.items]
    assert len(set(seen)) == len(seen) == 80


def test_renamed_copies_of_a_drawing_stay_on_one_side(tmp_path):
    args = write_drawings(tmp_path)
    for o in sorted((tmp_path/"animals/birds").iterdir())[::3]: # other names and other bytes, the same drawing at another place on a larger page
        with Image.open(o) as im: page = Image.new("RGBA", (100, 100), (0, 0, 0, 0)); page.paste(im, (30, 10)); page.save(o.with_name(f"xy{o.stem[4:]}{o.stem[-6:]}.png"))
    d = read_openclipart(size=24, **args)
    part, near = split_drawings(d), similar_pairs(centred_thumbs(d), SIMILAR)
    assert len(near) >= 14 and (part[near[:, 0]] == part[near[:, 1]]).all()


def test_split_of_drawings_depends_on_nothing_else(tmp_path):
    args = write_drawings(tmp_path)
    first = openclipart_dls(size=24, **args)
    for other in (openclipart_dls(size=24, seed=5, n_train=10, **args), openclipart_dls(size=24, cache=tmp_path/"other", **args)):
        for i in (1, 2): assert torch.equal(all_pixels(first[i]), all_pixels(other[i]))
    assert split_drawings(read_openclipart(size=48, **args)).tolist() == split_drawings(read_openclipart(size=24, **args)).tolist()
    assert len(openclipart_dls(size=24, n_train=10, **args).train_ds) == 10


def test_drawings_that_are_left_out(tmp_path, monkeypatch):
    args = write_drawings(tmp_path)
    birds, bugs = (tmp_path/o for o in args["categories"])
    twin = (birds/"ellia_01.png").read_bytes()
    (birds/"zz.png").write_bytes(twin), (bugs/"zz.png").write_bytes((birds/"ellib_01.png").read_bytes())
    head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
    (bugs/"huge.png").write_bytes(head+struct.pack(">II", 10_562, 16_000)+twin[24:]) # the size of the package's largest pictures
    (bugs/"cut.png").write_bytes(twin[:len(twin)//2]), (bugs/"empty.png").write_bytes(b"")
    (bugs/"blank.png").write_bytes(png(Image.new("RGBA", (50, 50), (255, 255, 255, 0))))
    missing = png(Image.new("RGB", (50, 50), "red"))
    (bugs/"missing.png").write_bytes(missing)
    (tmp_path/"secret.png").write_bytes(png(Image.new("RGB", (9, 9), "blue"))), (tmp_path/"outside").mkdir()
    monkeypatch.setattr("fmce_fastai.data.openclipart.OPENCLIPART_PLACEHOLDERS", (hashlib.sha1(missing).hexdigest(),))
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda f, *a, **k: opened.append(f.getvalue()[:24]) or real(f, *a, **k))
    d = read_openclipart(size=24, **args)
    assert {Path(k).name: v for k, v in d.dropped.items()} == {
        "zz.png": "in two classes", "huge.png": "too large", "cut.png": "damaged", "empty.png": "damaged", "blank.png": "blank",
        "missing.png": "placeholder", "ellib_01.png": "in two classes"} | {"zz.png": d.dropped["animals/bugs/zz.png"]}
    assert d.dropped["animals/birds/zz.png"] == "duplicate" and len(d.paths) == 79
    assert opened and not any(o.startswith(head+struct.pack(">II", 10_562, 16_000)) for o in opened) # refused before Pillow saw it
    assert 10_562*16_000 > MAX_PIXELS > 1_500**2


def test_links_of_drawings_stay_inside_the_collection(tmp_path):
    args = write_drawings(tmp_path/"png")
    args["root"] = tmp_path
    outside = tmp_path/"outside.png"
    outside.write_bytes(png(Image.new("RGB", (20, 20), "blue")))
    (tmp_path/"png/animals/birds/out.png").symlink_to(outside)
    (tmp_path/"png/animals/inside.png").write_bytes(png(Image.new("RGB", (20, 20), "green")))
    (tmp_path/"png/animals/birds/in.png").symlink_to("../inside.png")
    paths = read_openclipart(size=24, **args).paths
    assert "animals/birds/in.png" in paths and "animals/birds/out.png" not in paths


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "1", "I;16"])
def test_pictures_lie_on_white(mode):
    im = Image.new("RGBA", (20, 40), (0, 0, 0, 0))
    im.paste((0, 0, 0, 255), (0, 10, 20, 30))
    if mode not in ("RGBA", "LA", "P"): im = Image.composite(im, Image.new("RGBA", im.size, "white"), im.getchannel("A"))
    im = Image.fromarray(np.array(im.convert("L")).astype(np.uint16)*257) if mode == "I;16" else im.convert(mode)
    x, thumb = decode_drawing(png(im), 40)
    assert (x[:, :10] == 255).all() and (x[:, 30:] == 255).all() and (x[:9] == 255).all() and (x[12:28, 12:28] == 0).all() and (thumb == 0).all()


def test_families():
    for a, b in (("apple", "apple_bw"), ("dog_01", "dog_02"), ("fox", "contour_fox"), ("pear_simple", "pear_simple_bw"), ("mug-lineart", "mug"),
                 ("flan_bw_jean-victor_bali_01", "flan_jean-victor_balin_01")): assert drawing_family(a) == drawing_family(b)
    assert len({drawing_family(o) for o in ("apple", "banana", "bear", "beer", "bee")}) == 5


def test_group_split_is_balanced_and_keeps_groups():
    own = np.random.default_rng(3)
    labels, groups = own.integers(0, 5, 600), own.integers(0, 300, 600)
    groups = linked_groups(600, np.array([(i, j) for i, j in zip(range(600), [np.flatnonzero(groups == g)[0] for g in groups])]))
    part = group_split(labels, groups, (.4, .15, .45), [f"{i}" for i in range(600)])
    assert all(len(set(part[groups == g])) == 1 for g in set(groups))
    for k in range(5): assert np.abs(np.bincount(part[labels == k])/(labels == k).sum()-[.4, .15, .45]).max() < .03


MPL_FONTS = Path(__import__("matplotlib").get_data_path())/"fonts"/"ttf"


def write_font(path, family, cmap=None, source="DejaVuSans.ttf"):
    "A copy of a font under another name; `cmap`: characters -> those whose glyph they show, or None to remove them."
    from fontTools.ttLib import TTFont
    font = TTFont(MPL_FONTS/source)
    for record in font["name"].names:
        if record.nameID in (1, 4, 16): record.string = family
    for table in font["cmap"].tables:
        own = dict(table.cmap)
        for a, b in (cmap or {}).items():
            if b is None: table.cmap.pop(ord(a), None)
            elif ord(b) in own: table.cmap[ord(a)] = own[ord(b)]
    font.save(path)


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    "Six typefaces and a clone, and four fonts that are of no use."
    folder = tmp_path_factory.mktemp("fonts")
    for o in ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral", "STIXGeneralItalic", "cmr10", "cmtt10", "cmss10", "STIXSizOneSymReg"): shutil.copy(MPL_FONTS/f"{o}.ttf", folder)
    write_font(folder/"clone.ttf", "Quite Another")
    write_font(folder/"poor.ttf", "No Small Q", {"q": None})
    write_font(folder/"capitals.ttf", "Only Capitals", {o: o.upper() for o in CHARACTERS[36:]})
    write_font(folder/"mixed.ttf", "Mixed Up", dict(zip(CHARACTERS, CHARACTERS[7:]+CHARACTERS[:7])))
    (folder/"text.ttf").write_text("no font")
    return folder


def test_glyphs_leave_out_fonts_that_are_of_no_use(fonts):
    g = read_glyphs(fonts)
    reasons = {Path(k).name: v for k, v in g.dropped.items()}
    assert reasons.pop("mixed.ttf") in ("illegible", "small capitals") # whichever the exchanged characters look like
    assert reasons == {"STIXSizOneSymReg.ttf": "no letters", "poor.ttf": "no letters", "capitals.ttf": "equal characters"}
    assert {o.path.name for o in g.faces} == {"DejaVuSans.ttf", "DejaVuSerif.ttf", "STIXGeneral.ttf", "cmr10.ttf", "cmtt10.ttf", "cmss10.ttf", "clone.ttf"}
    assert g.images.shape == (7, 62, 32, 32) and g.images.max((2, 3)).min() > 100 and not g.images[:, :, :2].any()


def test_no_typeface_and_no_clone_lies_on_both_sides(fonts):
    g = read_glyphs(fonts, faces=5)
    part, groups = split_glyphs(g), typeface_groups(g)
    names = [o.family for o in g.faces]
    side = dict(zip(names, part))
    assert len(set(part[[o.startswith("DejaVu Sans") or o == "Quite Another" for o in names]])) == 1 and side["DejaVu Serif"] in (0, 1, 2)
    assert all(len(set(part[groups == k])) == 1 for k in set(groups)) and len(clone_pairs(g)) >= 1
    dls = glyphs_dls(root=fonts, faces=5)
    assert [len(o.dataset) for o in dls.loaders] == (62*np.bincount(part)).tolist() and min(np.bincount(part)) >= 1 and dls.c == 62
    # equal pictures are those of equal characters of one face, never of two splits
    seen = [{o.pixels.numpy().tobytes() for o in dl.dataset.items} for dl in dls.loaders]
    assert not seen[0] & seen[2] and not seen[0] & seen[1] and not seen[1] & seen[2]


def test_glyphs_are_the_same_every_time(fonts, tmp_path):
    drawn = glyphs_dls(root=fonts, cache=tmp_path)
    cached = get_dls("glyphs", root=fonts, cache=tmp_path, n_train=62, bs=31, seed=4)
    listed = glyphs_dls(fonts=sorted(fonts.glob("*.ttf"), reverse=True), cache=tmp_path/"other")
    for i in (1, 2): assert torch.equal(all_pixels(drawn[i]), all_pixels(cached[i])) and torch.equal(all_pixels(drawn[i]), all_pixels(listed[i]))
    assert len(list(tmp_path.glob("*.npz"))) == 1 and len(cached.train_ds) == cached.c == 62


def test_data_sets_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install openclipart-png"): get_dls("openclipart", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="No TrueType or OpenType fonts in"): get_dls("glyphs", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="no font file"): glyphs_dls(fonts=[tmp_path/"x.ttf"])


CLIPART = Path(os.environ.get("FMCE_OPENCLIPART", OPENCLIPART_ROOT)) # set it to a folder of `dpkg -x`
REAL = pytest.mark.skipif("FMCE_REAL_DATA" not in os.environ, reason="a minute and a half; set FMCE_REAL_DATA=1. The same on made-up files is tested above")


@REAL
@pytest.mark.skipif(not CLIPART.is_dir(), reason="needs the Debian package openclipart-png")
def test_the_real_openclipart_has_no_leaks(tmp_path):
    d = read_openclipart(CLIPART, cache=tmp_path)
    part, spec = split_drawings(d), data_sets["openclipart"]
    assert np.bincount(part).tolist() == [spec.n_train, spec.n_valid, spec.n_test] and len(d.vocab) == spec.n_classes
    near = similar_pairs(centred_thumbs(d), SIMILAR)
    assert len(near) > 50 and (part[near[:, 0]] == part[near[:, 1]]).all()
    sides = {}
    for path, k in zip(d.paths, part): assert sides.setdefault(drawing_family(Path(path).stem), k) == k
    shas = [hashlib.sha1(o.tobytes()).hexdigest() for o in d.images]
    for k in range(3): assert not {s for s, p in zip(shas, part) if p == k} & {s for s, p in zip(shas, part) if p != k}
    assert len(OPENCLIPART_PLACEHOLDERS) == 8 and list(d.dropped.values()).count("placeholder") == 6


@REAL
def test_the_real_fonts_have_no_leaks(tmp_path):
    if len(find_faces()) < 100: pytest.skip("needs 100 typefaces: install more of Debian's fonts-*")
    g = read_glyphs(cache=tmp_path)
    part, near, groups = split_glyphs(g), clone_pairs(g), typeface_groups(g)
    assert (part[near[:, 0]] == part[near[:, 1]]).all() and all(len(set(part[groups == k])) == 1 for k in set(groups))
    assert np.bincount(groups).max() < .25*len(groups) # no chain through everything
    sides = {}
    for face, k in zip(g.faces, part): assert sides.setdefault(face.typeface, k) == k


# ---- by name --------------------------------------------------------------------------------------------------------

def test_names(tmp_path):
    assert list(data_sets) == ["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "openclipart", "glyphs"]
    spec = data_sets["digits"]
    dls = get_dls("Digits", size=spec.pixels)
    assert [len(o.dataset) for o in dls.loaders] == [spec.n_train, spec.n_valid, spec.n_test] and dls.c == spec.n_classes
    write_idx(tmp_path/"idx")
    assert get_dls("Fashion-MNIST", root=tmp_path/"idx", n_train=20, bs=5).c == 10
    assert get_dls(write_folder(tmp_path/"pets"), size=16).c == get_dls(str(tmp_path/"pets"), size=16).c == 3


@pytest.mark.parametrize("kwargs, words", [
    (dict(data="digit"), "Did you mean 'digits'"), (dict(data="cifar-1000"), "Did you mean 'cifar100'"), (dict(data="xyz"), "Data sets: digits, mnist"),
    (dict(data="digits", root="/x"), "takes no root"), (dict(data=".", root="/x"), "cannot be combined with a folder")])
def test_wrong_names(kwargs, words):
    with pytest.raises(DataError) as e: get_dls(**kwargs)
    assert words in str(e.value)


def test_names_of_the_wrong_kind_and_numpy_seeds():
    with pytest.raises(TypeError, match="data=None"): get_dls(None)
    assert targets(digits_dls(seed=np.int64(3)).train) == targets(digits_dls(seed=3).train)


@pytest.mark.parametrize("kwargs, error", [
    (dict(n_train=0), DataError), (dict(n_train=9), DataError), (dict(n_train=1198), DataError), (dict(n_train=10.), TypeError), (dict(n_train=True), TypeError),
    (dict(size=0), DataError), (dict(size="32"), TypeError), (dict(bs=0), DataError), (dict(bs=2.5), TypeError), (dict(val_bs=-1), DataError),
    (dict(seed=-1), DataError), (dict(seed=None), TypeError), (dict(nonsense=1), TypeError)])
def test_wrong_arguments_are_named(kwargs, error):
    with pytest.raises(error, match=next(iter(kwargs))): digits_dls(**kwargs)


def test_arrays_that_do_not_fit():
    x, y = np.zeros((10, 8, 8), np.uint8), np.arange(10) % 2
    for train, valid, words in [((x, y[:3]), (x, y), "10 training images but 3 labels"), ((x, y), (x[:, :4], y), "they must agree"),
                                ((x, y), (x[:0], y[:0]), "The validation part has no images"), ((x, y/2), (x, y), "whole numbers"),
                                ((x[0], y), (x, y), r"training images have shape"), ((x, y), (x, y+1), "validation labels lie in 1..2"),
                                ((x, y*0), (x, y*0), "one class"), ((x+7., y), (x, y), r"0\.\.1")]:
        with pytest.raises(DataError, match=words): array_dls(train, valid)


def test_the_loader_is_not_the_bottleneck():
    "A tenth of what one idle CPU core reaches, so that a busy one passes."
    import time
    dls = digits_dls()
    best = 0
    for _ in range(3):
        start = time.perf_counter()
        n = sum(len(y) for _, y in dls.train)
        best = max(best, n/(time.perf_counter()-start))
    assert best > 4000, f"{best:.0f} images/s"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the CPU twin is test_normalised_once_by_every_way_into_vision_learner")
def test_batches_on_cuda_equal_those_on_the_cpu():
    (x, y), (x2, y2) = (digits_dls(device=d).valid.one_batch() for d in ("cuda", "cpu"))
    assert x.is_cuda and y.is_cuda and not x2.is_cuda
    torch.testing.assert_close(x.cpu(), x2); torch.testing.assert_close(y.cpu(), y2)
