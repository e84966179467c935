"""What keeps a silo's part out of sight: secure aggregation, and noise on what is learned of its samples.

No I/O and no clock in here; docs/privacy.md.
"""
