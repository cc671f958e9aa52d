"""`torchrun -m supermix.generate` and `python -m supermix.generate`: the command `supermix generate`."""

import sys

from supermix.__main__ import main

if __name__ == "__main__":
    sys.argv.insert(1, "generate")
    main()
