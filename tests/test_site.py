"""The pages of the site: their code runs, their links resolve, the reference misses no name."""

import ast
import importlib
import inspect
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import matplotlib
import pytest
import torch
from hydra import compose, initialize_config_module

from stagewise.callbacks.monitor import MonitorOptions
from stagewise.callbacks.stage_callback import RunOptions
from stagewise.recipes import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PUBLIC = ("", ".callbacks", ".losses", ".engines", ".latents", ".sampling")

# Pages whose code needs data of its own have a test of their own.
ELSEWHERE = {
    "attention.md": "test_attention.py",
    "conventions.md": "test_conventions.py",
    "engines.md": "test_docs.py",
    "latents.md": "test_latents.py",
    "steering.md": "test_docs.py",
    "watching.md": "test_docs.py",
}

# Tutorials with less training than on the site, as all of their cells run with it too.
SHORTER = {
    "your-own-run.md": {
        "mkdtemp()), 1000": "mkdtemp()), 30",
        "every_n_steps=100": "every_n_steps=15",
    },
    "two-moons-trained.md": {"steps=3000": "steps=30", "every_n_steps=1000": "every_n_steps=15"},
    "photographs.md": {"STEPS = 800": "STEPS = 20", "every_n_steps=100": "every_n_steps=10"},
}


def blocks_of(page, *kinds):
    """The blocks of a page that have one of these words behind their first fence."""
    fences = re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [code for kind, code in fences if kind in (kinds or ("python",))]


def name(page):
    return str(page.relative_to(DOCS))


PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "generated" not in page.parts]
RUN = [
    pytest.param(page, marks=pytest.mark.slow if page.stem == "small-sets" else (), id=name(page))
    for page in PAGES
    if blocks_of(page) and name(page) not in ELSEWHERE
]
TUTORIALS = [page for page in PAGES if "{code-cell}" in page.read_text()]


