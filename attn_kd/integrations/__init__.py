"""What fits attn_kd into other libraries' models; each module imports its library."""
