"""`stagewise encode`: pictures to latents, stopped and resumed, on one rank and on two."""

import errno
import json
import os
import re
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stagewise import files
from stagewise.latents import open_latents
from stagewise.recipes import encode as command
from stagewise.recipes import encode_writers, image_folder
from stagewise.recipes.autoencoder import decode, encode, find_vae, fingerprint, load_vae, to_pixels
from stagewise.recipes.image_folder import centre_crop, find_images

SIZE, ROWS = 16, 11


def save_vae(folder, seed=0):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
    )
    vae.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"))


def pixels(index, height=SIZE, width=SIZE):
    draws = np.random.default_rng(index)
    return draws.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes, whose names are not in the order they are made in; 5 and 6 pictures."""
    folder = tmp_path_factory.mktemp("images")
    for index, name in enumerate(["zebra"] * 6 + ["ant"] * 5):
        (folder / name).mkdir(exist_ok=True)
        Image.fromarray(pixels(index)).save(folder / name / f"{index:02d}.png")
    return folder


@pytest.fixture
def run(monkeypatch, vae):
    """`run(images, out, ...)`: the command in this process, on the CPU and without workers."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def call(images, out, *options):
        usual = ["--vae", vae, "--size", SIZE, "--num-workers", 0, "--batch-size", 3]
        usual += ["--device", "cpu", "--shard-size", 4]
        arguments = ["stagewise encode", images, out, *usual, *options]
        monkeypatch.setattr(sys, "argv", [str(value) for value in arguments])
        command.main()

    return call


def refused(run, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert isinstance(stop.value.code, str)
    return stop.value.code


def outcome(run, capsys, *arguments):
    """What a call printed, or how it was refused."""
    capsys.readouterr()
    try:
        run(*arguments)
    except SystemExit as stop:
        return str(stop.code)
    return capsys.readouterr().out


def by_hand(vae, images, low=-1.0, mirrored=False):
    """Moments of all pictures, one by one, in the order of the rows; and their labels."""
    model, rows, labels = load_vae(vae), [], []
    for label, name in enumerate(("ant", "zebra")):
        for file in sorted((images / name).iterdir()):
            x = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None]
            x = x / 255 if low == 0 else x / 127.5 - 1
            with torch.no_grad():
                rows.append(model.encode(x.flip(-1) if mirrored else x).latent_dist)
            labels.append(label)
    mean, std, logvar = (
        torch.cat([getattr(row, name) for row in rows]) for name in ("mean", "std", "logvar")
    )
    return mean, std, logvar, torch.tensor(labels)


def noise(index, seed, flip):
    draws = np.random.default_rng((seed, index, flip))
    return torch.from_numpy(draws.standard_normal((4, 8, 8), dtype=np.float32))


def shards(folder):
    held = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([part[name] for part in held]) for name in held[0]}


def content(folder):
    """What all files hold: the bytes, but for headers, whose order and names are by chance."""
    found = {}
    for file in folder.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            if file.suffix == ".safetensors":
                end = 8 + int.from_bytes(data[:8], "little")
                data = json.loads(data[8:end]), data[end:]
            elif file.suffix == ".pt":
                held = torch.load(file, weights_only=True)
                data = {name: value.tolist() for name, value in held.items()}
            found[str(file.relative_to(folder))] = data
    return found


def test_moments_and_pictures(vae):
    model = load_vae(vae, "cpu", torch.float64)
    bytes_ = torch.from_numpy(np.stack([pixels(at) for at in range(5)])).permute(0, 3, 1, 2)
    x = to_pixels(bytes_)
    assert torch.equal(x.min(), torch.tensor(-1.0))
    assert torch.equal(x.max(), torch.tensor(1.0))
    with torch.no_grad():
        posterior = model.encode(x.double()).latent_dist
        pictures = model.decode(posterior.mean).sample
    mean, std = encode(model, x)
    assert torch.equal(mean, posterior.mean)
    assert torch.equal(std, posterior.std)
    assert not mean.requires_grad
    for low in (-1.0, 0.0):
        wanted = ((pictures.float() - low) / (1 - low) * 255).clamp(0, 255)
        found = decode(model, posterior.mean, batch=2, low=low)
        assert found.dtype == torch.uint8
        # float64 by batches of 2 and of 5: a rounding of half a step, and no more.
        assert (found - wanted).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_pixels_come_back(low):
    class Identity:
        device, dtype = torch.device("cpu"), torch.float32

        def decode(self, z):
            return type("Output", (), {"sample": z})

    bytes_ = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(decode(Identity(), to_pixels(bytes_, low), low=low), bytes_)


