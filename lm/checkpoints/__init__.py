"""Files of a run and of other programs, without Lightning."""
