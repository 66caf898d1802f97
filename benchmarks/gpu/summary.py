"What the CSV files of a device say so far, in a few lines."
import statistics

from cells import ARMS
from fmce_fastai.study.statistics import paired_difference


def overhead(job):
    "Median ratio of each measure."
    for precision in job.sizes["precisions"]:
        rows = job.rows("overhead", precision).read()
        for what in dict.fromkeys(r["what"] for r in rows):
            ratios = [float(r["ratio"]) for r in rows if r["what"] == what]
            median = statistics.median(ratios)
            yield f"{what}, {precision}: {median:.3f} of the time without, {len(ratios)} rows"


def cells(job):
    "Differences to plain fine-tuning in points, paired over seeds with the same start weights."
    rows = job.rows("fashion_cells", "float32")
    for arch in job.sizes["cells"]:
        for arm in ARMS[1:]:
            found = {(r["start"], r["arm"]): 100*float(r["accuracy"]) for r in rows.matching(arch=arch)}
            starts = [s for s, a in found if a == arm and (s, "plain") in found]
            d = paired_difference([found[s, arm] - found[s, "plain"] for s in starts])
            between = f", 95 % interval {d['low']:+.2f} to {d['high']:+.2f}" if len(starts) > 1 else ""
            points = f"{d['difference']:+.2f} points over plain"
            if starts: yield f"{arch}: {arm} {points}, seeds: {len(starts)}{between}"


def show(job):
    for line in [*overhead(job), *cells(job)]: print(line)
