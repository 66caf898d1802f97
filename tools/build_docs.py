"""Build the documentation site into _docs, without a network: `make docs`.

nbdev turns every notebook of nbs/ into a page (`show_doc` for what is exported, saved outputs as they are); then Quarto renders the pages where it is installed, and smalldocs, which needs Python alone,
everywhere else. Both read nbs/_quarto.yml. What smalldocs leaves to the network or to Quarto is mended here: formulas become MathML, fonts are the reader's own, links to the site's own address become
relative, and each page has the Markdown copy that docstrings name."""
import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS, PROC, SITE = ROOT / "nbs", ROOT / "_proc", ROOT / "_docs"
HOME = "https://fmce-fastai.github.io/fmce_fastai/"  # links to it are links within the site


def processed(force=False):
    "The notebooks as pages-to-be, in _proc: nbdev runs their imports and exports, and fills in the API reference."
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a cell with imports and other code would be run, and fail some day
        return proc_nbs(force=force, n_workers=2)


def front_matter(nb):
    "What nbdev wrote into the first cell of a processed notebook: title, description, output-file."
    import yaml
    first = nb["cells"][0] if nb["cells"] else {}
    parts = "".join(first.get("source", "")).split("---\n") if first.get("cell_type") == "raw" else []
    return yaml.safe_load(parts[1]) if len(parts) > 2 else {}


def without_warnings(text):
    "A processed notebook without what its cells wrote to stderr: warnings name folders of this machine."
    nb = json.loads(text)
    for cell in nb["cells"]:
        if "outputs" in cell: cell["outputs"] = [o for o in cell["outputs"] if o.get("name") != "stderr"]
    return json.dumps(nb, indent=1, ensure_ascii=False)


def staged(proc, stage):
    "A copy of `proc` in which `04i_train.callback.ipynb` is `train.callback.ipynb`, as nbdev tells Quarto through `output-file`, which smalldocs does not read. Returns the new name of each page's source."
    names = {}
    for path in sorted(p for p in proc.rglob("*") if p.is_file() and "_docs" not in p.parts):
        rel = path.relative_to(proc)
        text = without_warnings(path.read_text(encoding="utf-8")) if path.suffix == ".ipynb" else ""
        name = front_matter(json.loads(text)).get("output-file") if text else None
        new = rel.with_name(Path(name).stem + path.suffix) if name else rel
        names[rel.as_posix()] = new.as_posix()
        (stage / new).parent.mkdir(parents=True, exist_ok=True)
        if text: (stage / new).write_text(re.sub(r'\n *"output-file: [^\n]*', "", text, count=1), encoding="utf-8")
        else: shutil.copy2(path, stage / new)
    return names


