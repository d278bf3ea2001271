"""The four folders become one package, however it is installed.

The project is built and installed three ways (wheel, sdist and then wheel, editable), each into
an empty environment of its own, and imported there from an unrelated directory. Nothing is
fetched: a ``.pth`` file lends each environment the dependencies of the running one. Python reads
no ``.pth`` file of a directory that was itself added by one, so an editable install in the
running environment does not leak in; `test_install` would see it.
"""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "stagewise": "stagewise",
    "stagewise.losses": "losses",
    "stagewise.callbacks": "callbacks",
    "stagewise.recipes": "recipes",
}

# Runs inside each environment; the tests look at what it prints.
PROBE = """
import importlib, json, sys
from importlib.resources import files

from hydra import compose, initialize_config_module

sys.modules["lightning"] = None  # half of the time, and no folder needs it to be imported
modules = {name: importlib.import_module(name).__file__ for name in sys.argv[1:]}

def yamls(folder, prefix=""):
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from yamls(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name

with initialize_config_module("stagewise.recipes.conf", version_base="1.3"):
    config = compose("train")

print(json.dumps({
    "modules": modules,
    "typed": files("stagewise").joinpath("py.typed").is_file(),
    "yamls": sorted(yamls(files("stagewise.recipes"))),
    "config": sorted(map(str, config)),
}))
"""

# Imports everything in stagewise/ and prints which of the named packages came along.
FLOOR_ONE = """
import importlib, json, sys
modules, unwanted = map(json.loads, sys.argv[1:])
for name in modules:
    importlib.import_module(name)
print(json.dumps([name for name in unwanted if name in sys.modules]))
"""


def run(*command, cwd):
    """Output of a command, kept apart from the Python settings of the caller."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command[0]} failed\n{done.stdout}\n{done.stderr}"
    return done.stdout


def installed_files(root):
    """Where the files of the four folders of a checkout belong in an installation."""
    return {
        (Path(*package.split(".")) / path.relative_to(root / folder)).as_posix()
        for package, folder in FLOORS.items()
        for path in (root / folder).rglob("*")
        if path.is_file() and path.suffix not in {".md", ".pyc"}
    }


class Environment:
    """A virtual environment that is empty but for dependencies lent by the running one."""

    def __init__(self, folder):
        builder = venv.EnvBuilder(symlinks=os.name != "nt")
        builder.create(folder)
        context = builder.ensure_directories(folder)
        self.python = Path(context.env_exe)
        self.scripts = Path(context.bin_path)
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        self.site = Path(self.execute("import sysconfig; print(sysconfig.get_path('purelib'))"))
        lent = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (self.site / "lent.pth").write_text("\n".join(lent) + "\n")

    def execute(self, code, *arguments):
        """What a piece of Python prints here, in a directory far from the repository."""
        return run(self.python, "-I", "-c", code, *arguments, cwd=self.elsewhere).strip()

    def install(self, *what):
        """Install with the pip of the running environment, from local files alone."""
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet"]
        local = ["--no-index", "--no-deps", "--no-build-isolation"]
        # A stagewise among the lent packages would count as installed already.
        run(*pip, *local, "--ignore-installed", *what, cwd=self.elsewhere)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what git tracks or would track: no build touches the repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("the copy to build from is made with git, and this is no git checkout")
    copy = tmp_path_factory.mktemp("source")
    listed = run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # git lists a deleted file until the deletion is committed
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheels(source, tmp_path_factory):
    """`wheels(way)`: one built from the source, or from the sdist of the source; built once."""

    @cache
    def build(way):
        target, options = tmp_path_factory.mktemp(way), ["--wheel"] if way == "wheel" else []
        run(sys.executable, "-m", "build", "-n", *options, "-o", target, source, cwd=target)
        (built,) = target.glob("*.whl")
        return built

    return build


@pytest.mark.slow
@pytest.mark.parametrize("way", ["sdist", "editable"])  # both wheels hold the same, see below
def test_install(way, source, wheels, tmp_path):
    env = Environment(tmp_path / "env")
    found = "import importlib.util as u; print(u.find_spec('stagewise') is not None)"
    if env.execute(found) == "True":
        pytest.skip("the running environment holds a copy of stagewise and would lend it")
    if way == "editable":
        env.install("--editable", source)
        home = {package: source / folder for package, folder in FLOORS.items()}
    else:
        env.install(wheels(way))
        home = {package: env.site.joinpath(*package.split(".")) for package in FLOORS}

    seen = json.loads(env.execute(PROBE, *FLOORS).splitlines()[-1])

    for package, file in seen["modules"].items():
        assert Path(file).resolve() == (home[package] / "__init__.py").resolve()
    assert seen["typed"]
    recipes = source / "recipes"
    assert seen["yamls"] == sorted(
        path.relative_to(recipes).as_posix() for path in recipes.rglob("*.yaml")
    )
    assert seen["config"], "train.yaml composes to an empty config"
    assert list(env.scripts.glob("stagewise*")), "the command is missing"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["wheel", "sdist"])
def test_wheel_holds_every_file(way, source, wheels):
    with zipfile.ZipFile(wheels(way)) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == installed_files(source)


@pytest.mark.parametrize("folder", FLOORS.values())
def test_every_folder_is_a_package(folder):
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".yaml"}]
    assert files, f"{folder}/ is empty"
    bare = {path.parent for path in files if not (path.parent / "__init__.py").is_file()}
    assert not bare, f"These need an __init__.py: {sorted(bare)}"


@pytest.mark.slow
def test_floor_one_stands_alone():
    paths = [path.relative_to(ROOT) for path in (ROOT / "stagewise").rglob("*.py")]
    modules = sorted(".".join(path.with_suffix("").parts) for path in paths)
    modules = [name.removesuffix(".__init__") for name in modules if "__main__" not in name]
    unwanted = ["lightning", "pytorch_lightning", "hydra", "timm", "tensorboard", "matplotlib"]
    unwanted += [package for package in FLOORS if package != "stagewise"]
    arguments = [json.dumps(modules), json.dumps(unwanted)]
    seen = run(sys.executable, "-I", "-c", FLOOR_ONE, *arguments, cwd=ROOT)
    assert json.loads(seen.splitlines()[-1]) == []
