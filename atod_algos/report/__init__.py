"""The report: one page that shows every turn and why it was weighted, and the paper's figures redrawn from stored runs.

    python -m atod_algos.report RUN...              RUN/report.html (opens offline) and, with matplotlib, RUN/figures/
    python -m atod_algos.report RUN --watch         follows a run while it trains

The invariant: everything shown is read from what runs stored, or computed from it by the functions of T-DUR; the
page treats all text as text, whatever an environment or a policy wrote.
"""
