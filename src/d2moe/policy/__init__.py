"""What to read, what to evict, in which order: decisions over a ledger of what is resident, never over the clock."""
