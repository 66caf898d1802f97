"The README's tables, made from the CSV files that the scripts in benchmarks/ wrote: `python tools/figures.py` prints them."
import statistics
from csv import DictReader
from functools import partial
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def rows_of(stem):
    "All rows of the CSV files whose name starts with `stem`."
    return [row for path in sorted(BENCHMARKS.glob(f"{stem}_*.csv")) for row in DictReader(path.read_text(encoding="utf-8").splitlines())]


def table(head, rows):
    "A Markdown table."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def overhead():
    "Time with recorder or RAL over time without."
    groups = {}
    for r in rows_of("overhead"): groups.setdefault((r["what"], r["setting"]), []).append(float(r["ratio"]))
    rows = [[what, setting, f"{statistics.median(v):.3f}", f"{min(v):.3f} to {max(v):.3f}", len(v)] for (what, setting), v in groups.items()]
    return table(["what", "setting", "median of time with / without", "range", "measurements"], rows)


def oracles():
    "How well fitted oracles do on held-out images, last tapped module."
    rows = [[r["data"], r["arch"], f"{int(r['n_train']):,}", r["epochs"], r["last_module"],
             f"{float(r['mae_eval']):.3f}", f"{float(r['rho_eval']):.3f}", f"{float(r['mae_train']):.3f}", f"{float(r['rho_train']):.3f}",
             " / ".join(f"{100 * float(r['accuracy_' + k]):.1f}" for k in ("before", "plain", "ral"))] for r in rows_of("three_stages")]
    return table(["data", "network", "images", "epochs", "last module", "MAE eval", "rho eval", "MAE train", "rho train", "test accuracy before / plain / RAL, % (one seed: no evidence)"], rows)


def spread(values, digits=2): return f"{statistics.median(values):.{digits}f}, worst {max(values):.{digits}f}"


def architectures():
    "What was checked on every timm family, and on how many it held."
    zoo, maps, sweep = rows_of("timm_zoo"), rows_of("timm_maps"), rows_of("timm_sweep")
    planned = [r for r in zoo if r["source"]]
    exact = [r for r in maps if not r["failure"] and r["maps"] == r["taps"] and max(float(r["error"]), float(r["other_error"] or 0)) < 1e-5 and float(r["gradient_error"]) < 1e-5]
    other = [r for r in maps if r["other_size"] not in ("", "refused")]
    rows = [["a plan without weights or values, on the meta device", f"{len(planned):,} of {len(zoo):,} names"],
            ["every map of `forward_intermediates` has a tap that returns it, values and gradients", f"{len(exact)} of {len(maps)} families"],
            ["the same on images of another shape, for families that accept one", f"{sum(float(r['other_error']) < 1e-5 for r in other)} of {len(other)}"],
            ["the same with gradient checkpointing, for families that have it", f"{sum(r['checkpointing'] == 'same' for r in maps)} of {sum(r['checkpointing'] != 'unsupported' for r in maps)}"],
            ["seconds to find a plan, smallest model of a family, one CPU thread", f"median {spread([float(r['seconds']) for r in maps])}"]]
    for route, words in (("learner", "trained in a plain `Learner`: recorder, fitted oracle, RAL"), ("vision_learner", "trained in `vision_learner`")):
        for checkpointing in ("off", "on"):
            of = [r for r in sweep if (r["route"], r["checkpointing"]) == (route, checkpointing) and r["status"] != "unsupported"]
            held = [r for r in of if r["held_out"] == "1"]
            ok = lambda rs: sum(r["status"] == "ok" for r in rs)
            head = f", {sum(r['head'] == 'timm_head' for r in of)} through `timm_head`" if route == "vision_learner" else ""
            rows.append([words + (", gradient checkpointing on" if checkpointing == "on" else ""), f"{ok(of)} of {len(of)} families{head}; held out: {ok(held)} of {len(held)}"])
    return table(["checked", "holds for"], rows)


def difference(values):
    "Mean and 95 % interval of paired differences, in points."
    from fmce_fastai.study.statistics import paired_difference
    d = paired_difference(values)
    return f"{d['difference']:+.1f} ({d['low']:+.1f} to {d['high']:+.1f}), above 0 in {d['above']} of {d['seeds']}"