class Network(torch.nn.Module):
    """A network of samples of four by four by four numbers."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, xt, t, y=None):
        return self.layer(xt)


@pytest.fixture
def names(page):
    """What every page may take for granted: data, a model, a loader, a batch with its noise."""
    torch.manual_seed(0)
    rows = 40 if page.stem == "small-sets" else 160  # that page fits a smoothing
    latents, labels = torch.randn(rows, 4, 4, 4), torch.arange(rows) % 4
    data, model = torch.utils.data.TensorDataset(latents, labels), Network()
    x1, x0, t = latents[:32], torch.randn(32, 4, 4, 4), torch.rand(32)
    return {
        **{"L": L, "torch": torch, "latents": latents, "labels": labels, "model": model},
        **{"loader": torch.utils.data.DataLoader(data, 32), "self": SimpleNamespace(net=model)},
        **{"x1": x1, "x0": x0, "t": t, "y": labels[:32]},
        "xt": t[:, None, None, None] * x1 + (1 - t[:, None, None, None]) * x0,
        "optimizer": torch.optim.Adam(model.parameters()),
    }


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize("page", RUN)
def test_code_of_a_page(page, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = len(names)
    for block in blocks_of(page):
        exec(compile(block, name(page), "exec"), names)
    assert len(names) > before


def test_pages_with_a_test_of_their_own_have_one():
    for page, file in ELSEWHERE.items():
        assert f"docs/{page}" in (ROOT / "tests" / file).read_text(), page
        assert blocks_of(DOCS / page), page


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=name)
def test_cells_of_a_tutorial(page, tmp_path, monkeypatch):
    from matplotlib import pyplot

    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    cells, space = blocks_of(page, "{code-cell} python"), {}
    assert page.read_text().count("{code-cell}") == len(cells) > 0
    shorter = SHORTER.get(page.name, {})
    assert all("".join(cells).count(number) == 1 for number in shorter)
    for cell in cells:
        code = re.sub(r"^:\w+:.*$", "", cell, flags=re.MULTILINE)  # its tags
        for number, fewer in shorter.items():
            code = code.replace(number, fewer)
        exec(compile(code, name(page), "exec"), space)
    assert pyplot.get_fignums(), "a tutorial shows what it is about"
    pyplot.close("all")


def commands():
    """Every command line that the documentation shows, with the page it stands on."""
    for page in (*PAGES, ROOT / "README.md"):
        for block in blocks_of(page, "", "bash", "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"torchrun .* -m stagewise\.recipes\.", "stagewise ", line)
                if line.startswith(("stagewise ", "make ")):
                    yield page, shlex.split(line.replace("...", "X"), comments=True)


def test_commands_take_what_pages_give_them():
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    seen = set()
    with initialize_config_module("stagewise.recipes.conf", version_base="1.3"):
        for _, words in commands():
            match words:
                case ["make", target, *_]:
                    assert f"make {target} " in listed
                case ["stagewise", "train", *rest]:
                    swept = [word.split(",")[0] for word in rest if word != "-m"]
                    assert "trainer" in compose("train", overrides=swept)
                case ["stagewise", "completion", *_]:
                    assert "completion" in cli._COMMANDS
                case ["stagewise", command, *rest]:
                    parser = importlib.import_module(
                        f"stagewise.recipes.{command.replace('-', '_')}"
                    ).parser()
                    assert parser.parse_args(rest)
            seen.add(" ".join(words[:2]))
    assert {"make demo", "stagewise train", "stagewise report", "stagewise encode"} <= seen


def test_the_reference_has_every_public_name_once():
    text = "\n".join(page.read_text() for page in DOCS.glob("reference/*.md"))
    listed = re.findall(r"^(?: +|\.\. (?:auto|py:)\w+:: )(\w+)$", text, re.MULTILINE)
    for part in PUBLIC:
        package = importlib.import_module("stagewise" + part)
        for public in package.__all__:
            assert listed.count(public) == 1, f"{package.__name__}.{public}"


def keywords_of(thing):
    """The names that a class or function takes; of `**options` those of the typed dicts."""
    names = set()
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            names.add(parameter.name)
        elif "Unpack" in str(parameter.annotation):
            names |= set(MonitorOptions.__annotations__) | set(RunOptions.__annotations__)
    return names


def test_pages_name_what_there_is():
    """`Oracle.correction` and `StageRun(read_batch=...)`, in the text of pages, do exist."""
    public = {}
    for part in PUBLIC:
        package = importlib.import_module("stagewise" + part)
        public |= {name: getattr(package, name) for name in package.__all__}
    looked_at = 0
    for page in (*PAGES, ROOT / "README.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`([A-Z]\w+[.(][^`]+)`", text):
            try:
                tree = ast.parse(code.replace("...", "None"), mode="eval").body
            except SyntaxError:
                continue
            given = [k.arg for k in tree.keywords if k.arg] if isinstance(tree, ast.Call) else []
            thing = tree.func if isinstance(tree, ast.Call) else tree
            if isinstance(thing, ast.Attribute) and isinstance(thing.value, ast.Name):
                owner = public.get(thing.value.id)
                if owner is None:
                    continue
                fields = getattr(owner, "__annotations__", {})
                assert hasattr(owner, thing.attr) or thing.attr in fields, f"{page}: {code}"
                made = getattr(owner, thing.attr, None)
            elif isinstance(thing, ast.Name):
                made = public.get(thing.id)
            else:
                continue
            looked_at += 1
            if made is not None and given:
                assert set(given) <= keywords_of(made), f"{page}: {code}"
    assert looked_at > 50


def test_results_open_with_numbers_of_their_tables():
    opening, tables = (DOCS / "results.md").read_text().split("## How to read the tables")
    cells = re.findall(r"\d[\d.]* (?:±|\[)[ \d.,]+\]?", opening)
    assert len(cells) > 20
    for cell in cells:
        assert re.search(rf"\| {re.escape(cell.strip(' ,'))} \|", tables), cell


def test_every_page_is_in_a_menu():
    menus = blocks_of(DOCS / "index.md", "{toctree}")
    entries = {re.sub(r".*<(.*)>", r"\1", line) for menu in menus for line in menu.splitlines()}
    for page in PAGES:
        entry = name(page).removesuffix(".md")
        assert entries & {entry, f"{Path(entry).parent}/*"} or entry == "index", entry


def test_links_of_pages_lead_to_files():
    """What GitHub shows; the site's own links, with their anchors, are checked by `make docs`."""
    seen = 0
    for page in (*PAGES, ROOT / "README.md"):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not link.startswith(("http", "#")):
                seen += 1
                assert (page.parent / link.split("#")[0]).exists(), f"{page}: {link}"
    assert seen > 50


def test_the_link_check_names_what_is_broken(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    links = importlib.import_module("links")
    (tmp_path / "b.html").write_text('<p id="here"></p>')
    good = '<a href="b.html#here">x</a><a href="#top">x</a><a href="https://a.b/c">x</a>'
    (tmp_path / "a.html").write_text(f'<p id="top"></p>{good}')
    assert links.broken(tmp_path) == []
    bad = ['href="c.html"', 'href="b.html#there"', 'href="#nowhere"']
    fetched = '<script src="https://a.b/c.js"></script><link rel="stylesheet" href="//a.b/c.css">'
    (tmp_path / "a.html").write_text("".join(f"<a {link}>x</a>" for link in bad) + fetched)
    wrong = links.broken(tmp_path)
    assert len(wrong) == 5
    assert all(link[6:-1] in line for link, line in zip(bad, wrong, strict=False))
    assert sum("network" in line for line in wrong) == 2
