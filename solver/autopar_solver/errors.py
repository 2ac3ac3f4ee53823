"""What goes wrong with a choice problem, said to a person."""


class ProblemError(ValueError):
    """A choice problem (or a request to solve one) that is malformed; the message says where and what to
    do.
    """
