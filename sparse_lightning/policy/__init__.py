"""Policy: which blocks a layer has and when they change; pure functions of scores and masks."""
