"""The measurements that need a GPU, on a machine with CUDA, PyTorch and timm but without network.

    python benchmarks/gpu/run.py pack BUNDLE         # with network: wheels and FashionMNIST's files
    python benchmarks/gpu/run.py BUNDLE --minutes 9  # there; again, to go on where it stopped
    python benchmarks/gpu/run.py BUNDLE --tiny       # anywhere, on the CPU: the same in miniature

a: the tests marked `cuda`. b: time of RAL, RAL with memory and recording over plain, in four
precisions. c: the FashionMNIST cells of the source's table. Rows go to CSV files in --out as they
come; what has a row is not run again."""
import argparse
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from bundle import pack, prepare
from ledger import Budget, run_units


def parse(args):
    "The arguments of a run."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, path = p.add_argument, dict(type=Path)
    add("bundle", **path, help="folder made by `pack`")
    add("--out", **path, default=HERE, help="folder of the CSV files (default: benchmarks/gpu)")
    add("--minutes", type=float, default=9, help="most minutes that this call takes (default: 9)")
    add("--parts", default="abc", help="which of a, b and c, in this order (default: abc)")
    add("--seeds", type=int, help="most seeds for each network of c (default: 10; tiny: 1)")
    add("--state", **path, default=HERE/"state",
        help="folder of unpacked wheels and start weights (default: benchmarks/gpu/state)")
    add("--tiny", action="store_true", help="in miniature, on the CPU; file names begin with tiny")
    args = p.parse_args(args)
    if set(args.parts) - set("abc"): p.error(f"--parts {args.parts}: give letters of a, b and c")
    if not (args.bundle/"wheels").is_dir(): p.error(f"{args.bundle} holds no wheels: run.py pack makes it")
    return args


def parse_pack(args):
    "The arguments of `pack`."
    p = argparse.ArgumentParser(prog="run.py pack", description="Make the bundle, by pip.")
    data = "/usr/share/datasets/fashion-mnist"
    p.add_argument("bundle", type=Path, help="folder to write, such as benchmarks/gpu/bundle")
    p.add_argument("--data", default=data, help=f"folder with FashionMNIST's IDX files (default: {data})")
    p.add_argument("--binary", help="a Python version, such as 3.12: compiled wheels too, for a machine "
                                    "without pandas, SciPy, scikit-learn and Matplotlib (over 60 MB)")
    return p.parse_args(args)


def measure(args, budget):
    "Run the parts; the names of what failed."
    unpacked = prepare(args.bundle, args.state.resolve()/"site")
    print(f"not on this machine, taken from the bundle: {', '.join(unpacked) or 'nothing'}")
    warnings.simplefilter("ignore")
    import torch
    import cells, cuda_tests, step_overhead, summary
    from job import Job
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("No CUDA device. --tiny runs on the CPU.")
    if args.tiny: torch.set_num_threads(1)  # several wait for each other on a busy machine
    seeds = args.seeds or (1 if args.tiny else 10)
    job = Job(args.bundle, args.out.resolve(), args.state.resolve(), budget, args.tiny, seeds)
    parts = dict(a=cuda_tests, b=step_overhead, c=cells)
    failed = [name for letter in args.parts for name in run_units(parts[letter].units(job), budget)]
    summary.show(job)
    return failed


def main(args):
    if args[:1] == ["pack"]:
        a = parse_pack(args[1:])
        return pack(a.bundle, a.data, a.binary)
    args = parse(args)
    budget = Budget(args.minutes)
    failed = measure(args, budget)
    print(f"{budget.spent:4.0f} s in all")
    if failed: sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__": main(sys.argv[1:])
