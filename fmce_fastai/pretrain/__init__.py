"How the universal oracle is made."
