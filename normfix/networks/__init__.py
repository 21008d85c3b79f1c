"""Any network: called, copied, captured; the words of torch."""
