"""Exceptions and warnings of the library.

Every error is a :class:`TorchPruneBayesError` and, so that callers need not know this
library to catch it, also the built-in exception that Python users expect.
"""


class TorchPruneBayesError(Exception):
    """Base class of all errors raised on purpose by this library."""


class ArgumentError(TorchPruneBayesError, ValueError):
    """An argument has the right type and an impossible value."""


class ArgumentTypeError(TorchPruneBayesError, TypeError):
    """An argument has the wrong type or is missing."""


class ParameterError(TorchPruneBayesError, ValueError):
    """A tensor cannot be pruned: missing, tied twice, sharded or parametrized."""


class AlignmentError(TorchPruneBayesError, ValueError):
    """PyTorch handed over weights that are not those of the calibration."""


class CalibrationError(TorchPruneBayesError, RuntimeError):
    """The calibration data gave no usable gradients."""


class NumericalError(TorchPruneBayesError, ArithmeticError):
    """A factorisation failed even after its rescue."""


class MissingExtraError(TorchPruneBayesError, ImportError):
    """An optional dependency is not installed; the message names the extra."""


class TorchPruneBayesWarning(UserWarning):
    """Base class of all warnings issued by this library."""


class NumericalWarning(TorchPruneBayesWarning):
    """A computation was rescued; the message says how and by how much."""


class CalibrationWarning(TorchPruneBayesWarning):
    """The calibration is usable but not what was probably intended."""


class ParameterWarning(TorchPruneBayesWarning):
    """Most of a model's weights may be others than those that are pruned."""
