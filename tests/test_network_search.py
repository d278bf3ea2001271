"""Which module is the network, and why none is: what else a training step may call."""

import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from stagewise import DIFFUSERS, Convention, CosinePath, LinearPath
from stagewise.adapters import assumed_makers, find_target_makers
from stagewise.adapters.answers import tensor_of
from stagewise.adapters.network_search import NetworkSearch
from stagewise.adapters.reasons import GIVEN
from stagewise.losses import FlowMatchingLoss

SHAPE, CLASSES = (3, 2, 2), 5


class Net(nn.Module):
    """Any order of arguments, with or without labels and text."""

    def __init__(self, size=12):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(size, size)
        self.embed = nn.Embedding(CLASSES, size)

    def forward(self, x, t, y=None, text=None):
        h = self.inner(x.flatten(1)) * (1 + t.reshape(-1, 1))
        if y is not None:
            h = h + self.embed(y.reshape(len(h), -1)[:, 0].long())
        if text is not None:
            h = h + text.reshape(len(h), -1).mean(1, keepdim=True)
        return h.reshape(x.shape)


class Model(nn.Module):
    def __init__(self, **objective):
        super().__init__()
        self.net, self.loss = Net(), FlowMatchingLoss(**objective)


def data(n=64, scale=2.0, offset=1.0, seed=1):
    draws = torch.Generator().manual_seed(seed)
    x1 = scale * torch.randn(n, *SHAPE, generator=draws) + offset
    return x1, torch.randint(CLASSES, (n,), generator=draws)


def search(
    model,
    step,
    batch=None,
    candidates=None,
    *,
    makers=None,
    labels=True,
    batch_of_all=None,
    **options,
):
    x1, y = batch or data()
    found = NetworkSearch(
        model,
        find_target_makers(model) if makers is None else makers,
        candidates or (lambda: [("batch[0]", x1)]),
        y if labels else None,
        batch=batch_of_all,
        **options,
    )
    torch.manual_seed(2)
    step(x1, y)
    found.stop()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    return found


def queries(n=7, seed=3):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(n, *SHAPE, generator=draws), torch.rand(n, generator=draws)


def factor_in(message):
    """The factor by which a message says that x_1, or what encodes it, is multiplied."""
    found = re.match(r"training (?:scales x_1 by (?:about )?|encodes x_1: )(-?[\d.e-]+)", message)
    return float(found[1].rstrip("."))


def pasted(message):
    """The function that a message shows."""
    line = message.split("velocity=")[1].splitlines()[0].split("; or")[0]
    return eval(line, {"torch": torch, "nn": nn})


# -- what is no time ------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [1, 2])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize("first", [True, False])
def test_one_or_two_classes(kinds, dtype, first):
    """Standard normal data: with 0 for a time, x_1 itself has the noise that x_t should have."""

    class Labelled(Net):
        def forward(self, y, x, t):
            return super().forward(x, t, y)

    class Guided(nn.Module):
        def forward(self, y, x):
            return x + 0 * y.reshape(-1, 1, 1, 1)

    model = Model()
    model.net, model.before = Labelled() if first else Net(), Guided()
    model.before.weight = nn.Parameter(torch.zeros(()))
    x1, y = data(scale=1.0, offset=0.0)
    y = y % kinds

    def step(x1, y):
        model.before(y.to(dtype), x1 + model.before.weight)
        call = (lambda xt, t: model.net(y.to(dtype), xt, t)) if first else model.net
        return model.loss(call, x1, *([] if first else [y.to(dtype)]))

    network = search(model, step, (x1, y)).result()
    assert (network.name, network.conditional, network.conditions) == ("net", True, ())
    xt, t = queries()
    asked = torch.arange(7) % kinds
    args = (asked.to(dtype), xt, t) if first else (xt, t, asked.to(dtype))
    torch.testing.assert_close(network(xt, t, asked), model.net(*args).detach())


