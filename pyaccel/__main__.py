"""`python -m pyaccel` is the `pyaccel` command."""

from pyaccel.cli import main

if __name__ == "__main__":
    main()
