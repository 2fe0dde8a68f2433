"""What can be known of CUDA on a machine without it: generated code, its launches, reads by the host, copies."""