@pytest.mark.parametrize("mask", ["zeros", "ones", "bool", "integer", "labels"])
def test_a_module_that_prepares_the_data_is_not_the_network(mask):
    class Prepare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x, mask):
            return x + self.weight * mask.reshape(-1, 1, 1, 1)

    model = Model()
    model.a_first = Prepare()
    model.net = Net()
    x1, y = data(scale=1.0, offset=0.0)
    masks = {
        "zeros": torch.zeros(64),
        "ones": torch.ones(64),
        "bool": torch.zeros(64, dtype=torch.bool),
        "integer": torch.arange(64) % 2,
        "labels": y.float(),
    }

    def step(x1, y):
        return model.loss(model.net, model.a_first(x1, masks[mask]), y)

    assert search(model, step, (x1, y)).result().name == "net"


def test_standard_normal_data_with_a_time_are_not_noisy_data():
    """x_0 of (x_1, t) is x_1 itself on the linear path: normal, but not independent."""

    class Weigher(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x, t):
            return x.mean() * t.mean() * self.weight

    model = Model()
    model.a_first = Weigher()
    x1, y = data(scale=1.0, offset=0.0)

    def step(x1, y):
        t = torch.rand(len(x1))
        weight = model.a_first(x1, t) + model.a_first(x1 + 0.01 * torch.randn_like(x1), 0.01 * t)
        return weight + model.loss(model.net, x1, y, t=t)

    assert search(model, step, (x1, y)).result().name == "net"


def test_integers_are_times_where_the_convention_counts_in_units():
    model = Model(convention=DIFFUSERS)

    def step(x1, y):
        steps = torch.randint(1, 1000, (len(x1),))
        t = 1 - steps / 1000
        return model.loss(lambda xt, time: model.net(xt, steps, y), x1, t=t)

    network = search(model, step).result()
    xt, t = queries()
    v = network(xt, t, torch.zeros(7).long())
    times = (1000 * (1 - t)).round().to(torch.int64)
    torch.testing.assert_close(v, -model.net(xt, times, torch.zeros(7).long()).detach())


# -- what is no network ---------------------------------------------------------------------------


def test_a_frozen_teacher_and_losses_are_no_networks():
    class Outer(nn.Module):
        """A loss of one's own, given the network as it is or as a function."""

        def __init__(self, loss):
            super().__init__()
            self.inner, self.weight = loss, nn.Parameter(torch.zeros(()))

        def forward(self, net, x1, t, y):
            return self.inner(net, x1, y, t=t) + self.weight

    model = Model()
    model.a_teacher, model.b_loss = Net().requires_grad_(False), Outer(model.loss)
    x1, y = data(scale=1.0, offset=0.0)

    for wrapped in (False, True):

        def step(x1, y, wrapped=wrapped):
            def call(xt, t, y):
                model.a_teacher(xt, t, y)
                return model.net(xt, t, y)

            net = call if wrapped else model.net
            return model.b_loss(net, x1, torch.rand(len(x1)), y)

        assert search(model, step, (x1, y)).result().name == "net"


def test_a_network_without_a_velocity_is_still_named():
    class Records(Net):
        def forward(self, x, t, y=None):
            return {"hidden": x.flatten(1), "velocity": super().forward(x, t, y)}

    class Wide(Net):
        def forward(self, x, t, y=None):
            return torch.cat([super().forward(x, t, y)] * 2, 1)

    class Several(Net):
        def forward(self, x, t, y=None):
            return {
                "hidden": x.flatten(1),
                "velocity": torch.cat([super().forward(x, t, y)] * 2, 1),
            }

    cases = (
        (Records(), "", "['velocity']"),
        (Several(), "dict", "['velocity'][:, :3]"),
        (Wide(), r"\(64, 6, 2, 2\)", "[:, :3]"),
    )
    for net, came, text in cases:
        model = Model()
        model.net = net

        def step(x1, y, model=model):
            def call(xt, t, y):
                found = model.net(xt, t, y)
                return (found["velocity"] if isinstance(found, dict) else found)[:, :3]

            return model.loss(call, x1, y)

        found = search(model, step)
        assert found.result().name == "net"
        assert found.line.endswith(f"module.net(xt, t, labels){text}")
        if not came:
            assert (
                tensor_of(found.first.made[2], tuple(found.first.x1.shape))
                is found.first.made[2]["velocity"]
            )
            continue
        with pytest.raises(ValueError, match=f"got {came}.*{re.escape(found.line)}"):
            tensor_of(found.first.made[2], tuple(found.first.x1.shape), found.line)


