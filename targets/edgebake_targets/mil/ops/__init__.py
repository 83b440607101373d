"""One module per operator family; each lists its operators by MIL name in ``OPERATORS``."""
