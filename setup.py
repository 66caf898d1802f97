"Reads every field of the package's metadata from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
with open(here / "settings.ini", encoding="utf-8") as f: config.read_file(f)
cfg = config["DEFAULT"]

# PyPI has no files beside the page: pictures come from the repository
readme = (here / "README.md").read_text(encoding="utf-8")
pictures = f"https://raw.githubusercontent.com/{cfg['user']}/{cfg['repo']}/main/nbs/images"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.replace("](nbs/images/", f"]({pictures}/"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license_expression=cfg["license"],
    keywords=cfg["keywords"],
    url=f"https://github.com/{cfg['user']}/{cfg['repo']}",
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    include_package_data=True,
    package_data={cfg["lib_path"]: ["*.safetensors"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in ("dev", "study", "cam", "docs")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
