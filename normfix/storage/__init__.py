"""Networks in files: open anyone's, save and load ours, push."""
