"""One file each; see ``edgebake.target.CompressMethod`` for the contract.

Besides, a method may have ``OPTIONS`` (``edgebake.target.Option``; ``edgebake.compress._options.filled`` reads a
step's), ``LAST = True`` where no step after it may change weights, and ``SOURCES``, modules besides itself whose
source is part of the store key.
"""
