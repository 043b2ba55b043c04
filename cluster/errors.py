"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake in the input, told in one sentence: what is wrong, where, and how to mend it.

    The commands print it without a traceback and exit with status 2; anything else is a bug of ours.
    """


class Refused(UserError):  # noqa: N818 -- the name says it
    """An executor has not taken a job: nothing of it will run."""


class AlreadyRunning(UserError):  # noqa: N818 -- the name says it
    """The same run was submitted before, and has not ended."""
