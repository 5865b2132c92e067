"""Official data: where each environment looks for it, what is there, and where it comes from.

``python -m atod_envs.datasets status|get|verify|build`` (also ``atod data ...``).
"""
