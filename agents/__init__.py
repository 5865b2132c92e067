"""Who acts: scripted experts, random, a human, a server, or a language model on an inference engine. Part of atod.

Model libraries are imported only by the modules that need them.
"""

from atod_envs import stopping  # noqa: F401  # so that Ctrl-C ends `python -m` without a traceback
