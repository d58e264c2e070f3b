"""Compare a second-order method with the baselines it should beat, at 90 % sparsity."""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchprune_bayes import Calibration, prunable_parameters, prune_global, registered_methods

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

BASELINES = {
    "random": {},
    "magnitude": {},
    "layer-magnitude": {},
    "diagonal-fisher": {},
    "hessian-diagonal": {"probes": 64},  # Hutchinson; without it every weight exactly
    "kfac": {},
    "woodfisher": {},
}

found = {}
for name, options in BASELINES.items():
    model = copy.deepcopy(dense)
    params = prunable_parameters(model)
    if registered_methods()[name].needs_calibration:
        calibration = Calibration(model, loader, loss_fn, params=params, num_samples=1000)
        options = options | {"calibration": calibration}
    prune_global(params, name, amount=0.9, **options)
    with torch.no_grad():
        found[name] = float((model(x[1400:]).argmax(1) == y[1400:]).float().mean())
    print(f"{name:16} accuracy {found[name]:.3f} at 90 % sparsity")
    zeros = sum(int((module.weight == 0).sum()) for module, _ in params)
    total = sum(module.weight.numel() for module, _ in params)
    assert abs(zeros - 0.9 * total) <= 1  # rounding in each of two layers

assert found["woodfisher"] == max(found.values())
