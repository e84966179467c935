"""Files of institutions and owner: into rows, samples, images, and batches."""
