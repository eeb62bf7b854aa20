"""Side by side in one run: ckptfs, what it stands on, and what else there is for the purpose."""
