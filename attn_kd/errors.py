"""The exception for what a user can mend."""


class InputError(ValueError):
    """What was given is wrong; the message names the value and says what was expected.

    The command line prints the message as one line and exits with code 2; a traceback is kept for
    defects of the library itself.
    """
