"""Model runners: one contract (`base`), several implementations, chosen by `factory`."""
