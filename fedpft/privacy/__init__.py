"""What keeps a silo's part out of sight: secure aggregation. No I/O and no clock in here; docs/privacy.md."""
