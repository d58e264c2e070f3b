"""Prune any trained model by its Laplace posterior: single weights, N:M, and whole units."""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import prune

from torchprune_bayes import Calibration, prunable_parameters
from torchprune_bayes.laplace import fit_posterior
from torchprune_bayes.methods import OPD
from torchprune_bayes.structured import shrink
from torchprune_bayes.structured.importances.opd import OPDImportance

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
train = list(zip(x[:1400].split(64), y[:1400].split(64), strict=True))
loss_fn = nn.CrossEntropyLoss()

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(15):
    for inputs, targets in train:
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        optimizer.step()


def accuracy(network: nn.Module) -> float:
    """Share of right answers on the test images."""
    with torch.no_grad():
        return float((network(x[1400:]).argmax(1) == y[1400:]).float().mean())


print(f"dense: {accuracy(model):.3f}")

# The posterior: Kronecker-factored curvature, and per layer the prior of highest evidence.
calibration = Calibration(model, train, loss_fn)
posterior = fit_posterior(calibration, structure="kronecker", kind="ggn").with_best_prior(
    "layerwise"
)
print(f"log marginal likelihood: {posterior.log_marginal_likelihood():.0f}")

# 80 % of the weights, with PyTorch's own function.
sparse = copy.deepcopy(model)
params = prunable_parameters(sparse)
prune.global_unstructured(params, OPD, amount=0.8, posterior=posterior, model=sparse)
print(f"80 % of the weights removed: {accuracy(sparse):.3f}")

# 2 of every 4 inputs of each unit, the pattern of sparse tensor cores.
halved = copy.deepcopy(model)
params = prunable_parameters(halved)
prune.global_unstructured(params, OPD, amount=0.5, pattern="2:4", posterior=posterior, model=halved)
print(f"2 of every 4 weights kept: {accuracy(halved):.3f}")

# A third of the hidden units, cut out for good.
small = copy.deepcopy(model)
report = shrink(small, x[:2], OPDImportance(posterior), sparsity=1 / 3, target="channels")
print(f"hidden units {report.units}: {accuracy(small):.3f}")

assert accuracy(sparse) > 0.75
assert accuracy(halved) > 0.85
assert accuracy(small) > 0.75
