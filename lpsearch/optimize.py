"""``python -m lpsearch.optimize``: the same as ``lpsearch optimize``."""

import sys

from lpsearch.commands.app import main

if __name__ == "__main__":
    main(["optimize", *sys.argv[1:]])
