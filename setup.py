"""Build of rocr; the metadata is in pyproject.toml."""

from __future__ import annotations

from setuptools import setup

setup(
    # By hand: find_packages() would ship kernels/ as a package named "kernels".
    packages=["rocr", "rocr.cli", "rocr_kernels"],
    # kernels/ has no __init__.py: a root package named "kernels" would hide the one transformers imports.
    package_dir={"rocr": "rocr", "rocr.cli": "rocr/cli", "rocr_kernels": "kernels"},
    package_data={"rocr": ["py.typed", "data/*"]},
)
