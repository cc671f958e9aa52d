"""`python -m supermix` and the installed command `supermix`; Ctrl-C is handled before slow imports."""

import os
import signal


def leave(*_):
    "End this process at once, because an exception during an import may get lost."
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