SETTINGS = {"scratch": "resnet18 from a random start, 10,000 images, 32 px, 3 epochs", "pretrained": "EfficientNet-Lite0 with ImageNet weights, 2,000 images, 64 px, 2 epochs"}
FEW = {"eval": "EfficientNet-Lite0 with ImageNet weights, 200 images, 48 px, 20 epochs, batch norm in eval mode", "train": "the same, batch norm in training mode"}
ARMS = {"ral": "RAL, universal oracle", "align": "plain alignment (CKA) as a loss, no oracle", "scaled": "task loss times (1-alpha)"}


def gains():
    "Paired differences to plain training on FashionMNIST, test split."
    rows = []
    for source, key in ((rows_of("headline"), "setting"), ([r for r in rows_of("few_images") if r["split"] == "test"], "norms")):
        for setting in sorted({r[key] for r in source}, key=list({**SETTINGS, **FEW}).index):
            of = [r for r in source if r[key] == setting]
            plain = {r["seed"]: float(r["accuracy"]) for r in of if r["arm"] == "plain"}
            for arm, alpha in sorted({(r["arm"], r["alpha"]) for r in of if r["arm"] != "plain"}, key=str, reverse=True):
                own = {r["seed"]: float(r["accuracy"]) for r in of if (r["arm"], r["alpha"]) == (arm, alpha)}
                both = [k for k in own if k in plain]
                rows.append([{**SETTINGS, **FEW}[setting], ARMS[arm], alpha, f"{100 * statistics.mean(plain[k] for k in both):.1f}", f"{100 * statistics.mean(own[k] for k in both):.1f}", difference([100 * (own[k] - plain[k]) for k in both])])
    return table(["setting", "loss", "alpha", "plain, %", "with it, %", "difference in points (95 % interval), paired over seeds"], rows)


SCORES = {"labelled": "universal oracle, with labels", "free": "universal oracle, without labels", "cka_map": "debiased alignment (CKA) of the map, nothing learnt", "cka_means": "debiased alignment of the channel means, nothing learnt"}
LEFT_OUT = {"family": "a family of networks", "source": "a source of images", "task": "a type of task"}


def universal():
    "The universal oracle where it was not trained."
    rows = []
    for r in rows_of("universal_oracle"):
        if r["left_out"] == "all": rows.append([LEFT_OUT[r["by"]], SCORES[r["score"]], f"{float(r['rho']):.2f} ({float(r['rho_low']):.2f} to {float(r['rho_high']):.2f})", f"{float(r['rho_last']):.2f}", f"{float(r['mae']):.2f}" if r["mae"] else "-"])
    return table(["left out", "score", "rho, all modules (95 % interval over runs)", "rho, last module", "MAE"], rows)


def untrained():
    "Detecting a re-initialised stage."
    groups = {}
    for r in rows_of("untrained_stage"): groups.setdefault((r["labels"], r["norms"]), []).append(r)
    rows = [["yes" if labels == "True" else "no", {"estimated": "re-estimated", "alone": "left as they were"}[norms], f"{statistics.mean(float(r['auc']) for r in g):.2f}", f"{100 * statistics.mean(r['right'] == 'True' for r in g):.0f} %", len(g)] for (labels, norms), g in sorted(groups.items(), reverse=True)]
    return table(["labels", "batch norm's statistics", "AUC, the stage intact against re-initialised", "the right stage is the first to fall", "networks"], rows)


def untrained_modules():
    "Stages that fmce_report says look untrained."
    from fmce_fastai.report.control import HIGH, LEAST_LEARNT
    found, names = {}, {"fashion_mnist": "EfficientNet-Lite0, ImageNet weights, on FashionMNIST", "digits_foreign": "the same, on handwritten digits", "digits_foreign_32": "the same, at 32 px", "digits": "small networks, 5 epochs on digits"}
    for r in rows_of("untrained_modules"):
        if r["number"] != "0" and r["learnt"] != "nan": found.setdefault((r["setting"], r["trained"]), []).append(float(r["learnt"]) < LEAST_LEARNT and float(r["fmcs"]) < HIGH)
    rows = [[names[setting], {"True": "trained", "False": "never trained"}[trained], f"{sum(flagged)} of {len(flagged)}"] for (setting, trained), flagged in sorted(found.items(), key=lambda o: (list(names).index(o[0][0]), o[0][1] == "False"))]
    return table(["networks", "stages", "flagged as untrained"], rows)


