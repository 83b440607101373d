"""One file per part of a recipe that is checked before a weight is read; ``edgebake.check`` runs them all."""
