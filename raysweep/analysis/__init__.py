"""From rows to what people read: tables and verdicts. Pandas only; no torch, no ray."""
