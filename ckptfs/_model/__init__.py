"""Plain data shared by client and daemon. No IO happens here."""
