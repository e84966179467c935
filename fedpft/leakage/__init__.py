"""What attackers make of a federation, in a rehearsal where the truth is known: `fedpft leakage`."""
