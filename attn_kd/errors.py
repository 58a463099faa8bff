"""The exception for what a user can mend."""


class InputError(ValueError):
    """What was given is wrong; the message names the value and says what was expected.

    The command line prints the message as one line and exits with code 2; a traceback is kept for
    defects of the library itself.

    A process that loads data hands an error on with the whole traceback as its message (torch's
    ``ExceptionWrapper``); of that only the message is told.
    """

    # There is no __init__: torch.compile cannot trace one of an exception, and would complain of
    # that instead of telling the message.
    def __str__(self) -> str:
        message = super().__str__()
        if message.startswith(f"Caught {type(self).__name__} in "):
            message = message.rpartition(f"{__name__}.{type(self).__name__}: ")[2].strip()
        return message
