import json
from types import SimpleNamespace

import pytest

from torchprune_bayes.cli import main
from torchprune_bayes.errors import MissingExtraError
from torchprune_bayes.reports import energy, measure_energy

pytest.importorskip("codecarbon")


class Tracker:
    """Counts 2 Wh of the CPU, 3 Wh of the GPU and 5 Wh of memory that no meter has read."""

    stopped = 0

    def start(self):
        pass

    def stop(self):
        type(self).stopped += 1

    final_emissions_data = SimpleNamespace(
        cpu_energy=0.002, gpu_energy=0.003, energy_consumed=0.01, emissions=0.004
    )


@pytest.fixture
def meters(monkeypatch):
    def install(*names):
        monkeypatch.setattr(energy, "readable_meters", lambda: set(names))
        monkeypatch.setattr(energy, "_tracker", lambda country: Tracker())

    return install


def test_without_a_meter_nothing_is_estimated(meters):
    meters()
    with measure_energy() as meter:
        pass
    assert meter.energy is None


@pytest.mark.parametrize(
    ("names", "cpu", "gpu", "emissions", "text"),
    [
        (("cpu",), 2.0, None, 0.8, "CPU 2 Wh, 0.8 g CO2e"),
        (("gpu",), None, 3.0, 1.2, "GPU 3 Wh, 1.2 g CO2e"),
        (("cpu", "gpu"), 2.0, 3.0, 2.0, "CPU 2 Wh, GPU 3 Wh, 2 g CO2e"),
    ],
)
def test_only_what_meters_say_counts(meters, names, cpu, gpu, emissions, text):
    meters(*names)
    with measure_energy("DNK") as meter:
        assert meter.energy is None
    found = meter.energy
    assert (found.cpu, found.gpu) == (cpu, gpu)
    assert found.emissions == pytest.approx(emissions)
    assert str(found) == text
    with measure_energy() as meter:
        pass
    assert meter.energy.emissions is None


def test_an_exception_stops_the_tracker_and_goes_on(meters):
    meters("cpu")
    before = Tracker.stopped
    with pytest.raises(KeyError), measure_energy():
        raise KeyError("inside")
    assert Tracker.stopped == before + 1


def test_the_real_tracker_has_what_is_read(monkeypatch):
    monkeypatch.setattr(energy, "readable_meters", lambda: {"cpu"})
    with measure_energy("FRA") as meter:
        sum(range(10000))
    assert meter.energy.cpu >= 0
    assert meter.energy.gpu is None


def test_without_codecarbon_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "codecarbon.core", None)
    with pytest.raises(MissingExtraError, match=r'pip install "\.\[energy\]"'), measure_energy():
        pass


@pytest.mark.parametrize("names", [(), ("cpu",)])
def test_reports_of_the_shell_have_it_where_it_is_read(meters, tmp_path, capsys, names):
    meters(*names)
    words = ["--model", "tests.cli.toys:make_model", "--method", "magnitude", "--amount", "0.5"]
    assert main(["prune", *words, "--output", str(tmp_path), "--report"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.get("energy_wh") == (
        {"cpu": 2.0, "gpu": None, "emissions": None} if names else None
    )
    for text in (capsys.readouterr().out, (tmp_path / "report.html").read_text()):
        assert ("energy of pruning" in text) == bool(names)
