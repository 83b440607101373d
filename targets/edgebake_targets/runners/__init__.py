"""One file each; see edgebake.target for the contract."""
