"""The operator's kernels in Triton, and the tables they are launched from; nothing of torch.

A kernel's operands, its sizes and what it is compiled for are named tuples and `Variant`s (see
`operands` and `variant`), made in one place, attn_kd/ops/triton_launch.py.
"""
