"""The mathematics: losses, advantages, KL, log-probabilities and one optimisation step. Tensors and floats only."""
