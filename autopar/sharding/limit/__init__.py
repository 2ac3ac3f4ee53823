"""Plans where memory is short: within a limit, how far from the best, or the least that any plan takes."""
