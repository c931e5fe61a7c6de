"""`python -m genssd` is the command line."""

from genssd.cli import main

if __name__ == "__main__":
    main()
