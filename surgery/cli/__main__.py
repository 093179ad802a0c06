"""`python -m surgery.cli`."""

from . import main

if __name__ == "__main__":
    main()
