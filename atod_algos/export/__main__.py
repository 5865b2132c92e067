"""``python -m atod_algos.export``."""

from atod_algos.export.command import main

if __name__ == "__main__":
    main()
