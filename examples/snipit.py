"""Prune 98 % of a digit classifier before it is trained, and another one while it is trained.

Ends in about ten seconds: accuracy of the dense network and of both pruned ones.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from torchprune_bayes import Calibration, GradualPruner, keep_sparse, prunable_parameters
from torchprune_bayes.methods import SNIPit
from torchprune_bayes.schedules import halving

SPARSITY, EPOCHS, DELAY, FREQUENCY = 0.98, 30, 2, 2

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
loader = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=64, shuffle=True)
loss_fn = nn.CrossEntropyLoss()


def fresh_model() -> nn.Module:
    """A multilayer perceptron with 42,880 weights, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 160), nn.ReLU(), nn.Linear(160, 192), nn.ReLU(), nn.Linear(192, 10)
    )


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One pass over the training data."""
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        optimizer.step()


def accuracy(model: nn.Module) -> float:
    """Share of right answers on the test images."""
    with torch.no_grad():
        return float((model(x[1400:]).argmax(1) == y[1400:]).float().mean())


def zeros_in(model: nn.Module) -> int:
    """Number of weights that are zero."""
    return sum(int((module.weight == 0).sum()) for module, _ in prunable_parameters(model))


dense = fresh_model()
optimizer = torch.optim.Adam(dense.parameters(), lr=2e-3)
for _ in range(EPOCHS):
    train_epoch(dense, optimizer)
print(f"dense: {accuracy(dense):.3f}")

# Before training, with PyTorch's own function. The masks stay on the modules, so that no gradient
# reaches a pruned weight; `keep_sparse` also keeps the optimizer's decay and moments from them.
before = fresh_model()
params = prunable_parameters(before)
calibration = Calibration(before, loader, loss_fn, params=params, num_samples=1000)
prune.global_unstructured(params, pruning_method=SNIPit, amount=SPARSITY, calibration=calibration)
optimizer = torch.optim.Adam(before.parameters(), lr=2e-3)
keep_sparse(optimizer, before)
for _ in range(EPOCHS):
    train_epoch(before, optimizer)
share = zeros_in(before) / sum(module.weight.numel() for module, _ in params)
print(f"SNIP-it before training: {accuracy(before):.3f}, {share:.1%} of the weights are zero")

# While training: the schedule has seven events, the first after DELAY + FREQUENCY epochs, and
# `steps=0` makes each of them one ranking. Zeros stay zero because the pruner has the optimizer.
during = fresh_model()
optimizer = torch.optim.Adam(during.parameters(), lr=2e-3)
pruner = GradualPruner(
    during,
    SNIPit,
    halving(SPARSITY, begin=DELAY + FREQUENCY, every=FREQUENCY),
    calibration=Calibration(during, loader, loss_fn, num_samples=1000),
    optimizer=optimizer,
    steps=0,
)
for _ in range(EPOCHS):
    train_epoch(during, optimizer)
    pruner.step()
print(f"SNIP-it during training: {accuracy(during):.3f}, by {len(pruner.history)} rankings")

total = sum(module.weight.numel() for module, _ in params)
assert zeros_in(before) == zeros_in(during) == round(SPARSITY * total)
assert [event["step"] for event in pruner.history] == [4, 6, 8, 10, 12, 14, 16]
assert accuracy(before) > 0.8
assert accuracy(during) > 0.8
