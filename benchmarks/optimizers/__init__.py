"""AdamW, Muon and NorMuon at several batches: the loss at equal tokens, and the steps to AdamW's loss."""
