"""Checkpoints of a run: which is found, which weights, and what is refused."""

import os
import re
from pathlib import Path
from random import Random

import pytest
import torch
from omegaconf import OmegaConf

from stagewise.recipes.checkpoints import (
    find_checkpoint,
    load_module,
    load_weights,
    newest_whole,
    run_config,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, train_tiny):
    """A run of three steps with averaged weights."""
    return train_tiny(tmp_path_factory.mktemp("run"))


@pytest.fixture
def stored(run):
    """What is in its checkpoint, free to be changed, and the path."""
    path = run / "checkpoints/last.ckpt"
    return torch.load(path, weights_only=True), path


@pytest.fixture
def altered(stored, tmp_path):
    """`altered(change)`: the path of a checkpoint that `change(checkpoint)` has changed."""

    def make(change):
        checkpoint, _ = stored
        change(checkpoint)
        path = tmp_path / "altered.ckpt"
        torch.save(checkpoint, path)
        return path

    return make


def has_weights(module, state):
    own = module.state_dict()
    assert own.keys() == state.keys()
    return all(torch.equal(own[key], state[key]) for key in own)


def test_averaged_weights_are_taken_if_there_are_any(run, stored):
    checkpoint, path = stored
    config = run_config(run)
    for weights, key in (
        (None, "state_dict"),
        ("averaged", "state_dict"),
        ("current", "current_model_state"),
    ):
        module, loaded = load_module(config, find_checkpoint(run), weights)
        assert not module.training
        assert has_weights(module, checkpoint[key])
        assert loaded.path == path
        assert loaded.step == 3
        assert loaded.weights == (weights or "averaged")
        assert str(loaded) == f"last.ckpt, step 3, {loaded.weights} weights"
    assert not has_weights(module, checkpoint["state_dict"])


def test_the_average_is_that_of_the_callback(run, stored):
    # What `state_dict` is, is Lightning's to change: the last of three steps with decay 1/2 moves
    # the average half of the way to the current weights.
    checkpoint, _ = stored
    key = "net.final_layer.linear.weight"
    averaged, current = (checkpoint[name][key] for name in ("state_dict", "current_model_state"))
    # That layer starts at zero, and steps of a constant rate go one way at first.
    assert 0 < averaged.norm() < current.norm()


def test_other_weights_have_another_fingerprint(run):
    config, path = run_config(run), find_checkpoint(run)
    one, again, other = (
        load_module(config, path, weights)[1].fingerprint
        for weights in ("averaged", "averaged", "current")
    )
    assert one == again != other


def test_a_run_without_average(run, altered):
    def change(checkpoint):
        checkpoint["state_dict"] = checkpoint.pop("current_model_state")
        del checkpoint["averaging_state"]

    path = altered(change)
    module, loaded = load_module(run_config(run), path)
    assert loaded.weights == "current"
    assert loaded.note == ""
    with pytest.raises(ValueError, match="no averaged weights .* no callback averaged"):
        load_weights(path, module, "averaged")
    with pytest.raises(ValueError, match='`weights` "averaged" or "current", got \'ema\''):
        load_weights(path, module, "ema")


def test_an_average_that_had_not_begun_is_not_taken(run, altered):
    # Until then Lightning stores the untrained network as the average.
    path = altered(lambda checkpoint: checkpoint["averaging_state"]["n_averaged"].zero_())
    module, loaded = load_module(run_config(run), path)
    assert (loaded.weights, loaded.note) == ("current", "the average had not begun")
    assert has_weights(module, torch.load(path, weights_only=True)["current_model_state"])
    with pytest.raises(ValueError, match="its average had not begun"):
        load_weights(path, module, "averaged")


def test_current_weights_that_are_the_averaged_ones_are_named(run, altered):
    path = altered(lambda c: c.update(current_model_state=c["state_dict"]))
    loaded = load_module(run_config(run), path, "current")[1]
    assert "equal the averaged ones" in str(loaded)


def test_a_checkpoint_of_another_model_is_refused(run, altered):
    def change(checkpoint):
        state = checkpoint["state_dict"]
        state["net.final_layer.linear.weight"] = torch.zeros(5, 7)
        state["net.extra"] = state.pop("net.blocks.0.norm1.bias", torch.zeros(1))
        del state["net.y_embedder.weight"]

    path = altered(change)
    module = load_module(run_config(run), find_checkpoint(run), "current")[0]
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ValueError, match="another model") as caught:
        load_weights(path, module)
    message = str(caught.value)
    assert re.search(r"net\.y_embedder\.weight: \(.*\), got no such entry\n", message)
    assert re.search(r"net\.extra: no such entry, got \(.*\)\n", message)
    shape = tuple(before["net.final_layer.linear.weight"].shape)
    assert f"net.final_layer.linear.weight: {shape}, got (5, 7)\n" in message
    assert has_weights(module, before)


