"""The `modelstore` command, also as `python -m modelstore`."""

import gc
import signal
from typing import NoReturn


def main() -> NoReturn:
    """The entry point. Ctrl-C ends it in silence, but while a command runs, which says what became of it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()  # it would look again and again at what is being imported, which never goes
    from modelstore.cli import run

    gc.freeze()
    gc.enable()
    run()


if __name__ == "__main__":
    main()
