"""What are the data sets that are made on this machine: how many images, how split, what was left out, and do related images cross the split?

    python benchmarks/data_sets.py openclipart --root FOLDER     # half a minute on one core
    python benchmarks/data_sets.py glyphs                        # about a minute on one core

Writes `data_openclipart.csv` and `data_glyphs.csv`: rows of (table, name, train, valid, test, n). Tables: `class` (images of each class and split; glyphs have the same number in all classes, one row), `split` (all images), `groups` (groups of related images), `left out` (files by reason),
`crossing` (pairs of nearly equal images, and how many of them lie in two splits when images are split one by one, by name, by pixels, and by both, as the package does), `same picture` (glyphs: faces in which the two characters are one picture), `limit` (glyphs: largest possible
accuracy, in per cent), `source` (the Debian packages, or SHA-1 of the fonts' names). `--sheet FILE` also writes a picture of some images of every class."""
import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from fmce_fastai.data.cache import digest
from fmce_fastai.data.fonts import CHARACTERS, equal_characters, read_glyphs
from fmce_fastai.data.glyphs import clone_pairs, glyph_ceiling, split_glyphs, typeface_groups
from fmce_fastai.data.groups import equal_pairs, group_split, linked_groups, similar_pairs
from fmce_fastai.data.openclipart import SIMILAR, centred_thumbs, drawing_family, drawing_groups, read_openclipart, split_drawings

HERE = Path(__file__).parent
SHARES = .4, .15, .45


def row(table, name, parts=None, n=None):
    "A row of the CSV; `parts` are the numbers of the splits of each image."
    counts = [None]*3 if parts is None else np.bincount(parts, minlength=3).tolist()
    return dict(table=table, name=name, train=counts[0], valid=counts[1], test=counts[2], n=len(parts) if n is None else n)


def group_row(part, groups): return row("groups", "all", part[np.unique(groups, return_index=True)[1]])


def crossing_rows(labels, by_name, by_pixels, names):
    "How many pairs of nearly equal images lie in two parts, for four ways of splitting."
    yield row("crossing", "pairs of nearly equal images", n=len(by_pixels))
    for name, links in (("split one by one", []), ("split by name", [by_name]), ("split by pixels", [by_pixels]), ("split by both", [by_name, by_pixels])):
        part = group_split(labels, linked_groups(len(names), *links), SHARES, names)
        yield row("crossing", name, n=int((part[by_pixels[:, 0]] != part[by_pixels[:, 1]]).sum()))


def openclipart_rows(root, cache):
    d = read_openclipart(root, cache=cache)
    part = split_drawings(d)
    yield from (row("class", name, part[d.labels == k]) for k, name in enumerate(d.vocab))
    yield row("split", "all", part)
    yield group_row(part, drawing_groups(d))
    yield from (row("left out", reason, n=n) for reason, n in sorted(Counter(d.dropped.values()).items()))
    families = equal_pairs([drawing_family(Path(o).stem) for o in d.paths])
    yield from crossing_rows(d.labels, families, similar_pairs(centred_thumbs(d), SIMILAR), d.paths)
    yield row("source", f"SHA-1 of the paths {digest(d.paths)}", n=len(d.paths))


def glyphs_rows(root, cache):
    g = read_glyphs(root, cache=cache)
    part, names = split_glyphs(g), [o.typeface for o in g.faces]
    yield row("class", "each of the 62", part)
    yield row("split", "all", np.repeat(part, len(CHARACTERS)))
    yield group_row(part, typeface_groups(g))
    yield from (row("left out", reason, n=n) for reason, n in sorted(Counter(g.dropped.values()).items()))
    yield from crossing_rows(np.zeros(len(names), np.int64), equal_pairs(names), clone_pairs(g), names)
    pairs = Counter(pair for face in g.scaled for pair in equal_characters(face))
    yield from (row("same picture", pair, n=n) for pair, n in pairs.most_common())
    yield row("limit", "accuracy, %", n=round(100*glyph_ceiling(g), 2))
    yield row("source", f"SHA-1 of the typefaces' names {digest(names)}", n=len(names))


def sheet(images, labels, n_classes, columns=16):
    "Some images of every class, a row each."
    rows = [[images[i] for i in np.flatnonzero(labels == k)[:columns]] for k in range(n_classes)]
    blank = np.full_like(images[0], 255)
    return Image.fromarray(np.vstack([np.hstack([*o, *[blank]*(columns-len(o))]) for o in rows]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("openclipart", "glyphs"))
    parser.add_argument("--root"), parser.add_argument("--cache"), parser.add_argument("--sheet"), parser.add_argument("--out", default=HERE, type=Path)
    args = parser.parse_args()
    rows = pd.DataFrame((openclipart_rows if args.data == "openclipart" else glyphs_rows)(args.root, args.cache))
    rows = rows.astype({k: "Int64" for k in ("train", "valid", "test")})
    rows.to_csv(args.out/f"data_{args.data}.csv", index=False)
    print(rows.to_string(index=False))
    if args.sheet and args.data == "openclipart":
        d = read_openclipart(args.root, cache=args.cache)
        part = split_drawings(d) == 2
        sheet(d.images[part], d.labels[part], len(d.vocab), columns=26).save(args.sheet)
    elif args.sheet:
        g = read_glyphs(args.root, cache=args.cache)
        faces = np.linspace(0, len(g.faces)-1, 30).astype(int)
        sheet(g.images[faces].reshape(-1, *g.images.shape[2:]), np.repeat(np.arange(30), 62), 30, columns=62).save(args.sheet)


if __name__ == "__main__": main()
