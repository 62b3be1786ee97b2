"""Packaging. Everything static about tools is in pyproject.toml; this file maps the folders to packages.

`kernels/` lives beside `smolrun/` so that it can be read, timed and tested alone, and installs as `smolrun.kernels`: a
top-level package named `kernels` would shadow Hugging Face's.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

COMPILE = ["ziglang>=0.13"]  # lld, the linker of `smolrun compile`, where none is on PATH
TRAIN = ["matplotlib>=3.8", "pyarrow>=15", "tomli>=2; python_version < '3.11'"]  # plots, Parquet, recipes
TEST = ["pytest>=8", "ruff", "mypy", "gguf", "pexpect", *COMPILE, *TRAIN]
REFERENCE = [
    "llama-cpp-python==0.3.36"
]  # the peer of `smolrun verify` and `smolrun bench --compare`; compiles C++ when installed

# training's truth and peer, in an environment of its own: `make train-test`
TRAIN_TEST = ["torch==2.13.0", "transformers>=5", "peft>=0.21"]

setup(
    name="smolrun",
    version="0.1.0",
    description="Run SmolLM2 on a CPU: quantised Numba kernels, bit-identical logits, checked against llama.cpp",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=["smolrun", "smolrun.kernels", *(f"smolrun.{name}" for name in find_packages("smolrun"))],
    package_dir={"smolrun": "smolrun", "smolrun.kernels": "kernels"},
    package_data={"smolrun": ["py.typed", "*.txt", "capi/*"], "smolrun.kernels": ["py.typed"]},
    install_requires=[
        "numpy>=2.0",
        "numba>=0.68",
        "safetensors>=0.6",
        "tokenizers>=0.21",
        "huggingface_hub>=1.0",
        "jinja2>=3.1",
        "click>=8.1",
    ],
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)],
    extras_require={
        "test": TEST,
        "train-test": TRAIN_TEST,
        "reference": REFERENCE,
        "compile": COMPILE,
        "plot": ["matplotlib>=3.8"],
        "train": TRAIN,
    },
    entry_points={"console_scripts": ["smolrun=smolrun.cli:main"]},
)
