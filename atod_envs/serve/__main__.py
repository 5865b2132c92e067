"""``python -m atod_envs.serve``; see :mod:`atod_envs.serve.command`."""

import sys

from atod_envs.serve.command import main
from atod_envs.stopping import stoppable

if __name__ == "__main__":
    with stoppable():
        sys.exit(main())
