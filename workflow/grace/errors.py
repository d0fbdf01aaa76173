"""The one exception that a user is meant to read."""


class GraceError(Exception):
    """Something the user can fix: one sentence that names the file, the field and the fix.

    The command line prints the sentence alone and exits with status 1; any other exception is a bug and keeps its
    traceback.
    """
