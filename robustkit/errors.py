"""The one exception that robustkit raises on purpose."""


class RobustkitError(ValueError):
    """Bad input, told in one sentence: the value, the rule it breaks, the remedy.

    The command line prints the sentence and exits with status 2; nothing else catches it.
    """
