"""Small helpers, one subject a file. Import the file you need; nothing is re-exported here."""
