"""The Linear DiT: Sana, SanaMS, SanaMSCM (Sprint) and SanaMSControlNet, with the official state-dict keys."""