def test_lightningdit(run, vae, images, tmp_path, capsys):
    out = tmp_path / "out"
    run(images, out, "--seed", 5)
    held = shards(out)
    for name, flip in (("latents", 0), ("latents_flip", 1)):
        mean, std, _, labels = by_hand(vae, images, mirrored=bool(flip))
        eps = torch.stack([noise(index, 5, flip) for index in range(ROWS)])
        torch.testing.assert_close(held[name], mean + std * eps, rtol=1e-5, atol=1e-5)
    assert torch.equal(held["labels"], labels)
    assert [len(load_file(file)["labels"]) for file in sorted(out.glob("*.safetensors"))] == [
        4,
        4,
        3,
    ]
    stats = torch.load(out / "latents_stats.pt", weights_only=True)
    torch.testing.assert_close(stats["std"], held["latents"].std([0, 2, 3], keepdim=True))
    assert json.loads((out / "classes.json").read_text()) == ["ant", "zebra"]
    latents = open_latents(out)
    assert latents.has_flips
    latents.verify(full=True)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"{ROWS} rows of (4, 8, 8) float32 for LightningDiT, 2 classes: {out}. "
        f"Next: stagewise profile {out}"
    )


def test_batches_do_not_matter(run, images, tmp_path):
    run(images, tmp_path / "one")
    run(images, tmp_path / "other", "--batch-size", 7, "--shard-size", 100, "--num-workers", 2)
    ours, theirs = shards(tmp_path / "one"), shards(tmp_path / "other")
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-5)
    run(images, tmp_path / "seed", "--seed", 1)
    assert (shards(tmp_path / "seed")["latents"] - ours["latents"]).abs().mean() > 0.1


def test_no_flips_and_types(run, images, tmp_path):
    run(images, tmp_path / "out", "--no-flips", "--dtype", "bfloat16")
    held = shards(tmp_path / "out")
    assert held["latents"].dtype == torch.bfloat16
    assert torch.equal(held["latents"], held["latents_flip"])


@pytest.mark.parametrize("kind", ["repa", "edm2"])
def test_mean_and_std(run, vae, images, tmp_path, kind, capsys):
    out = tmp_path / "out"
    run(images, out, "--format", kind)
    mean, std, _, labels = by_hand(vae, images, low=0.0 if kind == "edm2" else -1.0)
    place = out / "vae-sd" if kind == "repa" else out
    rows = [np.load(place / f"00000/img-mean-std-{row:08d}.npy") for row in range(ROWS)]
    wanted = torch.cat([mean, std], dim=1)
    torch.testing.assert_close(torch.from_numpy(np.stack(rows)), wanted, rtol=1e-5, atol=1e-5)
    latents = open_latents(out, kind)
    assert torch.equal(latents.labels, labels)
    said = capsys.readouterr().out
    assert said.strip().endswith(f"stagewise profile {out} --format {kind}")
    # Latents of this autoencoder are not of the scale of Stable Diffusion's.
    assert ("Note: Expected latents of standard deviation about 1" in said) == (kind == "repa")


