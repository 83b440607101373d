"""One file per verb of the command line; each is imported when its verb runs."""
