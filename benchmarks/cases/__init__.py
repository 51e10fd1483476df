"""What is measured: one file per op family, and BERT's layers, models and training steps."""