def checkpoint_doctor():
    "What the verdicts on weights are worth."
    found = {}
    for r in rows_of("checkpoint_doctor"):
        found.setdefault("ImageNet weights: EfficientNet-Lite0, 1, 2" if "efficientnet_lite" in r["network"] else
                         "200 steps on digits, families kept back" if r["kept_back"] == "True" else "200 steps on digits, families developed with", []).append(r)
    lines = []
    for name, rows in sorted(found.items(), reverse=True):
        cases = [r for r in rows if r["kind"] in ("block", "stage") and r["is_head"] != "True"]
        exact = sum(r["found"] == r["again"] and r["alarms"] == r["other_findings"] == "0" for r in cases)
        wrong = sum(int(r["missed"]) + int(r["alarms"]) + int(r["partly"]) + int(r["other_findings"]) for r in cases)
        intact = [r for r in rows if r["kind"] == "intact"]
        alarms, kept = sum(int(r["alarms"]) + int(r["other_findings"]) for r in intact), sum(int(r["kept"]) for r in intact)
        lines.append([name, len({r["network"] for r in rows}), len({r["family"] for r in rows}), f"{exact} of {len(cases)}", wrong, f"{alarms} of {kept}"])
    return table(["weights", "networks", "families", "one block or stage re-initialised: exactly that is named", "wrong verdicts there", "false alarms on intact networks, blocks"], lines)


def probe_modules():
    "Which evidence from maps tells a stage that was re-initialised."
    from sklearn.metrics import roc_auc_score
    rows, names = rows_of("probe_modules"), {"learnt": "`learnt`: FMCS with shuffled weights", "added": "`added`: the probe beside new networks",
                                             "stage_added": "the probe beside the same network with this stage re-initialised", "fmcs": "FMCS alone"}
    settings = {"fashion_mnist": "FashionMNIST", "openclipart": "OpenClipart", "digits": "digits"}
    def auc(column, of): return f"{roc_auc_score([r['trained'] == 'True' for r in of], [float(r[column] or 0) for r in of]):.2f}"
    lines = [[words, *(auc(column, [r for r in rows if r["setting"] == k]) for k in settings), auc(column, rows)] for column, words in names.items()]
    return table(["evidence", *settings.values(), "all"], lines)


IMAGES = {"held": "held out", "eval": "of training", "train": "of training, in training mode"}  # by mode


def agreement_cells(row, own):
    "Agreement with the quality; for the score `own` also its lead and interval."
    def cell(what):
        if not row[what]: return "-"
        ahead = f" ({float(row[what + '_ahead']):+.2f}, {float(row[what + '_low']):+.2f} to {float(row[what + '_high']):+.2f})" if row["score"] == own else ""
        return f"{float(row[what]):.2f}{ahead}"
    return [cell(what) for what in ("between", "over", "pooled")]


def held_out_quality():
    "Which score tells what a probe reads on new images."
    names = {"ridge": "ridge oracle, FMCS", "universal": "universal oracle, FMCS", "error": "ridge oracle, 1 - left-out error", "alignment": "debiased alignment", "ceiling": "a second probe (ceiling)"}
    rows = [[f"{r['images']} {IMAGES[r['mode']]}", names[r["score"]], *agreement_cells(r, "ridge")]
            for mode in IMAGES for r in rows_of("held_out_quality") if r["subset"] == "other" and r["mode"] == mode and not (r["images"] == "256" and r["score"] == "universal")]
    return table(["images", "score", "between modules", "over training", "pooled"], rows)


def learnt_quality():
    "The quality oracle where it was not trained."
    names = {"labelled": "quality oracle", "ridge": "ridge oracle, FMCS", "error": "1 - left-out error", "alignment": "debiased alignment", "ceiling": "a second probe (ceiling)", "free": "quality oracle, without labels"}
    found = {(r["left_out"], r["mode"], r["images"], r["score"]): r for r in rows_of("quality_oracle")}
    rows = []
    for mode in IMAGES:
        for images in ("64", "256"):
            for score, name in names.items():
                for left in ("family", "source") if score in ("labelled", "free") else ("family",):
                    if score == "free" and images == "256": continue
                    r = found[left, mode, images, score]
                    shown = f"{name}, {left} left out" if score in ("labelled", "free") else name
                    rows.append([f"{images} {IMAGES[mode]}", shown, *agreement_cells(r, "labelled"), f"{float(r['mae']):.2f}" if r["mae"] else ""])
    return table(["images", "score", "between modules", "over training", "pooled", "mean error"], rows)


