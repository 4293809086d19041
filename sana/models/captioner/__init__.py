"""Networks of transformers that look at images: captioners (VLM) and CLIP. No training or sampling uses them."""
