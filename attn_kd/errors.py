"""The exception for what a user can mend."""


class InputError(ValueError):
    """What was given is wrong; the message names the value and says what was expected.

    The command line prints the message as one line and exits with code 2; a traceback is kept for
    defects of the library itself.

    A process that loads data hands an error on with the whole traceback as its message (torch's
    ``ExceptionWrapper``); of that only the message is kept.
    """

    def __init__(self, message: str = "") -> None:
        if message.startswith(f"Caught {type(self).__name__} in "):
            message = message.rpartition(f"{__name__}.{type(self).__name__}: ")[2].strip()
        super().__init__(message)