def test_two_networks_are_refused_with_the_first_to_paste():
    model = Model()
    model.student, model.net = model.net, Net()

    def step(x1, y):
        return model.loss(lambda xt, t: model.student(xt, t, y) + model.net(xt, t=t), x1)

    with pytest.raises(ValueError, match="got several") as error:
        search(model, step).result()
    message = str(error.value)
    assert "module.student: Net(x_t, time, labels)" in message
    assert "module.net: Net(x_t, time)" in message
    assert message.endswith("velocity=lambda module, xt, t, labels: module.student(xt, t, labels)")


def test_one_network_that_is_called_twice_is_one():
    model = Model()

    def step(x1, y):
        return model.loss(model.net, x1, y) + model.loss(model.net, x1, y)

    found = search(model, step)
    assert found.result().name == "net"
    first = model.net(*found.first.made[0])
    assert torch.equal(found.first.made[2], first)


def test_an_answer_that_goes_on_to_another_network_is_not_taken():
    class Stage(Net):
        def forward(self, x, t):
            return x + super().forward(x, t)

    model = Model()
    model.stage = Stage()

    def step(x1, y):
        return model.loss(lambda xt, t: model.net(model.stage(xt, t), t=t), x1)

    with pytest.raises(
        ValueError, match=r"module\.stage .* its answer goes on to module\.net"
    ) as e:
        search(model, step).result()
    xt, t = queries()
    expected = model.net(model.stage(xt, t), t)
    torch.testing.assert_close(pasted(str(e.value))(model, xt, t, None), expected)

    # A loss that is a module, or the network itself once more, is no other network.
    model = Model()
    model.criterion = nn.MSELoss(reduction="none")

    def step(x1, y):
        def call(xt, t):
            v = model.net(xt, t)
            model.criterion(v, torch.zeros_like(v))
            return v + 0 * model.net(v, t)

        return model.loss(call, x1)

    assert search(model, step).result().name == "net"


# -- labels and conditions ------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["(B, 1)", "float", "dropped", "one-hot", "one-hot, dropped"])
def test_labels_in_every_form(form):
    class Forms(Net):
        def forward(self, x, t, y):
            if y.ndim == 2 and y.shape[1] > 1:
                h = (y @ self.embed.weight[: y.shape[1]]).reshape(x.shape)
                return Net.forward(self, x, t) + h
            return Net.forward(self, x, t, y)

    def given(y, drop=False):
        if form == "(B, 1)":
            return y[:, None]
        if form == "float":
            return y.float()
        if "one-hot" in form:
            hot = nn.functional.one_hot(y, CLASSES).float()
            return hot * (torch.arange(len(y)) % 3 > 0)[:, None] if drop else hot
        return torch.where(torch.arange(len(y)) % 3 == 0, CLASSES - 1, y) if drop else y

    model = Model()
    model.net = Forms()

    def step(x1, y):
        return model.loss(model.net, x1, given(y, drop="dropped" in form))

    network = search(model, step).result()
    assert network.conditional
    xt, t = queries()
    y = torch.arange(7) % 3
    torch.testing.assert_close(network(xt, t, y), model.net(xt, t, given(y)).detach())


CONDITIONS = {
    "a size, as a class": lambda x1, y: torch.full((len(x1),), CLASSES),
    "no words": lambda x1, y: torch.zeros(len(x1), 4),
    "text": lambda x1, y: torch.randn(len(x1), 8, 4),
    "other classes": lambda x1, y: (y + 1) % CLASSES,
    "mask": lambda x1, y: torch.rand(len(x1)) < 0.1,
    "soft labels": lambda x1, y: torch.full((len(x1), CLASSES), 1 / CLASSES),
    "an image": lambda x1, y: x1 + 1,
    "a second time": lambda x1, y: torch.rand(len(x1)),
}


