"""HTTP, once for the whole project: the client of every server, and what lies under every server of ours.

:mod:`~atod_envs.http.client` needs the standard library alone; :mod:`~atod_envs.http.server` needs the extra ``serve``.
"""
