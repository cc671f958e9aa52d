"""`python -m supermix` and the installed command `supermix`; Ctrl-C is ours before anything slow is imported."""

import os
import signal


def leave(*_):
    "End this process at once: an exception that is raised during an import may be lost there."
    os.write(2, b"supermix: stopped.\n")
    os._exit(130)


def main():
    "Run the command `supermix` (chapter 90)."
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, leave)
    from supermix.cli import main

    main()


if __name__ == "__main__":
    main()