@pytest.mark.parametrize("kind", CONDITIONS)
def test_what_else_a_network_is_given_is_named_and_tiled(kind):
    model, made = Model(), {}

    def step(x1, y):
        made["text"] = CONDITIONS[kind](x1, y)
        return model.loss(model.net, x1, y, text=made["text"].float())

    found = search(model, step)
    assert found.line.endswith("module.net(xt, t, labels, text=text)")
    network = found.result()
    (text,) = network.conditions
    assert text.startswith("text: float32 (64")
    for n in (7, 100):
        xt, t = queries(n)
        y = torch.arange(n) % CLASSES
        again = made["text"].float()[torch.arange(n) % 64]
        torch.testing.assert_close(network(xt, t, y), model.net(xt, t, y, again).detach())


def test_labels_that_the_batch_has_not_are_a_condition():
    model = Model()
    found = search(model, lambda x1, y: model.loss(model.net, x1, y), labels=False)
    assert found.result().conditions == ("y: int64 (64,)",)


@dataclass(frozen=True)
class Record:
    y: Any


class Slotted:
    __slots__ = ("y",)

    def __init__(self, y):
        self.y = y


DISGUISED = {
    "list of str": lambda y: [str(int(label)) for label in y],
    "tuple of str": lambda y: tuple(str(int(label)) for label in y),
    "list of dict": lambda y: [{"text": str(int(label))} for label in y],
    "list of int": lambda y: y.tolist(),
    "list of Tensor": lambda y: [torch.ones(int(label) + 1, 3) for label in y],
    "ndarray": lambda y: y.numpy(),
    "SimpleNamespace": lambda y: SimpleNamespace(y=y, depth=3),
    "Record": lambda y: Record({"deep": [y]}),
    "Slotted": Slotted,
}


class Reads(Net):
    """Reads its labels out of what it is given."""

    def forward(self, x, t, c, scale=1.0, size=(2, 2)):
        c = getattr(c, "y", c)
        c = c["deep"][0] if isinstance(c, dict) else c
        if isinstance(c, (list, tuple)):
            c = [one["text"] if isinstance(one, dict) else one for one in c]
            c = [len(one) - 1 if isinstance(one, torch.Tensor) else int(one) for one in c]
        return scale * super().forward(x, t, torch.as_tensor(c))


@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("form", DISGUISED)
def test_a_condition_need_be_no_tensor(form, how):
    model = Model()
    model.net = Reads()

    def step(x1, y):
        given = DISGUISED[form](y)
        extra = {"c": given} if how == "keyword" else {}
        args = () if extra else (given,)
        return model.loss(lambda xt, t: model.net(xt, t, *args, size=(2, 2), **extra), x1)

    found = search(model, step)
    assert "module.net(xt, t, " in found.line
    assert "..." not in found.line
    network = found.result()
    assert [one.partition(" of 64")[0] for one in network.conditions] == [
        f"c: {form}".partition(" of")[0]
    ]
    for n in (7, 100):
        xt, t = queries(n)
        again = data()[1][torch.arange(n) % 64]
        expected = Net.forward(model.net, xt, t, again).detach()
        torch.testing.assert_close(network(xt, t), expected)
        assert network.inputs((xt, t, DISGUISED[form](again)), {"size": (2, 2)}) is not None or (
            how == "keyword"
        )


def test_what_is_handed_on_from_the_batch_is_a_condition_whatever_its_length():
    class Packed(Net):
        def forward(self, x, t, tokens, mode="train", config=None):
            return super().forward(x, t) + tokens.sum()

    model, tokens = Model(), torch.randn(9, 3)
    model.net = Packed()
    config = SimpleNamespace(width=64, kinds=("a", "b"))

    def step(x1, y):
        return model.loss(lambda xt, t: model.net(xt, t, tokens, config=config), x1)

    batch = {"x": None, "tokens": tokens}
    network = search(model, step, batch_of_all=batch).result()
    assert network.conditions[0] == "tokens: float32 (9, 3)"
    assert search(model, step).result().conditions == ()  # a table of its own


