"""``python -m atod_algos.report``."""

from atod_algos.report.command import main

if __name__ == "__main__":
    main()
