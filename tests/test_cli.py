"""The command line as a stranger meets it: what is wrong is said in a line, what was meant too."""

import importlib
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from stagewise.recipes import cli, overrides
from stagewise.recipes.run_files import runs_in


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs `stagewise` in this process, in an empty folder: exit code and all that it prints."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["stagewise", *map(str, arguments)])
        said, code = "", 0
        try:
            cli.main()
        except SystemExit as end:
            said, code = (end.code, 1) if isinstance(end.code, str) else ("", end.code)
        printed = capsys.readouterr()
        return code, f"{printed.out}{printed.err}{said}"

    return call


def test_usage_and_version(run):
    for argument in ([], ["--help"]):
        code, text = run(*argument)
        assert code == 0
        assert all(f"\n  {name} " in text for name in cli._COMMANDS)
    assert run("--version") == (0, f"stagewise {version('stagewise')}\n")


PHOTOS = "train callbacks=plain"
WRONG = [
    ("trian", "no command 'trian'. Did you mean train"),
    # an option, a choice, a value
    ("sample --cfgscale 3 RUN", "unrecognized .*Did you mean --cfg-scale"),
    ("sample --method eulr RUN", "invalid choice: 'eulr'.* Did you mean euler?"),
    ("sample --count many RUN", "--count: invalid int value: 'many'"),
    ("profile --formt x y", "Did you mean --format"),
    ("profile --format lightningdt y", "Did you mean lightningdit"),
    ("make-latents x --rows 0", "at least 1 row"),
    ("encode x y", "required: --vae"),
    ("completion fish", "Expected no arguments"),
    # settings of train
    ("train --experiment photos", "no option --experiment; .*key=value. Did you mean experiment"),
    ("train engine=exactt", "no engine=exactt. Did you mean exact. There are: auto, exact"),
    ("train engine=coarse", "Coarse was removed. Use engine=exact"),
    ("train scheme=leave_one_out", "LeaveOneOut was removed, .* Use scheme=two_stage"),
    ("train data.path=a/data.x", "moved to the latents. Use data.latents.path=a/data.x"),
    ("train enigne=auto", "no key enigne .*Did you mean engine"),
    ("train data.trainsize=3", r"no key data.trainsize .*Did you mean data.train_size\? \+key"),
    ("train callbacks.monitor.evry=3", "Did you mean callbacks.monitor.every_n_steps"),
    ("train max_steps=4", "Did you mean trainer.max_steps"),
    ("train 'name=a (b)'", "spaces or signs twice"),
    ("train -sc install=bash", re.escape('eval "$(stagewise completion)"')),
    (f"{PHOTOS} seed=abc", "Expected a number for seed, such as 0, got 'abc'"),
    (f"{PHOTOS} trainer.max_steps=abc", "number for trainer.max_steps"),
    (f"{PHOTOS} +trainer.foo=3", "trainer: .*unexpected keyword argument 'foo'"),
    (f"{PHOTOS} trainer.accelerator=nope", "invalid accelerator name"),
    # a path that is missing, a file that cannot be read
    (f"{PHOTOS} weights=none.pt", "no file of weights none.pt"),
    (f"{PHOTOS} weights=junk.ckpt", "junk.ckpt is no whole checkpoint"),
    (f"{PHOTOS} ckpt_path=none.ckpt", "no checkpoint none.ckpt"),
    ("train experiment=imagenet256_sdvae_sit_s", "Expected data.latents.path=..."),
    ("train experiment=imagenet256_sdvae_sit_s data.latents.path=none", "got none: no such path"),
    ("sample none", "no folder none"),
    ("sample run", "cannot be read as a configuration"),
    ("report none", "no folder none"),
    ("report run", "No stages.jsonl in run"),
    ("profile none", "no such path"),
    *((f"profile junk.{kind}", f"junk.{kind}") for kind in ("safetensors", "npy", "npz", "pt")),
    ("make-latents junk.npy/x --rows 9", "junk.npy/x"),
    ("encode none out --vae x", "got none: no such folder"),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line for line, _ in WRONG])
