"""What was found, planned, measured, proved; JSON and schema; no torch."""
