"""The verbs that need every room: convert, calibrate, predict, prepare_finetune."""
