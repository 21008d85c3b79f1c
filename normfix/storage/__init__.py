"""Networks in files: open those of others, save and load our own."""
