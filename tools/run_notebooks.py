"Run notebooks in full and keep their outputs, small: `python tools/run_notebooks.py nbs/tutorials/*.ipynb` (`make tutorials`). Names those that took longest or grew large."
import argparse
import base64
import io
import json
import os
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 400_000  # bytes of a notebook with its outputs


def smaller(png):
    "A picture (base64) in 256 colours: plots need no more, and take a quarter of the bytes."
    from PIL import Image
    file = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def kept(output):
    "An output without what only this run knows, or None for one that nobody reads: progress bars and their style sheets."
    data = output.get("data", {})
    text = "".join(data.get("text/html", ""))
    if output["output_type"] == "stream" and output["name"] == "stderr": return None
    if output["output_type"] == "display_data" and "image/png" not in data and ("<progress" in text or "<style" in text and "<table" not in text or "text/html" in data and not text.strip()): return None
    output = {k: v for k, v in output.items() if k != "execution_count"} | ({"execution_count": None} if output["output_type"] == "execute_result" else {})
    if "metadata" in output: output["metadata"] = {}
    if "image/png" in data: output["data"] = {**data, "image/png": smaller(data["image/png"])}
    return output


def run(path, timeout):
    "Execute the notebook at `path` in place, in its own folder, and return the seconds it took."
    import nbformat
    from nbclient import NotebookClient
    nb, start = nbformat.read(path, as_version=4), time.perf_counter()
    NotebookClient(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    seconds = time.perf_counter() - start
    nb.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    for cell in nb.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k != "execution"}
        if cell.cell_type == "code": cell.execution_count, cell.outputs = None, [o for o in map(kept, cell.outputs) if o is not None]
    nb = nbformat.from_dict(nb)
    nbformat.validate(nb)
    path.write_text(json.dumps(json.loads(nbformat.writes(nb)), indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--timeout", type=int, default=180, help="seconds that one cell may take")
    args = parser.parse_args()
    os.environ.pop("MPLBACKEND", None)  # pictures go into the notebook
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # results do not depend on what else the machine does
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    for path in args.notebooks:
        seconds, size = run(path.resolve(), args.timeout), path.stat().st_size
        print(f"{path}: {seconds:.0f} s, {size / 1000:.0f} kB" + (", larger than it should be" if size > LARGEST else ""))


if __name__ == "__main__": main()