def groups():
    "Every family, source and task that was left out."
    found, number = {}, lambda v: f"{float(v):.2f}" if v else "-"
    for r in rows_of("universal_oracle"):
        if r["left_out"] != "all": found.setdefault((r["by"], r["left_out"]), {})[r["score"]] = r
    rows = [[by, name, g["labelled"]["runs_with_rho"], *(number(g[k]["rho"]) for k in ("labelled", "cka_map", "cka_means", "free")), number(g["labelled"]["rho_last"]), number(g["labelled"]["mae"]), number(g["free"]["mae"])] for (by, name), g in found.items()]
    return table(["by", "left out", "runs with a rho", "rho with labels", "rho of CKA, map", "rho of CKA, means", "rho without labels", "rho with labels, last module", "MAE with labels", "MAE without"], rows)


def ablations():
    "The labelled net without one of its parts."
    rows = [[r["variant"], f"{float(r['rho']):.3f} ({float(r['rho_low']):.2f} to {float(r['rho_high']):.2f})", f"{float(r['rho_last']):.3f}", f"{float(r['mae']):.3f}"] for r in rows_of("ablations")]
    return table(["variant", "rho, all modules (95 % interval over runs)", "rho, last module", "MAE"], rows)


def in_a_loss():
    "Few images, validation split, batch norm in training mode: what each part of the score contributes as a loss."
    found = {}
    for r in rows_of("few_images"):
        if r["split"] == "valid" and r["norms"] == "train" and r["lr"] == "0.001": found.setdefault((r["arm"], r["alpha"]), {})[r["seed"]] = float(r["accuracy"])
    rows = [[PARTS[arm], alpha, len(v), f"{100 * statistics.mean(v.values()):.1f}"] for (arm, alpha), v in sorted(found.items())]
    return table(["loss", "alpha", "seeds", "validation accuracy, %"], rows)


PARTS = {"plain": "task loss alone", "ral": "RAL, universal oracle", "ral_no_share": "RAL, universal oracle without class shares", "align": "plain alignment (CKA) as a loss, no oracle"}

def searched(n_train):
    "Forms of guidance on the validation split, best first."
    found = {}
    for r in rows_of("search"):
        if int(r["n_train"]) == n_train: found.setdefault((r["variant"], float(r["alpha"])), {})[r["seed"]] = 100 * float(r["accuracy"])
    plain = found["plain", 0.0]
    rows = []
    for (variant, alpha), v in found.items():
        d = [a - plain[s] for s, a in v.items()]
        rows.append([f"`{variant}`", f"{alpha:g}" if alpha else "", len(v), f"{statistics.mean(v.values()):.1f}", "" if variant == "plain" else f"{statistics.mean(d):+.1f}", "" if variant == "plain" else f"{min(d):+.1f} to {max(d):+.1f}"])
    return table(["form", "alpha", "seeds", "validation accuracy, %", "difference to plain, points", "of single seeds"], sorted(rows, key=lambda r: -float(r[4] or 0)))


SCREENED = {"ral": "universal oracle", "ridge": "ridge", "ridge.1": "ridge, penalty 0.1", "quality": "quality oracle", "alignment": "plain alignment", "ridge-ce": "cross-entropy of ridge's predictions", "supcon": "supervised contrastive"}
BESIDE = {"manifold-mixup": "MixUp of maps", "keep-similarities": "the start's similarities kept", "plain": "plain"}
BANKS = {"-copies": "copies in", "-bank": "copies out"}


