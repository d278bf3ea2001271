"""What is found in a batch, and what is told of the rest."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stagewise.batches import find_sample, read_checked, unused_in

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([3, 0, 1, 3])
HOT = F.one_hot(Y, 5)
FRACTIONS = torch.tensor([0.5, 1.0, 2.0, 3.0])
WORDS = ["cat", "dog", "cat", "owl"]


@pytest.mark.parametrize(
    "labels",
    [Y[:, None], Y.float(), Y.double()[:, None], Y.bfloat16(), Y.to(torch.uint8), Y.int()[:, None]],
    ids=lambda labels: f"{labels.dtype}{tuple(labels.shape)}",
)
def test_whole_numbers_are_labels(labels):
    for batch in ((X, labels), {"image": X, "label": labels}, [labels, X]):
        x1, found = find_sample(batch)
        assert x1 is X
        assert found.dtype == torch.int64
        assert torch.equal(found, Y)
        assert unused_in(batch, x1, found) == []
    assert torch.equal(read_checked(lambda batch: batch, (X, labels))[1], Y)


def test_booleans_are_labels_where_they_are_named_so():
    yes = Y > 0
    for found in (
        find_sample({"image": X, "y": yes})[1],
        read_checked(lambda batch: batch, (X, yes))[1],
    ):
        assert found.tolist() == [1, 0, 1, 1]
        assert found.dtype == torch.int64
    # By its place alone it may be a mask.
    assert find_sample((X, yes))[1] is None
    (line,) = unused_in((X, yes), X, None)
    assert "batch[1], bool tensor (4,), is not used" in line
    assert "read_batch=lambda batch: (batch[0], batch[1])" in line


def test_integers_go_before_weights_and_masks():
    batch = (X, torch.ones(4), Y, Y > 0)
    x1, labels = find_sample(batch)
    assert torch.equal(labels, Y)
    first, second = unused_in(batch, x1, labels)
    assert "batch[1], float32 tensor (4,), is not used" in first
    assert "batch[3], bool tensor (4,), is not used" in second
    assert "read_batch=" not in first + second, "there are labels"


@pytest.mark.parametrize(
    ("value", "cure"),
    [
        (HOT, "batch[1].argmax(1)"),
        (HOT.float(), "batch[1].argmax(1)"),
        (HOT.bool(), "batch[1].int().argmax(1)"),
        (FRACTIONS, "batch[1].round()"),
        (FRACTIONS[:, None], "batch[1].round()"),
        (torch.full((4,), torch.inf), "batch[1].round()"),
        (WORDS, "torch.tensor([CLASSES.index(name) for name in batch[1]])"),
        (Y.tolist(), "torch.as_tensor(batch[1])"),
        (Y.numpy(), "torch.as_tensor(batch[1])"),
        ({"y": Y}, "batch[1]['y']"),
    ],
)
def test_labels_that_cannot_be_used_are_named_with_a_cure(value, cure):
    batch = (X, value)
    x1, labels = find_sample(batch)
    assert x1 is X
    assert labels is None
    (line,) = unused_in(batch, x1, labels)
    assert "batch[1]" in line
    assert f"read_batch=lambda batch: (batch[0], {cure})." in line
    if "round" in cure and not torch.isfinite(value).all():
        return
    find = eval(f"lambda batch: (batch[0], {cure})", {"torch": torch, "CLASSES": sorted(WORDS)})
    x1, labels = read_checked(find, batch)
    assert labels.dtype == torch.int64
    if "round" not in cure and "CLASSES" not in cure:
        assert torch.equal(labels, Y)
        assert unused_in(batch, x1, labels) == [], "it is used now"


def test_conditions_are_named_with_their_shapes():
    batch = {
        "image": X,
        "label": Y,
        "text": torch.randn(4, 7, 16),
        "second": X + 1,
        "tokens": torch.zeros(4, 7, dtype=torch.int64),
        "scale": torch.tensor(0.5),
        "other": torch.randn(5, 2),
        "observation": {"pose": np.zeros((4, 6))},
    }
    x1, labels = find_sample(batch)
    lines = unused_in(batch, x1, labels)
    starts = (
        "batch['text'], float32 tensor (4, 7, 16), is not used.",
        "batch['second'], float32 tensor (4, 3, 8, 8), is not used.",
        "batch['tokens'], int64 tensor (4, 7), is not used.",
        "batch['observation']['pose'], ndarray, is not used.",
    )
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * 4


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        ((X, Y, torch.arange(4)), "batch[1], batch[2]"),
        ((X, Y, Y[:, None] + 1), "batch[1], batch[2]"),
        ([torch.arange(4), Y.float(), X, Y], "batch[0], batch[3]"),
        ((X, Y.float(), Y.float() + 1), "batch[1], batch[2]"),
        ({"x": X, "class": Y + 1, "y": Y}, "batch['y'], batch['class']"),
    ],
)
def test_labels_that_differ_are_refused(batch, names):
    with pytest.raises(ValueError, match="found 2 that differ") as error:
        find_sample(batch)
    message = str(error.value)
    assert f"differ, {names}, in " in message
    cure = message.split("read_batch=")[1].split(", or ")[0]
    labels = read_checked(eval(cure), batch)[1]
    assert labels is not None


def test_labels_given_twice_are_labels():
    for batch in ((X, Y, Y.clone()), {"x": X, "y": Y, "label": Y[:, None]}):
        assert torch.equal(find_sample(batch)[1], Y)
        assert unused_in(batch, X, Y) == []


def test_a_single_column_is_a_sample_only_where_nothing_else_is():
    column = torch.tensor([[0.5], [0.25], [2.0], [1.0]])
    assert find_sample(column)[0] is column
    assert find_sample((column, Y))[0] is column
    x1, labels = find_sample((column, Y.float()[:, None]))
    assert x1 is column
    assert torch.equal(labels, Y)
    x1, labels = find_sample((column, X))
    assert x1 is X
    assert labels is None
    with pytest.raises(ValueError, match="found 2 in"):
        find_sample((column, column + 0.1))


@pytest.mark.parametrize("labels", [HOT, FRACTIONS, FRACTIONS[:, None], WORDS, Y[:3], X])
def test_find_must_give_whole_labels(labels):
    with pytest.raises(ValueError, match=r"integers of shape \(B,\), got .*argmax"):
        read_checked(lambda batch: batch, (X, labels))
