"""Package layout. `kernels/` on disk is `megavl.kernels` in Python: a public package is called `kernels`."""

from setuptools import find_packages, setup

kernels = [f"megavl.kernels.{name}" for name in find_packages("kernels")]
setup(
    packages=[*find_packages(include=["megavl", "megavl.*"]), "megavl.kernels", *kernels],
    package_dir={"megavl.kernels": "kernels"},
    package_data={"megavl.kernels": ["results/*"]},
)
