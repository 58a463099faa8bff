"""Detection data: COCO-format folders and simulated ultrasound."""
