"""Several processes: rendezvous, gradient reduction, sharded parameters, and the watch over lost ranks."""
