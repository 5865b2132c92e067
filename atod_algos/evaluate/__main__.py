"""``python -m atod_algos.evaluate``."""

from atod_algos.evaluate.command import main

main()
