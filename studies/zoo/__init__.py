"""The zoo, measured: its family trained, evaluated, reported."""