def screened():
    "Losses on the last blocks of a network whose front is fixed, validation images."
    found, settings = {}, ("fashion-5", "clipart-5")
    for r in rows_of("loss_screen"):
        if r["setting"] in settings: found.setdefault(r["variant"], {})[r["setting"], r["seed"]] = 100 * float(r["accuracy"])
    plain, rows = found.pop("plain"), []
    for variant, v in found.items():
        loss, bank, others = "", "none", []
        for part in variant.split("+"):
            name = part.partition(":")[0]
            if name in BESIDE: others.append(BESIDE[name])
            else:
                end = next((e for e in BANKS if name.endswith(e)), "")
                loss, bank = SCREENED[name.removesuffix(end)], BANKS.get(end, "none")
        by = {s: [v[k] - plain[k] for k in v if k[0] == s and k in plain] for s in settings}
        if min(map(len, by.values())) < 8: continue
        both = [d for b in by.values() for d in b]
        rows.append([loss or "none", bank, ", ".join(others), len(by["fashion-5"]), *(f"{statistics.mean(b):+.1f}" for b in by.values()), f"{statistics.mean(both):+.1f} ± {statistics.stdev(both) / len(both) ** .5:.1f}"])
    return table(["loss", "memory bank", "with", "seeds", "FashionMNIST", "OpenClipart", "both, and standard error"], sorted(rows, key=lambda r: -float(r[-1].split()[0])))


FACTORS = {"base": ("loss", {"plain": "none", "ridge.1": "ridge, penalty 0.1", "ridge-ce": "cross-entropy of ridge's left-out predictions", "supcon": "supervised contrastive", "prototypes": "prototypes of the other images",
                             "ral": "universal oracle", "quality": "quality oracle", "alignment": "plain alignment"}),
           "bank": ("memory bank", {"copies": "own copies in", "bank": "own copies out"}), "taps": ("taps", {"4+6": "blocks 4 and 6", "6": "block 6", "4+6+last": "blocks 4, 6 and the pooled map", "6+last": "block 6 and the pooled map", "last": "the pooled map"}),
           "alpha": ("alpha", {}), "schedule": ("alpha over the fit", {"fall": "falling to 0", "rise": "rising from 0"}), "head": ("projection head", {}), "mixup": ("MixUp of maps", {}), "flip": ("mirrored images", {}), "keep": ("pull to the start's similarities", {"0.0": "none"})}

def factors(stem):
    "Effects of a stage of a random factorial experiment: points over the first level of each factor."
    rows, last = [], None
    for r in rows_of(stem):
        name, levels = FACTORS[r["factor"]]
        cells = [f"{float(r[f'{s} effect']):+.1f} ± {float(r[f'{s} se']):.1f}" for s in ("fashion", "clipart", "both")]
        level = levels.get(r["level"], r["level"])
        rows.append([name if name != last else "", level, *(cells if name == last else ["0"] * 3)])
        last = name
    return table(["factor", "level", "FashionMNIST, effect and standard error", "OpenClipart", "both"], rows)


def recipes():
    "Recipes of fine-tuning and what they reach, validation images."
    import sys
    sys.path.append(str(BENCHMARKS))
    try: import recipe_search
    finally: sys.path.remove(str(BENCHMARKS))
    found = {}
    for r in rows_of("recipe_search"): found.setdefault((r["setting"], r["variant"]), []).append(100 * float(r["accuracy"]))
    rows = []
    for (setting, variant), v in found.items():
        data, a_class = setting.split("-")
        arm, fields = recipe_search.split(variant)
        study = recipe_search.study_of(setting, fields)
        norm = "fixed" if study.freeze_norm else "trained"
        rows.append([f"{data}, {a_class} a class", f"`{arm}`", study.size, study.epochs, f"{study.lrs[0]:g}", f"{study.body_lr:g}", norm, len(v), f"{statistics.mean(v):.1f}"])
    order = lambda r: (r[0], r[1] != "`plain`", -float(r[-1]))
    return table(["images", "arm", "px", "epochs", "head's rate", "body's share of it", "batch norm", "seeds", "accuracy, %"], sorted(rows, key=order))


