"""``python -m atod_algos.study``."""

from atod_algos.study.command import main

if __name__ == "__main__":
    main()
