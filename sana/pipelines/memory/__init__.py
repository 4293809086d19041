"""What a picture or a training step needs in memory, from shapes alone: nothing is loaded, nothing is measured."""