def studied(name):
    "The table of a study in `benchmarks/studies`."
    rows, number = [], lambda r, k, f: format(float(r[k]), f) if r[k] else ""
    for r in DictReader((BENCHMARKS / "studies" / name / "table.csv").read_text(encoding="utf-8").splitlines()):
        interval = f" ({float(r['low']):+.1f} to {float(r['high']):+.1f})" if r["low"] else ""
        p = r["p"] if r["role"] == "primary" else r["p_holm"]
        rows.append([f"`{r['arm']}`", number(r, "alpha", "g") if float(r["alpha"]) else "", number(r, "lr", "g"), r["seeds"], number(r, "accuracy", ".1f"), f"{float(r['difference']):+.1f}{interval}" if r["difference"] else "",
                     f"{float(r['above']):.0f} of {r['seeds']}" if r["above"] else "", "" if not p else "< 0.001" if float(p) < 0.001 else f"{float(p):.3f}", r["role"]])
    return table(["arm", "alpha", "rate", "seeds", "test accuracy, %", "difference to plain in points (95 % interval)", "above 0", "p", "role"], rows)


def attention():
    "Grad-CAM across alpha: means over images, then over seeds."
    import pandas as pd
    columns = {"accuracy": (100, ".1f"), "probability": (1, ".2f"), "entropy": (1, ".3f"), "top_share": (1, ".3f"), "drop": (1, ".3f"), "drop_least": (1, ".3f"), "blank": (1, ".1f")}
    of = pd.DataFrame(rows_of("cam")).astype({c: float for c in columns}).groupby("name", sort=False)
    rows = [[name, *(format(scale * g[c].mean(), form) for c, (scale, form) in columns.items())] for name, g in of]
    return table(["network", "test accuracy, %", "probability of the class", "entropy", "top share", "drop", "drop, least relevant", "blank maps of 30"], rows)


def finer():
    "Grad-CAM across alpha: differences to plain training, paired over seeds."
    import pandas as pd
    from fmce_fastai.study.cam_statistics import cam_statistics
    measures, head = ("entropy", "top_share", "drop", "relative", "accuracy"), ("entropy", "top share", "drop", "drop / probability", "test accuracy, points")
    frame = pd.DataFrame(rows_of("cam")).astype({c: float for c in ("probability", "accuracy", *measures[:3])})
    t = cam_statistics(frame.assign(relative=frame["drop"] / frame.probability, accuracy=100 * frame.accuracy), measures=measures).set_index(["name", "measure"])
    number = lambda r, f: f"{r.difference:{f}} ({r.low:{f}} to {r.high:{f}})"
    names = [n for n in dict.fromkeys(t.index.get_level_values(0)) if n != "plain"]
    rows = [["slope per 0.1 of alpha" if n == "trend" else n, *(number(t.loc[n, m], "+.1f" if m == "accuracy" else "+.3f") for m in measures)] for n in names]
    return table(["network", *(f"{h} (95 % interval)" for h in head)], rows)


def families():
    "The default taps of the smallest model of every timm family."
    swept = {r["family"]: r for r in rows_of("timm_sweep") if r["route"] == "vision_learner" and r["checkpointing"] == "off"}
    rows = []
    for r in sorted(rows_of("timm_maps"), key=lambda r: r["family"]):
        taps = [t.split(":") for t in swept[r["family"]]["maps"].split()]
        rows.append([r["family"], f"`{r['model']}`", swept[r["family"]]["size"], ", ".join(f"`{name}`" for name, _ in taps), taps[-1][1], r["layouts"], r["maps"], f"`{h}`" if (h := swept[r["family"]]["head"]) == "timm_head" else "fastai's"])
    return table(["family", "smallest model", "pixels", "taps by default", "last map", "layout", "maps", "head"], rows)


MAP = {"few-images/5-a-class": "EfficientNet-Lite0, ImageNet weights, 5 images a class", "few-images/20-a-class": "the same, 20 images a class", "few-images/100-a-class": "the same, 100 images a class", "few-images/500-a-class": "the same, 500 images a class", "few-images/lite1-5-a-class": "EfficientNet-Lite1, ImageNet weights, 5 images a class",
       "rivals/openclipart-10-a-class": "EfficientNet-Lite0, ImageNet weights, OpenClipart at 64 px, 10 images a class",
       "rivals/openclipart-128px-10-a-class": "EfficientNet-Lite0, ImageNet weights, OpenClipart at 128 px, 10 images a class",
       "rivals/glyphs-5-a-class": "EfficientNet-Lite0, ImageNet weights, letters and digits (62 classes), 5 images a class",
       "scratch/shufflenet_v2_x0_5": "ShuffleNet v2 x0.5, 10,000 images, after 4 epochs of plain training", "scratch/resnet10t": "resnet10t, 10,000 images, after 10 epochs of plain training"}
