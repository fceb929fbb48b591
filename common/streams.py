"""What is said on stdout and stderr: notes, and streams that cannot end a run."""

import os
import sys

from common import ranks


class Lasting:
    """A text stream that falls silent, instead of raising, when nobody can read it any more (`| head -1`)."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:  # a broken pipe, a full disk under `2> log`, a terminal that is gone
            self.silence()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.silence()

    def silence(self):
        """Lead the stream to the null device: what it still holds would fail again when the process ends."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)


def prepare():
    """Make stdout and stderr such that no word to the user can end a run: a closed one (`2>&-`) leads nowhere, a
    broken pipe falls silent, and letters that the encoding lacks are printed as escapes.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        if not isinstance(stream, Lasting):
            stream = Lasting(stream)
        setattr(sys, name, stream)


def note(text):
    """A word to the user that is not the result: one line on stderr, by the main process alone."""
    if ranks.is_main():
        print(f"note: {text}", file=sys.stderr)


def first_line(error):
    """An exception's words, as far as one line goes."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
