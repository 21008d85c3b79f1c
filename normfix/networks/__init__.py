"""Any network: how it is called, copied and captured, and the words of torch."""
