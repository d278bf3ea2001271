"""Reading data in a run leaves no trace, wherever what draws is hidden."""

import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from stagewise.undisturbed import undisturbed

OF_THE_MODULE = np.random.default_rng(1)


def reader():
    inside, names = torch.Generator().manual_seed(2), {"deep": [np.random.RandomState(3)]}

    class Data:
        of_the_class = random.Random(4)

        def __len__(self):
            return 4

        def __getitem__(self, i):
            own = torch.rand(1, generator=inside), names["deep"][0].rand()
            others = self.of_the_class.random(), OF_THE_MODULE.random()
            return [*map(float, own), *others, random.random(), np.random.rand(), *torch.rand(1)]

    return DataLoader(Data(), shuffle=True, generator=torch.Generator().manual_seed(5))


def test_what_draws_goes_on_as_if_nothing_had_been_read():
    """Generators in closures, containers, classes, modules and the objects of other packages."""

    def read(loader):
        return torch.tensor([[float(x) for x in batch] for batch in loader])

    def begin():
        global OF_THE_MODULE
        OF_THE_MODULE = np.random.default_rng(1)
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return reader()

    loader = begin()
    expected = [read(loader), read(loader)]
    loader, module = begin(), nn.Dropout()
    found = [read(loader)]
    within = []
    for _ in range(2):
        with undisturbed(module, loader):
            assert not module.training
            within.append(read(loader))
    found.append(read(loader))
    assert module.training
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(*within), "the same each time"
    assert not torch.equal(within[0], expected[1])
