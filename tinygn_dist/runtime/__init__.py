"""What does the process itself do? Progress bars, stage timer, memory, CPU matmul."""