def test_mar(run, vae, images, tmp_path):
    out = tmp_path / "out"
    run(images, out, "--format", "mar")
    files = [*sorted((images / "ant").iterdir()), *sorted((images / "zebra").iterdir())]
    for key, mirrored in (("moments", False), ("moments_flip", True)):
        mean, _, logvar, labels = by_hand(vae, images, mirrored=mirrored)
        rows = [np.load(out / f.parent.name / f"{f.name}.npz")[key] for f in files]
        wanted = torch.cat([mean, logvar], dim=1)
        torch.testing.assert_close(torch.from_numpy(np.stack(rows)), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(open_latents(out).labels, labels)


def test_centre_crop():
    small = pixels(0, 8, 12)
    large = Image.fromarray(np.kron(small, np.ones((4, 4, 1), dtype=np.uint8)))
    # Twice halved, blocks of 4 x 4 equal pixels are the small picture; its middle is kept.
    assert np.array_equal(np.array(centre_crop(large, 8)), small[:, 2:10])
    tall = Image.fromarray(small.transpose(1, 0, 2))
    assert np.array_equal(np.array(centre_crop(tall, 8)), small.transpose(1, 0, 2)[2:10])
    # 12 x 15 is not halved for 8: bicubic at once, to 8 x 10; of it the outer columns go.
    picture = Image.fromarray(pixels(1, 12, 15))
    wanted = np.array(picture.resize((10, 8), Image.Resampling.BICUBIC))[:, 1:9]
    assert np.array_equal(np.array(centre_crop(picture, 8)), wanted)


@pytest.mark.parametrize("kind", ["lightningdit", "repa", "mar"])
def test_resume(run, images, tmp_path, kind, monkeypatch):
    """A disk that is full in the second block; then the rest, and not a picture twice."""
    options = ("--format", kind)
    run(images, tmp_path / "whole", *options)
    out = tmp_path / "out"
    blocks = 0

    def full(close):
        def closed(self, number):
            nonlocal blocks
            blocks += 1
            if blocks == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            close(self, number)

        return closed

    kinds = encode_writers.WRITERS[kind]
    with monkeypatch.context() as patch:
        patch.setattr(kinds, "close", full(kinds.close))
        said = refused(run, images, out, *options)
    assert "No space left on device. 4 of 11 pictures are written." in said
    assert "--resume" in said
    kept = content(out)
    assert not [name for name in kept if name.endswith(".partial")]
    assert "holds 4 of 11 pictures of rank 0 already" in refused(run, images, out, *options)

    # What a process that was killed while it wrote has left, the day before yesterday.
    litter = out / ".latents_rank00_shard001.safetensors.01234567.partial"
    litter.write_text("half")
    os.utime(litter, (0, 0))
    files._swept.clear()  # as in a new process: this one may have listed the folder a moment ago
    seen = []
    crop = image_folder.centre_crop
    monkeypatch.setattr(image_folder, "centre_crop", lambda *a: seen.append(a) or crop(*a))
    run(images, out, *options, "--resume")
    assert len(seen) == ROWS - 4
    assert content(out) == content(tmp_path / "whole")
    assert all(content(out)[name] == kept[name] for name in kept if name.endswith("s"))


def test_a_shard_that_cannot_be_written(run, images, tmp_path, monkeypatch):
    def full(file, held, about):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("stagewise.latents.lightningdit.write_tensors", full)
    said = refused(run, images, tmp_path / "out")
    assert "No space left on device. 0 of 11 pictures are written" in said
    assert not [name for name in content(tmp_path / "out") if "shard" in name]


def test_what_was_converted_and_left_out_is_told(run, images, tmp_path, capsys):
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    shutil.copytree(images, pictures)
    wide = pixels(30)[..., 0].astype(np.uint16) * 257
    Image.fromarray(wide).save(pictures / "ant" / "06.png")
    Image.fromarray(np.dstack([pixels(1), pixels(2)[..., 0]])).save(pictures / "ant" / "07.png")
    frames = [Image.fromarray(pixels(number)) for number in range(3)]
    frames[0].save(pictures / "zebra" / "a.gif", save_all=True, append_images=frames)
    for name in ("labels.csv", ".hidden", "zebra/b.GIF", "zebra/ending"):
        (pictures / name).write_text("")
    run(pictures, out, "--shard-size", 1)
    said = capsys.readouterr().out
    assert "Note: 16 bits to 8: 1 picture, such as ant/06.png (encode.json)." in said
    assert "Note: transparent parts on white: 1 picture, such as ant/07.png (" in said
    assert (
        "Note: left out, since their endings are not those of pictures: 2 .gif (zebra/a.gif), "
        "1 .csv (labels.csv), 1 without an ending (zebra/ending)." in said
    )
    assert json.loads((out / "encode.json").read_text())["converted"] == {
        "16 bits to 8": {"count": 1, "names": ["ant/06.png"]},
        "transparent parts on white": {"count": 1, "names": ["ant/07.png"]},
    }
    # The latents are those of the right 8 bits.
    Image.fromarray(pixels(30)[..., 0]).save(pictures / "ant" / "06.png")
    run(pictures, tmp_path / "other", "--shard-size", 1)
    name = "latents_rank00_shard001.safetensors"
    assert torch.equal(
        load_file(out / name)["latents"], load_file(tmp_path / "other" / name)["latents"]
    )


def test_the_order_is_that_of_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    for name in (
        "b/2.png",
        "b/10.JPG",
        "a/x/1.png",
        "a/x-y/1.png",
        "a/x.png",
        "a/X/3.webp",
        "C/1.bmp",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(0)).save(tmp_path / name)
    theirs, ours = ImageFolder(str(tmp_path)), find_images(tmp_path)
    assert [
        (str(tmp_path / file), label) for file, label in zip(ours.files, ours.labels, strict=True)
    ] == (theirs.samples)
    assert ours.classes == theirs.classes


@pytest.mark.skipif(os.name != "posix", reason="rights of files")
@pytest.mark.parametrize("kind", ["lightningdit", "edm2", "mar"])
def test_files_have_the_rights_that_the_mask_gives(run, images, tmp_path, kind):
    before = os.umask(0o027)
    try:
        run(images, tmp_path / "out", "--format", kind)
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) > 5
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {"0o640"}


