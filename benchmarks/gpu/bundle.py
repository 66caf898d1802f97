"""What a machine without network lacks: pure-Python wheels and FashionMNIST's files, in one folder.

The machine has PyTorch, torchvision and timm with what they need, and the compiled packages of
`GIVEN`. Its own packages are used where they are new enough; nothing of its Python is changed."""
import configparser
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60e6  # bytes

# Pure Python: the same files serve every Python from 3.10 on. Images do not need fastai's spaCy.
PURE = """fastai fastcore fasttransform fastprogress fastdownload plum-dispatch beartype rich
markdown-it-py mdurl pygments typing-extensions cloudpickle requests urllib3 idna certifi
charset-normalizer packaging pytest iniconfig pluggy timm""".split()
# Compiled, so they come from the machine: import name -> package
GIVEN = dict(torch="torch", torchvision="torchvision", numpy="numpy", PIL="pillow", yaml="pyyaml",
             safetensors="safetensors", huggingface_hub="huggingface_hub", pandas="pandas",
             scipy="scipy", sklearn="scikit-learn", matplotlib="matplotlib")
# For a machine without them, `--binary 3.12` takes these along, with what they need
BINARY = """pandas scipy scikit-learn matplotlib contourpy kiwisolver pillow pyyaml safetensors cycler
fonttools pyparsing python-dateutil six tzdata pytz joblib threadpoolctl narwhals""".split()
# Later releases need python-fasthtml, a web server
BELOW = dict(fastprogress="1.1")


def canonical(name): return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version): return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def minima():
    "Package -> least version, from `settings.ini`."
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    pairs = (r.split(">=") for r in config["DEFAULT"]["requirements"].split())
    return {canonical(name): version for name, version in pairs}


def requirement(name):
    "As pip takes it."
    bounds = {">=": minima().get(name), "<": BELOW.get(name)}
    return name + ",".join(sign + version for sign, version in bounds.items() if version)


def download(names, folder, *options):
    "Wheels of exactly these packages, by pip."
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    fixed = ["--only-binary=:all:", "--dest", folder]
    subprocess.run([*command, *fixed, *options, *map(requirement, names)], check=True)


def binary_options(python):
    "pip's options for compiled wheels of Linux on x86-64."
    tags = ["manylinux2014_x86_64", *(f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28))]
    platforms = [o for tag in tags for o in ("--platform", tag)]
    return ["--python-version", python, "--implementation", "cp", *platforms]


def folder_bytes(folder):
    "Bytes of all files below `folder`."
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())


def pack(bundle, data, binary=None):
    "Make the folder `bundle` anew; `binary`: a Python, such as 3.12, to add compiled wheels for."
    bundle = Path(bundle)
    shutil.rmtree(bundle/"wheels", ignore_errors=True)
    (bundle/"wheels").mkdir(parents=True)
    (bundle/"data").mkdir(exist_ok=True)
    pure = dict(python_version="3.10", implementation="py", abi="none", platform="any")
    download(PURE, bundle/"wheels", *(f"--{k.replace('_', '-')}={v}" for k, v in pure.items()))
    if binary: download(BINARY, bundle/"wheels", *binary_options(binary))
    for file in sorted(Path(data).glob("*-ubyte*")): shutil.copy(file, bundle/"data")
    size = folder_bytes(bundle)
    print(f"{bundle}: {len(list((bundle/'wheels').iterdir()))} wheels, {size/1e6:.1f} MB in all")
    if size > LIMIT: print(f"That is over {LIMIT/1e6:.0f} MB.")


def is_there(name):
    "True if this Python has the package, no older than `settings.ini` asks for."
    try: version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return False
    return numbers(version) >= numbers(minima().get(canonical(name), "0"))


def unpack_missing(bundle, site):
    """Unpack the wheels that this Python lacks into the folder `site`; their names.

    A wheel is a zip file of what is to lie on the path, so no pip is needed there."""
    unpacked = []
    for wheel in sorted((Path(bundle)/"wheels").glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        if is_there(name): continue
        unpacked.append(name)
        if (site/f"{name}-{version}.dist-info").exists(): continue
        with zipfile.ZipFile(wheel) as z: z.extractall(site)
    return unpacked


def prepare(bundle, site):
    "Put the package and what the machine lacks on the path, of this process and of those it starts."
    unpacked = unpack_missing(bundle, site)
    paths = [str(site), str(ROOT), str(Path(__file__).parent)]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    importlib.invalidate_caches()
    missing = [name for module, name in GIVEN.items() if importlib.util.find_spec(module) is None]
    if not missing: return unpacked
    version = "{}.{}".format(*sys.version_info)
    raise SystemExit(f"This Python lacks {', '.join(missing)}. PyTorch, torchvision and timm must be "
                     f"there; for the rest: run.py pack BUNDLE --binary {version}")
