"The README's tables, made from the CSV files that the scripts in benchmarks/ wrote: `python tools/figures.py` prints them."
import statistics
from csv import DictReader
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
            ["every map of `forward_intermediates` has a tap that gives it, values and gradients", f"{len(exact)} of {len(maps)} families"],
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


TABLES = {"overhead": overhead, "oracles": oracles, "architectures": architectures}

if __name__ == "__main__":
    for name, make in TABLES.items(): print(f"{name}\n\n{make()}\n")
