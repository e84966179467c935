"""Measurements. Every figure in docs/ comes from a command here; results/ keeps what it printed."""
