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


TABLES = {"overhead": overhead, "oracles": oracles}

if __name__ == "__main__":
    for name, make in TABLES.items(): print(f"{name}\n\n{make()}\n")
