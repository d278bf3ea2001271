"""What a run's `config.yaml` may call when the run is opened."""

from importlib.resources import files

import pytest
import yaml
from omegaconf import OmegaConf

from stagewise.recipes import sample
from stagewise.recipes.checkpoints import run_config

ATTACKS = {
    "numpy.load": {"file": "MARK", "allow_pickle": True},
    "torch.load": {"f": "MARK", "weights_only": False},
    "os.system": {"command": "touch MARK"},
    "builtins.eval": {"_args_": ["open('MARK', 'w')"]},
    "builtins.open": {"file": "MARK", "mode": "w"},
    "subprocess.run": {"args": ["touch", "MARK"], "_partial_": True},
    "hydra.utils.get_method": {"path": "os.system"},
    "hydra.utils.instantiate": {"config": {"_target_": "os.system", "command": "touch MARK"}},
    "functools.partial": {"_args_": ["touch MARK"]},
    "pathlib.Path.touch": {"_args_": ["MARK"]},
    # What a name in this package leads to, and what in it reads or writes files.
    "stagewise.recipes.photos.Path": {},
    "stagewise.files.os.system": {"command": "touch MARK"},
    "stagewise.tensor_files.write_tensors": {"path": "MARK", "tensors": {}, "about": {}},
    "stagewise.latents.make_latents": {"path": "MARK"},
    "stagewise.LatentBank.open": {"path": "MARK"},
    "stagewise.recipes.train.main": {},
    "stagewise.no.such.thing": {},
    "": {},
}


@pytest.fixture
def opened(tmp_path):
    """`opened(change)`: the configuration of a run whose file `change(config)` has changed."""

    def make(change, trust=()):
        config = {
            "data": {"_target_": "stagewise.recipes.photos.PhotoPatches", "seed": 0},
            "net": {"_target_": "stagewise.recipes.sit.SiT", "depth": 1},
            "objective": {"_target_": "stagewise.losses.FlowMatchingLoss"},
            "module": {"_target_": "stagewise.recipes.module.FlowMatchingModule"},
            "callbacks": {"own": {"_target_": "my.Callback"}, "dir": "${run_dir}"},
        }
        change(config)
        OmegaConf.save(config, tmp_path / "config.yaml")
        return run_config(tmp_path, trust)

    return make


@pytest.mark.parametrize("target", ATTACKS)
@pytest.mark.parametrize("place", ["whole", "argument", "list"])
def test_other_targets_are_refused_wherever_they_stand(opened, tmp_path, target, place):
    mark = tmp_path / "mark"
    attack = yaml.safe_load(yaml.safe_dump(ATTACKS[target]).replace("MARK", str(mark)))
    attack["_target_"] = target

    def change(config):
        if place == "whole":
            config["data"] = attack
        elif place == "argument":
            config["objective"]["timesteps"] = {"_target_": "stagewise.Shifted", "of": attack}
        else:
            config["net"]["extra"] = [1, [{"deep": [attack]}]]

    with pytest.raises(ValueError, match="which is no part of a recipe") as caught:
        opened(change)
    assert f"{tmp_path / 'config.yaml'} would call {target}" in str(caught.value)
    assert not mark.exists()


def test_no_reference_is_followed(opened):
    for text in (
        "${oc.env:HOME}",
        "a${net.depth}",
        "${oc.create:{_target_: os.system}}",
        r"\\${x}",
    ):
        with pytest.raises(
            ValueError, match=r"Expected values in .*config\.yaml, found references"
        ):
            opened(lambda config, text=text: config["data"].update(cache=text))


def test_the_line_to_paste_lets_it(opened):
    def change(config):
        config["net"] = {"_target_": "my.Net", "act": {"_target_": "torch.nn.GELU"}}

    with pytest.raises(ValueError, match="--trust") as caught:
        opened(change)
    trust = str(caught.value).split("--trust ")[1].split()
    assert trust == ["my.Net", "torch.nn.GELU"]
    options = sample.parse(["RUN", "--trust", *trust])
    assert opened(change, options.trust).net["_target_"] == "my.Net"
    with pytest.raises(ValueError, match=r"would call torch\.nn\.GELU, which"):
        opened(change, ["my.Net"])


def test_all_that_the_recipes_are_made_of_is_known(opened):
    """Also by a longer name, and what else says how x_t, times and weights are made."""
    conf = files("stagewise.recipes.conf")
    found = {
        "stagewise.CosinePath",
        "stagewise.paths.EDMPath",
        "stagewise.MinSNR",
        "stagewise.ddpm",
    }
    for group in ("data", "net", "objective"):
        for file in (conf / group).iterdir():
            if file.name.endswith(".yaml"):
                lines = [line.split("_target_: ") for line in file.read_text().splitlines()]
                found |= {line[1].strip() for line in lines if len(line) > 1}
    assert len(found) > 8
    parts = [{"_target_": target} for target in sorted(found)]
    assert opened(lambda config: config["data"].update(parts=parts)).data.parts == parts
