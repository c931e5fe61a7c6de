"""The entry point of the command line, `genssd` and `python -m genssd`.

It meets signals before it imports anything else, because the imports of the command line take their time.
"""

from genssd.stopping import StopSignals

StopSignals(restore=False).__enter__()

from genssd.cli import main  # noqa: E402 - after the signals

if __name__ == "__main__":
    main()
