"Convergence oracles: networks that score feature maps."
