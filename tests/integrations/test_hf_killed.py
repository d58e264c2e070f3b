from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from tests.integrations.hf_cases import Sentences, arguments, classifier
from tests.integrations.processes import fresh
from torchprune_bayes import cubic
from torchprune_bayes.integrations.hf import PruningCallback, last_whole_checkpoint

KILLS = 5


class Report(TrainerCallback):
    """Tells another process how far training is."""

    def __init__(self, progress: Any) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.value = state.global_step


def train(folder: Path, progress: Any) -> Trainer:
    torch.set_num_threads(1)
    pruning = PruningCallback("magnitude", cubic(0.8, 2, 26, every=6), exclude=["classifier"])
    run = Trainer(
        classifier(),
        arguments(folder, num_train_epochs=8, save_strategy="steps", save_steps=1),
        train_dataset=Sentences(),
        callbacks=[pruning, Report(progress)],
    )
    run.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    return run


def test_a_killed_trainer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    progress = fresh.Value("i", 0, lock=False)
    whole = train(tmp_path / "whole", progress)
    assert last_whole_checkpoint(tmp_path / "whole") == str(tmp_path / "whole" / "checkpoint-32")
    progress.value = 0
    for _ in range(KILLS):
        wanted = progress.value + random.randrange(1, 4)
        process = fresh.Process(target=train, args=(tmp_path / "killed", progress))
        process.start()
        while progress.value < wanted and process.is_alive():
            time.sleep(1e-3)
        time.sleep(random.random() * 0.05)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    again = train(tmp_path / "killed", progress)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
