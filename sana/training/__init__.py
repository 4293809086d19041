"""Training: the flow-matching trainer of Sana, the trainer of small autoencoders, and what they share."""
