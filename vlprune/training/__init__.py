"""Training: pretraining of small models, fine-tuning with masked weights locked at zero."""
