"""The name that verifiers looks for, ``vf-eval atod_verifiers``: :mod:`atod_envs.integrations.verifiers`."""

from atod_envs.integrations.verifiers import AtodEnv, AtodHarness, AtodTaskset

__all__ = ["AtodEnv", "AtodHarness", "AtodTaskset"]
