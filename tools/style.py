"""How readable is the package? `make style` prints the figures; `--check`, which the tests run, fails only for what is never right.

    python tools/style.py [--check] [--files] [FOLDER ...]

Figures, over non-empty lines: the length that 95 % of lines do not exceed, the share of lines over 140 characters, the lines of a function (median, 90th percentile), the largest file.
`--files` adds a row per file. FOLDER: other code to compare with, such as site-packages/fastai/callback.
Never right: an import against the arrows of `FLOORS`, an import cycle, an import or use of another module's private name, and in the core an import of the Hub, studies, statsmodels or (outside `plot`) matplotlib."""
import argparse
import ast
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT/"fmce_fastai"
# Each folder, and the folders that it may import from beside itself
FLOORS = {
    "util": (),
    "convergence": ("util",),
    "maps": ("util",),
    "oracle": ("util", "convergence", "maps"),
    "train": ("util", "convergence", "maps", "oracle"),
    "report": ("util", "convergence", "maps", "oracle", "train"),
    "data": ("util",),
    "study": ("util", "convergence", "maps", "oracle", "train", "report", "data"),
    "pretrain": ("util", "convergence", "maps", "oracle", "train", "data", "study"),
    "hub": ("util", "oracle"),
    "cli": ("util", "convergence", "maps", "oracle", "train", "report", "data", "study", "pretrain", "hub"),
}
CORE = ("util", "convergence", "maps", "oracle", "train")
NOT_IN_CORE = ("huggingface_hub", "statsmodels", "matplotlib")


def sources(folder):
    "Python files below `folder`, without generated indices."
    return sorted(p for p in Path(folder).rglob("*.py") if p.name != "_modidx.py")


def function_lengths(tree):
    "Lines of every function, from `def` to its end."
    return [n.end_lineno - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def figures(paths):
    "One row of the table for the code in `paths`."
    texts = [p.read_text(encoding="utf-8") for p in paths]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    lengths = np.array([len(line) for line in lines] or [0])
    functions = [n for text in texts for n in function_lengths(ast.parse(text))] or [0]
    sizes = [len(text.splitlines()) for text in texts]
    return dict(files=len(paths), p95=int(np.percentile(lengths, 95, method="inverted_cdf")), over_140=f"{(lengths > 140).mean():.1%}",
                median=int(np.median(functions)), p90=int(np.percentile(functions, 90)), largest=max(sizes, default=0))


def print_table(rows):
    "Rows of `figures` by name."
    print(f"{'':<34} {'files':>5} {'95 % of lines':>13} {'over 140':>9} {'function: median':>16} {'90 %':>5} {'largest file':>12}")
    for name, r in rows.items():
        print(f"{name:<34} {r['files']:>5} {r['p95']:>13} {r['over_140']:>9} {r['median']:>16} {r['p90']:>5} {r['largest']:>12}")


def module_name(path): return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path):
    "(module inside the package or outside name, imported names) of every import in `path`, inside functions too."
    here = module_name(path).split(".")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for a in node.names: yield a.name.removeprefix("fmce_fastai."), ()
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if node.module else []
            if node.level: parts = here[:len(here)-node.level] + parts
            elif parts[:1] == ["fmce_fastai"]: parts = parts[1:]
            yield ".".join(parts), tuple(a.name for a in node.names)


def against_arrows(path):
    "Imports of `path` that go against `FLOORS`."
    name = module_name(path)
    floor = name.split(".")[0]
    if floor not in FLOORS: return
    for target, _ in imported(path):
        other = target.split(".")[0]
        if other in FLOORS and other != floor and other not in FLOORS[floor]: yield f"{name} imports {target}: {floor} may import {', '.join(FLOORS[floor]) or 'nothing'}"
        if floor in CORE and other in NOT_IN_CORE and not (other == "matplotlib" and name.endswith(".plot")): yield f"{name} is part of the core and imports {other}"


def foreign_private(path):
    "Private names of other modules that `path` imports."
    for target, names in imported(path):
        if target.split(".")[0] not in FLOORS: continue
        for n in names:
            if n.startswith("_") and not n.startswith("__"): yield f"{module_name(path)} imports {n}, a private name of {target}"


def attached(path):
    "Methods that are attached to a class from outside, without `@patch`."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        for t in (e for target in targets for e in (target.elts if isinstance(target, ast.Tuple) else [target])):
            if isinstance(t, ast.Attribute): yield f"{module_name(path)} sets {ast.unparse(t)} from outside"


def cycles(paths):
    "Import cycles between modules, lazy imports included."
    edges = {module_name(p): {t for t, _ in imported(p) if t.split(".")[0] in FLOORS} for p in paths}
    found, done = [], set()
    def visit(name, path):
        if name in path:
            found.append(" -> ".join(path[path.index(name):] + [name]))
            return
        if name in done: return
        for t in sorted(edges.get(name, ())): visit(t, path + [name])
        done.add(name)
    for name in edges: visit(name, [])
    return [f"import cycle: {c}" for c in found]


def never_right():
    "All that `--check` refuses, as sentences."
    paths = [p for p in sources(PACKAGE) if p.parent != PACKAGE]
    return [*(w for p in paths for rule in (against_arrows, foreign_private, attached) for w in rule(p)), *cycles(paths)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", help="other code to compare with")
    parser.add_argument("--check", action="store_true", help="fail for what is never right, print nothing else")
    parser.add_argument("--files", action="store_true", help="a row per file")
    args = parser.parse_args()
    if wrong := never_right(): sys.exit("\n".join(wrong))
    if args.check: return print(f"{len(sources(PACKAGE))} modules: imports follow the arrows, and no private name crosses a module")
    rows = {"fmce_fastai": figures(sources(PACKAGE))}
    rows |= {f"  {floor}": figures(sources(PACKAGE/floor)) for floor in FLOORS}
    if args.files: rows |= {f"    {module_name(p)}": figures([p]) for p in sources(PACKAGE)}
    print_table(rows | {Path(f).as_posix()[-34:]: figures(sources(f)) for f in args.folders})


if __name__ == "__main__": main()
