"""Let the evidence decide how many hidden units a digit classifier needs; cut the others out."""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn

from torchprune_bayes.gates import attach_gates, fold_gates
from torchprune_bayes.reports import compare_speed, stopping_points
from torchprune_bayes.structured import BMRSImportance, shrink
from torchprune_bayes.training import GateTraining, gate_parameter_groups

torch.set_num_threads(1)
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
(x, y), test = (x[:1400], y[:1400]), (x[1400:], y[1400:])


def accuracy(model: nn.Module) -> float:
    """Share of right answers on the test images."""
    with torch.no_grad():
        return float((model.eval()(test[0]).argmax(1) == test[1]).float().mean())


def train(epochs: int) -> None:
    """Add the penalty to the loss, and tell the training of each step and each epoch."""
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch]) + training.penalty()
            loss.backward()
            optimizer.step()
            training.step()
        training.end_epoch()


model = nn.Sequential(
    nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 10)
)
gates = attach_gates(model)  # one gate for each hidden unit
training = GateTraining(model, data_size=len(x), prune_every=None)  # no gate closes yet
optimizer = torch.optim.Adam(gate_parameter_groups(model, lr=3e-3))
train(28)
open_accuracy = accuracy(model)
print(f"{gates.units} gates open: accuracy {open_accuracy:.3f}\n")

# What each criterion would close: fractions of the gates, and of what is gone after real shrinking.
# No number is asked for; "metric" is the accuracy before any fine-tuning.
criteria = ["bmrs-n", "bmrs-u8", "bmrs-u4", "snr", "mean"]
print(stopping_points(model, criteria, accuracy, example_inputs=x[:8]), end="\n\n")

training.begin_finetuning()  # closes what BMRS_N says, the default
train(8)
gated = accuracy(model)
print(f"{gates.closed} of {gates.units} gates closed, fine-tuned: accuracy {gated:.3f}\n")

importance = BMRSImportance(gates, criterion=None)  # what is closed, and nothing else
fold_gates(model)  # into the weights; nothing of the gates is left
whole = copy.deepcopy(model)
report = shrink(model, x[:8], importance, target="evidence")
print(report)
speed = compare_speed(whole, model, test[0], pairs=99)
print(f"a forward pass is {speed.speedup:.2f} times as fast")

assert report.parameters.sparsity > 0.3
assert abs(accuracy(model) - gated) < 0.01
assert gated > open_accuracy - 0.05
