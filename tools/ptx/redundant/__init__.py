"""What a kernel does not need of what orders its accesses, and why."""
