"""`python -m lbfast` is the command `lbfast`."""

from lbfast.cli import main

if __name__ == "__main__":
    main()