def test_complete_is_left_alone(run, images, tmp_path, capsys):
    run(images, tmp_path / "out", "--resume")
    before = content(tmp_path / "out")
    capsys.readouterr()
    run(images, tmp_path / "out", "--resume")
    assert capsys.readouterr().out == f"{tmp_path / 'out'} is complete already.\n"
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["lightningdit", "edm2", "mar"])
def test_resume_compares_what_is_written(run, images, tmp_path, kind, capsys):
    """Of each file a bit flipped, half of it, and none: it is written again, or named."""
    out, options = tmp_path / "out", ("--format", kind, "--resume", "--shard-size", 6)
    run(images, out, *options)
    whole, again, named = content(out), 0, 0
    latents = sorted(out.rglob("*.np[yz]"))
    files = [file for file in out.iterdir() if file.is_file()] + latents[::5]
    for number, file in enumerate(files):
        data = file.read_bytes()
        flipped = bytearray(data)
        flipped[number * 37 % len(data)] ^= 4
        for spoilt in (flipped, data[: len(data) // 2], None):
            file.write_bytes(spoilt) if spoilt is not None else file.unlink()
            said = outcome(run, capsys, images, out, *options)
            again += "are encoded again" in said
            if said.startswith("stagewise encode: "):
                assert str(file) in said or f"no {file.name}" in said
                named += 1
                file.write_bytes(data)
            assert content(out) == whole
    assert again >= 3
    assert named >= 3


def test_resume_compares_pictures(run, images, tmp_path, capsys):
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    shutil.copytree(images, pictures)
    run(pictures, out)
    before = content(out)
    # Copied, with other times: the same pictures.
    shutil.copy(images / "ant" / "07.png", pictures / "ant" / "07.png")
    run(pictures, out, "--resume")
    assert "is complete already" in capsys.readouterr().out
    # Another of the same name, size and time of writing.
    file = pictures / "ant" / "06.png"
    data, about = bytearray(file.read_bytes()), file.stat()
    at = data.index(b"IDAT") + 20
    data[at] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    shard = out / "latents_rank00_shard000.safetensors"
    for _ in range(2):
        said = refused(run, pictures, out, "--resume")
        assert f"{file} has changed since it was encoded. Put the old picture back, or" in said
        assert f"delete {shard}: then --resume encodes the 4 pictures of its block again." in said
        assert content(out) == before
    file.write_bytes(images.joinpath("ant", "06.png").read_bytes())
    run(pictures, out, "--resume")
    Image.fromarray(pixels(99)).save(file)
    shard.unlink()
    run(pictures, out, "--resume")
    run(pictures, tmp_path / "whole")
    assert (
        f"{shard} is missing or damaged: 4 pictures are encoded again." in capsys.readouterr().out
    )
    assert content(out) == content(tmp_path / "whole")
    assert content(out) != before


@pytest.mark.parametrize("kind", ["lightningdit", "repa", "mar"])
def test_pictures_that_cannot_be_read_any_more(run, images, tmp_path, kind):
    """No row of theirs stays when their block is encoded again; and back, when they are mended."""
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    shutil.copytree(images, pictures)
    options = ("--format", kind, "--skip-broken", "--resume")
    run(pictures, out, *options)
    before, file = content(out), pictures / "ant" / "07.png"
    data = file.read_bytes()
    for spoilt, rows in ((b"no picture", ROWS - 1), (data, ROWS)):
        file.write_bytes(spoilt)
        said = refused(run, pictures, out, *options)
        os.remove(re.search(r"delete (\S+): then", said)[1])
        run(pictures, out, *options)
        assert len(open_latents(out, kind)) == rows
    after = content(out)
    notes = [name for name in after if name.startswith("encode_rank00")]
    assert all(after[name] == before[name] for name in after.keys() - notes)


def test_a_block_keeps_its_number_while_none_of_its_pictures_can_be_read(run, images, tmp_path):
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    shutil.copytree(images, pictures)
    run(pictures, out)
    before = shards(out)
    (out / "latents_rank00_shard001.safetensors").unlink()
    data = {
        file: file.read_bytes()
        for name in find_images(pictures).files[4:8]
        for file in [pictures / name]
    }
    for file in data:
        file.write_bytes(b"no picture")
    for _ in range(2):
        said = refused(run, pictures, out, "--skip-broken", "--resume")
        assert f"as one block can be read, the first is {next(iter(data))}. Put them back" in said
    for file in data:
        file.write_bytes(data[file])
    run(pictures, out, "--skip-broken", "--resume")
    after = shards(out)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--size", 32], "size (16 there, 32 here)"),
        (["--seed", 3], "seed (0 there, 3 here)"),
        (["--dtype", "float16"], "dtype (float32 there, float16 here)"),
        (["--precision", "bfloat16"], "precision (float32 there, bfloat16 here)"),
        (["--format", "mar"], "format (lightningdit there, mar here)"),
        (["--no-flips"], "flips (True there, False here)"),
    ],
)
def test_resume_with_other_settings(run, images, tmp_path, options, named):
    settings_of(run, images, tmp_path / "x")
    (tmp_path / "x" / "encode.json").rename(tmp_path / "encode.json")
    said = refused(run, images, tmp_path, "--resume", *options)
    assert said == (
        f"stagewise encode: {tmp_path} holds latents that were made with other "
        f"settings: {named}. Use the same settings, or choose another folder."
    )


