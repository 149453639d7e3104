"""``python -m potluck``: the same as the ``potluck`` command."""

from .cli import main

if __name__ == "__main__":
    main()
