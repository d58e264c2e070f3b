"""A fresh process that builds architectures anew and reads shrunk models from folders.

It is started once and has never seen a model being shrunk: what it computes follows from the
constructor and the folder alone.
"""

from __future__ import annotations

import multiprocessing
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.architectures import architectures
from torchprune_bayes.structured import load_shrunk
from torchprune_bayes.wiring.forward import run, tensors_in

_OUTPUTS = "outputs.pt"


class FreshProcess:
    """Loads folders in another process, which is started when first asked."""

    def __init__(self) -> None:
        self._process: Any = None
        self._ours: Connection | None = None

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.join()

    def outputs(self, name: str, folder: str) -> list[Tensor]:
        """Outputs in evaluation mode of the architecture ``name``, loaded from ``folder``.

        Raises:
            RuntimeError: With what the other process raised.
        """
        if self._ours is None:
            context = multiprocessing.get_context("spawn")
            self._ours, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()  # so that its end is noticed
        self._ours.send((name, folder))
        answer = self._ours.recv()
        if answer:
            raise RuntimeError(answer)
        result: list[Tensor] = torch.load(Path(folder) / _OUTPUTS)
        return result


def _serve(connection: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cases = {case.name: case for case in architectures()}
    while True:
        name, folder = connection.recv()
        try:
            case = cases[name]
            model = load_shrunk(case.build().eval(), folder)
            torch.manual_seed(0)  # some draw masks
            with torch.no_grad():
                outputs = tensors_in(run(model, case.inputs(2)))
            torch.save([each.clone() for each in outputs], Path(folder) / _OUTPUTS)
            connection.send("")
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")
