"""What the process that forks the workers imports, once for all of them.

What is imported stays: a collector that looked through it would write to each worker's share of these pages,
and so have them copied.
"""

from cluster.job import stays

with stays():
    import pipeline.data.loader  # noqa: F401
