"""What every measurement shares: clock, record, machine, memory."""