COLUMNS = {"RAL": ("ral-universal",), "RAL with memory": ("ral-memory",), "RAL, fitted oracle": ("ral",), "plain alignment": ("alignment",), "ridge": ("ridge",), "supervised contrastive": ("supcon",), "the same with a projection head": ("supcon-head",), "MixUp": ("mixup",)}


IN_SHORT = ["few-images/5-a-class", "rivals/openclipart-128px-10-a-class", "rivals/glyphs-5-a-class", "scratch/resnet10t"]


def contrast(rows, arms):
    "The row of a study's table that stands for `arms`: the primary one, else the lowest alpha from 0.85 on, a rule that does not look at the results."
    own = [r for r in rows if r["arm"].partition("@")[0] in arms and "+" not in r["arm"] and r["difference"]]
    primary = [r for r in own if r["role"] == "primary"]
    return primary[0] if primary else max(own, key=lambda r: (abs(float(r["alpha"]) - 0.95) < 0.1, -float(r["alpha"])), default=None)


def contrast_text(row):
    "Difference to plain training, its interval, alpha and role."
    if row is None: return ""
    alpha = f", alpha {float(row['alpha']):g}" if float(row["alpha"]) else ""
    primary = " (primary)" if row["role"] == "primary" else ""
    return f"{float(row['difference']):+.1f} ({float(row['low']):+.1f} to {float(row['high']):+.1f}){alpha}{primary}"


def where_it_helps(names=tuple(MAP), columns=tuple(COLUMNS)):
    "Studies in one table: differences to plain training on the test split."
    rows = []
    for name in names:
        path = BENCHMARKS / "studies" / name / "table.csv"
        if not path.exists(): continue
        found = list(DictReader(path.read_text(encoding="utf-8").splitlines()))
        rows.append([MAP[name], f"{float(found[0]['accuracy']):.1f}", *(contrast_text(contrast(found, COLUMNS[c])) for c in columns)])
    return table(["network and data", "plain, %", *columns], rows)


def in_short():
    "The README's table."
    return where_it_helps(IN_SHORT, ("RAL", "RAL with memory", "plain alignment", "MixUp"))


STUDIES = [f"{p.parent.parent.name}/{p.parent.name}" for p in sorted((BENCHMARKS / "studies").glob("*/*/table.csv"))]

NB = {"pretrain": "08j_pretrain.judge", "report": "05d_report.report", "cam": "07u_study.cams", "fit": "03i_oracle.fit", "taps": "02i_maps.find", "callback": "04i_train.callback"}

# Tables on the pages of notebooks: name -> (function, notebook)
PAGES = {"learnt_quality": (learnt_quality, "03m_oracle.quality"), "held_out_quality": (held_out_quality, "03k_oracle.ridge"), "groups": (groups, NB["pretrain"]), "ablations": (ablations, NB["pretrain"]), "in_a_loss": (in_a_loss, NB["pretrain"]), "untrained_modules": (untrained_modules, NB["report"]), "untrained": (untrained, NB["report"]),
         "checkpoint_doctor": (checkpoint_doctor, "tutorials/checkpoint"), "probe_modules": (probe_modules, NB["report"]),
         "attention": (attention, NB["cam"]), "finer": (finer, NB["cam"]),
         "families": (families, "tutorials/choosing_modules"),
         **{f"search_{n}": (partial(searched, n), "results") for n in (50, 200)}, **{name: (partial(studied, name), "results") for name in STUDIES}}

PAGES |= {"gains": (gains, "results"), "universal": (universal, NB["pretrain"]), "oracles": (oracles, NB["fit"]), "architectures": (architectures, NB["taps"]), "overhead": (overhead, NB["callback"]), "where_it_helps": (where_it_helps, "results"), "screened": (screened, "results"), "recipes": (recipes, "results"), "factors": (partial(factors, "loss_effects"), "results"), "later_factors": (partial(factors, "later_loss_effects"), "results")}

# In the README
TABLES = {"in_short": in_short}

if __name__ == "__main__":
    for name, make in {**TABLES, **{n: m for n, (m, _) in PAGES.items()}}.items(): print(f"{name}\n\n{make()}\n")
