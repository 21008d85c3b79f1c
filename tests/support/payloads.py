"""Pickles that do something when they are loaded."""


class Payload:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (self.path / "ran").touch, ()
