"""How the rows of a bank are reached. One engine so far: `exact`, which streams all of them."""
