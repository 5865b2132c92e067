"""The name under which verifiers finds the environments: ``vf-eval atod_verifiers``; see :mod:`atod_envs.integrations.verifiers`."""

from atod_envs.integrations.verifiers import AtodEnv, AtodHarness, AtodTaskset

__all__ = ["AtodEnv", "AtodHarness", "AtodTaskset"]