def test_labels_that_are_dropped_for_a_whole_batch_are_labels():
    model = Model()
    model.net.embed = nn.Embedding(CLASSES + 1, 12)
    null = lambda y: torch.full_like(y, CLASSES)  # noqa: E731
    network = search(model, lambda x1, y: model.loss(model.net, x1, null(y))).result()
    assert network.conditional
    assert network.conditions == ()

    # What is not named like labels is another condition, such as a size.
    class Sized(Net):
        def forward(self, x, t, frames):
            return super().forward(x, t) + frames.reshape(-1, 1, 1, 1)

    model.net = Sized()
    found = search(model, lambda x1, y: model.loss(model.net, x1, null(y)))
    assert found.result().conditions == ("frames: int64 (64,)",)


# -- x_1 is one of several ------------------------------------------------------------------------


def test_candidates_are_tried_in_order_and_asked_for_at_the_call():
    model, current = Model(), []
    x1, y = data()

    def step(x1, y):
        current.append((GIVEN, x1.flip(0)))
        return model.loss(model.net, x1.flip(0), y)

    found = search(model, step, (x1, y), lambda: [*current, ("batch[0]", x1)])
    assert found.result().name == "net"
    assert found.first.matched == GIVEN
    assert torch.equal(found.first.x1, x1.flip(0))
    assert found.diagnosis() == "", "another order: nothing tells"


def test_a_given_tensor_that_is_that_of_the_batch_needs_no_word():
    model = Model()
    x1, y = data()
    found = search(
        model,
        lambda x1, y: model.loss(model.net, x1, y),
        (x1, y),
        lambda: [(GIVEN, x1.clone()), ("batch[0]", x1)],
    )
    assert (found.result().name, found.first.matched, found.diagnosis()) == ("net", GIVEN, "")


@pytest.mark.parametrize("factor", [0.2, 0.18215, 3.0, -1.0])
def test_what_is_given_is_known_to_be_scaled_exactly(factor):
    model = Model()
    x1, y = data()
    found = search(
        model,
        lambda x1, y: model.loss(model.net, factor * x1, y),
        (x1, y),
        lambda: [(GIVEN, factor * x1), ("batch['latents']", x1)],
        labels_name="batch['y']",
    )
    assert found.result().name == "net"
    diagnosis = found.diagnosis()
    assert diagnosis.startswith("training scales x_1 by ")
    assert factor_in(diagnosis) == factor
    line = f"read_batch=lambda batch: ({factor:g} * batch['latents'], batch['y'])"
    assert line in diagnosis


def test_another_tensor_of_the_batch_is_named_and_refused():
    model = Model()
    x1, y = data()
    surface = data(seed=9)[0]
    found = search(
        model,
        lambda x1, y: model.loss(model.net, surface, y),
        (x1, y),
        lambda: [("batch['image']", x1), ("batch['surface']", surface)],
    )
    assert found.first.matched == "batch['surface']"
    assert found.first.network.name == "net"
    diagnosis = found.diagnosis()
    assert diagnosis.startswith("module.net is given x_t of batch['surface'], not of ")
    line = r"read_batch=lambda batch: \(batch\['surface'\], batch\[1\]\)"
    with pytest.raises(ValueError, match=line):
        found.result()
    assert "batch['image']" in diagnosis


def test_a_network_of_another_tensor_yields_to_that_of_x1():
    model = Model()
    model.a_other = Net()
    x1, y = data()
    depth = data(seed=9)[0]

    def step(x1, y):
        return model.loss(model.a_other, depth, y) + model.loss(model.net, x1, y)

    found = search(model, step, (x1, y), lambda: [("batch[0]", x1), ("batch[1]", depth)])
    assert (found.result().name, found.first.matched) == ("net", "batch[0]")


# -- why nothing fits -----------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.2, 0.5, 3.0])
@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=repr)
def test_a_scale_is_estimated(factor, path):
    model = Model(path=path)
    found = search(model, lambda x1, y: model.loss(model.net, factor * x1, y))
    diagnosis = found.diagnosis()
    assert diagnosis.startswith("training scales x_1 by about ")
    assert factor_in(diagnosis) == pytest.approx(factor, rel=0.02)
    about = f"{factor_in(diagnosis):g}"
    line = rf"scales x_1 by about {about}.*read_batch=lambda batch: \({about} \* b"
    with pytest.raises(ValueError, match=rf"(?s)Found no network.*{line}"):
        found.result()


