"""The environments and their trajectories in other libraries' clothes, one file a library.

No library is imported here: ``atod_envs.integrations.<library>`` loads its library when it is imported itself, and
says what to install where it is missing. The invariants: token ids, log-probs and masks are the recorded ones, never
rebuilt from text; rewards are the environment's own; what a library cannot represent is refused with a reason, never
approximated. The other way, :func:`wrap` makes one of ours of any environment.
"""

from atod_envs.integrations.foreign import register, wrap

__all__ = ["register", "wrap"]
