"Write README.md from nbs/index.ipynb: its Markdown cells, and its code cells as fenced blocks."
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def to_markdown(nb):
    "The notebook `nb` (parsed JSON) as one Markdown text; cells that start with `#| hide` are left out."
    parts = []
    for cell in nb["cells"]:
        text = "".join(cell["source"]).strip()
        if not text or text.startswith("#| hide"): continue
        if cell["cell_type"] == "markdown": parts.append(text)
        elif cell["cell_type"] == "code":
            code = "\n".join(line for line in text.splitlines() if not line.startswith("#|")).strip()
            parts.append(f"```python\n{code}\n```")
    return "\n\n".join(parts).replace("](images/", "](nbs/images/") + "\n"  # pictures lie beside the notebook


if __name__ == "__main__":
    nb = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))
    (ROOT / "README.md").write_text(to_markdown(nb), encoding="utf-8")
