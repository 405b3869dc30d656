"""Failures that are the user's to mend; anything else is our bug and keeps its traceback.

    HireError                 never raised itself; carries the exit code
      UsageError          2   a flag or a recipe is wrong
      GateError           3   a quality limit was not met
      InputError          4   the model, the text or the machine cannot be used
      HubError            5   the Hub or the network failed

A message says what was found, what was expected and what to do.
"""


class HireError(Exception):
    """Base of every failure that ends in one clear message and `exit_code`, without a traceback."""

    exit_code = 1


class UsageError(HireError):
    """The command line or the recipe asks for something impossible."""

    exit_code = 2


class GateError(HireError):
    """A measured quality or speed limit was breached."""

    exit_code = 3


class InputError(HireError):
    """The model, the data or the environment cannot be used."""

    exit_code = 4


class HubError(HireError):
    """The Hub or the network did not deliver."""

    exit_code = 5