def configured(stage, names):
    "Rewrite the staged _quarto.yml and nbdev.yml: new names of pages, and no key that smalldocs does not know. The pages that no menu shows are returned."
    import yaml
    def renamed(o):
        if isinstance(o, dict): return {k: renamed(v) for k, v in o.items()}
        if isinstance(o, list): return [renamed(v) for v in o]
        return names.get(o, o) if isinstance(o, str) else o
    config = renamed(yaml.safe_load((stage / "_quarto.yml").read_text(encoding="utf-8")))
    (stage / "_quarto.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    extra = yaml.safe_load((stage / "nbdev.yml").read_text(encoding="utf-8"))
    extra.pop("format-links", None)
    (stage / "nbdev.yml").write_text(yaml.safe_dump(extra, sort_keys=False), encoding="utf-8")
    shown = str(config["website"]["sidebar"])
    return [n for n in names.values() if n.endswith((".ipynb", ".qmd")) and f"'{n}'" not in shown]


def with_smalldocs(proc, site):
    "Render `proc` into `site` with smalldocs. Raises `SystemExit` for a page that no menu shows, or that smalldocs warns of."
    with tempfile.TemporaryDirectory() as tmp:
        stage = Path(tmp) / "nbs"
        hidden = configured(stage, staged(proc, stage))
        if hidden: sys.exit(f"No menu in nbs/_quarto.yml shows {', '.join(hidden)}.")
        for name in ("CHANGELOG.md", "CONTRIBUTING.md"):  # the pages include them, under a title of their own
            (Path(tmp) / name).write_text((ROOT / name).read_text(encoding="utf-8").split("\n", 1)[1], encoding="utf-8")
        run = subprocess.run([sys.executable, "-m", "smalldocs.cli", "render", str(stage), "--strict"], capture_output=True, text=True)
        if run.returncode: sys.exit(f"smalldocs:\n{run.stdout}{run.stderr}")
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(stage / SITE.name, site)
        copies(stage, site)


def with_quarto():
    "Render with Quarto, through nbdev. Not tried: Quarto was not to be had where this was written."
    subprocess.run(["nbdev-docs"], cwd=ROOT, check=True)


# What smalldocs leaves to be done -------------------------------------------------------------------------------------

FORMULA = re.compile(r'<span class="math (inline|display)">(.*?)</span>', re.S)
KATEX = re.compile(r"<(link|script)\b[^>]*/katex@[^>]*>(</script>)?")
FONTS = re.compile(r"""@import\s*(?:url\(\s*)?(["']?)https?://fonts\.[^"')]*\1\s*\)?\s*;?""")


def mathml(m):
    "A formula as MathML, which browsers draw by themselves."
    from latex2mathml.converter import convert
    kind, tex = m[1], html.unescape(m[2]).strip()
    tex = tex.removeprefix(r"\(" if kind == "inline" else r"\[").removesuffix(r"\)" if kind == "inline" else r"\]")
    made = convert(tex, display="block" if kind == "display" else "inline").replace(r"\_", "_")
    if re.search(r"\\[a-zA-Z]", made): raise ValueError(f"latex2mathml left TeX behind in the formula {tex!r}.")
    return f'<span class="math {kind}">{made}</span>'


def localised(page, site, text):
    "Links to the site's own address, made relative to `page`."
    offset = "../" * len(page.relative_to(site).parent.parts)
    def one(m):
        target, mark, anchor = m[2].partition("#")
        known = target in ("", "index.html") or (site / target).is_file()
        return f'{m[1]}="{offset}{target or "index.html"}{mark}{anchor}"' if known or target.endswith(".html") else m[0]
    return re.sub(rf'(href|src)="{re.escape(HOME)}([^"]*)"', one, text)


def wide(text):
    "Tables in a box of their own, which scrolls where a phone is too narrow for them."
    text = re.sub(r"<table\b", '<div class="wide"><table', text)
    return text.replace("</table>", "</table></div>")


def named(page, text):
    "Names as readers know them: the function `fmce_report`, not the shell command of that name; no addresses in signatures."
    if page.name != "cli.report.html": text = text.replace('cli.report.html#fmce_report"', 'report.report.html#fmce_report"')
    tags = r"(?:<[^>]*>|\s|&lt;|&gt;)*"  # the words of a signature stand in tags that colour them
    text = re.sub(rf"function{tags}store_true{tags}at{tags}0x[0-9a-f]+", "bool", text)
    return re.sub(r'__main__(\.|<span class="op">\.</span>)', "", text)


def mended(site):
    "Mend every page of `site` in place."
    for page in sorted(site.rglob("*.html")):
        text = named(page, page.read_text(encoding="utf-8"))
        text = KATEX.sub("", FORMULA.sub(mathml, text))
        page.write_text(wide(localised(page, site, text)), encoding="utf-8")
    for css in (site / "site_libs").rglob("*.css"):
        text = css.read_text(encoding="utf-8")
        if FONTS.search(text): css.write_text(FONTS.sub("", text), encoding="utf-8")


def as_markdown(nb):
    "A processed notebook as Markdown: title, text, code, and those outputs that are text."
    front, parts = front_matter(nb), []
    if front.get("title"): parts.append(f"# {front['title']}" + (f"\n\n> {front['description']}" if front.get("description") else ""))
    for cell in nb["cells"]:
        text = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown" and text: parts.append(text)
        if cell["cell_type"] != "code": continue
        options = [line for line in text.splitlines() if line.startswith("#|")]
        code = "\n".join(line for line in text.splitlines() if not line.startswith("#|")).strip()
        if code and not any(re.match(r"#\|\s*(echo|include):\s*false", o) for o in options): parts.append(f"```python\n{code}\n```")
        if any(re.match(r"#\|\s*include:\s*false", o) for o in options): continue
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if "text/markdown" in data: parts.append("".join(data["text/markdown"]).strip())
            elif "text/plain" in data and "image/png" not in data: parts.append("```\n" + "".join(data["text/plain"]).rstrip() + "\n```")
            elif out.get("name") == "stdout": parts.append("```\n" + "".join(out["text"]).rstrip() + "\n```")
    return "\n\n".join(p for p in parts if not p.startswith("<!-- WARNING")) + "\n"


def copies(stage, site):
    "`train.callback.html.md` beside `train.callback.html`: the page as Markdown, for programs and for reading without a browser. Docstrings point there."
    for path in sorted(stage.rglob("*.ipynb")):
        target = site / path.relative_to(stage).with_suffix(".html.md")
        target.write_text(as_markdown(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="process every notebook again, unchanged ones too")
    parser.add_argument("--renderer", choices=["auto", "quarto", "smalldocs"], default="auto", help="default: Quarto where it is installed")
    args = parser.parse_args()
    os.chdir(ROOT)
    start = time.perf_counter()
    use = args.renderer if args.renderer != "auto" else "quarto" if shutil.which("quarto") else "smalldocs"
    if use == "quarto": with_quarto()
    else:
        with_smalldocs(processed(args.force), SITE)
        mended(SITE)
    print(f"{len(list(SITE.rglob('*.html')))} pages in {SITE.relative_to(ROOT)}, rendered with {use} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__": main()
