"""Applications: the pipeline under its documented import path, and the Gradio demo."""
