"""Choose what to prune together: the combinatorial brain surgeon on a digit classifier."""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from torchprune_bayes import CBS, Calibration, prunable_parameters

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
loader = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=64, shuffle=True)
loss_fn = nn.CrossEntropyLoss()

dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(dense.parameters(), lr=3e-3)
for _ in range(15):
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss_fn(dense(inputs), targets).backward()
        optimizer.step()


def pruned(amount: float | None, **options: str | int | float) -> nn.Module:
    """A pruned copy of the network; all choices are made on training samples."""
    model = copy.deepcopy(dense)
    params = prunable_parameters(model)
    calibration = Calibration(model, loader, loss_fn, params=params, num_samples=1000)
    # Without these, damping and blocks are chosen by held-out loss, which takes longer.
    options |= {"damping": 1e-2, "block_size": "full", "perturbations": 10}
    if amount is not None:  # a pattern has its own
        options["amount"] = amount
    prune.global_unstructured(params, pruning_method=CBS, calibration=calibration, **options)
    return model


def report(name: str, model: nn.Module) -> tuple[float, float]:
    """Print and return loss on training and accuracy on test images."""
    with torch.no_grad():
        loss = float(loss_fn(model(x[:1400]), y[:1400]))
        accuracy = float((model(x[1400:]).argmax(1) == y[1400:]).float().mean())
    print(f"{name:24} training loss {loss:.3f}, test accuracy {accuracy:.3f}")
    return loss, accuracy


report("dense", dense)
start, _ = report("90 %, start of the search", pruned(0.9, update="none", max_iterations=0))
selected, _ = report("90 %, selected (CBS-S)", pruned(0.9, update="none"))
updated, accuracy = report("90 %, updated (CBS-S+U)", pruned(0.9))
sparse = pruned(None, pattern="2:4")
report("2 of every 4", sparse)

assert updated < selected < start
assert accuracy > 0.7
groups = sparse[0].weight.unflatten(1, (-1, 4))
assert ((groups == 0).sum(-1) == 2).all()
