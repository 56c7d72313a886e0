"""The benchmark suite: ``python -m benchmarks``, or ``pytest benchmarks`` (pytest-benchmark).

From workload to picture: ``workloads`` (what is computed) and ``providers`` (who computes it) meet
in ``runner``, which checks results with ``measure`` before it times them; the samples go to JSON as
``record`` describes them; ``summary`` and ``report`` make every number, table and plot from the
JSON alone.
"""
