"""The driver of Kubernetes' container storage interface (CSI), the command ``ckptfs csi``."""