def test_what_is_wrong_is_said_in_a_line(run, tmp_path, line, message):
    (tmp_path / "run").mkdir()
    kinds = ("ckpt", "safetensors", "npy", "npz", "pt")
    for name in ("run/config.yaml", *(f"junk.{kind}" for kind in kinds)):
        (tmp_path / name).write_bytes(b"{\x00 not what the name says")
    arguments = [part.strip("'") for part in re.findall(r"'[^']*'|\S+", line)]
    code, said = run(*arguments)
    assert code in (1, 2)
    assert re.search(message, said, re.S), said
    assert "Traceback" not in said
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize(
    ("command", "work", "arguments"),
    [
        ("sample", "run", ["RUN"]),
        ("profile", "run", ["x"]),
        ("encode", "run", ["a", "b", "--vae", "c"]),
        ("report", "runs_in", ["x"]),
        ("make-latents", "make_latents", ["x"]),
        ("train", "train", ["callbacks=plain"]),
    ],
)
@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "stagewise {}: stopped"),
        (ModuleNotFoundError("No module named 'diffusers'"), 1, "stagewise {}: No module named"),
        (PermissionError(13, "Permission denied", "a b"), 1, "Permission denied: 'a b'"),
    ],
    ids=["Ctrl-C", "package", "permission"],
)
def test_no_traceback_from_any_command(
    run, monkeypatch, command, work, arguments, raised, code, said
):
    def fail(*_, **__):
        raise raised

    module = importlib.import_module(f"stagewise.recipes.{command.replace('-', '_')}")
    monkeypatch.setattr(module, work, fail)
    found, text = run(command, *arguments)
    assert found == code
    assert said.format(command) in text


@pytest.mark.slow
def test_a_training_whose_folder_is_named_writes_nowhere_else(run, tmp_path, monkeypatch):
    module = importlib.import_module("stagewise.recipes.train")
    monkeypatch.setattr(module, "train", lambda config: Path(config.run_dir).mkdir(exist_ok=True))
    monkeypatch.chdir(tmp_path)
    assert run("train", "callbacks=plain", "run_dir=runs/a")[0] in (0, None)
    assert {path.name for path in tmp_path.rglob("*")} <= {"runs", "a", "train.log"}
    # Told otherwise, or not at all, Hydra's folder is where it was.
    assert run("train", "callbacks=plain", "run_dir=b", "hydra.run.dir=c")[0] in (0, None)
    assert (tmp_path / "c" / ".hydra").is_dir()
    assert run("train", "callbacks=plain")[0] in (0, None)
    assert next((tmp_path / "outputs").glob("*/*/.hydra"))


def test_a_traceback_is_there_for_who_asks(run, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    for line in ("sample none", "train callbacks=plain seed=abc"):
        with pytest.raises(ValueError, match="no folder none|number for seed"):
            run(*line.split())


def test_what_replaced_a_choice_is_a_choice():
    for said in overrides._GONE.values():
        group, choice = re.search(r"(engine|scheme)=(\w+)", said).groups()
        assert (files(overrides._CONF) / group / f"{choice}.yaml").is_file()


def test_the_tab_key_as_bash_asks(run, tmp_path):
    code, script = run("completion")
    assert code == 0
    lines = {
        "stagewise s": ["sample"],
        "stagewise sample --cfg-i": ["--cfg-interval"],
        "stagewise sample --method eu": ["euler"],
        "stagewise profile --format li": ["lightningdit"],
        "stagewise profile --format=li": ["lightningdit"],
        "stagewise report my": ["my runs"],
        "stagewise report --output=my": ["my runs"],
        "stagewise train data.latents.path=./m": ["./my runs"],
        # from Hydra; bash has parted words at "="
        "stagewise train engine=": ["auto", "exact", "nearest", "sharded"],
        "stagewise train engine=exact data.ba": ["data.batch_size="],
    }
    (tmp_path / "my runs").mkdir()
    asks = "".join(
        f"COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}\n"
        f"COMP_WORDS=({line.replace('=', ' = ')}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))\n"
        "_stagewise; (IFS='|'; echo \"${COMPREPLY[*]}\")\n"
        for line in lines
    )
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{asks}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout.splitlines() == ["|".join(words) for words in lines.values()]
    assert not done.stderr


def test_a_folder_of_runs_is_reported_run_by_run(run, tmp_path):
    line = '{"event": "transition", "step": 3, "message": "seen", "kind": "x"}\n'
    for file in ("runs/a b/stages/stages.jsonl", "runs/c/errors/stages.jsonl"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(line)
    (tmp_path / "runs/c/config.yaml").write_text("name: c")
    (tmp_path / "runs/c/deep/er").mkdir(parents=True)
    (tmp_path / "runs/c/deep/er/stages.jsonl").write_text(line)
    runs = Path("runs")
    assert set(runs_in(runs)) == {runs / "a b", runs / "c"}
    assert runs_in(runs / "a b") == [runs / "a b"]
    assert runs_in(runs / "a b/stages") == [runs / "a b/stages"]
    code, said = run("report", "runs", "--title", "x")
    assert code == 1
    assert "Expected one run with --output or --title, got:" in said
    assert "'runs/a b'" in said
    (tmp_path / "runs/a b/stages/stages.jsonl").write_text("{}\n")
    code, said = run("report", "runs")
    assert code == 1
    assert "runs holds 2 runs" in said
    assert "1 of 2 have no page:\n  runs/a b: No event" in said
    assert (tmp_path / "runs/c/report.html").is_file()