def test_files_that_are_no_checkpoints_are_refused(run, tmp_path):
    module = load_module(run_config(run), find_checkpoint(run))[0]
    for content, text in (
        ({"weights": torch.zeros(1)}, "with `state_dict`"),
        ([torch.zeros(1)], "with `state_dict`"),
    ):
        torch.save(content, tmp_path / "other.ckpt")
        with pytest.raises(ValueError, match=text):
            load_weights(tmp_path / "other.ckpt", module)
    whole = find_checkpoint(run).read_bytes()
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2]):
        (tmp_path / "broken.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.ckpt is no whole checkpoint"):
            load_weights(tmp_path / "broken.ckpt", module)
    torch.save({"state_dict": {}, "object": os.system}, tmp_path / "code.ckpt")
    with pytest.raises(ValueError, match="checkpoint of tensors and plain values"):
        load_weights(tmp_path / "code.ckpt", module)


def test_an_old_format_that_cannot_be_mapped_is_read(run, stored, tmp_path):
    checkpoint, _ = stored
    torch.save(checkpoint, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    module, loaded = load_module(run_config(run), tmp_path / "old.ckpt")
    assert loaded.step == 3
    assert has_weights(module, checkpoint["state_dict"])


@pytest.fixture
def checkpoints(tmp_path):
    """`checkpoints(a=3, b=5)`: the folder of a run, with small checkpoints of these steps."""
    folder = tmp_path / "checkpoints"

    def make(**steps):
        folder.mkdir(exist_ok=True)
        for age, (name, step) in enumerate(steps.items()):
            path = folder / f"{name}.ckpt"
            torch.save({"state_dict": {"w": torch.arange(9.0)}, "global_step": step}, path)
            os.utime(path, (1000 - age, 1000 - age))
        return folder

    return make


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_which_checkpoint_is_found(tmp_path, checkpoints):
    with pytest.raises(ValueError, match=r"Expected a checkpoint .* found none"):
        find_checkpoint(tmp_path)
    folder = checkpoints(last=5, first=5, new=10, old=3)
    # Written first, then killed before last.ckpt was.
    assert find_checkpoint(tmp_path).name == "new.ckpt"
    (folder / "new.ckpt").unlink()
    assert find_checkpoint(tmp_path).name == "last.ckpt", "the later of one step"
    assert find_checkpoint(tmp_path, Path("old.ckpt")) == folder / "old.ckpt"
    assert find_checkpoint(tmp_path, folder / "old.ckpt") == folder / "old.ckpt"
    with pytest.raises(ValueError, match=r"no checkpoint epoch=7\.ckpt.*: last\.ckpt, first\.ckpt"):
        find_checkpoint(tmp_path, Path("epoch=7.ckpt"))
    (folder / "old.ckpt").write_bytes(b"half")
    assert find_checkpoint(tmp_path).name == "old.ckpt", "which loading then names"
    (folder / "old.ckpt").unlink()
    (folder / "sharded.ckpt").mkdir()
    for given in (None, Path("sharded.ckpt")):
        with pytest.raises(ValueError, match="folder .*sharded.*consolidate"):
            find_checkpoint(tmp_path, given)


def test_the_newest_whole_checkpoint(checkpoints):
    folder = checkpoints(last=5, new=10, old=3)
    assert newest_whole(folder) == (folder / "new.ckpt", [])
    # A number within a tensor, which loading alone does not notice.
    flip(folder / "new.ckpt", (folder / "new.ckpt").read_bytes().index(torch.arange(9.0).numpy()))
    with pytest.raises(ValueError, match=r"new\.ckpt is damaged: \S*data/0 in it does not match"):
        load_weights(folder / "new.ckpt", torch.nn.Linear(1, 1))
    path, faults = newest_whole(folder)
    assert path == folder / "last.ckpt"
    assert [fault.split(" ")[0] for fault in faults] == [str(folder / "new.ckpt")]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    path, faults = newest_whole(folder)
    assert path == folder / "old.ckpt"
    assert "last.ckpt" in faults[0]
    assert "new.ckpt" in faults[1]
    path.unlink()
    assert newest_whole(folder)[0] is None
    assert newest_whole(folder.parent) == (None, [])


def test_a_flipped_bit_is_named_or_changes_nothing(checkpoints):
    folder = checkpoints(last=5)
    path = folder / "last.ckpt"
    whole, random, named = path.read_bytes(), Random(0), 0
    for place in random.sample(range(len(whole)), 200):
        path.write_bytes(whole)
        flip(path, place)
        found, faults = newest_whole(folder)
        if found is None:
            assert faults[0].startswith(str(path))
            named += 1
        else:  # in a date, or between the parts
            content = torch.load(path, weights_only=True)
            assert content["global_step"] == 5
            assert torch.equal(content["state_dict"]["w"], torch.arange(9.0))
    assert named > 100


def test_folders_that_are_no_runs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        run_config(tmp_path / "none")
    with pytest.raises(ValueError, match=r"Expected config\.yaml"):
        run_config(tmp_path)
    file = tmp_path / "config.yaml"
    for text, match in (
        ("data: 1\nnet: 2\n", "missing: objective, module"),
        ("- 1\n", "cannot be read as a configuration: it has no keys"),
        ("a: [", "cannot be read as a configuration"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=match):
            run_config(tmp_path)
    OmegaConf.save({"data": 1, "net": 2, "objective": 3, "module": 4}, file)
    assert run_config(tmp_path).module == 4