def settings_of(run, images, out):
    run(images, out)
    return json.loads((out / "encode.json").read_text())["settings"]


def test_resume_with_another_vae_or_list(run, images, vae, tmp_path, monkeypatch):
    settings = settings_of(run, images, tmp_path / "x")
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(tmp_path / "x" / "encode.json", out)
    # The same weights elsewhere are the same autoencoder.
    run(images, out, "--vae", save_vae(tmp_path / "same"), "--resume")
    assert torch.equal(shards(out)["latents"], shards(tmp_path / "x")["latents"])

    shutil.copy(tmp_path / "x" / "encode.json", out)
    (out / "encode_rank00.json").unlink()
    other = save_vae(tmp_path / "other", seed=1)
    said = refused(run, images, out, "--vae", other, "--resume")
    assert f"vae ({vae} there, {other} here), vae_weights ({settings['vae_weights']} there" in said
    one = tmp_path / "one"
    (one / "ant").mkdir(parents=True)
    Image.fromarray(pixels(0)).save(one / "ant" / "a.png")
    assert "images (11 there, 1 here), image_list (" in refused(run, one, out, "--resume")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "settings: ranks (1 there, 2 here)" in refused(run, images, out, "--resume")


def spoil(folder, images):
    """A copy of the pictures with one that is cut short, one of text, and a last one that is."""
    for file in images.rglob("*.png"):
        target = folder / file.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    cut = folder / "ant" / "07.png"
    cut.write_bytes(cut.read_bytes()[:100])
    (folder / "ant" / "09.png").write_text("no picture")
    (folder / "zebra" / "99.png").write_text("no picture")


