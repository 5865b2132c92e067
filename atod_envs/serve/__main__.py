"""``python -m atod_envs.serve``; see :mod:`atod_envs.serve.command`."""

import sys

from atod_envs.serve.command import main

if __name__ == "__main__":
    sys.exit(main())
