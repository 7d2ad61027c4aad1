"""What is trained and how it is exported: LoRA, moving average."""
