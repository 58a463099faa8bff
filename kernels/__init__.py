"""Device code, installed as ``attn_kd.kernels``."""