@pytest.mark.parametrize("convention", [Convention(), Convention(1, 0, -1), DIFFUSERS], ids=str)
def test_reversed_time_is_told_with_a_line_that_works(convention):
    model = Model(convention=convention)
    total = convention.noise_time + convention.data_time

    def step(x1, y):
        return model.loss(lambda xt, time: model.net(xt, total - time, y), x1)

    found = search(model, step)
    assert "runs the other way" in found.diagnosis()
    with pytest.raises(ValueError, match=r"(?s)Found no network.*runs the other way") as error:
        found.result()
    xt, t = queries()
    y = torch.zeros(7).long()
    v = pasted(str(error.value))(model, xt, t, y)
    expected = convention.sign * model.net(xt, total - convention.from_t(t), y)
    torch.testing.assert_close(v, expected)


class VAE(nn.Module):
    def __init__(self, latent=12, extra=False):
        super().__init__()
        self.body, self.head = nn.Linear(48, latent), nn.Linear(latent, latent)
        self.extra = extra

    def forward(self, x, mask=None):
        return 5 * self.head(self.body(x.flatten(1)).tanh()).reshape(-1, *SHAPE)


@pytest.mark.parametrize("how", ["as it is", "scaled", "with a mask", "gone"])
@pytest.mark.parametrize("given", [False, True])
def test_an_encoder_in_the_step_is_named(how, given):
    model = Model()
    model.vae = VAE().requires_grad_(False)
    images = torch.randn(64, 3, 4, 4)
    y, seen = data()[1], []

    def step(images, y):
        with torch.no_grad():
            args = [torch.ones(64)] if how == "with a mask" else []
            z = model.vae(images, *args)
        factor = 0.5 if how == "scaled" else 1
        x1 = factor * z if how != "gone" else z.clone()
        if how == "gone":
            del z
        seen.append((GIVEN, x1))
        return model.loss(model.net, x1, y)

    found = search(
        model,
        step,
        (images, y),
        lambda: [*(seen if given else []), ("batch[0]", images)],
    )
    diagnosis = found.diagnosis()
    if given:
        assert found.result().name == "net"
    call = "module.vae"
    if how == "scaled":
        assert factor_in(diagnosis) == pytest.approx(0.5, rel=0.05)
        call = f"{factor_in(diagnosis):g} * {call}"
    assert diagnosis.startswith(f"training encodes x_1: {call}(...)")
    line = f"encode=lambda x, module: {call}(x),"
    assert (line in diagnosis) == (how != "with a mask")
    assert "bank=LatentBank(latents, labels)" in diagnosis
    if not given:
        with pytest.raises(ValueError, match=r"(?s)Found no network.*training encodes x_1"):
            found.result()


def test_of_two_encoders_that_are_not_sure_none_is_named():
    model = Model()
    model.one, model.two = VAE(), VAE()

    def step(images, y):
        with torch.no_grad():
            z = model.one(images) + model.two(images)
        return model.loss(model.net, z, y)

    found = search(model, step, (torch.randn(64, 3, 4, 4), data()[1]))
    assert found.diagnosis() == ""
    with pytest.raises(ValueError, match="fit x_1 of the batch on LinearPath"):
        found.result()


def test_an_encoder_of_the_same_shape_is_named_if_it_is_sure():
    model = Model()
    model.flow = nn.Sequential(nn.Linear(2, 2), nn.Tanh())

    def step(x1, y):
        z = model.flow(x1)
        return model.loss(model.net, z, y)

    diagnosis = search(model, step).diagnosis()
    assert diagnosis.startswith("training encodes x_1: module.flow(...)")


@pytest.mark.parametrize("seen", [False, True])
def test_noise_that_is_coupled_by_hand_is_named(seen):
    model, given = Model(), []

    def step(x1, y):
        x0 = torch.randn_like(x1)
        cost = torch.cdist(x0.flatten(1), x1.flatten(1))
        order = torch.zeros(len(x1)).long()
        for _ in range(len(x1)):  # greedily
            i, j = divmod(int(cost.argmin()), len(x1))
            order[j] = i
            cost[i], cost[:, j] = torch.inf, torch.inf
        given.append((GIVEN, x1))
        return model.loss(model.net, x1, y, x0=x0[order])

    x1, y = data()
    found = search(model, step, (x1, y), lambda: [*(given if seen else []), ("batch[0]", x1)])
    with pytest.raises(ValueError, match=r"x_0 and x_1 are not independent.*a coupling\?"):
        found.result()


