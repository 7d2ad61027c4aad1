"""The errors a user sees: one clear sentence each."""


class BadInput(ValueError):
    """Something the user gave cannot be accepted; nothing has been changed. Exit code 2."""


class RunFailed(RuntimeError):
    """A run could not go on; what it had is kept. Exit code 1."""


class StopRequested(Exception):
    """The user asked the run to stop."""
