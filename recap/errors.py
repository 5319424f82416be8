"""The two ways in which input can be bad: it stops the command, or it costs one sample."""


class UserError(Exception):
    """Something that the user can mend. The message says what, where, and what to do, in one line.

    The command line prints the message without a traceback and exits with status 2.
    """


class BadSample(Exception):
    """One sample cannot be used; it is quarantined and the run goes on.

    Args:
        reason: a short snake_case word, the name under which such samples are counted.
        detail: what exactly was found, for a person who looks into it.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class Stopped(Exception):
    """What was asked to end by SIGTERM has saved what it has; the same command goes on."""
