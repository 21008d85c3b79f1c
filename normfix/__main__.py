"""`python -m normfix` is the command normfix."""

from normfix.cli import main

if __name__ == "__main__":
    main()
