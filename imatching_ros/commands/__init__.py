"""What the commands do, a file for each; ``cli.py`` says what they take and how they end."""


class Nothing(Exception):
    """A command did all that it could and has nothing to show; its text says why."""
