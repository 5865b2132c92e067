"""``python -m atod_envs.datasets``."""

import sys

from atod_envs.datasets.command import main

sys.exit(main())
