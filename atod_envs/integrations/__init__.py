"""The environments and their trajectories in other libraries' clothes, one file a library.

Nothing is imported here: ``atod_envs.integrations.<library>`` loads its library when it is imported itself, and says
what to install where it is missing. The invariants: token ids, log-probs and masks are the recorded ones, never rebuilt
from text; rewards are the environment's own; what a library cannot represent is refused with a reason, never
approximated.
"""
