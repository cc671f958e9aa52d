"""`torchrun -m supermix.generate` and `python -m supermix.generate`: the command of chapter 36 under its short name."""

from supermix.mixing.generate import main

if __name__ == "__main__": main()
