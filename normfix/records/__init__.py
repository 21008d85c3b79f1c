"""What was found, planned, measured and proved, as records that know nothing of torch."""
