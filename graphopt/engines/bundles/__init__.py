"""Bundles whose blocks are engines: built block by block, run with the values between them on the GPU."""
