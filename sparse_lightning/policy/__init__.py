"""Policy: which blocks a layer has, and when that changes; pure functions on scores and masks."""
