"""``python -m lpsearch``: the same as the ``lpsearch`` console script."""

from lpsearch.commands.app import main

if __name__ == "__main__":
    main()
