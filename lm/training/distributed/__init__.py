"""Several processes: their meeting, the reduction of gradients, shares of parameters, and what watches over them."""
