"""Image sizes, transforms and captions, as pure functions. No model and no pipeline is known here."""
