"""``python -m jambascope.studies.zoo.child ...``: the command line in a process that ends with its parent."""

from __future__ import annotations

import os
import sys
import threading


def _end_with_parent() -> None:
    """End at once when nobody holds the other end of stdin any more, however the parent ended.

    ``os.read``, since a thread that waits in ``sys.stdin`` holds a lock that the interpreter wants when it ends.
    """
    while os.read(sys.__stdin__.fileno(), 1):
        pass
    os._exit(130)


def main() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from jambascope.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
