"Fail if `nbdev-export` or the README build would change anything: notebooks and package must agree."
import filecmp, shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ["fmce_fastai", "README.md"]


def exported(root):
    "Run the export in `root`."
    env_python = sys.executable
    subprocess.run([env_python, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=root, check=True)
    subprocess.run([env_python, "tools/build_readme.py"], cwd=root, check=True)


def generated_files(root):
    "The generated files below `root`, relative to it."
    found = set()
    for name in GENERATED:
        path = root / name
        found |= {p.relative_to(root) for p in (path.rglob("*.py") if path.is_dir() else [path])}
    return found


def main():
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / "copy"
        ignore = shutil.ignore_patterns(".venv", ".git", "__pycache__", "runs", "build", "dist", "*.egg-info")
        shutil.copytree(ROOT, copy, ignore=ignore)
        exported(copy)
        names = generated_files(ROOT) | generated_files(copy)
        changed = sorted(str(n) for n in names
                         if not ((ROOT / n).exists() and (copy / n).exists()
                                 and filecmp.cmp(ROOT / n, copy / n, shallow=False)))
    if changed:
        sys.exit("Exporting the notebooks changes these files; run `make export` and commit:\n  " + "\n  ".join(changed))
    print(f"export is clean: {len(names)} generated files agree with the notebooks")


if __name__ == "__main__": main()
