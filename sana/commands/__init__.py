"""Commands: parsers, and what is printed; the work is elsewhere in sana. `sana/cli.py` and scripts call them."""