def test_broken_pictures(run, images, tmp_path, monkeypatch, capsys):
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    spoil(pictures, images)
    said = refused(run, pictures, out, "--shard-size", 1)
    assert f"{pictures / 'ant' / '07.png'} cannot be read (" in said
    assert "--skip-broken" in said
    # Blocks of one picture: three of them have no rows, and the first was written before.
    run(pictures, out, "--shard-size", 1, "--resume", "--skip-broken")
    about = json.loads((out / "encode.json").read_text())
    assert list(about["skipped"]) == ["ant/07.png", "ant/09.png", "zebra/99.png"]
    assert about["skipped"]["ant/09.png"].startswith("UnidentifiedImageError: cannot identify")
    assert about["rows"] == ROWS - 2
    assert f"without 3 pictures (encode.json): {out}" in capsys.readouterr().out
    latents = open_latents(out)
    assert latents.labels.tolist() == [0] * 3 + [1] * 6

    run(images, tmp_path / "whole")
    kept = [0, 2, 4, 5, 6, 7, 8, 9, 10]
    whole = shards(tmp_path / "whole")["latents"][kept]
    torch.testing.assert_close(shards(out)["latents"], whole, rtol=1e-5, atol=1e-5)
    # Moments are kept by the number of the picture, and all are listed.
    run(pictures, tmp_path / "repa", "--format", "repa", "--skip-broken")
    assert open_latents(tmp_path / "repa", "repa").labels.tolist() == [0] * 3 + [1] * 6


def test_all_are_broken(run, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    said = refused(run, tmp_path, tmp_path.parent / "out_broken", "--skip-broken")
    assert "None of the pictures" in said


@pytest.mark.parametrize("kind", ["lightningdit", "edm2"])
def test_two_ranks(run, images, tmp_path, kind, monkeypatch, capsys):
    """One after the other, as in an array of jobs: whoever is last writes the statistics."""
    run(images, tmp_path / "one", "--format", kind)
    out = tmp_path / "two"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        capsys.readouterr()
        run(images, out, "--format", kind)
        assert (out / "latents_stats.pt").exists() == (rank == 0 and kind == "lightningdit")
        if rank == 1:
            assert "Rank 1 of 2 is done. The rank that finishes last" in capsys.readouterr().out
    one, two = open_latents(tmp_path / "one", kind), open_latents(out, kind)
    assert torch.equal(one.labels, two.labels)
    if kind == "edm2":
        torch.testing.assert_close(one.rows(0, ROWS), two.rows(0, ROWS), rtol=1e-5, atol=1e-5)
        return
    ours, theirs = shards(tmp_path / "one"), shards(out)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-5)
    assert json.loads((out / "encode.json").read_text())["rows"] == ROWS


def test_folders(run, images, tmp_path, capsys):
    flat, out = tmp_path / "flat", tmp_path / "out"
    assert "no such folder" in refused(run, flat, out)
    flat.mkdir()
    (flat / "notes.txt").write_text("no picture")
    assert "Expected images (.jpg, .jpeg" in refused(run, flat, out)
    for index in range(3):
        Image.fromarray(pixels(index, 20, 30)).convert("L").save(flat / f"{index}.png")
    run(flat, out, "--batch-size", 2)
    assert "has no class folders: all 3 pictures are class 0." in capsys.readouterr().out
    assert open_latents(out).labels.tolist() == [0, 0, 0]
    assert find_images(flat).classes == ["0"]

    (flat / "class").mkdir()
    assert "got both: 1 folders, such as class, and 3 images, such as 0.png" in refused(
        run, flat, out
    )
    for file in flat.glob("*.png"):
        file.unlink()
    assert "Expected images in every class folder" in refused(run, flat, out)
    (flat / "dataset.json").write_text("{}")
    assert "its folders are no classes" in refused(run, flat, out)


