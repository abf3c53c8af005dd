"""What-if runs without weights: the engine's own streamer, policies and ledger over a recorded trace and a device's times."""
