"""Prune while training: a cubic schedule, masks that stay, and a checkpoint in the middle."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchprune_bayes import Calibration, GradualPruner, cubic, prunable_parameters

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
loader = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=64, shuffle=True)
loss_fn = nn.CrossEntropyLoss()

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
params = prunable_parameters(model)
calibration = Calibration(model, loader, loss_fn, params=params, num_samples=500)
pruner = GradualPruner(
    params,
    "woodfisher",
    cubic(final=0.95, begin=100, end=400, every=50),
    calibration=calibration,
    optimizer=optimizer,  # zeros stay zero through momentum and weight decay
)

step = 0
while step < 600:
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        optimizer.step()
        pruner.step()
        step += 1
        if step == 250:
            checkpoint = {"model": model.state_dict(), "pruner": pruner.state_dict()}

with torch.no_grad():
    accuracy = float((model(x[1400:]).argmax(1) == y[1400:]).float().mean())
print(f"accuracy {accuracy:.3f} at {pruner.sparsity:.1%} sparsity after {step} steps")
assert pruner.finished
assert round(pruner.sparsity, 3) == 0.95
assert accuracy > 0.85
assert 0 < checkpoint["pruner"]["step"] <= 250
