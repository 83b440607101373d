"""edgebake: trained models onto phones and Macs, verified."""

__version__ = "0.1.0"