def test_bad_input(run, images, tmp_path, vae, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(command, "load_vae", lambda *_: pytest.fail("loaded"))
    assert "Expected --size divisible by 2, the factor of" in refused(
        run, images, out, "--size", 17
    )
    assert "Expected --batch-size of at least 1" in refused(run, images, out, "--batch-size", 0)
    assert "Expected --dtype float32 or float16 for mar" in refused(
        run, images, out, "--format", "mar", "--dtype", "bfloat16"
    )
    assert "it would be taken for a class" in refused(run, images, images / "out")
    assert "no such path" in refused(run, images, out, "--vae", "./nowhere")
    assert "Expected --device cpu, cuda" in refused(run, images, out, "--device", "tape")
    assert not out.exists()
    out.mkdir()
    (out / "other.safetensors").write_text("")
    assert "Expected a new or empty folder, got" in refused(run, images, out)
    monkeypatch.setenv("WORLD_SIZE", "12")
    assert "Expected at least as many pictures as ranks, got 11 and 12" in refused(run, images, out)
    monkeypatch.setenv("RANK", "12")
    assert "Expected RANK in 0 to 11 (WORLD_SIZE), got 12" in refused(run, images, out)


def test_without_diffusers(run, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install 'stagewise[vae]'" in refused(run, images, tmp_path / "out")


def test_autoencoders(vae, tmp_path):
    inside = tmp_path / "pipeline" / "vae"
    found = find_vae(save_vae(inside).removesuffix("/vae"))
    assert (found.subfolder, found.channels, found.factor) == ("vae", 4, 2)
    assert fingerprint(load_vae(tmp_path / "pipeline")) == fingerprint(load_vae(vae))
    with pytest.raises(ValueError, match="in its subfolder vae"):
        find_vae(tmp_path)

    weights = inside / "diffusion_pytorch_model.safetensors"
    held = load_file(weights)
    del held["quant_conv.weight"]
    save_file(held, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="got none for 1, the first quant_conv.weight"):
        load_vae(inside)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="The weights of .* cannot be read"):
        load_vae(inside)
    config = json.loads((inside / "config.json").read_text())
    (inside / "config.json").write_text(json.dumps(config | {"_class_name": "VQModel"}))
    with pytest.raises(ValueError, match=re.escape(f"AutoencoderKL in {inside}, got VQModel")):
        find_vae(inside)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")
def test_the_hub_gives_no_answer(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="vae: .*cannot find the requested files in the local"):
        find_vae("nobody/no-such-autoencoder")


def test_latents_that_are_not_finite(run, images, tmp_path, vae, monkeypatch):
    def overflow(model, x):
        mean, std = encode(model, x)
        mean[1, 0, 0, 0] = float("inf")
        return mean, std

    monkeypatch.setattr(command, "encode", overflow)
    said = refused(run, images, tmp_path / "out", "--precision", "bfloat16")
    assert "NaN or Inf for ant/07.png in torch.bfloat16. Use --precision float32." in said


MANY = ("--num-workers", 2, "--shard-size", 20, "--resume")


@pytest.mark.slow
def test_killed_and_on_two_ranks(run, forked, tmp_path, capfd):
    """A process that is killed among its shards, and two ranks at once, against a whole run."""
    images = tmp_path / "images"
    for index in range(200):
        name = images / f"{index % 4}"
        name.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(index, 40, 50)).save(name / f"{index:03d}.png")
    whole, out, two = (tmp_path / name for name in ("whole", "out", "two"))
    run(images, whole, *MANY)
    assert capfd.readouterr().out.strip().endswith(f"stagewise profile {whole}")

    process = forked(run, images, out, *MANY)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert 2 <= len(list(out.glob("*.safetensors"))) < 10
    assert not (out / "latents_stats.pt").exists()
    run(images, out, *MANY)
    assert capfd.readouterr().out.strip().endswith(f"stagewise profile {out}")
    assert content(out) == content(whole)

    ranks = [
        forked(run, images, two, *MANY, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2") for rank in "01"
    ]
    for process in ranks:
        process.join(180)
    said = capfd.readouterr().out
    assert [process.exitcode for process in ranks] == [0, 0], said
    assert f"stagewise profile {two}" in said
    ours, theirs = shards(whole), shards(two)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-5)
    open_latents(two).verify(full=True)
