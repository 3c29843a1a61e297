"""What a user can have got wrong, and being asked to stop. Everything else that is raised is a bug of ours."""


class UserError(ValueError):
    """Bad input, told in one line: what was got, what is accepted, what to do next. Exit code 2."""


class Refused(UserError):
    """A model, pattern or launch this project cannot handle, refused before the expensive part. Exit code 3."""


class Stopped(Exception):
    """The run was asked to stop, and has saved what it needs to go on. Exit code 75 (try again)."""
