"What a trained network's modules have learnt."
