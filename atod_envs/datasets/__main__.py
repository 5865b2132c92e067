"""``python -m atod_envs.datasets``."""

import sys

from atod_envs.datasets.command import main
from atod_envs.stopping import stoppable

if __name__ == "__main__":
    with stoppable():
        sys.exit(main())
