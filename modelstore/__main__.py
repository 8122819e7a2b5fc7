"""The `modelstore` command, also as `python -m modelstore`."""

import signal
from typing import NoReturn

from modelstore.startup import gc_paused


def main() -> NoReturn:
    """The entry point. Ctrl-C ends it in silence, except while a command runs, which reports its own end."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with gc_paused():
        from modelstore.cli.main import run
    run()


if __name__ == "__main__":
    main()