def test_a_step_that_calls_nothing_is_looked_at_again():
    model = Model()
    x1, y = data()
    found = NetworkSearch(model, find_target_makers(model), lambda: [("batch[0]", x1)], y)
    assert found.empty
    with torch.no_grad():
        model.net(x1, torch.rand(64), y)
    assert found.empty
    with pytest.raises(ValueError, match="called no submodule with gradients"):
        found.result()
    found.stop()
    x1, y = x1.flip(0), y.flip(0)  # another batch
    found = NetworkSearch(model, find_target_makers(model), lambda: [("batch[0]", x1)], y)
    assert found.first is None
    model.loss(model.net, x1, y)
    assert not found.empty
    assert found.result().conditional
    found.stop()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("how", ["lightning", "module.compile()", "training_step"])
def test_nothing_is_put_inside_of_what_is_compiled_as_a_whole(how):
    pl = pytest.importorskip("lightning.pytorch")

    class Trains(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.loss = Net(), FlowMatchingLoss()

        def training_step(self, batch, batch_idx):
            return self.loss(self.net, *batch)

    model = Trains()
    if how == "lightning":
        model = pl.utilities.compile.from_compiled(torch.compile(model, backend="eager"))
    elif how == "training_step":
        model.training_step = torch.compile(model.training_step, backend="eager")
    else:
        model.compile(backend="eager")
    found = search(model, lambda x1, y: None)
    assert found.compiled
    with pytest.raises(
        ValueError, match=r"compiled as a whole.*torch\.compile\(module\.net\)"
    ) as e:
        found.result()
    xt, t = queries()
    torch.testing.assert_close(pasted(str(e.value))(model, xt, t, None), model.net(xt, t))


# -- a target by hand -----------------------------------------------------------------------------


TIMES = {
    "t": (lambda t: t, (0, 1)),
    "1 - t": (lambda t: 1 - t, (1, 0)),
    "1000 t": (lambda t: 1000 * t, (0, 1000)),
    "999 t": (lambda t: 999 * t, (0, 1000)),
    "1000 (1 - t)": (lambda t: 1000 * (1 - t), (1000, 0)),
    "integers": (lambda t: (1000 * t).long(), (0, 1000)),
    "integers, reversed": (lambda t: (1000 * (1 - t)).round().long(), (1000, 0)),
}


@pytest.mark.parametrize("kind", TIMES)
@pytest.mark.parametrize("path", [None, CosinePath()], ids=repr)
def test_a_network_is_recognised_without_a_maker(kind, path):
    """On standard normal data, where noise looks like them, at any size of the batch."""
    on, (count, ends) = path or LinearPath(), TIMES[kind]
    for seed, n in enumerate([8, 16, 64, 8, 16, 64, 8, 16, 64]):
        model = Model()
        del model.loss

        def step(x1, y, net=model.net):
            t, x0 = torch.rand(len(x1)), torch.randn_like(x1)
            return net(on.interpolate(x0, x1, t), count(t), y).sum()

        batch = data(n, scale=1.0, offset=0.0, seed=seed + 10)
        found = search(model, step, batch, makers=assumed_makers(path))
        network, convention = found.result(), found.result().maker.convention
        assert (found.diagnosis(), network.conditional, network.conditions) == ("", True, ())
        assert (convention.noise_time, convention.data_time) == ends
    xt, t = queries()
    read, time = network.inputs((xt, convention.from_t(t), t), {})
    torch.testing.assert_close(time, t)
    assert torch.equal(read, xt)


@pytest.mark.parametrize("kind", TIMES)
def test_a_scale_is_noticed_without_a_maker(kind):
    model, count = Model(), TIMES[kind][0]
    del model.loss

    def step(x1, y):
        t, x0 = torch.rand(len(x1)), torch.randn_like(x1)
        return model.net(LinearPath().interpolate(x0, 0.18215 * x1, t), count(t), y).sum()

    found = search(model, step, data(scale=1.0, offset=0.0), makers=assumed_makers())
    assert found.first is None
    assert factor_in(found.diagnosis()) == pytest.approx(0.18215, rel=0.2)


def test_times_in_other_units_are_not_taken_for_times_next_to_noise():
    """Of a coupling by hand whose noise is independent of the batch as it came: nothing is said."""
    model = Model()
    del model.loss

    def step(x1, y):
        t, order = torch.rand(len(x1)), torch.randperm(len(x1))
        return model.net(LinearPath().interpolate(x1[order], x1.roll(1, 0), t), t, y[order]).sum()

    found = search(model, step, data(scale=1.0, offset=0.0), makers=assumed_makers())
    assert (found.first, found.diagnosis()) == (None, "")


def test_a_layer_does_not_say_what_its_module_is_given():
    """The module counts time in a unit of its own, and its first layer is given x_t and t."""

    class Layers(Net):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(13, 20)
            self.out = nn.Linear(20, 12)

        def forward(self, x, t, y):
            h = self.inner(torch.cat([x, t[:, None] / 77], 1))
            return self.out(h) + self.embed(y)

    model = Model()
    model.net = Layers()

    def step(x1, y):
        t, x0 = torch.rand(len(x1)), torch.randn_like(x1)
        return model.net(LinearPath().interpolate(x0, x1, t), 77 * t, y).sum()

    x1, y = data()
    found = search(model, step, (x1.flatten(1), y), makers=assumed_makers())
    assert (found.first.network.name, found.first.inner) == ("net.inner", True)


def test_paths_that_only_look_alike_are_two():
    fm = pytest.importorskip("flow_matching.path")
    scheduler = pytest.importorskip("flow_matching.path.scheduler")
    model = Model()
    del model.loss
    model.a, model.b = (
        fm.AffineProbPath(scheduler.PolynomialConvexScheduler(n)) for n in (2.0, 3.0)
    )
    assert len({repr(maker.path) for maker in find_target_makers(model)}) == 1

    def step(x1, y):
        found = model.b.sample(t=torch.rand(len(x1)), x_0=torch.randn_like(x1), x_1=x1)
        return model.net(found.x_t, found.t, y).sum()

    assert search(model, step).result().maker.name == "module.b"


# -- precision, few samples -----------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["x_t", "x_t and time", "all"])
@pytest.mark.parametrize("scale", [0.2, 2.0, 8.0])
@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=repr)
def test_bf16_is_fine_enough(cast, scale, path):
    model = Model(path=path)
    x1, y = data(512, scale)
    if cast == "all":
        model, x1 = model.bfloat16(), x1.bfloat16()

    def step(x1, y):
        def call(xt, t, y):
            half = torch.bfloat16
            with torch.autocast("cpu", half):
                return model.net(xt.to(half), t.to(half) if "time" in cast else t, y).float()

        return model.loss(model.net if cast == "all" else call, x1, y)

    assert search(model, step, (x1, y)).result().name == "net"
    assert search(model, lambda x1, y: step(0.5 * x1, y), (x1, y)).first is None


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("labels", [True, False])
def test_one_sample(seed, labels):
    model = Model()

    def step(x1, y):
        torch.manual_seed(seed)
        t = torch.tensor([0.01, 0.3, 0.7, 0.97, 0.995])[[seed]]
        return model.loss(model.net, x1, *([y] if labels else []), t=t)

    network = search(model, step, data(1, seed=seed)).result()
    assert (network.name, network.conditional) == ("net", labels)


@pytest.mark.parametrize("seed", range(10, 20))  # not that of the noise
def test_the_factor_is_near_in_a_small_batch(seed):
    model = Model()
    batch = data(48, seed=seed)
    diagnosis = search(model, lambda x1, y: model.loss(model.net, 0.2 * x1, y), batch).diagnosis()
    assert factor_in(diagnosis) == pytest.approx(0.2, rel=0.25)
