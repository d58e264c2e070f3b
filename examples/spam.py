"""Train a digit classifier by the marginal likelihood and prune 95 % of its weights at once."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchprune_bayes import Calibration, bake, prune_global
from torchprune_bayes.methods import OPD
from torchprune_bayes.training import SpaM

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
order = torch.randperm(len(labels))
x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
train, test = TensorDataset(x[:1200], y[:1200]), (x[1200:], y[1200:])
loader = DataLoader(train, batch_size=64, shuffle=True)
loss_fn = nn.CrossEntropyLoss()

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
calibration = Calibration(model, loader, loss_fn)
spam = SpaM(optimizer, calibration, prior="diag", burn_in=10, every=5)  # enabled=False: MAP

for _ in range(70):
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        optimizer.step()
    event = spam.step()
    if event and event["step"] % 20 == 0:
        print(f"epoch {event['step']}: log evidence {event['log_marginal_likelihood']:.0f}")


def accuracy() -> float:
    """Share of right answers on the test images."""
    with torch.no_grad():
        return float((model(test[0]).argmax(1) == test[1]).float().mean())


dense = accuracy()
prune_global(None, OPD, amount=0.95, calibration=calibration, posterior=spam.posterior())
print(f"dense {dense:.3f}, with 5 % of the weights {accuracy():.3f}, not fine-tuned")

bake(model)  # plain weights again: no masks, no hooks
assert accuracy() > dense - 0.1
