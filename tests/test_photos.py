import copy

import numpy as np
import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from stagewise.recipes import photos
from stagewise.recipes.photos import PhotoPatches, photographs


@pytest.fixture(scope="module")
def data():
    data = PhotoPatches(train_size=3000, held_out_size=300)
    data.setup()
    return data


def positions(data, split):
    data.setup()
    return data.positions[split]


def coverage(data, split):
    """Which pixels of each photograph the patches of a split contain."""
    masks = [np.zeros(image.shape[:2], bool) for image in photographs().values()]
    for photo, row, column in positions(data, split):
        masks[photo][row : row + data.patch, column : column + data.patch] = True
    return masks


def test_photographs_are_colour_images_in_a_stable_order():
    images = photographs()
    assert tuple(images) == tuple(photographs()) == PhotoPatches().class_names
    for image in images.values():
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert (image[..., 0] != image[..., 2]).mean() > 0.5


@pytest.mark.parametrize("options", [{}, {"patch": 7, "block": 40, "seed": 3}, {"block": 16}])
def test_no_held_out_pixel_is_trained_on(options):
    data = PhotoPatches(train_size=2000, held_out_size=200, **options)
    for train, held_out in zip(coverage(data, "train"), coverage(data, "held_out"), strict=True):
        assert train.any()
        assert held_out.any()
        assert not (train & held_out).any()


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_items_are_the_pixels_at_their_positions(data, split):
    x_1, labels = getattr(data, split).tensors
    assert x_1.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert x_1.shape[1:] == data.shape
    assert x_1.min() >= -1
    assert x_1.max() <= 1
    images = list(photographs().values())
    for i in range(0, len(x_1), 97):
        photo, row, column = positions(data, split)[i]
        assert photo == labels[i]
        pixels = images[photo][row : row + 16, column : column + 16].transpose(2, 0, 1)
        np.testing.assert_allclose(x_1[i].numpy(), pixels / 127.5 - 1, atol=1e-6)


def test_positions_are_distinct_and_shared_equally(data):
    for split, size in (("train", 3000), ("held_out", 300)):
        places = positions(data, split)
        assert places.shape == (size, 3)
        assert len(np.unique(places, axis=0)) == size
        counts = np.bincount(places[:, 0], minlength=len(data.class_names))
        assert counts.max() - counts.min() <= 1


def test_every_patch_has_the_contrast_asked_for(data):
    x_1 = data.train.tensors[0].double()
    contrast = x_1.flatten(2).std(-1, correction=0).mean(-1)
    assert contrast.min() >= data.min_contrast - 1e-6
    flat = PhotoPatches(train_size=3000, held_out_size=300, min_contrast=0)
    flat.setup()
    assert flat.train.tensors[0].flatten(2).std(-1).mean(-1).min() < data.min_contrast


def test_seed_decides_and_sizes_leave_the_regions_alone(data):
    again = PhotoPatches(train_size=3000, held_out_size=300)
    other = PhotoPatches(train_size=3000, held_out_size=300, seed=1)
    larger = PhotoPatches(train_size=6000, held_out_size=600)
    assert np.array_equal(positions(again, "train"), positions(data, "train"))
    assert not np.array_equal(positions(other, "train"), positions(data, "train"))
    pairs = zip(coverage(larger, "train"), coverage(data, "held_out"), strict=True)
    assert not any((train & held_out).any() for train, held_out in pairs)


def test_global_generators_are_left_alone():
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    data = PhotoPatches(train_size=300, held_out_size=140)
    data.setup()
    list(data.train_dataloader())
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], before_numpy)


def test_loaders(data):
    batches = list(data.train_dataloader())
    assert [len(x) for x, _ in batches] == [128] * (3000 // 128)
    assert len(batches[0][1].unique()) > 1  # shuffled: the data set itself is sorted by label
    assert sum(len(x) for x, _ in data.val_dataloader()) == 300


def test_order_depends_on_seed_and_epoch_only():
    cut = [PhotoPatches(train_size=300, held_out_size=140, seed=seed) for seed in (0, 1)]
    for data in cut:
        data.setup()

    def order(epoch, seed=0, before=0):
        loader = copy.copy(cut[seed]).train_dataloader()
        for _ in range(before):
            list(loader)
        loader.sampler.set_epoch(epoch)
        # Two batches of 128; what does not fill one is left to another epoch.
        assert len(set(loader.sampler)) == len(list(loader.sampler)) == len(loader.sampler) == 256
        return list(loader.sampler)

    assert order(3) == order(3, before=2)
    assert order(3) != order(4)
    assert order(3) != order(3, seed=1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"patch": 65}, "`patch` of at most `block`"),
        ({"patch": 0}, "`patch` of at least 1"),
        ({"train_size": 0}, "`train_size` of at least 1"),
        ({"held_out_share": 1.0}, r"`held_out_share` in \(0, 1\)"),
        ({"min_contrast": -1}, "`min_contrast` of at least 0"),
    ],
)
def test_arguments_are_validated(options, match):
    with pytest.raises(ValueError, match=match):
        PhotoPatches(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"train_size": 10**7}, "Asked for .* train patches of 'astronaut', which has"),
        ({"held_out_size": 10**6}, "Asked for .* held_out patches of 'astronaut', which has"),
        ({"block": 2000}, "at least 2 tiles"),
        ({"patch": 400, "block": 400}, "at least 2 tiles"),
        ({"min_contrast": 2}, "at least 2 tiles"),
    ],
)
def test_asking_for_too_much(options, match):
    with pytest.raises(ValueError, match=match):
        PhotoPatches(**options).setup()


def test_a_missing_wheel_is_named(monkeypatch):
    monkeypatch.setattr(photos, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-image"):
        photographs()


def test_a_missing_file_is_named(monkeypatch):
    monkeypatch.setitem(photos._FILES, "china", ("sklearn", "scikit-learn", "no/such.jpg"))
    with pytest.raises(FileNotFoundError, match="scikit-learn does not contain it"):
        photographs()
