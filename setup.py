"""Map the four folders at the top of the repository onto one package.

Everything else about the project is in ``pyproject.toml``; only the list of packages is
computed here, so that a new sub-package is installed without being declared anywhere.
"""

from setuptools import find_packages, setup

FLOORS = {
    "stagewise": "stagewise",
    "stagewise.losses": "losses",
    "stagewise.callbacks": "callbacks",
    "stagewise.recipes": "recipes",
}

setup(
    package_dir=FLOORS,
    packages=[
        package
        for floor, folder in FLOORS.items()
        for package in (floor, *(f"{floor}.{name}" for name in find_packages(folder)))
    ],
)
