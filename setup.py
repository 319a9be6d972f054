"""The packages of the wheel, and the folders beside them whose files it takes along; pyproject.toml has all else."""

from setuptools import find_namespace_packages, setup

SHIPPED = {  # as part of the package that reads them: folder
    "mmalign.assets": "assets",
    "mmalign.configs": "configs",
    "reward_models.assets": "assets",
}

setup(packages=[*find_namespace_packages(include=["mmalign*", "reward_models*"]), *SHIPPED], package_dir=SHIPPED)
