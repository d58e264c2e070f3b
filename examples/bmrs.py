"""Let the evidence decide how many hidden units a digit classifier needs; cut the others out."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from torchprune_bayes.gates import attach_gates, fold_gates
from torchprune_bayes.structured import shrink
from torchprune_bayes.structured.importances.bmrs import BMRSImportance
from torchprune_bayes.training import GateTraining, gate_parameter_groups

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
(x, y), test = (x[:1400], y[:1400]), (x[1400:], y[1400:])


def accuracy(model: nn.Module) -> float:
    """Share of right answers on the test images."""
    with torch.no_grad():
        return float((model.eval()(test[0]).argmax(1) == test[1]).float().mean())


model = nn.Sequential(
    nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 10)
)
gates = attach_gates(model)  # one gate for each hidden unit
training = GateTraining(model, data_size=len(x), prune_every=7)
optimizer = torch.optim.Adam(gate_parameter_groups(model, lr=3e-3))
for epoch in range(36):
    if epoch == 28:
        training.begin_finetuning()
    model.train()
    for batch in torch.randperm(len(x)).split(64):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch]) + training.penalty()
        loss.backward()
        optimizer.step()
        training.step()
    training.end_epoch()
gated = accuracy(model)
print(f"closed {gates.closed} of {gates.units} units; accuracy {gated:.3f}")

importance = BMRSImportance(gates, criterion=None)  # what is closed, and nothing else
fold_gates(model)
report = shrink(model, x[:8], importance, target="evidence")
print(report)

assert report.parameters.sparsity > 0.3
assert abs(accuracy(model) - gated) < 0.01
assert gated > 0.88
