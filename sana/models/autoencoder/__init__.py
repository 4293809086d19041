"""Autoencoders: images <-> latents, behind one interface (`base.Autoencoder`)."""
